"""What a model is a model of: the parameters of pgemu.Config that matter to it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

PAGE = 4096
ORDERS = {PAGE: 0, PAGE << 9: 9, PAGE << 18: 18}
POOL_BASE = 1 << 20  # first frame of guest memory while there are fewer frames of metadata than that


@dataclass
class Parameters:
    """Names, values and defaults are those of Config."""

    design: str = "restructure"
    pool: int = 0
    page_size: int = PAGE << 18
    kernel: str = "7.3"
    frames: int | None = None
    hvo: bool = True
    zero: str = "folio"
    zap_filter: str = "both"
    private_level: str | None = None
    notifier: bool = True
    split_form: str = "jan2026"
    nodes: int = 1
    order: str = "jan2026"
    batch: str = "range"
    split_to: str = "4K"
    merge: str = "now"
    merge_zero: str = "none"
    defects: tuple[str, ...] = ()
    lru_cache: bool = False
    worker: str = "immediate"
    punch: str = "zero"
    host_huge: bool = False
    dirty_log_guest_memfd: bool = False
    in_place_conversion: bool = True
    zap: str = "exact"
    allow_unsafe_mappings: bool = False
    memory_failure: str = "handled"
    poisoned_blocks: str = "refuse"
    mf_delayed: bool = False

    @classmethod
    def of(cls, config: Any) -> Parameters:
        return cls(**{name.name: getattr(config, name.name) for name in fields(cls)})

    @property
    def restructure(self) -> bool:
        return self.design == "restructure"

    @property
    def pins_mapped(self) -> bool:
        """kvm_vcpu_map() pins, since 6.13."""
        return self.kernel != "6.12"

    @property
    def page_order(self) -> int:
        """Order of a huge page of the pool; 0: pages of the page allocator."""
        return ORDERS[self.page_size]

    @property
    def by_page(self) -> bool:
        """Split form rfc2: the page cache changes page by page, and what belongs to a folio is stashed."""
        return self.split_form == "rfc2"

    @property
    def flag_stays(self) -> bool:
        """A merged folio has PG_uptodate if its first page had it: the flag may lie."""
        lie = not {"uptodate-unzeroed", "merge-keeps-flag"}.isdisjoint(self.defects)
        return lie and self.restructure and self.page_order > 0

    @property
    def keeps_shown(self) -> bool:
        """What was shown to guest or host matters: it may be stale, or be lost."""
        return self.flag_stays or (self.page_order > 0 and "hole-zeroes-from-start" in self.defects)

    @property
    def clears_first(self) -> bool:
        """The first use of a folio zeroes its first page, and sets PG_uptodate."""
        return self.flag_stays and "uptodate-unzeroed" in self.defects

    @property
    def flags_only(self) -> bool:
        """A folio without PG_uptodate counts as never zeroed."""
        return self.clears_first or (self.flag_stays and self.zero == "folio")

    @property
    def in_pieces(self) -> bool:
        """A 1G folio is split to 2M folios first."""
        return self.split_to == "2M" and self.page_order == 18

    def heads(self, base: int) -> list[list[int]]:
        """Frames of the huge pages (order 0: of all pages) of each node, dealt out one by one, or 2M by 2M."""
        unit = max(self.page_size, PAGE << 9) // PAGE
        found = []
        for node in range(self.nodes):
            count = len(range(node, self.pool // PAGE // unit, self.nodes))
            found.append([base + i for i in range(0, count * unit, 1 << self.page_order)])
            base += -(-count * unit >> 18) << 18
        return found
