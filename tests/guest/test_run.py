"""What a program costs a guest on each design: exact against every access run one by one, and worked-out cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from guest_streams import accesses, pieces, streams
from pgemu import Config
from pgemu.guest import DesignRun, GuestOptions, GuestProgram, Tlb, TlbFound, lower_accesses, run_accesses
from pgemu.trace.schema import Flag, Operation, Records

M2, G1 = 2 << 20, 1 << 30
DESIGNS = ("restructure", "pfnmap")
KINDS = ({"vm": "sw"}, {"vm": "snp"}, {"vm": "tdx", "stage2": "ept"}, {"vm": "sw", "stage2": "ept"})


def tree(run: DesignRun) -> list[list[Any]]:
    return [run.vm.stage2(private=private).leaves.tolist() for private in (False, True)]


def every_access(program: GuestProgram, batch: Any) -> Records:
    """The batch's operations, and every access with the tables before it as a guest fault in its place."""
    walked = []
    columns = zip(*(getattr(batch.accesses, name).tolist() for name in ("address", "space", "flags")), strict=True)
    for i, (address, space, flags) in enumerate(columns):
        tables = [at & -4096 for _, at, _ in program.memory.tables[space].walk(address)]
        walked.append((i, 1, [*((gpa, 1) for gpa in tables), (int(batch.physical[i]), flags)]))
    private = int(Flag.PRIVATE)
    rows = [
        (i, order, Records.build(1, op=Operation.GUEST_FAULT, flags=flags | private, address=gpa))
        for i, order, touched in walked
        for gpa, flags in touched
    ]
    rows += [(int(at), 0, batch.records[n : n + 1]) for n, at in enumerate(batch.at.tolist())]
    return Records.concatenate(one for _, _, one in sorted(rows, key=lambda row: row[:2]))


@given(
    streams(most=30), st.sampled_from(DESIGNS), st.sampled_from(KINDS),
    st.sampled_from(("sequential", "random", "thp")), st.sampled_from(("bounce", "convert")),
    st.sampled_from((0.0, 0.1, 0.4)),
)  # fmt: skip
@settings(max_examples=60)
def test_what_is_left_out_changes_nothing(
    rows: list[tuple[int, int, int, int]], design: str, kind: dict[str, Any], allocation: str, io: str, rate: float
) -> None:
    options = GuestOptions(2 * G1, allocation, 2, io_rate=rate, io=io)  # type: ignore[arg-type]
    run, other = (DesignRun(Config(design, **kind), GuestProgram(options), Tlb("zen3")) for _ in range(2))
    batch = run.program.feed(accesses(rows))
    run.feed(batch)
    other.machine.run(every_access(run.program, batch))
    assert tree(run) == tree(other)
    result = run.result()
    assert result.failed == {}
    assert result.counts.untranslated == 0
    assert result.counts.total == len(rows)
    assert run.machine.check() == 0


@given(streams(), st.lists(st.integers(0, 99), max_size=4), st.sampled_from(DESIGNS), st.sampled_from(KINDS[:3]))
@settings(max_examples=40)
def test_batches_cut_anywhere_cost_the_same(
    rows: list[tuple[int, int, int, int]], cuts: list[int], design: str, kind: dict[str, Any]
) -> None:
    options = GuestOptions(2 * G1, "thp", io_rate=0.2, io="convert")
    records = accesses(rows)
    found = [
        run_accesses(parts, {design: Config(design, **kind)}, options, vcpus=2).to_json()
        for parts in ([records], list(pieces(records, cuts)))
    ]
    assert found[0] == found[1]


def run_of(design: str, options: GuestOptions, addresses: Any, **config: Any) -> DesignRun:
    run = DesignRun(Config(design, vm="sw", **config), GuestProgram(options), Tlb("zen3"))
    feed(run, addresses)
    return run


def feed(run: DesignRun, addresses: Any) -> None:
    run.feed(run.program.feed(Records.build(len(addresses), op=Operation.GUEST_ACCESS, address=addresses)))


@pytest.mark.parametrize("design", DESIGNS)
def test_an_entry_is_as_large_as_the_smaller_leaf(design: str) -> None:
    addresses = np.arange(1024, dtype=np.uint64) << np.uint64(12)
    small = run_of(design, GuestOptions(G1), addresses).result()
    assert small.stage2_leaves == (0, 0, 1)
    assert (small.counts.share("4K"), small.counts.missed) == (1.0, 1024)
    huge = run_of(design, GuestOptions(G1, "thp"), addresses).result()
    assert (huge.counts.share("2M"), huge.counts.missed) == (1.0, 2)
    both = run_of(design, GuestOptions(G1, "thp"), addresses, page_size=M2).result()
    assert (both.counts.share("2M"), both.stage2_leaves[2]) == (1.0, 0)


