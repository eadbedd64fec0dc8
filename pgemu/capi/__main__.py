"""`python -m pgemu.capi`: what a C or C++ compiler is told to build a program that embeds this Python, for $(...)."""

from __future__ import annotations

import sys
import sysconfig

from pgemu.capi import get_include

__all__ = ("compile_flags", "link_flags")

_USAGE = "usage: python -m pgemu.capi [--cflags | --ldflags]"


def compile_flags() -> list[str]:
    """Folders of pgemu.h and Python.h."""
    return [f"-I{get_include()}", f"-I{sysconfig.get_path('include')}"]


def link_flags() -> list[str]:
    """The library of this Python, found again when the program runs."""
    known = sysconfig.get_config_vars()
    folder = known.get("LIBDIR") if known.get("Py_ENABLE_SHARED") else known.get("LIBPL")
    name = f"-lpython{known['VERSION']}{getattr(sys, 'abiflags', '')}"
    others = f"{known.get('LIBS') or ''} {known.get('SYSLIBS') or ''}".split()
    exported = [] if known.get("Py_ENABLE_SHARED") else ["-rdynamic"]
    return [f"-L{folder}", name, f"-Wl,-rpath,{folder}", *exported, *others]


def main(arguments: list[str]) -> int:
    """Print flags, all of them without an option."""
    if arguments not in ([], ["--cflags"], ["--ldflags"]):
        print(_USAGE, file=sys.stderr)
        return 2
    flags = compile_flags() if arguments != ["--ldflags"] else []
    print(*flags, *(link_flags() if arguments != ["--cflags"] else []))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
