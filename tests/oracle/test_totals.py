"""Every captured checkpoint is accounted for: replayed, or in a scenario named here with the reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle import capture as oracle
from oracle.test_replay_process import checkpoints_of as process_checkpoints
from oracle.test_replay_stage2 import SCENARIOS as STAGE2_SCENARIOS

THP = "transparent huge pages"
MIXED = "a random mix with transparent huge pages, files and fork"
NOT_REPLAYED = {
    "02-thp": THP,
    "03-file": "the page cache of tmpfs and fault-around",
    "10-mthp": "anonymous folios of several sizes",
    "22-kvm-thp": THP,
    "31-random-anon": MIXED,
    "32-random-anon": MIXED,
    "41-random-mixed": MIXED,
    "42-random-mixed": MIXED,
    "51-random-kvm": MIXED,
    "52-random-kvm": MIXED,
    "60-process-trace": "another program's operations, of which the capture has the system calls only",
}
SHIPPED = {  # checkpoints: decoded, replayed, not replayed
    "linux-6.1.192-debian": (324, 0, 324),
    "linux-6.12.107-debian": (324, 164, 160),
    "linux-6.18.15-debian": (324, 164, 160),
    "linux-7.3.4-debian-pti": (324, 164, 160),
    "linux-7.3.4-small": (324, 164, 160),
    "linux-7.3.4-small-ept": (109, 60, 49),
}


@pytest.mark.parametrize("path", oracle.captures(), ids=lambda path: path.name.removesuffix(".json.xz"))
def test_every_scenario_is_replayed_or_has_a_reason(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = oracle.load(path)
    replayed, left = 0, {}
    for name, checkpoints in capture.scenarios().items():
        hugetlb = name == "90-hvo"  # the others with HugeTLB pages are replayed there once more: test_hugetlb
        if capture.replayed and (name in process_checkpoints(capture) or name[:2] in STAGE2_SCENARIOS or hugetlb):
            replayed += len(checkpoints)
        elif capture.replayed:
            left[name] = (len(checkpoints), NOT_REPLAYED[name])
        else:
            left[name] = (len(checkpoints), "entries of this kernel are decoded, its operations are not run")
    with capsys.disabled():
        total = len(capture.checkpoints)
        print(f"\n{capture.name}: {total}/{total} checkpoints decoded, {replayed}/{total} replayed; not replayed:")
        for name, (count, reason) in left.items():
            print(f"  {name}, {count} checkpoints: {reason}")
    if oracle.shipped():
        rest = sum(count for count, _ in left.values())
        assert (len(capture.checkpoints), replayed, rest) == SHIPPED[capture.name]
