"""I/O page tables that kernels wrote: every entry decodes and is made again; maps and unmaps leave the same tables."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from oracle.capture import Capture, load, name_of
from oracle.iommu_domains import ADDRESS, SHIPPED, format_of, iommu_captures, replay, translated
from pgemu.tables.entries import EntryKind, decode
from pgemu_kernels.formats.iommu import amd_sized_leaf
from pgemu_kernels.formats.page_format import PageFormat

CHECKPOINTS = {
    "oracle-iommu/linux-6.12.107-debian-amd": 207,
    "oracle-iommu/linux-6.12.107-debian-vtd": 207,
    "oracle-iommu/linux-6.18.15-debian-vtd": 207,
    "oracle-iommu/linux-7.3.4-debian-amd": 335,
    "oracle-iommu/linux-7.3.4-debian-vtd": 335,
    "oracle-iommu/linux-7.3.4-debian-vtd-scalable": 79,
}
"""Checkpoints of each shipped file, all of which the replay gives: 1,370 together."""
LEAST = 0.9  # of the checkpoints of another file: the replay knows maps, unmaps, and what opens and closes


@pytest.fixture(scope="module", params=iommu_captures(), ids=name_of)
def capture(request: pytest.FixtureRequest) -> Capture:
    return load(request.param)


def test_the_shipped_files_are_known() -> None:
    assert {name_of(path) for path in SHIPPED.glob("*.json.xz")} == set(CHECKPOINTS)


def made_again(fmt: PageFormat, level: int, entry: int) -> int:
    """The same leaf from what it says."""
    found = decode(fmt, level, entry)
    assert found.address is not None
    if fmt.is_sized(entry):
        size = fmt.size_of_leaf(level, entry)
        coherent = fmt.leaf_bits & ~fmt.present
        return amd_sized_leaf(found.address, size, read=found.read, write=found.write, extra=coherent)
    return fmt.encode(level, found.address, read=found.read, write=found.write, accessed=False)


def told_apart(fmt: PageFormat, level: int, first: int, count: int, step: int) -> list[int]:
    """Entries of a run of leaves that have all its rights, and each bit of their frames set and not: that the others
    differ from the first in the frame's number alone is asserted here."""
    size = fmt.size_of_leaf(level, first)
    frame = np.uint64(ADDRESS & -size)
    entries = np.uint64(first) + np.arange(count if step else 1, dtype=np.uint64) * np.uint64(step)
    assert np.all((entries ^ np.uint64(first)) & ~frame == 0)
    if len(entries) <= 64:
        return entries.tolist()
    bits = [int(np.argmax(entries & np.uint64(1 << bit) == want)) for bit in range(12, 52) for want in (0, 1 << bit)]
    return entries[sorted({0, len(entries) - 1, *bits})].tolist()


def test_every_entry_decodes_and_is_made_again(capture: Capture) -> None:
    counts: Counter[str] = Counter()
    known: set[tuple[int, ...]] = set()
    for checkpoint in capture.checkpoints:
        for row in translated(checkpoint):
            fmt = format_of(capture, row["kind"], row["levels"])
            tables = [(level, int(text, 16)) for _, level, text in row["tables"]]
            counts["tables"] += len(tables)
            for level, entry in set(tables) - known:
                found = decode(fmt, level, entry)
                assert (found.kind, found.unknown, found.reserved) == (EntryKind.TABLE, 0, 0), (level, hex(entry))
                assert found.address is not None
                assert fmt.table_entry(found.address, level) == entry, (level, hex(entry))
            runs = {(level, int(text, 16), count, step) for _, level, text, count, step in row["leaves"]}
            counts["leaves"] += sum(count for _, _, _, count, _ in row["leaves"])
            for level, first, count, step in runs - known:
                for entry in told_apart(fmt, level, first, count, step):
                    found = decode(fmt, level, entry)
                    assert (found.kind, found.unknown, found.reserved) == (EntryKind.LEAF, 0, 0), (level, hex(entry))
                    assert made_again(fmt, level, entry) == entry, (level, hex(entry))
            known |= runs | set(tables)
            assert not row["other_nonpresent"]
    print(f"\n{capture.name}: {counts['tables']:,} table entries, {counts['leaves']:,} leaves")
    assert counts["tables"] > 500
    assert counts["leaves"] > 1000


def test_maps_and_unmaps_give_the_captured_tables(capture: Capture) -> None:
    counts: Counter[str] = Counter()
    told: list[str] = []
    for checkpoint, ended, differing in replay(capture):
        counts["not reached" if ended else "differs" if differing else "equal"] += 1
        if ended or differing:
            told.append(f"{checkpoint.scenario}/{checkpoint.name}: {ended or '; '.join(differing)}")
    print(f"\n{capture.name}: {dict(counts)}", *told[:10], sep="\n  ")
    assert not counts["differs"], told[:10]
    assert counts["equal"] >= CHECKPOINTS.get(capture.name, LEAST * counts.total())
