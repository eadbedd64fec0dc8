"""`pgemu guest`: a recorded program in a guest, and what the guest pays for each design's mapping level."""

from __future__ import annotations

import json
import sys
from typing import Any

import rich_click as click

from pgemu.cli._groups import grouped
from pgemu.cli._guest import GUEST_GROUPS, configurations, guest_options, program, the_guest
from pgemu.cli._options import MACHINE_GROUPS

__all__ = ("guest",)

_GROUPS = {
    **GUEST_GROUPS,
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
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True, help="What is printed."
)
@guest_options
def guest(trace: str, **options: Any) -> None:
    """Run a recorded program in a guest on both designs, and count what its translations cost.

    TRACE is a recording of addresses: text of Valgrind's Lackey or Pin's pinatrace, a trace of DynamoRIO's drmemtrace
    or ChampSim, DAMON's regions, or Parquet of one (pgemu trace convert). Each page that is touched first takes a frame
    of the guest; stage 2 is the design's, page by page as it is then; I/O makes the conversions that it would. Every
    access goes through TLBs and paging-structure caches: misses, entries that walks read, and the sizes that are hit.

    What nobody recorded is assumed, and each assumption is printed.
    """
    from pgemu.guest import run_accesses
    from pgemu.machine.designs import DESIGNS
    from pgemu.report.guest import text

    asked = the_guest(options)
    configs = configurations(options, tuple(dict.fromkeys(options["designs"])) or DESIGNS)
    with program(trace, options) as found:
        result = run_accesses(found.batches, configs, asked, processor=options["processor"], vcpus=options["tlb_vcpus"])
    tally = found.tally
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
