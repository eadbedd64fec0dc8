"""What commands take that read a trace: its format, and how a log is laid over guest memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._options import memslot, size, vm_process
from pgemu.cli._output import say
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.trace.lowered import LoweringOptions
    from pgemu.trace.qemu_mtree import Memory

__all__ = ("OF_LOGS", "TRACE_GROUP", "input_format", "lowering", "trace_options")


def input_format(text: str) -> str:
    """Return the name of a format that is read. click.BadParameter for anything else."""
    from pgemu.trace.readers import formats

    if text not in (known := sorted(formats())):
        raise click.BadParameter(f"{text!r}: expected one of {', '.join(known)}")
    return text


def memslots_from(text: str) -> Memory:
    """Return the memory that a file of QEMU's info mtree tells of, and say on stderr what of it is no slot."""
    from pgemu.trace.qemu_mtree import memory_of

    found = memory_of(text)
    others = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
    slots = f"{len(found.slots)} memory slot{'s' * (len(found.slots) != 1)}"
    say(f"--memslots-from {text}: {slots}{f'; left out: {others}' if others else ''}")
    return found


_OPTIONS = (
    click.option(
        "--input-format",
        "input_format",
        type=input_format,
        metavar="NAME",
        help="Format of the trace (pgemu trace formats).  [default: as its content says]",
    ),
    click.option(
        "--page-size",
        type=click.Choice(["4K", "2M", "1G"]),
        help="Size of the pages.  [default: 1G, of --like next 4K]",
    ),
    click.option(
        "--guest-memory", type=size, metavar="SIZE", help="Size of the guest_memfd.  [default: what the trace needs]"
    ),
    click.option(
        "--init",
        type=click.Choice(["private", "shared", "auto"]),
        default="auto",
        show_default=True,
        help="Memory at first; auto: private if it converts or is used as such, or of a TD.",
    ),
    click.option(
        "--dontneed",
        type=click.Choice(["punch", "zap"]),
        help="What gives memory back.  [default: punch for madvise, else zap]",
    ),
    click.option(
        "--memslot",
        "memslots",
        type=memslot,
        metavar="GPA:SIZE(:(OFFSET)(:HVA))",
        multiple=True,
        help="A memory slot, in place of the trace's; HVA tells host addresses. May be repeated.",
    ),
    click.option(
        "--memslots-from",
        type=memslots_from,
        metavar="FILE",
        help="Memory slots as QEMU's monitor prints them: info mtree -f.",
    ),
    click.option(
        "--vm-process",
        "vm_processes",
        type=vm_process,
        metavar="PID|all",
        multiple=True,
        help="Process of a log's VM; may be repeated, all merges what it holds.  [default: the only one]",
    ),
    click.option(
        "--tdx-shared-bit",
        type=click.Choice(["auto", "none", "47", "51"]),
        default="auto",
        show_default=True,
        help="Bit that says shared in guest addresses of a TD's log.",
    ),
    click.option(
        "--fault-address",
        type=click.Choice(["auto", "physical", "virtual"]),
        default="auto",
        show_default=True,
        help="What a log's guest faults print; auto: as they look.",
    ),
    click.option(
        "--requests",
        type=click.Choice(["done", "ignored"]),
        default="done",
        show_default=True,
        help="Conversions that the guest asks for, in a log without kvm_vm_set_mem_attributes.",
    ),
    click.option(
        "--early-slots",
        type=click.Choice(["stand", "absent"]),
        default="stand",
        show_default=True,
        help="Slots that the guest uses before a log's first slot line.",
    ),
    click.option(
        "--iova",
        type=click.Choice(["ignored", "guest"]),
        default="ignored",
        show_default=True,
        help="What a log's iommu:map names: nobody knows whose, or the guest's addresses.",
    ),
    click.option(
        "--kind",
        type=click.Choice(["auto", "guest", "process"]),
        default="auto",
        show_default=True,
        help="Whose memory a log is about; auto: a process's if nothing in it is KVM's.",
    ),
    click.option(
        "--area-gap",
        type=size,
        default="2M",
        show_default=True,
        metavar="SIZE",
        help="Of a process: up to which gap what it touches, and no line maps, is one area.",
    ),
    click.option(
        "--fault-kind",
        type=click.Choice(["write", "read"]),
        default="write",
        show_default=True,
        help="Of a process: what a fault is that does not say it, where memory can be written.",
    ),
    click.option(
        "--new-tasks",
        type=click.Choice(["auto", "process", "thread"]),
        default="auto",
        show_default=True,
        help="Of a process: what a task is that nothing in the log makes.",
    ),
)

TRACE_GROUP = {
    "The trace and its memory": (
        *("--input-format", "--guest-memory", "--init", "--dontneed", "--memslot", "--memslots-from"),
        *("--vm-process", "--tdx-shared-bit", "--fault-address", "--requests", "--early-slots", "--iova"),
        *("--kind", "--area-gap", "--fault-kind", "--new-tasks"),
    ),
}
"""These options by heading, for --help."""

OF_LOGS = {
    "dontneed": None,
    "tdx_shared_bit": "auto",
    "fault_address": "auto",
    "requests": "done",
    "early_slots": "stand",
    "iova": "ignored",
    "kind": "auto",
    "area_gap": 2 << 20,
    "fault_kind": "write",
    "new_tasks": "auto",
}
"""Options that say how a log is read, and what they are without being asked for."""


def trace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say how a trace is read."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def lowering(options: Mapping[str, Any], page_size: str = "1G") -> LoweringOptions:
    """How a log is laid over guest memory, as the options of a command say.

    :param page_size: where --page-size is not given
    """
    from pgemu.trace import GivenSlot, LoweringOptions

    memory: Memory | None = options["memslots_from"]
    if memory is not None and options["memslots"]:
        raise InputError("--memslots-from: expected no --memslot beside it")
    return LoweringOptions(
        page_size=size(options["page_size"] or page_size),
        init=options["init"],
        dontneed=options["dontneed"],
        memslots=tuple(GivenSlot(*slot) for slot in options["memslots"]) if memory is None else memory.slots,
        other_ranges=() if memory is None else memory.others,
        guest_memory=options["guest_memory"],
        vm_processes=options["vm_processes"],
        tdx_shared_bit=options["tdx_shared_bit"],
        fault_address=options["fault_address"],
        requests=options["requests"],
        early_slots=options["early_slots"],
        iova=options["iova"],
        kind=options["kind"],
        area_gap=options["area_gap"],
        fault_kind=options["fault_kind"],
        new_tasks=options["new_tasks"],
    )
