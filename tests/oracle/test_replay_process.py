"""Captured scenarios replayed: the processes' tables of every checkpoint, in every capture that pgemu can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle import capture as oracle
from oracle.replay_process import Replay

# Checkpoints of each scenario, in every capture of a machine with AMD's nested paging.
CHECKPOINTS = {
    "01-anon-4k": 13,
    "04-hugetlb-2m": 14,
    "05-hugetlb-1g": 7,
    "06-fork-cow": 7,
    "07-pfnmap-devmem": 4,
    "08-pfnmap-vfio": 11,
    "11-guard": 4,
    "12-pt-reclaim": 8,
    "13-mremap": 7,
    "14-populate": 9,
    "15-hugetlb-share": 6,
    "23-kvm-private": 15,
    "24-kvm-gmem-mmap": 11,
    "25-kvm-vfio-bar": 5,
}


# The machine with Intel's ran KVM scenarios only, and had no PCI device with memory.
EPT = ("23-kvm-private", "24-kvm-gmem-mmap")


def checkpoints_of(capture: oracle.Capture) -> dict[str, int]:
    """Checkpoints of the scenarios that are replayed in a capture."""
    return {name: CHECKPOINTS[name] for name in EPT} if capture.stage2 == "ept" else CHECKPOINTS


@pytest.mark.parametrize("path", oracle.captures(), ids=lambda path: path.name.removesuffix(".json.xz"))
def test_every_checkpoint_is_equal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = oracle.load(path)
    if not capture.replayed:
        pytest.skip(f"{capture.kernel}: entries are decoded, operations are not run")
    done = {}
    for name, checkpoints in capture.scenarios().items():
        if name in checkpoints_of(capture):
            done[name] = Replay(capture, checkpoints).run()
            with capsys.disabled():
                print(f"\n{capture.name} {name}: process, {done[name]}/{len(checkpoints)} checkpoints", end="")
    if oracle.shipped():
        assert done == checkpoints_of(capture)
