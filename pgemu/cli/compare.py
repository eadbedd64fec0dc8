"""`pgemu compare`: one trace on both designs, side by side."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._options import FIELDS, Bar, check, machine_options, memslot, size, vm_process
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison
    from pgemu.experiments.sensitivity import Sensitivity
    from pgemu.trace.lowered import Lowered

__all__ = ("compare",)


@click.command(short_help="Run one trace on both designs and say which is better at what, and why.")
@click.argument("trace", required=False)
@click.option(
    "--like",
    type=click.Choice(["rfc2", "dec2025", "jan2026", "next"]),
    default="dec2025",
    show_default=True,
    help="Version of restructure: what was posted together.",
)
@click.option(
    "--pfnmap",
    type=click.Choice(["corrected", "slides2025"]),
    default="corrected",
    show_default=True,
    help="Version of pfnmap: with its holes and faults corrected, or as the slides' change does.",
)
@click.option("--as-posted", is_flag=True, help="With the version's mistakes, too, that have a known fix.")
@click.option("--strict", is_flag=True, help="What the version refuses stays refused, though the trace needs it.")
@click.option("--page-size", type=click.Choice(["4K", "2M", "1G"]), help="Page size.  [default: 1G; --like next: 4K]")
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
@machine_options
@click.option(
    "--init",
    type=click.Choice(["private", "shared", "auto"]),
    default="auto",
    show_default=True,
    help="Memory at first; auto: private if the trace converts or is a TD's, else shared.",
)
@click.option(
    "--dontneed",
    type=click.Choice(["punch", "zap"]),
    help="What gives memory back.  [default: punch for madvise, zap for unmaps without a call]",
)
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Of workload:tdx-boot: share of the flips under a page that stays shared.  [default: 0]",
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
    "--vm-process",
    "vm_processes",
    type=vm_process,
    metavar="PID|all",
    multiple=True,
    help="Process of a log's VM; may be repeated, all merges what it holds.  [default: the only one]",
)
@click.option(
    "--tdx-shared-bit",
    type=click.Choice(["auto", "none", "47", "51"]),
    default="auto",
    show_default=True,
    help="Bit of a log's guest addresses that says shared in a TD; auto: one, if without it they lie in memory.",
)
@click.option(
    "--fault-address",
    type=click.Choice(["auto", "physical", "virtual"]),
    default="auto",
    show_default=True,
    help="What guest faults of a log print; auto: virtual addresses if the kernel's half is among them.",
)
@click.option("--no-sensitivity", is_flag=True, help="Do not repeat the run under the alternatives of inferred rules.")
@click.option(
    "--vary",
    multiple=True,
    metavar="OPTION=A,B",
    help="Run every combination and print who is better at what: like=rfc2,dec2025; may be repeated.",
)
@click.option("--details", is_flag=True, help="Also print every table: outcomes, times, memory, limits.")
@click.option("--sources", is_flag=True, help="Also print which kernel function each row models, and the prices.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "json"]),
    default="text",
    show_default=True,
    help="text: the first screen, for a mail; the others have every number.",
)
def compare(trace: str | None, **options: Any) -> int:
    """Run one trace on both designs and say which is better at what, by how much, and on what that rests.

    TRACE is text of ftrace, trace-cmd or perf script (plain, .xz, .gz or .zst), Parquet, "-" for standard input, or
    workload:tdx-boot. Without it: the life of a software-protected VM, which comes with pgemu.

    Exit status: 0; 1 if an invariant was broken that no defect of the version explains; 2 for bad input.
    """
    for name in ("details", "sources"):
        if options[name] and (options["vary"] or options["form"] in ("csv", "markdown")):
            raise InputError(f"--{name}: expected --format text{' or json' * (name == 'sources')}, and no --vary")
    if options["vary"]:
        if options["designs"] and len(set(options["designs"])) < 2:
            raise InputError("--vary: expected two designs to compare")
        from pgemu.experiments.compare import Comparison
        from pgemu.experiments.vary import combinations
        from pgemu.report.sweep import sweep

        runs: list[tuple[dict[str, str], Comparison | str]] = []
        for labels, changed in combinations(options["vary"], _varied(options)):
            try:
                runs.append((labels, _run(trace, {**options, **changed})[0]))
            except InputError as error:  # a combination that is none does not keep the others from being shown
                runs.append((labels, str(error)))
        if not any(isinstance(run, Comparison) for _, run in runs):
            raise InputError(str(runs[0][1]))
        sys.stdout.write(sweep(runs, options["form"]))
        return int(any(run.broken for _, run in runs if isinstance(run, Comparison)))
    comparison, sensitivity = _run(trace, options, sensitive=not options["no_sensitivity"])
    from pgemu import report

    sys.stdout.write(
        report.document(
            comparison, sensitivity, options["form"], details=options["details"], sources=options["sources"]
        )
    )
    sys.stdout.flush()
    if not comparison.broken:
        return 0
    for line in report.findings(comparison, explained=False):
        print(f"pgemu: broken invariant: {line}", file=sys.stderr)
    return 1


def _varied(options: dict[str, Any]) -> dict[str, click.Parameter]:
    """The options that --vary may name, by name."""
    command: click.Command = compare
    own = {"vary", "form", "details", "sources", "no_sensitivity", "check", "as_posted", "strict", "trace"}
    varied = [one for one in command.params if one.name in options and one.name not in own]
    return {one.opts[0].lstrip("-").replace("-", "_"): one for one in varied}


def _load(trace: str | None, options: dict[str, Any]) -> Lowered:
    from pgemu.trace import GivenSlot, LoweringOptions, load, require_input, shipped

    lowering = LoweringOptions(
        page_size=size(options["page_size"] or ("4K" if options["like"] == "next" else "1G")),
        init=options["init"],
        dontneed=options["dontneed"],
        memslots=tuple(GivenSlot(*slot) for slot in options["memslots"]),
        guest_memory=options["guest_memory"],
        vm_processes=options["vm_processes"],
        tdx_shared_bit=options["tdx_shared_bit"],
        fault_address=options["fault_address"],
    )
    parameters = {} if options["overlap"] is None else {"overlap": options["overlap"]}
    lowered = load(shipped() if trace is None else trace, lowering, options["seed"], **parameters)
    require_input(lowered)
    return replace(lowered, source=f"{shipped().name} (comes with pgemu)") if trace is None else lowered


def _run(
    trace: str | None, options: dict[str, Any], *, sensitive: bool = False
) -> tuple[Comparison, Sensitivity | None]:
    from pgemu.cost import profile as cost_profile
    from pgemu.experiments.compare import DESIGNS, compare as run
    from pgemu.experiments.sensitivity import sensitivity
    from pgemu.machine.presets import Versions

    try:
        host_cpus = options["host_cpus"] or cost_profile(options["profile"]).host_cpus or 1
    except ValueError as error:
        raise InputError(f"--profile: {error}") from None
    given = {name: options[name] for name in FIELDS} | {"host_cpus": host_cpus, "seed": options["seed"]}
    with Bar() as progress:
        comparison = run(
            _load(trace, options),
            designs=tuple(dict.fromkeys(options["designs"])) or DESIGNS,
            check=options["check"],
            progress=progress,
            versions=Versions(options["like"], options["pfnmap"], options["as_posted"]),
            strict=options["strict"],
            defects=options["defects"],
            **given,
        )
        two = sensitive and len(comparison.runs) > 1
        return comparison, sensitivity(comparison, progress) if two else None
