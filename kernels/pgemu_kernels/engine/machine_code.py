"""Where machine code is kept from one process to the next. Needs no compiler.

A file is one entry, in a folder named after the stamp of what it was compiled from: `folder/stamp/name`. It is valid
by its contents, a digest of them and its name is in front. One that is damaged, or was half written when somebody
pulled the plug, or cannot be read, is as if it were not there, but for a line on stderr. Files come into being by
renaming, so that no process ever sees the half of one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SOURCES = Path(__file__).parents[1]
INSTALLED = SOURCES / "machine_code"  # what came with the installation: `pgemu warmup --installation` fills it

_MAGIC = b"pgemu machine code 2\n"
_DIGEST = hashlib.sha256().digest_size
_DAY = 86400.0
_STAMPS_KEPT = 6  # of as many versions (or kinds: bounds-checked ones) of the kernels machine code is kept
_STAMP = re.compile(r"[0-9a-f]{64}")


def chosen_folders() -> list[Path]:
    """Where this user keeps machine code, the best place first: to be read and, if it can be, written."""
    environment = os.environ
    found = []
    if environment.get("PGEMU_CACHE_DIR"):
        found.append(Path(os.path.expanduser(environment["PGEMU_CACHE_DIR"])))
    if environment.get("NUMBA_CACHE_DIR"):
        found.append(Path(environment["NUMBA_CACHE_DIR"]) / "pgemu")
    home = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # as the specification of XDG wants it
        home = os.path.expanduser("~/.cache") if environment.get("HOME", "/") else ""
    if os.path.isabs(home):
        found.append(Path(home) / "pgemu")
    return found


def folders() -> list[Path]:
    """Where machine code is looked for, in order: the user's own choice, the installation, the user's cache."""
    own = chosen_folders()
    first = sum(bool(os.environ.get(name)) for name in ("PGEMU_CACHE_DIR", "NUMBA_CACHE_DIR"))
    return [*own[:first], INSTALLED, *own[first:]]


def writable() -> Path | None:
    """The first of the user's folders that can be written, made if it is not there; None if there is no such one."""
    return next(_usable(), None)


def _usable() -> Iterator[Path]:
    for folder in chosen_folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                yield folder


def read(stamp: str, name: str) -> bytes | None:
    """What was written under a name, by whomever; None if it is nowhere, or damaged wherever it is."""
    for folder in folders():
        path = folder / stamp / name
        try:
            contents = unsealed(_bytes(path), stamp, name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            say_once(f"compiled kernels cannot be read: {error.strerror}", path)
            continue
        if contents is None:
            say_once("compiled kernels are damaged, and not used", path)
            continue
        _touch(path.parent)
        return contents
    return None


def _bytes(path: Path) -> bytes:
    """What a regular file holds; a pipe in its place is not waited for."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(number, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(number)


def write(stamp: str, name: str, contents: bytes) -> bool:
    """Keep it in the first of the user's folders that takes it: whether one did. Says why none of those there does."""
    failure: OSError | None = None
    for folder in list(_usable()):
        try:
            _write_file(folder / stamp, name, contents)
        except OSError as error:
            failure = failure or error
        else:
            _clean(folder, stamp)
            return True
    if failure:
        say_once(f"compiled kernels are not kept: {failure.strerror}")
    return False


def _write_file(folder: Path, name: str, contents: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        with open(temporary, "xb") as file:
            file.write(sealed(contents, folder.name, name))
        os.replace(temporary, folder / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sealed(contents: bytes, stamp: str, name: str) -> bytes:
    """The bytes of the file of a name: whole under that name only, for other entries take other arguments."""
    digest = hashlib.sha256(f"{stamp}/{name}\n".encode())
    digest.update(contents)
    return _MAGIC + digest.digest() + contents


def unsealed(data: bytes, stamp: str, name: str) -> bytes | None:
    """What `sealed` was given, None if these bytes are not whole."""
    contents = data[len(_MAGIC) + _DIGEST :]
    return contents if data == sealed(contents, stamp, name) else None


def _touch(folder: Path) -> None:
    """What is in use stays: once a day is enough to say so. Whoever may not say so uses it all the same."""
    with suppress(OSError):
        if time.time() - folder.stat().st_mtime > _DAY:
            os.utime(folder)


def _clean(folder: Path, stamp: str) -> None:
    """Remove what nobody needs any more: code of stamps that went unused longest, files that were never finished."""
    with suppress(OSError):
        for path in _older(folder, stamp):
            shutil.rmtree(path, ignore_errors=True)
        for path in (folder / stamp).glob(".*"):
            if time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _older(folder: Path, stamp: str) -> Iterator[Path]:
    stamps = [path for path in folder.iterdir() if _STAMP.fullmatch(path.name) and path.name != stamp]
    stamps.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    yield from stamps[_STAMPS_KEPT - 1 :]


_said: set[str] = set()


def say_once(what: str, path: Path | None = None) -> None:
    """Say what befell machine code, with the file, on stderr; the same of another file is not said again."""
    if what not in _said:
        _said.add(what)
        with suppress(OSError, ValueError):
            print(f"pgemu: {what}" + (f": {path}" if path else ""), file=sys.stderr, flush=True)
