"""KVM over a process's memory, the obvious way: dicts of pages, leaves and tables. Shares nothing with the kernels.

Sizes and addresses are in 4K pages. The process has two regions: anonymous memory, and shared HugeTLB memory of 2M
pages. Levels: 1 = 4K, 2 = 2M, 3 = 1G; tables are named by the level of their entries and the first frame they cover.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

FIXED, SPURIOUS, EMULATE = 5, 6, 2
EFAULT, EINVAL, EEXIST, ENOENT = -14, -22, -17, -2
ANON = 0x7000_0000_0000 >> 12
ANON_PAGES = 1024
HUGE = 0x7100_0000_0000 >> 12
HUGE_PAGES = 1536
LAST_GFN = 1 << 36
USER_END = (1 << 47) - 4096 >> 12

Frame = tuple[object, ...]


def span(level: int) -> int:
    """Pages under one entry."""
    return 512 ** (level - 1)


@dataclass(frozen=True)
class Leaf:
    frame: Frame
    write: bool
    marked: bool  # host-writable and MMU-writable
    accessed: bool
    dirty: bool
    execute: bool


@dataclass
class Slot:
    gfn: int
    pages: int
    hva: int
    read_only: bool = False
    log: bool = False
    gmem: int | None = None  # first page of the guest_memfd
    dirty: set[int] = field(default_factory=set)


class Host:
    """A process's memory: what is mapped, and whether it may be written."""

    def __init__(self) -> None:
        self.anon: dict[int, Frame] = {}
        self.writable_area = [True, True]  # by 2M block of the anonymous region
        self.huge: dict[int, Frame] = {}  # pages of the file
        self.huge_mapped: set[int] = set()
        self.made = 0

    def area_writable(self, page: int) -> bool:
        return self.writable_area[(page - ANON) // 512]

    def fault(self, page: int, write: bool) -> tuple[Frame, int, bool, bool] | None:
        """(frame, level, writable, whether an old frame was replaced), or None for a signal."""
        if ANON <= page < ANON + ANON_PAGES:
            if write and not self.area_writable(page):
                return None
            old = self.anon.get(page)
            if old is None:
                self.anon[page] = self.new("anon") if write else ("zero",)
            elif write and old == ("zero",):
                self.anon[page] = self.new("anon")
            frame = self.anon[page]
            replaced = old is not None and old != frame
            return frame, 1, frame != ("zero",) and self.area_writable(page), replaced
        if HUGE <= page < HUGE + HUGE_PAGES:
            block = (page - HUGE) // 512
            if block not in self.huge:
                self.huge[block] = self.new("huge")
            self.huge_mapped.add(block)
            return (*self.huge[block], (page - HUGE) % 512), 2, True, False
        return None

    def new(self, kind: str) -> Frame:
        self.made += 1
        return (kind, self.made)

    def level(self, page: int) -> int:
        return 2 if HUGE <= page < HUGE + HUGE_PAGES and (page - HUGE) // 512 in self.huge_mapped else 1


class Kvm:
    """One VM. `mirrored`: leaves of private memory stand in a tree of their own."""

    def __init__(self, protected: bool, nx: bool, recovers: bool, mirrored: bool = False) -> None:
        self.protected = protected
        self.mirrored = mirrored
        self.mirror: tuple[Any, ...] = ({}, {}, {})
        self.nx = nx
        self.recovers = recovers
        self.host = Host()
        self.slots: dict[int, Slot] = {}
        self.private: set[int] = set()
        self.gmem: dict[int, Frame] = {}
        self.leaves: dict[tuple[int, int], Leaf] = {}
        self.tables: dict[tuple[int, int], bool] = {}  # whether a fetch made it
        self.mmio: dict[int, int] = {}
        self.generation = 0
        self.gmem_made = 0

    # ------------------------------------------------------------------ the tree

    @contextmanager
    def tree(self, private: bool) -> Iterator[None]:
        """Where memory of a kind is mapped is what stands in `leaves`, `tables` and `mmio` meanwhile."""
        own = self.leaves, self.tables, self.mmio
        if private and self.mirrored:
            self.leaves, self.tables, self.mmio = self.mirror
        yield
        if private and self.mirrored:
            self.mirror = self.leaves, self.tables, self.mmio
            self.leaves, self.tables, self.mmio = own

    def leaf_over(self, gfn: int) -> tuple[int, int] | None:
        for level in (3, 2, 1):
            key = (level, gfn // span(level) * span(level))
            if key in self.leaves:
                return key
        return None

    def drop(self, start: int, end: int, kinds: tuple[bool, ...] = (False, True)) -> None:
        """Leaves that touch [start, end) go whole. `kinds`: of shared (False) or private memory, if the tree tells."""
        for private in kinds if self.mirrored else (False,):
            with self.tree(private):
                for level, first in list(self.leaves):
                    if first < end and start < first + span(level):
                        del self.leaves[level, first]

    def drop_all(self) -> None:
        self.leaves.clear()
        self.tables.clear()
        self.mmio.clear()

    def drop_table(self, level: int, first: int) -> None:
        """A table (of entries of `level`) goes with all below it."""
        end = first + 512 * span(level)
        self.tables = {k: v for k, v in self.tables.items() if not (k[0] <= level and first <= k[1] < end)}
        self.leaves = {k: v for k, v in self.leaves.items() if not (k[0] <= level and first <= k[1] < end)}
        self.mmio = {k: v for k, v in self.mmio.items() if not first <= k < end}

    def split(self, level: int, first: int) -> None:
        leaf = self.leaves.pop((level, first))
        self.tables[level - 1, first] = False
        for i in range(512):
            frame = (*leaf.frame[:-1], int(str(leaf.frame[-1])) + i * span(level - 1))
            small = replace(leaf, frame=frame, execute=leaf.execute or level == 2)
            self.leaves[level - 1, first + i * span(level - 1)] = small

    def go_down(self, gfn: int, goal: int, fetch: bool) -> int:
        """Make the tables above the entry of a frame; the level it lies at."""
        for level in (4, 3, 2):
            first = gfn // span(level) * span(level)
            made_by_fetch = self.tables.get((level - 1, first), False)
            if self.nx and level == goal and made_by_fetch:
                goal -= 1
            if level == goal:
                break
            if (level - 1, first) in self.tables:
                continue
            if (level, first) in self.leaves:
                self.split(level, first)
            self.tables[level - 1, first] = self.nx and fetch
        return goal

    # ------------------------------------------------------------------ faults

    def slot_at(self, gfn: int) -> Slot | None:
        return next((s for s in self.slots.values() if s.gfn <= gfn < s.gfn + s.pages), None)

    def notify(self, page: int, pages: int) -> None:
        """The process changes its mapping of pages."""
        for slot in self.slots.values():
            first, last = max(page, slot.hva), min(page + pages, slot.hva + slot.pages)
            if first < last:
                self.drop(slot.gfn + first - slot.hva, slot.gfn + last - slot.hva, (False,))

    def goal(self, slot: Slot, gfn: int, host_level: int) -> int:
        for level in range(min(host_level, 3), 1, -1):
            first = gfn // span(level) * span(level)
            inside = slot.gfn <= first and first + span(level) <= slot.gfn + slot.pages
            private = sum(g in self.private for g in range(first, first + span(level)))
            if inside and (slot.gfn - slot.hva) % span(level) == 0 and private in (0, span(level)):
                return level
        return 1

    def fault(self, gfn: int, write: bool, fetch: bool, prefetch: bool) -> tuple[int, int]:
        slot = self.slot_at(gfn)
        private = gfn in self.private
        if slot is None:
            if private:
                return EFAULT, 0
            self.go_down(gfn, 1, False)
            self.mmio[gfn] = self.generation
            return EMULATE, 1
        if private:
            if slot.gmem is None:
                return EFAULT, 0
            index = slot.gmem + gfn - slot.gfn
            if index not in self.gmem:
                self.gmem_made += 1
                self.gmem[index] = ("gmem", self.gmem_made)
            frame, host_level, writable = self.gmem[index], 1, True
        else:
            if write and slot.read_only:
                return EMULATE, 0
            page = slot.hva + gfn - slot.gfn
            found = self.host.fault(page, write)
            if found is None:
                return EFAULT, 0
            frame, host_level, writable, replaced = found
            writable = writable and not slot.read_only
            if replaced:
                self.notify(page, 1)
        goal = 1 if slot.log or (fetch and self.nx) else self.goal(slot, gfn, host_level)
        if slot.log and writable:
            slot.dirty.add(gfn - slot.gfn)
        level = self.go_down(gfn, goal, fetch)
        return self.install(gfn, level, frame, writable, write, fetch, prefetch), level

    def install(
        self, gfn: int, level: int, frame: Frame, writable: bool, write: bool, fetch: bool, prefetch: bool
    ) -> int:
        first = gfn // span(level) * span(level)
        base = frame if level == 1 else (*frame[:-1], int(str(frame[-1])) - (gfn - first))
        leaf = Leaf(base, writable, writable, not prefetch, writable, level == 1 or not self.nx)
        old = self.leaves.get((level, first))
        if old is not None:
            assert old.frame == base
            if prefetch or old == leaf or self.allows(old, write, fetch):
                return SPURIOUS
        elif level > 1 and (level - 1, first) in self.tables:
            self.drop_table(level - 1, first)
        self.leaves[level, first] = leaf
        self.mmio.pop(gfn, None)
        return FIXED

    @staticmethod
    def allows(leaf: Leaf, write: bool, fetch: bool) -> bool:
        return leaf.write if write else leaf.execute if fetch else True

    def use(self, key: tuple[int, int], write: bool) -> None:
        """The processor marks the leaf."""
        leaf = self.leaves[key]
        self.leaves[key] = replace(leaf, accessed=True, dirty=leaf.dirty or write)

    def access(self, gfn: int, write: bool, fetch: bool) -> tuple[int, int]:
        with self.tree(gfn in self.private):
            return self.access_below(gfn, write, fetch)

    def access_below(self, gfn: int, write: bool, fetch: bool) -> tuple[int, int]:
        key = self.leaf_over(gfn)
        slot = self.slot_at(gfn)
        if key is not None:
            leaf = self.leaves[key]
            if self.allows(leaf, write, fetch):
                self.use(key, write)
                return SPURIOUS, key[0]
            if write and leaf.marked and slot is not None and not (slot.log and key[0] > 1):
                if slot.log:
                    slot.dirty.add(gfn - slot.gfn)
                self.leaves[key] = replace(leaf, write=True)
                self.use(key, write)
                return FIXED, key[0]
        elif self.mmio.get(gfn) == self.generation:
            return EMULATE, 1
        status, level = self.fault(gfn, write, fetch, prefetch=False)
        if status in (FIXED, SPURIOUS):
            self.use((level, gfn // span(level) * span(level)), write)
        return status, level if status > 0 else 0

    def prefault(self, gfn: int, pages: int) -> tuple[int, int]:
        at = gfn
        while at < gfn + pages:
            with self.tree(at in self.private):
                status, level = self.fault(at, write=False, fetch=False, prefetch=True)
            if status not in (FIXED, SPURIOUS):
                failed = ENOENT if status == EMULATE else status
                return (0 if at > gfn else failed), at - gfn
            at = (at // span(level) + 1) * span(level)
        return 0, pages

    # ------------------------------------------------------------------ slots

    def next_generation(self, times: int) -> None:
        self.generation += times * (1 if self.protected else 2)

    def region(self, number: int, new: Slot) -> int:
        """KVM_SET_USER_MEMORY_REGION2 with arguments that are aligned."""
        old = self.slots.get(number)
        if new.gmem is not None and (new.log or new.read_only or not self.protected):
            return EINVAL
        if new.pages == 0:
            if old is None:
                return EINVAL
            self.flush_slot(old)
            del self.slots[number]
            return 0
        if old is not None:
            if new.gmem is not None or (old.gmem is not None):
                return EINVAL
            if (new.hva, new.pages, new.read_only) != (old.hva, old.pages, old.read_only):
                return EINVAL
            if new.gfn == old.gfn:
                if new.log != old.log:
                    self.next_generation(1)
                    self.switch_logging(old, new.log)
                return 0
        for key, other in self.slots.items():
            if key != number and new.gfn < other.gfn + other.pages and other.gfn < new.gfn + new.pages:
                return EEXIST
        if old is not None:
            self.flush_slot(old)
            old.gfn, old.log = new.gfn, new.log
            if not new.log:
                old.dirty.clear()
            return 0
        if new.gmem is not None:
            for other in self.slots.values():
                if other.gmem is not None and -other.pages < other.gmem - new.gmem < new.pages:
                    return EINVAL
        self.slots[number] = new
        self.next_generation(1)
        return 0

    def flush_slot(self, slot: Slot) -> None:
        self.next_generation(2)
        if self.protected:
            self.drop(slot.gfn, slot.gfn + slot.pages)
        else:
            self.drop_all()

    def switch_logging(self, slot: Slot, on: bool) -> None:
        slot.log = on
        if not on:
            slot.dirty.clear()
        if slot.read_only:
            return
        end = slot.gfn + slot.pages
        if on:
            for level in (3, 2):
                for key in [k for k in self.leaves if k[0] == level and k[1] < end and slot.gfn < k[1] + span(level)]:
                    self.split(*key)
            for key, leaf in self.leaves.items():
                if slot.gfn <= key[1] < end:
                    self.leaves[key] = replace(leaf, write=False)
            return
        for first in range(-(-slot.gfn // 512) * 512, end, 512):
            page = slot.hva + first - slot.gfn
            wanted = self.goal(slot, first, self.host.level(page))
            if (1, first) in self.tables and wanted == 2 and first not in self.private:
                self.collapse(first)

    def collapse(self, first: int) -> None:
        small = next((self.leaves[1, g] for g in range(first, first + 512) if (1, g) in self.leaves), None)
        if self.recovers and small is None:
            return
        start = next((g for g in range(first, first + 512) if (1, g) in self.leaves), first)
        self.drop_table(1, first)
        if self.recovers and small is not None:
            frame = (*small.frame[:-1], int(str(small.frame[-1])) - (start - first))
            self.leaves[2, first] = replace(small, frame=frame, execute=not self.nx)

    def dirty_log(self, number: int) -> tuple[int, list[int]]:
        slot = self.slots.get(number)
        if slot is None or not slot.log:
            return ENOENT, []
        pages = sorted(slot.gfn + page for page in slot.dirty)
        slot.dirty.clear()
        for gfn in pages:
            if (1, gfn) in self.leaves:
                self.leaves[1, gfn] = replace(self.leaves[1, gfn], write=False)
        return 0, pages

    def attributes(self, gfn: int, pages: int, private: bool) -> int:
        if private and not self.protected:
            return EINVAL
        frames = set(range(gfn, gfn + pages))
        changed = frames - self.private if private else frames & self.private
        if changed:
            for slot in self.slots.values():
                first, last = max(gfn, slot.gfn), min(gfn + pages, slot.gfn + slot.pages)
                if first < last:
                    self.drop(first, last, (not private,))
        self.private = self.private | frames if private else self.private - frames
        return 0

    # ------------------------------------------------------------------ the process

    def dontneed(self, page: int, pages: int) -> None:
        self.notify(page, pages)
        for at in range(page, page + pages):
            self.host.anon.pop(at, None)
            if at >= HUGE:
                self.host.huge_mapped.discard((at - HUGE) // 512)

    def protect(self, block: int, writable: bool) -> None:
        """mprotect() of a 2M block of the anonymous region."""
        if self.host.writable_area[block] != writable:
            self.notify(ANON + 512 * block, 512)
            self.host.writable_area[block] = writable

    def punch(self, index: int, pages: int) -> None:
        for slot in self.slots.values():
            if slot.gmem is not None:
                first, last = max(index, slot.gmem), min(index + pages, slot.gmem + slot.pages)
                if first < last:
                    self.drop(slot.gfn + first - slot.gmem, slot.gfn + last - slot.gmem, (True,))
        for at in range(index, index + pages):
            self.gmem.pop(at, None)
