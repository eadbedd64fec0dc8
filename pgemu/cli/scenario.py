"""`pgemu scenario`: named scenarios, what happened in them."""

from __future__ import annotations

import json

import rich_click as click

from pgemu.cli._lines import folded
from pgemu.cli._options import size
from pgemu.errors import InputError
from pgemu.experiments.scenarios import SCENARIOS
from pgemu_kernels.formats.bits import KERNELS

__all__ = ("scenario",)


@click.command(short_help="Run a named scenario and tell what happened.")
@click.argument("name", type=click.Choice(sorted(SCENARIOS)))
@click.option(
    "--guest-memory", type=size, metavar="SIZE", default="64M", show_default=True, help="Size of the guest_memfd."
)
@click.option("--kernel", type=click.Choice(sorted(KERNELS)), default="7.3", show_default=True, help="Linux version.")
@click.option("--stage2", type=click.Choice(["npt", "ept"]), default="npt", show_default=True, help="Stage-2 tables.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def scenario(name: str, guest_memory: int, kernel: str, stage2: str, as_json: bool) -> int:
    """Run a named scenario and tell what happened.

    smallest-pfnmap: the smallest change that the slides of 2025-08-07 say was tested. A guest_memfd of 4K folios, all
    shared, is mapped with VM_PFNMAP, its faults end in vmf_insert_pfn() and VM_FAULT_NOPAGE, and kvmtool boots a VM.
    Exit status 1 if a rule was found broken.
    """
    try:
        outcome = SCENARIOS[name](guest_memory=guest_memory, kernel=kernel, stage2=stage2)
    except ValueError as error:
        raise InputError(str(error)) from None
    if as_json:
        click.echo(json.dumps(outcome.document, indent=2))
    else:
        for line in folded(outcome.lines()):
            click.echo(line)
    return 1 if outcome.broken else 0
