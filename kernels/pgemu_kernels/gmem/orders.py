"""The orders of a conversion, one short function each: the columns of the side-by-side table of posted versions.

Each does one unit of a conversion (see `conversion`) and returns GO, or STOP where it ended with an error. Below stand
the same lists once more, for whoever goes step by step.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.gmem.conversion import (
    begin_items,
    end_items,
    finish,
    gate,
    gate_item,
    invalidate_begin,
    invalidate_end,
    merge,
    merge_early,
    next_item,
    prepare,
    restructure_item,
    split,
    store,
    store_item,
    unmap_host,
    unmap_item,
    zap,
    zap_item,
)
from pgemu_kernels.words.operations import CONVERT_FIXUP, CONVERT_NEXT4K, CONVERT_RFC2, GO, NEVER, PFNMAP, STOP
from pgemu_kernels.words.registers import R_CONVERT_ORDER, R_DESIGN, R_FLUSH_BATCHED, R_FLUSHES_HELD
from pgemu_kernels.words.rows import O_NEXT, O_STATUS, O_TO_PRIVATE

U = np.uint64
_PFNMAP = U(PFNMAP)


# --------------------------------------------------------------------------- straight line


@outlined
def rfc2(m, op):
    """RFC v2, May 2025: begin; each item: zap, or unmap and gate; each item: store, then split or merge; end.

    Both the store and the split can fail after the zap; then everything is rolled back.
    """
    to_private = m.state[op + O_TO_PRIVATE] != U0
    begin_items(m, op)
    more = True
    while more:
        if to_private:
            unmap_item(m, op)
            if gate_item(m, op) != GO:
                return STOP
        else:
            zap_item(m, op)
        more = next_item(m, op)
    more = True
    while more:
        if store_item(m, op) != GO or restructure_item(m, op) != GO:
            return STOP
        more = next_item(m, op)
    end_items(m, op)
    return GO


@outlined
def fixup(m, op):
    """Yan Zhao's fix-ups, January 2026: the split comes after the zap and its end, the store last of all."""
    to_private = m.state[op + O_TO_PRIVATE] != U0
    if to_private:
        unmap_host(m, op)
        if gate(m, op) != GO:
            return STOP
    invalidate_begin(m, op)
    zap(m, op)
    invalidate_end(m, op)
    if to_private:
        merge_early(m, op)
    elif split(m, op) != GO:
        return STOP
    store(m, op)
    return GO


@outlined
def jan2026(m, op):
    """Ackerley Tng's plan, January 2026: what can fail comes before begin, and nothing after the zap can."""
    to_private = m.state[op + O_TO_PRIVATE] != U0
    if to_private:
        unmap_host(m, op)
        if gate(m, op) != GO:
            return STOP
    elif split(m, op) != GO:
        return STOP
    invalidate_begin(m, op)
    zap(m, op)
    store(m, op)
    invalidate_end(m, op)
    if to_private:
        merge(m, op)
    return GO


@outlined
def next4k(m, op):
    """In-place conversion of order-0 folios, linux-next of September 2026: nothing to split or merge."""
    if m.state[op + O_TO_PRIVATE] != U0:
        unmap_host(m, op)
        if gate(m, op) != GO:
            return STOP
    invalidate_begin(m, op)
    zap(m, op)
    store(m, op)
    invalidate_end(m, op)
    return GO


@outlined
def slides(m, op):
    """VM_PFNMAP, the slides of August 2025: a conversion only unmaps, and never fails but for want of tree nodes."""
    if m.state[op + O_TO_PRIVATE] != U0:
        unmap_host(m, op)
    invalidate_begin(m, op)
    zap(m, op)
    store(m, op)
    invalidate_end(m, op)
    return GO


@kernel
def unit(m, op):
    """Do one unit in the machine's order."""
    order = m.state[R_CONVERT_ORDER]
    if m.state[R_DESIGN] == _PFNMAP:
        return slides(m, op)
    if order == CONVERT_RFC2:
        return rfc2(m, op)
    if order == CONVERT_FIXUP:
        return fixup(m, op)
    if order == CONVERT_NEXT4K:
        return next4k(m, op)
    return jan2026(m, op)


