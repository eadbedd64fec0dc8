"""The entry for what is of neither design: process memory and KVM as mainline Linux has them."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U1
from pgemu_kernels.engine.charge import finish_operation, forget_last
from pgemu_kernels.engine.compile import entry
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.engine.records import Columns, element, load, save_result
from pgemu_kernels.kvm import operations as kvm
from pgemu_kernels.process import operations as mm
from pgemu_kernels.run.routing import is_of, is_ordinary
from pgemu_kernels.words.operations import OPS_OF_VM
from pgemu_kernels.words.registers import R_ORDINARY
from pgemu_kernels.words.rows import O_OP

U = np.uint64


@entry
def run_ordinary(descriptor, header, object_, address, offset, length, status, detail, first):
    """Run operations from `first` on, up to one that is for `fast.run`: its index, or how many there are."""
    columns = Columns(header, object_, address, offset, length, status, detail)
    m = open_full_machine(descriptor)
    count = U(status.size)
    i = first
    while i < count:
        if not is_ordinary(m.state, element(header, i), element(object_, i), element(address, i)):
            break
        m.state[R_ORDINARY] = U1
        op = load(m, columns, i)
        if is_of(OPS_OF_VM, m.state[op + O_OP]):
            kvm.operate_vm(m, op)
        else:
            mm.operate_process(m, op)
        forget_last(m.stats)
        finish_operation(m, op)
        save_result(m.state, op, columns, i)
        i += U1
    return i
