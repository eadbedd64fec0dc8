"""Private anonymous memory with transparent huge pages as dictionaries by page: no code of the kernels.

A process has what each page of its mappings is (`areas`), 4K entries (`entries`), 2M leaves (`huge`), and the blocks of
512 pages that have a table. A page of memory is an owner and a number in it, so that who maps what can be counted by
looking everywhere. One VMA is what touches and is alike: the caller writes to the mapping before anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

BLOCK = 512
READ, WRITE = 1, 2
EINVAL, ENOMEM = 22, 12
OK, NOPAGE, SIGSEGV = 0, 0x100, 0x40


class Owner:
    """What pages lie in: a page of 4K, a huge page, the zero page. alone: pages that are one mapping's alone."""

    def __init__(self, huge: bool = False) -> None:
        self.huge = huge
        self.alone: set[int] = set()


ZERO, HUGE_ZERO = Owner(), Owner()


class Page(NamedTuple):
    owner: Owner
    number: int


@dataclass(frozen=True)
class Leaf:
    page: Page
    writable: bool


@dataclass(frozen=True)
class Area:
    """What a page of a mapping is; VMAs are one where they touch and all of this is equal."""

    prot: int
    advice: str
    group: object  # its anon_vma
    delta: int  # page of the anon_vma less the page's own number


@dataclass(eq=False)
class Space:
    areas: dict[int, Area] = field(default_factory=dict)
    entries: dict[int, Leaf] = field(default_factory=dict)
    huge: dict[int, Leaf] = field(default_factory=dict)
    tables: set[int] = field(default_factory=set)

    def whole(self, block: int) -> bool:
        """Whether a block lies in one VMA."""
        first = self.areas.get(block * BLOCK)
        return first is not None and all(self.areas.get(block * BLOCK + i) == first for i in range(BLOCK))

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """[start, end) of each VMA as far as it lies in a range."""
        start = None
        for page in range(first, first + count + 1):
            area = self.areas.get(page) if page < first + count else None
            if start is not None and area != self.areas[start]:
                yield start, page
                start = None
            if start is None and area is not None:
                start = page

    def has_hole(self, first: int, count: int) -> bool:
        return any(page not in self.areas for page in range(first, first + count))

    def end_of_vma(self, page: int, step: int) -> int:
        while self.areas.get(page + step) == self.areas[page]:
            page += step
        return page


