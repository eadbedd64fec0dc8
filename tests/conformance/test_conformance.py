"""The kernel's own tests of guest_memfd and of conversions, on both designs, named as in the kernel.

One test per case, page and variant (design, order of steps, allocator page). Where a series exists for a variant the
expectation is that of the kernel's test; pfnmap has no kernel, so what is expected of it stands in the case, with the
reason (Scene.by_design()).
"""

from __future__ import annotations

from collections import Counter

import pytest

from conformance import (  # they register cases
    fault_race as _race,
    guest_memfd as _guest_memfd,
    in_place as _in_place,
    private_mem as _private_mem,
    rfc2 as _rfc2,
)
from conformance.harness import CASES, VARIANTS, Case, Scene, Variant

SOURCES = (_in_place, _rfc2, _race, _guest_memfd, _private_mem)

RUNS = [(case, variant) for case in CASES for variant in case.variants]
EXPECTED = 1056


@pytest.mark.parametrize(("case", "variant"), RUNS, ids=[f"{case.id}-{variant.name}" for case, variant in RUNS])
def test_conformance(case: Case, variant: Variant) -> None:
    scene = Scene(variant, case.page)
    case.run(scene)
    if hasattr(scene, "machine"):
        assert scene.machine.broken[0] == 0, scene.machine.broken
        scene.clean_up()


def test_all_cases_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    """How many cases of which kernel test run on how many variants; none may get lost."""
    counts = Counter(case.source for case, _ in RUNS)
    with capsys.disabled():
        print()
        for source, count in counts.items():
            print(f"conformance: {source}: {count} runs of {len({c.id for c in CASES if c.source == source})} cases")
        posted = sum(variant.posted for _, variant in RUNS)
        print(f"conformance: {len(RUNS)} runs on {len(VARIANTS)} variants, {posted} of them of posted code")
    assert len(RUNS) == EXPECTED
    assert len(counts) >= len(SOURCES)
