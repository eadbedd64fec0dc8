"""Machines from C and C++: a table of C function pointers (pgemu.h)."""

from __future__ import annotations

from pathlib import Path

from pgemu.capi.words_header import words_header as words_header

__all__ = ("get_include", "words_header")


def get_include() -> str:
    """The folder of pgemu.h, for a C compiler's -I."""
    return str(Path(__file__).parents[1] / "include")
