"""A process's memory as mainline Linux has it: mmap, faults, munmap, mprotect, MADV_DONTNEED, fork, exit.

mm/mmap.c, mm/vma.c, mm/mprotect.c, mm/madvise.c. Operations are records as in routing.py; what each reads of them
stands in its docstring. Where a length is in bytes, it is rounded up to pages as the system call does.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.charge import SYSCALL, charge_one
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.rows import inode_row, stop
from pgemu_kernels.process.fault import access
from pgemu_kernels.process.files import allocate, close, punch_hole, set_revoked
from pgemu_kernels.process.fork import end_process, fork
from pgemu_kernels.process.madvise import guard, mprotect, populate, read_smaps, zap
from pgemu_kernels.process.mmap import mmap
from pgemu_kernels.process.munmap import mremap, munmap
from pgemu_kernels.process.record import has_ended
from pgemu_kernels.words.operations import EBADF, EINVAL, EOPNOTSUPP, Operation
from pgemu_kernels.words.registers import R_INODES
from pgemu_kernels.words.rows import I_KIND, I_OPEN, INODE_GUEST_MEMFD, O_OBJECT, O_OP, O_SPACE

U = np.uint64
_HOST_FAULT = U(Operation.HOST_FAULT)
_MMAP = U(Operation.MMAP)
_MUNMAP = U(Operation.MUNMAP)
_ZAP = U(Operation.ZAP)
_PROTECT = U(Operation.PROTECT)
_OP_POPULATE = U(Operation.POPULATE)
_READ_SMAPS = U(Operation.READ_SMAPS)
_FORK = U(Operation.FORK)
_EXIT = U(Operation.EXIT)
_PUNCH_HOLE = U(Operation.PUNCH_HOLE)
_ALLOCATE = U(Operation.ALLOCATE)
_CLOSE = U(Operation.CLOSE)
_REVOKE = U(Operation.REVOKE)
_RESTORE = U(Operation.RESTORE)
_GUARD_INSTALL = U(Operation.GUARD_INSTALL)
_GUARD_REMOVE = U(Operation.GUARD_REMOVE)
_REMAP = U(Operation.REMAP)


@outlined
def _operate_on_file(m, op, kind):
    """Operations on a file of an ordinary kind."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    if state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD:
        return stop(state, op, -EINVAL)
    if kind == _PUNCH_HOLE:
        return punch_hole(m, op)
    if kind == _ALLOCATE:
        return allocate(m, op)
    if kind == _CLOSE:
        return close(m, op)
    return set_revoked(m, op, kind == _REVOKE)


@outlined
def operate(m, op):
    """Run one operation of a process or on a file that is of neither design."""
    state = m.state
    kind = state[op + O_OP]
    space = state[op + O_SPACE]
    if kind == _PUNCH_HOLE or kind == _ALLOCATE or kind == _CLOSE or kind == _REVOKE or kind == _RESTORE:
        charge_one(m, SYSCALL)
        return _operate_on_file(m, op, kind)
    if has_ended(state, space):
        return stop(state, op, -EINVAL)
    if kind == _HOST_FAULT:
        return access(m, op)
    charge_one(m, SYSCALL)
    if kind == _MMAP:
        return mmap(m, op)
    if kind == _MUNMAP:
        return munmap(m, op)
    if kind == _ZAP:
        return zap(m, op)
    if kind == _PROTECT:
        return mprotect(m, op)
    if kind == _OP_POPULATE:
        return populate(m, op)
    if kind == _READ_SMAPS:
        return read_smaps(m, op)
    if kind == _GUARD_INSTALL or kind == _GUARD_REMOVE:
        return guard(m, op, kind == _GUARD_INSTALL)
    if kind == _REMAP:
        return mremap(m, op)
    if kind == _FORK:
        return fork(m, op)
    if kind == _EXIT:
        end_process(m, space)
        return stop(state, op, 0)
    return stop(state, op, np.int64(-EOPNOTSUPP))
