"""An order of conversion is one row of steps. The straight line and the stepper are both made from it here.

A row holds steps, and steps that only one direction takes (`to_private`, `to_shared`), and steps that are done for one
item after the other (`each_item`). A step returns GO, or STOP where the conversion has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, reduce
from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.choice import by_number
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.gmem.items import next_item
from pgemu_kernels.words.operations import GO, STOP
from pgemu_kernels.words.rows import O_NEXT, O_TO_PRIVATE

__all__ = ("each_item", "stepper", "straight", "to_private", "to_shared")

U = np.uint64
Step = Any  # a kernel that takes the machine and the record


class _Only(NamedTuple):
    """Steps of one direction."""

    private: np.uint64
    steps: tuple[Step, ...]


class _Each(NamedTuple):
    """Steps that are done for each item."""

    steps: tuple[Any, ...]


def to_private(*steps: Step) -> _Only:
    return _Only(U1, steps)


def to_shared(*steps: Step) -> _Only:
    return _Only(U0, steps)


def each_item(*steps: Any) -> _Each:
    return _Each(steps)


# --------------------------------------------------------------------------- straight line


def straight(row: Iterable[Any]) -> Step:
    """One step that does those of the row one after the other, as long as they return GO."""
    return reduce(_then, map(_part, row))


def _then(first: Step, rest: Step) -> Step:
    @kernel
    def line(m, op):
        return rest(m, op) if first(m, op) == GO else STOP

    return line


@cache
def _together(steps: tuple[Any, ...]) -> Step:
    """Steps as one, the same one wherever rows have them in common."""
    inner = straight(steps)

    @step
    def together(m, op):
        return np.int64(inner(m, op))

    return together


def _part(part: Any) -> Step:
    """A part of a row as one step."""
    if not isinstance(part, _Only | _Each):
        return part
    if isinstance(part, _Each):
        return _for_each(straight(part.steps))
    inner = _together(part.steps) if len(part.steps) > 1 else _part(part.steps[0])
    private = part.private

    @kernel
    def only(m, op):
        if m.state[op + O_TO_PRIVATE] == private and inner(m, op) != GO:
            return STOP
        return GO

    return only


def _for_each(inner: Step) -> Step:
    @kernel
    def each(m, op):
        more = True
        while more:
            if inner(m, op) != GO:
                return STOP
            more = next_item(m, op)
        return GO

    return each


# --------------------------------------------------------------------------- step by step


def stepper(row: Iterable[Any], behind: Step) -> Callable[..., Any]:
    """stepper(row, behind)(m, op, stage): step `stage` of the row, from 1 on, in the record's direction.

    `behind`: the step after the last one.
    """
    row = tuple(row)
    privately, openly = (
        by_number([(U(n), _called(one)) for n, one in enumerate(_steps(row, private), 1)], behind)
        for private in (U1, U0)
    )

    @outlined
    def one(m, op, stage):
        return privately(m, op, stage) if m.state[op + O_TO_PRIVATE] != U0 else openly(m, op, stage)

    return one


def _steps(row: Iterable[Any], private: np.uint64, first: int = 1) -> Iterator[Step]:
    """The steps that a direction takes; the first one's number is `first`."""
    for part in row:
        found = [part]
        if isinstance(part, _Only):
            found = list(part.steps) if part.private == private else []
        elif isinstance(part, _Each):
            found = list(_steps(part.steps, private, first))
            found[-1] = _last_of_item(found[-1], U(first), U(first + len(found)))
        yield from found
        first += len(found)


def _last_of_item(last: Step, same: np.uint64, following: np.uint64) -> Step:
    """Behind an item's last step comes its first one (`same`) with the next item, or what follows."""

    @outlined
    def ends_item(m, op):
        outcome = np.int64(last(m, op))
        if outcome == GO:
            m.state[op + O_NEXT] = same if next_item(m, op) else following
        return outcome

    return ends_item


@cache
def _called(one: Step) -> Step:
    """A step that is not inlined: once for all rows and both directions."""

    @outlined
    def called(m, op):
        return np.int64(one(m, op))

    return called
