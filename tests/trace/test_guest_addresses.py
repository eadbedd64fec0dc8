"""What the address of a guest fault is: nested guests, shadow paging, a TD's shared bit, pages that are no memory."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.trace import Lowered, LoweringOptions
from pgemu.trace.guest_addresses import APIC, BEYOND, DEVICE, IO_APIC, L2, L2_OR_L1, VIRTUAL
from pgemu.trace.lowering import lower
from pgemu.trace.readers.ftrace import _Parser
from pgemu.trace.schema import Flag, Operation

pytestmark = pytest.mark.same_with_checks

M, G = 1 << 20, 1 << 30
NPT, EPT, PF = 0x100000006, 0x182, 0x6  # codes of writes under NPT and EPT, and of a page fault
HEAD = "CPU 0/KVM-11 [000] ..... 1.000000: "


def fault(address: int, code: int = NPT) -> str:
    return f"kvm_page_fault: vcpu 0 rip 0x0 address {address:#018x} error_code {code:#x}"


def attributes(first: int, end: int, private: bool) -> str:
    return f"kvm_vm_set_mem_attributes: {first >> 12:#x} -- {end >> 12:#x} [{8 * private:#x}]"


def slot(gpa: int, size: int) -> str:
    return f"kvm_memslot: slot=0 flags=0 gpa={gpa:#x} size={size:#x} hva=0x7f0000000000"


def lowered(
    *events: str,
    tdx_shared_bit: Literal["auto", "none", "47", "51"] = "auto",
    fault_address: Literal["auto", "physical", "virtual"] = "auto",
) -> Lowered:
    parser = _Parser("log")
    parser.feed("".join(f"{HEAD}{event}\n" for event in events))
    options = LoweringOptions(page_size=2 * M, tdx_shared_bit=tdx_shared_bit, fault_address=fault_address)
    found = lower(parser.finish(), options)
    assert found.accounting.balanced()
    return found


def faults(found: Lowered) -> list[tuple[int, int]]:
    """Address and flags of the guest faults that are left."""
    kept = found.records.op == Operation.GUEST_FAULT
    return list(zip(found.records.address[kept].tolist(), found.records.flags[kept].tolist(), strict=True))


def left_out(found: Lowered) -> dict[str, int]:
    return dict(found.accounting.without_operation)


# --------------------------------------------------------------------------- a TD's shared bit

W, P, S = int(Flag.WRITE), int(Flag.PRIVATE), int(Flag.SHARED)


@given(
    bit=st.sampled_from([47, 51]),
    pages=st.lists(st.tuples(st.integers(0, 511), st.booleans()), min_size=1, max_size=20),
)
def test_a_shared_bit_is_inferred_taken_out_and_said(bit: int, pages: list[tuple[int, bool]]) -> None:
    base = 4 * G
    events = [attributes(base, base + 2 * M, private=True)]
    events += [fault(base | page << 12 | shared << bit, 0x782) for page, shared in pages]
    found = lowered(*events)
    any_shared = any(shared for _, shared in pages)
    private = 0 if not any_shared else P  # nothing says that it is a TD
    assert faults(found) == [(base | page << 12, W | S if shared else W | private) for page, shared in pages]
    assert [(one.gpa, one.size) for one in found.layout.slots] == [(base, 2 * M)]
    assert (found.machine.get("vm") == "tdx") is any_shared
    assert found.machine["stage2"] == "ept"
    assert len(found.notes) == any_shared  # it converts, so that both kinds may be there
    assert all(note.startswith(f"bit {bit} of the addresses is taken for the TD's shared bit") for note in found.notes)


@given(page=st.integers(0, (1 << 35) - 1))
def test_a_bit_is_no_shared_bit_where_the_address_without_it_is_no_memory(page: int) -> None:
    address = 1 << 47 | page << 12
    near = address ^ 1 << 47 < 2 * G  # the first GiB has memory
    found = lowered(fault(0x1000), fault(address), tdx_shared_bit="auto")
    assert ("vm" in found.machine) is (near and page >> 18 == 0)


def test_the_shared_bit_is_by_option() -> None:
    events = [fault(4 * G), fault(4 * G + 0x1000 | 1 << 47)]
    assert faults(lowered(*events)) == [(4 * G, W | P), (4 * G + 0x1000, W | S)]
    assert faults(lowered(*events, tdx_shared_bit="none")) == [(4 * G, W), (4 * G + 0x1000 | 1 << 47, W)]
    given_bit = lowered(*events, tdx_shared_bit="51")
    assert faults(given_bit) == [(4 * G, W | P), (4 * G + 0x1000 | 1 << 47, W | P)]
    assert given_bit.notes == (
        "bit 51 of the addresses is the TD's shared bit: 0 shared and 2 private accesses (--tdx-shared-bit)",
    )


def test_memory_of_a_td_is_private_at_first_whether_or_not_the_log_converts() -> None:
    assert lowered(fault(4 * G), fault(4 * G | 1 << 47)).init == "private"
    assert lowered(fault(4 * G), fault(4 * G | 1 << 47), tdx_shared_bit="none").init == "shared"


def test_a_shared_fault_finds_the_level_of_its_leaf() -> None:
    leaf = "kvm_mmu_set_spte: gfn 100010 spte 114800ee7 (rwxu) level 2 at 114287000"
    found = lowered(fault(0x100010000), fault(0x800100010000), leaf)
    assert found.fault_levels is not None
    assert found.fault_levels.tolist()[-2:] == [0, 2]


# --------------------------------------------------------------------------- nested guests

ENTER = "kvm_nested_vmenter: rip: 0x0 vmcs: 0x1000 nested_rip: 0x1 event_inj: 0x0 nested_{}=y nested_eptp: 0x1e"
NPT_OFF = "kvm_nested_vmrun: rip: 0x0 vmcb: 0x1 nrip: 0x1 int_ctl: 0x0 event_inj: 0x0 npt: off"
VMEXIT = "kvm_nested_vmexit: vcpu 0 reason EPT_VIOLATION rip 0x1"
INJECT = "kvm_nested_vmexit_inject: reason EPT_VIOLATION"
KVM_ENTRY, KVM_EXIT = "kvm_entry: vcpu 0, rip 0x1", "kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1"


@settings(max_examples=200)
@given(
    way=st.lists(st.sampled_from(["enter", "l1", "l2", "reflect"]), max_size=30),
    recorded=st.sampled_from(["all", "no inject", "no entry", "no exit", "no nested vmexit", "no entry, no exit"]),
    word=st.sampled_from(["ept", "npt"]),
)
def test_faults_of_l2_are_told_from_those_of_l1_whatever_else_is_recorded(
    way: list[str], recorded: str, word: str
) -> None:
    """A vCPU's way through L1 and L2, with what KVM prints on it; events of some kinds are not recorded."""
    events, expected, in_l2 = [fault(0x1000)], [0x1000], False
    for number, step in enumerate(way, 2):
        address = number << 12
        if step == "enter" and not in_l2:
            events += [KVM_EXIT, ENTER.format(word), KVM_ENTRY]
            in_l2 = True
        elif step == "l1" and not in_l2:
            events += [KVM_EXIT, fault(address), KVM_ENTRY]
            expected.append(address)
        elif step == "l2" and in_l2:
            events += [KVM_EXIT, VMEXIT, fault(address), KVM_ENTRY]
        elif step == "reflect" and in_l2:
            events += [KVM_EXIT, VMEXIT, INJECT, KVM_ENTRY]
            in_l2 = False
    missing = {
        "no inject": (INJECT,), "no entry": (KVM_ENTRY,), "no exit": (KVM_EXIT,), "no nested vmexit": (VMEXIT,),
        "no entry, no exit": (KVM_ENTRY, KVM_EXIT),
    }.get(recorded, ())  # fmt: skip
    found = lowered(*(event for event in events if event not in missing))
    assert [address for address, _ in faults(found)] == expected
    # Before the first event that ends L2's time, nothing says that one could be there.
    assert left_out(found).keys() <= (
        {L2} if recorded in ("all", "no inject", "no entry", "no exit") else {L2, L2_OR_L1}
    )


