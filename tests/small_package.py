"""A package of the kernels' name: two entries with the kernels' decorators, which compile in a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pgemu_kernels.engine import machine_code

ENTRIES = """
import numpy as np
from pgemu_kernels.engine.compile import entry, kernel

@kernel
def next_value(value):
    return value + np.uint64(1)

@entry
def increase(values):
    values[0] = next_value(values[0])
    return np.int64(0)

@entry
def double(values):
    values[0] = values[0] + values[0]
    return np.int64(0)
"""

CALLS = """
import json, sys
{before}
needed = len(sys.argv) > 1  # by every process: then another process compiles the second meanwhile
import numpy as np
from pgemu_kernels.engine.ahead import declare
first = declare("pgemu_kernels.two", "increase", needed, values="uint64[::1]")
second = declare("pgemu_kernels.two", "double", needed, values="uint64[::1]")
values = np.ones(1, np.uint64)
first.dispatcher(values)
second.dispatcher(values)
print(json.dumps([int(values[0]), "pgemu_kernels.two" in sys.modules]))
"""

DECLARED = """
from pgemu_kernels.engine.ahead import declare, declared
declare("pgemu_kernels.two", "increase", True, values="uint64[::1]")
declare("pgemu_kernels.two", "double", False, values="uint64[::1]")
"""


class Outcome(NamedTuple):
    value: int
    compiled: bool  # here, for which the kernels' module is imported
    stderr: str


COMPILES = "pgemu: compiling kernels, once (their machine code is cached)\n"
INTO_MEMORY = "pgemu: compiling kernels, into memory (no cache folder can be written)\n"
WARM = Outcome(4, False, "")


class Package:
    """A package of the kernels' name with two entries, and the folders of a user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "installed" / "pgemu_kernels"
        self.cache = folder / "cache"
        engine = self.package / "engine"
        engine.mkdir(parents=True)
        for name in ("__init__", "compile", "inner_functions", "numba_internals", "machine_code", "progress", "ahead"):
            source = machine_code.SOURCES / "engine" / f"{name}.py"
            (engine / source.name).write_bytes(source.read_bytes())
        (self.package / "__init__.py").write_text("")
        (self.package / "two.py").write_text(ENTRIES)
        (self.package / "run").mkdir()
        (self.package / "run" / "entries.py").write_text(DECLARED)
        (self.package / "run" / "c_entries.py").write_text("")

    def start(self, before: str = "", *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self.start_python(CALLS.format(before=before), *arguments, **environment)

    def start_python(
        self, code: str, *arguments: str, stderr: int = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
        chosen = {"PGEMU_CACHE_DIR": str(self.cache), "PYTHONPATH": str(self.package.parent)}
        given = {name: value for name, value in (kept | chosen | environment).items() if value}
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, *arguments],
            env=given, cwd="/", text=True, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip

    def run(self, before: str = "", *arguments: str, **environment: str) -> Outcome:
        return outcome(self.start(before, *arguments, **environment))

    def is_whole(self, files: int = 2) -> bool:
        """Whether the cache has the files of both entries, whole, and no others."""
        found = self.files()
        return len(found) == files and all(map(whole, found))

    def files(self, folder: Path | None = None) -> list[Path]:
        return sorted(path for path in (folder or self.cache).rglob("*") if path.is_file())


def whole(path: Path) -> bool:
    """Whether a file of a cache is."""
    return machine_code.unsealed(path.read_bytes(), path.parent.name, path.name) is not None


REMOVED = (
    *("PGEMU_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONPATH"),
    # What tests run with is no matter of this package's.
    *("NUMBA_BOUNDSCHECK", "NUMBA_DISABLE_JIT"),
)


def outcome(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return Outcome(*json.loads(stdout), stderr=stderr)
