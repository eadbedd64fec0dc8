"""A process's memory as mainline Linux has it: mmap, faults, munmap, mprotect, MADV_DONTNEED, fork, exit.

mm/mmap.c, mm/vma.c, mm/mprotect.c, mm/madvise.c. Operations are records as in routing.py; what each reads of them
stands in its docstring. Where a length is in bytes, it is rounded up to pages as the system call does.
"""

from __future__ import annotations

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.choice import by_number
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row, stop
from pgemu_kernels.process.advice import advise_fork, advise_huge, mlock
from pgemu_kernels.process.fault import access
from pgemu_kernels.process.files import close_file, fallocate, punch_hole, set_revoked
from pgemu_kernels.process.fork import end_process, fork
from pgemu_kernels.process.khugepaged import madvise_collapse
from pgemu_kernels.process.madvise import guard, mprotect, populate, read_smaps, zap_mappings
from pgemu_kernels.process.mmap import mmap
from pgemu_kernels.process.munmap import mremap, munmap
from pgemu_kernels.process.record import has_ended
from pgemu_kernels.stage2.release import waits_for_release
from pgemu_kernels.words.enum_words import (
    EVENT_SYSCALL,
    OP_ADVISE_HUGE,
    OP_ALLOCATE,
    OP_CLOSE,
    OP_COLLAPSE,
    OP_DOFORK,
    OP_DONTFORK,
    OP_EXIT,
    OP_FORK,
    OP_GUARD_INSTALL,
    OP_GUARD_REMOVE,
    OP_HOST_FAULT,
    OP_LOCK,
    OP_MMAP,
    OP_MUNMAP,
    OP_POPULATE,
    OP_PROTECT,
    OP_PUNCH_HOLE,
    OP_READ_SMAPS,
    OP_REMAP,
    OP_RESTORE,
    OP_REVOKE,
    OP_ZAP,
)
from pgemu_kernels.words.operations import EBADF, EBUSY, EINVAL, EOPNOTSUPP
from pgemu_kernels.words.registers import R_INODES
from pgemu_kernels.words.rows import I_KIND, I_OPEN, INODE_GUEST_MEMFD, O_OBJECT, O_OP, O_SPACE, TASK_SIZE


@kernel
def _unsupported(m, op, kind):
    return stop(m.state, op, -EOPNOTSUPP)


@outlined
def _exit(m, op):
    """exit(): 0, or -EBUSY while somebody holds the lock of a file that goes with the process."""
    state = m.state
    space = state[op + O_SPACE]
    if waits_for_release(state, space, U0, TASK_SIZE):
        return stop(state, op, -EBUSY)
    end_process(m, space)
    return stop(state, op, 0)


_of_files = by_number(
    (
        (OP_PUNCH_HOLE, punch_hole),
        (OP_ALLOCATE, fallocate),
        (OP_CLOSE, close_file),
        (OP_REVOKE, set_revoked),
        (OP_RESTORE, set_revoked),
    ),
    _unsupported,
)
_of_processes = by_number(
    (
        (OP_MMAP, mmap),
        (OP_MUNMAP, munmap),
        (OP_ZAP, zap_mappings),
        (OP_PROTECT, mprotect),
        (OP_POPULATE, populate),
        (OP_READ_SMAPS, read_smaps),
        (OP_GUARD_INSTALL, guard),
        (OP_GUARD_REMOVE, guard),
        (OP_REMAP, mremap),
        (OP_LOCK, mlock),
        (OP_DONTFORK, advise_fork),
        (OP_DOFORK, advise_fork),
        (OP_ADVISE_HUGE, advise_huge),
        (OP_COLLAPSE, madvise_collapse),
        (OP_FORK, fork),
        (OP_EXIT, _exit),
    ),
    _unsupported,
)


@outlined
def _operate_on_file(m, op, kind):
    """Operations on a file of an ordinary kind."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    if state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD:
        return stop(state, op, -EINVAL)
    return _of_files(m, op, kind)


@outlined
def operate_process(m, op):
    """Run one operation of a process or on a file that is of neither design."""
    state = m.state
    kind = state[op + O_OP]
    if kind == OP_PUNCH_HOLE or kind == OP_ALLOCATE or kind == OP_CLOSE or kind == OP_REVOKE or kind == OP_RESTORE:
        charge_one(m, EVENT_SYSCALL)
        return _operate_on_file(m, op, kind)
    if has_ended(state, state[op + O_SPACE]):
        return stop(state, op, -EINVAL)
    if kind == OP_HOST_FAULT:
        return access(m, op)
    charge_one(m, EVENT_SYSCALL)
    return _of_processes(m, op, kind)
