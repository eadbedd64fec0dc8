"""Random small traces: conversions, guest and host faults, holes and slots over four huge pages of 2M."""

from __future__ import annotations

from hypothesis import strategies as st

from comparisons import HVA, INODE, lowered, one, setup
from pgemu.trace import Flag, Lowered, Operation, Records
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K

PAGES = INODE // PAGE_4K
# Pages where something happens: the ends of huge pages and what lies between, so that traces come back to them.
_PAGES = st.sampled_from([0, 1, 7, 511, 512, 513, 1023, 1024, 1300, PAGES - 1])
_BLOCKS = st.integers(0, INODE // PAGE_2M - 1)


def _convert(page: int, count: int, shared: bool) -> list[Records]:
    flag = Flag.SHARED if shared else Flag.PRIVATE
    length = min(count, PAGES - page) * PAGE_4K
    return [one(Operation.CONVERT, flag, offset=page * PAGE_4K, length=length)]


def _convert_block(block: int, shared: bool) -> list[Records]:
    return _convert(block * 512, 512, shared)


def _guest(page: int, write: bool) -> list[Records]:
    return [one(Operation.GUEST_FAULT, Flag.WRITE * write, address=page * PAGE_4K)]


def _host(page: int) -> list[Records]:
    return [one(Operation.HOST_FAULT, Flag.WRITE, address=HVA + page * PAGE_4K)]


def _hole(block: int, small: bool) -> list[Records]:
    return [one(Operation.PUNCH_HOLE, offset=block * PAGE_2M, length=PAGE_4K if small else PAGE_2M)]


def _slot(_: bool) -> list[Records]:
    return [one(Operation.UNBIND, address=0), one(Operation.BIND, address=0, length=INODE)]


_STEP = st.one_of(
    st.builds(_convert, _PAGES, st.sampled_from([1, 3, 512]), st.booleans()),
    st.builds(_convert_block, _BLOCKS, st.booleans()),
    st.builds(_guest, _PAGES, st.booleans()),
    st.builds(_guest, _PAGES, st.booleans()),
    st.builds(_host, _PAGES),
    st.builds(_hole, _BLOCKS, st.booleans()),
    st.builds(_slot, st.booleans()),
)


@st.composite
def traces(draw: st.DrawFn) -> Lowered:
    """A trace that begins private or shared."""
    steps = draw(st.lists(_STEP, min_size=6, max_size=24))
    return lowered(
        [*setup(), *(record for step in steps for record in step)], draw(st.sampled_from(["private", "shared"]))
    )
