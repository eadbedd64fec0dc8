"""Forms of output that are not read: what they are called, and the option that prints one that is.

Sources: kernel/trace/trace.c (print_raw_fmt(), print_hex_fmt()), kernel/trace/trace_functions_graph.c,
kernel/trace/trace_output.c (trace_print_lat_context(), print_event_fields()), tools/perf/builtin-script.c,
tools/perf/builtin-trace.c, trace-cmd's tracecmd/trace-read.c:print_handle_file().
"""

from __future__ import annotations

import re

from pgemu.trace.events import PERF_FIELDS

__all__ = ("WHOLE", "form_of", "is_quoted", "raw_fields")

_HEAD = 512
"""How much of a line is looked at, so that a long one costs no more than a short one."""

_QUOTED_TEXT, _TABLE = "text quoted as in a mail", "a table as text (CSV) without a header that names the column op"
WHOLE = _QUOTED_TEXT, _TABLE
"""Forms of which no line is the rest of a log's."""
_QUOTED = r">(?: ?>)*(?:\s|$)"
_SCRIPT = f"print with perf script -F {PERF_FIELDS}"
_FORMS = tuple(
    (re.compile(shape), name, help_)
    for shape, name, help_ in (
        (
            rf"{_QUOTED}.*",
            _QUOTED_TEXT,
            "cut the marks off: sed -E 's/^(> ?)+//'",
        ),
        (
            r'"?\w+"?(?:[,;\t]"?[\w.|+-]*"?)+',
            _TABLE,
            "its columns are those of pgemu compare --help",
        ),
        (
            r"(?:\s*[\d.]+ \|)?\s*\d+\)(?:\s.*)?[|=>].*| ?-{20,}",
            "output of the function_graph tracer",
            "select no tracer: echo nop > current_tracer",
        ),
        (
            r"\s*(?:\d+\.\d{3}|\?) \(.*?\): .*|\s*\d+\.\d{3} .*[\w:]+\(.*\)(?: = .*)?",
            "output of perf trace",
            "record with perf record -a -e 'kvm:*', print with perf script",
        ),
        (
            r"\s*\S+:\s+(?:cpus|version)\s*=\s*\d+\s*",
            "several files or instances in one report of trace-cmd",
            "report one alone",
        ),
        (
            r"\s*\[?\d*\]?\s*\d+\.\d{6,9}:\s+\S.*|.*?\s\[\d+\]\s+\d+\.\d{6,9}:\s+[\w-]+:[\w-]+:.*",
            "output of perf script without its task",
            _SCRIPT,
        ),
        (
            r"\s*\S.*?\s+\d+(?:/\d+)?\s+(?:\[\d+\]\s+)?[\w-]+:[\w-]+:\s.*",
            "output of perf script without its time stamps",
            _SCRIPT,
        ),
        (
            r"\s*\S.*\s\d+\s+\d+ \d+ [0-9a-f]{8} [0-9a-f]{8,} \[[0-9a-f]{8,16}\] .*",
            "the verbose latency format",
            "print without it: echo noverbose > trace_options",
        ),
        (
            r"(?:\[pid\s+\d+\] |\d+ +)?(?:[\d:.]+ )?\w+\(.*(?:\) += .*|<unfinished \.\.\.>)",
            "output of strace among events",
            "give each as a file of its own",
        ),
        (
            r"(?:kvm|sys|page_fault|hugetlbfs|tlb)_\w+(?::|\().*",
            "ftrace's events without task and time",
            "print them: echo context-info > trace_options",
        ),
        (r"\d+ \d+ \d+ \S.*", "ftrace's raw format", "print without it: echo noraw > trace_options"),
        (r"(?:[0-9a-f]{2,16} )+[0-9a-f]*", "ftrace's hex format", "print without it: echo nohex > trace_options"),
        (
            r"(?:\d+ )?0x[0-9a-f]+ \[0x[0-9a-f]+\]: (?:event|PERF_RECORD_).*|\. \.\.\. raw event: .*",
            "a raw dump of perf",
            "print without -D",
        ),
        (
            r"Attaching \d+ probes?\.\.\.",
            "output of bpftrace, which is whatever its script prints",
            "record the events of KVM with ftrace, trace-cmd or perf",
        ),
        (
            r"(?:\d+@\d+\.\d+:)?kvm_(?:convert_memory|set_user_memory)\b.*",
            "output of QEMU's -trace",
            "give it alone (--input-format qemu-log)",
        ),
        (
            r"\[\d+:\d+:\d+\.\d+\] \(\+.*",
            "output of babeltrace",
            "record the events of KVM with ftrace, trace-cmd or perf",
        ),
        (r"(?:.*?\s)?[\w-]+:[\w-]+:(?:\s.*)?", "output of perf script with other columns", _SCRIPT),
    )
)


def form_of(line: str) -> str | None:
    """What a line that holds no event is of, with what helps, as a message says it; None for no known form."""
    for shape, name, help_ in _FORMS:
        if shape.fullmatch(line[:_HEAD]):
            return f"{name}: {help_}"
    return None


def is_quoted(line: str) -> bool:
    """Whether a line begins with a mail's mark of quoted text; the kernel's begin with blanks or a task's name."""
    return line[:1] == ">" and re.match(_QUOTED, line[:_HEAD]) is not None


_RAW = re.compile(r"\S+\s+(?:\w+=\S*(?:\s+\(\S*\))?(?:\s+|$))+")


def raw_fields(event: str) -> str | None:
    """What an event is whose fields are not printed as the kernel's format says, with what helps; None if they are."""
    if len(event.split()) < 2:
        return "an event without its fields: print them (perf script -F +trace)"
    return "raw fields: print without -R, or echo nofields > trace_options" if _RAW.fullmatch(event) else None
