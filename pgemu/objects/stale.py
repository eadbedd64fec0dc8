"""What is left behind: entries of processes, and pages that KVM itself maps, to frames that are not theirs any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.objects.pins import mapped_by_kvm
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS, LARGE

if TYPE_CHECKING:
    from pgemu.machine.core import Core

Array = np.ndarray[Any, Any]
_ADDRESS = np.uint64(ADDRESS)


class StaleEntry(NamedTuple):
    """One of them: which process reaches which frame at which address, and whose the frame is by now.

    space: number of the process. address: HVA, bytes. pfn: frame that the entry names. owner: number of the
    guest_memfd inode that has the frame in its page cache, or None (free, or held by whoever took a reference).
    """

    space: int
    address: int
    pfn: int
    owner: int | None


class StaleMapping(NamedTuple):
    """A page that KVM itself maps (Vm.map_page, Vm.pfn_cache) and may not use any more.

    number: of the mapping. vm: of the VM. gpa: guest physical address, bytes. pfn: frame that KVM uses. why: "private",
    or "freed": it is not at that page of the inode any more, and nobody holds it for KVM. owner: as in StaleEntry.
    """

    number: int
    vm: int
    gpa: int
    pfn: int
    why: Literal["private", "freed"]
    owner: int | None


def stale_mappings(machine: Core, inode: int, is_shared: Callable[[int], bool]) -> list[StaleMapping]:
    """See GuestMemfd.stale_mappings. is_shared: GuestMemfd.is_shared."""
    state = machine.arrays.state
    owners = _owners(machine)
    have = _frames(machine, inode)
    generations = state[int(W.STATE_VMS) :][: W.VMS * W.V_WORDS].reshape(-1, W.V_WORDS)[:, W.V_GENERATION]
    found: list[StaleMapping] = []
    for number, row in enumerate(mapped_by_kvm(machine)):
        kind, vm, gpa, pfn, index = (int(row[word]) for word in (W.K_KIND, W.K_VM, W.K_GPA, W.K_PFN, W.K_INDEX))
        cached = row[W.K_VALID] and row[W.K_SLOTS] == generations[vm]
        if row[W.K_INODE] != inode or not (kind == W.MAPPED_MAP or (kind == W.MAPPED_CACHE and cached)):
            continue
        moved = int(have[index]) != pfn
        if row[W.K_REFERENCES] if moved else is_shared(index << 12):
            continue
        owner = owners.get(pfn >> machine.config.page_order)
        found.append(StaleMapping(number, vm, gpa, pfn, "freed" if moved else "private", owner))
    return found


def stale_entries(machine: Core, inode: int) -> list[StaleEntry]:
    """See GuestMemfd.stale_entries."""
    state = machine.arrays.state
    owners = _owners(machine)
    have = _frames(machine, inode)
    found: list[StaleEntry] = []
    rows = state[int(W.STATE_VMAS) :][: machine.register(W.R_VMAS) * W.A_WORDS].reshape(-1, W.A_WORDS)
    for row in rows[(rows[:, W.A_LIVE] != 0) & (rows[:, W.A_INODE] == inode)]:
        space = int(row[W.A_SPACE])
        root = int(state[int(W.STATE_SPACES) + space * W.S_WORDS + int(W.S_ROOT)])
        start = int(row[W.A_START]) >> 12
        pages = mapped(machine.arrays.ram, root, start, int(row[W.A_END]) >> 12)
        here = entered(machine.arrays.ram, root, pages)
        index = pages.astype(np.int64) - start + int(row[W.A_PGOFF])
        inside = index < len(have)
        own = np.zeros(len(pages), np.uint64)
        own[inside] = have[index[inside]]
        wrong = np.flatnonzero((here != 0) & (here != own))
        found += [
            StaleEntry(space, int(pages[i]) << 12, int(here[i]), owners.get(int(here[i]) >> machine.config.page_order))
            for i in wrong
        ]
    return found


def mapped(ram: Array, root: int, first: int, last: int) -> Array:
    """uint64[n], ascending: the virtual page numbers in [first, last) that x86-64 tables of four levels map.

    As many entries are read as there are tables, however large the range is.
    """
    found = [np.zeros(0, np.uint64)]
    blocks = np.arange(first >> 27, (max(last, 1) - 1 >> 27) + 1, dtype=np.uint64)
    tables = np.full(len(blocks), root >> 3, np.uint64)
    for level in range(4, 0, -1):
        shift = np.uint64(9 * (level - 1))
        inside = (blocks + np.uint64(1) << shift > first) & (blocks << shift < last)
        blocks, tables = blocks[inside], tables[inside]
        entries = ram[tables + (blocks & np.uint64(511))]
        blocks, entries = blocks[entries & np.uint64(1) != 0], entries[entries & np.uint64(1) != 0]
        leaf = np.full(len(blocks), level == 1) | (entries & np.uint64(LARGE) != 0)
        found.append(_spread(blocks[leaf], 1 << int(shift)))
        blocks = _spread(blocks[~leaf], 512)
        tables = np.repeat((entries[~leaf] & _ADDRESS) >> np.uint64(3), 512)
    pages = np.sort(np.concatenate(found))
    return pages[(pages >= first) & (pages < last)]


def _spread(blocks: Array, parts: int) -> Array:
    """Numbers of the `parts` parts of each block."""
    if not blocks.size:
        return blocks
    return np.asarray(blocks[:, None] * np.uint64(parts) + np.arange(parts, dtype=np.uint64)).reshape(-1)


def entered(ram: Array, root: int, pages: Array) -> Array:
    """uint64[n]: the frame that x86-64 tables of four levels give to each virtual page number; 0 where none."""
    frames = np.zeros(len(pages), np.uint64)
    at = np.arange(len(pages))
    table = np.full(len(pages), root >> 3, np.uint64)
    for level in range(4, 0, -1):
        shift = np.uint64(9 * (level - 1))
        entries = ram[table + (pages[at] >> shift & np.uint64(511))]
        at, entries = at[entries & np.uint64(1) != 0], entries[entries & np.uint64(1) != 0]
        leaf = np.full(len(at), level == 1) | (entries & np.uint64(LARGE) != 0)
        inside = (np.uint64(1) << shift) - np.uint64(1)
        base = (entries & _ADDRESS) >> np.uint64(12) & ~inside
        frames[at[leaf]] = base[leaf] + (pages[at[leaf]] & inside)
        at, table = at[~leaf], (entries[~leaf] & _ADDRESS) >> np.uint64(3)
    return frames


def _blocks(machine: Core, inode: int) -> Array:
    """uint64[n, B_WORDS]: an inode's block rows."""
    row = int(W.STATE_INODES) + inode * W.I_WORDS
    first, count = (int(machine.arrays.state[row + int(word)]) for word in (W.I_BLOCK, W.I_BLOCKS))
    return machine.arrays.state[first : first + count * W.B_WORDS].reshape(-1, W.B_WORDS)


