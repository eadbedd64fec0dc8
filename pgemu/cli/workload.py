"""`pgemu workload`: list synthetic traces, and store one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import rich_click as click

from pgemu.cli._lines import terminal_width
from pgemu.cli._options import parameter
from pgemu.cli._output import check_output

__all__ = ("workload",)

_WIDTH = 80
_UNITS = ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))


@click.group(short_help="List synthetic traces with their parameters, or store one.")
def workload() -> None:
    """Synthetic traces, whose numbers are published ones, captured ones, or parameters.

    `pgemu compare workload:NAME` runs one on both designs.
    """


@workload.command("list", short_help="The workloads, with what they rest on and their parameters.")
def show() -> None:
    """List the workloads: what each is, what of it is published or captured, and its parameters with their defaults."""
    from pgemu.workload import WORKLOADS, defaults_of

    width = min(terminal_width() or _WIDTH, 120)
    for name, row in WORKLOADS.items():
        given = " ".join(f"{parameter}={_text(value)}" for parameter, value in defaults_of(name).items())
        click.echo(name)
        for title, text in (("what", row.what), ("anchors", row.anchors), ("parameters", given)):
            click.echo("\n".join(_row(title, text, width)))


def _row(title: str, text: str, width: int) -> Iterator[str]:
    """A cell of the table under its workload, in as many lines as it needs."""
    first, rest = f"  {title:<12}", " " * 14
    yield from textwrap.wrap(
        text or "none", width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )  # fmt: skip


def _text(value: float | None) -> str:
    """A default as --set takes it; None is that of the workload's own rule."""
    if value is None:
        return "(by its rule)"
    if isinstance(value, int):
        unit, name = next(((unit, name) for unit, name in _UNITS if value and value % unit == 0), (1, ""))
        return f"{value // unit}{name}"
    return f"{value:g}"


@workload.command(short_help="Store a workload as Parquet.")
@click.argument("name")
@click.option("-o", "--output", metavar="FILE", required=True, help="Write the trace to this Parquet file.")
@click.option(
    "--seed", type=click.IntRange(0, (1 << 63) - 1), metavar="N", default=0, show_default=True, help="Of what is drawn."
)
@click.option(
    "--set",
    "set",
    type=parameter,
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter: a number, or a size like 64M. May be repeated.",
)
def make(name: str, output: str, seed: int, set: tuple[tuple[str, float], ...]) -> None:
    """Store the workload NAME as Parquet, which `pgemu compare` and others read; equal arguments make equal files."""
    from pgemu import workload as workloads
    from pgemu.trace.readers import parquet

    check_output(output)
    made = workloads.open(name.removeprefix("workload:"), seed, **dict(set))
    parquet.write(made, output)
    memory = sum(slot.size for slot in made.layout.slots)
    seconds = int(made.records.time[-1]) / 1e9
    click.echo(f"{output}: {made.source}, {len(made.records):,} operations on {_text(memory)} in {seconds:.6g} s")
