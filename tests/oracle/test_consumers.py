"""The table of `pgemu consumers` against captured kernels: guest_memfd as merged, and mapped as VM_PFNMAP.

Not captured is what the captured kernels or processors have not: vDPA and RDMA devices, nested guests (kvm_vcpu_map(),
gfn_to_pfn_cache), TDX, SEV, a NIC under vhost-net. vDPA, RDMA and SEV pin by the call that PIN_LONGTERM_TEST makes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest

from oracle.capture import Capture, Operation, captures, load
from oracle.iommu_domains import iommu_captures
from oracle.operations import every, number, returned
from oracle.replay_pfnmap import kind_of
from pgemu.experiments.consumers import CONSUMERS, try_consumer
from pgemu.machine.designs import Design
from pgemu_kernels import words as W

VARIANTS: dict[bool, Design] = {False: "restructure", True: "pfnmap"}  # mapped as VM_PFNMAP?
USERS = {
    "direct": ("O_DIRECT",),
    "aio": ("O_DIRECT",),
    "uring": ("io_uring fixed buffers",),
    "zerocopy": ("vhost-net zero-copy",),  # MSG_ZEROCOPY
    "copy": ("vhost, virtio by copying", "kvm_{read,write}_guest()"),
    "pinlong": ("vhost-vdpa", "RDMA ibv_reg_mr()", "SEV region"),
    "xdpumem": ("AF_XDP umem",),
    "iomap": ("iommufd",),
    "iomapfile": ("iommufd, by the file",),
    "dmamap": ("VFIO type1",),
    "pvm": ("process_vm_readv()",),
    "ptpeek": ("ptrace() peeks",),
    "ptpoke": ("ptrace() peeks",),
    "selfmem": ("/proc/PID/mem",),
    "vmsplice": ("vmsplice()",),
    "vmsplicegift": ("vmsplice()",),
    "futex": ("shared futex",),
    "udmabuf": ("udmabuf",),
    "gtouch": ("KVM slot over the mapping",),
}
NOT_CAPTURED = {"gfn_to_pfn_cache", "kvm_vcpu_map()", "KVM_TDX_INIT_MEM_REGION"}
SCENARIOS = ("09-hva-slot", "11-consumers", "15-gmem", "25-gmem", "56-huge-consumers-poison")
CHANGES = {"hwpoison", "prot", "gpunch", "unmap"}  # of what is mapped: users come before


def used(capture: Capture) -> Iterator[tuple[Design, Operation]]:
    """Each use of a mapping of guest_memfd, until that changes."""
    for name, checkpoints in capture.scenarios().items():
        if not name.startswith(SCENARIOS) or not any(op.name == "gmem" for op in every(checkpoints)):
            continue
        for op in every(checkpoints):
            if op.name in CHANGES:
                break
            if op.name in USERS and op.words[-1] != "wait":  # which found the page, and another value than asked for
                yield VARIANTS[kind_of(checkpoints).pfnmap], op


def status_of(op: Operation) -> int:
    if op.name == "gtouch":  # how many accesses were made
        return 0 if returned(op) == number(op.words[4]) else -W.EFAULT
    return min(returned(op), 0)


@pytest.fixture(scope="module")
def captured() -> dict[tuple[str, Design], set[int]]:
    """By consumer and design: what it was seen to return."""
    found: dict[tuple[str, Design], set[int]] = defaultdict(set)
    paths = [path for path in (*captures(), *iommu_captures()) if "7.3.4-debian" in path.name]
    for path in paths:
        for design, op in used(load(path)):
            for consumer in USERS[op.name]:
                found[consumer, design].add(status_of(op))
    return found


@pytest.mark.parametrize("design", VARIANTS.values())
@pytest.mark.parametrize(
    "consumer", [one for one in CONSUMERS if one.name not in NOT_CAPTURED], ids=lambda one: one.name
)
def test_a_consumer_gets_what_it_was_seen_to_get(consumer, design: Design, captured) -> None:  # type: ignore[no-untyped-def]
    seen = captured.get((consumer.name, design))
    if seen is None:
        pytest.skip("not in the captures that PGEMU_ORACLE names")
    assert seen == {try_consumer(consumer, design).status}


def test_every_consumer_is_captured_or_known_not_to_be(captured) -> None:  # type: ignore[no-untyped-def]
    names = {consumer.name for consumer in CONSUMERS}
    assert {name for names_ in USERS.values() for name in names_} == names - NOT_CAPTURED
    assert {name for name, _ in captured} <= names
