"""Which VMs may have stage-2 leaves over an inode: for each 2M and 1G a word of a bit per VM, for each page one bit.

Without them whoever takes a page from its guests would go through the tables of every VM that has the page bound. A bit
is set with the leaf, and stays when the leaf goes in another way than by the inode's pages, until somebody finds that
nothing is there.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U2, U3, U4, U6, U9, U18, U63, U511, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, pages_of
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import first_binding, next_binding
from pgemu_kernels.engine.rows import inode_row, overlap, vm_row
from pgemu_kernels.engine.shareability import mask_at
from pgemu_kernels.stage2.leaves import leaves_below
from pgemu_kernels.tables.walker import find_leaf, stage2_format, table_of
from pgemu_kernels.words.rows import I_GIGABYTES, I_GUEST_BITS, I_PAGES, I_REGIONS, M_VM, V_PRIVATE_ROOT, V_ROOT

U = np.uint64
_INSIDE_1G = U((1 << 18) - 1)


@kernel
def note_leaf(state, node, index, level, vm):
    """A VM has a leaf of `level` over page `index` of an inode (`node`)."""
    bit = U1 << vm
    region = state[node + I_REGIONS] + (index >> U9)
    if state[region] & bit == U0:
        state[region] |= bit
        state[state[node + I_GIGABYTES] + (index >> U18)] |= bit
    if level == U1:
        state[state[node + I_GUEST_BITS] + (index >> U6)] |= U1 << (index & U63)
    else:
        note_large_leaf(state, node, index, level, bit)


@outlined
def note_large_leaf(state, node, index, level, bit):
    """The same of all pages below a leaf of 2M or 1G, and of all 2M."""
    pages = pages_of(level)
    first = index & ~(pages - U1)
    bits = state[node + I_GUEST_BITS]
    for word in range(bits + (first >> U6), bits + ((first + pages) >> U6)):
        state[word] = ALL
    regions = state[node + I_REGIONS]
    for word in range(regions + (first >> U9), regions + ((first + pages) >> U9)):
        state[word] |= bit


@kernel
def is_whole(state, node, start, end):
    """Whether pages [start, end), all in one 1G of an inode, are all that it has there."""
    return start & _INSIDE_1G == U0 and (end & _INSIDE_1G == U0 or end >= state[node + I_PAGES])


@kernel
def is_mapped(state, node, start, end):
    """Whether a VM may have a leaf over pages [start, end)."""
    bits = state[node + I_GUEST_BITS]
    while start < end:
        if state[bits + (start >> U6)] & mask_at(start, end) != U0:
            return True
        start = (start | U63) + U1
    return False


@kernel
def forget_pages(state, node, start, end):
    """No VM has a leaf over pages [start, end) any more."""
    bits = state[node + I_GUEST_BITS]
    while start < end:
        state[bits + (start >> U6)] &= ~mask_at(start, end)
        start = (start | U63) + U1


@kernel
def vms_below(state, node, start, end):
    """The VMs with a bit of some 2M of pages [start, end), which are not none."""
    first = state[node + I_REGIONS]
    vms = U0
    for word in range(first + (start >> U9), first + (end - U1 >> U9) + U1):
        vms |= state[word]
    return vms


@outlined
def vms_with_leaves_of_many(state, node, start, end):
    """The same of many pages, of which some are mapped for sure."""
    blocks = state[node + I_GIGABYTES]
    vms = U0
    while start < end:
        last = min(end, (start | _INSIDE_1G) + U1)
        found = state[blocks + (start >> U18)]
        if found != U0 and not is_whole(state, node, start, last):
            found &= vms_below(state, node, start, last)
        vms |= found
        start = last
    return vms


@kernel
def vms_with_leaves(state, node, start, end):
    """The VMs that may have leaves over pages [start, end)."""
    if end - start >= U512:
        return vms_with_leaves_of_many(state, node, start, end)
    if not is_mapped(state, node, start, end):
        return U0
    words = state[node + I_REGIONS]
    return state[words + (start >> U9)] | state[words + (end - U1 >> U9)]


@kernel
def last_table(m, f, root, gfn):
    """The level-1 table over a guest frame, which is there."""
    table = table_of(m.state, f, m.ram[(root >> U3) + index_at(gfn, U4)])
    table = table_of(m.state, f, m.ram[table + index_at(gfn, U3)])
    return table_of(m.state, f, m.ram[table + index_at(gfn, U2)])


@outlined
def may_have_leaf(m, root, gfn, end):
    """Whether a table over guest frames [gfn, end) has a leaf, there or beside."""
    f = stage2_format(m)
    while gfn < end:
        slot, level = find_leaf(m, f, root, gfn)
        if slot != NONE:
            return True
        # A hole in a 4K table: the table's page counts its leaves.
        if level == U1 and leaves_below(m, last_table(m, f, root, gfn)) != U0:
            return True
        gfn = (gfn | U511) + U1
    return False


@kernel
def only_root_may(m, row, gfn, end):
    """Whether the tree of a VM (`row` of V_*) may have leaves over guest frames [gfn, end)."""
    return may_have_leaf(m, m.state[row + V_ROOT], gfn, end)


@kernel
def either_root_may(m, row, gfn, end):
    """The same of one that may have two."""
    root = m.state[row + V_ROOT]
    private = m.state[row + V_PRIVATE_ROOT]
    return may_have_leaf(m, root, gfn, end) or (private != root and may_have_leaf(m, private, gfn, end))


any_root_may = full_only(either_root_may, only_root_may)


@outlined
def forget_region(m, vm, inode, first):
    """Clear a VM's bit of the region that begins at page `first` of an inode, if it has no leaf there."""
    state = m.state
    slot = first_binding(state, inode, first, first + U512)
    while slot != U0:
        gfn, last = overlap(state, slot, inode, first, first + U512)
        if state[slot + M_VM] == vm and any_root_may(m, vm_row(vm), gfn, last):
            return
        slot = next_binding(state, slot, first, first + U512)
    state[state[inode_row(inode) + I_REGIONS] + (first >> U9)] &= ~(U1 << vm)


