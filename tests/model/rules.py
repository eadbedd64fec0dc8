"""Safety rules I1 to I8 of the two designs, checked on what a machine's arrays or a model hold.

Where windows lie is the model's to say: each mmap and each bind was compared. Everything else is read here, entry by
entry, without the kernels' code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from model.folio import PIECE
from model.inode import Window
from model.model import Model
from pgemu_kernels import words as W

ADDRESS = (1 << 52) - (1 << 12)
LARGE = 1 << 7
Array = np.ndarray[Any, Any]


class Leaf(NamedTuple):
    """An entry of a process (`owner`) or of a VM that maps `pages`, from frame `pfn` on; in a mirror or not."""

    owner: int
    pages: range
    pfn: int
    mirror: bool = False


class Block(NamedTuple):
    """An allocated huge page. `pieces`: which of its 2M folios are split, if it is in such; `waits`: to be merged."""

    head: int
    split: bool
    pieces: set[int] | None
    waits: bool

    def folio_pages(self, inner: int, size: int) -> int:
        """Pages of the folio around one of its pages."""
        if self.split:
            return 1
        if self.pieces is None:
            return size
        return 1 if inner // PIECE in self.pieces else PIECE


class View(NamedTuple):
    """What the rules look at. `shared`: bool per page of each inode."""

    host: list[Leaf]
    stage2: list[Leaf]
    shared: list[Array]
    blocks: list[dict[int, Block]]
    states: int  # huge pages in any state
    in_progress: list[int]


# --------------------------------------------------------------------------- what a model holds


def view_of_model(model: Model) -> View:
    host, stage2 = [], []
    for owner, space in enumerate(model.spaces):
        host += [Leaf(owner, range(page, page + 1), entry.pfn) for page, entry in space.entries.items()]
        host += [Leaf(owner, span(level, number), entry.pfn) for (level, number), entry in space.huge.items()]
    for owner in range(len(model.vms)):
        for tree in model.trees(owner):
            stage2 += [Leaf(owner, span(*key), pfn, tree.mirror) for key, pfn in tree.leaves.items()]
    shared = []
    blocks = []
    for inode in model.inodes:
        bits = np.zeros(inode.pages, np.bool_)
        bits[list(inode.shared)] = True
        shared.append(bits)
        # What is not idle could not be merged, and the next who could has to come by.
        blocks.append({n: Block(f.head, f.split, f.pieces, True) for n, f in inode.blocks.items()})
    states = model.memory.count_free + len(model.memory.in_use)
    return View(host, stage2, shared, blocks, states, [])


def span(level: int, number: int) -> range:
    """Pages of an entry of a level."""
    size = 1 << 9 * (level - 1)
    return range(number * size, number * size + size)


# --------------------------------------------------------------------------- what a machine's arrays hold


def view_of_machine(machine: Any, order: int) -> View:
    """`order`: of the huge pages."""
    arrays = machine.arrays
    state = arrays.state
    host = rows(state, W.STATE_SPACES, W.S_WORDS, machine.register(W.R_SPACES))
    vms = rows(state, W.STATE_VMS, W.V_WORDS, machine.register(W.R_VMS))
    present = 1 << 11  # SPTE_MMU_PRESENT: a cached MMIO entry is none
    inodes = rows(state, W.STATE_INODES, W.I_WORDS, machine.register(W.R_INODES))
    gauges = arrays.stats[int(W.STATS_GAUGES) :: 2]
    counted = (
        W.Gauge.POOL_FREE,
        W.Gauge.BLOCKS_HUGE,
        W.Gauge.BLOCKS_SPLIT,
        W.Gauge.BLOCKS_PARTLY,
        W.Gauge.BLOCKS_ZOMBIE,
    )
    return View(
        [leaf for owner, row in enumerate(host) for leaf in leaves(arrays.ram, owner, int(row[W.S_ROOT]), 1)],
        [
            leaf._replace(mirror=mirror)
            for owner, row in enumerate(vms)
            for root, mirror in roots(row)
            for leaf in leaves(arrays.ram, owner, root, present)
        ],
        [shareability(arrays, row) for row in inodes],
        [blocks_of(state, row) for row in inodes],
        sum(int(gauges[gauge]) for gauge in counted),
        [int(row[W.V_IN_PROGRESS]) for row in vms],
    )


def roots(vm: Array) -> list[tuple[int, bool]]:
    """A VM's stage-2 root, and that of its mirror if it has one."""
    own, private = int(vm[W.V_ROOT]), int(vm[W.V_PRIVATE_ROOT])
    return [(own, False)] + [(private, True)] * (private != own)


