"""Every event and gauge has one line that says what it is, where users look for it."""

from __future__ import annotations

import pydoc
from enum import IntEnum
from typing import Any

import pytest

import pgemu
from pgemu.machine.event_meanings import EVENTS, GAUGES

pytestmark = pytest.mark.same_with_checks


@pytest.mark.parametrize(("enum", "meanings"), [(pgemu.Event, EVENTS), (pgemu.Gauge, GAUGES)])
def test_every_member_has_a_line_in_help(enum: type[IntEnum], meanings: Any) -> None:
    text = pydoc.plain(pydoc.render_doc(enum))
    assert list(meanings) == list(enum)
    for member in enum:
        assert f"{member.name}: {meanings[member]}\n" in text
        assert member.__doc__ == meanings[member]
        assert "\n" not in meanings[member]
    assert len(set(meanings.values()) - {"... freed", "... cleared", "... of 2M", "... of 1G"}) > 0.8 * len(enum)
