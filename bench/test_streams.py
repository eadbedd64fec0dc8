"""Reading recordings of a program's accesses, and as control a plain read that counts the lines or records."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amounts import amount
from pgemu.pytest_plugin import Benchmark
from pgemu.trace.accesses import EXEC, WRITE
from pgemu.trace.readers import champsim, drmemtrace, lackey
from pgemu.trace.schema import Records
from pgemu.trace.source import Source, open_source

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "accesses"
CHUNK = 1 << 16
RECORD = {"champsim": 64, "drmemtrace": 12}
READERS: dict[str, Callable[[Source, str | None], Any]] = {
    "lackey": lackey.read,
    "champsim": champsim.read,
    "drmemtrace": drmemtrace.read,
}
REPEATED = {"lackey": amount(80, 5), "champsim": amount(80, 5), "drmemtrace": amount(600, 40)}  # times the samples


def instructions(text: Path) -> bytes:
    """ChampSim's records of a program that Lackey recorded."""
    records = Records.concatenate(lackey.read(open_source(text)).batches)
    fetches = np.flatnonzero(records.flags == EXEC)
    found = np.zeros((len(fetches), 8), np.uint64)
    found[:, 0] = records.address[fetches]
    for row, (first, end) in enumerate(zip(fetches, [*fetches[1:], len(records)], strict=True)):
        piece = slice(first + 1, end)
        for flags, slot, most in ((0, 4, 4), (int(WRITE), 2, 2)):
            own = records.address[piece][records.flags[piece] == flags][:most]
            found[row, slot : slot + len(own)] = own
    return found.tobytes()


def contents(form: str) -> bytes:
    if form == "lackey":
        text = lzma.decompress((FOLDER / "lackey-ls.txt.xz").read_bytes())
        return text[text.index(b"\nI") + 1 :]
    if form == "champsim":
        return instructions(FOLDER / "lackey-ls.txt.xz")
    return gzip.decompress((FOLDER / "drmemtrace.threadsig.10510.0155.trace.gz").read_bytes())


@pytest.fixture(scope="module", params=READERS)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / request.param
    path.write_bytes(contents(request.param) * REPEATED[request.param])
    return path


def count(path: Path) -> int:
    size = RECORD.get(path.name)
    with path.open("rb") as file:
        if size is None:
            return sum(data.count(b"\n") for data in iter(lambda: file.read(CHUNK), b""))
        return sum(map(len, iter(lambda: file.read(CHUNK), b""))) // size


def timed(benchmark: Benchmark, recording: Path, call: Callable[[Path], object], role: str = "call") -> None:
    group = f"read {'lines' if recording.name == 'lackey' else 'records'} of {recording.name}"
    benchmark(lambda: call(recording), operations=count(recording), group=group, role=role)


def accesses(path: Path) -> int:
    return sum(map(len, READERS[path.name](open_source(path), path.name).batches))


def test_reader(pgemu_benchmark: Benchmark, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lackey, "wanted", lambda lines, size, name: True)
    timed(pgemu_benchmark, recording, accesses)


def test_control(pgemu_benchmark: Benchmark, recording: Path) -> None:
    timed(pgemu_benchmark, recording, count, "control")
