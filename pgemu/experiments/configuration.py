"""What a design's machine is made of for a trace: what is given, what the trace brings, and what is assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgemu.errors import InputError
from pgemu.experiments.process_machine import config_of_processes
from pgemu.machine.vm_kinds import KINDS
from pgemu_kernels.words.operations import PAGE_2M

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgemu.machine.config import Config
    from pgemu.machine.designs import Design
    from pgemu.machine.presets import Versions
    from pgemu.trace.lowered import Lowered

__all__ = ("assumed", "configuration")

_OF_THE_VM = ("stage2", "vcpus")


def configuration(
    lowered: Lowered, design: Design, versions: Versions, given: dict[str, Any], inodes: int = 1
) -> Config:
    """What a design's machine is made of for a trace.

    :param inodes: how many of them the pool has to serve
    :raises InputError: an option that Config refuses, a page size that the version does not know, a kind of VM that
        has no private memory where the trace begins with it
    """
    if lowered.kind == "process":
        return config_of_processes(lowered, design=design, **_of_processes(given))
    layout = lowered.layout
    need = sum(one.layout.inode_size for one in lowered.guests) or layout.inode_size * inodes
    pool = -(-need // PAGE_2M) * PAGE_2M
    fields = {"vm": "sw" if lowered.init == "private" or lowered.converts else "plain", **lowered.machine, **given}
    kind = KINDS.get(fields["vm"])
    if kind and not kind.private and lowered.init == "private":
        why = lowered.private_because or "memory is private at first"
        others = ", ".join(name for name, other in KINDS.items() if other.private)
        raise InputError(
            f"vm {fields['vm']}: it has no private memory, and {why}: expected one of {others}, or memory that is "
            "shared at first (--init shared)"
        )
    if kind and kind.stage2 and "stage2" not in given:
        fields["stage2"] = kind.stage2
    try:
        return versions.configuration(design, pool=pool, page_size=layout.page_size, **fields)
    except ValueError as error:
        raise InputError(str(error)) from None


def _of_processes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a machine without a VM has."""
    return {name: value for name, value in given.items() if name in ("kernel", "hvo", "profile", "host_cpus", "seed")}


def assumed(lowered: Lowered, config: Config, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of the recorded VM's that neither the trace tells nor anybody gave: then they are Config's defaults."""
    kind = KINDS.get(config.vm)
    known = {*given, *lowered.machine, *(["stage2"] if kind and kind.stage2 else [])}
    return tuple(name for name in _OF_THE_VM if name not in known)
