"""`pgemu record`: traces of real programs and VMs, made with the options of which pgemu reads the result."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._options import size
from pgemu.cli._output import check_output
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.recording.run import Ran

__all__ = ("record",)

_GROUPS = {
    "What is recorded": ("--with", "--pid", "--kvm", "--task", "--buffer", "--output"),
    "On another machine": ("--events", "--for", "--help"),
}


@click.command(
    short_help="Record a command, a process's memory or all VMs; or print how to elsewhere.",
    context_settings={"allow_interspersed_args": False, **grouped(_GROUPS)},
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] [COMMAND]...")
@click.option(
    "-o", "--output", metavar="FILE", help="Write to this file; text is compressed if it ends in .xz, .gz or .zst."
)
@click.option(
    "--with",
    "with",
    type=click.Choice(["perf", "trace-cmd", "valgrind", "strace"]),
    help="Tool that records COMMAND.  [default: the first that works]",
)
@click.option("--pid", type=click.IntRange(1), metavar="PID", help="Store what /proc says of this process's memory.")
@click.option(
    "--kvm",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Record KVM's events of all VMs for so long, by tracefs; as root.",
)
@click.option(
    "--task",
    "tasks",
    metavar="NAME",
    multiple=True,
    help="With --kvm: threads whose page faults and calls are wanted, as qemu* or CPU*. May be repeated.",
)
@click.option(
    "--buffer", type=size, metavar="SIZE", default="32M", show_default=True, help="With --kvm: ring buffer of each CPU."
)
@click.option("--events", is_flag=True, help="Print lines for sh that record a VM where pgemu is not.")
@click.option("--for", "for", type=click.Choice(["trace-cmd", "perf", "tracefs"]), help="With --events: for this only.")
def record(command: tuple[str, ...], **options: Any) -> None:
    """Record COMMAND, the memory of a process or all VMs, as a file that pgemu reads.

    COMMAND runs under a tool, and what the tool recorded becomes text. perf and trace-cmd: page faults, memory calls
    and KVM's events; without the privilege for these, perf: page faults. valgrind: every access (lackey). strace:
    memory calls and ioctls. The command's exit status is told, and FILE is kept whatever it is; Ctrl-C ends COMMAND
    early.

    --pid stores maps, smaps and pagemap in a zip file. Page frame numbers are there if CAP_SYS_ADMIN is.

    --kvm uses an instance of tracefs of its own, and a probe for memory slots; both are gone at the end. It tells what
    the kernel does not have.

    \b
    pgemu record -o faults.txt.xz -- python3 -c 'import numpy'
    pgemu record --kvm 60 --task 'qemu*' --task 'CPU*' -o vm.txt.zst
    pgemu record --events --for trace-cmd > record.sh

    Exit status: 0 if something was recorded, 2 if not.
    """
    _check(command, options)
    if options["events"]:
        from pgemu.recording.listing import WITH, shell_lines

        click.echo("\n".join(map(shell_lines, [options["for"]] if options["for"] else WITH)), nl=False)
        return
    output = options["output"]
    check_output(output)
    if options["pid"]:
        _snapshot(options["pid"], output)
    elif options["kvm"]:
        _kvm(output, options)
    else:
        _command(command, options["with"], output)


def _check(command: tuple[str, ...], options: dict[str, Any]) -> None:
    """Refuse options that do not belong together."""
    modes = {"COMMAND": bool(command), "--pid": options["pid"], "--kvm": options["kvm"], "--events": options["events"]}
    chosen = [name for name, given in modes.items() if given]
    if len(chosen) != 1:
        found = f"{' and '.join(chosen)} at once" if chosen else "nothing to record"
        raise InputError(f"{found}: expected one of COMMAND, --pid, --kvm, --events (pgemu record --help)")
    from click.core import ParameterSource

    context = click.get_current_context()
    of_modes = {"with": "COMMAND", "tasks": "--kvm", "buffer": "--kvm", "for": "--events"}
    for name, mode in of_modes.items():
        given = context.get_parameter_source(name) if context else ParameterSource.DEFAULT
        if given is ParameterSource.COMMANDLINE and mode != chosen[0]:
            raise InputError(f"--{name.removesuffix('s')}: expected {mode} with it, not {chosen[0]}")
    if (options["output"] is None) != (chosen[0] == "--events"):
        raise InputError("-o: expected a file to write to" if options["output"] is None else "-o: --events prints")


def _command(command: tuple[str, ...], tool: str | None, output: str) -> None:
    from pgemu.recording.run import run
    from pgemu.recording.sink import opened
    from pgemu.recording.tools import check_command, choose

    check_command(command)
    way = choose(tool)
    with opened(output) as sink:
        ran = run(way, command, sink)
    click.echo(f"{output}: {way.tool} ({way.what}), {_lines(sink.lines)}; {_status(ran)}{_early(ran.stopped)}")
    _say_text(output)


def _say_text(output: str) -> None:
    """A name that promises a table holds text all the same, which whoever opens it has to know."""
    if output.lower().endswith((".parquet", ".csv")):
        click.echo(f"{output}: text, whatever its name says; pgemu trace convert makes a table of it")


def _status(ran: Ran) -> str:
    if ran.status is None:
        return "the command's exit status is not told by this tool"
    if ran.status >= 0:
        return f"the command's exit status is {ran.status}"
    try:
        return f"the command was ended by {signal.Signals(-ran.status).name}"
    except ValueError:
        return f"the command was ended by signal {-ran.status}"


def _early(stopped: bool) -> str:
    return ", stopped early" if stopped else ""


def _lines(count: int) -> str:
    return f"{count:,} line{'s' * (count != 1)}"


def _snapshot(pid: int, output: str) -> None:
    from pgemu.recording.snapshot import take

    found = take(pid, output)
    about = found.about
    hidden = "" if about["pfns"] or not about["present"] else ", without frame numbers (CAP_SYS_ADMIN shows them)"
    skipped = f", not scanned: {', '.join(about['skipped'])}" if about["skipped"] else ""
    what = f"{about['mappings']} mappings, {about['present']:,} pages present"
    click.echo(f"{output}: process {pid} ({about['comm']}), {what}{hidden}{skipped}")


def _kvm(output: str, options: dict[str, Any]) -> None:
    from pgemu.recording import tracefs
    from pgemu.recording.sink import opened

    with opened(output) as sink:
        found = tracefs.record(options["kvm"], sink, tasks=options["tasks"], buffer=options["buffer"])
    missing = f"; not in this kernel: {', '.join(found.missing)}" if found.missing else ""
    click.echo(f"{output}: {found.seconds:.3g} s, {_lines(sink.lines)}{_early(found.stopped)}{missing}")
    _say_text(output)
