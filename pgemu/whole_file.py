"""Files that appear whole or not at all, as shells make them: the umask's permissions, or those of the file before."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

__all__ = ("kept_mode", "whole_file")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to be written, which takes its name at the end, unless something was raised meanwhile.

    A link's target is written, not the link replaced. A file that is there keeps its mode, and has to be writable.

    :raises OSError: it cannot be written, or is no regular file; `filename` is `path`
    """
    name = os.fspath(path)
    target = part = name
    try:
        target = os.path.realpath(name)
        mode = kept_mode(target)
        part = os.path.join(os.path.dirname(target), f".pgemu-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(part, "xb") as file:  # closed first: some file systems tell only then that the disk is full
                yield file
            if mode is not None:
                os.chmod(part, mode)
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
    except OSError as error:
        if error.filename not in (None, part, target, name):
            raise  # of another file
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), name) from None


def kept_mode(path: str) -> int | None:
    """The permissions of a file that is there, None where there is none. OSError for one that cannot be replaced."""
    try:
        found = os.lstat(target := os.path.realpath(path))
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), None)
    if not stat.S_ISREG(found.st_mode):  # a device would be replaced by a file, a loop of links has no end
        raise OSError(errno.EINVAL, "is no regular file", None)
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), None)
    return stat.S_IMODE(found.st_mode)
