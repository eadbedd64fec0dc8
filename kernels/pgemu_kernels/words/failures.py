"""What memory failure says of a page: include/linux/mm.h, enum mf_result and mf_action_page_type."""

from __future__ import annotations

from enum import IntEnum


class MfResult(IntEnum):
    """What was done about it. NONE: it did not come to an action_result()."""

    IGNORED = 0
    FAILED = 1
    DELAYED = 2
    RECOVERED = 3
    NONE = 4


class MfPage(IntEnum):
    """What kind of page it was, as the kernel prints it."""

    GET_HWPOISON = 0
    HUGE = 1
    FREE_HUGE = 2
    UNSPLIT_THP = 3
    DIRTY_UNEVICTABLE_LRU = 4
    CLEAN_UNEVICTABLE_LRU = 5
    DIRTY_LRU = 6
    CLEAN_LRU = 7
    TRUNCATED_LRU = 8
    BUDDY = 9
    PFN_MAP = 10
    UNMAP_FAILED = 11


BUS_MCEERR_AR = 4  # include/uapi/asm-generic/siginfo.h: si_code of SIGBUS, action required
BUS_MCEERR_AO = 5  # ... and optional
