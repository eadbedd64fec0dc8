"""What C functions have in common: whether an argument can be, and what lies behind a machine."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.addresses import call_c, descriptor_at, words_at
from pgemu_kernels.engine.bits import U0, U7
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import C_CONTEXT
from pgemu_kernels.words.call_words import (
    CALL_LOAD,
    CALL_WORDS,
    CONTEXT_MACHINE,
    CONTEXT_WORDS,
)

U = np.uint64
CALLS_SIZE = U(CALL_WORDS)
CONTEXT_SIZE = U(CONTEXT_WORDS)
MOST_BITS = U(40)  # no array has as many elements as have this bit


@kernel
def context_of(machine):
    """Address of a machine's context, 0 where it is none that pgemu.capi gave."""
    if machine == U0 or machine & U7 != U0:
        return U0
    context = U(descriptor_at(machine)[C_CONTEXT])
    if context == U0 or words_at(context, CONTEXT_SIZE)[CONTEXT_MACHINE] != machine:
        return U0
    return context


@kernel
def is_array(address):
    """Whether words can lie at an address."""
    return address != U0 and address & U7 == U0


@outlined
def is_ready(calls, number):
    """Whether the entry of a word of the table of calls is there, loaded now if it was not."""
    return calls[number] != U0 or call_c(calls[CALL_LOAD], number) == 0
