"""Which of a guest's accesses a machine has to run: those that can change it.

A leaf of stage 2 stays until a conversion in its GiB takes it, whatever the design: no leaf and no huge page is larger.
So what a machine runs is the first use of each page, read or written, the first write and the first fetch, and each of
them again after every conversion in the same GiB of guest memory. The hardware's walk uses the guest's tables before
the page itself: they are pages of guest memory, too. What is left out finds its leaf in every machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U3, U8, U12, U16, U21, U30, U32, U511
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.geometry import shift_of
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.tables.exact_walk import slot_of
from pgemu_kernels.tables.translate import open_tree, passes_table
from pgemu_kernels.words.enum_words import (
    FLAG_ACCEPT_4K,
    FLAG_EXEC,
    FLAG_PRIVATE,
    FLAG_SHARED,
    FLAG_WRITE,
    OP_CONVERT,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
)
from pgemu_kernels.words.guest_words import (
    EXECUTED,
    IO_BOUNCE,
    IO_CONVERT,
    MOST_AN_ACCESS,
    STREAM_AT,
    STREAM_BOUNCE,
    STREAM_BUFFER,
    STREAM_BUFFERS,
    STREAM_CONVERSIONS,
    STREAM_DUE,
    STREAM_EPOCH,
    STREAM_FLAGS,
    STREAM_FORMAT,
    STREAM_HOST,
    STREAM_HVA,
    STREAM_IO,
    STREAM_MODE,
    STREAM_NEXT,
    STREAM_OUT,
    STREAM_RATE,
    STREAM_TABLES,
    STREAM_TOUCHES,
    USED,
    USED_BY_HOST,
    USES,
    WRITTEN,
)
from pgemu_kernels.words.operations import PAGE_4K

U = np.uint64
_PAGE = U(PAGE_4K)
_OFFSET = U(PAGE_4K - 1)
_HOST = U(256)  # pgemu.trace.schema.FIRST_HOST_ACTOR
_MIX = U(0x9E3779B97F4A7C15)
_MEMO_SHIFT = U(52)  # the upper 12 bits: MEMO


class Stream(NamedTuple):
    """What is known of the guest's memory, and where the operations go."""

    control: np.ndarray[Any, Any]  # STREAM_*
    pages: np.ndarray[Any, Any]  # uint64, for each 4K page: its uses, above them the epoch that they are of
    blocks: np.ndarray[Any, Any]  # uint64, for each GiB: its epoch
    memo: np.ndarray[Any, Any]  # uint64[2 * MEMO]
    at: np.ndarray[Any, Any]  # uint64: the access before which an operation is to run
    header: np.ndarray[Any, Any]
    address: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]


@kernel
def write_operation(s, i, op, flags, actor, address, offset, length):
    """Append an operation."""
    out = s.control[STREAM_OUT]
    s.at[out] = i
    s.header[out] = op | flags << U8 | actor << U16
    s.address[out] = address
    s.offset[out] = offset
    s.length[out] = length
    s.control[STREAM_OUT] = out + U1


@kernel
def is_new(s, gpa, uses):
    """Note uses of a page: whether one of them is the first since the last conversion in its GiB."""
    page = gpa >> U12
    epoch = s.blocks[gpa >> U30]
    known = s.pages[page]
    if known >> USES != epoch:
        known = epoch << USES
    if known & uses == uses:
        return False
    s.pages[page] = known | uses
    return True


@outlined
def touch_tables(g, s, tree, access, i, root, address, actor):
    """The tables that a walk reads, from the top one down. Hardware may set accessed bits in each: they are written."""
    table = root
    level = tree.levels
    while True:
        if is_new(s, table, USED | WRITTEN):
            write_operation(s, i, OP_GUEST_FAULT, FLAG_WRITE | s.control[STREAM_FLAGS], actor, table, U0, U0)
            s.control[STREAM_TABLES] += U1
        slot = slot_of(g, table + ((address >> shift_of(level) & U511) << U3))
        value = g.ram[slot]
        # A table's own bits: large leaves and what is absent lead nowhere.
        if level == U1 or not passes_table(access, U0, level, value):
            return
        table = value & tree.address_bits
        level -= U1