def test_what_does_not_tell_l2_from_l1_is_said() -> None:
    found = lowered(fault(0x1000), ENTER.format("ept"), fault(0x2000), VMEXIT, fault(0x3000))
    assert left_out(found) == {L2_OR_L1: 2}
    assert found.notes == (f"guest faults left out: 2 at an {L2_OR_L1}",)


@pytest.mark.parametrize("enter", [NPT_OFF, ENTER.format("ept").replace("=y", "=n")])
def test_without_tables_of_its_own_l2_has_l1_s_addresses(enter: str) -> None:
    found = lowered(enter, KVM_ENTRY, KVM_EXIT, VMEXIT, fault(0x2000))
    assert faults(found) == [(0x2000, W)]


def test_a_failed_entry_leaves_the_vcpu_in_l1() -> None:
    found = lowered(ENTER.format("ept"), "kvm_nested_vmenter_failed: VM-entry", KVM_ENTRY, KVM_EXIT, fault(0x2000))
    assert faults(found) == [(0x2000, W)]


# --------------------------------------------------------------------------- shadow paging, reach, pages of devices


@given(kernel=st.integers(0xFF << 56, (1 << 64) - 1), user=st.integers(0, (1 << 47) - 1))
def test_addresses_of_shadow_paging_are_virtual(kernel: int, user: int) -> None:
    code = PF
    assert left_out(lowered(fault(kernel, code), fault(user, code), attributes(0, M, private=False))) == {VIRTUAL: 2}
    # A code of nested paging says that the others are physical: that one address is none all the same.
    found = lowered(fault(kernel, code), fault(0x1000), attributes(0, M, private=False))
    assert left_out(found) == {VIRTUAL: 1}
    assert faults(found) == [(0x1000, W)]


