"""Translation of batches of addresses through one tree of tables.

An entry that the access passes without a fault and without an update is known by one mask and one value
(X_TABLE_MASK and its neighbours), so a walk costs a load, a test and an address per level. Anything else goes
through `walks.walk`, which judges it. Where addresses are scattered, blocks of 64 first walk to the last level and
ask for its lines, then read them; where they are not, the last table is remembered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U5, U9, U12, U21, U30, U39, U48, U511, U4095, prefetch
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.geometry import index_at, shift_of, size_of
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.records import BATCH, is_scattered
from pgemu_kernels.tables.exact_walk import list_reads, update, walk
from pgemu_kernels.tables.walker import format_row
from pgemu_kernels.words.enum_words import WALK_OK
from pgemu_kernels.words.table_words import (
    F_ADDRESS,
    F_INPUT_BITS,
    F_LEVELS,
    F_ROOT_BITS,
    F_SIGN_EXTENDED,
    W_COUNT,
    W_ERROR,
    W_LEVEL,
    W_PHYSICAL,
    W_STATUS,
    W_WORDS,
    WALK_READS,
    X_LEAF_MASK,
    X_LEAF_VALUE,
    X_TABLE_MASK,
    X_TABLE_VALUE,
    X_WORDS,
)

U = np.uint64
# Marks in the top three bits of a slot, which a multiplication by 8 drops.
LARGE_LEAF = U(7 << 61)
LARGE_2M = U(2 << 61)
LARGE_1G = U(3 << 61)
LOOK = U(7 << 61)
_X_WORDS = U(X_WORDS)
_READS = U(WALK_READS)
_FOUND = U(W_WORDS)  # where the found slots of a block lie in the scratch array, behind the record
_ENTRIES = _FOUND + BATCH  # ... and the entries in them


class Tree(NamedTuple):
    """What every walk of a batch has in common; words and shifts of a format, read once."""

    f: Any  # where the format's row begins
    root: Any  # physical address of the top table
    levels: Any
    shift: Any  # of the top table's index
    mask: Any  # ... after the shift
    address_bits: Any  # F_ADDRESS
    bits: Any  # of an input address
    half: Any  # 2 ** (bits - 1) for sign-extended addresses, else 0
    region_shift: Any  # addresses that agree from this bit on have the same level-3 table and are translated or not


class Outputs(NamedTuple):
    """Where the results of a batch go."""

    physical: np.ndarray[Any, Any]  # uint64[n]
    status: np.ndarray[Any, Any]  # uint8[n]: words.WalkStatus
    levels: np.ndarray[Any, Any]  # uint8[n]: of the leaf, or of the entry at fault
    error: np.ndarray[Any, Any]  # uint64[n]
    reads: np.ndarray[Any, Any]  # uint64[n * 6], or of no elements
    writes: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]  # uint64[n * 2]: reads, writes


@kernel
def open_tree(m, format_index, root):
    """The tree of a format below `root`."""
    state = m.state
    f = format_row(state, format_index)
    levels = state[f + F_LEVELS]
    bits = state[f + F_INPUT_BITS]
    return Tree(
        f,
        root,
        levels,
        shift_of(levels),
        (U1 << state[f + F_ROOT_BITS]) - U1,
        state[f + F_ADDRESS],
        bits,
        state[f + F_SIGN_EXTENDED] << (bits - U1),
        U39 if bits >= U39 else U30,
    )


@kernel
def can_pass(m, tree):
    """Whether the passing walk may be tried: three to five levels, and all of the top table in `ram`."""
    return tree.levels >= U3 and tree.levels <= U5 and (tree.root >> U3) + tree.mask < U(m.ram.size)


@kernel
def passes_table(access, x, level, entry):
    return entry & access[x + X_TABLE_MASK + level] == access[x + X_TABLE_VALUE + level]


@kernel
def passes_leaf(access, x, level, entry):
    return entry & access[x + X_LEAF_MASK + level] == access[x + X_LEAF_VALUE + level]


@kernel
def directory(ram, access, x, tree, address):
    """The level-3 table of an address, or U0 for a closer look: the words of frame 0 are no entries that pass."""
    if (address + tree.half) >> tree.bits != U0:
        return U0
    bits = tree.address_bits
    if tree.levels == U3:
        return (tree.root >> U3) + (address >> U39 << U9)
    table = tree.root >> U3
    if tree.levels == U5:
        entry = ram[table + (address >> U48 & U511)]
        if not passes_table(access, x, U5, entry):
            return U0
        table = (entry & bits) >> U3
    entry = ram[table + (address >> U39 & tree.mask)]
    if not passes_table(access, x, U4, entry):
        return U0
    return (entry & bits) >> U3


class Masks(NamedTuple):
    """What the last two tables' entries are tested by, in registers: loads from `access` would follow every store."""

    table_1g: Any
    value_1g: Any
    table_2m: Any
    value_2m: Any


