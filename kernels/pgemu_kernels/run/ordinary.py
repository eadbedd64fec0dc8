"""The entry for what is of neither design: process memory and KVM as mainline Linux has them."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.engine.records import Columns, element
from pgemu_kernels.engine.rows import stop
from pgemu_kernels.gmem import faults as _gives_process_fault, mapped_pages as _gives_unmap  # noqa: F401
from pgemu_kernels.gmem.pins import operate_pin_of_any
from pgemu_kernels.kvm import operations as kvm
from pgemu_kernels.process import operations as mm
from pgemu_kernels.process.record import has_ended
from pgemu_kernels.run.failures import operate_failure
from pgemu_kernels.run.routing import as_one_step, in_order, is_of, is_ordinary
from pgemu_kernels.words.enum_words import EVENT_SYSCALL, OP_PIN
from pgemu_kernels.words.operations import EFAULT, OPS_OF_VM, OPS_TRYING
from pgemu_kernels.words.rows import ACTORS, O_SPACE

U = np.uint64


@kernel
def is_of_neither(m, columns, i):
    """Whether an operation is ordinary."""
    return is_ordinary(m.state, element(columns.header, i), element(columns.object, i), element(columns.address, i))


@outlined
def pin(m, op):
    """PIN of a process that has or had ordinary memory."""
    charge_one(m, EVENT_SYSCALL)
    if has_ended(m.state, m.state[op + O_SPACE]):
        return stop(m.state, op, -EFAULT)
    return np.int64(operate_pin_of_any(m, op))


@kernel
def operate(m, op, kind):
    """Run one, of a page, of a VM or of a process."""
    if is_of(OPS_TRYING, kind):
        return operate_failure(m, op, kind)
    if kind == OP_PIN:
        return pin(m, op)
    return kvm.operate_vm(m, op) if is_of(OPS_OF_VM, kind) else mm.operate_process(m, op)


run_ordinarily = in_order(is_of_neither, operate)
step_ordinarily = as_one_step(operate, True)


@entry
def run_ordinary(descriptor, header, object_, address, offset, length, status, detail, first, actor):
    """Run operations from `first` on, up to one that is for `fast.run`: its index, or how many there are.

    `actor` below words.ACTORS: do the operation that he began, as one step: STOP or BLOCKED.
    """
    if actor < U(ACTORS):
        return U(step_ordinarily(open_full_machine(descriptor), actor))
    columns = Columns(header, object_, address, offset, length, status, detail)
    return run_ordinarily(open_full_machine(descriptor), columns, first)