@outlined
def convert(m, op):
    """A whole conversion, unit after unit."""
    if prepare(m, op) != GO:
        return
    m.state[R_FLUSHES_HELD] = m.state[R_FLUSH_BATCHED]
    while unit(m, op) == GO and finish(m, op) == GO:
        pass


# --------------------------------------------------------------------------- step by step


@kernel
def unmap_or_gate(m, op, stage):
    """Steps 1 and 2 to private."""
    return unmap_host(m, op) if stage == U1 else gate(m, op)


@kernel
def zap_and_store(m, op, stage):
    """Steps 0 to 3 of the orders that store between zap and end."""
    if stage == U0:
        return invalidate_begin(m, op)
    if stage == U1:
        return zap(m, op)
    if stage == U(2):
        return store(m, op)
    return invalidate_end(m, op)


@kernel
def after_item(m, op, same, following):
    """Behind an item's last step: at `same` with the next item, or at `following` with the first one."""
    m.state[op + O_NEXT] = same if next_item(m, op) else following
    return GO


@kernel
def after_unit(m, op):
    """Behind a unit: step 1 of the next one, if there is one."""
    m.state[op + O_NEXT] = U1
    return finish(m, op)


@outlined
def step_rfc2(m, op, stage):
    """Step `stage` of rfc2(): one of each item, and what comes before and after."""
    to_private = m.state[op + O_TO_PRIVATE] != U0
    if stage == U1:
        return begin_items(m, op)
    if stage == U(2) and to_private:
        return unmap_item(m, op)
    if stage == U(2):
        zap_item(m, op)
        return after_item(m, op, U(2), U(4))
    if stage == U(3):
        return after_item(m, op, U(2), U(4)) if gate_item(m, op) == GO else STOP
    if stage == U(4):
        return store_item(m, op)
    if stage == U(5):
        return after_item(m, op, U(4), U(6)) if restructure_item(m, op) == GO else STOP
    return end_items(m, op) if stage == U(6) else after_unit(m, op)


@outlined
def step_fixup(m, op, stage):
    """Step `stage` of fixup()."""
    to_private = m.state[op + O_TO_PRIVATE] != U0
    if to_private:
        if stage <= U(2):
            return unmap_or_gate(m, op, stage)
        stage -= U(2)
    if stage == U1:
        return invalidate_begin(m, op)
    if stage == U(2):
        return zap(m, op)
    if stage == U(3):
        return invalidate_end(m, op)
    if stage == U(4):
        return merge_early(m, op) if to_private else split(m, op)
    return store(m, op) if stage == U(5) else after_unit(m, op)


@outlined
def step_jan2026(m, op, stage):
    """Step `stage` of jan2026()."""
    if m.state[op + O_TO_PRIVATE] == U0:
        if stage == U1:
            return split(m, op)
        return zap_and_store(m, op, stage - U(2)) if stage < U(6) else after_unit(m, op)
    if stage <= U(2):
        return unmap_or_gate(m, op, stage)
    if stage < U(7):
        return zap_and_store(m, op, stage - U(3))
    return merge(m, op) if stage == U(7) else after_unit(m, op)


@outlined
def step_next4k(m, op, stage):
    """Step `stage` of next4k()."""
    if m.state[op + O_TO_PRIVATE] != U0:
        if stage <= U(2):
            return unmap_or_gate(m, op, stage)
        stage -= U(2)
    return zap_and_store(m, op, stage - U1) if stage < U(5) else after_unit(m, op)


@outlined
def step_slides(m, op, stage):
    """Step `stage` of slides()."""
    if m.state[op + O_TO_PRIVATE] != U0:
        if stage == U1:
            return unmap_host(m, op)
        stage -= U1
    return zap_and_store(m, op, stage - U1) if stage < U(5) else after_unit(m, op)


@kernel
def unit_step(m, op, stage):
    """Step `stage`, from 1 on, of a unit in the machine's order."""
    order = m.state[R_CONVERT_ORDER]
    if m.state[R_DESIGN] == _PFNMAP:
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