@kernel
def load_masks(access, x):
    at = x + X_TABLE_MASK
    values = x + X_TABLE_VALUE
    return Masks(access[at + U3], access[values + U3], access[at + U2], access[values + U2])


@kernel
def find_below(ram, access, x, masks, bits, table, address):
    """The slot of the level-1 entry of an address, which is not read, or LARGE | slot of a larger leaf that passes.

    LOOK for a closer look. `table` is of level 3.
    """
    slot = table + index_at(address >> U12, U3)
    entry = ram[slot]
    if entry & masks.table_1g != masks.value_1g:
        return slot | LARGE_1G if passes_leaf(access, x, U3, entry) else LOOK
    slot = ((entry & bits) >> U3) + index_at(address >> U12, U2)
    entry = ram[slot]
    if entry & masks.table_2m != masks.value_2m:
        return slot | LARGE_2M if passes_leaf(access, x, U2, entry) else LOOK
    return ((entry & bits) >> U3) + index_at(address >> U12, U1)


@outlined
def walk_one(m, access, x, tree, address, i, outputs, w):
    """Walk one address exactly, with its updates and its references."""
    status = walk(m, tree.f, access, x, tree.root, address, w, U0)
    outputs.physical[i] = w[W_PHYSICAL]
    outputs.status[i] = np.uint8(w[W_STATUS])
    outputs.levels[i] = np.uint8(w[W_LEVEL])
    outputs.error[i] = w[W_ERROR]
    written = U0
    if status == WALK_OK:
        written = update(m, access, x, w, U0, outputs.writes, i * _READS, U0, U0)
    if U(outputs.reads.size) != U0:
        list_reads(w, U0, outputs.reads, i * _READS, U0, U0)
        outputs.counts[i + i] = w[W_COUNT]
        outputs.counts[i + i + U1] = written


@kernel
def leaf_level(found):
    """Level of the leaf that `find_below` found."""
    if found & LARGE_LEAF == LARGE_1G:
        return U3
    return U2 if found & LARGE_LEAF == LARGE_2M else U1


@kernel
def finish_large(m, tree, found, address, i, outputs):
    """The result of a large leaf."""
    level = leaf_level(found)
    inside = size_of(level) - U1
    outputs.physical[i] = m.ram[found & ~LARGE_LEAF] & tree.address_bits & ~inside | address & inside
    outputs.levels[i] = np.uint8(level)


@kernel
def write_result(m, access, x, tree, found, address, i, outputs, w):
    """Read the entry that `find_below` found and write the result; status and level stand for a 4K page already."""
    if found & LARGE_LEAF == U0:
        entry = m.ram[found]
        if passes_leaf(access, x, U1, entry):
            outputs.physical[i] = entry & tree.address_bits | address & U4095
            return
    elif found != LOOK:
        finish_large(m, tree, found, address, i, outputs)
        return
    walk_one(m, access, x, tree, address, i, outputs, w)


