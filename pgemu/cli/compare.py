"""`pgemu compare`: one trace on both designs, side by side."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click

from pgemu.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pgemu.experiments.compare import Comparison

__all__ = ("compare",)

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_LARGEST = 1 << 52  # physical addresses of x86-64
_PROGRESS_AFTER = 1.0  # seconds
# The names of pgemu.config.DEFECTS, which would have to import numpy.
_DEFECTS = (
    "allocation-race", "huge-over-private", "insert-unlocked", "mapping-order", "punch-keeps-entries",
    "rollback-at-zero",
)  # fmt: skip
# Options that are fields of Config as they are.
_AS_GIVEN = (
    "hvo", "kernel", "stage2", "vcpus", "profile", "zero", "seed", "order", "batch", "split_to", "merge", "flush",
    "host_huge", "worker", "lru_cache",
)  # fmt: skip


def size(text: str) -> int:
    """Return bytes: "16G", "512MiB", "4096", "0x100000". click.BadParameter for anything else."""
    match = _SIZE.fullmatch(text.strip())
    value = int(match[1], 0 if match[1].lower().startswith("0x") else 10) * _UNITS[match[2].lower()] if match else -1
    if not 0 <= value <= _LARGEST:
        raise click.BadParameter(f"{text!r}: expected a size or an address like 16G, 512M or 0x80000000")
    return value


def memslot(text: str) -> tuple[int, int, int | None]:
    """Return GPA, size and offset (None: wherever it fits) of "0x0:512M" or "4G:1G:1G".

    :raises click.BadParameter: anything else, or what is no multiple of 4096
    """
    numbers = [size(part) for part in text.split(":")]
    if len(numbers) not in (2, 3) or any(number % 4096 for number in numbers) or numbers[1] == 0:
        raise click.BadParameter(f"{text!r}: expected GPA:SIZE or GPA:SIZE:OFFSET, multiples of 4K")
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None


def check(text: str) -> Literal["end", "every"] | int:
    """Return "end", "every" or a positive number. click.BadParameter for anything else."""
    if text == "end":
        return "end"
    if text == "every":
        return "every"
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise click.BadParameter(f"{text!r}: expected end, every, or a number of operations")
    return int(text)


class _Bar:
    """A progress bar on stderr: only on a terminal, and only once a second has gone by."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, design: str, done: int, total: int) -> None:
        if not self._shown or time.monotonic() - self._began < _PROGRESS_AFTER:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        if design not in self._tasks:
            self._tasks[design] = self._bar.add_task(design, total=total)
        self._bar.update(self._tasks[design], completed=done)


@click.command(short_help="Run one trace on both designs and show what each did.")
@click.argument("trace", required=False)
@click.option("--page-size", type=click.Choice(["2M", "1G"]), default="1G", show_default=True, help="Huge page size.")
@click.option(
    "--guest-memory", type=size, metavar="SIZE", help="Size of the guest_memfd.  [default: what the trace needs]"
)
@click.option(
    "--design",
    "designs",
    metavar="[restructure|pfnmap]",
    multiple=True,
    help="Design to run, a row of machine/designs.py; may be repeated.  [default: both]",
)
@click.option("--hvo/--no-hvo", default=True, show_default=True, help="Optimise the vmemmap of HugeTLB pages.")
@click.option(
    "--kernel",
    type=click.Choice(["6.12", "6.18", "7.3"]),
    default="7.3",
    show_default=True,
    help="Linux whose entries and struct pages are written.",
)
@click.option("--stage2", type=click.Choice(["ept", "npt"]), default="npt", show_default=True, help="Stage-2 format.")
@click.option(
    "--vcpus",
    type=click.IntRange(1, 4096),
    metavar="N",
    default=1,
    show_default=True,
    help="CPUs of the VM, for the price of flushes.",
)
@click.option(
    "--host-cpus",
    type=click.IntRange(1, 8192),
    metavar="N",
    help="CPUs of the host, for the price of flushes.  [default: those of the profile's machine; published: 1]",
)
@click.option(
    "--profile",
    metavar="NAME|FILE",
    default="published",
    show_default=True,
    help="Prices: published, those of one machine (e7-8895, epyc-252vcpu, guest-2vcpu), or a TOML file, such as "
    "`pgemu calibrate` writes.",
)
@click.option(
    "--zero",
    type=click.Choice(["folio", "page"]),
    default="folio",
    show_default=True,
    help="What the first use of an unsplit folio zeroes.",
)
@click.option(
    "--init",
    type=click.Choice(["private", "shared", "auto"]),
    default="auto",
    show_default=True,
    help="Memory at first; auto: private if the trace converts, else shared.",
)
@click.option(
    "--dontneed",
    type=click.Choice(["punch", "zap"]),
    help="What gives memory back.  [default: punch for madvise, zap for unmaps without a call]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of a workload, and of the order in which frames are handed out; 0: ascending.",
)
@click.option(
    "--check",
    type=check,
    metavar="end|N|every",
    default="end",
    show_default=True,
    help="When to check invariants: at the end, every N operations, or after every one what it touched.",
)
@click.option(
    "--memslot",
    "memslots",
    type=memslot,
    metavar="GPA:SIZE[:OFFSET]",
    multiple=True,
    help="Memory slots instead of the trace's; may be repeated.",
)
@click.option(
    "--order",
    type=click.Choice(["rfc2", "fixup", "jan2026", "next4k"]),
    default="jan2026",
    show_default=True,
    help="Order of steps of restructure's conversion; rfc2 also splits and merges folios as RFC v2 did.",
)
@click.option(
    "--batch",
    type=click.Choice(["range", "block"]),
    default="range",
    show_default=True,
    help="A conversion does all of its range or nothing, or one huge page after the other.",
)
@click.option(
    "--split-to",
    type=click.Choice(["4K", "2M"]),
    default="4K",
    show_default=True,
    help="What a 1G folio is split to; 2M: only touched 2M folios further, to 4K (what-if).",
)
@click.option(
    "--merge",
    type=click.Choice(["now", "lazy"]),
    default="now",
    show_default=True,
    help="Merge at the end of a conversion to private, or leave it to the worker.",
)
@click.option(
    "--flush",
    type=click.Choice(["each", "batched"]),
    default="each",
    show_default=True,
    help="Flush as posted, or once per process, VM and kernel in a conversion.",
)
@click.option("--host-huge", is_flag=True, help="pfnmap: also map 2M and 1G pages into processes.")
@click.option(
    "--worker",
    type=click.Choice(["immediate", "queued"]),
    default="immediate",
    show_default=True,
    help="Work items run at once, or wait for a record of the trace.",
)
@click.option("--lru-cache", is_flag=True, help="4K folios wait in per-CPU LRU batches, which hold references.")
@click.option(
    "--defect",
    "defects",
    type=click.Choice(_DEFECTS),
    multiple=True,
    help="A mistake of posted code that the machines have; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--sources", is_flag=True, help="Also print which kernel function each row models, and the prices.")
