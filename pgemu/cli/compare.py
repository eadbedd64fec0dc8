"""`pgemu compare`: one trace on both designs, side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._options import MACHINE_GROUPS, Bar, check, machine_options
from pgemu.cli._output import say
from pgemu.cli._trace import (
    TRACE_GROUPS,
    combinations_of,
    given_fields,
    load_trace,
    version_options,
    versions,
    workload_options,
)
from pgemu.cli._trace_options import OF_LOGS, trace_options
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison
    from pgemu.experiments.sensitivity import Sensitivity
    from pgemu.trace.lowered import Lowered

__all__ = ("compare",)


_GROUPS = {
    "What is compared": ("--like", "--pfnmap", "--page-size", "--design", "--as-posted", "--strict"),
    "What is printed": ("--details", "--sources", "--format", "--vary", "--no-sensitivity", "--check", "--help"),
    **TRACE_GROUPS,
    **MACHINE_GROUPS,
}


@click.command(
    short_help="Run one trace on both designs and say which is better at what, and why.",
    context_settings=grouped(_GROUPS),
)
@click.argument("trace", required=False)
@version_options
@click.option(
    "--design",
    "designs",
    metavar="restructure|pfnmap",
    multiple=True,
    help="One design alone: what it has, without a verdict. May be repeated.",
)
@trace_options
@machine_options
@workload_options
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
    for labels, changed in combinations_of(compare, options, _OF_THE_RUN):
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


# Options of the run and of what is printed: no sweep is over them.
_OF_THE_RUN = {
    *("vary", "form", "details", "sources", "no_sensitivity", "check", "as_posted", "strict", "trace", "designs"),
    *("input_format", "memslots_from", "set"),
}  # fmt: skip


def _run(trace: str | None, options: dict[str, Any]) -> tuple[Comparison, Sensitivity | None]:
    from pgemu.experiments.compare import DESIGNS, WithoutEffect, compare as run
    from pgemu.experiments.effects import with_effects
    from pgemu.experiments.sensitivity import compare_and_vary
    from pgemu.trace.watching import watched

    designs = tuple(dict.fromkeys(options["designs"])) or DESIGNS
    arguments: dict[str, Any] = {
        "check": options["check"],
        "versions": versions(options),
        "strict": options["strict"],
        **given_fields(options),
    }
    with Bar() as progress:
        with watched(partial(progress, "reading")):
            lowered = load_trace(trace, options)
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
            other = load_trace(trace, {**options, name: default})
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