def rows(state: Array, first: Any, words: int, count: int) -> Array:
    return state[int(first) : int(first) + words * count].reshape(count, words)


def leaves(ram: Array, owner: int, root: int, present: int) -> list[Leaf]:
    """Every leaf below a root, found from the top down."""
    found = []
    tables = [(root, 0)] if root else []
    for level in (4, 3, 2, 1):
        below = []
        for table, first in tables:
            entries = ram[table // 8 : table // 8 + 512]
            for i in np.flatnonzero(entries & np.uint64(present)).tolist():
                entry = int(entries[i])
                pages = span(level, (first >> 9 * (level - 1)) + i)
                if level == 1 or entry & LARGE:
                    found.append(Leaf(owner, pages, (entry & ADDRESS) >> 12 & ~(len(pages) - 1)))
                else:
                    below.append((entry & ADDRESS, pages.start))
        tables = below
    return found


def shareability(arrays: Any, row: Array) -> Array:
    """An inode's bits; the counts per 2M and per 1G must agree with them."""
    pages = int(row[W.I_PAGES])
    word = int(row[W.I_WORD])
    words = arrays.state[word : word + -(-pages // 64)].view(np.uint8)
    bits = np.unpackbits(words, bitorder="little")[:pages].astype(np.bool_)
    for name, size in ((W.I_PMD, 512), (W.I_PUD, 1 << 18)):
        sums = np.add.reduceat(bits, np.arange(0, pages, size), dtype=np.int64)
        first = int(row[name])
        assert arrays.counts[first : first + len(sums)].tolist() == sums.tolist()
    return bits


def blocks_of(state: Array, row: Array) -> dict[int, Block]:
    """The allocated blocks of an inode."""
    found = {}
    table = rows(state, row[W.I_BLOCK], W.B_WORDS, int(row[W.I_BLOCKS]))
    known = [W.BLOCK_HUGE, W.BLOCK_SPLIT, W.BLOCK_PARTLY]
    for number in np.flatnonzero(np.isin(table[:, W.B_STATE], known)).tolist():
        block = table[number]
        pieces = None
        if block[W.B_STATE] == W.BLOCK_PARTLY:
            bits = np.unpackbits(block[int(W.B_PIECES) : int(W.B_PIECES) + 8].view(np.uint8), bitorder="little")
            pieces = set(np.flatnonzero(bits).tolist())
        split = bool(block[W.B_STATE] == W.BLOCK_SPLIT)
        found[number] = Block(int(block[W.B_PFN]), split, pieces, bool(block[W.B_WAITS]))
    return found


# --------------------------------------------------------------------------- the rules


def check(view: View, model: Model) -> None:
    """AssertionError for a rule that does not hold. `model`: for its windows and parameters."""
    for leaf in view.host:
        window = window_of(model.vmas, leaf)
        file = window.file_range(leaf.pages)
        assert view.shared[window.inode][file.start : file.stop].all(), f"I1: {leaf} shows a private page"
        check_frame(view, model, window, leaf)
        if model.restructure:
            assert len(leaf.pages) == folio_pages(view, model, window, leaf) == 1, f"I3: {leaf} of a large folio"
    for leaf in view.stage2:
        window = window_of(model.slots, leaf)
        assert not window.released
        file = window.file_range(leaf.pages)
        bits = view.shared[window.inode][file.start : file.stop]
        assert bits.all() or not bits.any(), f"I2: {leaf} over private and shared pages"
        if leaf.owner in model.mirrors:
            assert bits.any() != leaf.mirror, f"I2: {leaf} below the root of the other kind"
        level = 1 + (len(leaf.pages).bit_length() - 1) // 9
        assert bits.any() or level <= model.private_level(leaf.owner), f"I2: {leaf} of private memory"
        check_frame(view, model, window, leaf)
        if model.restructure and len(leaf.pages) > folio_pages(view, model, window, leaf):
            # Orders that split before the zap, or zap no more than the range, leave a leaf of private pages.
            assert not bits.any(), f"I3: {leaf} is larger than its folio"
    if model.restructure and model.order:
        check_blocks(view, model)
    assert view.states == model.memory.count, "I5: a huge page is in no state, or in two"
    assert not any(view.in_progress), "I8: an invalidation has not ended"
    for bits, inode in zip(view.shared, model.inodes, strict=True):
        assert np.count_nonzero(bits) == len(inode.shared), "I7: shareability"
        assert bits[list(inode.shared)].all(), "I7: shareability"


def window_of(windows: list[Window], leaf: Leaf) -> Window:
    """The window that a leaf lies in, all of it."""
    for window in windows:
        if window.owner == leaf.owner and leaf.pages.start in window.pages:
            assert leaf.pages[-1] in window.pages, f"{leaf} reaches beyond {window}"
            return window
    raise AssertionError(f"{leaf} lies in no window")


def block_of(view: View, model: Model, window: Window, leaf: Leaf) -> tuple[Block, int]:
    """The huge page behind a leaf, and the number of the leaf's first page in it."""
    index = window.file_page(leaf.pages.start)
    block = view.blocks[window.inode].get(index >> model.order)
    assert block is not None, f"{leaf} to a page that the inode does not have"
    return block, index % model.block_pages


def check_frame(view: View, model: Model, window: Window, leaf: Leaf) -> None:
    block, inner = block_of(view, model, window, leaf)
    assert leaf.pfn == block.head + inner, f"{leaf} shows another frame than {block}'s"
    if not model.parameters.flag_stays:
        stale = stale_pages(model, window, leaf)
        assert not stale, f"I9: {leaf} shows what was there before: {sorted(stale)[:9]}"


def stale_pages(model: Model, window: Window, leaf: Leaf) -> set[int]:
    """Pages of a leaf, by number in their huge page, that were not zeroed since they are the inode's."""
    index = window.file_page(leaf.pages.start)
    inner = index % model.block_pages
    return set(range(inner, inner + len(leaf.pages))) - model.inodes[window.inode].blocks[index >> model.order].zeroed


def is_stale(view: View, model: Model) -> bool:
    """Whether any leaf shows such."""
    leaves = [(model.vmas, leaf) for leaf in view.host] + [(model.slots, leaf) for leaf in view.stage2]
    return any(stale_pages(model, window_of(windows, leaf), leaf) for windows, leaf in leaves)


def folio_pages(view: View, model: Model, window: Window, leaf: Leaf) -> int:
    block, inner = block_of(view, model, window, leaf)
    return block.folio_pages(inner, model.block_pages)


def check_blocks(view: View, model: Model) -> None:
    """I4: a folio is larger than 4K exactly while none of its pages is shared, those that wait for a merge aside."""
    for shared, blocks in zip(view.shared, view.blocks, strict=True):
        for number, block in blocks.items():
            bits = shared[number << model.order : (number + 1) << model.order]
            if block.pieces is None:
                assert bits.any() == block.split or (block.split and block.waits), f"I4: {block}"
                continue
            by_piece = set(np.flatnonzero(bits.reshape(-1, PIECE).any(axis=1)).tolist())
            assert by_piece <= block.pieces, f"I4: {block}"
            assert by_piece == block.pieces or block.waits, f"I4: {block}"
