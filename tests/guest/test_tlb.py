"""TLBs against a model of lists, over tables of one stage and nested ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from guest_streams import Model, accesses, processors, streams
from pgemu import Config, Machine
from pgemu.guest import Cache, DesignRun, GuestOptions, GuestProgram, Processor, Tlb, TlbCache, TlbFound
from pgemu.tables.page_table import PageTable
from pgemu.tables.translation import Kind, translate_nested
from pgemu_kernels import words as W

M2, G1 = 2 << 20, 1 << 30
BIG = Processor((TlbCache(64, 64, ("4K", "2M", "1G"), ("data", "fetch")),))


def mixed_table() -> PageTable:
    """4K pages, then a 2M leaf, then a 1G leaf, at 0, 1G and 2G of two bases; the machine that holds it lives on."""
    table = Machine(Config()).create_page_table("x86-64")
    for base in (0, 0x7F00_0000_0000):
        assert table.map_range(base, 0, 4 * M2, max_level=1).status == 0
        assert table.map_range(base + 4 * M2, 0, 4 * M2, max_level=2).status == 0
        assert table.map(base + G1, G1, level=3).status == 0
    return table


TABLE = mixed_table()
PLACES = st.builds(
    lambda base, at, near: base + at + (near << 12),
    st.sampled_from((0, 0x7F00_0000_0000)), st.sampled_from((0, M2, 4 * M2, 5 * M2, G1, G1 + M2)), st.integers(0, 6),
)  # fmt: skip


def steps_of(space: int, address: int) -> tuple[list[tuple[int, int]], int]:
    return [(at, level) for level, at, _ in TABLE.walk(address)], 0


@given(processors(), st.lists(st.tuples(PLACES, st.sampled_from((0, 1, 2)), st.integers(0, 1)), max_size=80))
@settings(max_examples=150)
def test_one_stage_is_what_lists_say(processor: Processor, rows: list[tuple[int, int, int]]) -> None:
    tlb, model = Tlb(processor), Model(processor, steps_of, None)
    for address, flags, space in rows:
        found = tlb.translate(TABLE, [address], [flags], space=space)
        told = (int(found.found[0]), int(found.levels[0]), int(found.references[0]))
        assert told == model.access(address, flags, space)


@given(st.lists(st.tuples(PLACES, st.sampled_from((0, 1, 2))), max_size=80), st.integers(1, 80))
def test_batches_of_any_size_give_the_same(rows: list[tuple[int, int]], size: int) -> None:
    whole, cut = Tlb("zen3"), Tlb("zen3")
    address = np.array([row[0] for row in rows], np.uint64)
    flags = np.array([row[1] for row in rows], np.uint8)
    found = whole.translate(TABLE, address, flags)
    parts = [cut.translate(TABLE, address[i : i + size], flags[i : i + size]) for i in range(0, len(rows), size)]
    for name in ("found", "levels", "references"):
        assert [n for part in parts for n in getattr(part, name).tolist()] == getattr(found, name).tolist()
    assert whole.counts.to_json() == cut.counts.to_json()


def nested(
    options: GuestOptions, rows: list[tuple[int, int, int, int]], config: Config, shared: int | None = None
) -> DesignRun:
    """A design's machine after a stream, with a page of it shared, all of it mapped, and the tables in its frames."""
    program = GuestProgram(options)
    run = DesignRun(config, program, Tlb(BIG))
    batch = program.feed(accesses(rows))
    run.feed(batch)
    if shared is not None and rows:
        page = int(batch.physical[shared % len(rows)]) & -4096
        assert run.gmem.convert(page, 4096, shared=True).status == 0
    tables = [page for table in program.memory.tables.values() for page in table.table_pages().values()]
    touched = run.vm.touch_many(np.concatenate([batch.physical, *tables]))
    assert (touched.status > 0).all()
    run.write_tables()
    return run


