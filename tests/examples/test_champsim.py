"""ChampSim's VirtualMemory replaced: its Python side here, and the whole where CHAMPSIM_ROOT names a checkout."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from c_programs import INCLUDE, PACKAGE
from pgemu.examples.champsim.owner import PAGE_1G, Owner

FOLDER = PACKAGE / "examples" / "champsim"
INSTRUCTION = np.dtype(
    [("ip", "<u8"), ("branch", "u1"), ("taken", "u1"), ("dreg", "u1", 2), ("sreg", "u1", 4), ("dmem", "<u8", 2),
     ("smem", "<u8", 4)]
)  # fmt: skip


@pytest.mark.parametrize(("design", "level"), [("restructure", 1), ("pfnmap", 2)])
def test_a_touch_maps_what_the_design_maps(design: str, level: int) -> None:
    """Addresses of a GiB far up take the next GiB of memory; of each GiB the first 4K are shared."""
    owner = Owner(design, 2, PAGE_1G // 4096, 2)
    for core, address in ((0, 0x7F12_3456_7000), (0, 0x7F12_3456_7008), (1, 0x7F12_3456_7000)):
        assert owner.touch(core, address) == 0
    assert owner.touch(1, 0) == -12  # both GiB are taken
    found = [owner.vms[core].translate([0x7F12_3456_7123]) for core in (0, 1)]
    assert [int(one.level[0]) for one in found] == [level, level]
    offset = 0x7F12_3456_7123 % PAGE_1G
    places = [((owner.gmem.pfn(number * PAGE_1G + offset & -4096) or 0) << 12) + 0x123 for number in (0, 1)]
    assert [int(one.physical[0]) for one in found] == places


def test_the_owner_answers_until_its_input_ends() -> None:
    name = f"pgemu-champsim-test-{os.getpid()}"
    command = [sys.executable, "-m", "pgemu.examples.champsim.owner", name, "--gigabytes", "1", "--design", "pfnmap"]
    asked = struct.pack("<QQ", 0, 0x1000) + struct.pack("<QQ", 0, PAGE_1G)
    done = subprocess.run(command, input=asked, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert struct.unpack("<3q", done.stdout) == (0, 0, -12)
    assert not Path("/dev/shm", name).exists()


@pytest.mark.skipif("CHAMPSIM_ROOT" not in os.environ, reason="CHAMPSIM_ROOT names no checkout of ChampSim")
def test_champsim_runs_over_the_tables_of_both_designs(tmp_path: Path) -> None:
    """A program that reads 4000 pages of 64 MiB at random. The checkout is copied; it has to build as it is."""
    root = tmp_path / "champsim"
    made = shutil.ignore_patterns(".git", ".csconfig", "bin", "absolute.options", "_configuration.mk")  # name its place
    shutil.copytree(os.environ["CHAMPSIM_ROOT"], root, symlinks=True, ignore=made)
    shutil.copy(FOLDER / "vmem.h", root / "inc")
    shutil.copy(INCLUDE / "pgemu_shared.h", root / "inc")
    shutil.copy(FOLDER / "vmem.cc", root / "src")
    configure = [sys.executable, "config.sh", "--no-compile-all-modules", FOLDER / "config.json"]
    subprocess.run(configure, cwd=root, check=True, timeout=120)
    built = subprocess.run(["make", "bin/champsim"], cwd=root, capture_output=True, text=True, timeout=1800)
    assert (root / "bin" / "champsim").exists(), built.stderr[-2000:]
    random = np.random.default_rng(1)
    trace = np.zeros(20_000, INSTRUCTION)
    trace["ip"] = 0x40_0000 + np.arange(len(trace)) % 512 * 4
    trace["smem"][:, 0] = 0x7F00_0000_0000 + random.integers(0, 4000, len(trace)) * 16384
    trace.tofile(tmp_path / "random.champsim")
    told = {}
    for design in ("restructure", "pfnmap"):
        environment = os.environ | {
            "PGEMU_DESIGN": design, "PGEMU_SHARED_EVERY": "262144", "PGEMU_PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        command = [root / "bin" / "champsim", "-w", "1000", "-i", "5000", tmp_path / "random.champsim"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr
        found = re.search(
            r"\[VMEM\] pgemu: (\d+) walks, (\d+) faults; last entries of walks: (\d+) of 4K, (\d+) of 2M, (\d+) of 1G",
            done.stdout,
        )
        assert found is not None, done.stdout[-1000:]
        told[design] = [int(number) for number in found.groups()]
    for walks, faults, *leaves in told.values():
        assert walks == sum(leaves) > 1000
        assert faults > 10
    assert told["restructure"][3:] == [0, 0]  # a page of each GiB is shared: all of it is 4K
    assert told["pfnmap"][3] > 1000
    assert not list(Path("/dev/shm").glob("pgemu-champsim-[0-9]*"))