@kernel
def forget_regions(state, node, vm, start, end):
    """Clear a VM's bits of the 2M and 1G that lie whole in pages [start, end). Without that of 1G it has none below."""
    words = state[node + I_REGIONS]
    blocks = state[node + I_GIGABYTES]
    bit = U1 << vm
    while start < end:
        last = min(end, (start | _INSIDE_1G) + U1)
        if state[blocks + (start >> U18)] & bit != U0:
            behind = last + (U511 if last >= state[node + I_PAGES] else U0)
            for word in range(words + (start + U511 >> U9), words + (behind >> U9)):
                state[word] &= ~bit
            if is_whole(state, node, start, last):
                state[blocks + (start >> U18)] &= ~bit
        start = last


@outlined
def forget_vm(m, vm, inode, start, end, dropped):
    """A VM lost its leaves over pages [start, end): clear its bits of what lies in there whole.

    Those of the rest stay as long as there is something to drop (`dropped`, int64).
    """
    state = m.state
    node = inode_row(inode)
    forget_regions(state, node, vm, start, end)
    if dropped == 0:
        if start & U511 != U0:
            forget_region(m, vm, inode, start & ~U511)
        if end & U511 != U0 and end < state[node + I_PAGES] and (start & U511 == U0 or start >> U9 != end >> U9):
            forget_region(m, vm, inode, end & ~U511)


@kernel
def forget_zapped(m, vm, inode, start, end, dropped):
    """The same, where there may be something to clear."""
    if dropped == 0 or end - start >= U512 or end >= m.state[inode_row(inode) + I_PAGES]:
        forget_vm(m, vm, inode, start, end, dropped)
