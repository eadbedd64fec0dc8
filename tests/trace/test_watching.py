"""How far a trace has been read is told from its beginning to its end, and only to those who look on."""

from __future__ import annotations

import gzip
import lzma
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from pgemu import trace
from pgemu.trace.readers import parquet
from pgemu.trace.source import open_source
from pgemu.trace.watching import watched

pytestmark = pytest.mark.same_with_checks

LINE = "qemu-1 [000] 1.0: kvm_exit: vcpu {}\n"
TEXT = "".join(LINE.format(i * 7919 % 100_003) for i in range(100_000)).encode()
STEP = 1 << 16  # bytes that are read at once


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
def test_text_is_told_by_bytes_of_the_file(tmp_path: Path, compress: object) -> None:
    path = tmp_path / "log"
    path.write_bytes(compress(TEXT))  # type: ignore[operator]
    told: list[tuple[int, int]] = []
    blocks = 0
    with watched(lambda done, total: told.append((done, total))):
        for block in open_source(path).blocks():
            blocks += len(block)
    size = path.stat().st_size
    assert blocks == len(TEXT)
    assert told[0] == (STEP, size)  # when the first piece has been read, and parsed
    assert told[-1] == (size, size)
    steps = [done for done, _ in told]
    assert steps == sorted(steps)
    assert max(after - before for before, after in pairwise(steps)) <= STEP
    told.clear()
    assert sum(map(len, open_source(path).blocks())) == len(TEXT)
    assert told == []


def test_of_a_pipe_nobody_knows_how_much_there_is(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(TEXT))
    writer.start()
    told: list[tuple[int, int]] = []
    with watched(lambda done, total: told.append((done, total))):
        assert sum(map(len, open_source(path).blocks())) == len(TEXT)
    writer.join()
    assert set(told) == {(0, 0)}


def test_parquet_is_told_by_records(tmp_path: Path) -> None:
    lowered = trace.load(trace.shipped())
    path = tmp_path / "trace.parquet"
    parquet.write(lowered, path)
    told: list[tuple[int, int]] = []
    with watched(lambda done, total: told.append((done, total))):
        assert sum(len(batch) for batch in parquet.iterate(path, 5000)) == len(lowered.records)
        assert [done for done, _ in told] == [*range(5000, len(lowered.records), 5000), len(lowered.records)]
        assert {total for _, total in told} == {len(lowered.records)}
        told.clear()
        trace.load(path)
        assert told[-1] == (len(lowered.records), len(lowered.records))
