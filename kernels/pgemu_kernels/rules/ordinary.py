"""The recount of ordinary memory: process memory, its files, and what KVM keeps beside stage 2.

An entry of its own, because a machine that has none of it should not wait for its compilation.
"""

from __future__ import annotations

from pgemu_kernels.engine.compile import entry
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.rules.kvm import own_kvm_nodes
from pgemu_kernels.rules.processes import check_process, check_processes
from pgemu_kernels.words.registers import R_SPACES


@entry
def check_ordinary(descriptor, owner, found):
    """Recount every process's tables and pages, and the nodes of page caches, attributes and dirty bitmaps.

    Before recount.check(), whose scratch arrays these are: what is found is marked in `owner` and counted in `found`.
    """
    m = open_machine(descriptor)
    for space in range(m.state[R_SPACES]):
        check_process(m, space, owner, found)
    own_kvm_nodes(m, owner, found)
    check_processes(m, owner, found)
