"""DAMON's regions as accesses. The lines and documents are written here, as the kernel's event and damo print them; the
reader also read what damo ships as data of its own tests (text, recording and JSON), which is not ours to keep."""

from __future__ import annotations

import io
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import Operation, Records
from pgemu.trace.accesses import AccessStream
from pgemu.trace.readers import damon
from pgemu.trace.source import Source

pytestmark = pytest.mark.same_with_checks

Region = tuple[int, int, int, int, int]  # time (us), target, first page, pages, accesses


def stream(data: str | bytes, form: str | None = None, **options: Any) -> AccessStream:
    data = data.encode() if isinstance(data, str) else data
    return damon.read(Source("d", None, io.BytesIO(data[1 << 16 :]), data[: 1 << 16]), form, **options)


def taken(data: str | bytes, form: str | None = None, **options: Any) -> tuple[Records, AccessStream]:
    found = stream(data, form, **options)
    return Records.concatenate(found.batches), found


def line(region: Region, age: bool = True, perf: bool = True) -> str:
    time, target, first, pages, count = region
    head = f"kdamond.0  4452 [000] {time // 10**6}.{time % 10**6:06}: damon:" if perf else (
        f"       kdamond.0-4452    [000] ..... {time // 10**6}.{time % 10**6:06}: "
    )  # fmt: skip
    addresses = f"{first << 12}-{first + pages << 12}"
    return f"{head}damon_aggregated: target_id={target} nr_regions=9 {addresses}: {count}{' 3' * age}\n"


def document(regions: list[Region], commas: bool) -> list[dict[str, Any]]:
    """As damo keeps it: a record of each target, a snapshot of each time."""

    def number(value: int) -> str:
        return f"{value:,}" if commas else str(value)

    targets = dict.fromkeys(target for _, target, *_ in regions)
    records = []
    for target in targets:
        times = dict.fromkeys(time for time, one, *_ in regions if one == target)
        snapshots = [
            {
                "start_time": "0",
                "end_time": str(time * 1000),
                "regions": [
                    {
                        "start": number(first << 12), "end": number(first + pages << 12),
                        "nr_accesses": {"samples": count, "percent": None}, "age": {"aggr_intervals": None},
                    }
                    for at, one, first, pages, count in regions
                    if (at, one) == (time, target)
                ],
            }
            for time in times
        ]  # fmt: skip
        records.append({"kdamond_idx": None, "target_id": target, "snapshots": snapshots})
    return records


SOME: list[Region] = [(5, 77, 16, 4, 0), (5, 77, 20, 3, 2), (9, 77, 16, 2, 1), (9, 77, 18, 5, 9)]


@pytest.mark.parametrize("perf", [True, False])
@pytest.mark.parametrize("age", [True, False])
def test_every_page_of_an_accessed_region_is_the_upper_bound(perf: bool, age: bool) -> None:
    text = "# tracer: nop\n" + "".join(line(one, age, perf) for one in SOME)
    records, found = taken(text)
    assert (records.address >> np.uint64(12)).tolist() == [20, 21, 22, 16, 17, 18, 19, 20, 21, 22]
    assert records.time.tolist() == [5000] * 3 + [9000] * 7
    assert set(records.op.tolist()) == {Operation.GUEST_ACCESS}
    assert not records.flags.any()
    assert found.tally.records == found.tally.inputs["read"] == 10
    assert found.tally.ignored == {"regions without an access": 1}
    assert "every page of an accessed region, once in each aggregation: an upper bound" in found.tally.notes[0]


def test_a_page_for_each_counted_access_is_the_lower_bound() -> None:
    """2 of 3 pages, 1 of 2, and 5 of 5, of which 9 accesses were counted."""
    text = "".join(line(one) for one in SOME)
    records, found = taken(text, "damon-counted")
    pages = (records.address >> np.uint64(12)).tolist()
    assert len(set(pages[:2]) & {20, 21, 22}) == 2
    assert pages[2] in (16, 17)
    assert pages[3:] == [18, 19, 20, 21, 22]
    assert "a lower bound" in found.tally.notes[0]
    again = [taken(text, "damon-counted", seed=seed)[0].address.tolist() for seed in (0, *range(20))]
    assert again[0] == again[1] == records.address.tolist()
    assert len({str(one) for one in again}) > 2


def test_pages_for_each_access_are_a_parameter() -> None:
    records, found = taken(line((5, 1, 0, 100, 3)), pages=7)
    assert len(set(records.address.tolist())) == 21
    assert "7 pages of a region for each access" in found.tally.notes[0]
    assert len(taken(line((5, 1, 0, 100, 3)), "damon-counted", pages="all")[0]) == 100


def test_targets_are_processes() -> None:
    records, found = taken(line((1, 9, 1, 1, 1)) + line((1, 4, 1, 1, 1)) + line((2, 9, 1, 1, 1)))
    assert records.space.tolist() == [0, 1, 0]
    assert found.tally.notes[-1] == "each of its targets is taken for a process of the guest"


def test_large_regions_come_in_batches() -> None:
    found = stream(line((1, 1, 1, 3_000_000, 1)) + line((2, 1, 7, 2, 1)))
    sizes = [len(one) for one in found.batches]
    assert sum(sizes) == found.tally.records == 3_000_002
    assert max(sizes) <= 1 << 20
    assert sum(map(len, stream(line((1, 1, 1, 1 << 40, 3)), "damon-counted").batches)) == 3


