"""What a command wrote to stderr beside that kernels were compiled, which depends on who ran before."""

from __future__ import annotations

ANNOUNCEMENT = "pgemu: compiling kernels"


def complaints(stderr: str) -> str:
    """The other lines."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(ANNOUNCEMENT))
