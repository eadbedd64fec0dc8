"""Where a log does not say where guest memory lies: what is named, and what recovers it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pgemu.trace import GivenSlot, Lowered, LoweringOptions
from pgemu.trace.lowering import NO_HOST_ADDRESSES, NO_SLOT, NO_SLOT_YET, NOT_GUEST_MEMORY, NOT_STATED, lower
from pgemu.trace.memory_layout import given_layout
from pgemu.trace.readers.ftrace import _Parser
from pgemu.trace.schema import Operation, Records
from pgemu.trace.slot_history import SlotLine, standing_before

pytestmark = pytest.mark.same_with_checks

M, G = 1 << 20, 1 << 30
SIZE, HVA = 16 * M, 0x7F3A_4000_0000
VMM, VCPU = "vmm-10 [000] ..... 1.000000: ", "CPU 0/KVM-11 [000] ..... 1.000000: "


def slot(number: int = 0, gpa: int = 0, size: int = SIZE, hva: int = HVA, flags: int = 0) -> str:
    return f"{VMM}kvm_memslot: slot={number} flags={flags} gpa={gpa:#x} size={size:#x} hva={hva:#x}\n"


def guest(page: int) -> str:
    return f"{VCPU}kvm_page_fault: vcpu 0 rip 0x0 address {page << 12:#x} error_code 0x100000006\n"


def event(kind: str, page: int) -> str:
    """One input of a kind at a page of guest memory."""
    at = HVA + (page << 12)
    if kind == "guest":
        return guest(page)
    if kind == "fault":
        return f"{VMM}page_fault_user: address={at:#x} ip=0x1 error_code=0x6\n"
    if kind == "unmap":
        return f"{VMM}kvm_unmap_hva_range: mmu notifier unmap range: {at:#x} -- {at + 4096:#x}\n"
    name, fields = {
        "madvise": ("madvise", f"start: {at:#x}, len_in: 0x1000, behavior: 4"),
        "munmap": ("munmap", f"addr: {at:#x}, len: 0x1000"),
        "fallocate": ("fallocate", f"fd: 0xf, mode: 0x3, offset: {page << 12:#x}, len: 0x1000"),
    }[kind]
    return f"{VMM}sys_{name}({fields})\n{VMM}sys_{name} -> 0x0\n"


def lowered(text: str, options: LoweringOptions | None = None) -> Lowered:
    parser = _Parser("log")
    parser.feed(text)
    found = lower(parser.finish(), options or LoweringOptions(page_size=2 * M))
    assert found.accounting.balanced()
    return found


def asked(records: Records, without: tuple[Operation, ...] = (Operation.MMAP, Operation.BIND)) -> list[tuple[int, ...]]:
    kept = [op not in without for op in records.op]
    columns = (getattr(records, name)[kept].tolist() for name in ("op", "flags", "address", "offset", "length"))
    return list(zip(*columns, strict=True))


KINDS = ("guest", "fault", "unmap", "madvise", "munmap", "fallocate")
INPUTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, SIZE // 4096 - 1)), min_size=1, max_size=12)


@given(inputs=INPUTS)
def test_what_a_slot_line_tells_the_option_tells_too(inputs: list[tuple[str, int]]) -> None:
    events = guest(0) + "".join(event(kind, page) for kind, page in inputs)
    by_line = lowered(slot() + events)
    options = LoweringOptions(page_size=2 * M, memslots=(GivenSlot(0, SIZE, None, HVA),))
    by_option = lowered(events, options)
    assert asked(by_line.records) == asked(by_option.records)
    assert by_line.accounting.without_operation == by_option.accounting.without_operation == {}
    assert by_line.layout.regions == by_option.layout.regions
    assert by_option.notes == ()


@given(inputs=INPUTS, given_slot=st.booleans())
def test_host_addresses_that_nobody_tells_are_the_reason_that_is_named(
    inputs: list[tuple[str, int]], given_slot: bool
) -> None:
    """Also invented host addresses are none of the VMM's: nothing is found at them by chance."""
    events = guest(0) + "".join(event(kind, page).replace("0x7f3a4", "0x7f000") for kind, page in inputs)
    slots = (GivenSlot(0, SIZE),) if given_slot else ()
    found = lowered(events, LoweringOptions(page_size=2 * M, memslots=slots))
    by_host = sum(kind != "guest" for kind, _ in inputs)
    reason = NOT_STATED if given_slot else NO_HOST_ADDRESSES
    assert found.accounting.without_operation == +Counter({reason: by_host})
    told = (f"left out: {by_host} {reason}; --memslot GPA:SIZE::HVA, or record kvm_memslot (pgemu compare --help)",)
    assert found.notes == told * (by_host > 0)


