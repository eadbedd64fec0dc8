"""Damaged files of the readers of QEMU's output, tables as text and DAMON: read or refused in one line, nothing else.

A run is one round after the other, the same ones each time; see fuzzing.py for more of them.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from fuzzing import Random, attacked, mutated, rounds
from pgemu.errors import InputError
from pgemu.trace import LoweringOptions
from pgemu.trace.accesses import AccessStream
from pgemu.trace.foreign import foreign
from pgemu.trace.log import Log
from pgemu.trace.lowering import lower
from pgemu.trace.qemu_mtree import memory_of
from pgemu.trace.readers import csv_columns, damon, qemu_log
from pgemu.trace.source import Source
from pgemu.trace.unplaced import place

pytestmark = pytest.mark.same_with_checks

ROUNDS = 2000
DATA = Path(__file__).parents[2] / "data"
WORDS = [
    *(b"\n", b"\r\n", b" ", b",", b'"', b"\t", b"0x", b"-", b"\0", b"\xff", b"(", b"[", b"{", b"\x1b[1m"),
    *(b"18446744073709551615", b"0xffffffffffffffff", b"-1", b"4096", b"0", b"9" * 30, b"kvm_convert_memory start 0x"),
]
OPTIONS = LoweringOptions(page_size=2 << 20, vm_processes=("all",))

SLOTS = (DATA / "qemu" / "slots-q35.log").read_bytes()
QEMU = [
    SLOTS,
    SLOTS[:900]
    + b"6@1796065303.000001:kvm_memory_fault start 0x4000000 size 0x1000 flags 0x8\n"
    + b"warning: memory fault: GPA 0x4000000 kvm_convert_memory start 0x4000000 size 0x1000 shared_to_private\n",
    b"kvm_convert_memory start 0x0 size 0x200000 private_to_shared\nkvm_memory_fault start 0x0 size 0x1000 flags 0x0\n",
]
TABLES = [
    b"time,op,flags,address,offset,length\n0,convert,SHARED,0,0x1000,4096\n5,guest fault,WRITE|PRIVATE,0x5000,0,0\n",
    b'"op";"address";"flags";"fault_level"\n"2";"0x1000";"";"1"\n\n"guest fault";"8192";"1";"3"\n',
    b"op\taddress\tflags\tx\n2\t4096\t0\ta\n",
]
REGIONS = b"".join(
    b"kdamond.0  4452 [000] 82820.95%04d: damon:damon_aggregated: target_id=%d nr_regions=3 %d-%d: %d 7\n"
    % (number, number % 2, number << 13, number + 3 << 13, number % 3)
    for number in range(12)
)
RECORDS = [
    {
        "target_id": 1,
        "snapshots": [
            {
                "end_time": "1,000",
                "regions": [
                    {"start": "4,096", "end": "65,536", "nr_accesses": {"samples": 2, "percent": None}},
                    {"start": "65,536", "end": "69632", "nr_accesses": {"samples": None, "percent": "5 %"}},
                ],
            }
        ],
    }
]
DAMON = [REGIONS, json.dumps(RECORDS).encode(), zlib.compress(json.dumps(RECORDS).encode())]
MTREES = [path.read_bytes()[-3000:] for path in (DATA / "qemu").glob("mtree-*.txt")]
MTREES += [(DATA / "qemu" / "mtree-flat-q35.txt").read_bytes()[:1800]]


def source(data: bytes) -> Source:
    return Source("damaged", None, io.BytesIO(data[1 << 16 :]), data[: 1 << 16])


def read_qemu(data: bytes, chance: Random) -> None:
    """Laid over guest memory now and then, which takes ten times as long."""
    found = qemu_log.read(source(data))
    assert isinstance(found, Log)
    counters = found.inputs, found.outcomes, found.ignored, found.unknown
    assert found.events == sum(counter.total() for counter in counters)
    assert len(found.rows) == found.inputs.total()
    if chance.random() < 0.1:
        assert lower(found, OPTIONS).accounting.balanced()


def read_table(data: bytes, chance: Random) -> None:
    found = csv_columns.read(source(data))
    if chance.random() < 0.1:
        assert place(found, LoweringOptions(page_size=2 << 20)).accounting.balanced()


def read_damon(data: bytes, chance: Random) -> None:
    """A damaged region may be as large as the address space: some of its pages are enough."""
    form = chance.choice(["damon", "damon-counted"])
    found = damon.read(source(data), form)
    assert isinstance(found, AccessStream)
    for records in islice(found.batches, 2):
        assert len(records) <= 1 << 20
    assert all(note.isprintable() for note in found.tally.notes)


def read_mtree(data: bytes, chance: Random) -> None:
    found = memory_of(source(data))
    ends = [0] + [slot.gpa + slot.size for slot in found.slots]
    assert all(slot.size > 0 and slot.gpa % 4096 == slot.size % 4096 == 0 for slot in found.slots)
    assert ends[-1] <= 1 << 52


KINDS: dict[str, tuple[list[bytes], Callable[[bytes, Random], None]]] = {
    "qemu-log": (QEMU, read_qemu),
    "csv": (TABLES, read_table),
    "damon": (DAMON, read_damon),
    "mtree": (MTREES, read_mtree),
}


def damaged(chance: Random, samples: list[bytes]) -> bytes:
    data = chance.choice(samples)
    if chance.random() < 0.7:
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            data = data[:at] + chance.choice(WORDS) + data[at + chance.choice((0, 0, 1, 3)) :]
    if chance.random() < 0.5:
        data = mutated(chance, data, samples)
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_text_is_read_or_refused(kind: str) -> None:
    samples, read = KINDS[kind]
    ends: Counter[str] = Counter()
    for number, chance in rounds(f"text {kind}", 0, ROUNDS):
        data = damaged(chance, samples)
        with attacked(f"text {kind}", number):
            for sniff in (qemu_log.sniff, csv_columns.sniff, damon.sniff, foreign):
                sniff(data[: 1 << 16])
            said = ""
            try:
                read(data, chance)
            except InputError as refused:
                said = str(refused)
            assert said.isprintable()
            assert len(said) < 2000
            ends["refused" if said else "read"] += 1
    print(kind, dict(ends))
    assert ends["read"] > ROUNDS // 50
    assert ends["refused"] > ROUNDS // 50
