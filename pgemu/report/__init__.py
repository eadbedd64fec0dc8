"""Reports of comparisons for people: the first screen, tables, notes, and the forms for programs."""

from pgemu.report.formats import document
from pgemu.report.sentences import findings

__all__ = ("document", "findings")
