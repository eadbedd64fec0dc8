"""Random sequences of operations on both designs with all their parameters, for a machine and for the model alone."""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from model.model import PAGE
from model.pair import Pair
from pgemu_kernels import words as W
from test_state_machine import ADDRESSES, CHECK_EVERY, GPAS, PAGES_IN_BLOCK, TwoMegabytes, lengths, numbers, spots

SPACES = 5  # processes at most
INODES = 9
WINDOWS = 60  # mappings at most, beyond which nobody forks
PINS = 3
AREAS = 3  # of devices
WAYS = ("", "", "", "refused", "none", "notifier", "revoke", "mirror")
MAPPINGS = 3
some = st.sampled_from((False, False, True))
DEFECTS = (
    ("uptodate-unzeroed",),
    ("merge-keeps-flag",),
    ("hole-zeroes-from-start",),
    ("hole-zeroes-from-start", "merge-keeps-flag"),
)
KINDS = {"npt": ("plain", "sw", "snp", "snp"), "ept": ("plain", "sw", "tdx", "tdx")}


class Sequences(TwoMegabytes):
    """What the fast loops do and, beside that, all that `full.run_designs` knows.

    `disabled`: parameters that stay as they are by default, and rules that do nothing.
    """

    disabled: ClassVar[frozenset[str]] = frozenset()
    shortages: ClassVar = st.sampled_from((0, 0, 1, 2, 3, 5, 7, 8, 9, 10))
    pool_pages = 5

    def make(self, **parameters: Any) -> Pair:
        raise NotImplementedError

    def count(self) -> None:
        """A step was done."""

    # ------------------------------------------------------------------ boot

    def parameters(self, draw: Any) -> dict[str, Any]:
        """What a machine is made of."""
        found = {
            "design": draw(st.sampled_from(("restructure", "restructure", "pfnmap"))),
            "pool": self.pool_pages * self.page_size,
            "page_size": self.page_size,
            "kernel": draw(st.sampled_from(("7.3", "6.18", "6.12"))),
            "stage2": draw(st.sampled_from(("npt", "ept"))),
            "hvo": draw(st.sampled_from((True, True, False))),
            "zero": draw(st.sampled_from(("folio", "page"))),
            "seed": draw(st.integers(0, 2)),
            "private_level": draw(st.sampled_from((None, None, None, "4K", "1G"))),
            "zap_filter": draw(st.sampled_from(("both", "target"))),
            "notifier": draw(st.booleans()),
            "split_form": draw(st.sampled_from(("jan2026", "rfc2"))),
        }
        orders = ("jan2026", "rfc2", "fixup", "next4k") if self.page_size == PAGE else ("jan2026", "rfc2", "fixup")
        for name, values in (
            ("order", orders if found["design"] == "restructure" else ("jan2026",)),
            ("batch", ("range", "block")),
            ("merge", ("now", "lazy")),
            ("flush", ("each", "batched")),
            ("merge_zero", ("none", "none", "unzeroed")),
            ("defects", ((),) * 5 + DEFECTS),
            ("lru_cache", (False, True)),
            ("worker", ("immediate", "queued")),
            ("punch", ("zero", "refuse")),
            ("host_huge", (False, True)),
            ("dirty_log_guest_memfd", (False, True)),
            ("in_place_conversion", (True,) * 30 + (False,)),
            ("zap", ("exact", "exact", "rounded")),
            ("allow_unsafe_mappings", (False, True) if found["kernel"] != "6.12" else (False,)),
            ("nodes", (1, 1, 2)),
            ("memory_failure", ("handled", "handled", "marked")),
            ("poisoned_blocks", ("refuse", "move")),
            ("mf_delayed", (False, True)),
        ):
            value = draw(st.sampled_from(values))
            if name not in self.disabled:
                found[name] = value
        if found.get("zap") != "rounded":
            found["invalidate"] = draw(st.sampled_from(("rounded", "exact")))
        self.more_parameters(draw, found)
        self.way = draw(st.sampled_from(WAYS)) if self.enabled("devices") else ""
        if self.way:  # frames of I/O page tables are not the model's
            found.pop("frames", None)
        return found

    def more_parameters(self, draw: Any, found: dict[str, Any]) -> None:
        if self.page_size != PAGE and found.get("nodes", 1) == 1:
            found["frames"] = draw(self.frames)

    @initialize(data=st.data())
    def boot(self, data: st.DataObject) -> None:
        draw = data.draw
        found = self.parameters(draw)
        self.pair = self.make(**found)
        self.operations = self.shortage = 0
        self.two_nodes = found.get("nodes") == 2
        self.logs = found.get("dirty_log_guest_memfd", False)
        # Pieces of a 1G page and split leaves are not modelled where memory runs short.
        self.fails = found.get("split_to", "4K") == "4K" and "failures" not in self.disabled
        self.short = found.get("split_to", "4K") == "4K" and "shortage" not in self.disabled and not self.way
        for _ in range(2):
            self.pair.create_process()
        if self.way:
            self.pair.open_devices(self.way)
        pages = draw(st.integers(1, self.pool_pages - 1))
        self.pair.create_guest_memfd(pages * self.page_size * self.unit, draw(st.booleans()))
        if pages < self.pool_pages - 1:
            self.pair.create_guest_memfd(
                (self.pool_pages - 1 - pages) * self.page_size * self.unit, draw(st.booleans())
            )
        for space in range(2):
            self.pair.create_vm(space, draw(st.sampled_from(KINDS[found["stage2"]])))
        self.pair.bind(0, 0, 0, 0, self.pair.inodes[0].size)
        self.pair.mmap(0, ADDRESSES[0], 0, 0, self.pair.inodes[0].size)

    unit = 1  # huge pages at a time that an inode's size is of

    def enabled(self, name: str) -> bool:
        return name not in self.disabled

    # ------------------------------------------------------------------ accepts

    @rule(number=numbers, spot=spots, length=lengths, before=st.booleans(), short=st.data())
    def accepts(self, number: int, spot: tuple[int, int], length: int, before: bool, short: st.DataObject) -> None:
        """A guest accepts 4K of private memory, of which it may have accepted 2M before, or now and then has not
        enough memory to."""
        found = self.page_of(self.pair.model.slots, number, spot)
        if found is None:
            return
        slot, gfn = found
        if before:
            self.pair.convert(slot.inode, slot.file_page(gfn) * PAGE, length * PAGE, False)
            self.pair.guest_fault(slot.owner, gfn * PAGE)
        if self.short:
            self.pair.limit_frames(short.draw(st.sampled_from((None, None, 0, 1))))
        self.pair.guest_fault(slot.owner, gfn * PAGE, None, True)
        self.pair.limit_frames(None)

    # ------------------------------------------------------------------ shortage

    @precondition(lambda self: self.short)
    @rule(free=st.data())
    def runs_short(self, free: st.DataObject) -> None:
        """Only so many frames may be taken by the next operation."""
        self.pair.limit_frames(free.draw(self.shortages))
        self.shortage = 2

    # ------------------------------------------------------------------ what is shared, seen and held

    @rule(number=numbers, spot=spots, length=lengths, guest=st.booleans())
    def shares_and_touches(self, number: int, spot: tuple[int, int], length: int, guest: bool) -> None:
        """A page that host and guest use, with its neighbours."""
        found = self.page_of(self.pair.model.vmas, number, spot)
        if found is None:
            return
        vma, page = found
        index = vma.file_page(page)
        self.pair.convert(vma.inode, index * PAGE, length * PAGE, True)
        self.pair.host_fault(vma.owner, page * PAGE, write=not vma.read_only)
        for slot in self.pair.model.slots if guest else ():
            for gfn in slot.showing(vma.inode, range(index, index + 1)):
                self.pair.guest_fault(slot.owner, gfn * PAGE)

    @rule(number=numbers, spot=spots, length=lengths)
    def takes_back(self, number: int, spot: tuple[int, int], length: int) -> None:
        """Some pages that are shared, and what follows them, become private."""
        inode = self.open_inode(number)
        node = self.pair.model.inodes[inode]
        index = self.index(inode, spot)
        if index not in node.shared:
            index = min(node.shared, default=index)
        self.pair.convert(inode, index * PAGE, min(length, node.pages - index) * PAGE, False)

    @precondition(lambda self: self.short)
    @rule(number=numbers, spot=spots, length=lengths, data=st.data(), shared=st.sampled_from((True, True, False)))
    def converts_when_short(
        self, number: int, spot: tuple[int, int], length: int, data: st.DataObject, shared: bool
    ) -> None:
        """A conversion of pages that the guest has used, with too little memory."""
        found = self.page_of(self.pair.model.slots, number, spot)
        if found is None:
            return
        slot, gfn = found
        self.pair.guest_fault(slot.owner, gfn * PAGE)
        self.pair.limit_frames(data.draw(self.shortages))
        self.pair.convert(slot.inode, slot.file_page(gfn) * PAGE, length * PAGE, shared)
        self.pair.limit_frames(None)

    @precondition(lambda self: self.enabled("pins"))
    @rule(number=numbers, spot=spots, pages=st.sampled_from((1, 1, 2, 3, 512)), pin=st.integers(0, PINS - 1),
          write=st.booleans(), longterm=st.booleans())  # fmt: skip
    def pins(self, number: int, spot: tuple[int, int], pages: int, pin: int, write: bool, longterm: bool) -> None:
        model = self.pair.model
        # Often a page that can be pinned: one that is shared.
        vmas = [vma for vma in model.vmas if not model.inodes[vma.inode].shared.isdisjoint(vma.file)]
        found = self.page_of(vmas, number, spot)
        if found is not None and pin not in model.pins:
            vma, page = found
            shared = model.inodes[vma.inode].shared
            if vma.file_page(page) not in shared and number % 4:
                page = next(page for page in vma.pages if vma.file_page(page) in shared)
            self.pair.pin(vma.owner, page * PAGE, pages * PAGE, pin, write, longterm)

    @precondition(lambda self: self.enabled("pins") and len(self.pair.model.pins) < PINS)
    @rule(number=numbers, spot=spots, close=some, later=some, all_of_it=st.booleans(), shared=st.booleans())
    def converts_what_is_pinned(
        self, number: int, spot: tuple[int, int], close: bool, later: bool, all_of_it: bool, shared: bool
    ) -> None:
        """A pinned page refuses to become private; its inode may go before it is unpinned."""
        model = self.pair.model
        found = self.page_of(model.vmas, number, spot)
        if found is None or found[0].file_page(found[1]) >= model.inodes[found[0].inode].pages:
            return
        vma, page = found
        offset = vma.file_page(page) * PAGE
        pin = next(pin for pin in range(PINS) if pin not in model.pins)
        self.pair.convert(vma.inode, offset, PAGE, True)
        self.pair.pin(vma.owner, page * PAGE, PAGE, pin, not vma.read_only)
        start, length = (0, self.pair.inodes[vma.inode].size) if all_of_it else (offset, PAGE)
        self.pair.convert(vma.inode, start, length, False)
        self.pair.punch_hole(vma.inode, offset - offset % self.page_size, self.page_size)
        if close and len(self.pair.inodes) < INODES:
            self.pair.close(vma.inode)
            self.pair.create_guest_memfd(self.page_size * self.unit, shared)
        if not later:
            self.pair.unpin(pin)
            self.pair.convert(vma.inode, start, length, False)

    @precondition(lambda self: self.enabled("lru_cache") and self.pair.model.memory.lru_cache)
    @rule(number=numbers, spot=spots, length=lengths)
    def drains_before_it_converts(self, number: int, spot: tuple[int, int], length: int) -> None:
        self.shares_and_touches(number, spot, length, True)
        self.takes_back(number, spot, length)
        self.pair.drain_lru()
        self.takes_back(number, spot, length)

    @precondition(lambda self: self.enabled("pins") and self.operations % 8 == 0)
    @rule(pin=st.integers(0, PINS), space=st.integers(0, 1))
    def pins_nothing(self, pin: int, space: int) -> None:
        """A pin's number out of range or in use, an address without a mapping, no length."""
        if pin in self.pair.model.pins or pin == PINS:
            self.pair.pin(space, ADDRESSES[0], PAGE, 256 if pin == PINS else pin, False)
        else:
            self.pair.pin(space, 0x1000_0000, PAGE, pin, False)
            self.pair.pin(space, ADDRESSES[0], pin % 2 * 8, pin, False)

    @precondition(lambda self: self.enabled("pins") and self.pair.model.pins)
    @rule(number=numbers)
    def unpins(self, number: int) -> None:
        pins = sorted(self.pair.model.pins)
        self.pair.unpin(pins[number] if number < len(pins) else number % (PINS + 1))

    @precondition(lambda self: self.enabled("lru_cache") and self.pair.model.memory.batch)
    @rule()
    def drains(self) -> None:
        self.pair.drain_lru()

    # ------------------------------------------------------------------ devices

    @precondition(lambda self: self.way)
    @rule(number=numbers, spot=spots, pages=st.sampled_from((1, 2, 3, 512)), area=st.integers(0, AREAS - 1),
          write=st.booleans(), share=st.booleans())  # fmt: skip
    def devices_map(self, number: int, spot: tuple[int, int], pages: int, area: int, write: bool, share: bool) -> None:
        """VFIO: memory of a process, often shared before."""
        found = self.page_of(self.pair.model.vmas, number, spot)
        if found is None:
            return
        vma, page = found
        if share:
            self.pair.convert(vma.inode, vma.file_page(page) * PAGE, pages * PAGE, True)
        self.pair.map_for_device(area, vma.owner, page * PAGE, pages * PAGE, write and not vma.read_only)

    @precondition(lambda self: self.way)
    @rule(area=st.integers(0, AREAS - 1), then=st.booleans(), number=numbers, spot=spots, length=lengths)
    def devices_unmap(self, area: int, then: bool, number: int, spot: tuple[int, int], length: int) -> None:
        self.pair.unmap_for_device(area)
        if then:
            self.takes_back(number, spot, length)

    @precondition(lambda self: self.way)
    @rule(number=numbers, spot=spots, pages=st.sampled_from((1, 3, 512, 1 << 20)), area=st.integers(0, AREAS - 1))
    def devices_map_files(self, number: int, spot: tuple[int, int], pages: int, area: int) -> None:
        """iommufd: pages of a guest_memfd, without references; all of it often."""
        inode = number % len(self.pair.inodes)
        first = self.index(inode, spot) if pages < 1 << 20 else 0
        self.pair.map_file(area, inode, first, min(pages, self.pair.model.inodes[inode].pages - first))

    @precondition(lambda self: self.way and self.pair.areas)
    @rule(area=st.integers(0, AREAS - 1), number=numbers, spot=spots, length=lengths, shared=st.booleans())
    def converts_under_devices(self, area: int, number: int, spot: tuple[int, int], length: int, shared: bool) -> None:
        """A part of what an IOAS maps is converted, or no more mapped."""
        if area not in self.pair.areas:
            return
        _, inode, first, pages = self.pair.areas[area]
        if number % 8 == 0:
            self.pair.unmap_file(area)
            return
        page = first + (spot[0] * 512 + spot[1]) % pages
        self.pair.convert(inode, page * PAGE, min(length, self.pair.model.inodes[inode].pages - page) * PAGE, shared)

    # ------------------------------------------------------------------ memory failure

    def page_in_use(self, number: int, spot: tuple[int, int]) -> int | None:
        """A page of memory that an inode has or had, bad ones often."""
        memory = self.pair.model.memory
        bad = [folio.head + page for folio in memory.in_use.values() for page in sorted(folio.bad)]
        bad += [head + page for head, pages in memory.bad.items() for page in sorted(pages)]
        if bad and number % 4:
            return bad[number % len(bad)]
        inode = self.open_inode(number)
        return self.pair.model.pfn(inode, self.index(inode, spot))

    @precondition(lambda self: self.fails and self.operations > 4)
    @rule(number=numbers, spot=spots, use=st.booleans(), length=lengths, shared=st.booleans())
    def fails_memory(self, number: int, spot: tuple[int, int], use: bool, length: int, shared: bool) -> None:
        """A page goes bad, then host and guest use it, and what is around it is converted."""
        memory = self.pair.model.memory
        if sum(len(folio.bad) for folio in memory.in_use.values()) + sum(map(len, memory.bad.values())) >= 8:
            return
        inode = self.open_inode(number)
        index = self.index(inode, spot)
        if use:
            self.shares_and_touches(number, spot, length, True)
        blocks = sorted(self.pair.model.inodes[inode].blocks)
        if blocks and number % 4:  # often one that is allocated
            index = (blocks[number % len(blocks)] << self.pair.model.order) + index % self.pair.model.block_pages
        self.pair.memory_failure(inode, index * PAGE)
        if use:
            self.host_touches(number, spot, write=True, store=1)
            self.guest_touches(number, spot, None, 1)
            self.pair.convert(inode, index * PAGE, length * PAGE, shared)

    @precondition(lambda self: self.fails)
    @rule(number=numbers, spot=spots, length=lengths, shared=st.booleans(), whole=st.booleans())
    def converts_what_is_bad(self, number: int, spot: tuple[int, int], length: int, shared: bool, whole: bool) -> None:
        bad = [folio for folio in self.pair.model.memory.in_use.values() if folio.bad and folio.cached]
        if bad:
            inode, block = bad[number % len(bad)].place
            start = block * self.page_size if whole else self.index(inode, spot) * PAGE
            self.pair.convert(inode, start, self.page_size if whole else length * PAGE, shared)

    @precondition(lambda self: self.fails)
    @rule(number=numbers, spot=spots, hole=st.booleans())
    def unpoisons(self, number: int, spot: tuple[int, int], hole: bool) -> None:
        pfn = self.page_in_use(number, spot)
        if hole and pfn is not None:
            folio = self.pair.model.memory.folio_of(pfn)
            if folio is not None and folio.cached:
                inode, block = folio.place
                self.pair.punch_hole(inode, block * self.page_size, self.page_size)
        if pfn is not None:
            self.pair.unpoison(pfn)

    # ------------------------------------------------------------------ what KVM itself maps

    def mappable(self, number: int, spot: tuple[int, int]) -> tuple[int, int] | None:
        """A VM and a guest address, often of a page that is shared and that its process maps."""
        model = self.pair.model
        placed = [slot for slot in model.slots if slot.place is not None]
        found = self.page_of(placed if number % 4 else model.slots, number, spot)
        if found is None:
            return None
        slot, gfn = found
        if number % 3 and not slot.released:
            self.pair.convert(slot.inode, slot.file_page(gfn) * PAGE, PAGE, True)
        return slot.owner, gfn * PAGE

    @precondition(lambda self: self.enabled("mapped"))
    @rule(number=numbers, spot=spots, mapping=st.integers(0, MAPPINGS), write=st.booleans(), cached=st.booleans(),
          at=st.sampled_from((0, 0, 16, 4090)))  # fmt: skip
    def maps_for_kvm(
        self, number: int, spot: tuple[int, int], mapping: int, write: bool, cached: bool, at: int
    ) -> None:
        found = self.mappable(number, spot)
        if found is None:
            return
        vm, gpa = found
        mapping = 256 if mapping == MAPPINGS and number % 8 == 0 else mapping
        if cached:
            self.pair.refresh(vm, gpa + at, 16, mapping)
        else:
            self.pair.map_page(vm, gpa + at, mapping, write)

    @precondition(lambda self: self.enabled("mapped") and (self.pair.model.mapped or self.operations % 8 == 0))
    @rule(mapping=st.integers(0, MAPPINGS), write=st.booleans(), last=st.booleans())
    def kvm_accesses(self, mapping: int, write: bool, last: bool) -> None:
        self.pair.access(mapping, write)
        if last:
            self.pair.unmap_page(mapping)

    @precondition(lambda self: self.enabled("mapped"))
    @rule(number=numbers, spot=spots, mapping=st.integers(0, MAPPINGS), cached=st.booleans(), hole=some, close=some)
    def converts_what_kvm_maps(
        self, number: int, spot: tuple[int, int], mapping: int, cached: bool, hole: bool, close: bool
    ) -> None:
        """It becomes private, or leaves the inode, while KVM maps it; a cache is looked up again."""
        found = self.mappable(number, spot)
        if found is None:
            return
        vm, gpa = found
        model = self.pair.model
        slot = next(slot for slot in model.slots if slot.owner == vm and gpa // PAGE in slot.pages)
        inode, offset = slot.inode, slot.file_page(gpa // PAGE) * PAGE
        again = self.pair.refresh if cached else None
        if cached:
            self.pair.refresh(vm, gpa, 8, mapping)
        else:
            self.pair.map_page(vm, gpa, mapping, True)
        self.pair.convert(inode, offset, PAGE, False)
        self.pair.access(mapping, True)
        if again:
            again(vm, gpa, 8, mapping)
        if hole:
            self.pair.punch_hole(inode, offset - offset % self.page_size, self.page_size)
        if close and len(self.pair.inodes) < INODES:
            self.pair.close(inode)
            self.pair.create_guest_memfd(self.page_size * self.unit, cached)
        self.pair.access(mapping, False)

    # ------------------------------------------------------------------ lifetime

    def worth_working(self) -> bool:
        """Whether the worker has something to do; now and then it has not."""
        pending = any(folio.waits or folio.ready for folio in self.pair.model.memory.in_use.values())
        return self.enabled("work") and (pending or self.operations % 10 == 0)

    @precondition(worth_working)
    @rule()
    def works(self) -> None:
        self.pair.work()

    @precondition(lambda self: self.operations > 8)
    @rule(number=numbers, shared=st.booleans(), pages=st.integers(1, 2), spot=spots, later=st.booleans())
    def closes_what_is_held(self, number: int, shared: bool, pages: int, spot: tuple[int, int], later: bool) -> None:
        """The inode goes, a reference to one of its pages stays; another inode takes what is free."""
        sizes = sum(-(-memfd.size // (self.page_size * self.unit)) for memfd in self.pair.inodes)
        if len(self.pair.inodes) >= INODES or sizes + pages > 4 * self.pool_pages:
            return  # a machine has no room for the rows of more
        inode = self.open_inode(number)
        self.pair.convert(inode, self.index(inode, spot) * PAGE, PAGE, shared)
        if self.enabled("allocate"):
            self.pair.allocate(inode, 0, self.pair.inodes[inode].size)
        index = self.index(inode, spot)
        held = None
        if self.pair.model.inodes[inode].open and not self.pair.get(inode, index * PAGE).status:
            held = self.pair.model.pfn(inode, index)
        self.pair.close(inode)
        self.pair.create_guest_memfd(pages * self.page_size * self.unit, shared)
        if held is not None and not later:
            self.pair.put(held)
            if self.enabled("work"):
                self.pair.work()

    @precondition(lambda self: self.enabled("release") and self.operations % 2)
    @rule(number=numbers, again=some)
    def releases(self, number: int, again: bool) -> None:
        slots = [slot for slot in self.pair.model.slots if again or not slot.released]
        if slots:
            slot = slots[number % len(slots)]
            self.pair.release(slot.owner, slot.inode)

    @precondition(lambda self: self.enabled("allocate"))
    @rule(number=numbers, spot=spots, length=lengths, whole=st.booleans())
    def allocates(self, number: int, spot: tuple[int, int], length: int, whole: bool) -> None:
        inode = number % len(self.pair.inodes)
        offset = self.index(inode, spot) * PAGE
        if whole:
            offset -= offset % self.page_size
        self.pair.allocate(inode, offset, self.page_size if whole else length * PAGE)

    @precondition(lambda self: self.enabled("nodes") and (self.two_nodes or self.operations % 16 == 0))
    @rule(number=numbers, spot=spots, length=lengths, task=some, mode=st.integers(0, 4), nodes=st.integers(0, 4))
    def sets_policy(self, number: int, spot: tuple[int, int], length: int, task: bool, mode: int, nodes: int) -> None:
        inode = number % len(self.pair.inodes)
        offset = self.index(inode, spot) * PAGE
        if number % 2:
            offset -= offset % self.page_size
            length = self.page_size // PAGE
        self.pair.set_policy(None if task else inode, offset, length * PAGE, mode, nodes)

    # ------------------------------------------------------------------ processes and VMs

    @precondition(lambda self: self.enabled("counted"))
    @rule(number=numbers, space=st.integers(0, 1), address=st.sampled_from(ADDRESSES), spot=spots, length=lengths,
          read_only=some)  # fmt: skip
    def maps_counted(
        self, number: int, space: int, address: int, spot: tuple[int, int], length: int, read_only: bool
    ) -> None:
        """As merged, by entries that folios count, beside VM_PFNMAP ones where the design has them."""
        inode = self.open_inode(number)
        offset = self.index(inode, spot) * PAGE
        self.pair.mmap(space, address, inode, offset, length * PAGE, read_only, counted=True)

    @precondition(lambda self: self.enabled("fork"))
    @rule(number=numbers)
    def forks(self, number: int) -> None:
        model = self.pair.model
        parents = [i for i, space in enumerate(model.spaces) if space.live]
        if len(parents) < SPACES and len(model.vmas) < WINDOWS:
            self.pair.fork(parents[number % len(parents)])

    @precondition(lambda self: self.enabled("fork"))
    @rule(number=numbers)
    def exits(self, number: int) -> None:
        children = [i for i, space in enumerate(self.pair.model.spaces) if i > 1 and space.live]
        if children:
            self.pair.exit(children[number % len(children)])

    @precondition(lambda self: self.enabled("prefault"))
    @rule(number=numbers, spot=spots, length=lengths)
    def prefaults(self, number: int, spot: tuple[int, int], length: int) -> None:
        found = self.page_of(self.pair.model.slots, number, spot)
        if found is not None:
            self.pair.prefault(found[0].owner, found[1] * PAGE, length * PAGE)

    @precondition(lambda self: self.enabled("prefault") and self.operations % 8 == 0)
    @rule(vm=st.integers(0, 1), gpa=st.sampled_from(GPAS))
    def prefaults_anywhere(self, vm: int, gpa: int) -> None:
        self.pair.prefault(vm, gpa + 5 * PAGE, 2 * PAGE)

    @precondition(lambda self: self.enabled("dirty_log") and (self.logs or self.operations % 16 == 0))
    @rule(number=numbers, on=st.booleans())
    def logs_dirty_pages(self, number: int, on: bool) -> None:
        slots = self.pair.model.slots
        if slots:
            slot = slots[number % len(slots)]
            self.pair.log_dirty_pages(slot.owner, slot.pages.start * PAGE, on)

    # ------------------------------------------------------------------ comparing

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.operations += 1
        self.count()
        self.pair.compare_gauges()
        self.pair.check_rules()
        self.shortage = max(self.shortage - 1, 0)
        if not self.shortage:
            self.pair.limit_frames(None)
        if self.operations % CHECK_EVERY == 0:
            self.pair.compare_everything()


class Small(Sequences):
    """Pages of 4K, 2M of them at a time."""

    page_size = PAGE
    pool_pages = 4
    unit = 512

    def parameters(self, draw: Any) -> dict[str, Any]:
        return super().parameters(draw) | {"pool": self.pool_pages * self.unit * PAGE}

    def index(self, inode: int, spot: tuple[int, int]) -> int:
        block, page = spot
        return (block * 512 + page) % (self.pair.inodes[inode].size // PAGE)


class Gigantic(Sequences):
    """1G pages, split to 4K or, with memory enough, to 2M."""

    page_size = W.PAGE_1G
    pool_pages = 3
    frames = st.sampled_from((None, 4200, 8800))
    shortages = st.sampled_from((0, 1, 3, 600, 4100))

    def more_parameters(self, draw: Any, found: dict[str, Any]) -> None:
        found["nodes"] = 1
        pieces = draw(st.booleans())
        if pieces and "split_to" not in self.disabled:
            found |= {"split_to": "2M", "split_form": "jan2026", "merge": "now", "frames": None}
        else:
            found["frames"] = draw(self.frames)


__all__ = ("PAGES_IN_BLOCK", "Gigantic", "Sequences", "Small")
