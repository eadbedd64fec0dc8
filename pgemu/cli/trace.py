"""`pgemu trace`: convert traces of any format, look at them, cut and merge them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._options import Bar, size
from pgemu.cli._output import check_output
from pgemu.cli._trace_options import TRACE_GROUP, lowering, trace_options
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.lowered import Lowered

__all__ = ("trace",)

_TIME = re.compile(r"(\+?)(\d+(?:\.\d{1,9})?)(s|ms|us|ns)?")
_UNITS = {"s": 9, "ms": 6, "us": 3, "ns": 0, None: 9}


def _time(text: str) -> tuple[bool, int]:
    """Whether it counts from the trace's first record, and nanoseconds, of "72276.115679", "+1.5s", "+20ms"."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text!r}: expected seconds like 72276.115679, or +1.5s, +20ms from the beginning")
    whole, _, part = found[2].partition(".")
    digits = _UNITS[found[3]]
    if len(part) > digits:
        raise click.BadParameter(f"{text!r}: expected no part of a nanosecond")
    return bool(found[1]), int(whole) * 10**digits + int((part or "0").ljust(digits, "0") or "0")


@click.group(short_help="Convert traces of any format, look at them, cut and merge them.")
def trace() -> None:
    """Convert traces of any format to Parquet, look at them, cut and merge them.

    What is read is told by its content, or by --input-format (pgemu trace formats lists them), plain or compressed with
    xz, gzip or zstd; "-" is standard input.
    """


_output = click.option("-o", "--output", required=True, metavar="FILE", help="What is written, whole or not at all.")
_max_memory = click.option(
    "--max-memory", type=size, metavar="SIZE", help="Stop when reading takes more memory.  [default: no limit]"
)
_json = click.option("--json", "as_json", is_flag=True, help="JSON, in place of text.")


@contextmanager
def _reading(max_memory: int | None) -> Iterator[None]:
    """Show how far it is, and stop at a limit."""
    from pgemu.trace.watching import limited, watched

    with Bar() as bar, watched(limited(partial(bar, "reading"), max_memory)):
        yield


def _opened(path: str, options: Mapping[str, Any]) -> Lowered | AccessStream:
    from pgemu import trace as traces

    if path.startswith("workload:"):
        return traces.load(path, lowering(options))
    return traces.opened(path, lowering(options), options["input_format"])


@trace.command(short_help="Store traces of any format as Parquet.", context_settings=grouped(TRACE_GROUP))
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@_output
@trace_options
@_max_memory
def convert(traces: tuple[str, ...], output: str, max_memory: int | None, **options: Any) -> None:
    """Store traces as Parquet, which is read many times faster than text.

    A log of a VM is laid over guest memory first, as the options say; the memory slots go into the file's metadata. Of
    several traces -o is a folder, and each is stored there under its name.

    Columns are those of pgemu.trace.COLUMNS; what stands in the metadata, under the key "pgemu", is JSON: version,
    kind ("guest", "process", "accesses"), memory layout, where events went, notes, and what it was made from.
    """
    from pgemu.trace.about import name_of

    several = len(traces) > 1
    if several and not os.path.isdir(output):
        raise InputError("no folder, expected one for several traces", output)
    targets = [os.path.join(output, f"{name_of(path)}.parquet") if several else output for path in traces]
    if len(set(targets)) < len(targets):
        raise InputError("two traces of one name, convert them one by one", output)
    for target in targets:
        check_output(target, *traces)
    for path, target in zip(traces, targets, strict=True):
        with _reading(max_memory):
            line = _store(_opened(path, options), target)
        click.echo(line)


def _store(found: Lowered | AccessStream, target: str) -> str:
    """Write a trace; a line that says what."""
    from pgemu.report.traces import not_in_it
    from pgemu.report.units import count, size as shown
    from pgemu.trace import require_input
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.readers import parquet

    if isinstance(found, AccessStream):
        parquet.write_accesses(found, target)
        tally = found.tally
        what = f"{count(tally.records)} accesses of {found.format}"
        left = Counter({**tally.ignored, "not understood": tally.rejected})
    else:
        if not len(found.records):
            require_input(found)
        parquet.write(found, target)
        what = f"{count(len(found.records))} records"
        left = found.accounting.missing()
    told = not_in_it(left)
    return f"{target}: {what}, {shown(os.path.getsize(target))}" + (f"; {told}" if told else "")


