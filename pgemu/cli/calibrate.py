"""`pgemu calibrate`: prices of this machine."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import rich_click as click

from pgemu.cli._output import check_output
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.cost.calibrate import Calibration
    from pgemu.cost.measurements import Measurement

__all__ = ("calibrate",)

_WIDTH = 80


@click.command(short_help="Measure this machine and write a cost profile.")
@click.option("-o", "--output", metavar="FILE", help="Write the profile to this TOML file.  [default: only show it]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    metavar="N",
    default=10.0,
    show_default=True,
    help="How long to measure, beside some seconds to set up.",
)
def calibrate(output: str | None, seconds: float) -> None:
    """Measure what user space can see of this machine, and price events by it.

    Shown are the quartiles of each measurement and which events they price; prices are bands between quartiles.
    All other events keep their published prices. Nothing else should run meanwhile. No privileges are needed.

    The file is for `pgemu compare --profile FILE` and Config(profile=FILE).
    """
    from pgemu.cost import PROFILES, write_profile
    from pgemu.cost.calibrate import calibrate as run

    name = "calibrated"
    if output is not None:
        check_output(output)
        stem = os.path.splitext(os.path.basename(output))[0]
        name = stem if stem.isprintable() and stem.strip() and stem not in PROFILES else name
    if sys.platform != "linux":
        raise InputError("calibrate: measures Linux only")
    try:
        calibration = run(name, seconds, _progress())
    except MemoryError as error:
        raise InputError(f"calibrate: {error}") from None
    finally:
        _erase()
    click.echo("\n".join(_lines(calibration)))
    if output is not None:
        write_profile(calibration.profile, output)
        click.echo(f"\nwritten: {output}")


def _progress() -> Callable[[str], None]:
    """Show on a terminal what is measured."""
    if sys.stderr is None or not sys.stderr.isatty():
        return lambda _: None
    return lambda what: print(f"\r\x1b[Kmeasuring: {what}", end="", file=sys.stderr, flush=True)


def _erase() -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _lines(calibration: Calibration) -> Iterator[str]:
    profile = calibration.profile
    yield profile.machine
    yield ""
    yield f"{'measured':<44}{'25 %':>9}{'median':>9}{'75 %':>9}  prices"
    for key, measurement in calibration.measured.items():
        if measurement.problem:
            yield from _wrapped(f"{measurement.what:<44}", f"not measured: {measurement.problem}")
            continue
        events = ", ".join(event.name.lower() for event in calibration.priced(key)) or "-"
        yield from _wrapped(f"{measurement.what:<44}{_quartiles(measurement)}  ", events)
    yield ""
    kept = ", ".join(event.name.lower() for event in calibration.published)
    yield from _wrapped("as published: ", kept or "none")


def _quartiles(measurement: Measurement) -> str:
    from pgemu.cost.measurements import duration

    ends = (measurement.low, measurement.median, measurement.high)
    return "".join(f"{duration(end):>9}" for end in ends)


def _wrapped(first: str, text: str) -> Iterator[str]:
    """A line, or what is behind its numbers on lines of its own where both are too long."""
    if len(first) + len(text) <= _WIDTH:
        yield first + text
        return
    yield first.rstrip()
    yield from textwrap.wrap(
        text, _WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
