"""Struct pages of transparent huge pages and what the kernel counts of them, as captured and as they are here.

/proc/kpageflags and /proc/kpagecount tell of a captured page what its struct page holds (fs/proc/page.c); the same is
read off the words here. Not compared: bits of LRU lists and of idle tracking, which pgemu does not keep.
"""

from __future__ import annotations

from oracle.capture import Checkpoint, PagemapRun
from oracle.operations import PAGE, MismatchError, Span
from oracle.process_tables import frame, size_of
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Machine
from pgemu_kernels import words as W

# Bits of kpageflags: include/uapi/linux/kernel-page-flags.h, include/linux/kernel-page-flags.h
KPF_UPTODATE, KPF_DIRTY, KPF_MMAP, KPF_ANON = 1 << 3, 1 << 4, 1 << 11, 1 << 12
KPF_SWAPBACKED, KPF_HEAD, KPF_TAIL, KPF_THP, KPF_ZERO_PAGE = 1 << 14, 1 << 15, 1 << 16, 1 << 22, 1 << 24
COMPARED = KPF_UPTODATE | KPF_DIRTY | KPF_MMAP | KPF_ANON | KPF_SWAPBACKED | KPF_HEAD | KPF_TAIL | KPF_THP
COMPARED |= KPF_ZERO_PAGE
# Bits of a struct page's flags of the kernels that are replayed: include/linux/page-flags.h
PG_UPTODATE, PG_DIRTY, PG_HEAD, PG_SWAPBACKED = 1 << 3, 1 << 4, 1 << 6, 1 << 17
COUNTERS = (
    "thp_fault_alloc", "thp_fault_fallback", "thp_collapse_alloc", "thp_split_pmd", "thp_deferred_split_page",
    "nr_anon_transparent_hugepages",
)  # fmt: skip
LOW = (1 << 32) - 1


def entire_mapcount(machine: Machine, head: int) -> int:
    """2M leaves that map the folio at `head`, off its second struct page."""
    words = machine.struct_page(head + 1)
    word = int(words[2]) >> 32 if machine.config.kernel == "6.12" else int(words[3])
    return (word + 1) & LOW


def page_here(machine: Machine, pfn: int) -> tuple[int, int]:
    """(kpageflags as far as compared, kpagecount) of a page of a transparent huge page."""
    head = pfn & ~511
    words, own = machine.struct_page(head), machine.struct_page(pfn)
    flags = int(words[0])
    found = KPF_THP | (KPF_HEAD if pfn == head else KPF_TAIL)
    for ours, theirs in ((PG_UPTODATE, KPF_UPTODATE), (PG_DIRTY, KPF_DIRTY), (PG_SWAPBACKED, KPF_SWAPBACKED)):
        found |= theirs if flags & ours else 0
    entire = entire_mapcount(machine, head)
    large = (int(machine.struct_page(head + 1)[2]) + 1) & LOW
    found |= KPF_MMAP if large else 0
    found |= KPF_ANON if int(words[3]) & 1 else 0
    if head == machine.register(W.R_HUGE_ZERO_FRAME):
        found |= KPF_ZERO_PAGE
    return found, ((int(own[6]) + 1) & LOW) + entire


def compare_pages(
    where: str, machine: Machine, process: AddressSpace, checkpoint: Checkpoint, ranges: list[Span]
) -> int:
    """MismatchError unless flags and mapcounts of all transparent huge pages are as captured: how many pages are."""
    count = 0
    for run in checkpoint.pagemap:
        if run.kpageflags & KPF_THP and any(start <= run.va < end for start, end in ranges):
            compare_run(where, machine, process, run)
            count += run.pages
    return count


def compare_run(where: str, machine: Machine, process: AddressSpace, run: PagemapRun) -> None:
    """The first and the last page of a run of like ones."""
    for va in {run.va, run.va + (run.pages - 1) * PAGE}:
        level, _, entry = process.walk(va)[-1]
        flags, count = page_here(machine, frame(entry, level) + ((va & size_of(level) - 1) >> 12))
        if flags != run.kpageflags & COMPARED or count != run.kpagecount:
            raise MismatchError(
                f"{where}: {va:#x}: kpageflags {flags:#x}, kpagecount {count}, captured "
                f"{run.kpageflags & COMPARED:#x}, {run.kpagecount}"
            )


class Counted:
    """What /proc/vmstat counted of transparent huge pages since a scenario's first checkpoint."""

    def __init__(self) -> None:
        self.before: tuple[dict[str, int], dict[str, int]] | None = None

    def compare(self, where: str, machine: Machine, checkpoint: Checkpoint) -> None:
        """MismatchError unless both counted alike since the checkpoint before."""
        there, here = checkpoint.raw.get("vmstat"), machine.vmstat()
        if there is None:
            return
        if self.before is not None:
            for name in COUNTERS:
                captured, ours = there[name] - self.before[0][name], here[name] - self.before[1][name]
                if captured != ours:
                    raise MismatchError(f"{where}: {name} grew by {ours}, captured {captured}")
        self.before = there, here
