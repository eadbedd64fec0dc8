"""`pgemu replay`: a trace on one machine, and what each of its records returned."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._options import MACHINE_GROUPS, Bar, check, machine_options, size
from pgemu.cli._output import check_output, say
from pgemu.cli._replay import Interrupt, PlainLines, output_names
from pgemu.cli._trace import (
    TRACE_GROUPS,
    combinations_of,
    given_fields,
    lowering_options,
    version_options,
    versions,
    workload_options,
    workload_parameters,
)
from pgemu.cli._trace_options import trace_options
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.experiments.replaying.jobs import Job
    from pgemu.experiments.replaying.run import Replayed

__all__ = ("replay",)

_GROUPS = {
    "The run": ("--design", "--output", "--jobs", "--vary", "--scheduler", "--check", "--max-memory"),
    "What is shown": ("--progress", "--format", "--help"),
    "Interrupted runs": ("--checkpoint", "--checkpoint-every", "--resume"),
    "Versions": ("--like", "--pfnmap", "--page-size", "--as-posted", "--strict"),
    **TRACE_GROUPS,
    **MACHINE_GROUPS,
}
# Of the run, not of a machine or a trace: none of them varies.
_OF_THE_RUN = {
    "traces", "output", "jobs", "vary", "scheduler", "check", "max_memory", "progress", "form", "checkpoint",
    "checkpoint_every", "resume", "strict", "as_posted", "input_format", "memslots_from", "set",
}  # fmt: skip
_EVERY = re.compile(r"([0-9]+)(s?)")


def every(text: str) -> tuple[int, float]:
    """Return records and seconds of "1000000" or "30s". click.BadParameter for anything else."""
    match = _EVERY.fullmatch(text.strip())
    if not match or not int(match[1]):
        raise click.BadParameter(f"{text!r}: expected a number of records, or seconds like 30s")
    return (0, float(match[1])) if match[2] else (int(match[1]), 0.0)


@click.command(
    short_help="Run a trace on one design, and store what each record returned.", context_settings=grouped(_GROUPS)
)
@click.argument("traces", metavar="TRACE...", nargs=-1, required=True)
@click.option("--design", type=click.Choice(["restructure", "pfnmap"]), help="The design.  [required, or varied]")
@click.option(
    "-o", "--output", type=click.Path(), required=True, metavar="FILE|FOLDER",
    help="Outcomes, as Parquet; of several runs a folder, with a file for each.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N",
    help="Processes: runs side by side; of one run, VMs that share nothing.",
)  # fmt: skip
@click.option(
    "--vary", multiple=True, metavar="OPTION=A,B", help="A run for each combination, of each trace. May be repeated."
)
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Runs go to the workers of this Dask scheduler.")
@click.option(
    "--check", type=check, metavar="end|N|every", default="end", show_default=True,
    help="Check invariants at the end, every N operations, or what each one touched.",
)  # fmt: skip
@click.option("--max-memory", type=size, metavar="SIZE", help="End where a process would have more in memory.")
@click.option(
    "--progress", type=click.Choice(["auto", "plain", "none"]), default="auto", show_default=True,
    help="On stderr: a bar on a terminal, a line every few seconds, nothing.",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="Of the summary.",
)  # fmt: skip
@click.option("--checkpoint", type=click.Path(), metavar="FILE", help="Write what the run can go on from.")
@click.option(
    "--checkpoint-every", type=every, default="60s", show_default=True, metavar="N|Ns", help="... after so much."
)
@click.option("--resume", is_flag=True, help="Go on from --checkpoint, or begin where there is none.")
@version_options
@machine_options
@workload_options
@trace_options
def replay(traces: tuple[str, ...], **options: Any) -> int:
    """Run a trace record by record on one design's machine, and store what each record returned.

    TRACE is as of pgemu compare. What pgemu stored as Parquet is read as it runs, so that its length takes no memory
    (but a trace of devices); any other is loaded first. The machine has the processes, VMs and inodes that records name
    by their numbers, each inode of the trace's size; processes of a trace that forks come by its forks.

    A row of the outcomes is a record: index, operation, result, detail (of a fault the level of its leaf: 1 of 4K, 2 of
    2M, 3 of 1G). index counts the records that ran, from 0 on: those put before the trace's first (processes, memory,
    slots) are among them, and rows left out are not, so it is no row of TRACE. pgemu trace convert stores what runs,
    row by row. Metadata "pgemu.replay" tells the machine, and whether all records have run
    (pq.read_metadata(FILE).metadata[b"pgemu.replay"], JSON). The file appears at the end; interrupted (Ctrl-C,
    SIGTERM), it has what has run by then.

    With --checkpoint a run that ended for whatever reason goes on by --resume, and writes the same file as one that was
    never interrupted. With --jobs a trace of VMs that share nothing runs on several machines; where records join all of
    them, or machines could have been short of memory together, it runs on one, and says so.

    Exit status: 0; 1 if an invariant was broken that no defect explains; 2 for bad input; 130 if
    interrupted, by SIGTERM 143.
    """
    jobs = _jobs(traces, options)
    if options["resume"] and not options["checkpoint"]:
        raise InputError("--resume: expected --checkpoint FILE to go on from")
    for job in jobs:
        if job.out == options["output"] or os.path.isdir(options["output"]):  # else its folder is made
            check_output(job.out, *traces)
        if job.checkpoint:
            _check_checkpoint(job)
    if len(jobs) == 1 and not options["scheduler"]:
        return _one(jobs[0], options)
    if options["checkpoint"]:
        raise InputError(f"--checkpoint: expected one run, not {len(jobs)}, and no --scheduler")
    return _several(jobs, options)


def _jobs(traces: tuple[str, ...], options: dict[str, Any]) -> list[Job]:
    """The runs that are asked for, each with a file of its own."""
    from pgemu.experiments.replaying.jobs import Job
    from pgemu.experiments.replaying.run import Every

    found = combinations_of(replay, options, _OF_THE_RUN)
    several = len(traces) * len(found) > 1 or bool(options["scheduler"])
    names = output_names(options["output"], traces, [labels for labels, _ in found], several)
    if several and "-" in traces:
        raise InputError("-: standard input can be read by one run, here")
    if len(set(names)) < len(names):
        raise InputError("--vary: the same run twice, expected values that differ")
    jobs = []
    for trace in traces:
        for labels, changed in found:
            here = {**options, **changed}
            if here["design"] is None:
                raise InputError("--design: expected restructure or pfnmap, or --vary design=restructure,pfnmap")
            jobs.append(
                Job(
                    trace, names.pop(0), lowering_options(here), here["design"], versions(here), given_fields(here),
                    here["seed"], workload_parameters(here), here["strict"], here["check"], here["checkpoint"],
                    Every(*here["checkpoint_every"]), here["resume"], here["max_memory"], (),
                    1 if several else here["jobs"], ", ".join(f"{name}={value}" for name, value in labels.items()),
                    here["input_format"],
                )
            )  # fmt: skip
    return jobs


def _check_checkpoint(job: Job) -> None:
    """Refuse a checkpoint that would replace the trace or the outcomes."""
    assert job.checkpoint
    check_output(job.checkpoint, job.trace)
    if os.path.realpath(job.checkpoint) == os.path.realpath(job.out):
        raise InputError("--checkpoint: is the file of the outcomes, expected another one", job.checkpoint)


def _one(job: Job, options: dict[str, Any]) -> int:
    from functools import partial

    from pgemu.experiments.replaying.jobs import run_job
    from pgemu.trace.watching import watched

    with (
        _progress(options) as progress, Interrupt() as interrupt, watched(partial(progress, "reading")),
        interrupt.ending(),
    ):  # fmt: skip
        replayed = run_job(job, partial(progress, job.design), interrupt)
    if replayed.complete or replayed.shards == 1:  # else machines counted more than the file has
        _show([(job, replayed)], options)
    if not replayed.complete and not replayed.refusal:
        more = "; --resume goes on" if job.checkpoint else ""
        say(f"interrupted after {replayed.records:,} of {replayed.total:,} records, which {job.out} has{more}")
        return interrupt.status
    return _status([replayed])


def _several(jobs: list[Job], options: dict[str, Any]) -> int:
    from pgemu.experiments.replaying.jobs import on_cluster, run_all, run_alone

    os.makedirs(options["output"], exist_ok=True)
    done: list[tuple[Job, Replayed]] = []
    failed = 0
    with _progress(options) as progress, Interrupt() as interrupt:
        if options["scheduler"]:
            results = on_cluster(options["scheduler"], run_alone, [_elsewhere(job) for job in jobs])
        else:
            results = run_all(run_alone, jobs, options["jobs"], interrupt)
        for ended, (number, result) in enumerate(results, 1):
            progress("runs", ended, len(jobs))
            if isinstance(result, InputError):
                label = jobs[number].label
                say(f"{label}: {result}" if label else str(result))
                failed += 1
            else:
                done.append((jobs[number], result))
    order = {id(job): number for number, job in enumerate(jobs)}
    _show(sorted(done, key=lambda pair: order[id(pair[0])]), options)
    whole = sum(replayed.complete or bool(replayed.refusal) for _, replayed in done)
    if whole + failed < len(jobs):
        say(f"interrupted after {whole} of {len(jobs)} runs")
        return interrupt.status
    return 2 if failed else _status([replayed for _, replayed in done])


def _elsewhere(job: Job) -> Job:
    """The run with names of files that are the same in any folder."""
    trace = job.trace if job.trace.startswith("workload:") else os.path.abspath(job.trace)
    return replace(job, trace=trace, out=os.path.abspath(job.out))


def _progress(options: dict[str, Any]) -> Bar | PlainLines:
    if options["progress"] == "auto":
        return Bar(after=0.0, rate=True)
    return PlainLines(quiet=options["progress"] == "none")


def _show(runs: list[tuple[Job, Replayed]], options: dict[str, Any]) -> None:
    from pgemu.report.replay import document, text

    if options["form"] == "json":
        documents = [document(replayed, job.out, job.label) for job, replayed in runs]
        single = len(documents) == 1 and not options["vary"]
        sys.stdout.write(json.dumps(documents[0] if single else documents, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(text(replayed, job.out, job.label) for job, replayed in runs))
    sys.stdout.flush()


def _status(runs: list[Replayed]) -> int:
    return int(any(replayed.broken for replayed in runs))
