"""`python -m pgemu`: the command line."""

from __future__ import annotations

import sys

__all__ = ("run",)


def run() -> None:
    """Run the command line; Ctrl-C while it is still imported is one line, too."""
    try:
        from pgemu.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("pgemu: interrupted\n")
        sys.exit(130)
    main(prog_name="pgemu")


if __name__ == "__main__":
    run()
