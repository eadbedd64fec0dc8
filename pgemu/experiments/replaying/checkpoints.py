"""What a run goes on from: the machine and its position in one file, rows of outcomes so far in files beside it.

The file is a machine's (pgemu.machine.snapshot), with a key `replay` in its header. It is replaced whole, once the rows
up to it are in their files, so that whatever ends the process there is one that is right. Rows lie in the folder of the
file's name and ".rows", a numbered file from one checkpoint to the next; of those what no checkpoint names is removed.
A folder that holds anything else is refused, and so is one in which another run writes, which locks it.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgemu.errors import InputError
from pgemu.experiments.replaying.outcomes import Rows, RowsFile, read_rows
from pgemu.machine import snapshot
from pgemu.objects.saved import KEY as MACHINE, beside, restored

if TYPE_CHECKING:
    from pgemu.objects.machine import Machine

__all__ = ("Checkpoint",)

_KEY = "replay"
_POINT = "point"
_NAMED = 8  # fields that differ
_OWN = re.compile(rf"[0-9]{{6,}}\.parquet|\.pgemu-[0-9]+-[0-9a-f]+|{_POINT}")  # whole_file() names the second


class Checkpoint:
    """A checkpoint's file and the rows beside it, of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._folder = Path(f"{self._path}.rows")
        self._parts = 0
        self._open: tuple[ExitStack, RowsFile] | None = None
        self._lock: int | None = None  # the folder, open: another run cannot lock it meanwhile

    # ------------------------------------------------------------------ begin

    def exists(self) -> bool:
        """Whether there is one."""
        return os.path.exists(self._path)

    def begin(self) -> None:
        """Start anew, without rows."""
        self._parts = 0
        self._clean()

    def resume(self, run: dict[str, Any]) -> tuple[Machine, dict[str, Any]]:
        """The machine, and what save() was told.

        :param run: what the checkpoint has to be of
        :raises InputError: it cannot be read, is damaged, of another run, or lacks rows
        """
        from pgemu.objects.machine import Machine

        found = snapshot.read(self._path)
        kept = found.header.get(_KEY)
        if not isinstance(kept, dict) or not isinstance(kept.get("run"), dict):
            raise InputError(
                "a machine without a position in a trace, expected a checkpoint of pgemu replay", self._path
            )
        if differing := list(_differences(kept["run"], run)):
            more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
            text = f"a checkpoint of another run: {'; '.join(differing[:_NAMED])}{more}"
            raise InputError(text, self._path)
        self._parts = int(kept["parts"])
        if lacking := [part for part in map(self._part, range(self._parts)) if not part.is_file()]:
            raise InputError("rows that the checkpoint names are not there", str(lacking[0]))
        self._clean()
        return restored(Machine, found, self._path), kept

    def _clean(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"cannot be made ({error.strerror})", str(self._folder)) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._unlock()
            raise InputError("another run writes this checkpoint, expected another name", self._path) from None
        found = sorted(self._folder.iterdir())
        if other := [path.name for path in found if not _OWN.fullmatch(path.name) or not path.is_file()]:
            self._unlock()
            what = f"holds what no checkpoint wrote ({other[0]}), expected rows, or no such folder"
            raise InputError(what, str(self._folder))
        known = {self._part(number) for number in range(self._parts)}
        for path in found:
            if path not in known:
                path.unlink()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:06}.parquet"

    # ------------------------------------------------------------------ go on

    def add(self, rows: Rows) -> None:
        """Take rows that follow those before."""
        if self._open is None:
            stack = ExitStack()
            self._open = stack, stack.enter_context(RowsFile(self._part(self._parts)))
        self._open[1].add(rows)

    def save(self, machine: Machine, run: dict[str, Any], **position: Any) -> None:
        """Write the checkpoint. OSError where that cannot be done."""
        self._close()
        kept = {"run": run, "parts": self._parts, **position}
        made = self._folder / _POINT  # there what a killed process leaves is removed
        snapshot.write(made, machine.config, machine.arrays, {MACHINE: beside(machine), _KEY: kept})
        os.replace(made, self._path)

    def _close(self) -> None:
        if self._open is not None:
            stack, self._open = self._open[0], None
            stack.close()
            self._parts += 1

    def rows(self) -> Iterator[Rows]:
        """All rows so far."""
        self._close()
        for number in range(self._parts):
            yield from read_rows(str(self._part(number)))

    def drop(self) -> None:
        """Remove an open file of rows, as of a run that failed, and without a checkpoint all rows."""
        if self._open is not None:
            stack, self._open = self._open[0], None
            with suppress(OSError):  # of a full disk, which the run has told
                stack.__exit__(InputError, InputError("dropped"), None)
        if not self.exists():
            self._remove_rows()
        self._unlock()

    def remove(self) -> None:
        """The run is done: nobody will go on from here."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._remove_rows()
        self._unlock()

    def _remove_rows(self) -> None:
        """The folder, but for what others put there meanwhile."""
        with suppress(OSError):
            for path in self._folder.iterdir():
                if _OWN.fullmatch(path.name):
                    path.unlink()
            self._folder.rmdir()


def _differences(kept: dict[str, Any], run: dict[str, Any]) -> Iterator[str]:
    """What a checkpoint has otherwise than a run: each field, of dictionaries those in them, with both values."""
    for name in [*run, *(name for name in kept if name not in run)]:
        had, wanted = kept.get(name), run.get(name)
        if isinstance(had, dict) and isinstance(wanted, dict):
            yield from _differences(had, wanted)
        elif had != wanted:
            yield f"{name} {_short(had)}, expected {_short(wanted)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