def _cached(blocks: Array) -> Array:
    """bool[n]: which blocks have a folio, or its pieces, in the page cache."""
    kind = blocks[:, W.B_STATE]
    return np.asarray((kind != W.BLOCK_ABSENT) & (kind != W.BLOCK_ZOMBIE))


def _frames(machine: Core, inode: int) -> Array:
    """uint64[pages]: frame of each page of an inode; 0 where nothing is allocated."""
    blocks = _blocks(machine, inode)
    heads = np.where(_cached(blocks), blocks[:, W.B_PFN], np.uint64(0))
    pages = np.uint64(1 << machine.config.page_order)
    frames = np.repeat(heads, int(pages)).reshape(-1, int(pages))
    return np.asarray(np.where(frames != 0, frames + np.arange(pages, dtype=np.uint64), np.uint64(0)).reshape(-1))


def _owners(machine: Core) -> dict[int, int]:
    """Number of the guest_memfd inode that has a huge page, by the huge page's number in physical memory."""
    found: dict[int, int] = {}
    for inode in range(machine.register(W.R_INODES)):
        kind = machine.arrays.state[int(W.STATE_INODES) + inode * W.I_WORDS + int(W.I_KIND)]
        if kind == W.INODE_GUEST_MEMFD:
            blocks = _blocks(machine, inode)
            heads = blocks[_cached(blocks), W.B_PFN]
            found.update({int(head) >> machine.config.page_order: inode for head in heads})
    return found
