"""Areas of devices' address spaces, who unmaps them, the pages that they show: what radix trees hold (D_AREAS, ...)."""

from __future__ import annotations

import numpy as np

U = np.uint64

AREA_READ = U(1)
AREA_WRITE = U(2)
AREA_TRACKED = U(4)  # frames of VM_PFNMAP that are remembered and not referenced (POLICY_TRACKED),
AREA_FILE = U(4)  # ... from this bit on: of which guest_memfd, + 1
POLICY_LINUX = U(0)  # frames of VM_PFNMAP that are RAM are refused: vfio_iommu_type1.c:is_invalid_reserved_pfn()
POLICY_NAIVE = U(1)  # what-if: that check removed
POLICY_TRACKED = U(2)  # what-if: accepted, and known to be without a reference; a mapping is of one file
# An IOAS: files of guest_memfd are refused (POLICY_LINUX), or, what-ifs, mapped without references:
POLICY_NONE = U(3)  # nobody unmaps but user space
POLICY_NOTIFIER = U(4)  # the kernel unmaps what a conversion or a hole takes, and whatever a large entry has beside it
POLICY_REVOKE = U(5)  # ... and maps again what is still backed and shared
POLICY_MIRROR = U(6)  # ... cuts large entries for it, and puts them together again

# io_pages: struct iopt_pages of iommufd, rows of words in a radix tree (R_IO_PAGES)
IP_SOURCE = U(0)  # process + 1; 0: a file
IP_START = U(1)  # address, or inode
IP_OFFSET = U(2)  # of a file, in pages
IP_PAGES = U(3)
IP_AREAS = U(4)  # areas over it
IP_WRITABLE = U(5)
IP_PROCESS = U(6)  # whose VmPin it is, + 1
IP_REVOKED = U(7)  # 1: a dma-buf whose memory was taken away: nothing is entered any more
IP_SHIFT = U(3)  # log 2 of the words of a row
IP_INDEX = U(28)  # bits of a page's number in the tree of what is pinned
