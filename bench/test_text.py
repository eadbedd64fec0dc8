"""Reading the text of a log: by Python, by the kernel, and as control a plain read that counts the same lines."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from amounts import amount
from pgemu.pytest_plugin import Benchmark
from pgemu.trace.readers import ftrace

LOGS = Path(__file__).parents[1] / "tests" / "data" / "traces"
NAMES = ("vm-boot-q35-4k", "vm-boot-microvm-hugetlb")
CHUNK = 1 << 16


def count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(data.count(b"\n") for data in iter(lambda: file.read(CHUNK), b""))


@pytest.fixture(scope="module", params=NAMES)
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / request.param
    with lzma.open(LOGS / f"{request.param}.ftrace.txt.xz") as file:
        path.write_bytes(b"".join(file.readlines(amount(1 << 32, 1 << 18))))
    return path


def timed(benchmark: Benchmark, log: Path, call: Callable[[Path], object], role: str = "call") -> None:
    benchmark(lambda: call(log), operations=count(log), group=f"read lines of {log.name}", role=role)


def test_python(pgemu_benchmark: Benchmark, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftrace, "wanted", lambda lines, size: False)
    timed(pgemu_benchmark, log, ftrace.read)


def test_kernel(pgemu_benchmark: Benchmark, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftrace, "wanted", lambda lines, size: True)
    timed(pgemu_benchmark, log, ftrace.read)


def test_control(pgemu_benchmark: Benchmark, log: Path) -> None:
    timed(pgemu_benchmark, log, count, "control")
