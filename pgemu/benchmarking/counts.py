"""What machines counted over one call, and what it is estimated to take in a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.cost.difference import estimate
from pgemu.machine.results import operation_name, status_name
from pgemu.machine.statistics import Statistics
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("Counts",)


class Counts:
    """Counts of some machines from `begin()` on."""

    def __init__(self, machines: Sequence[Core]) -> None:
        self._machines = tuple(machines)
        self._before = [machine.arrays.stats.copy() for machine in self._machines]

    def begin(self) -> None:
        """Count from here on."""
        for machine, before in zip(self._machines, self._before, strict=True):
            np.copyto(before, machine.arrays.stats)

    def info(self) -> dict[str, Any]:
        """Return what was counted since, as it can be stored in JSON; {} if nothing was.

        `modelled_ns`: [low, high], by the cost profile `profile` for machines of `vcpus` and `host_cpus`.
        `counts`: `operations`, by operation and result, and `events`, by name.
        """
        if not self._machines:
            return {}
        counted = [
            Statistics(machine.arrays.stats - before)
            for machine, before in zip(self._machines, self._before, strict=True)
        ]
        configs = [machine.config for machine in self._machines]
        bands = [
            estimate(one, config.profile, config.vcpus, config.host_cpus).total
            for one, config in zip(counted, configs, strict=True)
        ]
        together = Statistics(np.sum([one.words for one in counted], axis=0))
        operations = {
            operation_name(op): {status_name(op, status): n for status, n in results.items()}
            for op in Operation
            if (results := together.results(op))
        }
        events = {event.name.lower(): n for event in Event if (n := together.event(event))}
        if not operations and not events:
            return {}
        return {
            "modelled_ns": [sum(low for low, _ in bands), sum(high for _, high in bands)],
            "profile": _one({str(config.profile) for config in configs}),
            "vcpus": _one({config.vcpus for config in configs}),
            "host_cpus": _one({config.host_cpus for config in configs}),
            "counts": {"operations": operations, "events": events},
        }


def _one(values: set[Any]) -> Any:
    """What all machines have, or a list of what they have."""
    return values.pop() if len(values) == 1 else sorted(values)
