"""Which pgemu this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """As the installed package says; "unknown" when run from the sources, not installed."""
    try:
        return metadata.version("pgemu")
    except metadata.PackageNotFoundError:
        return "unknown"
