"""Rows of pages that KVM itself maps: struct kvm_host_map of kvm_vcpu_map(), struct gfn_to_pfn_cache."""

from __future__ import annotations

import numpy as np

U = np.uint64

K_KIND = U(0)  # MAPPED_*; 0: the row is free
K_VM = U(1)
K_GPA = U(2)
K_LENGTH = U(3)  # bytes
K_WRITE = U(4)  # 1: for writing
K_PFN = U(5)
K_REFERENCES = U(6)  # on its folio that are held: a pin's, one, or none
K_VALID = U(7)  # a cache's frame can be used, as far as notifiers say
K_HVA = U(8)  # of the page; NONE: KVM_HVA_ERR_BAD
K_SPACE = U(9)
K_SLOTS = U(10)  # V_GENERATION of the memory slots that a cache was looked up in
K_INODE = U(11)  # whose page it was when it was mapped
K_INDEX = U(12)
K_LIVES = U(15)  # the last word: how many mappings this row was before
K_WORDS = 16
MAPPED_PAGES = 256
MAPPED_MAP = U(1)
MAPPED_CACHE = U(2)