@given(
    processors(), streams(), st.sampled_from(("sequential", "random", "thp")), st.sampled_from(("npt", "ept")),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_nested_walks_are_what_lists_say(
    processor: Processor, rows: list[tuple[int, int, int, int]], allocation: str, stage2: str, shared: int
) -> None:
    config = Config("pfnmap", vm="sw", stage2=stage2)  # type: ignore[arg-type]
    run = nested(GuestOptions(G1, allocation), rows, config, shared)  # type: ignore[arg-type]
    guest = run.program.memory

    def steps(space: int, address: int) -> tuple[list[tuple[int, int]], int]:
        walk = list(guest.tables[space].walk(address))
        level, _, entry = walk[-1]
        inside = (1 << 12 + 9 * (level - 1)) - 1
        return [(at, level) for level, at, _ in walk], entry & 0x000F_FFFF_FFFF_F000 & ~inside | address & inside

    tlb, model = Tlb(processor), Model(processor, steps, lambda gpa: list(run.vm.walk(gpa))[-1][0])
    format_row = run.machine.register(W.R_STAGE2_FORMAT)
    for address, flags, space, _ in rows:
        root = guest.tables[space].root
        found = tlb.translate_nested(run.machine, 0, root, format_row, run.vm.root, [address], [flags], space=space)
        told = (int(found.found[0]), int(found.levels[0]), int(found.references[0]))
        assert told == model.access(address, flags, space)


def test_without_caches_a_miss_reads_what_a_nested_walk_reads() -> None:
    rows = [(0x1000 + (n << 12), 0, 0, 0) for n in range(40)] + [(n << 30, 0, 0, 0) for n in range(4)]
    run = nested(GuestOptions(G1, "random"), rows, Config("restructure", vm="sw"))
    addresses = np.array([row[0] for row in rows], np.uint64)
    root, row = run.program.memory.tables[0].root, run.machine.register(W.R_STAGE2_FORMAT)
    whole = translate_nested(run.machine, 0, root, row, run.vm.root, addresses, Kind.USER_READ)
    tlb = Tlb(BIG)
    told = tlb.translate_nested(run.machine, 0, root, row, run.vm.root, addresses)
    missed = told.found == TlbFound.MISSED
    assert missed[: len(set(addresses.tolist()))].any()
    assert (told.references[missed] == whole.read_count[missed]).all()
    assert (told.levels == np.minimum(whole.guest_level, whole.host_level)).all()
    assert set(told.references[missed].tolist()) == {14}  # 4K over 1G: (4 + 1) (2 + 1) - 1


def test_a_flush_forgets_everything() -> None:
    tlb = Tlb("skylake-sp")
    assert tlb.translate(TABLE, [0, 0]).references.tolist() == [4, 0]
    tlb.flush()
    assert tlb.translate(TABLE, [0, 0]).references.tolist() == [4, 0]
    assert tlb.counts.flushes == 1


def test_each_vcpu_has_its_own() -> None:
    tlb = Tlb("skylake-sp", vcpus=2)
    assert tlb.translate(TABLE, [0, 0, 0, 0], actors=np.array([0, 1, 2, 3], np.uint16)).found.tolist() == [2, 2, 0, 0]


def test_what_is_not_mapped_is_counted_and_not_kept() -> None:
    tlb = Tlb("skylake-sp")
    found = tlb.translate(TABLE, [5 << 30, 5 << 30])
    assert found.found.tolist() == [2, 2]
    assert found.levels.tolist() == [0, 0]
    assert tlb.counts.untranslated == 2
    assert tlb.counts.missed == 0


def test_an_address_that_is_not_canonical_has_no_translation() -> None:
    tlb = Tlb("skylake-sp")
    assert tlb.translate(TABLE, [0, 1 << 60, 1 << 47, 0]).levels.tolist() == [1, 0, 0, 1]
    assert tlb.counts.untranslated == 2


def test_tables_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of format x86-64, EPT or NPT"):
        Tlb("zen").translate(Machine(Config()).create_page_table("arm64-s2"), [0])


@pytest.mark.parametrize("cache", [(3, 2), (6, 2), (4, 0), (0, 4)])
def test_sets_are_a_power_of_two(cache: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected a power of two of sets"):
        Cache(*cache)


def test_an_unknown_processor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"processor 'z80': expected one of skylake-sp, zen, zen3"):
        Tlb("z80")
