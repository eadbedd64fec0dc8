"""The orders of a conversion, a row of steps each: the columns of the side-by-side table of posted versions.

A row is one unit of a conversion (see `conversion`). What it does straight on and step by step is made from it.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.gmem.conversion import (
    finish,
    flush_batched,
    gate,
    invalidate_begin,
    invalidate_end,
    prepare,
    store,
    unmap_host,
    zap,
)
from pgemu_kernels.gmem.items import (
    begin_items,
    end_items,
    gate_item,
    restructure_item,
    store_item,
    unmap_item,
    zap_item,
    zap_left_item,
)
from pgemu_kernels.gmem.order_rows import each_item, stepper, straight, to_private, to_shared
from pgemu_kernels.gmem.split_merge import merge, merge_early, split
from pgemu_kernels.words.operations import (
    CONVERT_FIXUP,
    CONVERT_NEXT4K,
    CONVERT_RFC2,
    CONVERT_SLIDES,
    GO,
    NEVER,
)
from pgemu_kernels.words.registers import R_CONVERT_ORDER, R_FLUSH_BATCHED, R_FLUSHES_HELD
from pgemu_kernels.words.rows import O_NEXT, O_STATUS

# RFC v2, May 2025: both the store and the split can fail after the zap; then everything is rolled back.
RFC2 = (
    begin_items,
    each_item(to_private(unmap_item, gate_item, zap_left_item), to_shared(zap_item)),
    each_item(store_item, restructure_item),
    end_items,
)

# Yan Zhao's fix-ups, January 2026: the split comes after the zap and its end, the store last of all.
FIXUP = (
    to_private(unmap_host, gate),
    invalidate_begin,
    zap,
    invalidate_end,
    to_private(merge_early),
    to_shared(split),
    store,
)

# Ackerley Tng's plan, January 2026: what can fail comes before begin, and nothing after the zap can.
JAN2026 = (
    to_private(unmap_host, gate),
    to_shared(split),
    invalidate_begin,
    zap,
    store,
    invalidate_end,
    to_private(merge),
)

# In-place conversion of order-0 folios, linux-next of September 2026: nothing to split or merge.
NEXT4K = (to_private(unmap_host, gate), invalidate_begin, zap, store, invalidate_end)

# VM_PFNMAP, the slides of August 2025: a conversion only unmaps, and never fails but for want of tree nodes.
SLIDES = (to_private(unmap_host), invalidate_begin, zap, store, invalidate_end)


# --------------------------------------------------------------------------- straight line

rfc2, fixup, jan2026, next4k, slides = (straight(row) for row in (RFC2, FIXUP, JAN2026, NEXT4K, SLIDES))


@kernel
def posted(m, op):
    """A unit in any order but the slides'."""
    order = m.state[R_CONVERT_ORDER]
    if order == CONVERT_RFC2:
        return rfc2(m, op)
    if order == CONVERT_FIXUP:
        return fixup(m, op)
    if order == CONVERT_NEXT4K:
        return next4k(m, op)
    return jan2026(m, op)


by_order = full_only(posted, fixup)  # a default machine has no other


@kernel
def unit(m, op):
    """Do one unit in the machine's order."""
    if m.state[R_CONVERT_ORDER] == CONVERT_SLIDES:
        return slides(m, op)
    return by_order(m, op)


@kernel
def convert(m, op):
    """A whole conversion, unit after unit."""
    if prepare(m, op) != GO:
        return
    if flush_batched(m) != U0:
        m.state[R_FLUSHES_HELD] = U1
    while unit(m, op) == GO and finish(m, op) == GO:
        pass


# --------------------------------------------------------------------------- step by step


@outlined
def after_unit(m, op, stage):
    """Behind a unit: step 1 of the next one, if there is one."""
    m.state[op + O_NEXT] = U1
    return np.int64(finish(m, op))


step_rfc2, step_fixup, step_jan2026, step_next4k, step_slides = (
    stepper(row, after_unit) for row in (RFC2, FIXUP, JAN2026, NEXT4K, SLIDES)
)


@kernel
def unit_step(m, op, stage):
    """Step `stage`, from 1 on, of a unit in the machine's order."""
    order = m.state[R_CONVERT_ORDER]
    if order == CONVERT_SLIDES:
        return step_slides(m, op, stage)
    if order == CONVERT_RFC2:
        return step_rfc2(m, op, stage)
    if order == CONVERT_FIXUP:
        return step_fixup(m, op, stage)
    if order == CONVERT_NEXT4K:
        return step_next4k(m, op, stage)
    return step_jan2026(m, op, stage)


@outlined
def step_convert(m, op, stage):
    """Step `stage` of a conversion: 0 prepares; the last one of a unit leads to step 1 of the next, or to the end."""
    state = m.state
    if stage == U0:
        return np.int64(prepare(m, op))
    if np.int64(state[op + O_STATUS]) == -NEVER:
        return np.int64(GO)
    state[R_FLUSHES_HELD] = state[R_FLUSH_BATCHED]
    outcome = np.int64(unit_step(m, op, stage))
    state[R_FLUSHES_HELD] = U0
    if np.int64(state[op + O_STATUS]) == -NEVER:
        return np.int64(GO)  # it goes on and on
    return outcome
