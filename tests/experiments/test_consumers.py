"""Who uses a process's memory: what the machine gives each, against what reference and kernel sources say."""

from __future__ import annotations

import pytest

from pgemu.experiments.consumers import CONSUMERS, Access, Outcome, Scene, document, try_all, try_consumer, use
from pgemu.machine.designs import DESIGNS, Design
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

AT = 5 * W.PAGE_4K
COPIED = Outcome(0, 0, 0, None, 0)
REFUSED = Outcome(-W.EFAULT, 0, 0, None, 0)

# How it gets at memory: with restructure, with pfnmap.
EXPECTED = {
    Access.COPY: (COPIED, COPIED),
    Access.PIN: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),
    Access.LONGTERM: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),
    Access.REFERENCE: (Outcome(0, 1, -W.EAGAIN, AT, 0), REFUSED),
    Access.PEEK: (Outcome(0, 1, -W.EAGAIN, AT, 0), Outcome(-W.EIO, 0, 0, None, 0)),
    Access.KVM: (COPIED, COPIED),  # by the entry; nothing is held
    Access.KVM_CACHE: (COPIED, COPIED),  # the same, by a cache
    Access.KVM_PIN: (Outcome(0, 1024, -W.EAGAIN, AT, 0), Outcome(-W.EINVAL, 0, 0, None, 0)),
    Access.VFIO: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),  # HugeTLB memory is neither invalid nor reserved
    Access.IOMMUFD: (Outcome(0, 1024, -W.EAGAIN, AT, 0), REFUSED),
    Access.MAP_FILE: (Outcome(-W.EINVAL, 0, 0, None, 0),) * 2,
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


def test_vfio_takes_a_device_s_memory_and_holds_nothing() -> None:
    """follow_fault_pfn() of a BAR: what is mapped beside RAM that is refused keeps no conversion waiting."""
    scene = Scene("pfnmap")
    assert use(scene, Access.VFIO)[0] == -W.EFAULT
    scene.address = 0x7E00_0000_0000
    scene.process.mmap_device(scene.machine.create_device(1 << 30, 512), scene.address, W.PAGE_2M, 3)
    status, let_go = use(scene, Access.VFIO)
    assert status == 0
    assert scene.machine.statistics.gauge(Gauge.PAGES_PINNED) == 0
    assert scene.convert().status == 0
    let_go()
    assert scene.machine.check() == 0


@pytest.mark.parametrize("access", [Access.VFIO, Access.IOMMUFD, Access.MAP_FILE])
@pytest.mark.parametrize("design", DESIGNS)
def test_devices_are_gone_when_a_consumer_has_let_go(design: Design, access: Access) -> None:
    scene = Scene(design)
    for _ in range(2 * W.DOMAINS):  # more than there may be at once
        status, let_go = use(scene, access)
        assert scene.references() == (1024 if status == 0 else 0)
        let_go()
        assert scene.references() == 0
    assert scene.machine.check() == 0


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
