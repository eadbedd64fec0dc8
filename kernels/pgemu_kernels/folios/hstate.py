"""Rows of hstates and nodes, and the lists of huge pages, threaded through their struct pages: include/linux/list.h.

A list head lies in a row of `state`, whose words have model addresses in the kernel's image (HSTATES_ADDRESS); the
links between pages are real: words 1 and 2 of a head's struct page, folio->lru.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U3, U6, U8
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.folio import FLAGS, struct_page, vmemmap_address
from pgemu_kernels.words.registers import R_HWPOISON, R_NODES, R_VMEMMAP
from pgemu_kernels.words.rows import (
    H_NODE,
    H_NODE_WORDS,
    H_ORDER,
    H_WORDS,
    HSTATES_ADDRESS,
    N_BASE,
    N_PAGES,
    N_WORDS,
    STATE_HSTATES,
    STATE_NODES,
)

U = np.uint64
_IMAGE = U(HSTATES_ADDRESS)
LRU = U8  # offset of folio->lru
LIST_POISON1 = U(0xDEAD000000000100)
LIST_POISON2 = U(0xDEAD000000000122)
ORDER_1G = U(18)


@kernel
def hstate_of_order(order):
    """Row of the hstate of order 9 or 18."""
    return STATE_HSTATES + (U(H_WORDS) if order == ORDER_1G else U0)


@kernel
def hstate_node(h, node):
    """Where an hstate's words of a node begin."""
    return h + H_NODE + node * U(H_NODE_WORDS)


@kernel
def node_row(node):
    return STATE_NODES + node * U(N_WORDS)


@kernel
def node_of(state, pfn):
    """The NUMA node of a frame of the HugeTLB zone."""
    return U1 if state[R_NODES] > U1 and pfn >= state[node_row(U1) + N_BASE] else U0


@kernel
def in_zone(state, pfn):
    """Whether a frame is memory of the HugeTLB zone: between two nodes there may be a hole."""
    row = node_row(node_of(state, pfn))
    return pfn - state[row + N_BASE] < state[row + N_PAGES]


@kernel
def list_head(row):
    """Model address of a list head that lies at a word of an hstate's row."""
    return _IMAGE + ((row - STATE_HSTATES) << U3)


@kernel
def page_of(state, link):
    """Frame whose struct page holds the links at an address."""
    return (link - state[R_VMEMMAP]) >> U6


@kernel
def is_head(link):
    """Whether an address is that of a list head, not of a page's links."""
    return link >= _IMAGE


@kernel
def links_of(m, pfn):
    """Address of the links of a huge page."""
    return vmemmap_address(m.state, pfn) + LRU


@kernel
def set_link(m, link, which, value):
    """Store list_head.next (`which` 0) or .prev (1) at an address."""
    if is_head(link):
        m.state[STATE_HSTATES + ((link - _IMAGE) >> U3) + which] = value
    else:
        m.ram[struct_page(m, page_of(m.state, link)) + U1 + which] = value


@kernel
def init_list(state, row):
    """INIT_LIST_HEAD() of a list head in an hstate's row."""
    state[row] = list_head(row)
    state[row + U1] = list_head(row)


@kernel
def first_page(state, row):
    """Frame of the first page of a list, 0 if it is empty."""
    link = state[row]
    return U0 if is_head(link) else page_of(state, link)


@kernel
def page_after(m, pfn):
    """Frame of the page that follows in its list, 0 after the last."""
    link = m.ram[struct_page(m, pfn) + U1]
    return U0 if is_head(link) else page_of(m.state, link)


@kernel
def skip_poisoned(m, head):
    """The first page of a list, from this one on, that is not poisoned; 0 for none."""
    while head != U0 and m.ram[struct_page(m, head) + FLAGS] & m.state[R_HWPOISON] != U0:
        head = page_after(m, head)
    return head


@outlined
def list_add(m, row, pfn):
    """list_add(): the page becomes the first of the list whose head lies at `row`."""
    head = list_head(row)
    first = m.state[row]
    page = struct_page(m, pfn)
    link = links_of(m, pfn)
    m.ram[page + U1] = first
    m.ram[page + U2] = head
    set_link(m, first, U1, link)
    m.state[row] = link


@outlined
def list_unlink(m, pfn):
    """__list_del_entry(): neighbours are joined, the page's own links stay."""
    page = struct_page(m, pfn)
    after = m.ram[page + U1]
    before = m.ram[page + U2]
    set_link(m, after, U1, before)
    set_link(m, before, U0, after)


@outlined
def list_del(m, pfn):
    """list_del(): the page's links are poisoned."""
    list_unlink(m, pfn)
    page = struct_page(m, pfn)
    m.ram[page + U1] = LIST_POISON1
    m.ram[page + U2] = LIST_POISON2


@outlined
def list_move(m, row, pfn):
    """list_move(): from wherever it is to the front of the list at `row`."""
    list_unlink(m, pfn)
    list_add(m, row, pfn)


@kernel
def order_of_hstate(state, h):
    return state[h + H_ORDER]
