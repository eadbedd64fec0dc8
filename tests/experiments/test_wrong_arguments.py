"""Experiments refuse what they cannot take before anything runs, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pgemu
from pgemu import InputError

pytestmark = pytest.mark.same_with_checks

CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: pgemu.compare(5), TypeError, "lowered 5 (int): expected Lowered"),  # type: ignore[arg-type]
    (lambda: pgemu.audit("gup"), TypeError, "only 'gup' (str): expected names"),
    (lambda: pgemu.audit([5]), TypeError, "only "),  # type: ignore[list-item]
    (lambda: pgemu.audit(["gup"]), ValueError, "claim 'gup': expected one of no-restructuring, "),
    (lambda: pgemu.smallest_pfnmap(guest_memory=1), ValueError, "guest memory of 1 bytes: expected room for"),
    (lambda: pgemu.verify("no-such.log"), InputError, "no-such.log: "),
    (lambda: pgemu.GuestOptions(allocation="any"), ValueError, "allocation 'any'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "kind", "text"), CALLS, ids=[text for _, _, text in CALLS])
def test_it_is_refused(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises((TypeError, ValueError, InputError)) as told:
        call()
    assert isinstance(told.value, kind)
    assert str(told.value).startswith(text)
    assert "\n" not in str(told.value)
