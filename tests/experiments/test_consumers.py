"""Who uses a process's memory: what the machine gives each, against what reference and kernel sources say."""

from __future__ import annotations

import numpy as np
import pytest

from pgemu.experiments.consumers import CONSUMERS, Access, Outcome, Scene, document, try_all, try_consumer, use
from pgemu.machine.designs import DESIGNS
from pgemu_kernels import words as W

AT = 5 * W.PAGE_4K
COPIED = Outcome(0, 0, 0, None, 0)
REFUSED = Outcome(-W.EFAULT, 0, 0, None, 0)

# How it gets at memory: with restructure, with pfnmap.
EXPECTED = {
    Access.COPY: (COPIED, COPIED),
    Access.PIN: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),
    Access.LONGTERM: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),
    Access.REFERENCE: (Outcome(0, 1, -W.EAGAIN, AT, 0), REFUSED),
    Access.KVM: (COPIED, COPIED),  # by the entry; nothing is held
    Access.KVM_CACHE: (COPIED, COPIED),  # the same, by a cache
    Access.KVM_PIN: (Outcome(0, 1024, -W.EAGAIN, AT, 0), Outcome(-W.EINVAL, 0, 0, None, 0)),
    Access.VFIO: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),  # HugeTLB memory is neither invalid nor reserved
    Access.MEMFD: (Outcome(-W.EBADFD, 0, 0, None, 0),) * 2,
}

# Named in the reference as broken by VM_PFNMAP, and as not.
BROKEN = {
    "O_DIRECT", "io_uring fixed buffers", "vhost-net zero-copy", "RDMA ibv_reg_mr()", "AF_XDP umem",
    "process_vm_readv()", "ptrace() peeks", "iommufd", "KVM_TDX_INIT_MEM_REGION", "VFIO type1", "vmsplice()",
}  # fmt: skip
SOUND = {"vhost, virtio by copying", "kvm_{read,write}_guest()"}


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.name)
def test_consumer(consumer: object) -> None:
    assert consumer in CONSUMERS
    chosen = next(one for one in CONSUMERS if one is consumer)
    found = tuple(try_consumer(chosen, design) for design in DESIGNS)
    assert found == EXPECTED[chosen.access]


def test_what_breaks_is_what_the_reference_names() -> None:
    rows = try_all()
    assert [consumer for consumer, _ in rows] == list(CONSUMERS)
    breaks = {c.name for c, outcomes in rows if outcomes["restructure"].status == 0 > outcomes["pfnmap"].status}
    works = {c.name for c, outcomes in rows if outcomes["pfnmap"].status == 0}
    assert breaks >= BROKEN
    assert works >= SOUND
    assert not breaks & works
    assert {c.access for c in CONSUMERS} == set(Access)


@pytest.mark.parametrize("access", list(Access))
@pytest.mark.parametrize("design", DESIGNS)
def test_a_private_page_gives_nobody_anything(design: str, access: Access) -> None:
    scene = Scene(design)  # type: ignore[arg-type]
    assert scene.convert().status == 0
    status, _ = use(scene, access)
    assert status < 0
    assert scene.references() == 0
    assert scene.frame() is None
    assert scene.machine.check() == 0


def test_vfio_takes_a_reserved_frame_and_holds_nothing() -> None:
    """follow_fault_pfn() as for MMIO: the entry survives a conversion without any record of it."""
    scene = Scene("pfnmap")
    assert scene.process.touch(scene.address).status == W.VM_FAULT_NOPAGE
    pfn = scene.frame()
    assert pfn is not None
    assert use(scene, Access.VFIO)[0] == -W.EFAULT
    folio = scene.machine.folio(pfn)
    reserved = next(bits.mask for bits in folio.layout.flags if bits.name == "reserved")
    where = folio.physical(pfn - folio.pfn)
    assert where is not None
    scene.machine.arrays.ram[where // 8] |= np.uint64(reserved)
    assert use(scene, Access.VFIO)[0] == 0
    assert scene.convert().status == 0


def test_the_switch_of_kvm_s_module_lets_a_map_of_pfnmap_hold_nothing() -> None:
    consumer = next(one for one in CONSUMERS if one.access is Access.KVM_PIN)
    assert try_consumer(consumer, "pfnmap", allow_unsafe_mappings=True) == COPIED
    assert try_consumer(consumer, "restructure", allow_unsafe_mappings=True) == EXPECTED[Access.KVM_PIN][0]


def test_a_1g_page_too() -> None:
    for design, expected in zip(DESIGNS, EXPECTED[Access.LONGTERM], strict=True):
        consumer = next(one for one in CONSUMERS if one.access is Access.LONGTERM)
        assert try_consumer(consumer, design, page_size=W.PAGE_1G) == expected


def test_document_names_statuses() -> None:
    consumer = next(one for one in CONSUMERS if one.name == "iommufd")
    (row,) = document(try_all([consumer]))
    assert row["restructure"] == {
        "status": "ok", "references": 1024, "convert": "-EAGAIN", "offset": AT, "convert_again": "ok",
    }  # fmt: skip
    assert row["pfnmap"] == {
        "status": "-EFAULT", "references": 0, "convert": "ok", "offset": None, "convert_again": "ok",
    }  # fmt: skip
    assert row["source"].endswith("pfn_reader_user_pin()")
