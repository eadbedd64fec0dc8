"""What a simulator's own @njit functions call: walks, edits, operations and counters of a machine, without Python.

>>> import numpy as np
>>> from numba import njit
>>> from pgemu import Config, Machine, kernels
>>> machine = Machine(Config())
>>> table = machine.create_page_table("x86-64")
>>> table.map_range(0x4000_0000, physical=0x8000_0000, length=4 << 20).detail  # two leaves of 2M
2
>>> @njit(nogil=True)
... def unmapped(handle, tree, addresses):
...     cleared = 0
...     for address in addresses:
...         if kernels.translate(handle, tree, address, kernels.USER_READ).status == 0:
...             edited = kernels.unmap(handle, tree, address, 4096)
...             cleared += edited.flush_level != 0  # [edited.flush_start, edited.flush_end) must leave the TLBs
...     return cleared
>>> addresses = np.array([0x4000_0000, 0x4000_0123, 0x4020_0000, 0x5000_0000], np.uint64)
>>> unmapped(kernels.Handle(machine), kernels.tree(table), addresses)
2

**Functions**, each with a text of its own (the rest of this help is their results, NamedTuples):

    Handle, tree       made in Python: a machine and a page table, for the others; nested_tree: of a guest's addresses
    translate          one address: status, physical address, level, fault code; walk: with the entries read and written
    translate_many     a batch into the caller's arrays; translate_nested: a guest's address through both stages
    map, map_range     one leaf, or leaves as large as fit, in a PageTable; unmap, protect a range; edit: any edit
    host_fault         an access of a process; guest_fault: of a VM's guest
    convert            a range of a guest_memfd to shared or private; zap, munmap: a range of a process
    operate            any operation by its code
    event_count        how often an event was counted; event_count_of: by one operation; gauge: what a gauge is now

**TLBs.** An edit returns the addresses that a caller's own TLB must forget (`Edited.flush_start`, `flush_end`).
Operations (`convert`, `guest_fault`, `host_fault`, `zap`, `munmap`, `operate`) return none: Linux flushes a VM as a
whole. Look at `event_count(handle, Event.TLB_FLUSH_VM)` after each: if it has grown, a VM was flushed, and everything
that the TLB has of VMs goes (of the one VM, if there is one); `Event.TLB_FLUSH_MM` says the same of processes. To drop
the range of a conversion is not enough: a leaf of 2M or 1G that it cuts is zapped as a whole, and what lies around the
range comes back by faults. `pgemu.examples.njit_tlb` does both: `run` by edits, `run_vm` by events.

**What they take.** `Handle(machine)`, made once, which names what is to be called and keeps the machine alive; a
`tree(table)` (`nested_tree(vm)` for a guest's addresses), one uint64 array for each page table; else integers, which
become uint64 modulo 2**64, members of pgemu.Event, Gauge, Kind and Operation among them, and pgemu.Flag where bits are
meant (`Flag.WRITE | Flag.EXEC`); yes or no (`shared`, `replace`) is a bool or an integer. Addresses and lengths are
bytes, levels KVM's (1 = 4K, 2 = 2M, 3 = 1G). Other types do not compile, and the message names the argument and what is
expected.

**What they return** are NamedTuples (`Found`, `Walked`, `Nested`, `Edited`, `Done`), whose `status` is what the Python
call of the same name returns, or says that nothing was done: `CLOSED` (-5001: the handle was closed, the table
destroyed or made taller, the process or VM has ended), `NOT_LOADED` (-5004: the handle was made without it), `FOREIGN`
(-5005: the tree is of another machine, or its format has no row there), `REFUSED` (-5002: no tree, no such kind, event
or number, an array too short). What does not exist is the kernel's error: -EBADF of a VM (`guest_fault`) or an inode
(`convert`), -EINVAL of a process (`zap`, `munmap`), of a `host_fault` VmFault.SIGSEGV. They never raise, but for an
IndexError with NUMBA_BOUNDSCHECK=1. A walk without an access has the kind `PLAIN`, which pgemu.Kind has not: in Python
it is None.

**Where they run.** In functions that are `nogil`, `cache=True` or `parallel=True`, too. A machine is not thread-safe:
several threads may translate with PLAIN, which writes nothing; whatever else is for one thread at a time. What a
caller's function compiles in is little: a walk that passes at one look; all else is called by its address, which is
read from the handle at every call and is in no cache. The type of a handle has the digest of pgemu's kernels: what
numba has cached of a caller's function for another pgemu is compiled again, and never used.

**What stays.** This module follows semantic versioning (CHANGELOG.md): names, arguments, fields of results, codes and
units change with a major version only (before 1.0 a minor one). The words of a tree and of a handle, and whatever is in
pgemu_kernels but the members of its enums (Operation, Flag, Event, Gauge, Edit, WalkStatus), may change with any.
"""

from pgemu.kernels.editing import Edited, edit, map, map_range, protect, unmap
from pgemu.kernels.handle import Handle
from pgemu.kernels.native import CLOSED, FOREIGN, NOT_LOADED, REFUSED
from pgemu.kernels.running import (
    Done,
    convert,
    event_count,
    event_count_of,
    gauge,
    guest_fault,
    host_fault,
    munmap,
    operate,
    zap,
)
from pgemu.kernels.translation import Found, Nested, Walked, translate, translate_many, translate_nested, walk
from pgemu.kernels.trees import PLAIN, nested_tree, tree
from pgemu.tables.access import Kind

READ, WRITE, FETCH = int(Kind.READ), int(Kind.WRITE), int(Kind.FETCH)
USER_READ, USER_WRITE, USER_FETCH = int(Kind.USER_READ), int(Kind.USER_WRITE), int(Kind.USER_FETCH)

__all__ = (
    "CLOSED",
    "FETCH",
    "FOREIGN",
    "NOT_LOADED",
    "PLAIN",
    "READ",
    "REFUSED",
    "USER_FETCH",
    "USER_READ",
    "USER_WRITE",
    "WRITE",
    "Done",
    "Edited",
    "Found",
    "Handle",
    "Nested",
    "Walked",
    "convert",
    "edit",
    "event_count",
    "event_count_of",
    "gauge",
    "guest_fault",
    "host_fault",
    "map",
    "map_range",
    "munmap",
    "nested_tree",
    "operate",
    "protect",
    "translate",
    "translate_many",
    "translate_nested",
    "tree",
    "unmap",
    "walk",
    "zap",
)
