"""Words of captured operations, and which operations pgemu has: `missing` goes by the words alone.

What is missing is of one of two kinds. Memory that pgemu does not have (`MEMORY`) is left out with everything that is
done to it, and the rest of the process goes on: checkpoints from there on are replayed in part. Any other operation
that pgemu does not have ends the replay before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from oracle.capture import Checkpoint, Operation

PAGE = 4096
SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
RIGHTS = {"r": 1, "w": 2, "x": 4}
TMPFS = "files of tmpfs"

KINDS = {
    "anon", "huge2m", "huge1g", "shuge2m", "shuge1g", "hfile", "phfile", "devmem", "vfio", "gmem", "shanon", "file",
    "pfile",
}  # fmt: skip
ADVICE = {
    "dontneed", "populate_read", "populate_write", "guard_install", "guard_remove", "hugepage", "nohugepage",
    "dontfork", "dofork", "collapse", "dontneed_locked", "free", "cold", "pageout", "willneed", "remove", "normal",
    "random", "sequential", "mergeable", "unmergeable", "dontdump", "dodump", "wipeonfork", "keeponfork", "hwpoison",
    "soft_offline",
}  # fmt: skip
MODELLED = {
    "trace", "kvmcap", "vmcap", "pool", "vfioopen", "vfiomem", "pcibar", "map", "touch", "unmap", "prot", "adv",
    "remap", "fork", "childwait", "childend", "vm", "vmclose", "slot", "slot2", "gmem", "gpunch", "galloc", "gclose",
    "attr", "gtouch", "prefault", "dirtylog", "poke", "unlink", "write", "pfnof", "peek", "store", "storeif", "mincore",
    "gpfnof", "gpeek", "lock", "unlock", "lockonfault", "msync", "hwpoison", "unpoison", "softoffline", "dmainfo",
    "dmamap", "dmaunmap", "vfioclose",
    "vfiomaster", "edu", "iommufd", "iommufdclose", "ioas", "iodestroy", "ioranges", "iobind", "ioattach", "iodetach",
    "iomap", "iounmap", "iocopy", "iomapfile", "pfnset", "pvm", "direct", "vmsplice", "uring", "futex", "selfmem",
    "ptpeek", "copy", "zerocopy", "xdpumem", "aio", "ptpoke", "vmsplicegift", "splicedrop", "uringclose", "guptest",
    "pinlong", "pinstop", "uffd", "uffdclose", "mbind", "movepages", "migratepages", "udmabuf",
}  # fmt: skip
PARAMETER = "/sys/module/kvm/parameters/gmem_pfnmap"
CLEAR_REFS = "/proc/self/clear_refs"
ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
OPTIMIZE = "/proc/sys/vm/hugetlb_optimize_vmemmap"


class MismatchError(AssertionError):
    """What differs, at which operation or checkpoint."""


class NotModelledError(Exception):
    """An operation that pgemu does not have: its name."""


def number(text: str) -> int:
    """A number of the operation list: "64M", "0x1000+2M"."""
    return sum(int(part[:-1], 0) * SUFFIX[part[-1]] if part[-1] in SUFFIX else int(part, 0) for part in text.split("+"))


def protection(text: str) -> int:
    return 0 if text == "none" else sum(RIGHTS[letter] for letter in text)


def returned(operation: Operation) -> int:
    """The number an operation returned: "0x4" or "-22 (EINVAL)"."""
    return int(operation.result.split()[0], 0)


class Span(NamedTuple):
    """Addresses [start, end)."""

    start: int
    end: int

    def meets(self, other: Span) -> bool:
        return self.start < other.end and other.start < self.end

    def holds(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end


def span_of(operation: Operation) -> Span | None:
    """The process's addresses that an operation is about, or None."""
    words = operation.words
    if operation.name == "touch":
        first = number(words[1])
        return Span(first, first + (int(words[3]) - 1) * number(words[2]) + 1)
    if operation.name in ("map", "unmap", "prot", "adv", "remap", "lock", "unlock", "lockonfault", "mincore", "msync"):
        return Span(number(words[1]), number(words[1]) + max(number(words[2]), 1))
    if operation.name in ("slot", "slot2"):
        return Span(number(words[5]), number(words[5]) + max(number(words[4]), 1))
    if operation.name == "poke":
        return Span(number(words[1]), number(words[1]) + 1)
    return None


def missing(operation: Operation) -> str:
    """The operation that pgemu does not have, by name; "" if it has it. Memory of kinds it does not have is no matter
    of one operation: `left_out`."""
    words = operation.words
    if operation.name not in MODELLED:
        return operation.name
    if operation.name == "map" and (kind := words[4].split(":")[0]) not in KINDS:
        return f"map {kind}"
    if operation.name == "adv" and words[3] not in ADVICE:
        return f"adv {words[3]}"
    if operation.name == "write" and words[1] not in (OPTIMIZE, PARAMETER, CLEAR_REFS, ENTRY_LIMIT):
        return f"write {words[1]}"
    return ""


def every(checkpoints: Iterable[Checkpoint]) -> Iterator[Operation]:
    return (operation for checkpoint in checkpoints for operation in checkpoint.ops)


def left_out(checkpoints: list[Checkpoint]) -> dict[Span, str]:
    """Mappings of memory that pgemu does not have, and what it is."""
    found: dict[Span, str] = {}
    for operation in every(checkpoints):
        if operation.name == "map" and operation.words[4].split(":")[0] in ("file", "pfile"):
            span = span_of(operation)
            assert span is not None
            found[span] = TMPFS
    return found
