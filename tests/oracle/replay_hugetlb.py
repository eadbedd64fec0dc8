"""Runs a capture's whole history of HugeTLB memory on one machine and compares struct pages and the vmemmap.

Which page a pool hands out depends on every page it got back before: so one machine runs, one after the other, every
scenario that maps HugeTLB pages or changes the pools, each in a process of its own, guests included. At every
checkpoint the HugeTLB entries of the process must be those captured, frame numbers included.

At every checkpoint marked `full` is compared:

- the vmemmap from 4 GiB of memory on (below lies RAM that is in no HugeTLB zone, 2M leaves throughout): which entry
  is there, its level, every bit outside the frame number, the tables above; which entries have the same frame (one of
  the kernel's frames is one of ours and the other way round); and from one such checkpoint to the next, which entries
  kept their frame;
- HugeTLB pages: first frame, size, how often each is mapped; how many heads /proc/kpageflags shows, 6.18's false ones
  included;
- struct pages: the 512 words of a page of the vmemmap, of the head and of the first other tails;
- counts of the pools; /proc/meminfo and /proc/vmstat, as changes since the `full` checkpoint before.

What the kernel alone can choose is fed in: the order of the first free list where the boot had two threads fill it
(6.12), and which blocks the page allocator gave to a growing pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle.capture import FRAME, Capture, Checkpoint, Operation, StructPages
from oracle.operations import OPTIMIZE, MismatchError, every
from oracle.process_tables import captured_entries, entries_here
from oracle.replay import Done, Replay
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

Array = np.ndarray[Any, Any]

VMEMMAP = 0xFFFF_EA00_0000_0000
ZONE, END = 0x10_0000, 0x1C_0000  # frames of HugeTLB memory and what lies between: 4 to 7 GiB
FIRST_HUGE = 0x18_0000  # where 2M pages may begin, behind two of 1G
PAGES = END - ZONE >> 6  # pages of the vmemmap
STRUCT_WORDS = 8
LARGE, PRESENT = 1 << 7, 1
KERNEL_IMAGE = 0xFFFF_FFFF_8000_0000
NEVER = 1 << 63  # a frame that nothing has
SIZES = {"2M": W.PAGE_2M, "1G": W.PAGE_1G}
FILES = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")
MEMINFO = ("HugePages_Total", "HugePages_Free", "HugePages_Rsvd", "HugePages_Surp", "Hugetlb", "PageTables",
           "SecPageTables")  # fmt: skip
VMSTAT = ("nr_memmap_pages", "nr_memmap_boot_pages", "nr_hugetlb", "nr_page_table_pages", "nr_sec_page_table_pages")


# --------------------------------------------------------------------------- the machine


def frames_of(checkpoint: Checkpoint, page_size: int = W.PAGE_2M) -> list[int]:
    """First frames of the HugeTLB pages of a size, ascending."""
    return sorted(page.pfn for page in checkpoint.huge_pages if page.pages << 12 == page_size)


def huge_frames(checkpoint: Checkpoint) -> list[int]:
    """First frames of the 2M pages that the process maps, by address."""
    return [(entry & FRAME) >> 12 for run in checkpoint.leaves if run.level == 2 for _, entry in run.entries()]


def boot(capture: Capture) -> Machine:
    """The captured machine when it has just booted."""
    first = next(checkpoint for checkpoint in capture.checkpoints if checkpoint.full)
    huge = frames_of(first)
    reserved = huge[0] - FIRST_HUGE
    machine = Machine(
        Config(
            pool=len(huge) * W.PAGE_2M,
            page_size=W.PAGE_2M,
            other_pool=len(frames_of(first, W.PAGE_1G)) * W.PAGE_1G,
            reserved=reserved << 12,
            buddy=(END - FIRST_HUGE - reserved - len(huge) * 512) << 12,
            kernel=capture.kernel,
            configuration="small" if "small" in capture.name else "debian",
            pti=capture.pti,
        )
    )
    pool = machine.hugetlb(W.PAGE_2M)
    strays = sorted(set(huge) - set(pool.free_list()))
    for pfn in sorted(set(pool.free_list()) - set(huge)):
        expect(f"dissolve {pfn:#x}", machine.dissolve(pfn).status, 0)
    grow(machine, strays)
    return machine


def grow(machine: Machine, pfns: list[int]) -> None:
    """Let the 2M pool grow by the blocks at `pfns`, which will be handed out in that order.

    The page allocator gives its lowest block first: the pool takes all, and gives back those not wanted.
    """
    if not pfns:
        return
    optimize, machine.optimize_vmemmap = machine.optimize_vmemmap, False
    pool = machine.hugetlb(W.PAGE_2M)
    before = set(pool.free_list())
    pool.resize(1 << 20)
    new = set(pool.free_list()) - before
    if not set(pfns) <= new:
        raise MismatchError(f"blocks {sorted(set(pfns) - new)} are not the page allocator's")
    for pfn in new - set(pfns):
        expect(f"dissolve {pfn:#x}", machine.dissolve(pfn).status, 0)
    machine.optimize_vmemmap = optimize
    order_free_list(machine, pfns)
    if optimize:
        expect("optimize", tuple(pool.optimize(pfns)), (0, len(pfns)))


def order_free_list(machine: Machine, pfns: list[int]) -> None:
    """Put the pages at the front of the free list into the order `pfns`: take them all, free the last one first."""
    pool = machine.hugetlb(W.PAGE_2M)
    taken = {pool.allocate().detail for _ in pfns}
    expect("pages at the front of the free list", taken, set(pfns))
    for pfn in reversed(pfns):
        expect(f"free {pfn:#x}", machine.free_folio(pfn).status, 0)


def expect(what: str, here: object, captured: object) -> None:
    """MismatchError unless both are equal."""
    if here != captured:
        raise MismatchError(f"{what}: {here}, captured {captured}")


# --------------------------------------------------------------------------- scenarios


def uses_huge_pages(checkpoints: list[Checkpoint]) -> bool:
    """Whether a scenario maps HugeTLB memory."""
    return any(
        operation.name == "map"
        and operation.words[4].lstrip("s").split(":")[0] in ("huge2m", "huge1g", "hfile", "phfile")
        for checkpoint in checkpoints
        for operation in checkpoint.ops
    )


def uses_pools(checkpoints: list[Checkpoint]) -> bool:
    """Whether a scenario maps HugeTLB memory or changes the pools."""
    changes = any(operation.name == "pool" or operation.words[1:2] == [OPTIMIZE] for operation in every(checkpoints))
    return changes or uses_huge_pages(checkpoints)


class Scenario(Replay):
    """A scenario in a process of its own."""

    def __init__(self, history: History, checkpoints: list[Checkpoint]) -> None:
        super().__init__(history.capture, checkpoints, history.machine)
        self.history = history

    def op_pool(self, operation: Operation, size: str, count: str, attribute: str = "nr_hugepages") -> int:
        pool = self.machine.hugetlb(SIZES[size])
        if attribute == "demote":
            return pool.demote(int(count)).status
        blocks = self.history.new_blocks(self.at) if size == "2M" else []
        if blocks:
            grow(self.machine, blocks)
        return pool.resize(int(count)).detail

    def operate(self, checkpoint: Checkpoint, operation: Operation) -> None:
        self.at = checkpoint
        super().operate(checkpoint, operation)

    def run(self) -> Done:
        """Run to the end, compare at every checkpoint."""
        done = super().run()
        self.end()
        return done

    def compare(self, checkpoint: Checkpoint) -> None:
        self.compare_huge_leaves(checkpoint)
        if checkpoint.full:
            self.history.compare(checkpoint)
        self.compare_rules(checkpoint)

    def compare_huge_leaves(self, checkpoint: Checkpoint) -> None:
        """Entries of HugeTLB pages, frame numbers included."""
        there, _ = captured_entries(checkpoint, self.ranges)
        here, _ = entries_here(self.process, self.ranges)
        large, ours = (
            {
                key: entry
                for key, entry in entries.items()
                if key[1] > 1 and ZONE <= (entry & FRAME) >> 12 < END and self.is_hugetlb(key[0])
            }
            for entries in (there, here)
        )
        expect(f"{self.where(checkpoint)}: HugeTLB entries", shown(ours), shown(large))
        self.history.totals["HugeTLB entries of processes"] += len(large)

    def where(self, checkpoint: Checkpoint) -> str:
        return f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}"

    def end(self) -> None:
        """The process exits: its memory goes before its files do."""
        self.process.exit()
        for guest in self.guests.vms.values():
            guest.vm.close()
        for file in self.files.values():
            file.close()


def shown(entries: dict[tuple[int, int], int]) -> dict[str, str]:
    return {f"{va:#x} level {level}": f"{entry:#x}" for (va, level), entry in sorted(entries.items())}


# --------------------------------------------------------------------------- the vmemmap


@dataclass(frozen=True)
class Vmemmap:
    """The entries of the zone's vmemmap, one element for each of its 4K pages, and the tables above.

    level: int64[n], 0 where nothing is mapped. flags, frame: uint64[n]; of a 2M leaf the frame of the 4K piece.
    tables: (address, level): entry.
    """

    level: Array
    flags: Array
    frame: Array
    tables: dict[tuple[int, int], int]


def captured_vmemmap(checkpoint: Checkpoint) -> Vmemmap:
    level, flags, frame = np.zeros(PAGES, np.int64), np.zeros(PAGES, np.uint64), np.full(PAGES, NEVER, np.uint64)
    start = VMEMMAP + (ZONE << 6)
    for run in checkpoint.vmemmap_leaves:
        size = 1 << 9 * (run.level - 1)
        for va, entry in run.entries():
            at = va - start >> 12
            if 0 <= at < PAGES:
                level[at : at + size] = run.level
                flags[at : at + size] = entry & ~FRAME
                frame[at : at + size] = np.arange(size, dtype=np.uint64) + np.uint64((entry & FRAME) >> 12)
    tables = {
        (table.va, table.level): table.entry
        for table in checkpoint.vmemmap_tables
        if table.va == VMEMMAP or start <= table.va < start + (PAGES << 12)
    }
    return Vmemmap(level, flags, frame, tables)


def vmemmap_here(machine: Machine) -> Vmemmap:
    """The same, read from the kernel's page table."""
    ram = machine.arrays.ram
    level, flags, frame = np.zeros(PAGES, np.int64), np.zeros(PAGES, np.uint64), np.full(PAGES, NEVER, np.uint64)
    tables = {}
    start = VMEMMAP + (ZONE << 6)

    def store(at: int, at_level: int, entries: Array) -> None:
        size = 1 << 9 * (at_level - 1)
        present = np.repeat(entries & np.uint64(PRESENT) != 0, size)
        pieces = (entries & np.uint64(FRAME)) >> np.uint64(12)
        if (pieces % np.uint64(size))[entries & np.uint64(PRESENT) != 0].any():
            raise MismatchError(f"{start + (at << 12):#x}: a leaf's address is no multiple of its size")
        level[at : at + present.size][present] = at_level
        flags[at : at + present.size][present] = np.repeat(entries & np.uint64(~FRAME & (1 << 64) - 1), size)[present]
        every = (pieces[:, None] + np.arange(size, dtype=np.uint64)).reshape(-1)
        frame[at : at + present.size][present] = every[present]

    top = machine.register(W.R_KERNEL_ROOT) >> 3
    entry = int(ram[top + (start >> 39 & 511)])
    tables[VMEMMAP, 4] = entry
    entry = int(ram[(entry & FRAME) // 8 + (start >> 30 & 511)])
    tables[VMEMMAP, 3] = entry
    directory = (entry & FRAME) // 8
    for at in range(0, PAGES, 512):
        address = start + (at << 12)
        entry = int(ram[directory + (address >> 21 & 511)])
        if entry & PRESENT and not entry & LARGE:
            tables[address, 2] = entry
            table = (entry & FRAME) // 8
            store(at, 1, ram[table : table + 512])
        elif entry & PRESENT:
            store(at, 2, np.array([entry], np.uint64))
    return Vmemmap(level, flags, frame, tables)


def same_partners(where: str, there: Array, here: Array) -> None:
    """MismatchError unless equal frames there are equal frames here, and the other way round."""
    pairs = np.unique(np.stack([there, here]), axis=1)
    for side, name in ((pairs[0], "there"), (pairs[1], "here")):
        values, counts = np.unique(side, return_counts=True)
        if (counts > 1).any():
            frame = values[counts > 1][0]
            raise MismatchError(f"{where}: frame {int(frame):#x} {name} is several frames on the other side")


# --------------------------------------------------------------------------- struct pages


@dataclass(frozen=True)
class Unknown:
    """A word whose value is the address of a kernel object, which nobody outside can know.

    `lasting`: the object lives as long as the machine, and its address stands for it throughout the capture; else for
    one checkpoint.
    """

    name: str
    lasting: bool


LIST_HEAD = Unknown("list head in struct hstate", True)
ADDRESS_SPACE = Unknown("struct address_space", False)
CGROUP = Unknown("struct hugetlb_cgroup", True)


def unknown_word(kernel: str, page: int, word: int, captured: int) -> Unknown | None:
    """What of a HugeTLB page's struct pages is the address of a kernel object: `page` 0 is the head.

    The links of a page that is first or last in its list are the list's head, which lies in the kernel's image; all
    other links are addresses of struct pages, and known.
    """
    if captured == 0:
        return None
    if page == 0 and word in (1, 2) and captured >= KERNEL_IMAGE:
        return LIST_HEAD
    if (page, word) == (0, 3):
        return ADDRESS_SPACE
    if (page, word) == ((2, 3) if kernel == "6.12" else (3, 3)) and captured >> 48 == 0xFFFF:
        return CGROUP
    return None


@dataclass
class Objects:
    """Which kernel object there is which one here, by kind."""

    lasting: dict[tuple[str, int], int] = field(default_factory=dict)
    passing: dict[tuple[str, int], int] = field(default_factory=dict)

    def match(self, where: str, what: Unknown, there: int, here: int) -> None:
        """MismatchError unless the object was, and is, the same on both sides. Low bits are flags and known."""
        known = self.lasting if what.lasting else self.passing
        others = {name: theirs for (name, theirs), ours in known.items() if ours == here}
        if here == 0 or there & 3 != here & 3 or known.setdefault((what.name, there), here) != here:
            raise MismatchError(f"{where}: {what.name} {there:#x} is {here:#x}")
        if others.get(what.name, there) != there:
            raise MismatchError(f"{where}: {what.name} {here:#x} is both {there:#x} and {others[what.name]:#x}")


# --------------------------------------------------------------------------- the history


@dataclass
class Last:
    """What the checkpoint marked `full` before showed."""

    there: Vmemmap
    here: Vmemmap
    counters_there: dict[str, int]
    counters_here: dict[str, int]
    scenario: str


class History:
    """All scenarios with HugeTLB memory of a capture on one machine."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.machine = boot(capture)
        self.full = [checkpoint for checkpoint in capture.checkpoints if checkpoint.full]
        self.objects = Objects()
        self.last: Last | None = None
        self.totals: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.feed_first_list()

    def run(self) -> int:
        """Run everything: how many `full` checkpoints were equal. MismatchError at the first difference."""
        for checkpoints in self.capture.scenarios().values():
            if uses_pools(checkpoints):
                Scenario(self, checkpoints).run()
        return self.totals["checkpoints"]

    # ------------------------------------------------------------------ what is fed in

    def feed_first_list(self) -> None:
        """The first free list, where it is not ascending."""
        pool = self.machine.hugetlb(W.PAGE_2M)
        order = first_order(self.full[0])
        if order != pool.free_list():
            order_free_list(self.machine, order)

    def new_blocks(self, checkpoint: Checkpoint) -> list[int]:
        """Blocks that the pool got at a checkpoint, in the order in which it will part with them.

        How they stand in the free list shows later: in what the pool gives back first, and what a process takes.
        """
        i = self.full.index(checkpoint)
        new = set(frames_of(checkpoint)) - set(frames_of(self.full[i - 1]))
        order: list[int] = []
        for before, after in zip(self.full[i:], self.full[i + 1 :], strict=False):
            gone = set(frames_of(before)) - set(frames_of(after))
            mapped = huge_frames(after)
            order += [pfn for pfn in [*sorted(gone), *mapped] if pfn in new and pfn not in order]
        return order + sorted(new - set(order))

    # ------------------------------------------------------------------ comparing

    def compare(self, checkpoint: Checkpoint) -> None:
        """Everything, once the machine has come to a `full` checkpoint: MismatchError at the first difference."""
        there, here = self.compare_memory(checkpoint)
        self.compare_counters(f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}", checkpoint, there, here)
        self.totals["checkpoints"] += 1

    def compare_memory(self, checkpoint: Checkpoint) -> tuple[Vmemmap, Vmemmap]:
        """All but what is compared as a change since the checkpoint before: the vmemmap there and here."""
        where = f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}"
        there, here = captured_vmemmap(checkpoint), vmemmap_here(self.machine)
        self.compare_vmemmap(where, there, here)
        self.compare_huge_pages(where, checkpoint, here)
        self.objects.passing.clear()
        for pages in checkpoint.struct_pages:
            self.compare_struct_pages(where, pages, here)
        self.compare_pools(where, checkpoint)
        return there, here

    def compare_vmemmap(self, where: str, there: Vmemmap, here: Vmemmap) -> None:
        wrong = np.flatnonzero((there.level != here.level) | (there.flags != here.flags))
        if wrong.size:
            lines = [
                f"{VMEMMAP + (ZONE << 6) + (int(i) << 12):#x}: level {here.level[i]} {int(here.flags[i]):#x}, captured "
                f"level {there.level[i]} {int(there.flags[i]):#x}"
                for i in wrong[:4]
            ]
            raise MismatchError(f"{where}: {wrong.size} entries of the vmemmap differ: " + "; ".join(lines))
        expect(
            f"{where}: tables of the vmemmap",
            {f"{va:#x} {level}": f"{entry & ~FRAME:#x}" for (va, level), entry in sorted(here.tables.items())},
            {f"{va:#x} {level}": f"{entry & ~FRAME:#x}" for (va, level), entry in sorted(there.tables.items())},
        )
        frames = [
            np.concatenate(
                [side.frame, np.array([(side.tables[key] & FRAME) >> 12 for key in sorted(side.tables)], np.uint64)]
            )
            for side in (there, here)
        ]
        same_partners(where, *frames)
        entries = int((there.level == 1).sum() + (there.level == 2).sum() // 512)
        self.totals["entries of the vmemmap"] += entries + len(there.tables)
        if self.last is not None:
            kept = there.frame == self.last.there.frame
            ours = here.frame == self.last.here.frame
            if (wrong := np.flatnonzero(kept != ours)).size:
                at = VMEMMAP + (ZONE << 6) + (int(wrong[0]) << 12)
                raise MismatchError(
                    f"{where}: {at:#x} and {wrong.size - 1} more: frame {'kept' if kept[wrong[0]] else 'changed'} there"
                )

    def words(self, vmemmap: Vmemmap, pfns: Array, words: Sequence[int] = range(8)) -> Array:
        """uint64[n, 8]: struct pages of frames, or these words of them, through the entries of the vmemmap."""
        index = pfns - ZONE
        at = (vmemmap.frame[index >> 6] << np.uint64(9)) + (index.astype(np.uint64) & np.uint64(63)) * np.uint64(8)
        return self.machine.arrays.ram[at[:, None] + np.array(words, np.uint64)]

    def compare_huge_pages(self, where: str, checkpoint: Checkpoint, here: Vmemmap) -> None:
        """Every head in the zone, its order and its map count, read from struct pages alone."""
        pfns = np.arange(ZONE, END, 512)
        heads = self.words(here, pfns)
        second = self.words(here, pfns + 1)
        is_head = (heads[:, 0] & np.uint64(1 << 6) != 0) & (heads[:, 1] & np.uint64(1) == 0)
        is_head &= (heads[:, 6] & np.uint64(0xFF00_0000)) == 0xF400_0000
        found, end = [], 0
        for i in np.flatnonzero(is_head).tolist():
            order = int(second[i, 0]) & 0xFF
            if pfns[i] >= end:
                end = int(pfns[i]) + (1 << order)
                found.append((int(pfns[i]), 1 << order, int(second[i, 2]) + 1 & 0xFFFF_FFFF))
        expect(f"{where}: HugeTLB pages", found, [tuple(page) for page in checkpoint.huge_pages])
        self.totals["HugeTLB pages"] += len(found)
        if "heads_in_kpageflags" in checkpoint.raw:
            every = self.words(here, np.arange(ZONE, END), (0, 6))
            marked = (every[:, 0] & np.uint64(1 << 6) != 0) & (every[:, 1] & np.uint64(0xFF00_0000) == 0xF400_0000)
            # 6.18's kpageflags takes a page of tails that is mapped to the head's for one more head.
            count = int(marked.sum()) if self.capture.kernel == "6.18" else len(found)
            expect(f"{where}: heads in kpageflags", count, checkpoint.raw["heads_in_kpageflags"])
            self.totals["heads in kpageflags"] += count

    def compare_struct_pages(self, where: str, pages: StructPages, here: Vmemmap) -> None:
        pfns = np.arange(pages.pfn, pages.pfn + 128)
        ours = self.words(here, pfns).reshape(2, -1)
        for name, mine, theirs in (("head", ours[0], pages.head), ("tail", ours[1], pages.tail)):
            for i, captured in enumerate(theirs):
                page, word = divmod(i, STRUCT_WORDS)
                at = f"{where}: page {pages.pfn:#x}, {name} page, struct page {page} word {word}"
                # Where tails are mapped to the folio's own first page, they show that page's words.
                shows_head = name == "head" or pages.vmemmap_pages[1] == pages.vmemmap_pages[0]
                what = unknown_word(self.capture.kernel, page, word, captured) if shows_head else None
                if what is not None:
                    self.objects.match(at, what, captured, int(mine[i]))
                    self.unknown[what.name] += 1
                elif int(mine[i]) != captured:
                    raise MismatchError(f"{at}: {int(mine[i]):#x}, captured {captured:#x}")
            self.totals["words of struct pages"] += len(theirs)

    def compare_pools(self, where: str, checkpoint: Checkpoint) -> None:
        here = {size: {name: getattr(self.machine.hugetlb(size), name) for name in FILES} for size in checkpoint.pools}
        expect(f"{where}: /sys/kernel/mm/hugepages", here, checkpoint.pools)

    def compare_counters(self, where: str, checkpoint: Checkpoint, there: Vmemmap, here: Vmemmap) -> None:
        """Changes of the counters since the `full` checkpoint before, of the same scenario."""
        captured = counters(checkpoint.raw["meminfo"], MEMINFO) | counters(checkpoint.raw["vmstat"], VMSTAT)
        ours = counters(self.machine.meminfo(), MEMINFO) | counters(self.machine.vmstat(), VMSTAT)
        if self.last is not None and self.last.scenario == checkpoint.scenario and self.counters_are_sound(checkpoint):
            names = captured.keys() & ours.keys() - self.late(checkpoint)
            expect(
                f"{where}: counters",
                {name: ours[name] - self.last.counters_here[name] for name in sorted(names)},
                {name: captured[name] - self.last.counters_there[name] for name in sorted(names)},
            )
            self.totals["changes of counters"] += len(names)
        self.last = Last(there, here, captured, ours, checkpoint.scenario)

    def late(self, checkpoint: Checkpoint) -> set[str]:
        """Counts of page tables after a munmap() that nothing followed: since 6.14 tables are freed, and uncounted, a
        grace period later (CONFIG_PT_RECLAIM)."""
        last = checkpoint.ops[-1].name if checkpoint.ops else ""
        return {"PageTables", "nr_page_table_pages"} if last == "unmap" and self.capture.kernel != "6.12" else set()

    def counters_are_sound(self, checkpoint: Checkpoint) -> bool:
        """Not on Debian's 7.3.4 once it has freed a 1G page of boot ("Bad page state", README of the captures)."""
        if self.capture.kernel != "7.3" or "debian" not in self.capture.name:
            return True
        return len(frames_of(checkpoint, W.PAGE_1G)) == len(frames_of(self.full[0], W.PAGE_1G))


def counters(values: dict[str, int], names: Iterable[str]) -> dict[str, int]:
    return {name: values[name] for name in names if name in values}


def first_order(checkpoint: Checkpoint) -> list[int]:
    """The order of the 2M pages in their free list after boot, as the first `full` checkpoint tells it.

    Each thread that filled the pool (6.12 has two, which took turns) put its pages there at once, ascending; which
    thread optimised a page shows in where the page for its first struct pages came from. The pages of the thread that
    was last are taken first, and the pages taken so far show in which order.
    """
    vmemmap = captured_vmemmap(checkpoint)
    taken = huge_frames(checkpoint)

    def thread(pfn: int) -> int:
        return int(vmemmap.frame[pfn - ZONE >> 6]) >> 15  # pages that lie within 128 MiB

    def place(pfn: int) -> tuple[bool, int, int]:
        return thread(pfn) != thread(taken[0]), taken.index(pfn) if pfn in taken else len(taken), pfn

    return sorted(frames_of(checkpoint), key=place)
