"""What the operations on a process's memory read of their record alike."""

from __future__ import annotations

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.rows import space_root
from pgemu_kernels.words.enum_words import FLAG_EXEC, FLAG_READ, FLAG_WRITE
from pgemu_kernels.words.registers import R_SPACES
from pgemu_kernels.words.rows import O_LENGTH, PROT_EXEC, PROT_READ, PROT_WRITE


@kernel
def has_ended(state, space):
    """Whether there is no such process, or none any more."""
    return space >= state[R_SPACES] or space_root(state, space) == U0


@kernel
def rounded(state, op, unit):
    """A length rounded up to `unit` bytes; 0 where that wraps."""
    return (state[op + O_LENGTH] + unit - U1) & ~(unit - U1)


@kernel
def protection(flags):
    """PROT_* of a record's flags."""
    prot = U0
    if flags & FLAG_READ != U0:
        prot |= PROT_READ
    if flags & FLAG_WRITE != U0:
        prot |= PROT_WRITE
    if flags & FLAG_EXEC != U0:
        prot |= PROT_EXEC
    return prot
