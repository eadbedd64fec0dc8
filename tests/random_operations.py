"""Random operations over every kind of object, on machines of any kind."""

from __future__ import annotations

from typing import Any

from fuzzing import Random
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

M2, PAGE, G1 = W.PAGE_2M, W.PAGE_4K, W.PAGE_1G
ANONYMOUS, SMALL, DEVICE, HUGE, SHMEM, DESIGNS_VMA = (
    0x400000,
    0x800000,
    0xC00000,
    0x1000000,
    0x1400000,
    0x7F00_0000_0000,
)
DESIGNS_SLOT, OTHER_SLOT = G1, 3 * G1
PLACES = (ANONYMOUS, SMALL, DEVICE, HUGE, SHMEM, DESIGNS_VMA, 0, DESIGNS_SLOT, OTHER_SLOT, 0x3000_0000)
EDGES = (
    0,
    1,
    PAGE - 1,
    PAGE,
    M2 - PAGE,
    M2,
    G1,
    1 << 31,
    1 << 32,
    1 << 40,
    1 << 47,
    1 << 52,
    1 << 63,
    (1 << 64) - PAGE,
    (1 << 64) - 1,
)
# Reserving alone is the half of creating an inode: whose the reservation is nobody would know. Whoever freezes a folio
# holds its lock, for which a kernel's close would wait.
LEFT_OUT = (Operation.POOL_RESERVE, Operation.FOLIO_FREEZE)
CODES = [int(op) for op in Operation if op not in LEFT_OUT]
# As in test_one_gate.py: a VM does not wait for the conversion that has begun to invalidate it.
STEPPED = [op for op in CODES if op != Operation.VM_EXIT]
NO_CODES = sorted({0, 62, 63, 64, 100, 255} - {int(op) for op in Operation})


def chosen(chance: Random) -> Config:
    """A small machine, of any kind."""
    given: dict[str, Any] = {
        "kernel": chance.choice(("6.12", "6.18", "7.3")),
        "stage2": chance.choice(("npt", "ept")),
        "hvo": chance.random() < 0.7,
        "seed": chance.choice((0, 0, 5)),
        "order": chance.choice(("rfc2", "fixup", "jan2026")),
        "split_form": chance.choice(("rfc2", "jan2026")),
        "lru_cache": chance.random() < 0.2,
        "worker": chance.choice(("immediate", "immediate", "queued")),
        "merge": chance.choice(("now", "now", "lazy")),
        "punch": chance.choice(("zero", "refuse")),
        "zap": chance.choice(("exact", "rounded")),
        "pti": chance.random() < 0.2,
        "host_huge": chance.random() < 0.2,
        "frames": chance.choice((None, None, None, 400)),
        "memory": 16 << 20,
        "other_pool": chance.choice((0, 0, G1)),
        "buddy": chance.choice((0, 0, 8 << 20)),
    }
    while given:
        try:
            return Config(chance.choice(DESIGNS), pool=6 * M2, page_size=M2, **given)
        except ValueError:  # these do not go together
            given.pop(chance.choice(sorted(given)))
    raise AssertionError("no machine at all")


def scene(config: Config) -> Machine | None:
    """One of each kind of inode, mapping and slot, as far as the machine has room; None without any."""
    try:
        machine = Machine(config)
        gmem = machine.create_guest_memfd(2 * M2, shared=True)
        process = machine.create_process()
        vm, other = machine.create_vm(process, protected=True), machine.create_vm(process)
        machine.create_process()
    except OSError:
        return None
    process.mmap_anonymous(ANONYMOUS, M2)
    process.mmap_anonymous(SHMEM, M2, shared=True)
    process.mmap(gmem, DESIGNS_VMA)
    vm.set_memory_region(0, 0, M2, ANONYMOUS)
    vm.bind(gmem, DESIGNS_SLOT)
    other.set_memory_region(0, 0, M2, SHMEM)
    for make in (
        lambda: process.mmap_hugetlb(HUGE, file=machine.create_hugetlb_file(M2)),
        lambda: process.mmap(machine.create_guest_memfd_4k(M2), SMALL),
        lambda: process.mmap_device(machine.create_device(0x1000, 512), DEVICE),
        lambda: other.bind(machine.create_guest_memfd(M2), OTHER_SLOT),
    ):
        try:
            make()
        except (OSError, ValueError):  # no room
            continue
    return machine


def value(chance: Random, mostly: tuple[int, ...]) -> int:
    """A number near what is there, at an edge, or any."""
    draw = chance.random()
    if draw < 0.75:
        return (chance.choice(mostly) + chance.choice((0, 0, PAGE, 5 * PAGE, M2, M2 - PAGE))) % (1 << 64)
    return chance.choice(EDGES) if draw < 0.92 else chance.getrandbits(chance.choice((12, 21, 33, 48, 64)))


def operation(chance: Random, codes: list[int] = CODES) -> dict[str, int]:
    """One operation's columns."""
    return {
        "op": chance.choice(codes if chance.random() < 0.98 else NO_CODES),
        "flags": chance.choice((0, 1, 4, 8, 133, 128)) if chance.random() < 0.7 else chance.randrange(256),
        "actor": chance.randrange(8) if chance.random() < 0.9 else chance.randrange(int(W.ACTORS)),
        "vm": chance.choice((0, 0, 1, 2, 7, 65535)),
        "space": chance.choice((0, 0, 0, 1, 2, 9, 18, 65535)),
        "object_": chance.choice((*range(8), 9, 512, int(W.NO_INODE), 0xFFFF_FFFE)),
        "address": value(chance, PLACES),
        "offset": value(chance, (0,)),
        "length": chance.choice((PAGE, M2, 2 * M2, 1, 2)) if chance.random() < 0.8 else value(chance, (0,)),
    }
