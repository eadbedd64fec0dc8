"""`pgemu guest`: a recorded program in a guest, and what the guest pays for each design's mapping level."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._options import MACHINE_GROUPS, Bar, machine_options, size
from pgemu.cli._trace import given_fields, version_options, versions
from pgemu.cli._trace_options import input_format
from pgemu.errors import InputError

__all__ = ("guest",)

_GROUPS = {
    "The guest": (
        *("--guest-memory", "--allocation", "--fragmentation", "--private", "--io-rate", "--io", "--bounce-size"),
        "--seed",
    ),
    "Its TLBs": ("--processor", "--tlb-vcpus"),
    "What is run": (
        *("--design", "--like", "--pfnmap", "--page-size", "--as-posted", "--strict", "--input-format"),
        *("--max-memory", "--format", "--help"),
    ),
    **MACHINE_GROUPS,
}


@click.command(
    short_help="Run a recorded program in a guest: what each design's mapping level costs it.",
    context_settings=grouped(_GROUPS),
)
@click.argument("trace")
@click.option("--guest-memory", type=size, metavar="SIZE", default="4G", show_default=True, help="Its memory.")
@click.option(
    "--allocation", type=click.Choice(["sequential", "random", "thp"]), default="sequential", show_default=True,
    help="Frames at the first touch of a page; thp: 2M where a 2M range is first touched.",
)  # fmt: skip
@click.option(
    "--fragmentation", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="SHARE",
    help="2M blocks that cannot be a huge page.",
)  # fmt: skip
@click.option("--private/--shared", default=True, show_default=True, help="A confidential VM, or all memory shared.")
@click.option(
    "--io-rate", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="SHARE",
    help="Accesses after which a page of I/O happens.",
)  # fmt: skip
@click.option(
    "--io", type=click.Choice(["bounce", "convert", "direct"]), default="bounce", show_default=True,
    help="Through shared buffers, by converting the page, or (shared) as it is.",
)  # fmt: skip
@click.option("--bounce-size", type=size, metavar="SIZE", default="64M", show_default=True, help="The shared buffers.")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), default=0, show_default=True, help="Of what is drawn.")
@click.option(
    "--processor", default="skylake-sp", show_default=True, metavar="NAME", help="Whose TLBs: skylake-sp, zen, zen3."
)
@click.option(
    "--tlb-vcpus", type=click.IntRange(1, 256), default=1, show_default=True, metavar="N",
    help="vCPUs with TLBs of their own.",
)  # fmt: skip
@click.option(
    "--design", "designs", type=click.Choice(["restructure", "pfnmap"]), multiple=True,
    help="One design alone. May be repeated.",
)  # fmt: skip
@version_options
@click.option("--page-size", type=click.Choice(["4K", "2M", "1G"]), help="Size of pages.  [default: 1G, of next 4K]")
@click.option("--input-format", type=input_format, metavar="NAME", help="Format of the trace (pgemu trace formats).")
@click.option("--max-memory", type=size, metavar="SIZE", help="Stop when reading takes more memory.")
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True, help="What is printed."
)
@machine_options
def guest(trace: str, **options: Any) -> None:
    """Run a recorded program in a guest on both designs, and count what its translations cost.

    TRACE is a recording of addresses: text of Valgrind's Lackey or Pin's pinatrace, a trace of DynamoRIO's drmemtrace
    or ChampSim, DAMON's regions, or Parquet of one (pgemu trace convert). Each page that is touched first takes a frame
    of the guest; stage 2 is the design's, page by page as it is then; I/O makes the conversions that it would. Every
    access goes through TLBs and paging-structure caches: misses, entries that walks read, and the sizes that are hit.

    What nobody recorded is assumed, and each assumption is printed.
    """
    from pgemu.guest import GuestOptions, run_accesses
    from pgemu.machine.designs import DESIGNS
    from pgemu.report.guest import text
    from pgemu.trace import opened
    from pgemu.trace.accesses import AccessStream
    from pgemu.trace.watching import limited, watched

    chosen = tuple(dict.fromkeys(options["designs"])) or DESIGNS
    try:
        asked = GuestOptions(
            options["guest_memory"], options["allocation"], options["seed"], options["fragmentation"],
            options["private"], options["io_rate"], options["io"], options["bounce_size"],
        )  # fmt: skip
        page = options["page_size"] or ("4K" if options["like"] == "next" else "1G")
        given = {name: value for name, value in given_fields(options).items() if value is not None}
        given.setdefault("vm", "sw" if options["private"] else "plain")
        pool = -(-options["guest_memory"] // (1 << 30)) << 30
        configs = {
            design: versions(options).configuration(design, pool=pool, page_size=size(page), **given)
            for design in chosen
        }
    except ValueError as error:
        raise InputError(str(error)) from None
    with Bar() as bar, watched(limited(partial(bar, "reading"), options["max_memory"])):
        found = opened(trace, None, options["input_format"])
        if not isinstance(found, AccessStream):
            raise InputError("a trace of a VM or of processes, expected a program's addresses", trace)
        try:
            result = run_accesses(
                found.batches, configs, asked, processor=options["processor"], vcpus=options["tlb_vcpus"]
            )
        except ValueError as error:
            raise InputError(str(error), trace) from None
        finally:
            found.close()
    tally = found.tally
    if not tally.records:
        raise InputError("no access in it", trace)
    if options["form"] == "json":
        about = {"source": trace, "format": found.format, "rejected": tally.rejected, "notes": list(tally.notes)}
        sys.stdout.write(json.dumps({"trace": about, **result.to_json()}, indent=2) + "\n")
    else:
        sys.stdout.write(f"{trace}: {found.format}\n{text(result)}")
        for note in tally.notes:
            sys.stdout.write(f"  {note}\n")
        if tally.rejected:
            first = "; ".join(f"{number}: {what!r}" for number, what in tally.first_rejected)
            sys.stdout.write(f"  {tally.rejected:,} lines or records are not understood, the first: {first}\n")
    sys.stdout.flush()
