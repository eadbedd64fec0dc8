"""The control of nested walks: the same kernels, one walk after the other. Others are the plugin's (pgemu_control)."""

from __future__ import annotations

import numpy as np
from numba import njit

from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.tables.exact_walk import slot_of
from pgemu_kernels.tables.nested import NestedOutputs, count_references, finish_walk, host_of
from pgemu_kernels.tables.translate import (
    directory,
    find_below,
    leaf_level,
    load_masks,
    open_tree,
    passes_leaf,
    passes_table,
)

_SHIFTS = tuple(np.uint64(shift) for shift in (3, 9, 18, 27))
_INDEX = np.uint64(511)
_U0, _U1, _U2, _TWELVE = (np.uint64(n) for n in (0, 1, 2, 12))
_STAGE2 = np.uint64(W.ACCESS_ROWS * W.X_WORDS)
_TABLE_READ = _STAGE2 + W.X_ROW_TABLE_READ * np.uint64(W.X_WORDS)
_OFFSET = np.uint64(4095)


@njit(nogil=True, _nrt=False, forceinline=True)
def _stage2(m, access, x, tree, masks, gpa):
    """The stage-2 entry of a guest physical address."""
    table = directory(m.ram, access, x, tree, gpa)
    return find_below(m.ram, access, x, masks, tree.address_bits, table, gpa)


@njit(nogil=True, _nrt=False)
def walk_one_by_one(descriptor, guest_format, guest_root, stage2_format, stage2_root, addresses, kind, access, outputs):
    """Nested walks of 4K pages that all pass, each to its end before the next begins. False if one does not."""
    m = open_machine(descriptor)
    guest = open_tree(m, guest_format, guest_root)
    tree = open_tree(m, stage2_format, stage2_root)
    out = NestedOutputs(*outputs)
    final = _STAGE2 + kind
    table_masks = load_masks(access, _TABLE_READ)
    final_masks = load_masks(access, final)
    for i in range(np.uint64(addresses.size)):
        address = addresses[i]
        gpa = guest.root + ((address >> guest.shift & _INDEX) << _SHIFTS[0])
        level = guest.levels
        count = _U0
        while level >= _U1:
            found = _stage2(m, access, _TABLE_READ, tree, table_masks, gpa)
            value = m.ram[slot_of(m, host_of(m, access, _TABLE_READ, tree, found, gpa))]
            count += _U2 + tree.levels - leaf_level(found)
            level -= _U1
            if level == _U0:
                if not passes_leaf(access, kind, _U1, value):
                    return False
                gpa = value & guest.address_bits | address & _OFFSET
            else:
                if not passes_table(access, kind, level + _U1, value):
                    return False
                index = address >> (_SHIFTS[1] * (level - _U1) + _TWELVE) & _INDEX
                gpa = (value & guest.address_bits) + (index << _SHIFTS[0])
        found = _stage2(m, access, final, tree, final_masks, gpa)
        host = host_of(m, access, final, tree, found, gpa)
        finish_walk(out, i, _U0, _U0, host, _U0, _U0, _U1, leaf_level(found))
        count_references(out, i, count + _U1 + tree.levels - leaf_level(found), _U0)
    return True