def test_regions_that_are_not_whole_pages() -> None:
    text = line((1, 1, 0, 1, 1)).replace("0-4096", "4095-4097")
    assert taken(text)[0].address.tolist() == [0, 4096]


def test_what_is_no_region_is_counted() -> None:
    text = (
        line((1, 1, 1, 1, 1))
        + line((1, 1, 1, 1, 1)).replace("8192", "1")  # ends before it begins
        + line((1, 1, 1, 1, 1)).replace("target_id", "target")
        + line((1, 1, 1, 1, 1)).replace("damon_aggregated", "damos_before_apply")
        + "CPU:0 [LOST 7 EVENTS]\nno event\n\n"
    )
    records, found = taken(text)
    assert len(records) == 1
    assert found.tally.ignored == {"damos_before_apply": 1, "events lost": 7}
    assert found.tally.rejected == 3
    assert [number for number, _ in found.tally.first_rejected] == [2, 3, 6]


@pytest.mark.parametrize("deflated", [True, False])
def test_documents_of_damo(deflated: bool) -> None:
    text = json.dumps(document(SOME, commas=True), indent=4).encode()
    data = zlib.compress(text) if deflated else text
    assert damon.sniff(data) == 2
    assert taken(data)[0].address.tolist() == taken("".join(map(line, SOME)))[0].address.tolist()


def test_regions_of_documents_that_are_odd() -> None:
    """A share instead of a count, a mark behind a lone aggregation, and what is none."""
    region = {"start": "4,096", "end": "8192", "nr_accesses": {"samples": None, "percent": "3.5 %"}}
    mark = {"start": "0", "end": "0", "nr_accesses": {"samples": -1, "percent": None}}
    regions = [region, {**region, "nr_accesses": "2"}, mark, {**region, "start": "x"}, {**region, "end": None}, 7, {}]
    data = json.dumps([{"snapshots": [{"end_time": 7, "regions": regions}]}])
    records, found = taken(data)
    assert records.address.tolist() == [4096, 4096]
    assert found.tally.ignored == {"marks of an aggregation's end": 1}
    assert found.tally.rejected == 4


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[{"snapshots": 7}]', "d: record 0: expected snapshots"),
        (b'[{"snapshots": []}, 7]', "d: record 1: expected snapshots"),
        (b'[{"snapshots": [{"end_time": "soon", "regions": []}]}]', "d: record 0, snapshot 0: expected end_time"),
        (b'[{"snapshots": [{"end_time": "1"}]}]', "d: record 0, snapshot 0: expected end_time"),
        (b'[{"snapshots": []}', "d: no JSON as damo writes it"),
        (b'[{"snapshots": ' + b"[" * 100_000, "d: no JSON as damo writes it"),
        (b'[{"snapshots": []}]', "d: no region of DAMON in it"),
        (zlib.compress(b'[{"snapshots": []}]' * 99)[:-3], "d: truncated, or something stands behind"),
        (zlib.compress(b'[{"snapshots": []}]') + b"x", "d: truncated, or something stands behind"),
        (zlib.compress(b'[{"snapshots": []}]')[:-1] + b"x", "d: damaged zlib stream"),
        (b"nothing\n", "d: no region of DAMON in it"),
    ],
)
def test_what_is_refused(data: bytes, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        taken(data)
    assert str(caught.value).startswith(expected)


def test_a_small_file_that_grows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damon, "_MOST_JSON", 1 << 20)
    with pytest.raises(InputError, match="more than 1 MiB of JSON"):
        taken(zlib.compress(b'[{"snapshots": [' + b" " * (2 << 20)))


@st.composite
def regions(draw: st.DrawFn) -> list[Region]:
    """By time, as the kernel prints them."""
    found = []
    for time in sorted(draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=4, unique=True))):
        target, count = draw(st.integers(0, 1)), draw(st.integers(1, 4))
        for _ in range(count):
            pages = draw(st.integers(1, 40))
            found.append((time, target, draw(st.integers(0, (1 << 52) - 41)), pages, draw(st.integers(0, 20))))
    return found


@given(found=regions(), commas=st.booleans(), perf=st.booleans(), each=st.integers(1, 3))
def test_regions_come_back_from_every_form(found: list[Region], commas: bool, perf: bool, each: int) -> None:
    """Text, JSON and deflated JSON say the same; both bounds enclose what any choice of pages gives."""
    text = "".join(line(one, perf=perf) for one in found)
    data = json.dumps(document(found, commas)).encode()
    order = list(dict.fromkeys(target for _, target, *_ in found))
    wanted = [
        (time * 1000, order.index(target), page << 12)
        for time, target, first, pages, count in found
        for page in range(first, first + pages)
        if count
    ]
    if not any(one[4] for one in found):
        assert len(taken(text)[0]) == 0
        return
    for one in (text, data, zlib.compress(data)):
        records = taken(one)[0]
        told = zip(records.time.tolist(), records.space.tolist(), records.address.tolist(), strict=True)
        if one is text:
            assert list(told) == _renumbered(wanted)
        assert sorted(records.address.tolist()) == sorted(address for *_, address in wanted)
    drawn = taken(text, pages=each)[0]
    assert len(drawn) == sum(min(pages, each * count) for _, _, _, pages, count in found)
    assert set(drawn.address.tolist()) <= {address for *_, address in wanted}


def _renumbered(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Targets by the order in which accessed regions name them."""
    order = list(dict.fromkeys(space for _, space, _ in rows))
    return [(time, order.index(space), address) for time, space, address in rows]
