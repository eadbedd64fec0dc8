"""A TLB and a walker in the shape of gem5's: misses, reads in order, faults, what an edit has flushed."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

from pgemu import Config, Machine
from pgemu.adapters import gem5
from pgemu.adapters.gem5 import Fault, Mode, Request, Tlb, Walker
from pgemu.examples import gem5_mmu
from pgemu.tables.translation import WalkStatus

G1, M2 = 1 << 30, 1 << 21


def table_of_2m() -> object:
    table = Machine(Config()).create_page_table("x86-64")
    table.map_range(G1, 2 * G1, 4 * M2)
    return table


def test_the_example_of_the_module_is_right() -> None:
    done = doctest.testmod(gem5)
    assert (done.attempted, done.failed) == (9, 0)


def test_a_walk_reads_entries_from_the_top_table_on_and_writes_accessed_and_dirty_bits() -> None:
    table = Machine(Config()).create_page_table("x86-64")
    clean = table.format.leaf[0] & ~(table.format.accessed | table.format.dirty)
    table.map(G1, 4096, attributes=clean)
    walk = Tlb(Walker(table)).translate_timing(Request(G1), Mode.WRITE)
    assert walk is not None
    steps = [where for _, where, _ in table.walk(G1)]
    assert [(read.address, read.write) for read in walk.reads] == [
        *((where, False) for where in steps),
        (steps[-1], True),
    ]


def test_a_page_is_translated_once_until_it_is_demapped() -> None:
    table = table_of_2m()
    tlb = Tlb(Walker(table), entries=2)
    for address, misses in ((G1 + 5, 1), (G1 + M2 - 1, 1), (G1 + M2, 2), (G1 + 2 * M2, 3), (G1 + M2, 3), (G1, 4)):
        request = Request(address)
        assert tlb.translate_atomic(request, Mode.READ) is None
        assert (tlb.misses, request.paddr) == (misses, address + G1)
    flush = table.unmap(G1, M2).flush
    tlb.demap(flush.start, flush.end)
    assert tlb.translate_atomic(Request(G1), Mode.READ) == Fault(G1, WalkStatus.NOT_PRESENT, 4)
    assert tlb.translate_atomic(Request(G1 + M2), Mode.READ) is None  # still held
    assert (tlb.hits, tlb.misses) == (3, 5)
    tlb.flush_all()
    tlb.translate_atomic(Request(G1 + M2), Mode.READ)
    assert tlb.misses == 6


def test_rights_are_judged_by_what_is_done() -> None:
    machine = Machine(Config("pfnmap", pool=M2, page_size=M2))
    process = machine.create_process()
    process.mmap_anonymous(G1, 4096, prot=1)
    process.touch(G1)
    tlb = Tlb(Walker(process))
    assert tlb.translate_atomic(Request(G1), Mode.READ) is None
    fault = tlb.translate_atomic(Request(G1), Mode.WRITE)
    assert fault == Fault(G1, WalkStatus.PERMISSION, 7)  # present, write, user
    request = Request(G1 + 3)
    assert tlb.translate_functional(request) is None
    assert request.paddr == int(process.translate([G1 + 3]).physical[0])
    assert tlb.translate_functional(Request(2 * G1)) == Fault(2 * G1, WalkStatus.NOT_PRESENT, 0)


def test_a_tlb_without_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="entries 0: expected at least 1"):
        Tlb(Walker(table_of_2m()), entries=0)


def test_the_simulator_shows_what_the_designs_map() -> None:
    """A page of the 1G is shared: restructure maps all of it by 4K, four entries a walk; pfnmap the rest by 2M."""
    missed, reads, _ = gem5_mmu.simulate("restructure", 300)
    assert reads == 4 * missed
    missed, reads, _ = gem5_mmu.simulate("pfnmap", 300)
    assert missed < 100
    assert 3 * missed <= reads <= 3 * missed + 60  # accesses to the 2M with the shared page read four
    done = subprocess.run(
        [sys.executable, "-m", "pgemu.examples.gem5_mmu"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["restructure", "pfnmap"]
