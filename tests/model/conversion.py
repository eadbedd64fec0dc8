"""Conversion between private and shared: the posted orders of restructure, and pfnmap's.

Each order is written down as its column of the comparison has it. What an order has done when a step fails stays done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.folio import PIECE, PIN, Folio
from model.inode import Inode
from model.machine import State
from model.outcome import OK, Outcome
from model.parameters import PAGE
from model.tables import common
from pgemu_kernels import words as W


class Unit(NamedTuple):
    """What is converted in one go. `floor`: no failing offset lies below this page."""

    inode: int
    node: Inode
    pages: range
    shared: bool
    floor: int

    def part(self, pages: range, floor: int) -> Unit:
        return self._replace(pages=pages, floor=floor)


@dataclass(eq=False)
class Spin:
    """A conversion that cannot go on while somebody holds a folio: what is left of it."""

    unit: Unit
    vm: int
    folio: Folio
    inner: int

    @property
    def index(self) -> int:
        """Page of the inode that the folio begins at."""
        return (self.folio.place[1] * self.folio.pages) + self.inner


class Conversions(State):
    """The ioctl that sets a range's attributes."""

    spun: tuple[int, Folio, int] | None = None  # first page that is left, folio that is held and which of its folios

    def convert(self, inode: int, offset: int, length: int, shared: bool | None, vm: int = 0) -> Outcome:
        """`shared` None: an ioctl that asks for neither. `vm`: whose file it is asked of, if it has one."""
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-W.EBADF)
        if not self.parameters.in_place_conversion:
            return Outcome(-W.ENOTTY)
        pages = range(offset // PAGE, (offset + length) // PAGE)
        if (offset | length) % PAGE or not pages or pages.stop > node.pages or shared is None:
            return Outcome(-W.EINVAL)
        if self.knows_no_private(vm, inode):
            return Outcome(-W.EINVAL)
        whole = Unit(inode, node, pages, shared, pages.start)
        before = next((spin for spin in self.spins if self.meet(spin.unit, whole)), None)
        if before is not None:
            self.spins.append(Spin(whole, vm, before.folio, before.inner))
            return Outcome(-W.WOULD_SPIN, before.index * PAGE)
        outcome = self.convert_units(whole)
        if self.spun is not None:
            start, folio, inner = self.spun
            self.spins.append(Spin(whole.part(range(start, pages.stop), start), vm, folio, inner))
            self.spun = None
        return outcome

    def knows_no_private(self, vm: int, inode: int) -> bool:
        """Whether the file is that of a VM without private memory."""
        files = [s for s in self.slots if s.owner == vm and s.inode == inode and not s.released]
        return bool(files) and self.kinds[vm] == "plain"

    def meet(self, one: Unit, other: Unit) -> bool:
        """Whether two conversions have a huge page in common."""
        return one.inode == other.inode and bool(common(self.blocks_of(one.pages), self.blocks_of(other.pages)))

    def settle(self) -> None:
        """Conversions go on that spun for a reference which is gone; those behind them after them."""
        for spin in list(self.spins):
            node = spin.unit.node
            there = node.blocks.get(spin.index >> self.order) is spin.folio
            before = self.spins[: self.spins.index(spin)]
            if (there and spin.folio.busy(spin.inner)) or any(self.meet(other.unit, spin.unit) for other in before):
                continue
            self.go_on(spin)

    def go_on(self, spin: Spin) -> None:
        """Merge what could not be merged, then convert what is left."""
        if not spin.unit.shared and self.parameters.merge == "now":
            self.merge_what_waits(spin.unit)
        if self.spun is None and not self.knows_no_private(spin.vm, spin.unit.inode):
            self.convert_units(spin.unit)
        if self.spun is None:
            self.spins.remove(spin)
            return
        start, spin.folio, spin.inner = self.spun
        spin.unit = spin.unit.part(range(start, spin.unit.pages.stop), start)
        self.spun = None

    def merge_what_waits(self, unit: Unit) -> None:
        """Merge split blocks that are all private, and private pieces, up to the first one that is held."""
        for number in self.blocks_of(unit.pages):
            folio = unit.node.blocks.get(number)
            first = number << self.order
            if folio is None:
                continue
            if folio.pieces is not None:
                inner = self.merge_pieces(folio, first, unit.node.shared)
                if inner is not None:
                    self.spun = unit.pages.start, folio, inner
            elif folio.split and unit.node.shared.isdisjoint(self.block_of(first)):
                self.merge_now(unit, folio)
            if self.spun is not None:
                return

    def convert_units(self, whole: Unit) -> Outcome:
        inode, node, pages, shared, _ = whole
        order = self.parameters.order if self.restructure else "pfnmap"
        if not self.differing(whole):
            return OK
        bad = self.bad_page(whole)
        if bad is not None:
            return Outcome(-W.EHWPOISON, bad * PAGE)
        if order != "rfc2" and not self.memory.frames.left:
            return Outcome(-W.ENOMEM, pages.start * PAGE)
        for part in self.units(pages):
            unit = Unit(inode, node, part, shared, part.start)
            if not self.differing(unit):
                continue
            outcome = getattr(self, order)(unit)
            if outcome.status:
                return outcome
            self.need_no_merge(unit)
        return OK

    def bad_page(self, unit: Unit) -> int | None:
        """The first bad page of a huge page that would be split or merged, where that is refused."""
        if not self.restructure or not self.order or self.parameters.poisoned_blocks == "move":
            return None
        for number in self.blocks_of(unit.pages):
            folio = unit.node.blocks.get(number)
            block = self.block_of(number << self.order)
            if folio is None or not folio.bad:
                continue
            if folio.whole and unit.shared:
                return max(block.start, unit.pages.start)
            left = unit.node.shared.difference(unit.pages)
            if not folio.whole and not unit.shared and left.isdisjoint(block):
                return block.start + min(folio.bad)
        return None

    def units(self, pages: range) -> list[range]:
        """All at once, or one huge page at a time. Pages of 4K are no huge ones."""
        if self.parameters.batch == "range" or not self.order:
            return [pages]
        return [common(pages, self.block_of(number << self.order)) for number in self.blocks_of(pages)]

    @staticmethod
    def differing(unit: Unit) -> bool:
        if unit.shared:
            return not unit.node.shared.issuperset(unit.pages)
        return not unit.node.shared.isdisjoint(unit.pages)

    # ------------------------------------------------------------------ orders

    def jan2026(self, unit: Unit) -> Outcome:
        """Whatever can fail comes before the zap."""
        if unit.shared:
            refused = self.split_or_leave(unit)
        else:
            self.unmap_file(unit.inode, unit.pages)
            refused = self.gate(unit)
        if refused:
            return refused
        refused = self.zap_converted(unit)
        if refused:
            for _, folio in self.private_blocks(unit):
                folio.waits |= not folio.whole  # split before the zap
            return refused
        self.store(unit)
        return (None if unit.shared else self.merge_blocks(unit)) or OK

    def next4k(self, unit: Unit) -> Outcome:
        """Folios of 4K: there is nothing to split."""
        if not unit.shared:
            self.unmap_file(unit.inode, unit.pages)
            refused = self.gate_of_small_folios(unit)
            if refused:
                return refused
        refused = self.zap_converted(unit)
        if refused:
            return refused
        self.store(unit)
        return OK

    def fixup(self, unit: Unit) -> Outcome:
        """Split after the zap, before the store."""
        if not unit.shared:
            self.unmap_file(unit.inode, unit.pages)
            refused = self.gate(unit)
            if refused:
                return refused
        refused = self.zap_converted(unit)
        if refused:
            return refused
        if unit.shared:
            refused = self.split_or_leave(unit)
            if refused:
                return refused
        else:
            refused = self.merge_blocks(unit, stored=False)
            if refused:
                assert self.spun is not None
                _, folio, inner = self.spun
                start = max(unit.pages.start, folio.place[1] << self.order)
                self.store(unit._replace(pages=range(unit.pages.start, start)))  # what is merged is private
                self.spun = start, folio, inner
                return refused
        self.store(unit)
        return OK

    def rfc2(self, unit: Unit) -> Outcome:
        """A list of ranges that change; what fails after the zap is rolled back."""
        items = [unit.part(pages, 0) for pages in self.changing(unit)]
        for item in items:
            if item.shared:
                refused = self.zap_converted(item)
                if refused:
                    return refused
                continue
            self.unmap_file(item.inode, item.pages)
            refused = self.gate(item)
            if not refused and "convert-keeps-leaves" not in self.parameters.defects:
                refused = self.zap_converted(item)
            if refused:
                return refused
        for number, item in enumerate(items):
            failed = self.execute(item)
            if failed and failed.status == -W.WOULD_SPIN:
                return failed
            if failed:
                for done in items[: number + 1]:
                    self.roll_back(done)
                return failed
        return OK

    def changing(self, unit: Unit) -> list[range]:
        """Maximal runs of pages that change."""
        runs: list[range] = []
        for index in unit.pages:
            if (index in unit.node.shared) == unit.shared:
                continue
            if runs and runs[-1].stop == index:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        return runs

    def execute(self, item: Unit) -> Outcome | None:
        """Store, for which the attribute tree allocates, then split or merge."""
        if not self.memory.frames.left:
            return Outcome(-W.ENOMEM, item.pages.start * PAGE)
        self.store(item)
        if not item.shared:
            return self.merge_blocks(item)
        refused = self.split_blocks(item)
        if refused and refused.status == -W.WOULD_SPIN:
            self.store(item._replace(shared=False))  # no fault sees it: posted code holds the lock
            self.leave_split(item, refused)
        return refused

    def roll_back(self, item: Unit) -> None:
        """The opposite conversion of an item: its store does not fail here (Linux would only warn).

        What waited for a merge before goes on waiting; the rest is merged at once.
        """
        opposite = item._replace(shared=not item.shared)
        self.store(opposite)
        if opposite.shared:
            self.split_blocks(opposite)
            return
        for _, folio in self.private_blocks(opposite):
            if folio.split and not folio.waits:
                self.merge_now(opposite, folio)
                self.spun = None  # it waits

    def pfnmap(self, unit: Unit) -> Outcome:
        """No gate, no split, no merge."""
        if not unit.shared:
            self.unmap_file(unit.inode, unit.pages)
        refused = self.zap_converted(unit)
        if refused:
            return refused
        self.store(unit)
        return OK

    # ------------------------------------------------------------------ steps

    def zap_converted(self, unit: Unit) -> Outcome | None:
        """The range and no more; a what-if is rounding it out. Whether leaves of both kinds go is a parameter, where
        there are two roots. Private leaves that cross the border of what goes are split before."""
        pages = unit.pages
        if self.parameters.zap == "rounded" and self.restructure:
            pages = self.rounded(pages, unit.node, PIECE if self.parameters.in_pieces else None)
        left = "private" if unit.shared else "shared"
        kinds = "both" if self.parameters.zap_filter == "both" else left
        if kinds != "shared" and not self.split_private(unit.inode, pages):
            return Outcome(-W.ENOMEM, unit.pages.start * PAGE)
        self.zap_file(unit.inode, pages, kinds)
        return None

    def store(self, unit: Unit) -> None:
        if not unit.shared:
            unit.node.shared.difference_update(unit.pages)
        else:
            unit.node.shared.update(unit.pages)
            unit.node.unassign(unit.pages)

    def need_no_merge(self, unit: Unit) -> None:
        """Blocks with shared pages are off the worker's list."""
        for number in self.blocks_of(unit.pages) if unit.shared else ():
            if number in unit.node.blocks:
                unit.node.blocks[number].waits = False

    def private_blocks(self, unit: Unit) -> list[tuple[int, Folio]]:
        """(first page, huge page) of those that a range touches and that have no shared page."""
        numbers = [number for number in self.blocks_of(unit.pages) if number in unit.node.blocks]
        return [
            (number << self.order, unit.node.blocks[number])
            for number in numbers
            if unit.node.shared.isdisjoint(self.block_of(number << self.order))
        ]

    def folios(self, unit: Unit) -> list[tuple[Folio, int, int]]:
        """(huge page, folio in it, index of the folio's first page) of all folios in a range."""
        found = []
        for number in self.blocks_of(unit.pages):
            folio = unit.node.blocks.get(number)
            if folio is not None:
                first = number << self.order
                part = common(self.block_of(first), unit.pages)
                inside = range(part.start - first, part.stop - first)
                found += [(folio, inner, first + inner) for inner in folio.units(inside)]
        return found

    def gate(self, unit: Unit) -> Outcome | None:
        """To private: -EAGAIN at the first folio that somebody besides the page cache holds."""
        for folio, inner, index in self.folios(unit):
            if folio.busy(inner):
                return Outcome(-W.EAGAIN, max(index, unit.floor) * PAGE)
        return None

    def gate_of_small_folios(self, unit: Unit) -> Outcome | None:
        """As merged: a pin and a mapping fail at once; for other references LRU caches are drained before."""
        for folio, inner, index in self.folios(unit):
            pinned = folio.references(folio.head) >= PIN
            if not pinned and not folio.mapped[inner] and folio.busy(inner):
                self.memory.lru_drain()
            if folio.busy(inner):
                return Outcome(-W.EAGAIN, index * PAGE)
        return None

    def split_blocks(self, unit: Unit) -> Outcome | None:
        """To shared: split what the range touches; earlier blocks stay split when a later one fails."""
        for number in self.blocks_of(unit.pages):
            folio = unit.node.blocks.get(number)
            if folio is None or folio.split or not self.order:
                continue
            first = number << self.order
            part = common(self.block_of(first), unit.pages)
            error, inner = self.split_block(folio, range(part.start - first, part.stop - first))
            if error == -W.WOULD_SPIN:
                self.spun = unit.pages.start, folio, inner
                return Outcome(error, (first + inner) * PAGE)
            if error:
                return Outcome(error, max(unit.floor, first + inner) * PAGE)
        return None

    def split_or_leave(self, unit: Unit) -> Outcome | None:
        """The same of an order that does not roll back: what was split before a failure waits for a merge."""
        refused = self.split_blocks(unit)
        if refused:
            self.leave_split(unit, refused)
        return refused

    def leave_split(self, unit: Unit, refused: Outcome) -> None:
        for first, folio in self.private_blocks(unit):
            if not folio.whole and first * PAGE < refused.detail:
                folio.waits = True

    def split_block(self, folio: Folio, pages: range) -> tuple[int, int]:
        """Split a huge page, or those of its 2M pages that `pages` of it touch: 0 or an error, and the folio."""
        if folio.whole and not folio.idle:
            return -W.WOULD_SPIN, 0  # its refcount cannot be frozen
        if not self.parameters.in_pieces:
            return 0 if self.memory.split(folio) else -W.ENOMEM, 0
        for piece in range(pages.start // PIECE, (pages.stop - 1) // PIECE + 1):
            if piece not in (folio.pieces or ()) and folio.busy(piece * PIECE):
                return -W.WOULD_SPIN, piece * PIECE
            self.memory.split_pieces(folio, {piece})
        return 0, 0

    def merge_blocks(self, unit: Unit, stored: bool = True) -> Outcome | None:
        """To private: merge what has no shared page outside the range left and is idle, or have the worker do it.

        What somebody holds would spin. Blocks behind it are merged all the same where it is `stored` that they are
        private.
        """
        held = None
        left = unit.node.shared.difference(unit.pages)
        for number in self.blocks_of(unit.pages):
            folio = unit.node.blocks.get(number)
            if folio is None or folio.whole:
                continue
            if folio.pieces is not None:
                inner = self.merge_pieces(folio, number << self.order, left, stored)
                if inner is not None:
                    held = held or (unit.pages.start, folio, inner)
            elif left.isdisjoint(self.block_of(number << self.order)):
                if self.parameters.merge == "lazy":
                    folio.waits = True
                elif not self.merge_now(unit, folio):
                    held = held or self.spun
            if held and not stored:
                break
        self.spun = held
        if held is None:
            return None
        _, folio, inner = held
        return Outcome(-W.WOULD_SPIN, (folio.place[1] * folio.pages + inner) * PAGE)

    def merge_now(self, unit: Unit, folio: Folio) -> bool:
        """Merge a split huge page: whether nobody holds a piece; else it waits."""
        if folio.idle:
            self.memory.merge(folio, keep=True)
            return True
        folio.waits = True
        self.spun = unit.pages.start, folio, next(i for i in folio.units(range(folio.pages)) if folio.busy(i))
        return False

    def merge_pieces(self, folio: Folio, first: int, shared: set[int], stored: bool = True) -> int | None:
        """Merge the 2M pages that can be, and all of them to 1G if none is split any more.

        The folio that is held of those that would be merged, by its first page in the huge page, or None. What is
        merged has no shared page: where it is not `stored` that they are private, nothing is if anything is held.
        """
        inside = {piece: range(piece * PIECE, piece * PIECE + PIECE) for piece in sorted(folio.pieces or ())}
        private = [
            piece
            for piece, pages in inside.items()
            if shared.isdisjoint(range(first + pages.start, first + pages.stop))
        ]
        whole = shared.isdisjoint(self.block_of(first))
        frozen = [range(folio.pages)] if whole else [inside[piece] for piece in private]
        held = next((unit for pages in frozen for unit in folio.units(pages) if folio.busy(unit)), None)
        if held is not None and not stored:
            return held
        for piece in private:
            if folio.idle_part(inside[piece]):
                self.memory.merge_piece(folio, piece)
        if not folio.pieces and folio.idle and whole:
            self.memory.join_pieces(folio, keep=True)
        return held
