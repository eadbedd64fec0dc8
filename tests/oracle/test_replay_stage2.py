"""Captured KVM scenarios replayed: the stage-2 tree of every checkpoint, in every capture that pgemu can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle import capture as oracle
from oracle.replay_stage2 import Replay

SCENARIOS = ("20", "21", "23", "24", "25", "26")

# Checkpoints by scenario. The EPT machine has no PCI device with memory.
NPT = {"20": 14, "21": 15, "23": 15, "24": 11, "25": 5, "26": 4}
EPT = {"20": 14, "21": 16, "23": 15, "24": 11, "26": 4}


@pytest.mark.parametrize("path", oracle.captures(), ids=lambda path: path.name.removesuffix(".json.xz"))
def test_every_checkpoint_is_equal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = oracle.load(path)
    if not capture.replayed:
        pytest.skip(f"{capture.kernel}: entries are decoded, operations are not run")
    done = {}
    for name, checkpoints in capture.scenarios().items():
        if name[:2] in SCENARIOS:
            done[name[:2]] = Replay(capture, checkpoints).run()
            with capsys.disabled():
                print(f"\n{capture.name} {name}: stage 2, {done[name[:2]]}/{len(checkpoints)} checkpoints", end="")
    if oracle.shipped():
        assert done == (EPT if capture.stage2 == "ept" else NPT)