@trace.command(
    short_help="What a trace holds, and what of it is not understood.", context_settings=grouped(TRACE_GROUP)
)
@click.argument("path", metavar="TRACE")
@trace_options
@_max_memory
@_json
def info(path: str, max_memory: int | None, as_json: bool, **options: Any) -> None:
    """Say what a trace holds: operations, times, memory; which events it has that pgemu does not know.

    Of a log of several VMs: which processes they are of, and how much of each is in it. With --vm-process it is about
    the one that is chosen.
    """
    from pgemu.report.traces import about
    from pgemu.trace.about import about_accesses, about_records, about_several
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.processes import SeveralVmsError

    with _reading(max_memory):
        try:
            opened = _opened(path, options)
        except SeveralVmsError as several:  # who looks at it need not choose
            found = about_several(several)
        else:
            found = about_accesses(opened) if isinstance(opened, AccessStream) else about_records(opened)
    _print(json.dumps(found, indent=2) + "\n" if as_json else about(found))


@trace.command(short_help="The first records of a trace.", context_settings=grouped(TRACE_GROUP))
@click.argument("path", metavar="TRACE")
@click.option("-n", "--records", type=click.IntRange(1), default=10, show_default=True, help="How many.")
@trace_options
@_max_memory
@_json
def head(path: str, records: int, max_memory: int | None, as_json: bool, **options: Any) -> None:
    """Show the first records of a trace as they are stored."""
    from pgemu.report.traces import table_of_records
    from pgemu.trace.about import first_records
    from pgemu.trace.accesses import AccessStream

    rows: list[dict[str, Any]] = []
    with _reading(max_memory):
        opened = _opened(path, options)
        batches = opened.batches if isinstance(opened, AccessStream) else iter((opened.records,))
        for batch in batches:
            rows += first_records(batch, records - len(rows))
            if len(rows) >= records:
                break
    _print(json.dumps(rows, indent=2) + "\n" if as_json else table_of_records(rows))


@trace.command(short_help="A piece of a trace by time or VM.", context_settings=grouped(TRACE_GROUP))
@click.argument("path", metavar="TRACE")
@_output
@click.option("--from", "first", type=_time, metavar="TIME", help="From this time on: seconds, or +1.5s, +20ms.")
@click.option("--to", "end", type=_time, metavar="TIME", help="Before this time.")
@click.option("--vm", type=click.IntRange(0), metavar="N", help="Without the records that name another VM.")
@trace_options
@_max_memory
def cut(
    path: str,
    output: str,
    first: tuple[bool, int] | None,
    end: tuple[bool, int] | None,
    vm: int | None,
    max_memory: int | None,
    **options: Any,
) -> None:
    """Store a piece of a trace. What was mapped, bound and shared at its beginning is made first; faults are not."""
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.cutting import cut as cut_out, cut_accesses

    if first is None and end is None and vm is None:
        raise InputError("expected --from, --to or --vm")
    check_output(output, path)
    with _reading(max_memory):
        found = _opened(path, options)
        if isinstance(found, AccessStream):
            if vm is not None:
                raise InputError("a program's accesses, which name no VM", path)
            piece: Lowered | AccessStream = cut_accesses(found, first, end)
        else:
            piece = cut_out(found, _at(found, first), _at(found, end), vm)
        line = _store(piece, output)
    click.echo(line)


def _at(found: Lowered, when: tuple[bool, int] | None) -> int | None:
    """A time of the command line as one of the trace's, nanoseconds."""
    if when is None:
        return None
    rest = found.records.time[found.accounting.setup :]
    return when[1] + (int(rest[0]) if when[0] and rest.size else 0)


@trace.command(short_help="Several traces as one, by time.", context_settings=grouped(TRACE_GROUP))
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@_output
@click.option("--from-zero", is_flag=True, help="Each trace begins at time 0.  [default: all have one clock]")
@trace_options
@_max_memory
def merge(traces: tuple[str, ...], output: str, from_zero: bool, max_memory: int | None, **options: Any) -> None:
    """Store several traces as one, by time: VMs, processes and files are numbered one trace behind the other."""
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.merging import merge as joined, merge_accesses

    check_output(output, *traces)
    with _reading(max_memory):
        found = [_opened(path, options) for path in traces]
        streams = [one for one in found if isinstance(one, AccessStream)]
        others = [one for one in found if not isinstance(one, AccessStream)]
        if streams and others:
            raise InputError(f"{streams[0].format}, expected what {others[0].source} is", streams[0].source)
        made = merge_accesses(streams, from_zero=from_zero) if streams else joined(others, from_zero=from_zero)
        line = _store(made, output)
    click.echo(line)


@trace.command(short_help="The formats that are read.")
@_json
def formats(as_json: bool) -> None:
    """List the formats that are read, by the name that --input-format takes."""
    from pgemu.report.traces import table_of_formats
    from pgemu.trace.readers import formats as known

    _print(json.dumps(known(), indent=2) + "\n" if as_json else table_of_formats(known()))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
