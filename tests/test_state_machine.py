"""Both designs against the dict-based model, by random sequences of operations.

PGEMU_EXAMPLES sets how many sequences of 2M pools are tried (default 400) and makes them random; without
it they are the same at every run.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.inode import Window
from model.model import PAGE
from model.pair import Pair
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config
from pgemu_kernels import words as W

M2 = W.PAGE_2M
# Where a process maps: alone in its 512G, at the end of a 1G region, unaligned, and side by side.
ADDRESSES = (0x7F00_0000_0000, 0x7F00_3FE0_0000, 0x4000_0010_0000, 0x4000_0020_0000, 0x4000_0040_0000)
GPAS = (0, M2, 0x10_0000, 0x3FC0_0000, 0x4000_0000, 0x80_0000_0000)
PAGES_IN_BLOCK = (0, 1, 2, 3, 255, 256, 510, 511)
CHECK_EVERY = 8

numbers = st.integers(0, 7)
spots = st.tuples(st.integers(0, 3), st.sampled_from(PAGES_IN_BLOCK))
lengths = st.sampled_from((1, 1, 1, 2, 4, 256, 512, 513, 1024))
short = st.sampled_from((0, 0, 0, 1, 4095))  # bytes that a length is short of whole pages: munmap, madvise round up


class TwoMegabytes(RuleBasedStateMachine):
    """A small pool of 2M pages under two processes and two VMs."""

    page_size = M2
    pool_pages = 4
    frames = st.sampled_from((None, None, 34, 42, 60))

    @initialize(data=st.data())
    def boot(self, data: st.DataObject) -> None:
        draw = data.draw
        config = Config(
            design=draw(st.sampled_from(DESIGNS)),
            pool=self.pool_pages * self.page_size,
            page_size=self.page_size,
            kernel=draw(st.sampled_from(("7.3", "6.18", "6.12"))),
            stage2=draw(st.sampled_from(("npt", "ept"))),
            hvo=draw(st.sampled_from((True, True, False))),
            zero=draw(st.sampled_from(("folio", "page"))),
            seed=draw(st.integers(0, 2)),
            frames=draw(self.frames),
            zap_filter=draw(st.sampled_from(("both", "target"))),
            notifier=draw(st.booleans()),
            split_form=draw(st.sampled_from(("jan2026", "rfc2"))),
        )
        self.pair = Pair(config)
        self.operations = 0
        for _ in range(2):
            self.pair.create_process()
        self.pair.create_guest_memfd((self.pool_pages - 1) * self.page_size, draw(st.booleans()))
        for space in range(2):
            self.pair.create_vm(space, draw(st.sampled_from(("plain", "sw"))))
        self.pair.bind(0, 0, 0, 0, self.pair.inodes[0].size)
        self.pair.mmap(0, ADDRESSES[0], 0, 0, self.pair.inodes[0].size)

    # ------------------------------------------------------------------ picking

    def open_inode(self, number: int) -> int:
        """One of the inodes, open ones first."""
        inodes = self.pair.model.inodes
        still_open = [i for i, inode in enumerate(inodes) if inode.open] or [len(inodes) - 1]
        return still_open[number % len(still_open)]

    def index(self, inode: int, spot: tuple[int, int]) -> int:
        """Page of an inode: a block and a page in it."""
        block_pages = self.page_size // PAGE
        pages = self.pair.inodes[inode].size // PAGE
        block, page = spot
        return (block * block_pages + page * block_pages // 512 + page % 2) % pages

    def page_of(self, windows: list[Window], number: int, spot: tuple[int, int]) -> tuple[Window, int] | None:
        """A window and a page of it."""
        if not windows:
            return None
        window = windows[number % len(windows)]
        return window, window.pages.start + self.index(window.inode, spot) % len(window.pages)

    # ------------------------------------------------------------------ rules

    @rule(number=numbers, spot=spots, write=st.booleans(), store=st.integers(0, 255))
    def host_touches(self, number: int, spot: tuple[int, int], write: bool, store: int) -> None:
        found = self.page_of(self.pair.model.vmas, number, spot)
        if found is None:
            return
        vma, page = found
        outcome = self.pair.host_fault(vma.owner, page * PAGE, write)
        if outcome.detail:
            self.access(vma.inode, vma.file_page(page), write, store)

    @rule(number=numbers, spot=spots, kind=st.sampled_from((None, None, True, False)), store=st.integers(0, 255))
    def guest_touches(self, number: int, spot: tuple[int, int], kind: bool | None, store: int) -> None:
        found = self.page_of(self.pair.model.slots, number, spot)
        if found is None:
            return
        slot, gfn = found
        outcome = self.pair.guest_fault(slot.owner, gfn * PAGE, kind)
        if outcome.status in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS):
            self.access(slot.inode, slot.file_page(gfn), store % 2 == 1, store)

    def access(self, inode: int, index: int, write: bool, store: int) -> None:
        """Read the page that was touched, and store to it."""
        self.pair.compare_contents(inode, index)
        if write:
            self.pair.write(inode, index, bytes([store]) * PAGE)

    @rule(space=st.integers(0, 1), address=st.sampled_from(ADDRESSES), gpa=st.sampled_from(GPAS))
    def touches_anywhere(self, space: int, address: int, gpa: int) -> None:
        self.pair.host_fault(space, address + 5 * PAGE)
        self.pair.guest_fault(space, gpa + 5 * PAGE)

    @rule(
        number=numbers, spot=spots, length=lengths, shared=st.booleans(),
        vm=st.sampled_from((None, None, None, None, None, None, 0, 1)),
    )  # fmt: skip
    def converts(self, number: int, spot: tuple[int, int], length: int, shared: bool, vm: int | None) -> None:
        inode = self.open_inode(number)
        self.pair.convert(inode, self.index(inode, spot) * PAGE, length * PAGE, shared, vm)

    @rule(number=numbers, shared=st.booleans())
    def converts_all(self, number: int, shared: bool) -> None:
        inode = self.open_inode(number)
        self.pair.convert(inode, 0, self.pair.inodes[inode].size, shared)

    @rule(number=numbers, spot=spots, length=lengths, whole=st.booleans())
    def punches(self, number: int, spot: tuple[int, int], length: int, whole: bool) -> None:
        inode = self.open_inode(number)
        offset = self.index(inode, spot) * PAGE
        if whole:
            self.pair.punch_hole(inode, offset - offset % self.page_size, self.page_size)
        else:
            self.pair.punch_hole(inode, offset, length * PAGE)

    @rule(
        number=numbers, space=st.integers(0, 1), address=st.sampled_from(ADDRESSES), spot=spots,
        length=lengths, less=short, read_only=st.booleans(),
    )  # fmt: skip
    def maps(
        self, number: int, space: int, address: int, spot: tuple[int, int], length: int, less: int, read_only: bool
    ) -> None:
        inode = self.open_inode(number)
        self.pair.mmap(space, address, inode, self.index(inode, spot) * PAGE, length * PAGE - less, read_only)

    @rule(number=numbers, spot=spots, length=lengths, less=short)
    def unmaps(self, number: int, spot: tuple[int, int], length: int, less: int) -> None:
        found = self.page_of(self.pair.model.vmas, number, spot)
        if found is not None:
            self.pair.munmap(found[0].owner, found[1] * PAGE, length * PAGE - less)

    @rule(number=numbers, spot=spots, length=lengths, less=short, madvise=st.booleans())
    def zaps(self, number: int, spot: tuple[int, int], length: int, less: int, madvise: bool) -> None:
        found = self.page_of(self.pair.model.vmas, number, spot)
        if found is not None:
            self.pair.zap(found[0].owner, found[1] * PAGE, length * PAGE - less, madvise)

    @rule(number=numbers, vm=st.integers(0, 1), gpa=st.sampled_from(GPAS), spot=spots, length=lengths)
    def binds(self, number: int, vm: int, gpa: int, spot: tuple[int, int], length: int) -> None:
        inode = self.open_inode(number)
        self.pair.bind(vm, gpa, inode, self.index(inode, spot) * PAGE, length * PAGE)

    @rule(number=numbers)
    def unbinds(self, number: int) -> None:
        slots = self.pair.model.slots
        if slots:
            slot = slots[number % len(slots)]
            self.pair.unbind(slot.owner, slot.pages.start * PAGE)

    @rule(number=numbers, spot=spots)
    def gets(self, number: int, spot: tuple[int, int]) -> None:
        inode = self.open_inode(number)
        if self.pair.model.inodes[inode].open:
            self.pair.get(inode, self.index(inode, spot) * PAGE)

    @rule(number=numbers)
    def puts(self, number: int) -> None:
        folios = self.pair.model.memory.in_use.values()
        held = [folio.head + unit for folio in folios for unit, count in folio.held.items() if count]
        if held:
            self.pair.put(held[number % len(held)])

    @rule(spot=spots)
    def puts_what_nobody_got(self, spot: tuple[int, int]) -> None:
        pfn = self.pair.model.pfn(0, self.index(0, spot))
        folio = None if pfn is None else self.pair.model.memory.folio_of(pfn)
        if folio is not None and pfn is not None and not folio.held[folio.unit(pfn)]:
            self.pair.put(pfn)

    @precondition(lambda self: self.operations > 12)
    @rule(number=numbers, shared=st.booleans(), pages=st.integers(1, 2))
    def closes_and_opens(self, number: int, shared: bool, pages: int) -> None:
        if len(self.pair.inodes) < 4:
            self.pair.close(self.open_inode(number))
            self.pair.create_guest_memfd(pages * self.page_size, shared)

    # ------------------------------------------------------------------ comparing

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.operations += 1
        self.pair.compare_gauges()
        assert self.pair.machine.broken[0] == 0, self.pair.machine.broken
        if self.operations % CHECK_EVERY == 0:
            self.pair.compare_everything()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare_everything()


class OneGigabyte(TwoMegabytes):
    """The same with two 1G pages: levels 3, 4095 vmemmap pages, -ENOMEM of a restore."""

    page_size = W.PAGE_1G
    pool_pages = 2
    frames = st.sampled_from((None, 4200))


EXAMPLES = os.environ.get("PGEMU_EXAMPLES")
COMMON = settings(
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestTwoMegabytes = TwoMegabytes.TestCase
TestTwoMegabytes.settings = settings(COMMON, max_examples=int(EXAMPLES or 400), stateful_step_count=50)
TestOneGigabyte = OneGigabyte.TestCase
TestOneGigabyte.settings = settings(COMMON, max_examples=max(3, int(EXAMPLES or 400) // 20), stateful_step_count=20)


# --------------------------------------------------------------------------- sequences worth keeping


@pytest.mark.parametrize("design", DESIGNS)
def test_close_takes_what_is_left_of_a_mapping_past_the_end(design: str) -> None:
    """munmap() leaves only pages past the end of the file mapped; they hold no table once the inode goes."""
    pair = booted(design)
    pair.mmap(0, ADDRESSES[0], 0, M2, 2 * M2)
    pair.host_fault(0, ADDRESSES[0] + 511 * PAGE)
    pair.munmap(0, ADDRESSES[0], M2)
    pair.close(0)
    pair.compare_everything()
    assert pair.mmap(0, ADDRESSES[0], 0, 0, M2).status == -W.EBADF


@pytest.mark.parametrize("design", DESIGNS)
def test_bind_looks_at_guest_frames_before_the_file(design: str) -> None:
    pair = booted(design)
    assert pair.bind(0, M2, 0, M2, M2).status == 0
    assert pair.bind(0, M2 + PAGE, 0, M2, M2).status == -W.EEXIST  # both are taken
    assert pair.bind(0, M2 + PAGE, 0, 8 * M2, PAGE).status == -W.EEXIST  # past the end of the file
    assert pair.bind(0, 8 * M2, 0, M2, PAGE).status == -W.EINVAL
    assert pair.bind(0, 8 * M2, 0, 8 * M2, PAGE).status == -W.EINVAL
    assert pair.bind(1, M2 + PAGE, 0, M2, PAGE).status == 0  # another VM may


@pytest.mark.parametrize("design", DESIGNS)
def test_an_access_of_the_wrong_kind_exits_though_a_leaf_is_there(design: str) -> None:
    pair = booted(design)
    pair.bind(0, 0, 0, 0, 2 * M2)
    for private, status in ((None, W.RET_PF_FIXED), (True, -W.EFAULT), (False, W.RET_PF_SPURIOUS)):
        assert pair.guest_fault(0, 5 * PAGE, private).status == status


def booted(design: str) -> Pair:
    """Two shared 2M pages, a process with two VMs."""
    pair = Pair(Config(design, pool=2 * M2, page_size=M2))  # type: ignore[arg-type]
    pair.create_process()
    pair.create_guest_memfd(2 * M2, True)
    for _ in range(2):
        pair.create_vm(0, "sw")
    return pair
