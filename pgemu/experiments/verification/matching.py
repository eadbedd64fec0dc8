"""Changes that the model made, lines that the log has: which are the same, and how the others differ.

An entry is named by address space, level and first gfn. Its changes come in one order in both; those of a tree that was
dropped come whenever KVM gets to it. Every bit outside the frame number has to be equal. Frames are compared by what
they are: while a page of memory or a table lives, one frame of the log stands for one of the model, and the reverse.
What the log prints as the old entry has the frame that it printed when the entry became that.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pgemu.experiments.verification.tree import Change, Format, Key
from pgemu_kernels.formats.bits import ADDRESS

__all__ = ("Difference", "Frames", "Line", "Matching")

_FLAGS = ~ADDRESS & (1 << 64) - 1
_ROOT = 4  # level of the entries of a root
_SHOWN = 1000  # differences that are kept; all are counted


GENERATION = "generation of the slots"
"""Kind of a difference of cached MMIO entries, which hold how often slots changed: where the log has no slot lines."""

_GENERATION_BITS = 0xFF << 3 | 0x7FF << 52  # spte.h:MMIO_SPTE_GEN_LOW_MASK, MMIO_SPTE_GEN_HIGH_MASK


def _is_mmio(one: int, other: int) -> bool:
    """Whether two entries are MMIO entries of one page, of two generations."""
    return one & ADDRESS != 0 and one & ~_GENERATION_BITS == other & ~_GENERATION_BITS


UNTOLD_SLOTS = "how often the slots changed is not told (no slot lines)"
UNTOLD_MEMORY = "what memory the slots show, and who may write there, is not told (no slot lines)"
UNTOLD_UNMAP = "no event says why it was unmapped (attributes and guest_memfd were not recorded)"


class Line(NamedTuple):
    """A kvm_tdp_mmu_spte_changed of the log."""

    line: int
    key: Key
    old: int
    new: int


class Difference(NamedTuple):
    """What differs: the kind, the line of the log (of what it lacks, that of the input), the entry, both values."""

    kind: str
    line: int
    key: Key
    log: tuple[int, int] | None
    model: tuple[int, int] | None
    why: str = ""
    event: str = "kvm_tdp_mmu_spte_changed"
    vm: str = ""


@dataclass
class Frames:
    """Which frame of the log is which of the model, as long as neither is freed."""

    ours: dict[int, int] = field(default_factory=dict)  # frame of the log -> of the model
    theirs: dict[int, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # page of memory -> frame of the model that it has
    users: Counter[int] = field(default_factory=Counter)  # of a frame of the model

    def fits(self, log: int, model: int) -> bool:
        """Whether two frames may be the same, as far as is known."""
        return self.ours.get(log, model) == model and self.theirs.get(model, log) == log

    def pair(self, log: int, model: int, pages: int = 1, place: int | None = None) -> None:
        """Note that frames are the same, and which pages of memory they are from `place` on."""
        for i in range(pages):
            if place is not None and self.places.get(place + i) != model + i:
                self.leave(place + i)
                self.places[place + i] = model + i
                self.users[model + i] += 1
            self.ours[log + i], self.theirs[model + i] = model + i, log + i

    def leave(self, place: int) -> None:
        """A page of memory loses its frame, which may come back as any other if no other page has it."""
        model = self.places.pop(place, None)
        if model is None:
            return
        self.users[model] -= 1
        if self.users[model] == 0:
            del self.users[model]
            self.forget(model)

    def leave_range(self, start: int, end: int) -> None:
        """The same of pages [start, end)."""
        few = end - start < len(self.places)
        for place in range(start, end) if few else [place for place in self.places if start <= place < end]:
            self.leave(place)

    def clear(self) -> None:
        """Nothing is known any more."""
        for known in (self.ours, self.theirs, self.places, self.users):
            known.clear()

    def forget(self, model: int) -> None:
        """A frame of the model is freed."""
        log = self.theirs.pop(model, None)
        if log is not None and self.ours.get(log) == model:
            del self.ours[log]


class Matching:
    """Matches lines with changes, both in the order in which they come."""

    def __init__(self, fmt: Format, *, slots_known: bool = True) -> None:
        self._fmt = fmt
        self._slots_known = slots_known
        self._live: dict[Key, deque[Change]] = {}
        self._late: dict[Key, list[Change]] = {}
        self.printed: dict[Key, int | None] = {}  # what the log printed last of an entry that is there
        self.pages, self.tables = Frames(), Frames()
        self._reached: dict[int, tuple[int, int]] = {}  # line of an input that may wait -> how far KVM has come
        self._last = Change((0, 0, 0), 0, 0)  # of the last line
        self.now = 0  # line of the input that the model is at
        self.agreed: Counter[str] = Counter()
        self.differences: Counter[tuple[str, str, str]] = Counter()
        self.first: list[Difference] = []
        self._untold: dict[tuple[int, int], str] = {}  # 2M of an address space -> why entries there differ

    # ------------------------------------------------------------------ what the model did

    def expect(self, changes: Iterable[Change], *, late: bool = False) -> None:
        """The model made changes; `late`: to a tree that is dropped, which KVM takes apart at leisure."""
        for one in changes:
            change = one._replace(since=self.now)
            if late:
                self._late.setdefault(change.key, []).append(change)
            else:
                self._live.setdefault(change.key, deque()).append(change)

    def is_expected(self, line: Line) -> bool:
        """Whether the model made a change to the entry of a line, which no line had so far."""
        return bool(self._live.get(line.key) or self._late.get(line.key))

    # ------------------------------------------------------------------ what the log says

    def line(self, line: Line) -> str:
        """Compare a line: "" if it agrees, else how it differs."""
        live, late = self._live.get(line.key), self._late.get(line.key)
        if live and self._agrees(line, live[0]):
            return self._take(line, live.popleft(), live)
        for i, change in enumerate(late or ()):
            if self._agrees(line, change):
                assert late is not None
                return self._take(line, late.pop(i), None)
        for i, change in enumerate(live or ()):
            if self._agrees(line, change):
                assert live is not None
                for _ in range(i):
                    self._missing(live.popleft())
                return self._take(line, live.popleft(), live)
        return self._differs(line, live, late)

    def _agrees(self, line: Line, change: Change) -> bool:
        return not self._how(line, change)

    def _how(self, line: Line, change: Change) -> str:
        """How a line differs from a change to the same entry."""
        fmt, level = self._fmt, line.key[1]
        for log, model, which in ((line.new, change.new, ""), (line.old, change.old, "old ")):
            if not fmt.is_present(model) or not fmt.is_present(log):
                if log != model:
                    cached = not self._slots_known and _is_mmio(log, model)
                    return GENERATION if cached else f"{which}entry"
            elif (log ^ model) & _FLAGS:
                return f"{which}flags"
        if fmt.is_present(line.old) and change.before is not None and line.old & ADDRESS != change.before & ADDRESS:
            return "old frame"
        if fmt.is_present(line.new) and not self._frames(line.new, level).fits(
            (line.new & ADDRESS) >> 12, (change.new & ADDRESS) >> 12
        ):
            return "frame"
        return ""

    def _frames(self, entry: int, level: int) -> Frames:
        return self.pages if self._fmt.is_leaf(entry, level) else self.tables

    def _take(self, line: Line, change: Change, live: deque[Change] | None, kind: str = "") -> str:
        """A line and a change are of one another."""
        self._last = change
        if change.since in self._reached:
            self._reached[change.since] = change.key[0], change.key[2]
        level = line.key[1]
        if self._fmt.is_present(change.old) and not self._fmt.is_leaf(change.old, level):
            self.tables.forget((change.old & ADDRESS) >> 12)
        if live is not None and self._fmt.is_present(change.new):
            if not live:
                self.printed[line.key] = line.new
            else:
                live[0] = live[0]._replace(before=line.new)
            if not kind:
                pages = 1 << 9 * (level - 1) if self._fmt.is_leaf(change.new, level) else 1
                frames = self._frames(change.new, level)
                frames.pair((line.new & ADDRESS) >> 12, (change.new & ADDRESS) >> 12, pages, change.place)
        if not kind:
            self.agreed["kvm_tdp_mmu_spte_changed"] += 1
        return kind

    def _differs(self, line: Line, live: deque[Change] | None, late: list[Change] | None) -> str:
        """A line that no change agrees with: with the one it is nearest to."""
        if live:
            change = live.popleft()
            kind = self._how(line, change)
            self.note(Difference(kind, line.line, line.key, (line.old, line.new), (change.old, change.new)))
            return self._take(line, change, live, kind)
        if late:
            change = late.pop(0)
            kind = self._how(line, change)
            self.note(Difference(kind, line.line, line.key, (line.old, line.new), (change.old, change.new)))
            return self._take(line, change, None, kind)
        self.note(Difference("not in the model", line.line, line.key, (line.old, line.new), None))
        return "not in the model"

    def _missing(self, change: Change) -> None:
        self.note(Difference("not in the log", change.since, change.key, None, (change.old, change.new)))

    def note(self, difference: Difference) -> None:
        """Count a difference, and keep the first ones."""
        if not self._slots_known and not difference.why:
            difference = difference._replace(why=self._cause(difference))
        self.differences[difference.event, difference.kind, difference.why] += 1
        if len(self.first) < _SHOWN:
            self.first.append(difference)

    def _cause(self, difference: Difference) -> str:
        """Why an entry differs in a log without slot lines, "" if nothing is known to explain it.

        What such a log does not tell shows at one entry first; others of the same 2M follow from it.
        """
        block = difference.key[0], difference.key[2] >> 9
        cause = self._seed(difference)
        if cause:
            self._untold.setdefault(block, cause)
        return cause or self._untold.get(block, "")

    def _seed(self, difference: Difference) -> str:
        fmt, level, log, model = self._fmt, difference.key[1], difference.log, difference.model
        if difference.kind == GENERATION:
            return UNTOLD_SLOTS
        if difference.kind in ("frame", "old frame"):
            return UNTOLD_MEMORY
        if log is not None and model is None and fmt.is_leaf(log[0], level) and not fmt.is_present(log[1]):
            return UNTOLD_UNMAP
        if log is not None and model is not None and difference.kind == "flags":
            if fmt.is_leaf(log[1], level) != fmt.is_leaf(model[1], level):
                return UNTOLD_MEMORY
            if fmt.is_leaf(log[1], level) and not (log[1] ^ model[1]) & _FLAGS & ~fmt.rights:
                return UNTOLD_MEMORY
        return ""

    def _is_under_way(self, change: Change, unanswered: Collection[int]) -> bool:
        """Whether KVM may not have come to a change when the log ended: it goes through a range by ascending gfn."""
        space, _, gfn = change.key
        if change.since in self._reached:
            return (space, gfn) >= self._reached[change.since]
        if change.since == self._last.since:
            return (space, gfn) >= (self._last.key[0], self._last.key[2])
        return change.since in unanswered

    def is_last(self, since: int) -> bool:
        """Whether the last line is of an input."""
        return self._last.since == since

    def may_wait(self) -> None:
        """KVM may do what the input asks for later: dirty logging whose bitmap is set initially protects a page as its
        bit is cleared (KVM_DIRTY_LOG_INITIALLY_SET)."""
        self._reached[self.now] = -1, -1

    def finish(self, unanswered: Collection[int]) -> int:
        """The log has ended: what the model did and no line says is a difference, but for what was under way.

        :param unanswered: lines of inputs behind which their task has no line
        :returns: how many changes were under way: those of such inputs, of the one that the last line is of, and of
            trees whose root entry still stood
        """
        late = [change for changes in self._late.values() for change in changes]
        standing = {change.since for change in late if change.key[1] == _ROOT}
        live = (change for changes in self._live.values() for change in changes)
        left = [change for change in live if not self._is_under_way(change, unanswered)]
        left += [change for change in late if change.since not in standing]
        for change in sorted(left, key=lambda change: change.since):
            self._missing(change)
        return sum(map(len, self._live.values())) + len(late) - len(left)
