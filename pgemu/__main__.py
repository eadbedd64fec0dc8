"""`python -m pgemu`: the command line."""

from __future__ import annotations

from pgemu.cli import main

main(prog_name="pgemu")
