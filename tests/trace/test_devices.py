"""User space's part in traces of devices: names of memory, and unmaps around conversions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from comparisons import HVA, INODE, lowered, one
from pgemu.trace import Flag, Operation, Records, Region
from pgemu.trace.devices import ByUserSpace, through, with_unmaps
from pgemu.trace.schema import DTYPES
from pgemu_kernels.words.operations import PAGE_4K
from pgemu_kernels.words.rows import NO_INODE

pytestmark = pytest.mark.same_with_checks

IOVA = 0x40_0000_0000
RIGHTS = int(Flag.READ | Flag.WRITE)
EVERYTHING = (1 << 64) - 1
PAGES = 10


def dma_map(page: int, pages: int, *, at: int | None = None, space: int = 0, by_file: bool = False) -> Records:
    """Pages of the inode, mapped at the same distance from IOVA, or from page `at` on."""
    place = {"object": 0, "offset": page * PAGE_4K} if by_file else {"object": NO_INODE, "offset": HVA + page * PAGE_4K}
    address = IOVA + (page if at is None else at) * PAGE_4K
    return one(Operation.DMA_MAP, RIGHTS, address=address, length=pages * PAGE_4K, space=space, **place)


def dma_unmap(at: int, pages: int, space: int = 0) -> Records:
    return one(Operation.DMA_UNMAP, address=IOVA + at * PAGE_4K, length=pages * PAGE_4K, space=space)


def convert(kind: Flag, page: int, pages: int) -> Records:
    return one(Operation.CONVERT, kind, offset=page * PAGE_4K, length=pages * PAGE_4K)


def rows(records: Records) -> list[tuple[str, int, int, int]]:
    """Operation, page of the IOVA or of the inode, pages, and of a map the page that it names."""
    found = []
    for i in range(len(records)):
        op = Operation(int(records.op[i]))
        at = int(records.offset[i]) if op is Operation.CONVERT else int(records.address[i]) - IOVA
        names = int(records.offset[i]) - HVA if op is Operation.DMA_MAP else 0
        found.append((op.name, at // PAGE_4K, int(records.length[i]) // PAGE_4K, names // PAGE_4K))
    return found


def test_a_map_names_memory_as_its_door_takes_it() -> None:
    regions = [Region(HVA, 0, INODE // 2), Region(2 * HVA, INODE // 2, INODE // 2)]
    copy = one(Operation.DMA_MAP, RIGHTS | int(Flag.COPY), object=0, offset=0, length=PAGE_4K)
    records = Records.concatenate(
        [
            dma_map(3, 2),
            one(Operation.DMA_MAP, RIGHTS, object=NO_INODE, offset=2 * HVA + PAGE_4K, length=PAGE_4K),
            one(Operation.DMA_MAP, RIGHTS, object=NO_INODE, offset=HVA + INODE // 2 - PAGE_4K, length=2 * PAGE_4K),
            one(Operation.DMA_MAP, RIGHTS, object=NO_INODE, offset=HVA - PAGE_4K, length=PAGE_4K),
            copy,
            one(Operation.DMA_ACCESS, address=HVA, object=NO_INODE, length=8),
        ]
    )
    by_file = through(records, regions, "file")
    # What no region has whole is other memory, and a copy's offset is another IOAS's.
    none = int(NO_INODE)
    assert by_file.object.tolist() == [0, 0, none, none, 0, none]
    assert by_file.offset.tolist()[:2] == [3 * PAGE_4K, INODE // 2 + PAGE_4K]
    assert by_file.offset.tolist()[2:] == records.offset.tolist()[2:]
    back = through(by_file, regions, "address")
    assert [getattr(back, name).tolist() for name in DTYPES] == [getattr(records, name).tolist() for name in DTYPES]


def test_what_is_converted_is_unmapped_with_its_whole_map_and_the_rest_mapped_again() -> None:
    trace = lowered([dma_map(0, 4), convert(Flag.PRIVATE, 1, 1), convert(Flag.SHARED, 1, 1)])
    early, added = with_unmaps(trace, late=False)
    assert added == ByUserSpace(1, 3)
    # pages 0 and 2 to 3 stay the device's; page 1 is again once it is shared
    expected = [
        ("DMA_MAP", 0, 4, 0),
        ("DMA_UNMAP", 0, 4, 0),
        ("DMA_MAP", 0, 1, 0),
        ("DMA_MAP", 2, 2, 2),
        ("CONVERT", 1, 1, 0),
        ("CONVERT", 1, 1, 0),
        ("DMA_MAP", 1, 1, 1),
    ]
    assert rows(early.records) == expected
    late, added = with_unmaps(trace, late=True)
    assert added == ByUserSpace(1, 3)
    assert rows(late.records) == [expected[0], expected[4], *expected[1:4], *expected[5:]]
    assert late.records.flags.tolist() == [RIGHTS, int(Flag.PRIVATE), 0, RIGHTS, RIGHTS, int(Flag.SHARED), RIGHTS]


def test_what_was_unmapped_by_the_trace_is_not_mapped_again() -> None:
    trace = lowered(
        [dma_map(0, 4), convert(Flag.PRIVATE, 1, 1), dma_unmap(0, 4), convert(Flag.SHARED, 0, 4), dma_map(8, 1)]
    )
    made, added = with_unmaps(trace, late=False)
    assert added == ByUserSpace(1, 2)
    assert rows(made.records)[-2:] == [("CONVERT", 0, 4, 0), ("DMA_MAP", 8, 1, 8)]


def test_levels_of_recorded_faults_stay_with_their_records() -> None:
    from dataclasses import replace

    trace = lowered([dma_map(0, 1), convert(Flag.PRIVATE, 0, 1), one(Operation.GUEST_FAULT, address=0)])
    trace = replace(trace, fault_levels=np.array([0, 0, 2], np.uint8))
    made, _ = with_unmaps(trace, late=False)
    assert made.fault_levels is not None
    levels = dict(zip(made.records.op.tolist(), made.fault_levels.tolist(), strict=True))
    assert levels == {Operation.DMA_MAP: 0, Operation.DMA_UNMAP: 0, Operation.CONVERT: 0, Operation.GUEST_FAULT: 2}


# --------------------------------------------------------------------------- against pages


@dataclass
class Pages:
    """Every page by itself: what each address space maps, with the number of the map that it is a part of."""

    maps: int = 0
    mapped: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    refused: int = 0

    def run(self, op: Operation, space: int, at: int, pages: int, names: int) -> None:
        places = [(space, at + i) for i in range(pages)]
        if op is Operation.DMA_MAP:
            if any(place in self.mapped for place in places):
                self.refused += 1
                return
            self.maps += 1
            self.mapped |= {place: (self.maps, names + i) for i, place in enumerate(places)}
            return
        whole = {self.mapped[place][0] for place in places if place in self.mapped}
        gone = {place for place, (number, _) in self.mapped.items() if place[0] == space and number in whole}
        if not gone <= set(places):
            self.refused += 1
            return
        for place in gone:
            del self.mapped[place]

    def names(self) -> set[tuple[tuple[int, int], int]]:
        """Places, each with the page of the inode that it shows."""
        return {(place, page) for place, (_, page) in self.mapped.items()}


RANGES = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4))
STEPS = st.one_of(
    st.tuples(st.just("map"), RANGES, st.integers(0, 1), st.integers(0, PAGES)),
    st.tuples(st.just("unmap"), RANGES, st.integers(0, 1), st.just(0)),
    st.tuples(st.sampled_from(["private", "shared"]), RANGES, st.just(0), st.just(0)),
)


def record(step: tuple[str, tuple[int, int], int, int]) -> Records:
    what, (page, pages), space, at = step
    if what == "map":
        return dma_map(page, pages, at=at, space=space)
    if what == "unmap":
        return dma_unmap(page, pages, space)
    return convert(Flag.PRIVATE if what == "private" else Flag.SHARED, page, pages)


def _in(place: tuple[int, int], space: int, at: int, pages: int) -> bool:
    return place[0] == space and at <= place[1] < at + pages


@given(st.lists(STEPS, min_size=1, max_size=30), st.booleans())
def test_user_space_follows_any_conversions(steps: list[Any], late: bool) -> None:
    """In any trace: what it adds is never refused, what is converted to private is no device's then (or behind it), and
    each device has what the trace gave it and nobody took, and has again what became shared."""
    records = Records.concatenate([record(step) for step in steps])
    records.time[:] = np.arange(len(records))
    made, added = with_unmaps(lowered([records]), late=late)
    by_time: dict[int, list[int]] = {}
    for i, time in enumerate(made.records.time.tolist()):
        by_time.setdefault(time, []).append(i)
    state = Pages()
    has: dict[tuple[int, int], int] = {}  # what each device is to have, page by page
    owed: dict[tuple[int, int], int] = {}
    described = rows(made.records)
    new = 0
    for time, own in enumerate(rows(records)):
        space = int(records.space[time])
        for i in by_time[time]:
            op = Operation[described[i][0]]
            if op is Operation.CONVERT:
                to_private = bool(int(made.records.flags[i]) & Flag.PRIVATE)
                touched = set(range(own[1], own[1] + own[2]))
                assert late or not to_private or not {page for _, page in state.names()} & touched
                continue
            before = state.refused
            state.run(op, int(made.records.space[i]), *described[i][1:])
            if own[0] == "CONVERT":
                new += 1
                assert state.refused == before, "what user space adds is refused"
            elif state.refused == before:
                has = {place: page for place, page in has.items() if not _in(place, space, own[1], own[2])}
                owed = {place: page for place, page in owed.items() if not _in(place, space, own[1], own[2])}
                if op is Operation.DMA_MAP:
                    has |= {(space, own[1] + k): own[3] + k for k in range(own[2])}
        if own[0] == "CONVERT":
            moved, left = (owed, has) if int(records.flags[time]) & Flag.SHARED else (has, owed)
            moving = {place: page for place, page in moved.items() if own[1] <= page < own[1] + own[2]}
            left |= moving
            for place in moving:
                del moved[place]
        assert state.names() == set(has.items())
    assert new == added.unmaps + added.maps