def test_a_shared_page_costs_the_guest_its_large_leaf_by_design() -> None:
    """One page of the GiB becomes shared: restructure maps 4K from then on, pfnmap 2M but for the page's own 2M."""
    found = {}
    for design in DESIGNS:
        run = run_of(design, GuestOptions(G1, "thp"), [n * M2 for n in range(4)])
        assert run.gmem.convert(G1 - 4096, 4096, shared=True).status == 0
        run.tlb.flush()
        run.vm.touch_many(np.arange(0, G1 - M2, 4096))
        run.tlb = Tlb("zen3")
        feed(run, [n * M2 + 4096 * m for n in range(4) for m in range(8)])
        counts = run.result().counts
        found[design] = counts.missed, counts.share("4K"), counts.share("2M")
    assert found == {"restructure": (32, 1.0, 0.0), "pfnmap": (4, 0.0, 1.0)}


@pytest.mark.parametrize("design", DESIGNS)
def test_a_conversion_makes_misses(design: str) -> None:
    addresses = [4096 * n for n in range(10)] * 20
    quiet = run_of(design, GuestOptions(G1), addresses).result()
    loud = run_of(design, GuestOptions(G1, io_rate=0.1, io="convert"), addresses).result()
    assert (quiet.counts.missed, quiet.counts.flushes) == (10, 0)
    # 20 times, the last of them behind the last access: all ten pages are looked for again.
    assert loud.operations["convert"] == 40
    assert loud.counts.flushes >= 20
    assert loud.counts.missed == 10 * 20


def test_bounce_buffers_are_used_one_after_the_other() -> None:
    options = GuestOptions(G1, io_rate=0.5, bounce_size=3 * 4096)
    program = GuestProgram(options)
    batch = program.feed(accesses([(0, 0, 0, 0)] * 10))
    shared = (batch.records.flags & int(Flag.SHARED)) != 0
    first = G1 - M2
    assert options.bounce == range(first, first + 3 * 4096)
    assert batch.records.address[shared].tolist() == [first, first + 4096, first + 2 * 4096]
    assert program.operations["io"] == 5
    assert program.operations["host touches"] == 3
    assert [record.tolist() for record in (program.setup().offset, program.setup().length)] == [
        [0, 0, first], [G1, G1, 3 * 4096],
    ]  # fmt: skip


def test_a_guest_without_private_memory_shares_it() -> None:
    options = GuestOptions(G1, private=False, io_rate=0.5, io="direct")
    run = DesignRun(Config("pfnmap"), GuestProgram(options), Tlb("zen3"))
    feed(run, [0, 4096, 0, 4096])
    assert run.result().failed == {}
    assert run.operations["host fault"] == 1  # of the second and the fourth access, the same page


def test_a_stream_as_a_trace_accounts_for_every_access() -> None:
    rows = [(4096 * (n % 30), n % 3, 0, 0) for n in range(300)] + [(1 << 47, 0, 0, 0)]
    found = lower_accesses([accesses(rows[:100]), accesses(rows[100:])], GuestOptions(G1, io_rate=0.1, io="convert"))
    assert found.accounting.balanced()
    assert found.accounting.events == 301
    assert found.accounting.without_operation["not canonical"] == 1
    assert (found.init, found.converts, found.accesses) == ("private", True, True)
    assert found.notes == GuestOptions(G1, io_rate=0.1, io="convert").notes()
    assert found.notes[0].startswith("guest: 1 GiB from guest physical address 0 on; ")
    found.records.check("accesses")


def test_what_is_told_of_each_access_adds_up() -> None:
    run = run_of("pfnmap", GuestOptions(G1), [4096 * (n % 5000) for n in range(20000)])
    counts = run.tlb.counts
    assert counts.total == 20000
    assert counts.accesses[0, TlbFound.MISSED].sum() == counts.missed
    assert counts.to_json()["by_kind"]["reads"]["guest_references"] == counts.sums[0, 0]
    assert sum(counts.share(size) for size in ("4K", "2M", "1G")) == pytest.approx(1)
