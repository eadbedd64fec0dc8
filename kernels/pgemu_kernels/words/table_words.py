"""Words of what the page-table code takes and gives: formats, edits, accesses, walks."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

U = np.uint64

# formats: uint64 rows. Words below 16 are what the operations of processes and VMs write; the others are
# what a walker needs to know, filled from pgemu_kernels.formats.PageFormat. Levels: 1 = 4K .. 6.
F_PRESENT = U(0)  # an entry is present if any of these bits is set
F_LARGE = U(1)  # above level 1, an entry with this bit is a leaf (x86 families; others: F_LEAF_MASK)
F_ADDRESS = U(2)  # bits of an entry that hold a physical address
F_TABLE = U(3)  # bits of an entry that points to a table
F_LEAF_4K = U(4)  # bits of a writable leaf, by level
F_LEAF_2M = U(5)
F_LEAF_1G = U(6)
F_EMPTY = U(7)  # value of an entry that maps nothing
F_SPECIAL_4K = U(8)  # host only: vmf_insert_pfn() into a writable VMA
F_SPECIAL_4K_RO = U(9)
F_LEAF_4K_RO = U(10)
F_TABLE_TOP = U(11)  # bits of a table entry in the top table (page-table isolation adds no-execute)
F_LEVELS = U(16)  # level of the top table: 3 to 6
F_ROOT_BITS = U(17)  # index bits of the top table: 9, more where root tables are concatenated
F_INPUT_BITS = U(18)  # bits of an input address
F_SIGN_EXTENDED = U(19)  # 1: the bits above F_INPUT_BITS repeat the highest one (canonical addresses)
F_LEAF_MASK = U(20)  # at levels 2 .. F_LARGEST_LEAF a present entry is a leaf if entry & mask == value
F_LEAF_VALUE = U(21)
F_PAGE_MASK = U(22)  # at level 1 a present entry is a leaf if entry & mask == value, else reserved
F_PAGE_VALUE = U(23)
F_LARGEST_LEAF = U(24)
F_RESERVED_LEAF = U(24)  # + level (1 .. 5): bits that a leaf of this level must not have
F_INVERT = U(35)  # rights = (entry ^ invert), ANDed over the levels
F_FOLD = U(36)  # before that, in a leaf: entry ^= entry >> 1 & fold (Arm's two-bit XN)
F_TABLE_RIGHTS = U(37)  # rights that table entries never take away (all, where only leaves have permissions)
F_BAD_LOW = U(38)  # bit n: low three bits n of a present entry are a misconfiguration
F_BAD_MEMORY_TYPE = U(39)  # bit n: bits 5:3 = n of a leaf are a misconfiguration
F_FAMILY = U(40)  # formats.Family: how faults are told
F_ACCESSED = U(41)
F_DIRTY = U(42)
F_FROZEN = U(43)  # what an entry holds while its subtree is torn down or replaced
F_BREAK_BEFORE_MAKE = U(44)  # 1: a valid entry may not be replaced by another valid one without a flush between
F_FLUSH = U(45)  # formats.FlushRule
F_KEY_SHIFT = U(46)  # where a leaf's protection key begins; 0: no keys
F_RESERVED_TABLE = U(46)  # + level (2 .. 6): bits that a table entry of this level must not have
# Present as Linux sees it: KVM's own mark (bit 11) in stage 2, so that a cached MMIO entry is none; else F_PRESENT.
F_MMU_PRESENT = U(55)
F_WRITE = U(56)  # stage 2: the bit without which the hardware refuses a write
F_WRITABLE_MARKS = U(57)  # ... KVM's host-writable and MMU-writable bits
F_MMU_WRITABLE = U(58)  # ... the second of them
F_EXECUTE = U(59)  # ... the bits without which a fetch is refused; 0 where leaves are executable without
F_MEMORY_TYPE = U(60)  # ... the bits that are clear in a leaf over a device
F_MMIO_VALUE = U(61)  # ... what a cached MMIO access holds beside the guest frame and the generation
F_MMIO_GUARD = U(62)  # ... address bits set in it against L1TF, the guest's moved up by five
F_PAT_PAGE = U(64)  # the memory-type bit of a 4K leaf that larger leaves have elsewhere; 0: none
F_PAT_LARGE = U(65)  # ... and where they have it
F_BREAK_BITS = U(66)  # bits of a valid leaf whose change needs break-before-make
F_SOFTWARE = U(67)  # bits that the hardware ignores and Linux uses: their change needs no flush
F_RANGE_FLUSH = U(68)  # bit 0: there is an invalidation by range; bit 1: an unmap defers to one of them
F_SIZED_LEAF = U(70)  # a leaf with its size in its address has this of F_SIZED_MASK; all entries of it are equal
F_SIZED_MASK = U(71)  # ... 0: no leaves have
F_TABLE_LEVEL = U(72)  # where a table entry holds the level of the table it points to; 0: nowhere
F_PAGE_SIZES = U(73)  # bitmap of the sizes of leaves that a map chooses from; 0: a leaf of each level
F_TALLER = U(74)  # row of the format with one level more, which a map of higher addresses goes over to; 0: none
F_MAP_RULE = U(75)  # formats.MapRule
F_UNMAP_RULE = U(76)  # formats.UnmapRule
F_LARGEST_FLUSH = U(77)  # an invalidation by pages covers 2 ** this pages at most; beyond, the whole domain's
F_MAP_FLUSHES = U(78)  # 1: what was not present is cached, too (VT-d's caching mode): a map is flushed
F_READ = U(79)  # the bit without which the hardware refuses a read; 0: none
F_LEAF_BITS = U(47)  # what every leaf has whatever its rights
F_GATHER = U(53)  # formats.Gather
F_WORDS = 80

# edits: the one row that `edits.edit` takes, uint64. Words below 16 are the request, the others the answer and scratch.
E_OP = U(0)  # Edit
E_FORMAT = U(1)  # row of formats
E_ROOT = U(2)  # physical address of the root
E_LENGTH = U(3)  # bytes, at each address
E_LEVEL = U(4)  # highest level of a leaf (map), level to split to, of the leaf (collapse), of the entry (store)
E_SET = U(5)  # bits of a 4K leaf: all of them (map), those to set (protect); the entry (store)
E_CLEAR = U(6)  # bits of a 4K leaf to clear
E_FLAGS = U(7)  # EDIT_*
E_FLUSH_START = U(16)  # what must be flushed, all told; no sign extension
E_FLUSH_END = U(17)  # 0: nothing
E_FLUSH_LEVEL = U(18)  # smallest level among it
E_FREED = U(19)  # 1: tables were freed
E_PENDING_START = U(20)  # what is not flushed yet
E_PENDING_END = U(21)
E_PENDING_LEVEL = U(22)
E_RECORDS = U(23)  # records that the log asked for
E_FREED_LIST = U(24)  # frames of tables freed, to be given back after the flush: chained through `counts`
E_WRITTEN = U(25)  # leaves written and cleared, not charged yet
E_CLEARED = U(26)
E_FOUND = U(27)  # leaves that the edit came upon, and those that it changed
E_CHANGED = U(28)
E_OFFSET = U(29)  # address up to which an edit came
E_QUICK = U(30)  # map: bits of a leaf where nothing but the addresses is left to check; 0: everything is
E_QUICK_PHYSICAL = U(31)  # ... and the bits that its physical address may have
E_GATHERED = U(14)  # bytes of the last range that was left to the flush
E_CURSOR = U(32)  # + level: next slot of a table being torn down
E_CURSOR_END = U(40)
E_SCAN = U(48)  # + level: the same of a table that is searched for leaves
E_SCAN_END = U(56)
E_WORDS = 64


class Edit(IntEnum):
    """What an edit of a page table does."""

    CREATE = 1
    DESTROY = 2
    MAP = 3
    UNMAP = 4
    PROTECT = 5
    CLEAR_ACCESSED = 6
    CLEAR_DIRTY = 7
    SPLIT = 8
    COLLAPSE = 9
    FREE_TABLES = 10
    STORE = 11


EDIT_EXACT = U(1)  # map: one leaf of E_LEVEL at each address
EDIT_REPLACE = U(2)  # map: what is mapped already goes
EDIT_SPLIT = U(4)  # a leaf that the range covers in part is split; otherwise it is edited whole
EDIT_FREE = U(8)  # unmap: tables that are empty are freed
EDIT_FREE_COVERED = U(16)  # ... or only last-level tables that the range covers whole


class LogKind(IntEnum):
    """Kind of a record of an edit's log, in bits 7:0 of its first word; bits 15:8 are the level of the entry."""

    READ = 0  # address of the entry, its value
    WRITE = 1
    FLUSH = 2  # by address or range: first input address, bytes; level: stride
    FLUSH_ALL = 3  # everything of the process or VM, because of this range
    FILL = 4  # address of a new table, the value in its 512 entries
    FREE = 5  # address of a table given back


