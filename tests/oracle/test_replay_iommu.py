"""Captured scenarios of VFIO and iommufd on pgemu's own objects. What is not replayed is listed by operation."""

from __future__ import annotations

from collections import Counter

import pytest

from oracle.capture import load, name_of
from oracle.iommu_domains import SHIPPED, iommu_captures
from oracle.operations import NotModelledError
from oracle.replay_iommu import ReplayIommu

LEAST = 0.9  # of the checkpoints of any file


@pytest.fixture(scope="module", params=iommu_captures(), ids=name_of)
def path(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return request.param


def test_every_scenario_is_equal(path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    capture = load(path)
    whole = pages = aged = 0
    left: Counter[str] = Counter()
    for name, checkpoints in capture.scenarios().items():
        try:
            replay = ReplayIommu(capture, checkpoints)
        except NotModelledError as error:
            left[str(error)] += len(checkpoints)
            continue
        done = replay.run()
        assert done.whole + sum(done.left.values()) == len(checkpoints), name
        whole, pages, aged = whole + done.whole, pages + replay.pages, aged + done.aged
        left.update(done.left)
    total = len(capture.checkpoints)
    with capsys.disabled():
        print(
            f"\n{capture.name}: {whole}/{total} checkpoints replayed, {pages:,} I/O pages, {aged} entries aged", end=""
        )
        for what, count in left.most_common():
            print(f"\n  {count} not: {what}", end="")
    assert path.parent != SHIPPED or whole >= LEAST * total
