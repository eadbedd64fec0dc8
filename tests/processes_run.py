"""A machine for a log of processes, and what its records do there."""

from __future__ import annotations

import io
from collections import Counter
from types import SimpleNamespace

import pytest

from pgemu import Machine
from pgemu.errors import InputError
from pgemu.experiments.process_machine import machine_of_processes
from pgemu.machine.results import Results
from pgemu.trace import Lowered, Operation, load

__all__ = ("outcomes", "read_or_refused", "run")


def run(lowered: Lowered, **fields: object) -> tuple[Machine, Results]:
    """The machine after all records, with no rule broken, and their results."""
    machine = machine_of_processes(lowered, **fields)
    results = machine.run(lowered.records)
    assert machine.check() == 0, machine.findings
    return machine, results


def outcomes(lowered: Lowered, results: Results) -> dict[Operation, Counter[int]]:
    """What each kind of operation returned, how often."""
    found: dict[Operation, Counter[int]] = {}
    for op, status in zip(lowered.records.op.tolist(), results.status.tolist(), strict=True):
        found.setdefault(Operation(op), Counter())[status] += 1
    return found


def read_or_refused(monkeypatch: pytest.MonkeyPatch, data: bytes, input_format: str | None = None) -> Lowered | None:
    """A trace from standard input, None where it is refused in one line; every event of it is accounted for."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    try:
        found = load("-", input_format=input_format)
    except InputError as refused:
        complaint = str(refused)
    else:
        assert found.accounting.balanced()
        assert all(note.isprintable() for note in found.notes)
        found.records.check("fuzz")
        return found
    assert complaint.isprintable()
    return None