def compare(trace: str | None, **options: Any) -> int:
    """Run one trace on both designs and show side by side what each did.

    TRACE is text of ftrace, trace-cmd or perf script (plain, .xz, .gz or .zst), Parquet, "-" for standard input, or
    workload:tdx-boot. Without it: the life of a software-protected VM, which comes with pgemu.

    Exit status: 0; 1 if an invariant was broken; 2 for bad input.
    """
    comparison = _run(trace, options)
    write = _json if options["as_json"] else _tables
    sys.stdout.write(write(comparison, options["sources"]))
    sys.stdout.flush()
    if not comparison.broken:
        return 0
    from pgemu.report import findings

    for line in findings(comparison):
        print(f"pgemu: broken invariant: {line}", file=sys.stderr)
    return 1


def _run(trace: str | None, options: dict[str, Any]) -> Comparison:
    from pgemu.cost import profile as cost_profile
    from pgemu.experiments.compare import DESIGNS, compare as run
    from pgemu.trace import GivenSlot, LoweringOptions, load, shipped

    try:
        host_cpus = options["host_cpus"] or cost_profile(options["profile"]).host_cpus or 1
    except ValueError as error:
        raise InputError(f"--profile: {error}") from None
    lowering = LoweringOptions(
        page_size=size(options["page_size"]),
        init=options["init"],
        dontneed=options["dontneed"],
        memslots=tuple(GivenSlot(*slot) for slot in options["memslots"]),
        guest_memory=options["guest_memory"],
    )
    lowered = load(shipped() if trace is None else trace, lowering, options["seed"])
    if trace is None:
        lowered = replace(lowered, source=f"{shipped().name} (comes with pgemu)")
    with _Bar() as progress:
        return run(
            lowered,
            designs=tuple(dict.fromkeys(options["designs"])) or DESIGNS,
            check=options["check"],
            progress=progress,
            host_cpus=host_cpus,
            split_form="rfc2" if options["order"] == "rfc2" else "jan2026",
            defects=tuple(sorted(set(options["defects"]))),
            **{name: options[name] for name in _AS_GIVEN},
        )


def _json(comparison: Comparison, sources: bool) -> str:
    document = comparison.to_json()
    if sources:
        from pgemu.report.document import sources as sources_of

        document["sources"] = sources_of(comparison)
    return json.dumps(document, indent=2) + "\n"


def _tables(comparison: Comparison, sources: bool) -> str:
    from rich.console import Console

    from pgemu import report

    console = Console(highlight=False)
    with console.capture() as captured:
        report.write(comparison, console)
        if sources:
            report.write_sources(comparison, console)
    lines = captured.get().splitlines()
    return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"
