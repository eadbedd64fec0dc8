"""Errors that name a cause a user can remove. Anything else that escapes pgemu is a defect of pgemu."""

from __future__ import annotations

__all__ = ("InputError", "printable")


class InputError(Exception):
    """An input that pgemu refuses: a file, a line of it, or an option.

    `str()` is one line of printable text, `file:line: what`, which the command line prints before it exits with
    status 2.

    :param what: what is wrong and what was expected, without a full stop
    :param file: name of the file, or None where an option is at fault
    :param line: line of a text file, counted from 1
    """

    def __init__(self, what: str, file: str | None = None, line: int | None = None) -> None:
        self.what = what
        self.file = file
        self.line = line
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(printable(f"{where}{' '.join(what.split(chr(10)))}"))


def printable(text: str) -> str:
    r"""Return text with everything escaped that is no printable character: what a terminal would obey, bytes of a name
    that are no text, line breaks.

    >>> printable("a\x1b[2Jb\udcff")
    'a\\x1b[2Jb\\udcff'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
