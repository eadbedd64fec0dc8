"""What a session's benchmarks say, in two sections that nobody should mix up.

Emulator time is how long pgemu took here. Modelled kernel time is what a kernel is estimated to take for the same
operations: counts times prices, whatever this machine is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pgemu.report.units import band

__all__ = ("CONTROL", "Timed", "emulator_lines", "modelled_lines", "set_ratios", "unmodelled_line")

CONTROL = "control"

EMULATOR_TITLE = "emulator time: how fast pgemu runs here, not what a kernel takes"
MODELLED_TITLE = "modelled kernel time: estimated from counts and prices, not measured here"
EMULATOR_NOTE = (
    "million operations a second of this machine (median), in parentheses the ratio to the control of the same group",
    "The emulator's speed does not say which design is better: the next section and pgemu compare are about that.",
)
MODELLED_NOTE = (
    "per operation, low to high end: what a kernel would take for what was counted in the last timed call",
    "It does not depend on how fast this machine is, and is no measurement of a kernel.",
)


@dataclass
class Timed:
    """One benchmark. info: its `extra_info`. seconds: the median of its rounds, None until it was timed."""

    group: str
    name: str
    role: str
    info: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def rate(self) -> float | None:
        """Operations a second."""
        return self.info["operations"] / self.seconds if self.seconds else None


def set_ratios(timed: Iterable[Timed]) -> None:
    """Write into each benchmark's info its rate over that of its group's control (`ratio_to_control`)."""
    found = [one for one in timed if one.rate]
    controls = {one.group: one.rate for one in found if one.role == CONTROL}
    for one in found:
        control = controls.get(one.group)
        if control and one.rate and one.role != CONTROL:
            one.info["ratio_to_control"] = one.rate / control


def emulator_lines(timed: Iterable[Timed]) -> Iterator[str]:
    """One line per group: rates, and ratios to the control."""
    for group, members in _groups(one for one in timed if one.rate):
        yield f"{group}: " + ", ".join(map(_rate, members))


def modelled_lines(timed: Iterable[Timed]) -> Iterator[str]:
    """One line per group, of calls in which machines counted something."""
    for group, members in _groups(one for one in timed if "modelled_ns" in one.info):
        yield f"{group}: " + ", ".join(map(_modelled, members))


def unmodelled_line(timed: Iterable[Timed]) -> str | None:
    """Which calls no machine counted for, and why; None if there are none."""
    names = [f"{one.name} ({one.group})" for one in timed if one.role == "call" and "modelled_ns" not in one.info]
    if not names:
        return None
    return f"not here, for neither a machine of pgemu_machine nor machine= counted anything: {', '.join(names)}"


def _groups(timed: Iterable[Timed]) -> Iterator[tuple[str, list[Timed]]]:
    found: dict[str, list[Timed]] = {}
    for one in timed:
        found.setdefault(one.group, []).append(one)
    return iter(found.items())


def _rate(one: Timed) -> str:
    millions = (one.rate or 0) / 1e6
    ratio = one.info.get("ratio_to_control")
    rate = f"{millions:.1f}" if millions >= 10 else f"{millions:.3g}"
    return f"{one.name} {rate}" + ("" if ratio is None else f" ({ratio:.2g})")


def _modelled(one: Timed) -> str:
    low, high = (end / one.info["operations"] for end in one.info["modelled_ns"])
    if high == 0:
        operations = one.info["counts"]["operations"].items()
        results = [f"{operation} {result}" for operation, results in operations for result in results]
        return f"{one.name}: nothing that has a price ({', '.join(results) or 'no operation'})"
    told = _outcomes(one.info["counts"]["operations"])
    return f"{one.name} {band(low, high)}" + (f" ({told})" if told else "")


def _outcomes(operations: dict[str, dict[str, int]]) -> str:
    """What the counted operations returned, "" where all are of one kind that is no error.

    A price over several kinds is the mean of all: of few that did something and many that did not, it is no price of
    any of them.
    """
    found = [(operation, result, n) for operation, results in operations.items() for result, n in results.items()]
    if len(found) == 1:
        _, result, n = found[0]
        return f"{result} {n:,} of {n:,}" if result.startswith("-") else ""
    several = len(operations) > 1
    parts = (f"{n:,} {operation} {result}" if several else f"{n:,} {result}" for operation, result, n in found)
    return f"mean over {', '.join(parts)}" if found else ""
