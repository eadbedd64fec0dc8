"""Who reads and writes a process's memory from within the kernel, and what each design lets them do.

Every consumer is tried on a small machine of each design: it gets at a shared page through the process's mapping, and
while it holds what it got the page's huge page is converted to private. Results come from the machine: its pins, slots,
containers of VFIO, address spaces of iommufd. What is told of each consumer is how it gets at memory:

- copy: by the process's own entries, as copy_{to,from}_user() does; a fault if there is none.
- pin, long-term pin: pin_user_pages*(), without or with FOLL_LONGTERM, until it is done.
- reference: get_user_pages*(), one reference in place of a pin.
- peek: mm/memory.c:__access_remote_vm(): a reference while it copies, else vm_ops->access, which a guest_memfd has not.
- KVM: a slot over the mapping, virt/kvm/kvm_main.c:hva_to_pfn(): get_user_pages() and, for VM_PFNMAP, the entry itself.
  Nothing is held: KVM's MMU notifier takes the frame away.
- KVM cache: a gfn_to_pfn_cache of a VM whose slot shows the page (Vm.pfn_cache): the same, tried on the object itself.
- KVM pin: kvm_vcpu_map() of that VM (Vm.map_page), which holds a pin and therefore refuses VM_PFNMAP, unless the
  machine is made with allow_unsafe_mappings.
- VFIO type1, iommufd, iommufd file: a device is attached, and the page mapped for it: VFIO_IOMMU_MAP_DMA,
  IOMMU_IOAS_MAP, IOMMU_IOAS_MAP_FILE.
- memfd: memfd_pin_folios() and its callers name a file and an offset, and the file must be one of shmem or hugetlbfs.

>>> outcome = try_consumer(CONSUMERS[0], "pfnmap")
>>> CONSUMERS[0].name, outcome.status
('O_DIRECT', -14)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from pgemu.machine.designs import DESIGNS, Design
from pgemu.machine.results import errno_name
from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.machine.results import Result
    from pgemu.objects.devices import Ioas
    from pgemu.objects.vm import Vm

__all__ = ("CONSUMERS", "Access", "Consumer", "Outcome", "Scene", "document", "try_all", "try_consumer", "use")

_ADDRESS = 0x7F00_0000_0000
_OFFSET = 5 * W.PAGE_4K  # of the page that is used
_IOVA = 1 << 32
_PIN = 0  # number of the consumer's pin


class Access(StrEnum):
    """How a consumer gets at a process's memory."""

    COPY = "copy"
    PIN = "pin"
    LONGTERM = "long-term pin"
    REFERENCE = "reference"
    PEEK = "peek"
    KVM = "KVM"
    KVM_CACHE = "KVM cache"
    KVM_PIN = "KVM pin"
    VFIO = "VFIO type1"
    IOMMUFD = "iommufd"
    MAP_FILE = "iommufd file"
    MEMFD = "memfd"


@dataclass(frozen=True)
class Consumer:
    """Somebody who uses a process's memory. source: the kernel's file and function that gets at it."""

    name: str
    access: Access
    source: str
    write: bool = True
    note: str = ""


CONSUMERS = (
    Consumer("O_DIRECT", Access.PIN, "block/bio.c:bio_iov_iter_get_pages()"),
    Consumer("io_uring fixed buffers", Access.LONGTERM, "io_uring/memmap.c:io_pin_pages()"),
    Consumer(
        "vhost-net zero-copy", Access.REFERENCE, "net/core/datagram.c:zerocopy_sg_from_iter()", write=False,
        note="until the packet has left",
    ),
    Consumer("vhost, virtio by copying", Access.COPY, "drivers/vhost/vhost.c:vhost_copy_from_user()", write=False),
    Consumer("vhost-vdpa", Access.LONGTERM, "drivers/vhost/vdpa.c:vhost_vdpa_pa_map()"),
    Consumer("RDMA ibv_reg_mr()", Access.LONGTERM, "drivers/infiniband/core/umem.c:ib_umem_get()"),
    Consumer("AF_XDP umem", Access.LONGTERM, "net/xdp/xdp_umem.c:xdp_umem_pin_pages()"),
    Consumer("iommufd", Access.IOMMUFD, "drivers/iommu/iommufd/pages.c:pfn_reader_user_pin()"),
    Consumer(
        "iommufd, by the file", Access.MAP_FILE, "drivers/iommu/iommufd/pages.c:iopt_alloc_file_pages()",
        note="a guest_memfd is refused, in either design",
    ),
    Consumer(
        "VFIO type1", Access.VFIO, "drivers/vfio/vfio_iommu_type1.c:vaddr_get_pfns()",
        note="takes PFNs without a struct page, or reserved ones",
    ),
    Consumer("process_vm_readv()", Access.PIN, "mm/process_vm_access.c:process_vm_rw_single_vec()", write=False),
    Consumer(
        "ptrace() peeks", Access.PEEK, "kernel/ptrace.c:generic_ptrace_peekdata()", write=False, note="for the copy"
    ),
    Consumer("/proc/PID/mem", Access.PEEK, "fs/proc/base.c:mem_rw()", note="for the copy"),
    Consumer(
        "vmsplice()", Access.REFERENCE, "fs/splice.c:iter_to_pipe()", write=False, note="while it is in the pipe"
    ),
    Consumer("shared futex", Access.REFERENCE, "kernel/futex/core.c:get_futex_key()", note="for the lookup"),
    Consumer("kvm_{read,write}_guest()", Access.COPY, "virt/kvm/kvm_main.c:__kvm_read_guest_page()"),
    Consumer("KVM slot over the mapping", Access.KVM, "virt/kvm/kvm_main.c:hva_to_pfn()"),
    Consumer("gfn_to_pfn_cache", Access.KVM_CACHE, "virt/kvm/pfncache.c:hva_to_pfn_retry()"),
    Consumer(
        "kvm_vcpu_map()", Access.KVM_PIN, "virt/kvm/kvm_main.c:hva_to_pfn_remapped()",
        note="allow_unsafe_mappings lifts that",
    ),
    Consumer(
        "KVM_TDX_INIT_MEM_REGION", Access.REFERENCE, "arch/x86/kvm/vmx/tdx.c:tdx_gmem_post_populate()", write=False,
        note="source pages of populate, while one is copied",
    ),
    Consumer("SEV region", Access.LONGTERM, "arch/x86/kvm/svm/sev.c:sev_pin_memory()"),
    Consumer(
        "udmabuf", Access.MEMFD, "drivers/dma-buf/udmabuf.c:udmabuf_create()",
        note="a guest_memfd is no memfd, in either design",
    ),
)  # fmt: skip


