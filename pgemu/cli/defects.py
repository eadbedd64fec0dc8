"""`pgemu defects`: the mistakes of posted code that machines can have."""

from __future__ import annotations

import json

import rich_click as click

from pgemu.cli._lines import folded
from pgemu.machine.defects import TEXTS, versions_of

__all__ = ("defects",)


@click.command(short_help="List the mistakes of posted code that compare --defect takes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def defects(as_json: bool) -> int:
    """List the mistakes of posted code that `pgemu compare --defect` takes.

    Of each: what the code does, which version has it (a version's own are on without being asked for, those behind
    --as-posted have a known fix), and where that can be read.
    """
    if as_json:
        rows = {
            name: {"does": text.does, "versions": versions_of(name), "source": text.source}
            for name, text in TEXTS.items()
        }
        click.echo(json.dumps(rows, indent=2))
        return 0
    for name, text in TEXTS.items():
        for line in folded([f"{name} ({versions_of(name)})", f"  {text.does}", f"  source: {text.source}"]):
            click.echo(line)
    return 0
