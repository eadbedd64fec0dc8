"""`pgemu compare`: one trace on both designs, side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._options import FIELDS, MACHINE_GROUPS, Bar, check, machine_options, parameter, size
from pgemu.cli._output import say
from pgemu.cli._trace_options import OF_LOGS, TRACE_GROUP, lowering, trace_options
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison
    from pgemu.experiments.sensitivity import Sensitivity
    from pgemu.trace.lowered import Lowered

__all__ = ("compare",)


_GROUPS = {
    "What is compared": ("--like", "--pfnmap", "--page-size", "--design", "--as-posted", "--strict"),
    "What is printed": ("--details", "--sources", "--format", "--vary", "--no-sensitivity", "--check", "--help"),
    **TRACE_GROUP,
    "Parameters of workloads": (
        *("--seed", "--overlap", "--late", "--flips", "--accesses", "--buffers", "--mapping", "--set"),
    ),
    **MACHINE_GROUPS,
}


@click.command(
    short_help="Run one trace on both designs and say which is better at what, and why.",
    context_settings=grouped(_GROUPS),
)
@click.argument("trace", required=False)
@click.option(
    "--like",
    type=click.Choice(["rfc2", "dec2025", "jan2026", "next"]),
    default="dec2025",
    show_default=True,
    help="Version of restructure; Python's Config() alone is none of them.",
)
@click.option(
    "--pfnmap",
    type=click.Choice(["corrected", "slides2025"]),
    default="corrected",
    show_default=True,
    help="Version of pfnmap: mended, or as the slides' change does.",
)
@click.option("--as-posted", is_flag=True, help="With those mistakes of the version, too, that have a known fix.")
@click.option("--strict", is_flag=True, help="What the version refuses stays refused, though the trace needs it.")
@click.option(
    "--design",
    "designs",
    metavar="restructure|pfnmap",
    multiple=True,
    help="One design alone: what it has, without a verdict. May be repeated.",
)
@trace_options
@machine_options
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Of the boots: flips under a page that stays shared, 0 to 1.  [default: 0]",
)
@click.option(
    "--late",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Flips in which a device still uses what is private, 0 to 1.  [default: the workload's]",
)
@click.option(
    "--flips", type=click.IntRange(0), metavar="N", help="Of workload:dma-steady: pages that flip.  [default: 1000]"
)
@click.option("--accesses", type=click.IntRange(0), metavar="N", help="... of the device in each flip.  [default: 64]")
@click.option(
    "--buffers",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="... share of memory that the device uses.  [default: 0.06, 64M to 1G]",
)
@click.option("--mapping", type=size, metavar="SIZE", help="... size of each map for the device.  [default: 2M]")
@click.option(
    "--set",
    "set",
    type=parameter,
    metavar="KEY=VALUE",
    multiple=True,
    help="Any parameter of a workload (pgemu workload list). May be repeated.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of a workload, and of the order of frames; 0: ascending.",
)
@click.option(
    "--check",
    type=check,
    metavar="end|N|every",
    default="end",
    show_default=True,
    help="Check invariants at the end, every N operations, or what each one touched.",
)
@click.option("--no-sensitivity", is_flag=True, help="Try no alternatives of inferred rules: quicker, bases untested.")
@click.option(
    "--vary",
    multiple=True,
    metavar="OPTION=A,B",
    help="All answers of each combination, in any --format: like=rfc2,dec2025. May be repeated.",
)
@click.option("--details", is_flag=True, help="Also every table: outcomes, times, memory, limits.")
@click.option("--sources", is_flag=True, help="Also the kernel function behind each row, and the prices.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "json"]),
    default="text",
    show_default=True,
    help="text: one screen, for a mail; the others: every number.",
)
def compare(trace: str | None, **options: Any) -> int:
    """Run one trace on both designs: which is better at what, by how much, and on what that rests.

    TRACE is text of ftrace, trace-cmd, perf script or a VMM's strace (plain, .xz, .gz or .zst), Parquet, "-" for
    standard input, or a workload: workload:tdx-boot, workload:random, ... (pgemu workload list). Without it: a
    software-protected VM's life, which comes with pgemu. What to record: pgemu record --events.

    Parquet and CSV of any writer will do. Their columns: op (code or name); flags (bits or names joined by |), address,
    offset, length (bytes) where an operation reads them; time (ns, or timestamps; rows are in its order), actor, vm,
    space and object hold 0 where missing, vm and object are 0. Integers of any width, in CSV also with 0x, without
    nulls. Memory slots are pgemu's metadata, its bind records, --memslot, or inferred.

    Devices that the trace names: --iommu-unmaps says who takes pages from them that become private. refused: nobody, as
    in Linux, which pins what devices map, or refuses it. What-ifs, in which what it refuses is mapped without
    references: none: nobody; vmm, vmm-late: user space, before or behind the conversion; of iommufd, by the conversion
    itself, notifier: for good; revoke: what stays shared is back at its end; mirror: large entries are cut, and nothing
    else goes.

    A log tells host addresses of guest memory by kvm_memslot, which is a probe on kvm_set_memory_region, before Linux
    6.14 on __kvm_set_memory_region:

    \b
    P='p:kvm_memslot kvm_set_memory_region slot=+0(%si):u32 flags=+4(%si):x32'
    P="$P gpa=+8(%si):x64 size=+16(%si):x64 hva=+24(%si):x64"
    echo "$P" >> /sys/kernel/tracing/kprobe_events

    Exit status: 0; 1 if an invariant was broken that no defect explains; 2 for bad input.
    """
    for name in ("details", "sources"):
        if options[name] and (options["vary"] or options["form"] in ("csv", "markdown")):
            raise InputError(f"--{name}: expected --format text{' or json' * (name == 'sources')}, and no --vary")
    if options["vary"]:
        return _sweep(trace, options)
    comparison, sensitivity = _run(trace, options)
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
        say(f"broken invariant: {line}")
    return 1


def _sweep(trace: str | None, options: dict[str, Any]) -> int:
    """Run every combination of --vary and print them."""
    if options["designs"] and len(set(options["designs"])) < 2:
        raise InputError("--vary: expected two designs to compare")
    from pgemu.report.sweep import Combination, sweep

    runs: list[Combination] = []
    for labels, changed in _combinations(options):
        try:
            comparison, sensitivity = _run(trace, {**options, **changed})
        except InputError as error:  # a combination that is none does not keep the others from being shown
            runs.append(Combination(labels, str(error)))
            continue
        if sensitivity and not sensitivity.complete:  # that was an interrupt, and more combinations would follow
            raise KeyboardInterrupt
        runs.append(Combination(labels, comparison, sensitivity))
    if not any(run.designs for run in runs):
        raise InputError(str(runs[0].reason))
    sys.stdout.write(sweep(runs, options["form"]))
    return int(any(not isinstance(run.comparison, str) and run.comparison.broken for run in runs))


def _combinations(options: dict[str, Any]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """What --vary asks for; an option that varies is refused beside it, for one of both would count for nothing."""
    from click.core import ParameterSource

    from pgemu.experiments.vary import combinations

    varied = _varied(options)
    found = list(combinations(options["vary"], varied))
    context = click.get_current_context()
    for name, option in varied.items():
        source = context.get_parameter_source(str(option.name)) if context else ParameterSource.DEFAULT
        label = name.replace("_", "-")
        if label in found[0][0] and source is not ParameterSource.DEFAULT:
            raise InputError(f"--vary {label}=...: expected no {option.opts[0]} beside it")
    return found


def _varied(options: dict[str, Any]) -> dict[str, click.Parameter]:
    """The options that --vary may name, by name."""
    command: click.Command = compare
    own = {"vary", "form", "details", "sources", "no_sensitivity", "check", "as_posted", "strict", "trace", "designs"}
    own |= {"input_format", "memslots_from", "set"}
    varied = [one for one in command.params if one.name in options and one.name not in own]
    return {one.opts[0].lstrip("-").replace("-", "_"): one for one in varied}


_OF_WORKLOADS = ("overlap", "late", "flips", "accesses", "buffers", "mapping")


def _load(trace: str | None, options: dict[str, Any]) -> Lowered:
    from pgemu.trace import load, require_input, shipped

    asked = lowering(options, "4K" if options["like"] == "next" else "1G")
    parameters = {name: options[name] for name in _OF_WORKLOADS if options[name] is not None}
    if twice := sorted(parameters.keys() & dict(options["set"])):
        raise InputError(f"--set {twice[0]}=...: expected no --{twice[0]} beside it")
    parameters |= dict(options["set"])
    lowered = load(shipped() if trace is None else trace, asked, options["seed"], options["input_format"], **parameters)
    require_input(lowered)
    return replace(lowered, source=f"{shipped().name} (comes with pgemu)") if trace is None else lowered


def _run(trace: str | None, options: dict[str, Any]) -> tuple[Comparison, Sensitivity | None]:
    from pgemu.cost import profile as cost_profile
    from pgemu.experiments.compare import DESIGNS, WithoutEffect, compare as run
    from pgemu.experiments.effects import with_effects
    from pgemu.experiments.sensitivity import compare_and_vary
    from pgemu.machine.presets import Versions
    from pgemu.trace.watching import watched

    try:
        host_cpus = options["host_cpus"] or cost_profile(options["profile"]).host_cpus or 1
    except ValueError as error:
        raise InputError(f"--profile: {error}") from None
    given = {name: options[name] for name in FIELDS} | {"host_cpus": host_cpus, "seed": options["seed"]}
    designs = tuple(dict.fromkeys(options["designs"])) or DESIGNS
    arguments: dict[str, Any] = {
        "check": options["check"],
        "versions": Versions(options["like"], options["pfnmap"], options["as_posted"]),
        "strict": options["strict"],
        "defects": options["defects"],
        **given,
    }
    with Bar() as progress:
        with watched(partial(progress, "reading")):
            lowered = _load(trace, options)
        _announce(lowered, options["check"])
        if options["no_sensitivity"]:
            return run(lowered, designs, progress=progress, **arguments), None
        sensitivity: Sensitivity | None = None
        if len(designs) < 2:
            comparison = run(lowered, designs, progress=progress, **arguments)
        else:
            comparison, sensitivity = compare_and_vary(lowered, designs, progress=progress, **arguments)
        interrupted = sensitivity and not sensitivity.complete
        if interrupted or options["vary"]:  # a sweep has no line that would say so
            return comparison, sensitivity
        try:
            found = with_effects(comparison, progress, sensitivity)
            idle = (*found.without_effect.options, *_idle_options(trace, options, found))
        except KeyboardInterrupt:  # what is known is shown
            return comparison, sensitivity
        return replace(found, without_effect=WithoutEffect(found.without_effect.defects, idle)), sensitivity


_MANY_RECOUNTS = 1000


def _announce(lowered: Lowered, check: Any) -> None:
    """Say before it takes long that a machine is recounted often."""
    if isinstance(check, int) and (recounts := len(lowered.records) // check) >= _MANY_RECOUNTS:
        text = f"each machine is recounted {recounts:,} times; --check every looks at what an operation touched only"
        print(f"pgemu: --check {check}: {text}", file=sys.stderr, flush=True)


def _idle_options(trace: str | None, options: dict[str, Any], comparison: Comparison) -> Iterator[str]:
    """Those options that are no fields of a machine and change nothing here."""
    from pgemu.machine.presets import LIKE

    designs = [run.design for run in comparison.runs]
    if options["as_posted"] and not ("restructure" in designs and LIKE[options["like"]].fixed):
        yield "as_posted"
    if options["strict"] and not any(run.refusal for run in comparison.runs):
        yield "strict"
    for name, default in OF_LOGS.items():
        if options[name] == default or trace == "-":  # which is read once
            continue
        try:
            other = _load(trace, {**options, name: default})
        except InputError:
            continue
        if _alike(comparison.lowered, other):
            yield name


def _alike(one: Lowered, other: Lowered) -> bool:
    """Whether two readings of a log ask for the same."""
    from pgemu.trace.schema import DTYPES

    rows = [[getattr(lowered.records, name).tobytes() for name in DTYPES] for lowered in (one, other)]
    rest = [(lowered.layout, lowered.init, dict(lowered.machine)) for lowered in (one, other)]
    return rows[0] == rows[1] and rest[0] == rest[1]
