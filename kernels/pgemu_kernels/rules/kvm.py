"""The recount's part of KVM over a process's memory: its leaves against the host's, its radix trees' nodes."""

from __future__ import annotations

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.rows import inode_row, memslot_row, space_root, vm_row
from pgemu_kernels.folios.page_cache import cache_find
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_WRITE
from pgemu_kernels.kvm.attributes import is_mixed, is_private
from pgemu_kernels.kvm.fault import from_guest_memfd
from pgemu_kernels.process.entries import holds_page, leaf_pfn
from pgemu_kernels.process.tables import lookup_address
from pgemu_kernels.rules.invariants import check_kind, check_stage2_leaf, expect
from pgemu_kernels.rules.processes import own_nodes
from pgemu_kernels.tables.walker import stage2_format
from pgemu_kernels.words.enum_words import BROKEN_LEAF_OVER_FOLIO, BROKEN_MIXED_LEAF, BROKEN_WRONG_PFN
from pgemu_kernels.words.registers import R_MEMSLOTS, R_NOTIFIER, R_VMS
from pgemu_kernels.words.rows import (
    I_CACHE,
    M_BASE_GFN,
    M_DIRTY,
    M_FLAGS,
    M_HVA,
    M_INODE,
    M_KIND,
    M_PAGES,
    M_PGOFF,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_READ_ONLY,
    SLOT_USER,
    V_ATTRIBUTES,
    V_SPACE,
)
from pgemu_kernels.words.table_words import F_WRITE


@kernel
def check_leaf(m, vm, root, gfn, level, entry):
    """A stage-2 leaf below a root, by the kind of its slot."""
    slot = find_memslot(m.state, vm, gfn)
    if slot != NONE and m.state[slot + M_KIND] == SLOT_USER:
        check_kind(m, vm, root, is_private(m, vm_row(vm), gfn), gfn, level)
        check_user_leaf(m, vm, slot, gfn, level, entry)
    else:
        check_stage2_leaf(m, vm, root, gfn, level, entry)


@outlined
def check_user_leaf(m, vm, slot, gfn, level, entry):
    """Over a process's memory: inside its slot, over pages of one kind, to the frame of the process or of the
    guest_memfd, no wider than the process's own leaf, writable only where that and the slot are."""
    state = m.state
    row = vm_row(vm)
    pfn = (entry & PTE_ADDRESS) >> U12
    page = gfn - state[slot + M_BASE_GFN]
    flags = state[slot + M_FLAGS]
    writable = entry & state[stage2_format(m) + F_WRITE] != U0
    expect(m, page + pages_of(level) <= state[slot + M_PAGES], BROKEN_LEAF_OVER_FOLIO, gfn)
    expect(m, flags & SLOT_LOG_DIRTY_PAGES == U0 or level == U1 or not writable, BROKEN_LEAF_OVER_FOLIO, gfn)
    expect(m, not writable or flags & SLOT_READ_ONLY == U0, BROKEN_WRONG_PFN, gfn)
    if level > U1:
        expect(m, not is_mixed(m, row, gfn, level), BROKEN_MIXED_LEAF, gfn)
    if from_guest_memfd(state, slot, is_private(m, row, gfn)):
        expect(m, level == U1, BROKEN_LEAF_OVER_FOLIO, gfn)
        node = inode_row(state[slot + M_INODE])
        expect(m, cache_find(m, state[node + I_CACHE], state[slot + M_PGOFF] + page) == pfn, BROKEN_WRONG_PFN, gfn)
        return
    if state[R_NOTIFIER] == U0:
        return  # nobody tells KVM what the process does
    address = state[slot + M_HVA] + (page << U12)
    slot, host_level = lookup_address(m, space_root(state, state[row + V_SPACE]), address)
    host = m.ram[slot]
    # Of VM_PFNMAP KVM takes entries without any access, too: kvm_main.c:hva_to_pfn_remapped(), follow_pfnmap_start().
    expect(m, holds_page(host) and level <= host_level, BROKEN_LEAF_OVER_FOLIO, gfn)
    if holds_page(host):
        inside = pages_of(host_level) - U1
        expect(m, leaf_pfn(host, host_level) + (address >> U12 & inside) == pfn, BROKEN_WRONG_PFN, gfn)
        expect(m, not writable or host & PTE_WRITE != U0, BROKEN_WRONG_PFN, gfn)


@outlined
def own_kvm_nodes(m, owner, found):
    """The nodes of every VM's attributes and of every slot's dirty bitmap."""
    state = m.state
    for vm in range(state[R_VMS]):
        own_nodes(m, state[vm_row(vm) + V_ATTRIBUTES], owner, found)
    for i in range(state[R_MEMSLOTS]):
        own_nodes(m, state[memslot_row(i) + M_DIRTY], owner, found)
