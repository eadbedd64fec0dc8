"""Fields of Config that a design does not read change nothing of it, as documented; the other one reads them.

Conversions, faults and what comes between over one guest_memfd of two huge pages, with and without them.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from pgemu import Config, Machine, RetPf
from pgemu_kernels.words.operations import Flag, Operation
from random_operations import DESIGNS_SLOT, DESIGNS_VMA, M2, PAGE, scene

OF_RESTRUCTURE = {
    "order": "rfc2", "split_form": "rfc2", "merge": "lazy", "merge_zero": "unzeroed", "poisoned_blocks": "move",
    "zap": "rounded",
}  # fmt: skip
UNSEEN = {"invalidate": "exact"}  # what it changes is seen by who is stopped halfway only
OF_PFNMAP = {"host_huge": True, "dontneed_on_pfnmap": True}


def asked(random: Random) -> dict[str, int]:
    """An operation that makes sense."""
    page = random.choice((0, 1, 5, 511, 512, 600, 1023)) * PAGE
    page = page if random.random() < 0.7 else random.randrange(1024) * PAGE
    length = random.choice((PAGE, PAGE, PAGE, 5 * PAGE, M2, 2 * M2))
    start = 0 if length == 2 * M2 else page
    host = {"address": DESIGNS_VMA + page}
    return random.choices(
        (
            {"op": Operation.GUEST_FAULT, "flags": random.randrange(2), "address": DESIGNS_SLOT + page},
            {"op": Operation.HOST_FAULT, "flags": random.randrange(2), **host},
            {"op": Operation.CONVERT, "flags": random.choice((4, 8)), "offset": start, "length": length},
            {"op": Operation.ZAP, "flags": random.choice((0, int(Flag.MADVISE))), "length": PAGE, **host},
            {"op": Operation.PIN, "flags": 1, "length": PAGE, "object_": random.randrange(4), **host},
            {"op": Operation.UNPIN, "object_": random.randrange(4)},
            {"op": Operation.MEMORY_FAILURE, "offset": page},
            {"op": Operation.WORK},
        ),
        (30, 25, 30, 3, 3, 4, 1, 1),
    )[0]


def told(design: Any, **fields: Any) -> Any:
    """What 2,400 operations returned, and what was counted."""
    found: list[Any] = []
    for seed in range(4):
        machine = scene(Config(design, pool=6 * M2, page_size=M2, memory=16 << 20, **fields))
        assert machine is not None
        random = Random(seed)
        found += [tuple(machine.operate(**asked(random))) for _ in range(600)]  # type: ignore[arg-type]
        found.append(machine.statistics.events.tolist())
    return found


@pytest.mark.parametrize(
    ("design", "other", "fields"),
    [("pfnmap", "restructure", OF_RESTRUCTURE), ("restructure", "pfnmap", OF_PFNMAP)],
    ids=["pfnmap", "restructure"],
)
def test_what_a_design_does_not_read_changes_nothing_and_the_other_one_reads_it(
    design: str, other: str, fields: dict[str, Any]
) -> None:
    here, there = told(design), told(other)
    for name, value in fields.items():
        assert told(design, **{name: value}) == here, name
        assert told(other, **{name: value}) != there, name


def test_fields_of_which_this_sees_nothing() -> None:
    assert told("pfnmap", **UNSEEN) == told("pfnmap")
    assert told("restructure", level_rule="whole") == told("restructure")


def split(design: Any, split_to: Any) -> Any:
    """What is counted where a page of 1G is made shared, and touched around."""
    machine = Machine(Config(design, pool=1 << 30, split_to=split_to))
    gmem, vm = machine.create_guest_memfd(1 << 30), machine.create_vm(protected=True)
    assert vm.bind(gmem, gpa=0).status == vm.touch(0).status - RetPf.FIXED == 0
    assert gmem.convert(5 * PAGE, PAGE, shared=True).status == 0
    levels = [vm.touch(gpa).detail for gpa in (0, 5 * PAGE, M2, 512 * M2 - PAGE)]
    return levels, machine.statistics.events.tolist()


def test_pfnmap_splits_no_folio_to_any_size() -> None:
    assert split("pfnmap", "2M") == split("pfnmap", "4K")
    assert split("restructure", "2M") != split("restructure", "4K")
