"""What commands take that run a recorded program in a guest, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._options import Bar, machine_options, size
from pgemu.cli._trace import given_fields, version_options, versions
from pgemu.cli._trace_options import input_format
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.guest import GuestOptions
    from pgemu.machine.config import Config
    from pgemu.trace.accesses import AccessStream

__all__ = ("GUEST_GROUPS", "configurations", "guest_options", "program", "the_guest")

GUEST_GROUPS = {
    "The guest": (
        *("--guest-memory", "--allocation", "--fragmentation", "--private", "--io-rate", "--io", "--bounce-size"),
        "--seed",
    ),
}
_GUEST = (
    click.option("--guest-memory", type=size, metavar="SIZE", default="4G", show_default=True, help="Its memory."),
    click.option(
        "--allocation",
        type=click.Choice(["sequential", "random", "thp"]),
        default="sequential",
        show_default=True,
        help="Frames at the first touch of a page; thp: 2M where a 2M range is first touched.",
    ),
    click.option(
        "--fragmentation",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="SHARE",
        help="2M blocks that cannot be a huge page.",
    ),
    click.option(
        "--private/--shared", default=True, show_default=True, help="A confidential VM, or all memory shared."
    ),
    click.option(
        "--io-rate",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="SHARE",
        help="Accesses after which a page of I/O happens.",
    ),
    click.option(
        "--io",
        type=click.Choice(["bounce", "convert", "direct"]),
        default="bounce",
        show_default=True,
        help="Through shared buffers, by converting the page, or (shared) as it is.",
    ),
    click.option(
        "--bounce-size", type=size, metavar="SIZE", default="64M", show_default=True, help="The shared buffers."
    ),
    click.option(
        "--seed", type=click.IntRange(0, (1 << 63) - 1), default=0, show_default=True, help="Of what is drawn."
    ),
)
_RUN = (
    click.option(
        "--page-size", type=click.Choice(["4K", "2M", "1G"]), help="Size of pages.  [default: 1G, of next 4K]"
    ),
    click.option(
        "--input-format", type=input_format, metavar="NAME", help="Format of the trace (pgemu trace formats)."
    ),
    click.option("--max-memory", type=size, metavar="SIZE", help="Stop when reading takes more memory."),
)


def guest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the guest, of the version and the machine that it runs on, and of reading its trace."""
    for option in reversed((*_GUEST, version_options, *_RUN, machine_options)):
        command = option(command)
    return command


def the_guest(options: dict[str, Any]) -> GuestOptions:
    """The guest that the options say. InputError where there is none."""
    from pgemu.guest import GuestOptions

    try:
        return GuestOptions(
            options["guest_memory"], options["allocation"], options["seed"], options["fragmentation"],
            options["private"], options["io_rate"], options["io"], options["bounce_size"],
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None


def configurations(options: dict[str, Any], designs: tuple[str, ...]) -> dict[str, Config]:
    """The machine of each design. InputError where there is none."""
    try:
        page = options["page_size"] or ("4K" if options["like"] == "next" else "1G")
        given = {name: value for name, value in given_fields(options).items() if value is not None}
        given.setdefault("vm", "sw" if options["private"] else "plain")
        pool = -(-options["guest_memory"] // (1 << 30)) << 30
        return {
            design: versions(options).configuration(design, pool=pool, page_size=size(page), **given)
            for design in designs
        }
    except ValueError as error:
        raise InputError(str(error)) from None


@contextmanager
def program(trace: str, options: dict[str, Any]) -> Iterator[AccessStream]:
    """A recording of addresses, read while a bar shows how far. InputError for any other trace, and for none in it."""
    from pgemu.trace import opened
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.watching import limited, watched

    with Bar() as bar, watched(limited(partial(bar, "reading"), options["max_memory"])):
        found = opened(trace, None, options["input_format"])
        if not isinstance(found, AccessStream):
            raise InputError(
                "a trace of a VM or of processes, expected a program's addresses: pgemu record --with valgrind", trace
            )
        try:
            yield found
        except ValueError as error:
            raise InputError(str(error), trace) from None
        finally:
            found.close()
    if not found.tally.records:
        raise InputError("no access in it", trace)