@kernel
def row_of(kinds, i):
    """Where the access row of address `i` begins."""
    return U(kinds[i if U(kinds.size) > U1 else U0]) * _X_WORDS


@kernel
def find_block(ram, tree, addresses, kinds, access, w, first, stop):
    """Walk a block down to its last entries and ask for their lines; whether any is no 4K entry."""
    last = NONE
    table = U0
    marks = U0
    x = row_of(kinds, first)
    masks = load_masks(access, x)
    for i in range(first, stop):
        address = addresses[i]
        if U(kinds.size) > U1:
            x = row_of(kinds, i)
            masks = load_masks(access, x)
        region = address >> tree.region_shift | x << U48
        if region != last:
            table = directory(ram, access, x, tree, address)
            last = region
        found = find_below(ram, access, x, masks, tree.address_bits, table, address)
        w[_FOUND + i - first] = found
        prefetch(ram, found)
        marks |= found
    return marks & LARGE_LEAF != U0


@kernel
def finish_block(addresses, access, x, tree, outputs, w, first, stop):
    """Results of a block of 4K entries, at w[_ENTRIES], without a branch: whether all of them pass."""
    bits = tree.address_bits
    mask = access[x + X_LEAF_MASK + U1]
    value = access[x + X_LEAF_VALUE + U1]
    wrong = U0
    for i in range(first, stop):
        entry = w[_ENTRIES + i - first]
        wrong |= entry & mask ^ value
        outputs.physical[i] = entry & bits | addresses[i] & U4095
    return wrong == U0


@outlined
def translate_scattered(m, tree, addresses, kinds, access, outputs, w, first, stop):
    """A block whose addresses lie far apart: ask for the last entries of all, read them, then compute.

    Loads in a loop of their own keep more of them in flight than loads between branches and stores do.
    """
    ram = m.ram
    mixed = find_block(ram, tree, addresses, kinds, access, w, first, stop)
    if not mixed and U(kinds.size) == U1:
        for k in range(_FOUND, _FOUND + stop - first):
            w[k + BATCH] = ram[w[k]]
        if finish_block(addresses, access, row_of(kinds, U0), tree, outputs, w, first, stop):
            return
    for i in range(first, stop):
        write_result(m, access, row_of(kinds, i), tree, w[_FOUND + i - first], addresses[i], i, outputs, w)


@kernel
def translate_alike(m, tree, addresses, x, access, outputs, w, first, stop):
    """A block within one level-1 table or one large leaf, looked up once: whether it is one, and all of it passes."""
    address = addresses[first]
    top = directory(m.ram, access, x, tree, address)
    found = find_below(m.ram, access, x, load_masks(access, x), tree.address_bits, top, address)
    if found == LOOK:
        return False
    apart = U0
    if found & LARGE_LEAF == U0:
        table = found & ~U511
        for i in range(first, stop):
            apart |= addresses[i] ^ address
            w[_ENTRIES + i - first] = m.ram[table + (addresses[i] >> U12 & U511)]
        return apart >> U21 == U0 and finish_block(addresses, access, x, tree, outputs, w, first, stop)
    level = leaf_level(found)
    shift = shift_of(level)
    inside = (U1 << shift) - U1
    base = m.ram[found & ~LARGE_LEAF] & tree.address_bits & ~inside
    for i in range(first, stop):
        apart |= addresses[i] ^ address
        outputs.physical[i] = base | addresses[i] & inside
    if apart >> shift != U0:
        return False
    for i in range(first, stop):
        outputs.levels[i] = np.uint8(level)
    return True