LOG_WORDS = 3  # words of a record: kind and level, address, value

# access rows: what one kind of access asks of a walk; made by pgemu.tables.translation.Access
X_NEED = U(0)  # rights that must be there
X_FORBID = U(1)  # rights that must not be there (SMEP, SMAP)
X_KEYS_USER = U(2)  # bit k: protection key k denies the access to a user page
X_KEYS_SUPERVISOR = U(3)
X_USER = U(4)  # the right that makes a page a user page
X_ERROR = U(5)  # bits of the fault code that do not depend on the outcome
X_SET_TABLE = U(6)  # bits that the hardware sets in every table entry of a walk that succeeds
X_SET_LEAF = U(7)  # ... and in the leaf
X_FLAG = U(8)  # bits that the leaf must have, else access flag fault (Arm without hardware update)
X_DIRTY_IF = U(9)  # a leaf with this bit (Arm DBM) ...
X_DIRTY_GIVES = U(10)  # ... has this right, and gets the bit set
X_RESERVED = U(11)  # reserved bits that fault (none where hardware ignores them)
# An entry with entry & mask == value is one that this access passes without a fault, an update or a second look.
X_TABLE_MASK = U(10)  # + level (2 .. 5)
X_TABLE_VALUE = U(14)  # + level (2 .. 5)
X_LEAF_MASK = U(19)  # + level (1 .. 3)
X_LEAF_VALUE = U(22)  # + level (1 .. 3)
X_WORDS = 32
ACCESS_ROWS = 8  # rows of one stage: six kinds of access, and the reading and writing of guest tables
X_ROW_TABLE_READ = U(6)
X_ROW_TABLE_WRITE = U(7)


