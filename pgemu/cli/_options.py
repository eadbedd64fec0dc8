"""What several commands take: sizes, slots, progress, and the options that are fields of a machine."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ("FIELDS", "Bar", "check", "machine_options", "memslot", "number", "parameter", "size", "vm_process")

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_NUMBER = re.compile(r"(?:0x_?)?[0-9a-f]+(?:_[0-9a-f]+)*", re.IGNORECASE)
_LARGEST = 1 << 52  # physical addresses of x86-64
_PROGRESS_AFTER = 1.0  # seconds


def number(text: str) -> int:
    """Return a number as kernels and crash print it, hexadecimal with or without 0x: "0x7f0000000000", "fffea0000".

    :raises click.BadParameter: anything else, or more than 64 bits
    """
    value = int(text.lower().removeprefix("0x").replace("_", ""), 16) if _NUMBER.fullmatch(text) else -1
    if not 0 <= value < 1 << 64:
        raise click.BadParameter(f"{text!r}: expected a number of 64 bits, in hexadecimal with or without 0x")
    return value


def size(text: str) -> int:
    """Return bytes: "16G", "512MiB", "4096", "0x100000". click.BadParameter for anything else."""
    match = _SIZE.fullmatch(text.strip())
    value = int(match[1], 0 if match[1].lower().startswith("0x") else 10) * _UNITS[match[2].lower()] if match else -1
    if not 0 <= value <= _LARGEST:
        raise click.BadParameter(f"{text!r}: expected a size or an address like 16G, 512M or 0x80000000")
    return value


def parameter(text: str) -> tuple[str, float]:
    """Return name and value of a workload's parameter: "flips=1000", "late=0.5", "guest_memory=64M".

    :raises click.BadParameter: anything else
    """
    name, _, given = text.partition("=")
    name = name.strip().replace("-", "_")
    if not name or not given.strip():
        raise click.BadParameter(f"{text!r}: expected KEY=VALUE")
    from pgemu.workload import WORKLOADS, parameters_of

    if not any(name in parameters_of(one) for one in WORKLOADS):
        raise click.BadParameter(f"{name!r}: no workload has such a parameter (pgemu workload list)")
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(given)
    try:
        return name, size(given)
    except click.BadParameter:
        raise click.BadParameter(f"{text!r}: expected a number, or a size like 64M, for {name}") from None


def memslot(text: str) -> tuple[int, int, int | None, int | None]:
    """Return GPA, size, offset (None: wherever it fits) and host address (None: not known) of "0x0:512M", "4G:1G:1G",
    "0:1G::0x7f3a40000000".

    :raises click.BadParameter: anything else, or what is no multiple of 4096
    """
    gpa, *others = text.split(":")
    parts = [size(gpa), *(size(part) if part or not place else None for place, part in enumerate(others))]
    given = [part for part in parts if part is not None]
    if len(parts) not in (2, 3, 4) or parts[-1] is None or any(part % 4096 for part in given) or parts[1] == 0:
        raise click.BadParameter(
            f"{text!r}: expected GPA:SIZE or GPA:SIZE:OFFSET or GPA:SIZE:[OFFSET]:HVA, multiples of 4K"
        )
    offset, hva = [*parts[2:], None, None][:2]
    return given[0], given[1], offset, hva


def vm_process(text: str) -> int | Literal["all"]:
    """Return "all" or the number of a process. click.BadParameter for anything else."""
    if text == "all":
        return "all"
    if not text.isascii() or not text.isdigit():
        raise click.BadParameter(f"{text!r}: expected the number of a process, or all")
    return int(text)


def check(text: str) -> Literal["end", "every"] | int:
    """Return "end", "every" or a positive number. click.BadParameter for anything else."""
    if text == "end":
        return "end"
    if text == "every":
        return "every"
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise click.BadParameter(f"{text!r}: expected end, every, or a number of operations")
    return int(text)


class Bar:
    """A progress bar on stderr: only on a terminal, and only once some seconds have gone by.

    rate: also show how much is done in a second.
    """

    def __init__(self, after: float | None = None, rate: bool = False) -> None:
        self._after = _PROGRESS_AFTER if after is None else after
        self._rate = rate
        self._began = time.monotonic()
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, int]] = {}  # when each was first told of, and how much was done then

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how much of something is done; `total` 0: nobody knows of how much."""
        if not self._shown or time.monotonic() - self._began < self._after:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress, TextColumn

            columns = [TextColumn("{task.fields[rate]}")] if self._rate else []
            self._bar = Progress(
                *Progress.get_default_columns(), *columns, console=Console(stderr=True), transient=True
            )
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total or None, rate="")
            self._first[what] = time.monotonic(), done
        began, first = self._first[what]
        seconds = time.monotonic() - began
        rate = f"{(done - first) / seconds:,.0f}/s" if self._rate and seconds else ""
        self._bar.update(self._tasks[what], completed=done, rate=rate)


# --------------------------------------------------------------------------- fields of a machine

# The names of pgemu.machine.config.DEFECTS, which would have to import numpy.
_DEFECTS = (
    "allocation-race", "convert-keeps-leaves", "cut-huge-pfn", "hole-zeroes-from-start", "huge-over-private",
    "insert-unlocked", "mapping-order", "merge-keeps-flag", "punch-keeps-entries", "rollback-at-zero", "unbind-dying",
    "uptodate-unzeroed",
)  # fmt: skip
_OF_VERSION = "  [default: the version's]"


def _choice(name: str, choices: str, text: str) -> Any:
    return click.option(f"--{name}", type=click.Choice(choices.split("|")), help=text)


