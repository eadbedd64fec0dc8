"""Pages that KVM itself maps, in traces: records of Parquet through `pgemu compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pgemu.cli import main
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation

PAGES = 4


def records() -> list[dict[str, int]]:
    """Shared pages that KVM maps, in both ways, while they become private; it uses them, and lets go."""

    def each(op: Operation, flags: int = 0, **columns: Any) -> list[dict[str, int]]:
        made = []
        for page in range(PAGES):
            values = {name: value(page) if callable(value) else value for name, value in columns.items()}
            made.append(
                {"op": int(op), "flags": int(flags), "object": 0, "address": 0, "offset": 0, "length": 0} | values
            )
        return made

    def at(page: int) -> int:
        return page * PAGE_4K

    def cache(page: int) -> int:
        return 100 + page

    return [
        *each(Operation.CONVERT, Flag.SHARED, offset=at, length=PAGE_4K),
        *each(Operation.GUEST_FAULT, Flag.SHARED, address=at),
        *each(Operation.NESTED_MAP, Flag.WRITE, object=lambda page: page, address=at),
        *each(Operation.NESTED_MAP, Flag.CACHED, object=cache, address=lambda page: at(page) + 24, length=16),
        *each(Operation.CONVERT, Flag.PRIVATE, offset=at, length=PAGE_4K),
        *each(Operation.NESTED_MAP, Flag.THROUGH | Flag.WRITE, object=lambda page: page),
        *each(Operation.NESTED_MAP, Flag.THROUGH, object=cache),
        *each(Operation.NESTED_UNMAP, object=lambda page: page),
        *each(Operation.NESTED_UNMAP, object=cache),
        *each(Operation.CONVERT, Flag.PRIVATE, offset=at, length=PAGE_4K),
    ]


def compared(folder: Path, *options: str) -> dict[str, Any]:
    """The document, and the screen's lines under "screen"."""
    path = folder / "t.parquet"
    pq.write_table(pa.Table.from_pylist(records()), path)
    asked = ["compare", str(path), "--page-size", "2M", "--no-sensitivity", *options]
    document = CliRunner().invoke(main, [*asked, "--format", "json"])
    screen = CliRunner().invoke(main, asked)
    assert document.exit_code == screen.exit_code, document.stderr
    return {**json.loads(document.stdout), "screen": screen.stdout, "status": screen.exit_code}


def outcomes(document: dict[str, Any], design: str, operation: str) -> dict[str, int]:
    found: dict[str, int] = document["designs"][design]["operations"][operation]["outcomes"]
    return found


@pytest.mark.parametrize("unsafe", [False, True])
def test_what_each_design_makes_of_it(tmp_path: Path, unsafe: bool) -> None:
    found = compared(tmp_path, *(["--allow-unsafe-mappings"] if unsafe else []))
    assert found["status"] == 0
    # restructure: pinned, so that no conversion goes through before the pages are let go of, and nothing is stale.
    assert outcomes(found, "restructure", "convert") == {"-EAGAIN": PAGES, "ok": 2 * PAGES}
    assert outcomes(found, "restructure", "nested map") == {"ok": 4 * PAGES - PAGES, "-EFAULT": PAGES}
    assert outcomes(found, "restructure", "nested unmap") == {"ok": 2 * PAGES}
    # pfnmap: no map at all, or one that shows what has become private.
    assert outcomes(found, "pfnmap", "convert") == {"ok": 3 * PAGES}
    maps = {"ok": 3 * PAGES, "-EFAULT": PAGES} if unsafe else {"ok": PAGES, "-EFAULT": PAGES, "-EINVAL": PAGES}
    if not unsafe:
        maps["-ENOENT"] = PAGES
    assert outcomes(found, "pfnmap", "nested map") == maps
    state = {design: run["state"] for design, run in found["designs"].items()}
    assert [state[design]["mapped_private"] for design in ("restructure", "pfnmap")] == [0, PAGES * unsafe]
    assert [state[design]["mapped_freed"] for design in ("restructure", "pfnmap")] == [0, 0]
    told = f"pfnmap makes {PAGES} uses of a stale mapping"
    assert (told in " ".join(found["screen"].split())) == unsafe


def test_a_use_names_no_address(tmp_path: Path) -> None:
    """Memory is where it is mapped, and stated slots need not have address 0, for a use reads no address."""
    moved = [
        {**one, "address": one["address"] + (1 << 30)} if one["op"] == Operation.NESTED_MAP and not one["flags"] & 64
        else {**one, "address": one["address"] + (1 << 30)} if one["op"] == Operation.GUEST_FAULT else one
        for one in records()
    ]  # fmt: skip
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(moved), path)
    asked = ["compare", str(path), "--page-size", "2M", "--no-sensitivity", "--memslot", "0x40000000:2M:0"]
    found = CliRunner().invoke(main, [*asked, "--format", "json"])
    assert found.exit_code == 0, found.stderr
    assert outcomes(json.loads(found.stdout), "restructure", "nested map") == {"ok": 3 * PAGES, "-EFAULT": PAGES}
