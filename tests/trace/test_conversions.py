"""What tells private from shared in a log: requests of the guest, and accesses that say which they are."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, strategies as st

from pgemu.trace import Lowered, LoweringOptions
from pgemu.trace.conversions import REFUSED_REQUEST
from pgemu.trace.events import REQUEST
from pgemu.trace.lowering import lower
from pgemu.trace.readers.ftrace import _Parser
from pgemu.trace.schema import Flag, Operation, Records

pytestmark = pytest.mark.same_with_checks

M = 1 << 20
HEAD = "CPU 0/KVM-11 [000] ..... 1.000000: "
ENC, PRIVATE_ACCESS = 1 << 34, 1 << 49
SLOT = "kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x10000000 hva=0x7f0000000000"


def fault(page: int, code: int = 0x100000006) -> str:
    return f"kvm_page_fault: vcpu 0 rip 0x0 address {page << 12:#018x} error_code {code:#x}"


def hypercall(gpa: int, pages: int, attributes: int, number: int = 12) -> str:
    return f"kvm_hypercall: nr {number:#x} a0 {gpa:#x} a1 {pages:#x} a2 {attributes:#x} a3 0x0"


def attributes(gfn: int, pages: int, private: bool) -> str:
    return f"kvm_vm_set_mem_attributes: {gfn:#x} -- {gfn + pages:#x} [{8 * private:#x}]"


def lowered(events: list[str], requests: Literal["done", "ignored"] = "done") -> Lowered:
    parser = _Parser("log")
    parser.feed("".join(f"{HEAD}{event}\n" for event in events))
    found = lower(parser.finish(), LoweringOptions(page_size=2 * M, requests=requests))
    assert found.accounting.balanced()
    return found


def asked(records: Records) -> list[tuple[int, ...]]:
    names = ("op", "flags", "address", "offset", "length")
    return list(zip(*(getattr(records, name).tolist() for name in names), strict=True))


# --------------------------------------------------------------------------- accesses

BITS = st.sampled_from([0, ENC, PRIVATE_ACCESS, ENC | PRIVATE_ACCESS])


@given(accesses=st.lists(st.tuples(st.integers(0, 4095), BITS), min_size=1, max_size=12), slots=st.booleans())
def test_where_one_access_says_private_the_others_say_shared(accesses: list[tuple[int, int]], slots: bool) -> None:
    """KVM takes what is not said to be private for shared (kvm_mmu_do_page_fault()), in a VM that tells."""
    found = lowered([SLOT] * slots + [fault(page, 0x100000006 | bits) for page, bits in accesses])
    flags = [flags for op, flags, *_ in asked(found.records) if op == Operation.GUEST_FAULT]
    tells = any(bits for _, bits in accesses)
    other = int(Flag.SHARED) if tells else 0
    assert flags == [Flag.WRITE | (Flag.PRIVATE if bits else other) for _, bits in accesses]
    assert found.init == ("private" if tells else "shared")
    shared = sum(not bits for _, bits in accesses)
    told = [note for note in found.notes if "no conversion is recorded" in note]
    assert len(told) == (tells and shared > 0)
    for note in told:
        assert note == (
            f"of the accesses {len(accesses) - shared} say private, {shared} say shared, and no conversion is "
            f"recorded: {shared} to memory that is private end with KVM_EXIT_MEMORY_FAULT, -EFAULT (record "
            "kvm:kvm_vm_set_mem_attributes)"
        )


def test_where_conversions_are_recorded_accesses_may_be_of_either_kind() -> None:
    found = lowered([fault(0, ENC), attributes(1, 1, private=False), fault(1)])
    assert [flags for _, flags, *_ in asked(found.records)[-3:]] == [
        Flag.PRIVATE,
        Flag.SHARED,
        Flag.SHARED | Flag.WRITE,
    ]
    assert found.notes == ()


def test_an_access_to_a_device_tells_nothing() -> None:
    found = lowered([fault(0), fault(0xFEE00, 0xE | PRIVATE_ACCESS)])
    assert [flags for _, flags, *_ in asked(found.records)[-1:]] == [Flag.WRITE]


# --------------------------------------------------------------------------- requests

RANGES = st.lists(
    st.tuples(st.integers(0, 4000), st.integers(1, 96), st.booleans(), st.integers(0, 3)), min_size=1, max_size=8
)


@given(ranges=RANGES, slots=st.booleans())
def test_requests_are_the_conversions_of_a_log_that_has_no_others(
    ranges: list[tuple[int, int, bool, int]], slots: bool
) -> None:
    """Bits 3:0 of a2 are the size of pages, bit 4 says encrypted: hypercalls.rst."""
    head = [SLOT] * slots + [fault(0)]
    requests = [hypercall(gfn << 12, pages, size | private << 4) for gfn, pages, private, size in ranges]
    done = [attributes(gfn, pages, private) for gfn, pages, private, _ in ranges]
    found, wanted = lowered(head + requests), lowered(head + done)
    assert asked(found.records) == asked(wanted.records)
    assert (found.layout, found.init, found.converts) == (wanted.layout, "private", True)
    (note,) = found.notes
    assert note.startswith(f"{len(ranges)} conversion")
    assert "taken as done: no kvm_vm_set_mem_attributes says what the VMM did (--requests)" in note
    assert found.accounting.inputs["kvm_hypercall"] == len(ranges)


@given(ranges=RANGES)
def test_requests_beside_conversions_ask_for_nothing(ranges: list[tuple[int, int, bool, int]]) -> None:
    events = [SLOT, fault(0), attributes(1, 1, private=False)]
    requests = [hypercall(gfn << 12, pages, private << 4) for gfn, pages, private, _ in ranges]
    found = lowered(events + requests)
    assert asked(found.records) == asked(lowered(events).records)
    assert (found.notes, found.accounting.ignored) == ((), {REQUEST: len(ranges)})


@given(ranges=RANGES)
def test_requests_are_ignored_where_that_is_asked_for_and_said(ranges: list[tuple[int, int, bool, int]]) -> None:
    requests = [hypercall(gfn << 12, pages, private << 4) for gfn, pages, private, _ in ranges]
    found = lowered([SLOT, fault(0), *requests], "ignored")
    assert asked(found.records) == asked(lowered([SLOT, fault(0)]).records)
    assert (found.init, found.converts, found.accounting.ignored) == ("private", False, {REQUEST: len(ranges)})
    assert found.notes[0].startswith(f"{len(ranges)} request")
    assert "(--requests)" in found.notes[0]


@pytest.mark.parametrize(
    ("gpa", "pages"), [(0x800, 1), (0, 0), (0x1000, (1 << 52) - 1), (0x1000, 1 << 60), ((1 << 64) - 4096, 1)]
)
def test_what_kvm_refuses_is_no_request(gpa: int, pages: int) -> None:
    """____kvm_emulate_hypercall(): -KVM_EINVAL. The last page of 64 bits is one that no guest has."""
    found = lowered([SLOT, fault(0), hypercall(gpa, pages, 16)])
    assert (found.converts, found.accounting.ignored) == (False, {REFUSED_REQUEST: 1})


@given(number=st.integers(0, 1 << 20).filter(lambda number: number != 12))
def test_other_hypercalls_are_counted_alone(number: int) -> None:
    found = lowered([SLOT, fault(0), hypercall(0, 1, 16, number)])
    assert (found.converts, found.accounting.ignored) == (False, {"kvm_hypercall": 1})
