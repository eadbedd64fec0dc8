"""A guest's page tables and frames against a dict, and batches cut anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from guest_streams import accesses, pieces, streams
from pgemu.guest import GuestOptions, GuestProgram
from pgemu.guest.frames import Frames
from pgemu.trace.schema import Operation, Records

M2, G1 = 2 << 20, 1 << 30
ALLOCATIONS = ("sequential", "random", "thp")
NOTHING = np.zeros(0, np.uint64)


class Model:
    """First touches by dicts: frames in the order of a list, tables from the top down, then the page."""

    def __init__(self, frames: list[int]) -> None:
        self.frames = list(reversed(frames))
        self.tables: dict[tuple[int, int, int], int] = {}
        self.pages: dict[tuple[int, int], int] = {}

    def place(self, address: int, space: int) -> int:
        page = address >> 12
        if (space, page) not in self.pages:
            for level in (4, 3, 2, 1):
                key = (space, level, page >> 9 * level if level < 4 else 0)
                if key not in self.tables:
                    self.tables[key] = self.frames.pop()
            self.pages[space, page] = self.frames.pop()
        return self.pages[space, page] << 12 | address & 4095


def order_of(options: GuestOptions) -> list[int]:
    """Frames as they are handed out, of which a fresh machine has taken the first ones."""
    program = GuestProgram(options)
    return program.memory._frames.take(600).tolist()


@given(
    streams(), st.sampled_from(("sequential", "random")), st.integers(0, 3), st.lists(st.integers(0, 99), max_size=4)
)
@settings(max_examples=80)
def test_pages_get_the_frames_that_a_dict_gives_them(
    rows: list[tuple[int, int, int, int]], allocation: str, seed: int, cuts: list[int]
) -> None:
    options = GuestOptions(64 << 20, allocation, seed)  # type: ignore[arg-type]
    model, program = Model(order_of(options)), GuestProgram(options)
    records = accesses(rows)
    found = [gpa for part in pieces(records, cuts) for gpa in program.feed(part).physical.tolist()]
    assert found == [model.place(address, space) for address, _, space, _ in rows]
    assert program.counts["pages 4K"] == len(model.pages)
    assert program.counts["tables"] == len(model.tables)


def everything(program: GuestProgram, parts: Any) -> list[Any]:
    batches = [program.feed(part) for part in parts]
    shift = np.cumsum([0, *(len(batch.accesses) for batch in batches)])
    at = [n + int(first) for batch, first in zip(batches, shift, strict=False) for n in batch.at.tolist()]
    columns = [
        [value for batch in batches for value in getattr(batch.records, name).tolist()]
        for name in ("op", "flags", "actor", "address", "offset", "length")
    ]
    return [[gpa for batch in batches for gpa in batch.physical.tolist()], at, *columns, dict(program.counts)]


@given(
    streams(), st.sampled_from(ALLOCATIONS), st.sampled_from(("bounce", "convert")),
    st.sampled_from((0.0, 0.03, 0.5, 1.0)), st.lists(st.integers(0, 99), max_size=5),
    st.sampled_from((0.0, 0.5, 1.0)), st.sampled_from((4 << 20, 8 << 20, G1)),
)  # fmt: skip
@settings(max_examples=120)
def test_batches_cut_anywhere_give_the_same(
    rows: list[tuple[int, int, int, int]], allocation: str, io: str, rate: float, cuts: list[int], fragmentation: float,
    memory: int,
) -> None:  # fmt: skip
    options = GuestOptions(memory, allocation, 1, fragmentation, True, rate, io, 64 << 10)  # type: ignore[arg-type]
    records = accesses(rows)
    whole = everything(GuestProgram(options), [records])
    assert everything(GuestProgram(options), pieces(records, cuts)) == whole


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_frames_are_handed_out_once_and_none_that_is_in_use(allocation: Any) -> None:
    taken, reserved = np.array([0, 3, 700], np.uint64), range(1024, 1600)
    frames = Frames(4096, allocation, 5, taken, reserved, 0.25)
    left = frames.left
    found = frames.take(left).tolist()
    broken = [512 * block for block in range(8) if frames._broken[block]]
    assert len(broken) == 2
    assert sorted(found) == sorted({*range(4096)} - {0, 3, 700} - {*reserved} - {*broken})
    assert found == sorted(found) or allocation != "sequential"
    assert found != sorted(found) or allocation != "random"


def test_huge_frames_are_aligned_and_whole() -> None:
    frames = Frames(4096, "thp", 0, np.array([0], np.uint64), range(1024, 1025), 0)
    huge = [frames.take_huge() for _ in range(7)]
    assert huge == [512, 1536, 2048, 2560, 3072, 3584, None]
    assert sorted(frames.take(frames.left).tolist()) == [*range(1, 512), *range(1025, 1536)]


def touch(program: GuestProgram, addresses: list[int]) -> list[int]:
    return program.feed(Records.build(len(addresses), op=Operation.GUEST_ACCESS, address=addresses)).physical.tolist()


def test_a_range_gets_a_huge_page_at_its_first_touch() -> None:
    program = GuestProgram(GuestOptions(64 << 20, "thp"))
    first, second = touch(program, [5 * M2 + 4096, 5 * M2 + 8])
    assert first == second - 8 + 4096
    assert second & (M2 - 1) == 8
    assert program.counts["pages 2M"] == 1
    assert program.counts["pages 4K"] == 0


def test_without_whole_blocks_a_range_gets_4k_for_good() -> None:
    program = GuestProgram(GuestOptions(64 << 20, "thp", fragmentation=1.0))
    touch(program, [0, 4096, M2])
    assert (program.counts["pages 2M"], program.counts["pages 4K"], program.counts["fallback"]) == (0, 3, 2)


def test_when_memory_is_out_accesses_are_counted_and_left_out() -> None:
    program = GuestProgram(GuestOptions(4 << 20))
    found = touch(program, [n << 12 for n in range(2000)])
    # 1024 frames, less frame 0 and the one of the guest's kernel, 4 tables and 2 of the last level beside the first
    assert len(found) == program.counts["pages 4K"] == 1024 - 2 - 5
    assert program.counts["no memory"] == 2000 - len(found)
    assert touch(program, [0, 5000 << 12]) == found[:1]
    assert program.counts["no memory"] == 2001 - len(found)


def test_addresses_that_are_not_canonical_are_counted_and_left_out() -> None:
    program = GuestProgram(GuestOptions(64 << 20))
    assert len(touch(program, [1 << 47, 0, (1 << 64) - 4096, 1 << 63])) == 2
    assert program.counts["not canonical"] == 2


def test_other_operations_are_refused() -> None:
    with pytest.raises(ValueError, match="expected operations of GUEST_ACCESS"):
        GuestProgram(GuestOptions()).feed(Records.build(1, op=Operation.ZAP))
