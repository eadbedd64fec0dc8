"""A guest that runs a recorded program: from virtual addresses to what machines run, and what that costs the guest."""

from pgemu.guest.lowering import lower_accesses
from pgemu.guest.options import GuestOptions
from pgemu.guest.processors import PROCESSORS, Cache, Processor, TlbCache
from pgemu.guest.program import GuestBatch, GuestProgram
from pgemu.guest.run import DesignRun, GuestComparison, GuestRun, run_accesses
from pgemu.guest.tlb import Tlb, TlbCounts, TlbFound, TlbLookups

__all__ = (
    "PROCESSORS", "Cache", "DesignRun", "GuestBatch", "GuestComparison", "GuestOptions", "GuestProgram", "GuestRun",
    "Processor", "Tlb", "TlbCache", "TlbCounts", "TlbFound", "TlbLookups", "lower_accesses", "run_accesses",
)  # fmt: skip