class Memory:
    """A machine with `pages` huge pages. The switches are those of the kernel's version."""

    def __init__(self, pages: int, always: bool, old: bool, ends_at_holes: bool) -> None:
        self.pages, self.always, self.old, self.ends_at_holes = pages, always, old, ends_at_holes
        self.spaces: list[Space] = []
        self.zero_made = False
        self.contents: dict[Page, int] = {}

    # ------------------------------------------------------------------ who maps what

    def leaves(self) -> Iterator[tuple[Space, Leaf]]:
        for space in self.spaces:
            for leaf in (*space.entries.values(), *space.huge.values()):
                yield space, leaf

    def mappers(self, owner: Owner) -> list[Space]:
        return [space for space, leaf in self.leaves() if leaf.page.owner is owner]

    def take_huge(self) -> Owner | None:
        live = {leaf.page.owner for _, leaf in self.leaves() if leaf.page.owner.huge}
        return Owner(huge=True) if len(live) + self.zero_made < self.pages else None

    # ------------------------------------------------------------------ faults

    def touch(self, space: Space, page: int, write: bool, value: int) -> int:
        area = space.areas.get(page)
        if area is None or not area.prot & (WRITE if write else READ):
            return SIGSEGV
        leaf = space.huge.get(page // BLOCK) or space.entries.get(page)
        status = OK
        if leaf is None or (write and not leaf.writable):
            status = NOPAGE
            if not self.huge_fault(space, page, write):
                self.small_fault(space, page, write)
        if write:
            self.contents[self.page_at(space, page)] = value
        return status

    def page_at(self, space: Space, page: int) -> Page:
        leaf = space.huge.get(page // BLOCK)
        if leaf is not None:
            return Page(leaf.page.owner, page % BLOCK)
        return space.entries[page].page

    def huge_fault(self, space: Space, page: int, write: bool) -> bool:
        """Whether a 2M leaf was made or made writable."""
        block = page // BLOCK
        leaf = space.huge.get(block)
        if leaf is not None:
            return self.write_huge(space, block, leaf)
        area = space.areas[page]
        allowed = area.advice != "no" and (self.always or area.advice == "yes")
        if block in space.tables or not allowed or not space.whole(block):
            return False
        if not write:
            if not self.zero_made and self.take_huge() is None:
                return False
            self.zero_made = True
            space.huge[block] = Leaf(Page(HUGE_ZERO, 0), False)
            return True
        return self.enter_huge(space, block, True)

    def enter_huge(self, space: Space, block: int, writable: bool) -> bool:
        owner = self.take_huge()
        if owner is None:
            return False
        owner.alone = {0}
        space.huge[block] = Leaf(Page(owner, 0), writable)
        return True

    def write_huge(self, space: Space, block: int, leaf: Leaf) -> bool:
        owner = leaf.page.owner
        if owner is HUGE_ZERO:
            if not self.old and self.enter_huge(space, block, True):
                return True
        elif 0 in owner.alone or len(self.mappers(owner)) == 1:
            owner.alone.add(0)
            space.huge[block] = replace(leaf, writable=True)
            return True
        self.split(space, block)
        return False

    def split(self, space: Space, block: int) -> None:
        leaf = space.huge.pop(block)
        owner = leaf.page.owner
        space.tables.add(block)
        if owner.huge:
            owner.alone = set(range(BLOCK)) if 0 in owner.alone else set()
        for i in range(BLOCK):
            page = Page(owner, i) if owner.huge else Page(ZERO, 0)
            space.entries[block * BLOCK + i] = Leaf(page, leaf.writable)

    def small_fault(self, space: Space, page: int, write: bool) -> None:
        space.tables.add(page // BLOCK)
        leaf = space.entries.get(page)
        if leaf is None and not write:
            space.entries[page] = Leaf(Page(ZERO, 0), False)
        elif leaf is not None and self.can_reuse(space, leaf.page):
            leaf.page.owner.alone.add(leaf.page.number)
            space.entries[page] = replace(leaf, writable=True)
        else:
            new = Page(Owner(), 0)
            new.owner.alone = {0}
            if leaf is not None:
                self.contents[new] = self.contents.get(leaf.page, 0)
            space.entries[page] = Leaf(new, True)

    def can_reuse(self, space: Space, page: Page) -> bool:
        if page.owner is ZERO:
            return False
        if page.number in page.owner.alone:
            return True
        mappers = self.mappers(page.owner)
        if page.owner.huge:
            return not self.old and len(mappers) > 1 and all(mapper is space for mapper in mappers)
        return len(mappers) == 1

    # ------------------------------------------------------------------ calls on ranges

    def cut(self, space: Space, page: int) -> None:
        """A VMA is cut before a page: a huge page across it is split."""
        if page % BLOCK and page // BLOCK in space.huge:
            self.split(space, page // BLOCK)

    def protect(self, space: Space, first: int, count: int, prot: int) -> int:
        end = first
        while end < first + count and end in space.areas:
            end += 1
        for start, stop in list(space.pieces(first, end - first)):
            if space.areas[start].prot == prot:
                continue
            self.cut(space, start)
            self.cut(space, stop)
            for page in range(start, stop):
                space.areas[page] = replace(space.areas[page], prot=prot)
            for leaves, unit in ((space.entries, 1), (space.huge, BLOCK)):
                for key in [key for key in leaves if start <= key * unit < stop]:
                    of = leaves[key].page
                    leaves[key] = Leaf(of, bool(prot & WRITE) and of.number in of.owner.alone)
        return OK if end == first + count else -ENOMEM

    def advise(self, space: Space, first: int, count: int, advice: str) -> int:
        for start, stop in list(space.pieces(first, count)):
            if space.areas[start].advice == advice:
                continue
            self.cut(space, start)
            self.cut(space, stop)
            for page in range(start, stop):
                space.areas[page] = replace(space.areas[page], advice=advice)
        return -ENOMEM if space.has_hole(first, count) else OK

    def zap(self, space: Space, start: int, stop: int) -> None:
        self.cut(space, start)
        self.cut(space, stop)
        for page in range(start, stop):
            space.entries.pop(page, None)
            space.huge.pop(page // BLOCK, None)

    def dontneed(self, space: Space, first: int, count: int) -> int:
        for start, stop in list(space.pieces(first, count)):
            self.zap(space, start, stop)
            if not self.old:
                covered = range(-(-start // BLOCK), stop // BLOCK)
                space.tables -= set(covered)
        return -ENOMEM if space.has_hole(first, count) else OK

    def unmap(self, space: Space, first: int, count: int) -> int:
        self.zap(space, first, first + count)
        for page in range(first, first + count):
            space.areas.pop(page, None)
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
            if not any(block * BLOCK + i in space.areas for i in range(BLOCK)):
                space.tables.discard(block)
        return OK

    def collapse(self, space: Space, first: int, count: int) -> int:
        for start, stop in list(space.pieces(first, count)):
            area = space.areas[start]
            low, high = space.end_of_vma(start, -1), space.end_of_vma(start, 1) + 1
            if area.advice == "no" or (high - BLOCK) // BLOCK * BLOCK < low:
                return -EINVAL
            status = self.collapse_blocks(space, range(-(-start // BLOCK), stop // BLOCK), bool(area.prot & WRITE))
            if status:
                return status
        return -ENOMEM if space.has_hole(first, count) else OK

    def collapse_blocks(self, space: Space, blocks: range, writable: bool) -> int:
        status = OK
        for block in blocks:
            if block in space.huge:
                continue
            inside = {page: leaf for page, leaf in space.entries.items() if page // BLOCK == block}
            if block not in space.tables:
                status = -EINVAL
                if self.ends_at_holes:
                    break
                continue
            if self.old and not any(leaf.writable for leaf in inside.values()):
                status = -EINVAL
                continue
            if self.take_huge() is None:
                return -ENOMEM
            values = {page % BLOCK: self.contents.get(leaf.page, 0) for page, leaf in inside.items()}
            self.enter_huge(space, block, writable)
            for page in inside:
                del space.entries[page]
            space.tables.discard(block)
            owner = space.huge[block].page.owner
            self.contents.update({Page(owner, number): value for number, value in values.items()})
        return status

    def remap(self, space: Space, first: int, count: int, to: int) -> int:
        """Of pages of one VMA."""
        self.unmap(space, to, count)
        moved = {page: space.areas[page] for page in range(first, first + count)}
        at, end = first, first + count
        while at < end:
            target = to + at - first
            step = min(BLOCK - at % BLOCK, BLOCK - target % BLOCK, end - at)
            self.move(space, at, target, step)
            at += step
        for page, area in moved.items():
            new = to + page - first
            space.areas[new] = replace(area, delta=area.delta + page - new)
        return self.unmap(space, first, count)

    def move(self, space: Space, at: int, to: int, step: int) -> None:
        source, target = at // BLOCK, to // BLOCK
        free = target not in space.tables and target not in space.huge
        if source in space.huge:
            if step == BLOCK and free:
                space.huge[target] = space.huge.pop(source)
                return
            self.split(space, source)
        if source in space.tables:
            if step == BLOCK and free:
                space.tables.discard(source)
            space.tables.add(target)
            for i in range(step):
                leaf = space.entries.pop(at + i, None)
                if leaf is not None:
                    space.entries[to + i] = leaf

    def fork(self, parent: Space) -> Space:
        child = Space(tables=set(parent.tables))
        groups: dict[tuple[int, int], object] = {}
        pages = sorted(parent.areas)
        if pages:
            for start, stop in parent.pieces(pages[0], pages[-1] + 1 - pages[0]):
                group = groups.setdefault((start, stop), object())
                for page in range(start, stop):
                    child.areas[page] = replace(parent.areas[page], group=group)
        for mine, copies in ((parent.entries, child.entries), (parent.huge, child.huge)):
            for key, leaf in mine.items():
                leaf.page.owner.alone.discard(leaf.page.number)
                mine[key] = copies[key] = replace(leaf, writable=False)
        self.spaces.append(child)
        return child