class Outcome(NamedTuple):
    """What a consumer and the conversion meet.

    status: of the access, 0 or -errno. references: on the page, beyond the page cache's and its mappings, that the
    consumer holds afterwards. convert: status of the conversion to private meanwhile, offset: where it failed (bytes),
    None if it did not. again: status of a second conversion, when the consumer has let go.
    """

    status: int
    references: int
    convert: int
    offset: int | None
    again: int


@dataclass
class Scene:
    """A machine of two huge pages, both in a guest_memfd, all shared and mapped by a process."""

    design: Design
    page_size: int = W.PAGE_2M
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from pgemu.objects.machine import Config, Machine

        size = 2 * self.page_size
        self.machine = Machine(Config(self.design, pool=size, page_size=self.page_size, **self.parameters))
        self.gmem = self.machine.create_guest_memfd(size, shared=True)
        self.process = self.machine.create_process()
        self.address = _ADDRESS + _OFFSET
        if self.process.mmap(self.gmem, _ADDRESS).status != 0:
            raise RuntimeError("mmap() of the guest_memfd failed")

    def vm(self) -> Vm:
        """A VM of the process, whose memory begins with the page's huge page."""
        vm = self.machine.create_vm(self.process, protected=True)
        if vm.bind(self.gmem, 0).status != 0:
            raise RuntimeError("a memory slot over the guest_memfd failed")
        return vm

    def frame(self) -> int | None:
        """The frame that the process's entry names, or None without one."""
        entries = self.process.walk(self.address)
        level, _, entry = entries[-1]
        present, mask = self.machine.host_format.present, self.machine.host_format.address
        return (entry & mask) >> 12 if level == 1 and entry & present else None

    def references(self) -> int:
        """References on the page's folio beyond those of the page cache and of mappings; 0 while there is none."""
        pfn = self.gmem.pfn(_OFFSET)
        if pfn is None:
            return 0
        folio = self.machine.folio(pfn)
        return folio.refcount - folio.expected_references

    def convert(self) -> Result:
        """Convert the page's huge page to private."""
        return self.gmem.convert(0, self.page_size, shared=False)


Held = tuple[int, Callable[[], object]]  # status of an access, and what lets go of what it holds


def _nothing() -> None:
    """Let go of nothing."""


def _copy(scene: Scene, write: bool) -> Held:
    """A load or store by the kernel through the process's entry; -EFAULT where the fault does not help."""
    status = scene.process.touch(scene.address, write=write).status
    failed = status & (W.VM_FAULT_OOM | W.VM_FAULT_SIGBUS | W.VM_FAULT_SIGSEGV)
    return -W.EFAULT if failed else 0, _nothing


def _pin(scene: Scene, write: bool, longterm: bool = False) -> Held:
    result = scene.process.pin(scene.address, W.PAGE_4K, pin=_PIN, write=write, longterm=longterm)
    return result.status, (lambda: scene.machine.unpin(_PIN)) if result.status == 0 else _nothing


def _longterm(scene: Scene, write: bool) -> Held:
    return _pin(scene, write, longterm=True)


def _reference(scene: Scene, write: bool) -> Held:
    """FOLL_GET: the checks and the fault are those of a pin (mm/gup.c has one path), what is kept is one reference."""
    status, unpin = _pin(scene, write)
    if status != 0:
        return status, _nothing
    pfn = scene.gmem.get_reference(_OFFSET).detail
    unpin()
    return 0, lambda: scene.gmem.put_reference(pfn)


