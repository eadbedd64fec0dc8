"""Every mistake of posted code is described, and has a version or code that it is of."""

from __future__ import annotations

import pytest

from pgemu.machine.config import DEFECTS
from pgemu.machine.defects import TEXTS, versions_of
from pgemu.machine.presets import LIKE, PFNMAP, Versions


def test_all_have_a_text_in_the_order_of_their_names() -> None:
    assert list(TEXTS) == sorted(DEFECTS)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_says_what_the_code_does_and_where_that_can_be_read(name: str) -> None:
    text = TEXTS[name]
    assert text.does
    assert text.source
    assert not text.does.endswith(".")


@pytest.mark.parametrize("name", TEXTS)
def test_versions_are_those_of_the_presets(name: str) -> None:
    with_it = {like for like in LIKE if name in Versions(like).fields("restructure")["defects"]}
    asked = {like for like in LIKE if name in Versions(like, as_posted=True).fields("restructure")["defects"]} - with_it
    pfnmap = {one for one in PFNMAP if name in Versions(pfnmap=one).fields("pfnmap")["defects"]}
    expected = with_it | pfnmap | {f"{like} --as-posted" for like in asked}
    assert set(versions_of(name).split(", ")) == (expected or {TEXTS[name].reported})
    assert bool(expected) != bool(TEXTS[name].reported)
