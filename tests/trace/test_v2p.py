"""Translations beside a recording: text of protobuf, groups of several page sizes, each address once."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fuzzing import attacked, mutated, rounds
from pgemu.errors import InputError
from pgemu.trace.v2p import beside, merged, read_v2p, table
from streams import DATA

pytestmark = pytest.mark.same_with_checks

SAMPLE = DATA / "threadsig.v2p.textproto"
MIXED = """# two sizes
address_mapping_group { page_size: 0x200000
  address_mapping { virtual_address: 0x40000000 physical_address: 0x600000 }  # hexadecimal
  address_mapping: { physical_address: 2097152 }
  information { page_count: 2 note: "a { that is text" } }
address_mapping_group < address_mapping < virtual_address: 4096000; physical_address: 0x5000, > page_size: 4096 >
information { page_count: 3 }
"""


def text_of(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_real_file_is_read_whole() -> None:
    """The nine pairs, by a look at lines alone."""
    numbers = re.findall(r"(?:virtual|physical)_address: (\d+)", SAMPLE.read_text())
    pairs = sorted(zip(map(int, numbers[::2]), map(int, numbers[1::2]), strict=True))
    assert read_v2p(SAMPLE).tolist() == [[virtual, physical, 2 << 20] for virtual, physical in pairs]
    assert len(pairs) == 9


def test_groups_may_have_pages_of_several_sizes_and_fields_that_are_not_there(tmp_path: Path) -> None:
    found = read_v2p(text_of(tmp_path / "a", MIXED))
    assert found.dtype == np.uint64
    assert found.tolist() == [[0, 2 << 20, 2 << 20], [4096000, 0x5000, 4096], [1 << 30, 0x600000, 2 << 20]]
    (tmp_path / "b").write_bytes(gzip.compress(MIXED.encode()))
    assert read_v2p(tmp_path / "b").tolist() == found.tolist()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("information { }", r"a: no translation in it, expected address_mapping_group \{"),
        ("address_mapping_group {\n address_mapping { }\n}", "a:3: a group without page_size, expected"),
        ("address_mapping_group { page_size: 4095 }", "a:1: page_size 4095, expected a power of two from 4096 to 1073"),
        ("address_mapping_group { page_size: 08192 }", "a:1: page_size '08192', expected a number of at most 64 bits"),
        ("address_mapping_group { page_size: 02000 }", "a:1: page_size 1024, expected a power of two"),
        ("address_mapping_group { page_size: 2048 }", "a:1: page_size 2048, expected a power of two"),
        ("address_mapping_group { page_size: 0 }", "a:1: page_size 0, expected a power of two"),
        (
            "address_mapping_group { page_size: 4096\n address_mapping { virtual_address: 0x1001 } }",
            "a:2: 0x1001 at 0x0, expected multiples of page_size 0x1000",
        ),
        ("address_mapping_group { page_size: '4096' }", "a:1: page_size \"'4096'\", expected a number of at most 64"),
        (f"address_mapping_group {{ page_size: {1 << 64} }}", "a:1: page_size '18446744073709551616', expected a num"),
        ("address_mapping_group { page_size: 4096 ", "a:1: truncated: address_mapping_group does not end"),
        ("address_mapping_group", "a:1: truncated: address_mapping_group does not end"),
        ("address_mapping_group { page_size 4096 } }", "a:1: '}' where nothing ends"),
        ("address_mapping_group { > }", "a:1: '>' where nothing ends"),
        ("{ }", r"a:1: '\{' without a name"),
        ("a { " * 100, r"a:1: '\{' without a name, or too deep"),
        ("7", "a:1: '7' without a name"),
        ("ok: 1\n%", "a:2: '%', expected address_mapping_group"),
        (
            "address_mapping_group { page_size: 4096 address_mapping { } address_mapping { physical_address: 4096 } }",
            "a: virtual address 0x0 is translated twice, expected once",
        ),
    ],
)
def test_what_is_none_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read_v2p(text_of(tmp_path / "a", text))


def test_a_page_within_a_larger_one_is_refused() -> None:
    rows = [(0x200000, 0, 0x200000), (0x3FF000, 0x5000, 0x1000), (0x400000, 0, 0x1000)]
    with pytest.raises(InputError, match="virtual address 0x3ff000 is translated twice"):
        table(rows, "a")
    assert len(table([rows[0], rows[2], rows[2]], "a")) == 2
    assert len(table([((1 << 64) - 4096, 0, 4096), (0, 4096, 4096)], "a")) == 2


def test_the_file_beside_a_trace_is_found(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    trace = str(tmp_path / "trace" / "a.trace.zip")
    assert beside(trace) is None
    (tmp_path / "aux").mkdir()
    text_of(tmp_path / "aux" / "v2p.textproto", MIXED)
    found = beside(trace)
    assert found is not None
    assert len(read_v2p(found)) == 3
    text_of(tmp_path / "trace" / "v2p.textproto", MIXED)
    assert beside(trace) == str(tmp_path / "trace" / "v2p.textproto")


PAGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.sampled_from([1, 4])), max_size=20)


@given(PAGES, PAGES)
def test_what_is_merged_translates_as_the_first_does(first: list[tuple[int, ...]], more: list[tuple[int, ...]]) -> None:
    def made(pages: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
        """As many of them as do not overlap; pages of four begin at multiples of four."""
        taken: set[int] = set()
        rows = []
        for page, frame, count in pages:
            own = set(range(page // count * count, page // count * count + count))
            if not own & taken:
                taken |= own
                rows.append((min(own) << 12, frame << 14, count << 12))
        return rows

    def of(rows: list[tuple[int, int, int]]) -> dict[int, int]:
        return {at + i: to + i for at, to, size in rows for i in range(0, size, 4096)}

    one, two = made(first), made(more)
    whole = [row for row in two if not set(of([row])) & set(of(one))]
    found = merged(table(one, ""), table(two, ""))
    assert of([tuple(row) for row in found.tolist()]) == {**of(whole), **of(one)}
    assert found[:, 0].tolist() == sorted(found[:, 0].tolist())


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    path, samples = tmp_path / "a", [MIXED.encode(), SAMPLE.read_bytes()[:500] + b"}"]
    ends = {"read": 0, "refused": 0}
    for number, random in rounds("v2p", 0, 1500):
        path.write_bytes(mutated(random, random.choice(samples), samples) or b"\n")
        with attacked("v2p", number):
            refused = ""
            try:
                assert len(read_v2p(path))
            except InputError as error:
                refused = str(error)
            assert refused.isprintable()
            ends["refused" if refused else "read"] += 1
    assert min(ends.values()) > 10
