"""The recount's part of memory slots: the trees in which VMs and inodes find theirs, against the slots' rows."""

from __future__ import annotations

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.interval_tree import first_range, next_range
from pgemu_kernels.engine.memslots import slot_at_node, tree_node
from pgemu_kernels.engine.rows import inode_row, memslot_row, vm_row
from pgemu_kernels.rules.invariants import expect
from pgemu_kernels.words.enum_words import BROKEN_SLOTS
from pgemu_kernels.words.registers import R_FREE_MEMSLOT, R_INODES, R_MEMSLOTS, R_VMS
from pgemu_kernels.words.rows import (
    I_SLOTS,
    M_BASE_GFN,
    M_HVA,
    M_ID,
    M_INODE,
    M_KIND,
    M_LIVE,
    M_NEXT_FREE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    SLOT_USER,
    STATE_BY_GFN,
    STATE_BY_HVA,
    STATE_BY_ID,
    STATE_BY_INODE,
    T_END,
    T_LEFT,
    T_MOST,
    T_MOST_LEFT,
    T_PARENT,
    T_RIGHT,
    T_START,
    V_SLOT_COUNT,
    V_SLOT_IDS,
    V_SLOTS,
    V_SLOTS_BY_HVA,
)


@kernel
def _knows_ends(state, node):
    """Whether a node has the farthest ends below it, by what its children say."""
    most = state[node + T_END]
    left = state[node + T_LEFT]
    right = state[node + T_RIGHT]
    below = state[left + T_MOST] if left != U0 else U0
    if right != U0:
        most = max(most, state[right + T_MOST])
    return state[node + T_MOST] == max(most, below) and state[node + T_MOST_LEFT] == below


@outlined
def count_tree(m, root, owner, owner_word, nodes, start_word):
    """How many slots a tree leads to. Each is live, its owner's, in the order of where it begins (`start_word` of its
    row), and what its node says of the nodes around it is so."""
    state = m.state
    found = U0
    before = U0
    node = first_range(state, root, U0, NONE)
    while node != U0:
        slot = slot_at_node(node, nodes)
        start = state[slot + start_word]
        ordered = before == U0 or state[before + T_START] <= state[node + T_START]
        parent = state[node + T_PARENT]
        known = (
            state[root] == node if parent == U0 else state[parent + T_LEFT] == node or state[parent + T_RIGHT] == node
        )
        own = state[slot + M_LIVE] != U0 and state[slot + owner_word] == owner
        right = state[node + T_START] == start and _knows_ends(state, node)
        expect(m, ordered and known and own and right, BROKEN_SLOTS, start)
        found += U1
        before = node
        node = next_range(state, node, U0, NONE)
        if found > state[R_MEMSLOTS]:  # a circle
            break
    return found


@kernel
def _ends_right(state, slot):
    """Whether the nodes of a slot end where its pages do."""
    pages = state[slot + M_PAGES]
    right = state[tree_node(slot, STATE_BY_GFN) + T_END] == state[slot + M_BASE_GFN] + pages
    if state[slot + M_INODE] != NONE:
        right &= state[tree_node(slot, STATE_BY_INODE) + T_END] == state[slot + M_PGOFF] + pages
    if state[slot + M_HVA] != NONE:
        right &= state[tree_node(slot, STATE_BY_HVA) + T_END] == state[slot + M_HVA] + (pages << U12)
    return right


@outlined
def check_slots(m):
    """Every slot is found by guest frame, and by inode, userspace address and number if it has them; nothing else is.
    Rows that are no slot's are on the list of free ones."""
    state = m.state
    live = U0
    bound = U0
    shown = U0
    numbered = U0
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0:
            live += U1
            bound += U1 if state[slot + M_INODE] != NONE else U0
            shown += U1 if state[slot + M_HVA] != NONE else U0
            numbered += U1 if state[slot + M_KIND] == SLOT_USER else U0
            expect(m, _ends_right(state, slot), BROKEN_SLOTS, state[slot + M_BASE_GFN])
    for vm in range(state[R_VMS]):
        row = vm_row(vm)
        slots = count_tree(m, row + V_SLOTS, vm, M_VM, STATE_BY_GFN, M_BASE_GFN)
        expect(m, slots == state[row + V_SLOT_COUNT], BROKEN_SLOTS, vm)
        live -= slots
        shown -= count_tree(m, row + V_SLOTS_BY_HVA, vm, M_VM, STATE_BY_HVA, M_HVA)
        numbered -= count_tree(m, row + V_SLOT_IDS, vm, M_VM, STATE_BY_ID, M_ID)
    for inode in range(state[R_INODES]):
        bound -= count_tree(m, inode_row(inode) + I_SLOTS, inode, M_INODE, STATE_BY_INODE, M_PGOFF)
    expect(m, live | shown | numbered | bound == U0, BROKEN_SLOTS, live)
    free = U0
    slot = state[R_FREE_MEMSLOT]
    while slot != U0 and free <= state[R_MEMSLOTS]:
        expect(m, state[slot + M_LIVE] == U0, BROKEN_SLOTS, slot)
        free += U1
        slot = state[slot + M_NEXT_FREE]
    taken = state[R_MEMSLOTS] - free
    for i in range(state[R_MEMSLOTS]):
        taken -= state[memslot_row(i) + M_LIVE]
    expect(m, taken == U0, BROKEN_SLOTS, free)
