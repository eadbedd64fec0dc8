"""Traces that are not, or not all, of one VM's memory."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pgemu.trace import Lowered, LoweringOptions
from pgemu.trace.lowering import lower
from pgemu.trace.readers.ftrace import _Parser

pytestmark = pytest.mark.same_with_checks

M = 1 << 20
SLOT = "kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x200000 hva=0x7f0000000000"
APIC = 0xFEE00000


def lowered(*events: str, merge: bool = False) -> Lowered:
    """Events of "PROCESS event", all of process 1 where none is said."""
    parser = _Parser("log")
    for event in events:
        process, _, rest = event.partition(" ") if event[0].isdecimal() else ("1", "", event)
        parser.feed(f"vmm-{process}0 ({process:>7}) [000] ..... 1.000000: {rest}\n")
    return lower(parser.finish(), LoweringOptions(page_size=2 * M, vm_processes=("all",) if merge else ()))


def fault(page: int) -> str:
    return f"kvm_page_fault: vcpu 0 rip 0x0 address {page << 12:#x} error_code 0x100000006"


def attributes(first: int, end: int) -> str:
    return f"kvm_vm_set_mem_attributes: {first:#x} -- {end:#x} [0x8]"


def host(address: int) -> str:
    return f"page_fault_user: address={address:#x} ip=0x1 error_code=0x6"


def unmap(address: int) -> str:
    return f"kvm_unmap_hva_range: mmu notifier unmap range: {address:#x} -- {address + 4096:#x}"


def texts(found: Lowered) -> list[str]:
    return [doubt.text for doubt in found.doubts]


@given(inside=st.integers(0, 5), outside=st.integers(0, 5), apic=st.integers(0, 9), slots=st.booleans())
def test_guest_faults_of_which_most_are_left_out(inside: int, outside: int, apic: int, slots: bool) -> None:
    """An access to a device is none of memory: it does not count on either side."""
    events = [*[fault(1)] * inside, *[fault(0x900)] * outside, *[fault(APIC >> 12)] * apic]
    found = lowered(*[SLOT] * slots, attributes(0, 1), *events)
    counts = "none" if not inside else f"only {inside}"
    said = f"{counts} of {inside + outside} guest faults {'is' if inside == 1 else 'are'} of this memory"
    assert texts(found) == ([said] if slots and outside > inside else [])


def test_host_addresses_are_in_doubt_only_where_no_slot_line_tells() -> None:
    elsewhere = [host(0x5000), host(0x6000), unmap(0x7000)]
    assert texts(lowered(SLOT, fault(1), *elsewhere)) == []
    known = "known to be of this memory: there is no slot line"
    assert texts(lowered(fault(1), *elsewhere)) == [
        f"none of 2 host faults are {known}",
        f"none of 1 unmaps and holes are {known}",
    ]


def test_conversions_outside_of_every_slot() -> None:
    found = lowered(SLOT, attributes(0, 1), attributes(0x900, 0x901), attributes(0x902, 0x903))
    assert texts(found) == ["only 1 of 3 conversions is of this memory"]


_RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6)


@given(st.lists(_RANGES, min_size=1, max_size=4))
def test_pages_of_several_vms_that_are_merged_are_counted(vms: list[list[tuple[int, int]]]) -> None:
    """Ranges of one page are faults, others conversions."""
    events, pages = [], []
    for number, ranges in enumerate(vms, 1):
        pages.append({page for first, size in ranges for page in range(first, first + size)})
        events += [f"{number} {fault(a) if n == 1 else attributes(a, a + n)}" for a, n in ranges]
    shared = sum(sum(page in theirs for theirs in pages) > 1 for page in range(60))
    are = "page is" if shared == 1 else "pages are"
    said = f"{shared} {are} at addresses of several VMs: what these did is laid over each other"
    assert texts(lowered(*events, merge=True)) == ([said] if shared else [])


def test_threads_may_be_of_one_vm() -> None:
    parser = _Parser("log")
    parser.feed("".join(f"vmm-{thread} [000] ..... 1.000000: {fault(page)}\n" for thread in (5, 6) for page in (1, 2)))
    found = lower(parser.finish(), LoweringOptions(page_size=2 * M, vm_processes=("all",)))
    assert texts(found) == ["up to 2 pages are at addresses of several VMs: what these did is laid over each other"]
