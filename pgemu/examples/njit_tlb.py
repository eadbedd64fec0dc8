"""A simulator's own TLB in front of a page table, all in one compiled loop, kept valid by what edits return.

The loop is a caller's own @njit function: it looks pages up in four-way sets that are its own arrays, walks by
pgemu.kernels.translate() on a miss, and now and then unmaps, maps or write-protects memory. Each edit says which input
addresses must leave TLBs; what it says goes, and nothing else. At the end every entry of the TLB is compared with a
translation of its address. (pgemu.guest.Tlb is the other door: TLBs of real processors, batch by batch from Python.)

Conversions and faults return no addresses, for Linux flushes a VM as a whole: run_vm() has a guest's TLB, and empties
it whenever Event.TLB_FLUSH_VM was counted. Who drops the converted range only keeps what is no longer so, for a leaf of
2M or 1G goes as a whole.

Run it: python -m pgemu.examples.njit_tlb
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pgemu import Config, Event, Flag, Machine, kernels
from pgemu.machine.designs import Design
from pgemu.tables.page_table import PageTable

Array = np.ndarray[Any, Any]

BASE, PAGE, LARGE = 0x4000_0000, 4096, 2 << 20
PAGES = 4096  # 16 MiB: the first half in leaves of 2M, the second in leaves of 4K
SETS, WAYS = 256, 4
HITS, MISSES, FAULTS, EDITS, DROPPED = range(5)
USER_WRITE = kernels.USER_WRITE
WRITABLE = 1 << 1  # bit 1 of an x86-64 entry


@njit(nogil=True)
def invalidate(tags: Array, start: int, end: int, counts: Array) -> None:
    """Drop what lies in [start, end): page by page if there are few, else every set is searched."""
    first, last = start // PAGE, (end - 1) // PAGE
    for page in range(first, last + 1) if last - first < SETS else range(SETS):
        row = tags[page % SETS]
        for way in range(WAYS):
            if row[way] != 0 and first <= row[way] - 1 <= last:
                row[way] = 0
                counts[DROPPED] += 1


@njit(nogil=True)
def remap(handle: Any, tree: Array, address: int, attributes: int, i: int) -> Any:
    """Map the page of an address to a frame of its own, whatever was there."""
    return kernels.map(handle, tree, address // PAGE * PAGE, (1 << 33) + i * PAGE, 1, attributes, 1)


@njit(nogil=True)
def edit(handle: Any, tree: Array, address: int, attributes: int, i: int) -> Any:
    """One edit of a page, of three kinds in turn: it goes, it comes back elsewhere, or it becomes read-only."""
    if i % 3 == 0:
        return kernels.unmap(handle, tree, address, PAGE)
    if i % 3 == 1:
        return remap(handle, tree, address, attributes, i)
    return kernels.protect(handle, tree, address, PAGE, 0, WRITABLE)


@njit(nogil=True)
def run(
    handle: Any, tree: Array, addresses: Array, edited: Array, attributes: int, tags: Array, frames: Array, flush: bool
) -> Array:
    """Writes to `addresses` (int64[n]); after every 16th an edit of the next of `edited` (int64[m]). Faults map a page.

    tags, frames: int64[SETS, WAYS], page number + 1 (0: empty) and frame number. What was counted: int64[5].
    """
    counts = np.zeros(5, np.int64)
    for i in range(addresses.size):
        page = addresses[i] // PAGE
        row, entry = tags[page % SETS], frames[page % SETS]
        hit = False
        for way in range(WAYS):
            hit |= row[way] == page + 1
        counts[HITS if hit else MISSES] += 1
        if not hit:
            found = kernels.translate(handle, tree, addresses[i], USER_WRITE)
            if found.status == 0:
                victim = i % WAYS
                row[victim], entry[victim] = page + 1, found.physical // PAGE
            else:
                counts[FAULTS] += 1
                done = remap(handle, tree, addresses[i], attributes, addresses.size + i)
                if flush and done.flush_level != 0:
                    invalidate(tags, done.flush_start, done.flush_end, counts)
        if i % 16 == 15:
            done = edit(handle, tree, edited[i // 16], attributes, i // 16)
            counts[EDITS] += done.status == 0
            if flush and done.flush_level != 0:
                invalidate(tags, done.flush_start, done.flush_end, counts)
    return counts


@njit(nogil=True)
def stale(handle: Any, tree: Array, tags: Array, frames: Array, kind: int) -> int:
    """How many entries of the TLB a walk of the table, or of stage 2, does not give by now."""
    wrong = 0
    for number in range(SETS):
        for way in range(WAYS):
            if tags[number, way] != 0:
                found = kernels.translate(handle, tree, (tags[number, way] - 1) * PAGE, kind)
                wrong += found.status != 0 or found.physical != frames[number, way] * PAGE
    return wrong


def make_table() -> PageTable:
    """A process's table over PAGES pages from BASE."""
    table = Machine(Config()).create_page_table("x86-64")
    half = PAGES // 2 * PAGE
    large = table.map_range(BASE, 1 << 32, half, max_level=2)
    small = table.map_range(BASE + half, (1 << 32) + half, half, max_level=1)
    assert (large.detail, small.detail) == (half // LARGE, PAGES // 2)
    return table


def simulate(accesses: int, *, flush: bool = True, seed: int = 1) -> tuple[Array, int]:
    """What was counted, and how many entries are stale at the end: none, but where nothing is flushed."""
    table = make_table()
    random = np.random.default_rng(seed)
    addresses = BASE + (random.random(accesses) ** 3 * (PAGES * PAGE)).astype(np.int64)  # some pages often
    edited = BASE + random.integers(0, PAGES, accesses // 16 + 1) * PAGE
    tags, frames = np.zeros((SETS, WAYS), np.int64), np.zeros((SETS, WAYS), np.int64)
    handle, tree = kernels.Handle(table.machine, "translate", "edit"), kernels.tree(table)
    counts = run(handle, tree, addresses, edited, table.format.leaf[0], tags, frames, flush)
    return counts, stale(handle, tree, tags, frames, USER_WRITE)


# --------------------------------------------------------------------------- a guest's TLB

MEMORY, CHUNK = 1 << 30, 512  # of guest memory, bytes; pages that are converted at once: 2M
BY_EVENT, BY_RANGE = range(2)  # how the TLB learns of a conversion


@njit(nogil=True)
def run_vm(
    handle: Any, tree: Array, vm: int, inode: int, addresses: Array, tags: Array, frames: Array, how: int
) -> Array:
    """Reads by a guest of `addresses` (int64[n]); after every 64th the 4K page there is converted, to and fro.

    Counted and of the TLB as run() has it: EDITS are conversions, DROPPED entries.
    """
    counts = np.zeros(5, np.int64)
    flushed = kernels.event_count(handle, Event.TLB_FLUSH_VM)
    for i in range(addresses.size):
        page = addresses[i] // PAGE
        row, entry = tags[page % SETS], frames[page % SETS]
        hit = False
        for way in range(WAYS):
            hit |= row[way] == page + 1
        counts[HITS if hit else MISSES] += 1
        if not hit:
            found = kernels.translate(handle, tree, addresses[i], kernels.PLAIN)
            if found.status != 0:
                counts[FAULTS] += 1
                kernels.guest_fault(handle, vm, addresses[i], Flag.WRITE)
                found = kernels.translate(handle, tree, addresses[i], kernels.PLAIN)
            if found.status == 0:
                row[i % WAYS], entry[i % WAYS] = page + 1, found.physical // PAGE
        if i % 64 == 63:
            done = kernels.convert(handle, inode, page * PAGE, PAGE, i // 64 % 2 == 0)
            counts[EDITS] += done.status == 0
            if how == BY_RANGE:
                invalidate(tags, page * PAGE, page * PAGE + PAGE, counts)
        now = kernels.event_count(handle, Event.TLB_FLUSH_VM)
        if how == BY_EVENT and now != flushed:
            invalidate(tags, 0, MEMORY, counts)
        flushed = now
    return counts


def simulate_vm(accesses: int, design: Design = "pfnmap", *, how: int = BY_EVENT, seed: int = 1) -> tuple[Array, int]:
    """What was counted of a VM with 1G pages, and how many entries are stale at the end: none BY_EVENT."""
    machine = Machine(Config(design, pool=MEMORY))
    gmem, vm = machine.create_guest_memfd(MEMORY, shared=True), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    random = np.random.default_rng(seed)
    addresses = random.integers(0, CHUNK, accesses) * PAGE
    tags, frames = np.zeros((SETS, WAYS), np.int64), np.zeros((SETS, WAYS), np.int64)
    handle, tree = kernels.Handle(machine, "translate", "operate"), kernels.tree(vm)
    counts = run_vm(handle, tree, vm.vm, gmem.inode, addresses, tags, frames, how)
    return counts, stale(handle, tree, tags, frames, kernels.PLAIN)


def main() -> None:
    """Print what a simulation counted."""
    counts, wrong = simulate(1_000_000)
    for name, number in zip(("hits", "misses", "faults", "edits", "entries dropped"), counts.tolist(), strict=True):
        print(f"{name:16} {number:>9,}")
    print(f"{'stale at the end':16} {wrong:>9,}")
    _, wrong = simulate(1_000_000, flush=False)
    print(f"{'... unflushed':16} {wrong:>9,}")
    counts, wrong = simulate_vm(200_000)
    print(f"guest: {counts[EDITS]:,} conversions, {wrong:,} stale; {simulate_vm(200_000, how=BY_RANGE)[1]:,} by range")


if __name__ == "__main__":
    main()
