"""The machine that a trace of processes runs on: what stands before its first record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.errors import InputError
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.config import Config
    from pgemu.objects.machine import Machine
    from pgemu.trace.lowered import Lowered

__all__ = ("boot_processes", "config_of_processes", "machine_of_processes")

_LEAST_MEMORY = 64 << 20
_PER_FAULT = 4  # pages that a fault can take: its own, and a table of each level below the top one


def machine_of_processes(lowered: Lowered, **fields: Any) -> Machine:
    """A machine with the processes (`space` 0 on) and files (`object` 0 on) that stand before the first record.

    :param fields: of Config. Without them `memory` is what the faults of the records can take at most, and the pools
        hold the trace's files of HugeTLB memory.
    :raises InputError: the trace is a guest's, a field that Config refuses, or no room for that in this computer
    """
    return boot_processes(lowered, config_of_processes(lowered, **fields))


def config_of_processes(lowered: Lowered, **fields: Any) -> Config:
    """The Config of machine_of_processes()."""
    from pgemu.machine.config import Config

    if lowered.kind != "process":
        raise InputError("a guest's memory, expected a process's", lowered.source)
    try:
        return Config(**{"memory": _memory(lowered), **_pools(lowered), **fields})
    except ValueError as error:
        raise InputError(str(error), lowered.source) from None


def boot_processes(lowered: Lowered, config: Config) -> Machine:
    """A machine with the processes and files of a trace. InputError where this computer cannot model it."""
    from pgemu.objects.machine import Machine

    try:
        machine = Machine(config)
        for _ in range(lowered.processes):
            machine.create_process()
        for file in lowered.files:
            if file.kind == "shmem":
                machine.create_memfd(file.size)
            else:
                machine.create_hugetlb_file(file.size, PAGE_1G if file.kind == "hugetlb-1G" else PAGE_2M)
    except ValueError as error:
        raise InputError(str(error), lowered.source) from None
    except (MemoryError, OSError):
        raise InputError("more memory than this computer can model", lowered.source) from None
    return machine


def _memory(lowered: Lowered) -> int:
    """Bytes of ordinary memory."""
    records = lowered.records
    faults = int((records.op == Operation.HOST_FAULT).sum())
    at_once = np.isin(records.op, np.array([Operation.POPULATE, Operation.LOCK, Operation.COLLAPSE], np.uint8))
    at_once |= (records.op == Operation.MMAP) & (records.flags & np.uint8(Flag.POPULATE | Flag.LOCKED) != 0)
    populated = int(records.length[at_once].sum(dtype=object) or 0)
    need = _LEAST_MEMORY + _PER_FAULT * faults * PAGE_4K + populated
    return -(-need // PAGE_2M) * PAGE_2M


def _pools(lowered: Lowered) -> dict[str, int]:
    """Pools of the trace's huge pages."""
    sizes = dict.fromkeys((PAGE_2M, PAGE_1G), 0)
    for file in lowered.files:
        if file.kind != "shmem":
            sizes[PAGE_1G if file.kind == "hugetlb-1G" else PAGE_2M] += file.size
    if not sizes[PAGE_2M]:
        return {"pool": sizes[PAGE_1G]} if sizes[PAGE_1G] else {}
    return {"pool": sizes[PAGE_2M], "page_size": PAGE_2M, "other_pool": sizes[PAGE_1G]}
