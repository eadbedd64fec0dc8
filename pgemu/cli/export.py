"""`pgemu export`: physical addresses for simulators of DRAM, maps of DynamoRIO's, cores that gdb opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._guest import GUEST_GROUPS, configurations, guest_options, program, the_guest
from pgemu.cli._options import MACHINE_GROUPS
from pgemu.cli._output import check_output, say
from pgemu.cli.walk import find_root, table_options

if TYPE_CHECKING:
    from pgemu.exports.physical import PhysicalRun
    from pgemu.trace.accesses import AccessStream

__all__ = ("export",)

_RUN = (
    *("--design", "--like", "--pfnmap", "--page-size", "--as-posted", "--strict", "--input-format"),
    *("--max-memory", "--help"),
)
_design = click.option(
    "--design",
    type=click.Choice(["restructure", "pfnmap"]),
    required=True,
    help="Whose stage 2 maps the guest's memory.",
)
_output = click.option("-o", "--output", type=click.Path(), required=True, metavar="FILE", help="Where it is written.")


@click.group(short_help="Write what other tools read: traces for Ramulator, maps for drmemtrace, cores for gdb.")
def export() -> None:
    """Write what other tools read: physical addresses of a program's accesses, its page map, cores for gdb."""


def _told(found: AccessStream, run: PhysicalRun, more: list[str]) -> None:
    """What is assumed and what was left out, on stderr."""
    notes = [*run.program.options.notes(), *found.tally.notes, *more]
    counts = run.program.counts
    notes += [f"{counts[name]:,} accesses left out: {name}" for name in ("no memory", "not canonical") if counts[name]]
    if run.counts["without translation"]:
        notes.append(f"{run.counts['without translation']:,} addresses left out: the design does not map them")
    notes += [f"{count:,} operations ended in an error: {what}" for what, count in run.failed.items()]
    if found.tally.rejected:
        number, what = found.tally.first_rejected[0]
        notes.append(f"{found.tally.rejected:,} lines or records are not understood, the first is {number}: {what!r}")
    for note in notes:
        say(note)


@export.command(
    "phys-trace",
    short_help="A program's accesses as physical addresses, for Ramulator.",
    context_settings=grouped(
        {**GUEST_GROUPS, "What is written": ("--output", "--format", "--walks"), "What is run": _RUN, **MACHINE_GROUPS}
    ),
)
@click.argument("trace")
@_output
@_design
@click.option(
    "--format", "form", type=click.Choice(["ramulator2", "ramulator"]), default="ramulator2", show_default=True,
    help="Ramulator 2's load and store trace (LD 0x..), or Ramulator 1's memory trace (0x.. R).",
)  # fmt: skip
@click.option("--walks", is_flag=True, help="Before each access the entries that its nested walk reads; no TLB.")
@guest_options
def phys_trace(trace: str, output: str, **options: Any) -> None:
    """Write the host physical address of each access of a recorded program in a guest of one design.

    TRACE is as of pgemu guest, and so is the guest: pages get frames at their first touch, stage 2 is the design's. A
    line is an access, in the order of the trace; one that crosses a page's end is two. What is assumed is printed.
    """
    from pgemu.exports.physical import PhysicalRun, lines
    from pgemu.guest import GuestProgram
    from pgemu.whole_file import whole_file

    check_output(output)
    config = configurations(options, (options["design"],))[options["design"]]
    guest = GuestProgram(the_guest(options))
    with whole_file(output) as file, program(trace, options) as found:
        run = PhysicalRun(config, guest)
        for records in found.batches:
            for addresses, write in run.addresses(guest.feed(records), walks=options["walks"]):
                file.write(lines(options["form"], addresses, write).encode())
    _told(found, run, [])
    counts = run.counts
    walked = f", {counts['references']:,} entries of tables" if options["walks"] else ""
    click.echo(f"{output}: {counts['accesses']:,} accesses{walked}, {options['design']}")


@export.command(
    "v2p",
    short_help="A program's pages as a map of DynamoRIO's drmemtrace (v2p.textproto).",
    context_settings=grouped(
        {
            **GUEST_GROUPS,
            "What is written": ("--output", "--stage", "--space", "--each-size"),
            "What is run": _RUN,
            **MACHINE_GROUPS,
        }
    ),
)
@click.argument("trace")
@_output
@_design
@click.option(
    "--stage", type=click.Choice(["host", "guest"]), default="host", show_default=True,
    help="Physical addresses of the host, through the design's stage 2, or of the guest.",
)  # fmt: skip
@click.option(
    "--space", type=click.IntRange(0, 65535), default=0, show_default=True, metavar="N",
    help="Which address space, of a trace of several processes.",
)  # fmt: skip
@click.option(
    "--each-size", is_flag=True,
    help="A group for each page size. Without it all are cut to the smallest: DynamoRIO's reader knows one.",
)  # fmt: skip
@guest_options
def v2p(trace: str, output: str, **options: Any) -> None:
    """Write where the pages of a recorded program lie at its end, in a guest of one design.

    TRACE is as of pgemu guest, and so is the guest. The file is what DynamoRIO's drmemtrace takes beside a trace
    (v2p.textproto); pgemu reads it back, too. A page is as large as both stages let it be.
    """
    from pgemu.exports.physical import PhysicalRun
    from pgemu.exports.v2p import one_size, pages_of, text
    from pgemu.guest import GuestProgram
    from pgemu.whole_file import whole_file

    check_output(output)
    config = configurations(options, (options["design"],))[options["design"]]
    guest = GuestProgram(the_guest(options))
    with program(trace, options) as found:
        run = PhysicalRun(config, guest)
        for records in found.batches:
            for _ in run.addresses(guest.feed(records)):
                pass
    pages, missing = pages_of(run, options["space"], options["stage"])
    if not options["each_size"]:
        pages = one_size(pages)
    with whole_file(output) as file:
        for line in text(pages, [f"pgemu export v2p, {options['design']}, addresses of the {options['stage']}"]):
            file.write(line.encode())
    _told(found, run, [f"{missing:,} pages left out: the design does not map them"] if missing else [])
    click.echo(f"{output}: {pages.size.size:,} pages, {options['design']}")


@export.command("gdb", short_help="A memory image as a core that gdb opens, with a process's virtual addresses.")
@click.argument("image", metavar="IMAGE")
@_output
@table_options
@click.option(
    "--missing", type=click.Choice(["leave", "zero"]), default="leave", show_default=True,
    help="Memory that is mapped, but not in the image: left out, or zero (what a machine never wrote).",
)  # fmt: skip
def gdb(image: str, output: str, root: str | None, missing: str, **parameters: Any) -> None:
    """Write an ELF core that gdb opens: physical memory, and what one root's tables map at their virtual addresses.

    IMAGE is as of pgemu walk. gdb -c FILE then reads the process's memory at its own addresses, and physical address 0
    at 0xffff888000000000, where Linux's direct map has it without KASLR. There are no registers and no symbols.
    """
    from pgemu.exports.gdb import write_core
    from pgemu.images.image import open_image

    check_output(output)
    with open_image(image) as opened:
        where, fmt = find_root(opened, root, **parameters)
        done = write_core(opened, [(fmt, where)], output, missing_as_zero=missing == "zero")
    if done.missing:
        became = "reads as zero" if missing == "zero" else "left out"
        say(f"{done.missing:,} bytes are mapped, but not in the image: {became}")
    click.echo(
        f"{output}: {done.physical:,} bytes of physical memory, {done.virtual:,} mapped in {done.segments} ranges"
    )