def test_what_the_addresses_are_is_by_option() -> None:
    low, high = fault(0x1000, PF), fault(0xFFFF888000000000, PF)
    assert left_out(lowered(low, high, fault_address="physical")) == {BEYOND: 1}
    assert left_out(lowered(low, fault(0x1000), fault_address="virtual")) == {VIRTUAL: 2}
    assert left_out(lowered(low)) == {}


@given(st.integers(0, (1 << 56) - 1))
def test_what_stage_2_does_not_reach_is_left_out(address: int) -> None:
    found = lowered(fault(0x1000), fault(address), tdx_shared_bit="none")
    page = address >> 12
    reason = BEYOND if address >> 48 else {0xFEE00: APIC, 0xFEC00: IO_APIC}.get(page)
    assert left_out(found) == ({reason: 1} if reason else {})


@pytest.mark.parametrize(("page", "reason"), [(0xFEE00, APIC), (0xFEC00, IO_APIC)])
@given(offset=st.integers(0, 4095))
def test_pages_of_interrupt_controllers_are_no_memory_unless_a_slot_has_them(
    page: int, reason: str, offset: int
) -> None:
    address = page << 12 | offset
    found = lowered(fault(4 * G), fault(address))
    assert left_out(found) == {reason: 1}
    assert [(one.gpa, one.size) for one in found.layout.slots] == [(4 * G, 2 * M)]
    assert found.notes == (f"guest faults left out: 1 at the {reason}",)
    assert faults(lowered(slot(0xFE000000, 32 * M), fault(address))) == [(address, W)]
    beside = lowered(fault((page + 1) << 12), fault((page - 1) << 12))
    assert left_out(beside) == {}


def test_each_fault_has_one_reason_and_devices_are_not_said_again() -> None:
    found = lowered(fault(0x1000), fault(0xFEE00000, NPT | 8), fault(0xFEE00000), fault(1 << 50 | 0xFEE00000))
    assert left_out(found) == {DEVICE: 1, APIC: 1, BEYOND: 1}
    assert found.notes == (f"guest faults left out: 1 at an {BEYOND}, 1 at the {APIC}",)


