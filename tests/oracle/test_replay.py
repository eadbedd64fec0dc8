"""Captured scenarios replayed: every checkpoint of processes and VMs whose operations pgemu has, in every capture.

What is not replayed, or only but for some memory, is listed by what pgemu would need for it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from oracle import capture as oracle
from oracle.operations import NotModelledError
from oracle.replay import Done, Replay
from oracle.replay_pfnmap import ReplayPfnmap, is_for_designs

REPLAYED = {  # checkpoints: all, replayed, replayed in part
    "oracle/linux-6.1.192-debian": (324, 0, 0),
    "oracle/linux-6.12.107-debian": (324, 305, 10),
    "oracle/linux-6.18.15-debian": (324, 305, 10),
    "oracle/linux-7.3.4-debian-pti": (324, 305, 10),
    "oracle/linux-7.3.4-small": (324, 305, 10),
    "oracle/linux-7.3.4-small-ept": (109, 109, 0),
    "oracle-2/linux-6.12.107-debian": (304, 288, 10),
    "oracle-2/linux-7.3.4-small": (304, 288, 10),
    "oracle-2/linux-7.3.4-small-ept": (95, 95, 0),
    "oracle-pfnmap/linux-7.3.4-debian-pfnmap": (979, 954, 0),
    "oracle-pfnmap/linux-7.3.4-debian-pfnmap-2m": (177, 97, 0),
}
AGED = {"oracle/linux-7.3.4-debian-pti": 1}  # entries whose accessed bit the kernel cleared by itself
ONLY_DECODED = "this kernel's tables are decoded, its operations are not run"


def replayed(capture: oracle.Capture, checkpoints: list[oracle.Checkpoint]) -> tuple[Done, int]:
    """Replay a scenario: what was done, and how many stage-2 trees were compared."""
    if not capture.replayed:
        return Done(left={ONLY_DECODED: len(checkpoints)}), 0
    kind = ReplayPfnmap if is_for_designs(capture, checkpoints) else Replay
    try:
        replay = kind(capture, checkpoints)
    except NotModelledError as error:
        return Done(left={str(error): len(checkpoints)}), 0
    return replay.run(), replay.guests.trees


def test_every_checkpoint_is_equal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = oracle.load(path)
    whole = in_part = trees = aged = huge_pages = 0
    left: Counter[str] = Counter()
    for name, checkpoints in capture.scenarios().items():
        done, compared = replayed(capture, checkpoints)
        whole, in_part, trees = whole + done.whole, in_part + done.in_part, trees + compared
        aged, huge_pages = aged + done.aged, huge_pages + done.huge_pages
        left.update(done.left)
        assert done.whole + sum(done.left.values()) == len(checkpoints), name
    total = len(capture.checkpoints)
    with capsys.disabled():
        print(
            f"\n{capture.name}: {whole}/{total} checkpoints replayed, {in_part} in part, {trees} stage-2 trees, "
            f"{huge_pages} pages of transparent huge pages, {aged} entries aged",
            end="",
        )
        for what, count in left.most_common():
            print(f"\n  {count} not, or in part: {what}", end="")
    if capture.shipped:
        assert (total, whole, in_part) == REPLAYED[capture.name]
        assert aged == AGED.get(capture.name, 0)
