"""Rows of what devices reach: address spaces, their areas, the memory that areas show. A part of rows.py."""

from __future__ import annotations

import numpy as np

U = np.uint64

# address spaces of devices: a container of VFIO type1, or an IOAS of iommufd
D_KIND = U(0)  # DOMAIN_*; 0: the row is free
D_DEVICES = U(1)  # devices attached
D_ROOT = U(2)  # physical address of the I/O page table's root; 0: there is no domain, nothing is pinned
D_FORMAT = U(3)  # row of its format
D_EMPTY_FORMAT = U(4)  # ... and of that of a domain without tables
D_AREAS = U(5)  # root of a radix tree by the last page of each mapping: its first address, and AREA_*
D_MEMORY = U(6)  # ... of where its memory lies: address and process of type1, page and io_pages of iommufd
D_COUNT = U(7)  # mappings
D_LIMIT = U(8)  # type1: dma_entry_limit when the container was made
D_MEMLOCK = U(9)  # RLIMIT_MEMLOCK in pages; NONE: none, CAP_IPC_LOCK
D_LAST = U(10)  # the highest address,
D_HOLES = U(11)  # ... and two ranges that are nobody's: first address, end
D_POLICY = U(15)  # POLICY_*
D_WRAP_ERROR = U(16)  # type1: errno of a range that wraps
D_TAKES_DMABUF = U(27)  # 1: IOMMU_IOAS_MAP_FILE takes the dma-buf of a device's memory (6.19)
D_TRIAL = U(17)  # type1: 1: a new domain is tried with two pages, whose tables stay (6.12)
# What conversions and holes did to I/O entries of a guest_memfd that are there without references, in 4K pages:
D_REVOKED = U(18)  # unmapped, those beyond what was asked for too,
D_WIDENED = U(19)  # ... of them: for a large entry goes whole
D_RETURNED = U(20)  # entered again, or for the first time
D_LOST = U(21)  # to be entered, and no frame for a table
D_CUT = U(22)  # large entries cut,
D_JOINED = U(23)  # ... and put together
D_WINDOWS = U(24)  # times in which a device faulted on pages that were its all along,
D_WINDOW_LOW = U(25)  # ... picoseconds of them together, low and high end of the estimate
D_WINDOW_HIGH = U(26)
D_TOP = U(28)  # no mapping has a last page above this
D_WORDS = 32
DOMAINS = 64
DOMAIN_TYPE1 = U(1)  # VFIO_TYPE1_IOMMU
DOMAIN_TYPE1V2 = U(3)  # VFIO_TYPE1v2_IOMMU
DOMAIN_IOAS = U(4)
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
