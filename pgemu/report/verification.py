"""A verification as people read it: how many entries agree, what was inferred, and what differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pgemu.report.answers import WIDTH, wrapped

if TYPE_CHECKING:
    from pgemu.experiments.verification.matching import Difference
    from pgemu.experiments.verification.run import Verification

__all__ = ("text",)

_INDENT = 2


def text(found: Verification, first: int) -> str:
    """The result in lines, with the first differences, `first` of them."""
    return "\n".join(_lines(found, first)) + "\n"


def _lines(found: Verification, first: int) -> Iterator[str]:
    agreed = sum(found.agreed.values())
    share = f" ({100 * agreed / found.entries:.2f} %)" if found.entries else ""
    yield f"{found.source}: {agreed:,} of {found.entries:,} compared entries agree{share}"
    yield ""
    yield f"  {'event':28}{'lines':>12}{'compared':>12}{'agree':>12}"
    for name, lines in found.lines.items():
        yield f"  {name:28}{lines:>12,}{found.compared[name]:>12,}{found.agreed[name]:>12,}"
    if alone := found.entries - sum(found.compared.values()):
        yield f"  {'of the model, not in the log':40}{alone:>12,}{0:>12,}"
    yield from _listed("Inferred of what the log does not say:", found.said)
    taken = [f"{what}: {count:,}" for what, count in found.inferred.items() if count]
    yield from _listed("Inputs without an event, taken to have happened (--no-inferred-inputs: not):", taken)
    yield from _listed("Left out:", [f"{what}: {count:,}" for what, count in found.left_out.items()])
    yield from _listed("Inputs that KVM would refuse:", [f"{what}: {count:,}" for what, count in found.refused.items()])
    if found.differences:
        yield from _differences(found, first)


def _listed(head: str, items: tuple[str, ...] | list[str]) -> Iterator[str]:
    if items:
        yield ""
        yield head
        for item in items:
            begin, *more = wrapped(item, WIDTH - _INDENT)
            yield f"  {begin}"
            yield from (f"    {line}" for line in more)


def _differences(found: Verification, first: int) -> Iterator[str]:
    known = sum(count for (_, _, cause), count in found.differences.items() if cause)
    yield ""
    yield f"{found.differing:,} differ, {known:,} of them for a reason that is known:"
    for (event, kind, cause), count in found.differences.most_common():
        begin, *more = wrapped(f"{event}, {kind}: {cause or 'no reason known'}", WIDTH - 12)
        yield f"  {count:>8,}  {begin}"
        yield from (f"{'':12}{line}" for line in more)
    shown = found.first[:first]
    if shown:
        yield ""
        yield f"The first {len(shown)}:" if len(shown) > 1 else "The first:"
        for one in shown:
            yield from _difference(one)


def _difference(one: Difference) -> Iterator[str]:
    space, level, gfn = one.key
    where = f"{'after ' if one.log is None else ''}line {one.line}"
    vm = f"VM {one.vm}, " if one.vm else ""
    yield f"  {where}: {vm}{one.event}, as id {space} gfn {gfn:x} level {level}: {one.kind}"
    for name, pair in (("log", one.log), ("model", one.model)):
        yield f"    {name:6}{'nothing' if pair is None else f'{pair[0]:x} -> {pair[1]:x}'}"
