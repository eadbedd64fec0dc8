"""`pgemu audit`: claims that were made about pfnmap, tried on both designs."""

from __future__ import annotations

import json
import sys

import rich_click as click

from pgemu.errors import InputError

__all__ = ("audit",)


@click.command(short_help="Try the claims that were made about pfnmap, and judge them.")
@click.option("--only", multiple=True, metavar="NAME", help="Try this claim alone; may be repeated.")
@click.option("--list", "listed", is_flag=True, help="Print the claims' names and what they say, and try none.")
@click.option(
    "--format", "form", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True,
    help="How the result is printed.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def audit(only: tuple[str, ...], listed: bool, form: str, as_json: bool) -> int:
    """Try the claims of the slides of 2025-08-07 on VM_PFNMAP for guest_memfd, remarks on them, and open questions.

    Each has an experiment that runs on a machine of each design: what is claimed, what is done, what was measured on
    both, the verdict (holds, holds at a price, in part, does not hold, or depends on a parameter, with both outcomes),
    and what the weakest step rests on: captured (a kernel did it), main (Linus's tree), posted (patches), slides, or an
    inference (nobody has said so). Verdicts follow from the figures; where one depends, the first outcome comes first.

    Exit status: 0; 1 if a verdict is not the documented one; 2 for bad input.
    """
    if as_json and form == "markdown":
        raise InputError("--json: expected no --format markdown beside it")
    from pgemu.experiments.audit import CLAIMS, audit as run
    from pgemu.report.audit import write

    if listed and (as_json or form == "json"):
        sys.stdout.write(json.dumps([{"name": one.name, "claim": one.claim} for one in CLAIMS], indent=2) + "\n")
        return 0
    if listed:
        width = max(len(claim.name) for claim in CLAIMS)
        sys.stdout.write("".join(f"{claim.name:{width}}  {claim.claim}\n" for claim in CLAIMS))
        return 0
    try:
        audited = run(only)
    except ValueError as error:
        raise InputError(f"--only: {error}") from None
    sys.stdout.write(write(audited, "json" if as_json else form))
    sys.stdout.flush()
    return 0 if all(one.as_documented for one in audited) else 1