@outlined
def translate_near(m, tree, addresses, kinds, access, outputs, w, first, stop):
    """A block in order: while addresses stay within one level-1 table, it is not looked up again."""
    ram = m.ram
    if U(kinds.size) == U1:
        if translate_alike(m, tree, addresses, row_of(kinds, first), access, outputs, w, first, stop):
            return
    last = NONE
    table = U0
    for i in range(first, stop):
        address = addresses[i]
        x = row_of(kinds, i)
        region = address >> U21 | x << U48
        found = table + index_at(address >> U12, U1)
        if region != last:
            top = directory(ram, access, x, tree, address)
            found = find_below(ram, access, x, load_masks(access, x), tree.address_bits, top, address)
            last = region if found & LARGE_LEAF == U0 else NONE
            table = found & ~U511
        write_result(m, access, x, tree, found, address, i, outputs, w)


@kernel
def expect_pages(outputs, first, stop):
    """Status, level and error of a block as they are if every address is mapped by a 4K page.

    An error word is nonzero only beside a status that is, so most blocks need no store to the wide array.
    """
    failed = np.uint8(0)
    for i in range(first, stop):
        failed |= outputs.status[i]
        outputs.status[i] = np.uint8(0)
        outputs.levels[i] = np.uint8(1)
    if failed != np.uint8(0):
        for i in range(first, stop):
            outputs.error[i] = U0


@kernel
def list_passed(ram, tree, address, level, reads, first, count, mark):
    """Append the entries of a walk that passed, down to its leaf of `level`: how many are listed then."""
    at = tree.root
    shift = tree.shift
    mask = tree.mask
    above = tree.levels
    while True:
        at += (address >> shift & mask) << U3
        reads[first + count] = at | mark
        count += U1
        if above == level:
            return count
        at = ram[at >> U3] & tree.address_bits
        above -= U1
        shift -= U9
        mask = U511


@outlined
def list_block(m, tree, addresses, outputs, first, stop):
    """Lists of references of the walks of a block that passed; the others made theirs themselves."""
    for i in range(first, stop):
        if outputs.status[i] == np.uint8(0) and outputs.counts[i + i] == U0:
            level = U(outputs.levels[i])
            outputs.counts[i + i] = list_passed(m.ram, tree, addresses[i], level, outputs.reads, i * _READS, U0, U0)


@kernel
def translate_single(m, access, x, tree, address, outputs, w):
    """Translate one address as a batch of one would, into element 0 of outputs without lists."""
    outputs.status[U0] = np.uint8(0)
    outputs.levels[U0] = np.uint8(1)
    outputs.error[U0] = U0
    if not can_pass(m, tree):
        walk_one(m, access, x, tree, address, U0, outputs, w)
        return
    top = directory(m.ram, access, x, tree, address)
    found = find_below(m.ram, access, x, load_masks(access, x), tree.address_bits, top, address)
    write_result(m, access, x, tree, found, address, U0, outputs, w)


@entry
def translate(
    descriptor, format_index, root, addresses, kinds, access, physical, status, levels, error, reads, writes, counts, w
):
    """Translate `addresses` (uint64[n]), in order, through the tables below physical address `root`.

    kinds: uint8[n], or uint8[1] for all: rows of `access` (uint64[rows * X_WORDS]). The next seven arrays are
    Outputs. w: uint64[WALK_SCRATCH]. Returns 0.
    """
    m = open_machine(descriptor)
    tree = open_tree(m, format_index, root)
    outputs = Outputs(physical, status, levels, error, reads, writes, counts)
    count = U(addresses.size)
    if not can_pass(m, tree):
        for i in range(count):
            walk_one(m, access, row_of(kinds, i), tree, addresses[i], i, outputs, w)
        return np.int64(0)
    first = U0
    while first < count:
        stop = min(count, first + BATCH)
        expect_pages(outputs, first, stop)
        if is_scattered(addresses, first, stop):
            translate_scattered(m, tree, addresses, kinds, access, outputs, w, first, stop)
        else:
            translate_near(m, tree, addresses, kinds, access, outputs, w, first, stop)
        if U(reads.size) != U0:
            list_block(m, tree, addresses, outputs, first, stop)
        first = stop
    return np.int64(0)
