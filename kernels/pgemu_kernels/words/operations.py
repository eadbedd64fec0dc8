"""What an operation is asked and what it answers: codes, flags, errors, results of faults and of steps."""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

U = np.uint64

# --------------------------------------------------------------------------- pages and levels

PAGE_4K = 4096
PAGE_2M = PAGE_4K * 512
PAGE_1G = PAGE_2M * 512
ORDER_2M = 9
ORDER_1G = 18

# --------------------------------------------------------------------------- operations


class Operation(IntEnum):
    """What one trace record asks for (column `op`). Codes are part of the trace format."""

    HOST_FAULT = 1
    GUEST_FAULT = 2
    CONVERT = 3
    PUNCH_HOLE = 4
    ALLOCATE = 5
    MMAP = 6
    MUNMAP = 7
    ZAP = 8
    BIND = 9
    UNBIND = 10
    PIN = 11
    UNPIN = 12
    GET = 13
    PUT = 14
    DMA_MAP = 15
    DMA_UNMAP = 16
    DMA_ACCESS = 17
    NESTED_MAP = 18
    NESTED_UNMAP = 19
    MEMORY_FAILURE = 20
    CLOSE = 21
    VM_EXIT = 22
    GUEST_ACCESS = 23
    PROTECT = 24
    FORK = 25
    EXIT = 26
    MEMSLOT = 27
    DIRTY_LOG = 28
    ATTRIBUTES = 29
    PREFAULT = 30
    POPULATE = 31
    READ_SMAPS = 32
    REVOKE = 33
    RESTORE = 34
    GUARD_INSTALL = 35
    GUARD_REMOVE = 36
    REMAP = 37
    POOL_RESIZE = 38
    POOL_DEMOTE = 39
    FOLIO_ALLOCATE = 40
    FOLIO_FREE = 41
    VMEMMAP_OPTIMIZE = 42
    VMEMMAP_RESTORE = 43
    FOLIO_SPLIT = 44
    FOLIO_MERGE = 45
    FOLIO_REFERENCE = 46
    FOLIO_FREEZE = 47
    DISSOLVE = 48
    POISON = 49
    VMEMMAP_STORE = 50
    RELEASE = 51
    LRU_DRAIN = 52
    WORK = 53
    MEMORY_POLICY = 54
    DIRTY_LOGGING = 55


OPERATIONS = 64  # room in the tables that have a row per operation


class Flag(IntFlag):
    """Bits of the trace column `flags`; which operation reads which is told in pgemu.trace.schema."""

    WRITE = 1
    EXEC = 2
    PRIVATE = 4
    SHARED = 8
    READ_ONLY = 16
    MADVISE = 32
    POPULATE = 64
    READ = 128
    LOG_DIRTY_PAGES = 64  # of a memory slot
    NORESERVE = 16  # of MMAP, where READ_ONLY is told by READ, WRITE and EXEC
    LOCKED = 32  # of MMAP
    LONGTERM = 64  # of PIN: FOLL_LONGTERM


# --------------------------------------------------------------------------- results

# Guest faults: arch/x86/kvm/mmu/mmu_internal.h, enum of RET_PF_*.
RET_PF_CONTINUE = 0
RET_PF_RETRY = 1
RET_PF_EMULATE = 2
RET_PF_WRITE_PROTECTED = 3
RET_PF_INVALID = 4
RET_PF_FIXED = 5
RET_PF_SPURIOUS = 6

# Host faults: include/linux/mm_types.h, enum vm_fault_reason. 0 = the entry was there already.
VM_FAULT_OOM = 0x1
VM_FAULT_SIGBUS = 0x2
VM_FAULT_SIGSEGV = 0x40
VM_FAULT_NOPAGE = 0x100
VM_FAULT_LOCKED = 0x200
VM_FAULT_RETRY = 0x400

ENOENT = 2
EBADF = 9
EAGAIN = 11
ENOMEM = 12
EACCES = 13
EFAULT = 14
EBUSY = 16
EEXIST = 17
ENODEV = 19
EINVAL = 22
ENOSPC = 28
ERANGE = 34
ENOTTY = 25
EOVERFLOW = 75
EBADFD = 77
EOPNOTSUPP = 95
NEVER = 127  # status -NEVER: the kernel's function would not return (no errno; one defect does that)

# --------------------------------------------------------------------------- steps

# Orders of steps of a conversion: which patches' (R_CONVERT_ORDER).
CONVERT_RFC2 = U(0)
CONVERT_FIXUP = U(1)
CONVERT_JAN2026 = U(2)
CONVERT_NEXT4K = U(3)
CONVERT_SLIDES = U(4)  # of pfnmap


class Defect(IntFlag):
    """Mistakes of posted code that a machine can be given (R_DEFECTS); without its bit the code is as fixed."""

    ROLLBACK_AT_ZERO = 1  # rfc2: the rollback loop counts an unsigned index down and never ends at page 0
    ALLOCATION_RACE = 2  # two faults in one huge page both take a page of the subpool; the loser gets -ENOMEM
    MAPPING_ORDER = 4  # Dec 2025: looks at [index, index + nr) for private pages, not at the huge page around it
    INSERT_UNLOCKED = 8  # pfnmap: the entry is inserted after the invalidate_lock was released
    PUNCH_KEEPS_ENTRIES = 16  # pfnmap: truncation leaves special entries alone, as it has no folio to find them by
    HUGE_OVER_PRIVATE = 32  # 2022: a shared fault takes its level from the host alone and maps over private 4K pages


GO = 0  # what a step returns: the next one follows,
STOP = 1  # ... the operation has ended, its result is in the record,
BLOCKED = 2  # ... or a lock is held by another actor and nothing was done

# --------------------------------------------------------------------------- invariants


class Broken(IntEnum):
    """Which rule was found broken."""

    NONE = 0
    FRAMES = 1  # a frame is lost, owned twice, or counted wrongly
    HOST_PRIVATE = 2  # a host leaf to a private page
    MIXED_LEAF = 3  # a stage-2 leaf over mixed shareability
    LEAF_OVER_FOLIO = 4  # restructure: a leaf larger than its folio
    BLOCK_STATE = 5  # restructure: huge and shared, or split and all private
    WRONG_PFN = 6  # a leaf names another page than the inode does
    COUNTS = 7  # a kept count differs from the recount
    VMEMMAP = 8  # vmemmap pages do not match the folios' state
    IN_PROGRESS = 9  # an invalidation was begun and never ended
    REFERENCES = 10  # restructure: refcount or mapcount differs from the mappings
