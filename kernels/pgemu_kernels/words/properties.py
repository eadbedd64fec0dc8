"""What a design and an order of conversion are made of: bits of R_PROPERTIES."""

from __future__ import annotations

from enum import IntFlag


class Property(IntFlag):
    """Bits of R_PROPERTIES: those of the machine's design, and those of its order (pgemu/machine/designs.py)."""

    SPECIAL_ENTRIES = 1  # host entries are special: no mapcount, no reference; else their folio counts them
    VMA_PFNMAP = 2  # the VMA is VM_PFNMAP: MADV_DONTNEED refuses it, fork() copies it
    GUP = 4  # get_user_pages() works
    SPLITS_FOLIOS = 8  # a folio is split while any of its pages is shared; else it stays whole for ever
    LEVEL_BY_FOLIO = 16  # stage 2 maps at the level of the folio; else at that of pages of one kind
    INSERTS_LOCKED = 32  # a host entry is inserted under the invalidate_lock, for no reference protects the fault
    HOLES_UNMAP = 64  # a hole unmaps its range from processes itself; else truncation does, folio by folio
    ROUNDS_RANGES = 128  # a conversion invalidates and zaps ranges rounded out to huge pages; else the range
    # Of the order alone.
    ZAPS_EXACTLY = 256  # the zap is of the range all the same
    PREALLOCATES = 512  # nodes of the attribute tree are allocated before anything is done
    NAMES_PAGE = 1024  # an error names the page that failed, also one before the range
    DRAINS_LRU = 2048  # the gate of a 4K folio drains the LRU batches once before it gives up
    KEEPS_REFERENCE = 4096  # KVM puts the folio only after the leaf is there
