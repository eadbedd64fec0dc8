"""What commands take that run a trace: versions of the designs, parameters of workloads, sweeps over options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._options import FIELDS, parameter, size
from pgemu.cli._trace_options import TRACE_GROUP, lowering
from pgemu.errors import InputError

if TYPE_CHECKING:
    from pgemu.machine.presets import Versions
    from pgemu.trace.lowered import Lowered, LoweringOptions

__all__ = (
    "TRACE_GROUPS",
    "combinations_of",
    "given_fields",
    "load_trace",
    "lowering_options",
    "varied_options",
    "version_options",
    "versions",
    "workload_options",
    "workload_parameters",
)

_VERSION = (
    click.option(
        "--like",
        type=click.Choice(["rfc2", "dec2025", "jan2026", "next"]),
        default="dec2025",
        show_default=True,
        help="Version of restructure; Python's Config() alone is none of them.",
    ),
    click.option(
        "--pfnmap",
        type=click.Choice(["corrected", "slides2025"]),
        default="corrected",
        show_default=True,
        help="Version of pfnmap: mended, or as the slides' change does.",
    ),
    click.option("--as-posted", is_flag=True, help="With those mistakes of the version, too, that have a known fix."),
    click.option("--strict", is_flag=True, help="What the version refuses stays refused, though the trace needs it."),
)

_WORKLOAD = (
    click.option(
        "--overlap",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Of the boots: flips under a page that stays shared, 0 to 1.  [default: 0]",
    ),
    click.option(
        "--late",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Flips in which a device still uses what is private, 0 to 1.  [default: the workload's]",
    ),
    click.option(
        "--flips", type=click.IntRange(0), metavar="N", help="Of workload:dma-steady: pages that flip.  [default: 1000]"
    ),
    click.option(
        "--accesses", type=click.IntRange(0), metavar="N", help="... of the device in each flip.  [default: 64]"
    ),
    click.option(
        "--buffers",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="... share of memory that the device uses.  [default: 0.06, 64M to 1G]",
    ),
    click.option("--mapping", type=size, metavar="SIZE", help="... size of each map for the device.  [default: 2M]"),
    click.option(
        "--seed",
        type=click.IntRange(0, (1 << 63) - 1),
        metavar="N",
        default=0,
        show_default=True,
        help="Of a workload, and of the order of frames; 0: ascending.",
    ),
    click.option(
        "--set",
        "set",
        type=parameter,
        metavar="KEY=VALUE",
        multiple=True,
        help="Any parameter of a workload (pgemu workload list). May be repeated.",
    ),
)

TRACE_GROUPS = {
    **TRACE_GROUP,
    "Parameters of workloads": (
        *("--seed", "--overlap", "--late", "--flips", "--accesses", "--buffers", "--mapping", "--set"),
    ),
}
"""Headings of --help."""


def _all(options: Iterable[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


version_options = _all(_VERSION)
"""Give a command the options that choose versions of the designs, and the size of pages."""
workload_options = _all(_WORKLOAD)
"""Give a command the options that are parameters of workloads."""

_OF_WORKLOADS = ("overlap", "late", "flips", "accesses", "buffers", "mapping")


def workload_parameters(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are given. InputError for one that is given twice."""
    found = {name: options[name] for name in _OF_WORKLOADS if options[name] is not None}
    if twice := sorted(found.keys() & dict(options["set"])):
        raise InputError(f"--set {twice[0]}=...: expected no --{twice[0]} beside it")
    return found | dict(options["set"])


def lowering_options(options: dict[str, Any]) -> LoweringOptions:
    """How the trace is laid over guest_memfd."""
    return lowering(options, "4K" if options["like"] == "next" else "1G")


def load_trace(trace: str | None, options: dict[str, Any]) -> Lowered:
    """Load a trace, or without one that which comes with pgemu."""
    from pgemu.trace import load, require_input, shipped

    name = shipped() if trace is None else trace
    parameters = workload_parameters(options)
    lowered = load(name, lowering_options(options), options["seed"], options["input_format"], **parameters)
    require_input(lowered)
    return replace(lowered, source=f"{shipped().name} (comes with pgemu)") if trace is None else lowered


def versions(options: dict[str, Any]) -> Versions:
    """Versions of the designs."""
    from pgemu.machine.presets import Versions

    return Versions(options["like"], options["pfnmap"], options["as_posted"])


def given_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of the machine that the options give; None is what the version or the trace says."""
    from pgemu.cost import profile as cost_profile

    try:
        host_cpus = options["host_cpus"] or cost_profile(options["profile"]).host_cpus or 1
    except ValueError as error:
        raise InputError(f"--profile: {error}") from None
    given = {name: options[name] for name in FIELDS}
    return {**given, "host_cpus": host_cpus, "seed": options["seed"], "defects": options["defects"]}


def varied_options(command: click.Command, options: dict[str, Any], own: set[str]) -> dict[str, click.Parameter]:
    """The options that --vary may name, by name; `own` are those that do not vary."""
    varied = [one for one in command.params if one.name in options and one.name not in own]
    return {one.opts[0].lstrip("-").replace("-", "_"): one for one in varied}


def combinations_of(
    command: click.Command, options: dict[str, Any], own: set[str]
) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """What --vary asks for, labels and options of each run; without it one with none.

    An option that varies is refused beside it, for one of both would count for nothing.

    :param own: options of the command that do not vary
    """
    from click.core import ParameterSource

    from pgemu.experiments.vary import combinations

    varied = varied_options(command, options, own)
    found = list(combinations(options["vary"], varied))
    context = click.get_current_context()
    for name, option in varied.items():
        source = context.get_parameter_source(str(option.name)) if context else ParameterSource.DEFAULT
        label = name.replace("_", "-")
        if label in found[0][0] and source is not ParameterSource.DEFAULT:
            raise InputError(f"--vary {label}=...: expected no {option.opts[0]} beside it")
    return found
