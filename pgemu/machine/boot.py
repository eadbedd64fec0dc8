"""A new machine's arrays, and the registers that its configuration decides."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu import cost
from pgemu.machine.config import DEFECTS, LEVEL_RULES, SPLIT_FORMS, THP
from pgemu.machine.designs import row_of
from pgemu.machine.mapped_memory import map_memory
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import DTYPES, Machine as Arrays
from pgemu_kernels.formats import bits as formats, leaves, page_format

if TYPE_CHECKING:
    from pgemu.machine.config import Config

__all__ = ("allocate", "set_registers")

Array = np.ndarray[Any, Any]

_SLOTS = slice(int(W.STATE_MEMSLOTS), W.STATE_SIZE)  # rows of which most machines use a few
_LARGE_COUNTS = 4 << 20  # bytes; from here on NumPy, too, asks for huge pages
_LARGE = 32 << 20  # bytes; of less `state` a machine touches a few pages only, and a huge one costs more than these

# pgemu_kernels/folios/zeroed.py:keeps_shown()
_KEEPS_SHOWN = {
    "uptodate-unzeroed", "merge-keeps-flag", "mapping-order", "huge-over-private", "hole-zeroes-from-start"
}  # fmt: skip
_LINE = 16  # elements of an array that begin with a cache line for sure: 64 bytes of uint32, two lines of uint64


def _lay_out(sizes: dict[np.uint64, int], begin: int, begins: dict[np.uint64, int]) -> int:
    """Put tables behind one another from `begin` on, note where each begins, and return where the last one ends.

    Each begins with a cache line, so that the words of a row that are used together share one.
    """
    for register, size in sizes.items():
        begin = -(-begin // _LINE) * _LINE
        begins[register] = begin
        begin += size
    return begin


def allocate(config: Config) -> Arrays:
    """The arrays of a machine, zeroed, with the registers that say where their tables begin.

    OSError ENOMEM where this computer cannot hold them.
    """
    written = _boot_frames(config) * W.PAGE_4K
    try:
        arrays = _allocate(config) if written <= _physical_memory() else None
    except (MemoryError, ValueError, OSError):  # NumPy's for too much, and for more than it can count
        arrays = None
    if arrays is None:
        size = _all_frames(config) * W.PAGE_4K
        raise OSError(W.ENOMEM, f"{size:,} bytes for the metadata of {config}: more than this computer can hold")
    return arrays


def _physical_memory() -> int:
    """Bytes of memory of this computer: what boot writes has to fit; the rest is taken as it is used."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allocate(config: Config) -> Arrays:
    frames = _frames(config)
    blocks = 4 * config.pool_pages + W.INODES
    pages = blocks << config.page_order
    tails = {
        W.R_FREE_STACK: frames + _boot_frames(config),
        W.R_BLOCK_ROWS: blocks * W.B_WORDS,
        W.R_WORD_ROWS: (pages >> 6) + W.INODES,
        W.R_ZEROED_ROWS: (pages >> 6) + W.INODES,
        W.R_REGIONS: (pages >> 9) + (pages >> 18) + 2 * W.INODES,
        W.R_GUEST_BITS: (pages >> 6) + W.INODES,
        W.R_ASSIGNED: (pages >> 6) + W.INODES,
        W.R_ASSIGNED_2M: (pages >> 9) + (pages >> 18) + 2 * W.INODES,
        W.R_CONTIGUOUS_MAP: W.CONTIGUOUS_FRAMES // 64,
        W.R_SHOWN_ROWS: (pages >> 6) + W.INODES if _KEEPS_SHOWN.intersection(config.defects) else 0,
        W.R_WORK_LISTS: (pages >> 6) + W.INODES if config.order == "rfc2" else 0,
    }
    counts = {
        W.R_CONTENTS: config.guest_pages,
        W.R_TRANSIENT: config.guest_pages,
        W.R_PINNED: _all_frames(config),
        W.R_SHARED: (pages >> 9) + (pages >> 18) + 3 * W.INODES,
    }
    begins: dict[np.uint64, int] = {}
    for number in range(config.nodes):  # three bits per 2M block, whole 1G at a time
        tails[node_word(number, W.N_BLOCKS)] = 3 * (config.node(number).span >> 15)
    state_size = _lay_out(tails, W.STATE_SIZE, begins)
    counts_size = _lay_out(counts, _all_frames(config), begins)
    small = map_memory(-(-counts_size // 2), counts_size * 4 >= _LARGE_COUNTS, counted=True)
    arrays = Arrays(
        # Frames in a seed's order are scattered: each would cost the host a huge page.
        ram=map_memory(_all_frames(config) * 512, huge=config.seed == 0),
        state=map_memory(state_size, (state_size - _SLOTS.stop + _SLOTS.start) * 8 >= _LARGE, _SLOTS),
        stats=map_memory(W.STATS_SIZE, huge=False, counted=True).view(DTYPES["stats"]),
        counts=small.view(DTYPES["counts"])[:counts_size],
    )
    for register, begin in begins.items():
        arrays.state[register] = begin
    return arrays


def _frames(config: Config) -> int:
    """Frames of the metadata zone: a power of two, enough for everything at once and for contents."""
    gigabytes = (config.pool + config.other_pool + config.buddy) / W.PAGE_1G
    tables = 2 * (513 + 2) + 16
    nodes = 512 * 9 // 7 + 8  # of the page cache, and what is stashed, while every huge page of 2M is split
    huge_pages = min(config.pool_pages, config.pool // W.PAGE_2M) + config.other_pool_pages + config.buddy // W.PAGE_2M
    needed = int(gigabytes * (4096 + tables + nodes)) + 2 * huge_pages + (config.memory >> 12)
    return 1 << max(needed, config.frames or 0, 511).bit_length()


def _boot_frames(config: Config) -> int:
    """Frames behind the others, with the vmemmap that the boot allocator gives."""
    return sum(config.node(number).boot_frames(config.hvo) for number in range(config.nodes))


def node_word(number: int, word: np.uint64) -> np.uint64:
    """Index in `state` of a word of a node's row."""
    return np.uint64(int(W.STATE_NODES) + number * W.N_WORDS + int(word))


def _all_frames(config: Config) -> int:
    """Frames that have a place in `ram`: those handed out one by one, those of boot, those for runs."""
    return _contiguous(config) + W.CONTIGUOUS_FRAMES


def _contiguous(config: Config) -> int:
    """The first frame of those for runs, aligned to the longest run."""
    return -(-(_frames(config) + _boot_frames(config)) // 64) * 64


# --------------------------------------------------------------------------- registers

# What is read off the kernel, its configuration and the machine's configuration as it stands there.
_OF_KERNEL = {
    W.R_GUARDS: "guards",
    W.R_MERGES_UNFAULTED: "merges_unfaulted",
    W.R_MARKS_ZAPPED: "marks_zapped",
    W.R_BOOT_MARKS: "boot_marks",
    W.R_VIRTUAL_INDEX: "virtual_index",
    W.R_GIGANTIC_SURPLUS: "gigantic_surplus",
    W.R_BOOT_ASCENDING: "boot_list_ascending",
    W.R_MASK_TAILS: "mask_tails",
    W.R_FOLIO_6_12: "folio_6_12",
    W.R_RESET_STRUCT_PAGES: "reset_struct_pages",
    W.R_DONTNEED_FREES_TABLES: "dontneed_frees_tables",
    W.R_RECOVER_HUGE: "recovers_huge_pages",
    W.R_GMEM_MMAP: "guest_memfd_mmap",
    W.R_MOVES_MANY: "remap_moves_many",
    W.R_DIRTY_ENTRIES: "dirty_entries",
    W.R_SPECIAL_HUGE_ZERO: "special_huge_zero",
    W.R_HUGE_ZERO_REPLACED: "huge_zero_replaced",
    W.R_REUSES_LARGE: "reuses_large_folios",
    W.R_THP_LOSES_DIRTY: "thp_modify_drops_dirty",
    W.R_COLLAPSES_READ_ONLY: "collapses_read_only",
    W.R_COLLAPSE_SKIPS_HOLES: "collapse_skips_holes",
    W.R_COLLAPSE_BATCHES: "collapse_batches",
    W.R_FAILURE_PFN: "failure_pfn",
    W.R_PINS_MAPPED: "pins_mapped_pages",
}
_OF_KERNEL_CONFIGURATION = {
    W.R_PAGE_FLAGS: "page_flags",
    W.R_TAIL_FLAGS: "tail_flags",
    W.R_NODE_SHIFT: "node_shift",
    W.R_HUGETLB_CGROUP: "hugetlb_cgroup",
    W.R_DEFERRED_STRUCT_PAGES: "deferred_struct_pages",
    W.R_LRU_REFS: "lru_references",
    W.R_INIT_ON_ALLOC: "init_on_alloc",
}
_OF_CONFIG = {
    W.R_GUEST_PAGES: "guest_pages",
    W.R_ORDER: "page_order",
    W.R_NODES: "nodes",
    W.R_HVO: "hvo",
    W.R_OPTIMIZE_VMEMMAP: "hvo",
    W.R_PTI: "pti",
    W.R_NOTIFIER: "notifier",
    W.R_DONTNEED_PFNMAP: "dontneed_on_pfnmap",
    W.R_FULL: "full",
    W.R_LRU_CACHE: "lru_cache",
    W.R_HOST_HUGE: "host_huge",
    W.R_DIRTY_LOG_GMEM: "dirty_log_guest_memfd",
    W.R_IN_PLACE: "in_place_conversion",
    W.R_LARGE_FOLIOS: "large_folios",
    W.R_MF_DELAYED: "mf_delayed",
    W.R_PROTECTION_KEYS: "protection_keys",
    W.R_UNSAFE_MAPPINGS: "allow_unsafe_mappings",
}
# 1 where a field of the configuration has the value.
_CHOICES = {
    W.R_ZAP_FILTER: ("zap_filter", "both"),
    W.R_SPLIT_TO_2M: ("split_to", "2M"),
    W.R_MERGE_LAZY: ("merge", "lazy"),
    W.R_MERGE_ZEROES: ("merge_zero", "unzeroed"),
    W.R_FLUSH_BATCHED: ("flush", "batched"),
    W.R_WORK_QUEUED: ("worker", "queued"),
    W.R_PUNCH_REFUSES: ("punch", "refuse"),
    W.R_ZAP_ROUNDED: ("zap", "rounded"),
    W.R_FAILURE_HUGE: ("memory_failure", "handled"),
    W.R_POISON_MOVES: ("poisoned_blocks", "move"),
}
_ALIKE = {
    W.R_VMEMMAP: 0xFFFF_EA00_0000_0000,
    W.R_HOST_FORMAT: formats.HOST_X86_64,
    W.R_FORMATS: 3,
    W.R_LAST_VMA: W.STATE_VMAS,
    W.R_LAST_MEMSLOT: W.STATE_MEMSLOTS,
}


def _read_off(config: Config) -> dict[np.uint64, Any]:
    """The registers that the tables above name."""
    kernel = formats.KERNELS[config.kernel]
    configuration = formats.CONFIGURATIONS[config.configuration]
    sources = ((_OF_KERNEL, kernel), (_OF_KERNEL_CONFIGURATION, configuration), (_OF_CONFIG, config))
    read = {register: getattr(source, name) for names, source in sources for register, name in names.items()}
    chosen = {register: getattr(config, name) == value for register, (name, value) in _CHOICES.items()}
    return read | chosen | _ALIKE


def _derived(config: Config, base: int) -> dict[np.uint64, Any]:
    """The registers that depend on more than one thing; `base` is the first PFN of the pools."""
    kernel = formats.KERNELS[config.kernel]
    frames = _frames(config)
    random = np.random.default_rng(config.seed)
    shown = ~formats.GLOBAL if config.pti else -1
    properties, order = row_of(config.design, config.order, config.invalidate)
    hstate = 2 if config.page_order == 0 else config.page_order == W.ORDER_1G
    return {
        W.R_PROPERTIES: properties,
        W.R_FRAMES: frames,
        W.R_FRAMES_MASK: frames - 1,
        W.R_FRAMES_LIMIT: frames - 1 if config.frames is None else min(config.frames, frames - 1),
        W.R_BOOT_FRAMES: _boot_frames(config),
        W.R_CONTIGUOUS: _contiguous(config),
        W.R_SEED_MULTIPLIER: 1 if config.seed == 0 else int(random.integers(frames // 2)) * 2 + 1,
        W.R_SEED_OFFSET: 0 if config.seed == 0 else int(random.integers(frames)),
        W.R_POOL_BASE: base,
        W.R_HSTATE: int(W.STATE_HSTATES) + W.H_WORDS * hstate,
        W.R_STAGE2_FORMAT: formats.STAGE2_EPT if config.stage2 == "ept" else formats.STAGE2_NPT,
        W.R_HWPOISON: kernel.hwpoison if formats.CONFIGURATIONS[config.configuration].memory_failure else 0,
        W.R_HWPOISON_ENTRY: leaves.swap_entry(kernel.hwpoison_type, 0),
        W.R_VMEMMAP_PAGE: formats.VMEMMAP_PAGE & shown,
        W.R_VMEMMAP_READ_ONLY: formats.VMEMMAP_READ_ONLY & shown,
        W.R_VMEMMAP_LARGE: formats.VMEMMAP_LARGE & shown,
        W.R_ZERO_PAGE: config.zero == "page" and config.page_order != 0,  # a 4K folio has its own flag
        W.R_SPLIT_FORM: SPLIT_FORMS[config.split_form],
        W.R_CONVERT_ORDER: order,
        W.R_LEVEL_RULE: LEVEL_RULES[config.level_rule],
        # virt/kvm/guest_memfd.c:__kvm_gmem_set_attributes(): files of 4K pages are converted at once
        W.R_CONVERT_BY_BLOCK: config.batch == "block" and config.page_order != 0,
        W.R_DEFECTS: sum(DEFECTS[name] for name in set(config.defects)),
        W.R_LRU_CPUS: min(config.host_cpus, W.LRU_CPUS),
        W.R_THP: THP[config.thp],
        W.R_HUGE_ANONYMOUS: config.thp != "never",
    }


def set_registers(config: Config, arrays: Arrays) -> None:
    """Write the registers, the formats and the prices of a new machine."""
    base = max(1 << 20, -(-_all_frames(config) // (1 << 18)) << 18)
    state = arrays.state
    for register, value in (_read_off(config) | _derived(config, base)).items():
        state[register] = value
    _set_nodes(config, state, base)
    table = page_format.format_table(config.kernel, **config.format_parameters)
    state[int(W.STATE_FORMATS) : int(W.STATE_FORMATS) + table.size] = table.reshape(-1)
    prices = cost.price_table(config.profile, config.vcpus, config.host_cpus)
    stats = arrays.stats
    stats[int(W.STATS_PRICES) : int(W.STATS_PRICES) + prices.size] = prices.reshape(-1)
    one = prices[:, [int(W.PRICE_FIXED_LOW), int(W.PRICE_FIXED_HIGH)]]
    one = one + prices[:, [int(W.PRICE_EACH_LOW), int(W.PRICE_EACH_HIGH)]]
    stats[int(W.STATS_PRICES_ONE) : int(W.STATS_PRICES_ONE) + one.size] = one.reshape(-1)


def _set_nodes(config: Config, state: Any, base: int) -> None:
    """Empty free lists, and where the pages of each node lie."""
    for row in range(int(W.STATE_FREE_AREAS), int(W.STATE_PCP_COUNTS), 2):  # empty lists
        state[row : row + 2] = np.uint64(W.HSTATES_ADDRESS + (row - int(W.STATE_HSTATES)) * 8)
    for number in range(config.nodes):
        node = config.node(number)
        words = {W.N_BASE: base, W.N_PAGES: node.pages, W.N_GIGANTIC: node.gigantic, W.N_RESERVED: node.reserved,
                 W.N_HUGE: node.huge}  # fmt: skip
        for word, value in words.items():
            state[node_word(number, word)] = value
        base += node.span
