"""Records of ChampSim: by a writer that packs the documented structures; nothing else tells what a file is."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fuzzing import rounds
from pgemu import trace
from pgemu.errors import InputError
from pgemu.trace import readers, source
from pgemu.trace.accesses import EXEC, NO_TIMES, READ, WRITE
from pgemu.trace.readers import champsim
from pgemu.trace.source import Match, Source, open_source
from streams import attack, in_pieces, rows, taken

pytestmark = pytest.mark.same_with_checks

# struct of C with natural alignment: ip, is_branch, branch_taken, registers written and read, memory written and read.
PLAIN = struct.Struct("<QBB2B4B2Q4Q")
CLOUD = struct.Struct("<QBB4B4B6x4Q4Q2B6x")


def instruction(ip: int, writes: tuple[int, ...] = (), reads: tuple[int, ...] = (), **more: Any) -> bytes:
    """A record of ChampSim, or of CloudSuite with `asid`."""
    form, places = (CLOUD, 4) if "asid" in more else (PLAIN, 2)
    slots = (*writes, *[0] * (places - len(writes)), *reads, *[0] * (4 - len(reads)))
    registers = [3] * (places + 4)
    asid = [more["asid"] & 0xFF, more["asid"] >> 8] if "asid" in more else []
    return form.pack(ip, more.get("branch", 0), more.get("taken", 0), *registers, *slots, *asid)


def program(count: int, **more: Any) -> bytes:
    """A loop that walks over memory."""
    return b"".join(
        instruction(0x401000 + 4 * (i % 50), (0x7FFF_0000_0000 + 8 * i,) * (i % 3), (0x60_0000 + i,) * (i % 5), **more)
        for i in range(count)
    )


@pytest.fixture(autouse=True)
def blocks() -> Iterator[None]:
    kept = source._RECORD_BLOCK
    yield
    source._RECORD_BLOCK = kept


def test_the_structures_have_the_sizes_that_a_compiler_gives_them() -> None:
    assert (PLAIN.size, CLOUD.size) == (64, 96)


def test_an_instruction_is_fetched_then_reads_then_writes() -> None:
    data = instruction(0x401000, writes=(0x7000, 0x8FFF), reads=(0x1000, 0x2000, 0x3000, 0x4000))
    data += instruction(0x401004, branch=1, taken=1) + PLAIN.pack(0x402000, 0, 0, *[0] * 6, 0, 5, 0, 0, 9, 0)
    got = taken(data, "champsim")
    assert rows(got.records) == [
        (0x401000, EXEC, 0), (0x1000, READ, 0), (0x2000, READ, 0), (0x3000, READ, 0), (0x4000, READ, 0),
        (0x7000, WRITE, 0), (0x8FFF, WRITE, 0), (0x401004, EXEC, 0), (0x402000, EXEC, 0), (9, READ, 0), (5, WRITE, 0),
    ]  # fmt: skip
    assert got.records.time.tolist() == list(range(11))
    assert got.tally.inputs == {"fetch": 3, "read": 5, "write": 3}
    assert (got.refused, got.tally.rejected, got.tally.threads) == ("", 0, 1)
    assert got.tally.notes == ["it has no sizes: an access is of the page that it begins in", NO_TIMES]


def test_cloudsuite_has_more_slots_and_address_spaces() -> None:
    data = instruction(0x401000, (1, 2, 3, 4), (5, 6, 7, 8), asid=0x201) + instruction(0x401004, asid=7)
    data += instruction(0x401008, (9,), asid=0x201)
    got = taken(data, "cloudsuite")
    expected = [(0x401000, EXEC, 0), *[(i, READ, 0) for i in (5, 6, 7, 8)], *[(i, WRITE, 0) for i in (1, 2, 3, 4)]]
    assert rows(got.records) == [*expected, (0x401004, EXEC, 1), (0x401008, EXEC, 0), (9, WRITE, 0)]
    assert got.tally.threads == 2


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_plausible_records_are_known_whatever_they_are_packed_with(compress: Any) -> None:
    got = taken(compress(program(200)))
    assert (got.stream.format, got.tally.inputs["fetch"]) == (champsim.FORMATS["champsim"], 200)
    # 200 // 3 times none, one, two writes; 200 // 5 times none to four reads
    assert (got.tally.inputs["write"], got.tally.inputs["read"]) == (67 + 2 * 66, 40 * (1 + 2 + 3 + 4))


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (program(200), Match.SURE),
        (program(100), Match.SURE),
        (program(100) + b"x", Match.SURE),
        (program(99), Match.POSSIBLE),
        (program(4), Match.POSSIBLE),
        (program(3), Match.NO),
        (program(100, asid=1), Match.POSSIBLE),  # of the other layout
        (bytes(6400), Match.NO),
        (b"\1" * 6400, Match.NO),
        (instruction(0x401000) * 200, Match.NO),
        (program(50) + instruction(0) + program(50), Match.NO),
        (program(50) + instruction(0x401000, branch=2) + program(50), Match.NO),
        (program(50) + instruction(0x401000, taken=1) + program(50), Match.NO),
        (program(50) + instruction(1 << 56) + program(50), Match.NO),
        (program(50) + instruction(0x401000, (1 << 60,)) + program(50), Match.NO),
        (b"".join(instruction(0x401000 + 4096 * i, (1,)) for i in range(200)), Match.NO),
        (b"\x7fELF" + program(100), Match.NO),
        (b"# tracer: nop\n" * 1000, Match.NO),
        (b"", Match.NO),
    ],
)
def test_only_a_hundred_plausible_records_are_sure(head: bytes, match: Match) -> None:
    assert champsim.sniff(head) is match


def test_other_binary_data_is_not_taken_for_it() -> None:
    random = Random(7)
    words = [struct.pack("<Q", random.choice([0, 1, random.getrandbits(47), i])) for i in range(2000)]
    samples = [random.randbytes(12800), b"".join(words), bytes(range(256)) * 50, struct.pack("<100d", *range(100)) * 8]
    samples += [Path(path).read_bytes()[:65536] for path in (champsim.__file__, struct.__file__)]
    assert [champsim.sniff(sample) for sample in samples] == [Match.NO] * len(samples)


def test_what_only_the_user_can_know_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"may be .* with CloudSuite's records: nothing in it says so, --input-"):
        taken(program(200, asid=1))
    assert taken(program(200, asid=1), "cloudsuite").tally.inputs["fetch"] == 200


@pytest.mark.parametrize(("form", "more"), [("champsim", {}), ("cloudsuite", {"asid": 1})])
def test_a_record_that_is_cut_is_named_after_the_others(form: str, more: dict[str, int]) -> None:
    data = program(30, **more)
    size = len(data) // 30
    got = taken(data[:-1], form)
    assert f": truncated: record 30 has {size - 1} bytes, expected {size}, of an instruction trace" in got.refused
    assert got.tally.inputs["fetch"] == 29
    assert f": truncated: record 2 has 7 bytes, expected {size}, of" in taken(data[: size + 7], form).refused
    assert f": truncated: record 1 has 7 bytes, expected {size}, of" in taken(data[:7], form).refused


def test_records_that_cannot_be_any_are_counted_and_shown() -> None:
    bad = [instruction(0), instruction(0x401000, branch=7), instruction(0x401000, branch=1, taken=2),
           instruction(1 << 60), instruction(0x401000, branch=0x80)]  # fmt: skip
    got = taken(program(9) + b"".join(bad), "champsim")
    assert (got.refused, got.tally.inputs["fetch"], got.tally.rejected) == ("", 9, 5)
    assert got.tally.first_rejected == [
        (10, "ip 0x0, is_branch 0, branch_taken 0"),
        (11, "ip 0x401000, is_branch 7, branch_taken 0"),
        (12, "ip 0x401000, is_branch 1, branch_taken 2"),
    ]
    refused = taken(program(4) + b"".join(bad), "champsim").refused
    assert refused.endswith(
        "5 of 9 records are not understood, the first is record 5: 'ip 0x0, is_branch 0, branch_taken 0', "
        "expected an instruction trace of ChampSim"
    )


def test_zeros_that_unpack_to_gigabytes_are_refused_early() -> None:
    bomb = lzma.compress(program(200) + bytes(100 << 20))
    got = taken(bomb)
    assert "records are not understood, the first is record 201: 'ip 0x0" in got.refused
    assert got.tally.rejected < 200_000


def test_other_commands_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(program(200))
    with pytest.raises(InputError, match=r"this is an instruction trace of ChampSim, a program's addresses, expected"):
        trace.load(path)
    with pytest.raises(InputError, match=r"this is an instruction trace of ChampSim, expected text of ftrace"):
        readers.read_log(open_source(path))


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=4)
SLOTS = st.lists(st.integers(0, (1 << 64) - 1), max_size=4).map(tuple)
ONE = st.builds(
    lambda ip, writes, reads, branch, taken: instruction(ip, writes[:2], reads, branch=branch, taken=taken),
    st.integers(0, 1 << 47), SLOTS, SLOTS, st.integers(0, 3).map(lambda n: n % 3), st.integers(0, 1),
)  # fmt: skip


def outcome(of: Source) -> Any:
    got = taken(of, "champsim")
    return rows(got.records), got.records.time.tolist(), got.tally, got.refused


@given(st.lists(ONE, min_size=1, max_size=12).map(b"".join), SIZES, st.integers(0, 63))
def test_any_pieces_give_the_same_and_every_slot_counts(data: bytes, sizes: list[int], cut: int) -> None:
    expected, rejected = [], 0
    for ip, branch, is_taken, *slots in PLAIN.iter_unpack(data):
        if ip == 0 or branch > 1 or is_taken > 1:
            rejected += 1
            continue
        memory = slots[6:]
        expected.append((ip, int(EXEC), 0))
        expected += [(address, int(READ), 0) for address in memory[2:] if address]
        expected += [(address, int(WRITE), 0) for address in memory[:2] if address]
    whole = outcome(in_pieces(data, [1 << 16]))
    assert whole[0] == expected
    assert whole[2].rejected == rejected
    source._RECORD_BLOCK = sizes[0]
    assert outcome(in_pieces(data, sizes)) == whole
    if cut:
        refused = outcome(in_pieces(data + bytes(cut), sizes))[3]
        assert "truncated: record" in refused or "records are not understood" in refused


@pytest.mark.parametrize("form", [None, "champsim", "cloudsuite"])
def test_damaged_files_are_read_or_refused(form: str | None) -> None:
    samples = [program(120), program(10), program(120, asid=3), gzip.compress(program(50))]
    ends = attack(f"champsim {form}", samples, form, rounds("champsim", 0, 700))
    assert min(ends.values()) > 20
