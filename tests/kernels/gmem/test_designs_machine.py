"""Both designs with all their parameters against the model, by random sequences of operations.

After each step: its results, every gauge, and the safety rules on the machine's own arrays; every few steps each
entry, refcount and mapcount, and the machine's own recount. --designs-steps or PGEMU_STEPS sets how many steps are
done in all (2,000 otherwise) and makes the sequences random; without it they are the same at every run.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from designs_sequences import Gigantic, Sequences, Small
from model.pair import Pair
from pgemu.objects.machine import Config

STEPS = os.environ.get("PGEMU_STEPS")
ALL = int(STEPS or 2000)
LENGTH = 40  # steps of a sequence
done: Counter[str] = Counter()


class Compared:
    """A machine beside the model."""

    def make(self, **parameters: Any) -> Pair:
        return Pair(Config(**parameters))

    def count(self) -> None:
        done[type(self).__name__] += 1


class TwoMegabytes(Compared, Sequences):
    pass


class FourKilobytes(Compared, Small):
    pass


class OneGigabyte(Compared, Gigantic):
    pass


def case(machine: type[Sequences], steps: int, length: int = LENGTH) -> type:
    """A test case of so many steps, the one after boot included; Hypothesis cuts some sequences short."""
    found = machine.TestCase
    found.settings = settings(
        derandomize=STEPS is None,
        database=None,
        deadline=None,
        max_examples=max(2, -(-steps * 5 // (4 * length))),
        stateful_step_count=length - 1,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return found


# hypothesis ends some sequences early: more than ALL in sum.
TestTwoMegabytes = case(TwoMegabytes, ALL * 83 // 100)
TestOneGigabyte = case(OneGigabyte, ALL * 4 // 100, 20)
TestFourKilobytes = case(FourKilobytes, ALL * 28 // 100)


def test_all_steps_were_done(capsys: pytest.CaptureFixture[str]) -> None:
    """The sequences above, which pytest runs first, were as long as they were meant to be."""
    if len(done) < 3:
        pytest.skip("not all of this file was run")
    with capsys.disabled():
        print(f"\n{sum(done.values())} steps of both designs against the model: {dict(done)}")
    assert sum(done.values()) >= ALL