class WalkStatus(IntEnum):
    """How a walk ended."""

    OK = 0
    NOT_PRESENT = 1
    RESERVED = 2  # a reserved bit, or a reserved kind of entry, in an entry that is present
    PERMISSION = 3
    PROTECTION_KEY = 4  # nothing but a protection key denies the access
    MISCONFIGURED = 5  # EPT misconfiguration
    ACCESS_FLAG = 6  # Arm without hardware update of the access flag
    NOT_CANONICAL = 7  # general protection, no page fault
    ADDRESS_SIZE = 8  # beyond the input addresses of the format
    OUTSIDE_MEMORY = 9  # a table lies where the machine has no memory (inference: hardware says nothing)


class WalkStage(IntEnum):
    """Where a nested walk failed."""

    NONE = 0
    GUEST = 1  # in the guest's own tables
    TABLE = 2  # in stage 2, at the address of a guest table's entry
    FINAL = 3  # in stage 2, at the address that the guest's tables gave


# walk records: what one exact walk leaves in a scratch array
W_STATUS = U(0)
W_LEVEL = U(1)
W_ERROR = U(2)
W_PHYSICAL = U(3)
W_RIGHTS = U(4)
W_COUNT = U(5)  # entries read
W_SLOT = U(6)  # + n: index in `ram` of the n-th
W_ENTRY = U(12)  # + n: its physical address
W_WORDS = 18
WALK_READS = 6  # room per address in the lists of references
NESTED_READS = 35
NESTED_WRITES = 60
WALK_BLOCK = 64  # walks that go step by step together
WALK_SCRATCH = W_WORDS + 2 * WALK_BLOCK
NESTED_SCRATCH = 2 * W_WORDS + 8 + 3 * WALK_BLOCK
