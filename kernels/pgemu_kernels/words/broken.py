"""Rules that hold after every operation, and which defects explain one that does not."""

from __future__ import annotations

from enum import IntEnum

from pgemu_kernels.words.operations import Defect


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
    WRONG_ROOT = 11  # a leaf to a page of the other kind than its root is for
    PRIVATE_LEVEL = 12  # a leaf to private memory larger than its kind of VM maps
    POISON_MAPPED = 13  # an entry counts a page that memory failure has unmapped
    STALE_CONTENTS = 14  # a leaf shows a page that was not zeroed since it is the inode's
    LOST_CONTENTS = 15  # a first use, or a hole beside them, zeroed pages that guest or host had in use
    SLOTS = 16  # a memory slot that its VM or its inode does not find, or finds elsewhere
    STALE_MAPPING = 17  # a page that KVM itself maps is private now, or its inode's no more and nobody holds it


BROKEN_RULES = 32  # room in the table of findings

# Defects that explain a rule found broken. ALLOCATION_RACE breaks none: the loser's fault fails.
RULE_EXPLAINED_BY = {
    Broken.HOST_PRIVATE: Defect.INSERT_UNLOCKED,
    Broken.MIXED_LEAF: Defect.MAPPING_ORDER | Defect.HUGE_OVER_PRIVATE,
    Broken.LEAF_OVER_FOLIO: Defect.MAPPING_ORDER | Defect.HUGE_OVER_PRIVATE,
    # Of what a leaf is too large by, or of what a conversion left.
    Broken.WRONG_ROOT: Defect.MAPPING_ORDER | Defect.HUGE_OVER_PRIVATE | Defect.CONVERT_KEEPS_LEAVES,
    Broken.WRONG_PFN: Defect.PUNCH_KEEPS_ENTRIES | Defect.INSERT_UNLOCKED,
    Broken.IN_PROGRESS: Defect.ROLLBACK_AT_ZERO | Defect.UNBIND_DYING,
    # A leaf that is too large shows pages that the fault did not zero; an entry that a hole left may come to show the
    # page that its inode got next.
    Broken.STALE_CONTENTS: Defect.UPTODATE_UNZEROED
    | Defect.MERGE_KEEPS_FLAG
    | Defect.MAPPING_ORDER
    | Defect.HUGE_OVER_PRIVATE
    | Defect.PUNCH_KEEPS_ENTRIES
    | Defect.INSERT_UNLOCKED,
    Broken.LOST_CONTENTS: Defect.UPTODATE_UNZEROED | Defect.MERGE_KEEPS_FLAG | Defect.HOLE_ZEROES_FROM_START,
}
