"""Runs of machines under alternatives: each configuration and trace once, on two threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pgemu.errors import InputError
from pgemu.experiments.compare import configuration, run
from pgemu.experiments.devices import arrangement, has_devices
from pgemu.experiments.inferences import Alternative

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.machine.config import Config
    from pgemu.machine.designs import Design
    from pgemu.machine.presets import Versions
    from pgemu.trace.lowered import Lowered

__all__ = ("Reruns",)

_WORKERS = 2


def _done(result: DesignRun) -> Future[DesignRun]:
    future: Future[DesignRun] = Future()
    future.set_result(result)
    return future


class Reruns:
    """Runs of the first two designs; leaving its context ends what still runs.

    Some can begin while the comparison itself is under way (begin()); one of the threads waits until that is done().
    """

    def __init__(
        self, lowered: Lowered, designs: Sequence[Design], versions: Versions, given: Mapping[str, Any]
    ) -> None:
        self._lowered = lowered
        self._designs = tuple(designs[:2])
        self._versions = versions
        self._given = given
        self._known: dict[tuple[int, Config, bool], Future[DesignRun]] = {}
        self._traces: dict[tuple[tuple[str, float], ...], Lowered] = {(): lowered}
        self._compiled: set[tuple[bool, bool]] = set()
        self._pool = ThreadPoolExecutor(_WORKERS)
        self._alone = Event()
        self._stopped = Event()

    def __enter__(self) -> Reruns:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._alone.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, alternatives: Iterable[Alternative]) -> None:
        """Start those that will be wanted, beside the first design's run. Its machine code is there by now."""
        self._pool.submit(self._alone.wait)
        self._compiled.add(self._kind(self._configuration(self._lowered, self._designs[0], ())))
        for alternative in alternatives:
            with suppress(InputError):
                for lowered, config in self._machines((alternative,)):
                    if self._kind(config) in self._compiled:
                        self._start(lowered, config, alternative.unseen)

    def done(self, comparison: Comparison) -> None:
        """The comparison is there."""
        for known in comparison.runs[:2]:
            self._known[id(self._lowered), known.config, False] = _done(known)
            self._compiled.add(self._kind(known.config))
        self._alone.set()

    def start(self, alternatives: tuple[Alternative, ...]) -> list[Future[DesignRun]]:
        """Start what alternatives ask of the two designs.

        :raises InputError: they exclude each other
        """
        unseen = any(alternative.unseen for alternative in alternatives)
        return [self._start(lowered, config, unseen) for lowered, config in self._machines(alternatives)]

    def _machines(self, alternatives: tuple[Alternative, ...]) -> list[tuple[Lowered, Config]]:
        lowered = self._trace(alternatives)
        return [(lowered, self._configuration(lowered, design, alternatives)) for design in self._designs]

    def _trace(self, alternatives: tuple[Alternative, ...]) -> Lowered:
        changed: dict[str, float] = {}
        for alternative in alternatives:
            changed |= alternative.trace
        key = tuple(sorted(changed.items()))
        if key not in self._traces:
            assert self._lowered.again is not None
            self._traces[key] = self._lowered.again(**changed)
        return self._traces[key]

    def _configuration(self, lowered: Lowered, design: Design, alternatives: tuple[Alternative, ...]) -> Config:
        versions, given = self._versions, dict(self._given)
        for alternative in alternatives:
            if design in alternative.designs:
                versions = alternative.changed(versions)
                given |= alternative.fields
        return configuration(lowered, design, versions, given)

    def _start(self, lowered: Lowered, config: Config, unseen: bool) -> Future[DesignRun]:
        key = id(lowered), config, unseen
        if key not in self._known:
            if self._kind(config) in self._compiled:
                self._known[key] = self._pool.submit(self._run, lowered, config, unseen)
            else:  # the first run of such a machine compiles what runs it: that is not for two threads at once
                self._known[key] = _done(self._run(lowered, config, unseen))
                self._compiled.add(self._kind(config))
        return self._known[key]

    def _kind(self, config: Config) -> tuple[bool, bool]:
        """Machines of one kind run by the same machine code: parameters, and devices that conversions tell."""
        return config.full, has_devices(self._lowered) and arrangement(self._lowered, config).by_file

    def _run(self, lowered: Lowered, config: Config, unseen: bool) -> DesignRun:
        def go_on(*_: object) -> None:
            if self._stopped.is_set():
                raise CancelledError

        return run(lowered, config, self._versions, progress=go_on, unseen=unseen)
