"""Counts from a point on: those operations and events only, priced as their machines' profiles say, added up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pgemu.benchmarking.counts import Counts
from pgemu.objects.machine import Config, Machine

SIZE = 2 << 20
PAGES = np.arange(0, SIZE, 4096, dtype=np.uint64)


def machine(design: str = "pfnmap", vcpus: int = 1) -> Machine:
    return Machine(Config(design, pool=SIZE, page_size=SIZE, vcpus=vcpus))  # type: ignore[arg-type]


def test_only_what_happened_since_is_counted() -> None:
    made = machine()
    gmem = made.create_guest_memfd(SIZE)
    gmem.convert_many(PAGES[:100], shared=True)
    counts = Counts([made])
    gmem.convert_many(PAGES[100:110], shared=True)
    counts.begin()
    assert counts.info() == {}
    gmem.convert_many(PAGES[200:207], shared=True)
    gmem.convert(5, 4096, shared=True)  # not aligned
    info = counts.info()
    assert info["counts"]["operations"] == {"convert": {"ok": 7, "-EINVAL": 1}}
    assert info["counts"]["events"]["convert_ioctl"] == 8
    assert (info["profile"], info["vcpus"], info["host_cpus"]) == ("published", 1, 1)
    assert json.loads(json.dumps(info)) == info


def test_modelled_time_is_what_the_machine_itself_adds_up() -> None:
    made = machine("restructure", vcpus=7)
    gmem = made.create_guest_memfd(SIZE)
    counts = Counts([made])
    gmem.convert_many(PAGES, shared=True)
    from pgemu_kernels.words.operations import Operation

    assert counts.info()["modelled_ns"] == pytest.approx(made.statistics.cost(Operation.CONVERT))


def test_several_machines_are_added_up() -> None:
    made = [machine(vcpus=1), machine(vcpus=3)]
    inodes = [one.create_guest_memfd(SIZE) for one in made]
    both, first, second = Counts(made), Counts(made[:1]), Counts(made[1:])
    inodes[0].convert_many(PAGES[:5], shared=True)
    inodes[1].convert_many(PAGES[:8], shared=True)
    info = both.info()
    assert info["counts"]["operations"] == {"convert": {"ok": 13}}
    assert info["vcpus"] == [1, 3]
    parts = np.add(first.info()["modelled_ns"], second.info()["modelled_ns"])
    assert info["modelled_ns"] == pytest.approx(parts.tolist())


def test_edits_of_a_table_have_events_and_no_operation() -> None:
    made = Machine(Config())
    table = made.create_page_table("x86-64")
    counts = Counts([made])
    table.map_range(0, 0, SIZE, max_level=1)
    info = counts.info()
    assert info["counts"]["operations"] == {}
    assert info["counts"]["events"]["leaf_written"] == 512
    assert 0 < info["modelled_ns"][0] <= info["modelled_ns"][1]


def test_no_machine_counts_nothing() -> None:
    assert Counts([]).info() == {}
