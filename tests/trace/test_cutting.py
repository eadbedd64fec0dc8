"""Pieces of traces: what stood at the beginning of the piece is made, and nothing else runs before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu import trace
from pgemu.errors import InputError
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.cutting import cut, cut_accesses
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.memory_layout import Layout
from pgemu.trace.merging import merge, merge_accesses
from pgemu.trace.schema import Flag, Operation, Records

pytestmark = pytest.mark.same_with_checks
PAGE = 4096
PAGES = 64
SHIPPED = trace.load(trace.shipped())


def made(conversions: list[tuple[int, int, bool]], init: str = "private") -> Lowered:
    """A trace of conversions, one each 10 ns, with a guest fault behind each."""
    n = len(conversions)
    first, length, shared = (np.array(column) for column in zip(*conversions, strict=True))
    converts = Records.build(
        n, op=Operation.CONVERT, time=np.arange(n) * 10, offset=first * PAGE, length=length * PAGE,
        flags=np.where(shared, int(Flag.SHARED), int(Flag.PRIVATE)),
    )  # fmt: skip
    faults = Records.build(n, op=Operation.GUEST_FAULT, time=np.arange(n) * 10 + 5, address=first * PAGE)
    records = Records.concatenate([converts, faults])
    records = records.take(np.argsort(records.time, kind="stable"))
    layout = Layout(PAGES * PAGE, PAGE, (), ())
    return Lowered(records, layout, init, True, Accounting(operations=len(records)), "a trace")  # type: ignore[arg-type]


def shared_pages(records: Records, init: str) -> set[int]:
    """The dict model: pages that are shared behind all conversions."""
    found = set(range(PAGES)) if init == "shared" else set()
    for op, flags, offset, length in zip(
        records.op.tolist(), records.flags.tolist(), records.offset.tolist(), records.length.tolist(), strict=True
    ):
        if op == Operation.CONVERT:
            pages = set(range(offset // PAGE, (offset + length) // PAGE))
            found = found | pages if flags & Flag.SHARED else found - pages
    return found


ranges = st.tuples(st.integers(0, PAGES - 8), st.integers(1, 8), st.booleans())


@settings(deadline=None)
@given(st.lists(ranges, min_size=1, max_size=12), st.integers(0, 11), st.sampled_from(("private", "shared")))
def test_what_is_shared_at_the_cut_is_what_was(conversions: list[tuple[int, int, bool]], at: int, init: str) -> None:
    whole = made(conversions, init)
    first = min(at, len(conversions) - 1) * 10
    piece = cut(whole, first)
    setup = piece.accounting.setup
    before = whole.records.take(np.flatnonzero(whole.records.time < first))
    assert shared_pages(piece.records[:setup], init) == shared_pages(before, init)
    assert not (piece.records[:setup].op == Operation.GUEST_FAULT).any()
    rest = whole.records.take(np.flatnonzero(whole.records.time >= first))
    for column in ("time", "op", "flags", "address", "offset", "length"):
        assert (getattr(piece.records[setup:], column) == getattr(rest, column)).all()
    assert (np.diff(piece.records.time.astype(np.int64)) >= 0).all()


def test_a_piece_of_a_real_log_says_what_it_left_out() -> None:
    time = SHIPPED.records.time
    piece = cut(SHIPPED, int(time[9000]), int(time[12000]))
    rest = piece.records[piece.accounting.setup :]
    inside = (time >= time[9000]) & (time < time[12000])
    assert len(rest) == np.count_nonzero(inside)
    assert any("make what stood at its beginning" in note and "guest fault" in note for note in piece.notes)
    assert (piece.records[:1].op == Operation.MMAP).all()
    with pytest.raises(InputError, match="no record is left"):
        cut(SHIPPED, int(time[-1]) + 1)


def test_of_other_vms_only_what_names_none_is_kept() -> None:
    records = Records.build(
        3,
        op=[Operation.GUEST_FAULT, Operation.GUEST_FAULT, Operation.HOST_FAULT],
        vm=[0, 1, 0],
        address=PAGE,
        time=[1, 2, 3],
    )
    piece = cut(replace(SHIPPED, records=records, accounting=Accounting(operations=3), fault_levels=None), vm=1)
    assert piece.records.op.tolist() == [Operation.GUEST_FAULT, Operation.HOST_FAULT]
    assert piece.records.vm.tolist() == [1, 0]


def test_merged_vms_are_numbered_one_behind_the_other() -> None:
    one, other = made([(0, 1, True), (3, 2, False)]), made([(1, 1, True)])
    both = merge([one, other])
    assert len(both.records) == 6
    assert len(both.guests) == 2
    of_other = both.records.take(np.flatnonzero(both.records.vm == 1))
    assert of_other.op.tolist() == [Operation.CONVERT, Operation.GUEST_FAULT]
    assert of_other.object.tolist() == [1, 0]  # the inode; a guest fault names none
    assert both.records.time.tolist() == sorted(both.records.time.tolist())
    thrice = merge([both, other])
    assert sorted(set(thrice.records.vm.tolist())) == [0, 1, 2]
    with pytest.raises(InputError, match="expected two traces"):
        merge([one])


def test_each_vm_of_a_merged_trace_begins_as_it_did_alone() -> None:
    """Memory that was private at first beside memory that was shared: both are so at the cut, converted or not."""
    one, other = made([(0, 4, True), (9, 1, True)], "private"), made([(0, 4, False), (9, 1, False)], "shared")
    both = merge([one, other])
    assert [guest.init for guest in both.guests] == ["private", "shared"]
    assert both.init == merge([other, one]).init == "private"  # what the VMs' kind has to know
    piece = cut(both, 10)
    setup = piece.records[: piece.accounting.setup]
    for inode, alone in enumerate((one, other)):
        own = setup.take(np.flatnonzero(setup.object == inode))
        before = alone.records.take(np.flatnonzero(alone.records.time < 10))
        assert shared_pages(own, alone.init) == shared_pages(before, alone.init)


def test_pages_of_one_size_merge() -> None:
    one = made([(0, 1, True)])
    layout = replace(one.layout, page_size=1 << 21, inode_size=1 << 21)
    with pytest.raises(InputError, match="in pages of 2097152 bytes, expected 4096"):
        merge([one, replace(one, layout=layout)])


def test_processes_do_not_merge_with_vms() -> None:
    one = made([(0, 1, True)])
    with pytest.raises(InputError, match=r"memory of a process, expected that of a guest as of a trace"):
        merge([one, replace(one, kind="process")])


def stream(times: list[int], name: str, batch: int) -> AccessStream:
    records = Records.build(len(times), op=Operation.GUEST_ACCESS, time=times, address=np.arange(len(times)) * 8)
    pieces = (records[i : i + batch] for i in range(0, len(times), batch))
    return AccessStream.of(name, "accesses", pieces, Tally())


times = st.lists(st.integers(0, 50), min_size=1, max_size=30).map(sorted)


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.integers(1, 7)), min_size=2, max_size=4))
def test_streams_merge_by_time_whatever_their_batches(given: list[tuple[list[int], int]]) -> None:
    streams = [stream(times, f"s{number}", batch) for number, (times, batch) in enumerate(given)]
    records = Records.concatenate(merge_accesses(streams).batches)
    expected = sorted(
        (time, number, place) for number, (times, _) in enumerate(given) for place, time in enumerate(times)
    )
    rows = zip(records.time.tolist(), records.space.tolist(), (records.address // 8).tolist(), strict=True)
    assert list(rows) == expected


@settings(deadline=None)
@given(times, st.integers(1, 7), st.integers(0, 50), st.integers(0, 50))
def test_streams_are_cut_by_time(given: list[int], batch: int, first: int, end: int) -> None:
    records = Records.concatenate(cut_accesses(stream(given, "s", batch), (True, first), (False, end)).batches)
    assert records.time.tolist() == [time for time in given if given[0] + first <= time < end]