_OPTIONS = (
    _choice("kernel", "6.12|6.18|7.3", f"Linux whose entries and struct pages are written.{_OF_VERSION}"),
    _choice("vm", "plain|sw|snp|tdx", "Kind of VM.  [default: the trace's, or by what it needs]"),
    _choice("private-level", "4K|2M|1G", "Largest leaf over private memory.  [default: the VM kind's]"),
    _choice("stage2", "ept|npt", "Stage-2 format.  [default: the trace's, or npt]"),
    click.option("--hvo/--no-hvo", default=None, help="Optimise the vmemmap of HugeTLB pages.  [default: hvo]"),
    click.option(
        "--vcpus",
        type=click.IntRange(1, 4096),
        metavar="N",
        help="CPUs of the VM, for the price of flushes.  [default: the trace's, or 1]",
    ),
    click.option(
        "--host-cpus",
        type=click.IntRange(1, 8192),
        metavar="N",
        help="CPUs of the host, for the same.  [default: those of the profile's machine, or 1]",
    ),
    click.option(
        "--profile",
        metavar="NAME|FILE",
        default="published",
        show_default=True,
        help="Prices: published, e7-8895, epyc-252vcpu, guest-2vcpu, or a file of pgemu calibrate.",
    ),
    _choice("order", "rfc2|fixup|jan2026|next4k", f"Order of steps.{_OF_VERSION}"),
    _choice("batch", "range|block", f"All of a range or nothing, or one huge page after the other.{_OF_VERSION}"),
    _choice("split-form", "rfc2|jan2026", f"Split and merge page by page, or in place.{_OF_VERSION}"),
    _choice("split-to", "4K|2M", "What a 1G folio is split to; 2M: 4K where touched (what-if)."),
    _choice("merge", "now|lazy", "Merge as the conversion ends, or by the worker (what-if)."),
    _choice("flush", "each|batched", "Flush as posted, or once per conversion (what-if)."),
    _choice("zap", "exact|rounded", "Drop leaves of the range, or of its huge pages (what-if)."),
    _choice("zap-filter", "both|target", "Of a TDX VM: drop leaves of both kinds, or of the one left."),
    _choice("invalidate", "rounded|exact", "Invalidate over huge pages, or over the range."),
    _choice("merge-zero", "none|unzeroed", "What a merge zeroes: nothing, or what never was."),
    _choice("zero", "folio|page", f"What a first use zeroes, in both designs.{_OF_VERSION[:-1]}, pfnmap: page]"),
    _choice("punch", "zero|refuse", f"Holes below a huge page: zeroed, or -EINVAL.{_OF_VERSION}"),
    _choice(
        "level-rule",
        "uniform|whole|private",
        "Guest leaves of pfnmap: largest block of one kind, whole pages, private only.",
    ),
    click.option("--host-huge", is_flag=True, default=None, help="pfnmap also maps 2M and 1G pages into processes."),
    click.option(
        "--allow-unsafe-mappings",
        is_flag=True,
        default=None,
        help="KVM's parameter: nested maps of pfnmap take frames that nothing holds.",
    ),
    _choice("memory-failure", "handled|marked", "What memory failure does to huge folios of guest_memfd."),
    _choice("poisoned-blocks", "refuse|move", "Converting a poisoned huge page: -EHWPOISON, or its page alone is bad."),
    click.option("--mf-delayed", is_flag=True, default=None, help="MF_DELAYED of guest_memfd is success (v6, 2026)."),
    _choice("iommu", "vtd|amd", "Unit of the trace's devices.  [default: vtd with EPT, else amd]"),
    _choice("dma", "vfio|iommufd", "What maps for them.  [default: what trace and WHO need, or vfio]"),
    click.option(
        "--iommu-unmaps",
        type=click.Choice(("refused", "none", "vmm", "vmm-late", "notifier", "revoke", "mirror")),
        metavar="WHO",
        help="Who takes from devices what becomes private: above.  [default: refused]",
    ),
    _choice("worker", "immediate|queued", "Work items run at once, or wait for a record of the trace."),
    click.option(
        "--lru-cache", is_flag=True, default=None, help="4K folios wait in LRU batches, which hold references."
    ),
    click.option(
        "--defect",
        "defects",
        type=click.Choice(_DEFECTS),
        metavar="NAME",
        multiple=True,
        help=f"One of {len(_DEFECTS)} defects of posted code (pgemu defects lists them). May be repeated.",
    ),
)

MACHINE_GROUPS = {
    "The machine": (
        "--kernel", "--vm", "--private-level", "--stage2", "--hvo", "--vcpus", "--host-cpus", "--profile",
    ),
    "Conversions of restructure": (
        "--order", "--batch", "--split-form", "--split-to", "--merge", "--merge-zero", "--flush", "--zap",
        "--zap-filter", "--invalidate",
    ),
    "Both designs, and pfnmap": (
        "--zero", "--punch", "--level-rule", "--host-huge", "--allow-unsafe-mappings", "--memory-failure",
        "--poisoned-blocks", "--mf-delayed", "--worker", "--lru-cache", "--defect",
    ),
    "Devices of the trace": ("--iommu", "--dma", "--iommu-unmaps"),
}  # fmt: skip
"""These options by heading, for --help."""

FIELDS = (
    "kernel", "vm", "private_level", "stage2", "hvo", "vcpus", "host_cpus", "profile", "order", "batch",
    "split_form", "split_to", "merge", "flush", "zap", "zap_filter", "invalidate", "zero", "merge_zero", "punch",
    "level_rule", "host_huge", "allow_unsafe_mappings", "memory_failure", "poisoned_blocks", "mf_delayed", "worker",
    "lru_cache", "iommu", "dma", "iommu_unmaps",
)  # fmt: skip
"""Fields of Config that the options give as they are; None is what the version or the trace says."""


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that are fields of a machine."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
