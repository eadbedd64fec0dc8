"""Captured KVM scenarios replayed: the stage-2 tree of every checkpoint, in every capture that pgemu can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle import capture as oracle
from oracle.replay_stage2 import Replay

SCENARIOS = ("20", "21", "23", "24", "25", "26")

# Checkpoints by scenario. The EPT machine has no PCI device with memory.
NPT = {"20": 14, "21": 15, "23": 15, "24": 11, "25": 5, "26": 4}
# Trees compared: without one a VM has not run, has just lost a slot, or was refused (Debian's kernels are built without
# software-protected VMs, scenario 23; 6.12 has no guest_memfd that can be mapped, scenario 24 is MMIO there).
TREES = {
    "linux-6.12.107-debian": 42,
    "linux-6.18.15-debian": 41,
    "linux-7.3.4-debian-pti": 42,
    "linux-7.3.4-small": 57,
    "linux-7.3.4-small-ept": 53,
}
EPT = {"20": 14, "21": 16, "23": 15, "24": 11, "26": 4}


@pytest.mark.parametrize("path", oracle.captures(), ids=lambda path: path.name.removesuffix(".json.xz"))
def test_every_checkpoint_is_equal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = oracle.load(path)
    if not capture.replayed:
        pytest.skip(f"{capture.kernel}: entries are decoded, operations are not run")
    done = {}
    trees = 0
    for name, checkpoints in capture.scenarios().items():
        if name[:2] in SCENARIOS:
            replay = Replay(capture, checkpoints)
            done[name[:2]] = replay.run()
            trees += replay.trees
            with capsys.disabled():
                print(f"\n{capture.name} {name}: stage 2, {done[name[:2]]}/{len(checkpoints)} checkpoints", end="")
                print(f" replayed, {replay.trees} trees", end="")
    if oracle.shipped():
        assert done == (EPT if capture.stage2 == "ept" else NPT)
        assert trees == TREES[capture.name]
