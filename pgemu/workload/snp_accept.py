"""`workload:snp-accept`: an SEV-SNP guest with 220 vCPUs that accepts its memory.

Published:

- the guest accepts units of 4 MiB; each is a request to change the page's state (PSC), which user space answers with
  KVM_SET_MEMORY_ATTRIBUTES: Michael Roth on the accept storm of a guest with 220 vCPUs
  (20231103000105.m3z4eijcxlxciyzd@amd.com), whose log has the two private faults of a unit 2 MiB apart
- memory that guests accept when they need it is accepted in ascending order: mm/page_alloc.c:try_to_accept_memory_one()
- swiotlb takes 6 % of memory, 64 MiB to 1 GiB: arch/x86/mm/mem_encrypt.c:mem_encrypt_setup_arch()
- each vCPU has a GHCB, a page that is shared; next to it lies a private one, its backup: struct sev_es_runtime_data
- a PSC to shared of 4K breaks the RMP's entry of 2M (PSMASH): arch/x86/kvm/svm/sev.c

Chosen here, and a parameter where it could be another number:

- `guest_memory`: 16 GiB in one slot, shared until it is accepted, as KVM's attributes are before anything sets them:
  without that the published requests would change nothing, and stop nobody (`--init private`: QEMU's way since 9.1)
- `vcpus`: 220, `unit`: 4 MiB
- `fault`: 2 MiB, what the guest touches as it accepts, and the page that is mapped then; 4096 is a guest that
  validates page by page
- `concurrent`: 8 units are under way at once, so that up to 7 requests of others are between one and its faults
- what swiotlb and the GHCBs are to have is accepted first, and then made shared: swiotlb in one piece as high as it
  fits below 2 GiB, a GHCB every 16 KiB below that; the host writes to each GHCB, the guest uses it and the page behind
  it, at 4K
- each unit is accepted by any vCPU; times: 10 us from one record to the next
"""

from __future__ import annotations

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.trace.memory_layout import align_up
from pgemu.trace.schema import Records
from pgemu.workload.parts import (
    LARGEST,
    Pages,
    checked_number,
    convert,
    host_uses,
    in_turn,
    made,
    one_slot,
    setup,
    vcpu_uses,
)
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag

__all__ = ("NAME", "build")

NAME = "workload:snp-accept"
_MOST_VCPUS = 255  # actors from 256 on are the host's
_SHARE, _LEAST, _MOST = 0.06, 64 << 20, 1 << 30  # of swiotlb
_GHCB_EVERY = 4  # pages
_USE = int(Flag.WRITE | Flag.PRIVATE)


def build(
    seed: int = 0, guest_memory: float = 16 * PAGE_1G, unit: float = 4 << 20, fault: float = PAGE_2M,
    vcpus: float = 220, concurrent: float = 8,
) -> Lowered:  # fmt: skip
    """Return the workload; `seed` chooses who accepts a unit, and how many requests of others come between.

    :param guest_memory: bytes, a multiple of `unit`, at least 256 MiB
    :param unit: bytes that one request is for, a multiple of 2 MiB
    :param fault: bytes of what the guest touches at once as it accepts: 4096 or 2 MiB
    :param vcpus: of the VM, up to 255
    :param concurrent: units that are under way at once, at most
    :raises InputError: another number, with what was expected
    """
    each = checked_number("unit", unit, PAGE_2M, PAGE_1G, PAGE_2M, source=NAME)
    size = checked_number("guest_memory", guest_memory, 256 << 20, LARGEST, each, source=NAME)
    step = checked_number("fault", fault, PAGE_4K, PAGE_2M, PAGE_4K, source=NAME)
    if step not in (PAGE_4K, PAGE_2M):
        raise InputError(f"fault {step}: expected {PAGE_4K} or {PAGE_2M}", NAME)
    cpus = checked_number("vcpus", vcpus, 1, _MOST_VCPUS, source=NAME)
    under_way = checked_number("concurrent", concurrent, 1, 1 << 16, source=NAME)
    random = np.random.Generator(np.random.PCG64(seed))
    swiotlb = align_up(min(max(int(size * _SHARE), _LEAST), _MOST), PAGE_2M)
    start = min(size, 2 * PAGE_1G) - swiotlb
    ghcbs = start // PAGE_4K - _GHCB_EVERY * np.arange(cpus, 0, -1)
    units = np.arange(size // each)
    early = (units + 1) * each > int(ghcbs[0]) * PAGE_4K
    early &= units * each < start + swiotlb
    layout = one_slot(size)
    pieces = [
        _accepted(random, units[early], each, step, cpus, 1),
        convert(np.array([start // PAGE_4K]), Flag.SHARED, swiotlb),
        _ghcbs(ghcbs),
        _accepted(random, units[~early], each, step, cpus, under_way),
    ]
    machine = {"vm": "snp", "stage2": "npt", "vcpus": cpus}
    return made(setup(layout), pieces, layout, NAME, init="shared", machine=machine)


def _accepted(random: np.random.Generator, units: Pages, each: int, step: int, cpus: int, under_way: int) -> Records:
    """Each unit is asked for, and touched once up to `under_way` - 1 requests of others are answered, too."""
    vcpus = random.integers(cpus, size=len(units))
    asked = convert(units * (each // PAGE_4K), Flag.PRIVATE, each, vcpus)
    faults = each // step
    pages = (units[:, None] * each + np.arange(faults) * step) // PAGE_4K
    kind = _USE | (int(Flag.ACCEPT_4K) if step == PAGE_4K else 0)
    touched = vcpu_uses(pages.reshape(-1), kind, np.repeat(vcpus, faults))
    after = np.arange(len(units)) + random.integers(under_way, size=len(units))
    order = np.argsort(np.concatenate([2 * np.arange(len(units)), np.repeat(2 * after + 1, faults)]), kind="stable")
    return Records.concatenate([asked, touched]).take(order)


def _ghcbs(pages: Pages) -> Records:
    """Each vCPU makes its GHCB shared, fills it for the host, and goes on with the private page behind it."""
    vcpus = np.arange(len(pages))
    return in_turn(
        [
            convert(pages, Flag.SHARED, vcpus=vcpus),
            vcpu_uses(pages, int(Flag.WRITE | Flag.SHARED), vcpus),
            host_uses(pages),
            vcpu_uses(pages + 1, _USE, vcpus),
        ]
    )
