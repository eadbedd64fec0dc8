"""Standard output as commands write it: what names of a trace hold reaches a terminal escaped, never as it is."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pgemu.errors import InputError, printable
from pgemu.whole_file import kept_mode

__all__ = ("check_output", "escaped_output", "say", "tolerant")

# Control characters but tab and line feed, halves of surrogate pairs, what turns the direction of a line or ends it.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class _Escaped:
    """A text stream that escapes what a terminal would obey; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; as click asks streams what they take, bytes are a TypeError."""
        if not isinstance(text, str):
            raise TypeError(f"{type(text).__name__}: expected text")
        self._stream.write(_OBEYED.sub(lambda found: printable(found[0]), text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # click would write there, past this
            raise AttributeError(name)
        return getattr(self._stream, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is written to stdout meanwhile."""
    stream = sys.stdout
    sys.stdout = _Escaped(stream)
    try:
        yield
    finally:
        sys.stdout = stream


def tolerant(stream: TextIO | None) -> None:
    """Let a stream write what its encoding lacks as escapes, where it would raise."""
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Print a message on stderr in one printable line; closed or full, there is nobody to tell."""
    if sys.stderr is not None:
        print(f"pgemu: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def check_output(output: str, *inputs: str) -> None:
    """Refuse before something takes long what could not be written afterwards, or would replace what is read.

    :param inputs: names of files that are read; what is no file there is none
    :raises InputError: with the file's name
    """
    if output == "-":
        raise InputError("is not written to standard output, expected the name of a file (./- is one)", output)
    for path in inputs:
        if path == output or (os.path.exists(output) and os.path.exists(path) and os.path.samefile(path, output)):
            raise InputError("is the trace itself, expected another file", output)
    folder = os.path.dirname(output) or os.curdir
    try:
        kept_mode(output)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", output) from None
    if not os.path.isdir(folder):
        raise InputError(f"cannot be written: {folder} is no directory", output)
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot be written: no permission in {folder}", output)
