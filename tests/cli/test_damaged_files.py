"""Damaged logs and tables: read or refused in one line, by every door, in bounded memory, and nothing else.

A run is one round after the other, the same ones each time; see fuzzing.py for more of them.
"""

from __future__ import annotations

import io
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

import mutations
from announcement import complaints
from fuzzing import attacked, rounds
from pgemu.cli import main
from pgemu.errors import InputError
from pgemu.trace import GivenSlot, LoweringOptions, load, require_input

KINDS: dict[str, tuple[Callable[[Random], bytes], int]] = {"log": (mutations.log, 300), "table": (mutations.table, 150)}
MOST_MEMORY = 1 << 20  # KiB that a run may take beside what it had
SLOWEST = 60.0  # seconds of the processor that a file of some kilobytes takes at most, by far
WHOLE = 25  # every so many files the whole command is run
OPTIONS = [
    LoweringOptions(),
    LoweringOptions(page_size=2 << 20),
    LoweringOptions(vm_processes=("all",)),
    LoweringOptions(page_size=2 << 20, memslots=(GivenSlot(0, 1 << 40),), vm_processes=("all",)),
]


def read(path: Path, random: Random) -> str:
    """How reading a file ends."""
    try:
        found = load(path, random.choice(OPTIONS))
        assert found.accounting.balanced()
        assert all(note.isprintable() for note in found.notes)
        require_input(found)
    except InputError as refused:
        complaint = str(refused)
    else:
        return "read"
    assert complaint.isprintable()
    assert len(complaint) < 2000 + len(str(path))
    return "refused"


def compared(path: Path, random: Random) -> str:
    """How the command ends."""
    arguments = ["compare", "--page-size", "2M", "--no-sensitivity", "--vm-process", "all", "--guest-memory", "8G"]
    arguments = arguments if random.random() < 0.5 else arguments[:4]
    kept = sys.stdout, sys.stderr
    output, complaint = io.StringIO(), io.StringIO()
    sys.stdout, sys.stderr = output, complaint
    status: object = None
    try:
        main([*arguments, str(path)], prog_name="pgemu")
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout, sys.stderr = kept
    said = complaints(complaint.getvalue())
    if status == 2:
        assert (said.count("\n"), said.startswith("pgemu: "), output.getvalue()) == (1, True, "")
    else:
        assert status == 0 or (status == 1 and said.startswith("pgemu: broken invariant: ")), (status, said)
        assert output.getvalue()
    return f"status {status}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    make, count = KINDS[kind]
    path = tmp_path / "damaged"
    ends: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, random in rounds(kind, 0, count):
        with attacked(kind, number):
            path.write_bytes(make(random))
            began = time.process_time()
            ends[read(path, random)] += 1
            if number % WHOLE == 0:
                ends[compared(path, random)] += 1
            took = time.process_time() - began
            assert took < SLOWEST, f"{took:.0f} s"
    print(kind, dict(ends))
    assert ends["read"] > 0
    assert ends["refused"] > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
