"""What to type to record, on a machine where pgemu is not: lines for sh, made of the one table of events."""

from __future__ import annotations

from collections.abc import Iterator

from pgemu.trace.events import PERF_FIELDS, PROBE, PROBED, RECORDED

__all__ = ("WITH", "shell_lines")

WITH = ("trace-cmd", "perf", "tracefs")
"""What the lines use."""

_WIDTH = 100


def shell_lines(tool: str) -> str:
    """Return lines for sh that record a VM for a minute, as root; events that a kernel lacks are left out.

    :param tool: one of WITH
    """
    probe, last = {
        "trace-cmd": ("-e kprobes:kvm_memslot", _trace_cmd),
        "perf": (",kprobes:kvm_memslot", _perf),
        "tracefs": ("kprobes/kvm_memslot", _tracefs),
    }[tool]
    return "\n".join([*_probed(tool, probe), *_chosen(tool), *last()]) + "\n"


def _probed(tool: str, probe: str) -> Iterator[str]:
    yield f"# What pgemu reads of a VM, by {tool}: as root, for S seconds, to trace.txt."
    yield "T=${T:-/sys/kernel/tracing} S=${S:-60}"
    yield "# Memory slots: no event of the kernel's own, but a probe."
    yield f"F={PROBED[1]}; grep -qw {PROBED[0]} /proc/kallsyms && F={PROBED[0]}"
    yield f"P='{PROBE}'"
    yield f'if echo "p:kvm_memslot $F $P" >> "$T/kprobe_events"; then E="{probe}"; else E=""; fi'


def _chosen(tool: str) -> Iterator[str]:
    """A loop over the events, in lines that are not too long."""
    add = {"trace-cmd": "$E -e $s:$n", "perf": "$E,$s:$n", "tracefs": "$E $s/$n"}[tool]
    line = "for e in"
    for event in RECORDED:
        if len(line) + len(str(event)) > _WIDTH:
            yield line + " \\"
            line = "   "
        line += f" {event}"
    yield line
    yield "do"
    yield "    s=${e%%:*} n=${e#*:}"
    yield f'    if [ -d "$T/events/$s/$n" ]; then E="{add}"; fi'
    yield "done"


def _trace_cmd() -> Iterator[str]:
    yield "trace-cmd record $E -o trace.dat sleep $S"
    yield "trace-cmd report -i trace.dat > trace.txt"


def _perf() -> Iterator[str]:
    yield 'perf record -a -c 1 -e "${E#,}" -o perf.data -- sleep $S'
    yield f"perf script --show-lost-events -i perf.data -F {PERF_FIELDS} > trace.txt"


def _tracefs() -> Iterator[str]:
    yield 'echo 65536 > "$T/buffer_size_kb"'
    yield 'for e in $E; do echo 1 > "$T/events/$e/enable"; done'
    yield 'timeout $S cat "$T/trace_pipe" > trace.txt'
    yield 'for e in $E; do echo 0 > "$T/events/$e/enable"; done'
