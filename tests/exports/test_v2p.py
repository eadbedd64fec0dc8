"""Maps of virtual to physical pages: what is written is read back, and is what the machine has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports_runs import M2, config, program_of, random_accesses
from pgemu import InputError
from pgemu.exports.physical import PhysicalRun
from pgemu.exports.v2p import Pages, one_size, pages_of, text
from pgemu.trace.v2p import read_v2p


def ran(design: str, **options: Any) -> tuple[PhysicalRun, Any]:
    program = program_of(**options)
    run = PhysicalRun(config(design), program)
    batch = program.feed(random_accesses(1, 500))
    list(run.addresses(batch))
    return run, batch


def read_back(pages: Pages, folder: Path) -> Any:
    path = folder / "v2p.textproto"
    path.write_text("".join(text(pages, ["a comment"])))
    return read_v2p(path)


def translated(table: Any, address: int) -> int | None:
    """By the table as it is read."""
    for virtual, physical, size in table.tolist():
        if virtual <= address < virtual + size:
            return int(physical + address - virtual)
    return None


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"allocation": "thp"}, {"allocation": "thp", "io_rate": 0.02, "io": "convert"}]
)
@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_the_map_that_is_read_back_is_where_the_accesses_were(
    design: str, options: dict[str, Any], uniform: bool, tmp_path: Path
) -> None:
    run, batch = ran(design, **options)
    pages, missing = pages_of(run)
    table = read_back(one_size(pages) if uniform else pages, tmp_path)
    sizes = set(table[:, 2].tolist())
    assert len(sizes) == 1 if uniform else sizes <= {4096, M2}
    assert missing == 0
    for address, gpa in list(zip(batch.accesses.address.tolist(), batch.physical.tolist(), strict=True))[::7]:
        assert translated(table, address) == ((run.gmem.pfn(gpa) or 0) << 12) + gpa % 4096


def test_pages_are_as_large_as_both_stages_let_them_be(tmp_path: Path) -> None:
    run, batch = ran("restructure", allocation="thp")
    block = int(batch.physical[0]) & -M2
    run.gmem.convert(block, 4096, shared=True)
    run.vm.touch_many(range(block + 4096, block + M2, 4096))
    pages, missing = pages_of(run)
    assert (missing, int((pages.size == 4096).sum())) == (1, 511)  # the shared page was not touched again
    sizes = dict(zip(*np.unique(pages_of(run)[0].size, return_counts=True), strict=True))
    assert set(sizes) == {4096, M2}  # what was split, and what was not
    assert set(pages_of(run, stage="guest")[0].size.tolist()) == {M2}


def test_guest_addresses_are_those_of_its_tables() -> None:
    run, batch = ran("pfnmap")
    pages, missing = pages_of(run, stage="guest")
    frames = dict(zip(pages.virtual.tolist(), pages.physical.tolist(), strict=True))
    assert missing == 0
    for address, gpa in zip(batch.accesses.address.tolist(), batch.physical.tolist(), strict=True):
        assert frames[address & -4096] == gpa & -4096


def test_a_space_that_is_not_there_is_refused() -> None:
    run, _ = ran("pfnmap")
    with pytest.raises(InputError, match="--space 3: expected one of 0"):
        pages_of(run, 3)


def test_the_lines_are_what_dynamorio_reads_line_by_line() -> None:
    """v2p_reader.cpp: a field a line, "key: value", comments from the first column on, one page_size."""
    pages = Pages(*(np.array(column, np.uint64) for column in ([0x1000, 0x2000], [0x5000, 0x9000], [4096, 4096])))
    assert "".join(text(pages, ["x"])) == (
        "# x\naddress_mapping_group {\n  page_size: 4096\n  page_count: 2\n"
        "  address_mapping {\n    virtual_address: 0x1000\n    physical_address: 0x5000\n  }\n"
        "  address_mapping {\n    virtual_address: 0x2000\n    physical_address: 0x9000\n  }\n}\n"
    )
    for line in "".join(text(pages)).splitlines():
        assert re.fullmatch(r" *(\w+: (0x[0-9a-f]+|\d+)|\w+ \{|\})", line)