_KINDS = {
    DEVICE: st.integers(0, 0xFFFFF).map(lambda page: fault(page << 12, NPT | 8)),
    BEYOND: st.integers(1 << 48, (1 << 56) - 1).map(fault),
    APIC: st.integers(0xFEE00000, 0xFEE00FFF).map(fault),
    IO_APIC: st.integers(0xFEC00000, 0xFEC00FFF).map(fault),
    VIRTUAL: st.integers(0xFF << 56, (1 << 64) - 1).map(fault),
    L2: st.integers(0, 0xFFFFF).map(lambda page: f"{ENTER.format('ept')}\n{VMEXIT}\n{fault(page << 12)}\n{INJECT}"),
    "": st.integers(0, 0xFFFFF).filter(lambda page: page not in (0xFEC00, 0xFEE00)).map(lambda page: fault(page << 12)),
}  # fmt: skip


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(sorted(_KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), _KINDS[kind])), max_size=30)
)
def test_every_fault_is_kept_or_left_out_for_one_reason_that_is_counted_and_named(drawn: list[tuple[str, str]]) -> None:
    events = [("", fault(0x1000)), *drawn]
    lines = [line for _, text in events for line in text.split("\n")]
    found = lowered(*lines, tdx_shared_bit="none")
    counts = {kind: sum(one == kind for one, _ in events) for kind in _KINDS if kind}
    assert left_out(found) == {kind: count for kind, count in counts.items() if count}
    assert len(faults(found)) == sum(kind == "" for kind, _ in events)
    named = [kind for kind in counts if counts[kind] and kind != DEVICE]
    assert len(found.notes) == bool(named)
    assert all(re.search(rf"\b{counts[kind]} at (an?|the) {re.escape(kind)}", found.notes[0]) for kind in named)


# --------------------------------------------------------------------------- what faults tell of the VM


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([NPT, EPT, PF])), min_size=1, max_size=20))
def test_codes_tell_whose_stage_2_it_is_and_numbers_how_many_vcpus(drawn: list[tuple[int, int]]) -> None:
    """A page fault's code tells nothing, nor do codes of both processors together."""
    events = [fault(0x1000, code).replace("vcpu 0", f"vcpu {vcpu}") for vcpu, code in drawn]
    codes = {code for _, code in drawn} - {PF}
    told = {"stage2": "npt" if codes == {NPT} else "ept"} if len(codes) == 1 else {}
    assert lowered(*events).machine == {**told, "vcpus": len({vcpu for vcpu, _ in drawn})}


def test_a_log_that_names_no_vcpu_tells_of_none() -> None:
    old = "kvm_page_fault: address {:x} error_code {:x}"  # before Linux 6.0
    assert lowered(old.format(0x1000, NPT), old.format(0x2000, PF)).machine == {"stage2": "npt"}
    assert lowered(old.format(0x1000, PF)).machine == {}
    assert lowered(attributes(0, M, True)).machine == {}


def test_more_vcpus_than_a_vm_has_are_no_vcpus() -> None:
    events = [fault(0x1000).replace("vcpu 0", f"vcpu {number}") for number in range(4097)]
    assert lowered(*events[:-1]).machine["vcpus"] == 4096
    assert "vcpus" not in lowered(*events).machine


_EXITS = {"EPT_VIOLATION": "ept", "EPT_MISCONFIG": "ept", "npf": "npt", "HLT": None, "hlt": None, "1": None}


@settings(max_examples=100)
@given(st.lists(st.sampled_from(sorted(_EXITS)), max_size=8), st.sampled_from([NPT, PF]), st.booleans())
def test_the_first_exit_for_the_sake_of_stage_2_says_whose_it_is(reasons: list[str], code: int, nested: bool) -> None:
    """Whatever the codes look like, and also after an L2 guest; every exit is counted."""
    exits = [f"kvm_exit: vcpu 0 reason {reason} rip 0x0 info1 0x0 info2 0x0" for reason in reasons]
    found = lowered(*[VMEXIT, INJECT] * nested, *exits, fault(0x1000, code))
    told = [_EXITS[reason] for reason in reasons if _EXITS[reason]]
    assert found.machine.get("stage2") == (told[0] if told else "npt" if code == NPT else None)
    assert found.accounting.ignored["kvm_exit"] == len(reasons)
