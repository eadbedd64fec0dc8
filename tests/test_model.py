"""The model of both designs by itself: random sequences keep the safety rules and lose no frame."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from designs_sequences import Gigantic, Sequences, Small
from model.alone import Alone
from model.parameters import Parameters

pytestmark = pytest.mark.same_with_checks

KNOWN = Parameters.__dataclass_fields__


class AloneTwoMegabytes(Sequences):
    def make(self, **parameters: Any) -> Alone:
        return Alone(Parameters(**{name: value for name, value in parameters.items() if name in KNOWN}))


class AloneSmall(Small):
    make = AloneTwoMegabytes.make


class AloneGigantic(Gigantic):
    make = AloneTwoMegabytes.make


COMMON = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestTwoMegabytes = AloneTwoMegabytes.TestCase
TestTwoMegabytes.settings = settings(COMMON, max_examples=60, stateful_step_count=50)
TestSmall = AloneSmall.TestCase
TestSmall.settings = settings(COMMON, max_examples=20, stateful_step_count=40)
TestGigantic = AloneGigantic.TestCase
TestGigantic.settings = settings(COMMON, max_examples=3, stateful_step_count=15)