@kernel
def touch(g, s, tree, access, i, root, address, flags, actor, space, gpa):
    """An access: its tables and its page, as far as they are new."""
    uses = USED
    if flags & FLAG_WRITE != U0:
        uses |= WRITTEN
    if flags & FLAG_EXEC != U0:
        uses |= EXECUTED
    region = (address >> U21 << U16 | space) + U1
    place = (region * _MIX >> _MEMO_SHIFT) << U1
    if s.memo[place] != region or s.memo[place + U1] != s.control[STREAM_EPOCH]:
        s.memo[place] = region
        s.memo[place + U1] = s.control[STREAM_EPOCH]
        touch_tables(g, s, tree, access, i, root, address, actor)
    if is_new(s, gpa, uses):
        flags = flags & (FLAG_WRITE | FLAG_EXEC) | s.control[STREAM_FLAGS]
        write_operation(s, i, OP_GUEST_FAULT, flags, actor, gpa, U0, U0)
        s.control[STREAM_TOUCHES] += U1


@kernel
def touch_by_host(s, i, gpa):
    """The host writes to a page; its entry stays until a conversion in the GiB."""
    if is_new(s, gpa, USED_BY_HOST):
        write_operation(s, i, OP_HOST_FAULT, FLAG_WRITE, _HOST, s.control[STREAM_HVA] + (gpa & ~_OFFSET), U0, U0)
        s.control[STREAM_HOST] += U1


@kernel
def convert_page(s, i, gpa, flag, actor):
    """A conversion of a page: all that is known of its GiB is void."""
    write_operation(s, i, OP_CONVERT, flag, actor, U0, gpa & ~_OFFSET, _PAGE)
    s.blocks[gpa >> U30] += U1
    s.control[STREAM_EPOCH] += U1
    s.control[STREAM_CONVERSIONS] += U1


@outlined
def do_io(s, i, gpa, actor):
    """A page of I/O, after the access that asks for it."""
    s.control[STREAM_IO] += U1
    if s.control[STREAM_MODE] == IO_BOUNCE:
        # kernel/dma/swiotlb.c:swiotlb_search_pool_area(): the search for a free slot goes on behind the last one.
        number = s.control[STREAM_NEXT]
        s.control[STREAM_NEXT] = number + U1 if number + U1 < s.control[STREAM_BUFFERS] else U0
        buffer = (s.control[STREAM_BOUNCE] + number) << U12
        if is_new(s, buffer, USED | WRITTEN):
            write_operation(s, i, OP_GUEST_FAULT, FLAG_WRITE | FLAG_SHARED, actor, buffer, U0, U0)
            s.control[STREAM_BUFFER] += U1
        touch_by_host(s, i, buffer)
    elif s.control[STREAM_MODE] == IO_CONVERT:
        convert_page(s, i, gpa, FLAG_SHARED, actor)
        touch_by_host(s, i, gpa)
        convert_page(s, i, gpa, FLAG_PRIVATE, actor)
        # arch/x86/coco/tdx/tdx.c:tdx_enc_status_changed(): the guest accepts the page at once.
        if is_new(s, gpa, USED | WRITTEN):
            flags = FLAG_WRITE | FLAG_PRIVATE | FLAG_ACCEPT_4K
            write_operation(s, i, OP_GUEST_FAULT, flags, actor, gpa & ~_OFFSET, U0, U0)
            s.control[STREAM_BUFFER] += U1
    else:
        touch_by_host(s, i, gpa)


@entry
def collapse_accesses(
    descriptor, control, access_row, roots, addresses, flags, actors, spaces, physical, pages, blocks, memo, at, header,
    address, offset, length,
):  # fmt: skip
    """Write the operations of accesses from control[STREAM_AT] on: 0 at the end, 1 where there is no room for more.

    physical: uint64[n], guest physical addresses. The operations are columns, uint64, as many as the shortest holds.
    """
    g = open_machine(descriptor)
    s = Stream(control, pages, blocks, memo, at, header, address, offset, length)
    tree = open_tree(g, control[STREAM_FORMAT], U0)
    room = U(at.size)
    i = control[STREAM_AT]
    while i < U(addresses.size):
        if control[STREAM_OUT] + MOST_AN_ACCESS > room:
            control[STREAM_AT] = i
            return np.int64(1)
        space = U(spaces[i])
        actor = U(actors[i])
        touch(g, s, tree, access_row, i, roots[space], addresses[i], U(flags[i]), actor, space, physical[i])
        due = control[STREAM_DUE] + control[STREAM_RATE]
        control[STREAM_DUE] = due & ((U1 << U32) - U1)
        if due >> U32 != U0:
            # Behind the access, that is before the next one.
            do_io(s, i + U1, physical[i], actor)
        i += U1
    control[STREAM_AT] = i
    return np.int64(0)
