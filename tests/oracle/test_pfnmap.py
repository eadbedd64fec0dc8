"""guest_memfd mapped in several ways: a version of pfnmap does what its own captures show, and not the other one's."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle import capture as oracle
from oracle.operations import MismatchError, every
from oracle.replay_pfnmap import ReplayPfnmap, kind_of


def test_a_preset_does_not_replay_the_other_ones_holes(path: Path) -> None:
    """Holes over memory that the process sees again: the preset of the other kind of file fails there."""
    capture = oracle.load(path)
    tried = 0
    for checkpoints in capture.scenarios().values():
        kind = kind_of(checkpoints)
        names = {operation.name for operation in every(checkpoints)}
        if kind.pfnmap and {"gpunch", "storeif"} <= names | ({"storeif"} if kind.huge else set()) and "peek" in names:
            if any(operation.name in ("slot", "hwpoison") for operation in every(checkpoints)):
                continue
            tried += 1
            with pytest.raises(MismatchError, match=r": leaves: "):
                ReplayPfnmap(capture, checkpoints, like=kind._replace(unmaps=not kind.unmaps)).run()
    if capture.shipped:
        assert tried == (2 if capture.path.parent == oracle.SHIPPED[2] else 0)