def test_where_some_host_memory_is_known_the_rest_is_not_guest_memory() -> None:
    text = slot() + guest(0) + event("fault", SIZE >> 12) + event("fallocate", SIZE >> 12)
    without = lowered(text).accounting.without_operation
    assert without == {NOT_GUEST_MEMORY: 1, "fallocate of another file": 1}


@given(
    given_slots=st.lists(
        st.tuples(st.integers(1, 600), st.none() | st.sampled_from(range(0x7EFF << 32, 0x7F40 << 32, 4 * G))),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_invented_host_addresses_keep_clear_of_stated_ones(given_slots: list[tuple[int, int | None]]) -> None:
    stated = [hva for _, hva in given_slots if hva is not None]
    if len(set(stated)) < len(stated):
        return
    slots = [GivenSlot(number * 8 * G, pages * 2 * M, None, hva) for number, (pages, hva) in enumerate(given_slots)]
    layout = given_layout(slots, (), (), 2 * M)  # which refuses what overlaps
    assert [one.hva for one, wanted in zip(layout.slots, slots, strict=True) if wanted.hva is not None] == stated


# --------------------------------------------------------------------------- slots that a log names late


@given(inputs=INPUTS, at=st.integers(0, 12), flags=st.sampled_from([0, 1]))
def test_a_slot_that_the_guest_used_before_its_line_stood_before(
    inputs: list[tuple[str, int]], at: int, flags: int
) -> None:
    """kvm_handle_noslot_fault(): without a slot there is no memory that a guest could have used."""
    events = [guest(1), *(event(kind, page) for kind, page in inputs)]
    at = min(at + 1, len(events))
    late = "".join([*events[:at], slot(flags=flags), *events[at:]])
    found, first = lowered(late), lowered(slot() + "".join(events))
    assert asked(found.records) == asked(first.records)
    assert found.accounting.without_operation == {"flags of a memory slot": 1}
    assert any("taken to stand before (--early-slots)" in note for note in found.notes)
    absent = lowered(late, LoweringOptions(page_size=2 * M, early_slots="absent"))
    before = sum(kind == "guest" for kind, _ in [("guest", 1), *inputs][:at])
    assert absent.accounting.without_operation[NO_SLOT_YET] == before
    assert not any("--early-slots" in note for note in absent.notes)


def test_what_is_used_before_a_later_line_has_no_slot() -> None:
    """Once slot lines are seen, a slot is there from its own line on."""
    text = slot() + guest(0) + guest(16 << 8) + slot(1, 16 * M, 16 * M, HVA + G) + guest(16 << 8)
    found = lowered(text)
    assert found.accounting.without_operation == {NO_SLOT: 1}
    assert [op for op, *_ in asked(found.records, (Operation.MMAP,))].count(Operation.BIND) == 2


def test_a_slot_that_the_guest_did_not_use_before_begins_at_its_line() -> None:
    text = guest(1) + slot() + slot(1, 16 * M, 16 * M, HVA + G) + guest(16 << 8)
    found = lowered(text)
    assert (found.accounting.setup, found.accounting.operations) == (
        3,
        6,
    )  # two mappings and a slot, a slot, two faults


def line(row: int, number: int, gpa: int, size: int) -> SlotLine:
    return SlotLine(row, number, 0, gpa, size, HVA + gpa)


def test_where_other_slots_were_meanwhile_a_slot_did_not_stand_before() -> None:
    used = np.array([0x1000, 0x5000], np.uint64)
    first, other = line(2, 0, 0, 0x4000), line(4, 1, 0x2000, 0x8000)
    assert standing_before([first, other], used) == [first]
    assert standing_before([line(1, 0, 0, 0), line(3, 0, 0, 0x4000), line(4, 1, 0x4000, 0x4000)], used) == [
        line(4, 1, 0x4000, 0x4000)
    ]
    assert standing_before([line(1, 1, (1 << 64) - 0x1000, 0x1000), first], used) == [first]
    assert standing_before([first], used[:0]) == []
    smm = line(1, 65536, 0, 0x4000)  # address space 1 is another one
    assert standing_before([smm, first], used) == [first]
