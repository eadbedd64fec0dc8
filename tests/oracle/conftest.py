"""Each capture in turn, for the tests of all files here: those of one run before the next is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle.capture import captures, name_of


@pytest.fixture(scope="session", params=captures(), ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    """A capture's file. pytest puts tests with the same parameter of the session's side by side; `load` keeps one."""
    found: Path = request.param
    return found
