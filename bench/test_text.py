"""Reading the text of a log: by Python, by the kernel, and as control a plain read that counts the same lines."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        path.write_bytes(file.read())
    return path


def timed(benchmark: Any, log: Path, call: Callable[[Path], object]) -> None:
    benchmark.group = f"read lines of {log.name}"
    benchmark.extra_info.update(operations=count(log))
    benchmark.pedantic(call, args=(log,), rounds=5, warmup_rounds=1)


def test_python(benchmark: Any, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftrace, "wanted", lambda lines, size: False)
    timed(benchmark, log, ftrace.read)


def test_kernel(benchmark: Any, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftrace, "wanted", lambda lines, size: True)
    timed(benchmark, log, ftrace.read)


def test_control(benchmark: Any, log: Path) -> None:
    timed(benchmark, log, count)