def _peek(scene: Scene, write: bool) -> Held:
    """Nothing copied is -EIO."""
    status, let_go = _reference(scene, write)
    return -W.EIO if status else 0, let_go


def _kvm(scene: Scene, write: bool) -> Held:
    """A guest's access through a slot over the mapping."""
    vm = scene.machine.create_vm(scene.process, kind="plain")
    status = vm.set_memory_region(0, 0, scene.page_size, _ADDRESS).status
    if status == 0:
        done = vm.touch(_OFFSET, write=write).status
        status = 0 if done in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS) else min(done, -W.EFAULT)
    return status, vm.close


def _kvm_cache(scene: Scene, _write: bool) -> Held:
    """kvm_gpc_activate(), always for writing; the cache stays until it is deactivated, whatever it holds."""
    cache = scene.vm().pfn_cache(_OFFSET, 64)
    return 0 if cache.check() else cache.refresh().status, cache.deactivate


def _kvm_pin(scene: Scene, write: bool) -> Held:
    """kvm_vcpu_map()"""
    try:
        page = scene.vm().map_page(_OFFSET, write=write)
    except OSError as error:
        return -(error.errno or W.EINVAL), _nothing
    return 0, page.unmap


def _vfio(scene: Scene, write: bool) -> Held:
    container = scene.machine.create_vfio_container()
    container.attach()
    return container.map(_IOVA, W.PAGE_4K, scene.process, scene.address, write=write).status, container.close


def _ioas(scene: Scene) -> tuple[Ioas, Callable[[], object]]:
    ioas = scene.machine.create_iommufd().create_ioas()
    device = ioas.attach()

    def close() -> None:
        device.detach()
        ioas.unmap_all()
        ioas.destroy()

    return ioas, close


def _iommufd(scene: Scene, write: bool) -> Held:
    ioas, close = _ioas(scene)
    return ioas.map(_IOVA, W.PAGE_4K, scene.process, scene.address, write=write).status, close


def _map_file(scene: Scene, write: bool) -> Held:
    ioas, close = _ioas(scene)
    return ioas.map_file(_IOVA, W.PAGE_4K, scene.process, scene.gmem, _OFFSET, write=write).status, close


def _memfd(scene: Scene, _write: bool) -> Held:
    """The file's kind alone decides: drivers/dma-buf/udmabuf.c:check_memfd_seals() asks for shmem or hugetlbfs."""
    row = int(W.STATE_INODES) + scene.gmem.inode * W.I_WORDS
    kind = int(scene.machine.arrays.state[row + int(W.I_KIND)])
    return 0 if kind == int(W.INODE_HUGETLB) else -W.EBADFD, _nothing


_ACCESSES: Mapping[Access, Callable[[Scene, bool], Held]] = {
    Access.COPY: _copy, Access.PIN: _pin, Access.LONGTERM: _longterm, Access.REFERENCE: _reference, Access.KVM: _kvm,
    Access.PEEK: _peek, Access.KVM_CACHE: _kvm_cache, Access.KVM_PIN: _kvm_pin, Access.VFIO: _vfio,
    Access.IOMMUFD: _iommufd, Access.MAP_FILE: _map_file, Access.MEMFD: _memfd,
}  # fmt: skip


def use(scene: Scene, access: Access, *, write: bool = True) -> Held:
    """Get at the scene's page: 0 or -errno, and what lets go of what is held."""
    return _ACCESSES[access](scene, write)


def try_consumer(consumer: Consumer, design: Design, *, page_size: int = W.PAGE_2M, **parameters: Any) -> Outcome:
    """What a consumer gets from a machine of a design, and what the conversion returns while it holds that.

    page_size, parameters: of the machine (Config). ValueError for what Config refuses.
    """
    scene = Scene(design, page_size, parameters)
    status, let_go = use(scene, consumer.access, write=consumer.write)
    references = scene.references()
    result = scene.convert()
    let_go()
    return Outcome(status, references, result.status, result.detail if result.status else None, scene.convert().status)


def try_all(
    consumers: Iterable[Consumer] = CONSUMERS, *, page_size: int = W.PAGE_2M, **parameters: Any
) -> list[tuple[Consumer, dict[Design, Outcome]]]:
    """try_consumer() of all of them on both designs."""
    return [
        (consumer, {design: try_consumer(consumer, design, page_size=page_size, **parameters) for design in DESIGNS})
        for consumer in consumers
    ]


def error(status: int) -> str:
    """Return "ok" or "-EFAULT"."""
    return f"-{errno_name(-status)}" if status < 0 else "ok"


def document(rows: Iterable[tuple[Consumer, Mapping[Design, Outcome]]]) -> list[dict[str, Any]]:
    """What try_all() found, for JSON: statuses by name, offsets in bytes."""
    return [
        {
            "consumer": consumer.name,
            "access": consumer.access.value,
            "source": consumer.source,
            "note": consumer.note or None,
            **{
                design: {
                    "status": error(outcome.status),
                    "references": outcome.references,
                    "convert": error(outcome.convert),
                    "offset": outcome.offset,
                    "convert_again": error(outcome.again),
                }
                for design, outcome in outcomes.items()
            },
        }
        for consumer, outcomes in rows
    ]
