"""Zip archives that hold a trace in several members.

A member is found by its name, so a name stands once: of two the library would take the later one, other programs the
first (pkzip's APPNOTE.TXT forbids neither).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pgemu.errors import InputError, printable
from pgemu.trace.source import Source

__all__ = ("MAGICS", "opened_archive")

MAGICS = b"PK\x03\x04", b"PK\x05\x06"
"""How an archive begins, and how an empty one does."""

_ENCRYPTED = 1  # general purpose bit flag, APPNOTE.TXT 4.4.4
_SHOWN = 120  # characters of an error, which may hold names of members


@contextmanager
def opened_archive(source: Source) -> Iterator[zipfile.ZipFile]:
    """Open an archive, of which each member has a name of its own and needs no password.

    What is found to be damaged while members are read is told of the archive, too.

    :raises InputError: damaged, two members of a name, or an encrypted one
    """
    with source.whole() as file:
        try:
            with zipfile.ZipFile(file) as archive:
                _check(archive, source.name)
                yield archive
        except (
            zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError,
            ValueError, struct.error, OverflowError, OSError,
        ) as error:  # fmt: skip
            told = printable(" ".join(str(error).split()))[:_SHOWN] or type(error).__name__
            raise InputError(f"damaged zip archive ({told})", source.name) from None


def _check(archive: zipfile.ZipFile, name: str) -> None:
    members = archive.infolist()
    twice = [member for member, count in Counter(one.filename for one in members).items() if count > 1]
    if twice:
        raise InputError(f"an archive with two members called {twice[0][:_SHOWN]!r}, expected one", name)
    encrypted = [one.filename for one in members if one.flag_bits & _ENCRYPTED]
    if encrypted:
        raise InputError(f"{encrypted[0][:_SHOWN]} is encrypted, expected an archive without a password", name)
