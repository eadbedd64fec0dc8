"""Several VMs in one log: told apart by process, chosen, merged only when asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.trace import Lowered, LoweringOptions
from pgemu.trace.lowering import lower
from pgemu.trace.processes import OTHER_PROCESS, Choice
from pgemu.trace.readers.ftrace import _Parser
from pgemu.trace.schema import Operation

pytestmark = pytest.mark.same_with_checks

M = 1 << 20
HOST_UNKNOWN = (
    "left out: 1 not guest memory (no slot line: host addresses unknown); --memslot GPA:SIZE::HVA, or record "
    "kvm_memslot (pgemu compare --help)"
)


def line(tid: int, event: str, process: int | None = None, name: str = "qemu", form: str = "tgid") -> str:
    if form == "perf":
        return f"{name} {process}/{tid} [000] 1.000000: kvm:{event}\n"
    tgid = "-------" if process is None else f"{process:>7}"
    column = "" if form == "plain" else f"({tgid}) "
    return f"{name}-{tid} {column}[000] ..... 1.000000: {event}\n"


def fault(address: int, vcpu: int = 0) -> str:
    return f"kvm_page_fault: vcpu {vcpu} rip 0x0 address {address:#x} error_code 0x100000006"


def host(address: int) -> str:
    return f"page_fault_user: address={address:#x} ip=0x1 error_code=0x6"


def slot(gpa: int, size: int, hva: int) -> str:
    return f"kvm_memslot: slot=0 flags=0 gpa={gpa:#x} size={size:#x} hva={hva:#x}"


def lowered(text: str, *chosen: Choice) -> Lowered:
    parser = _Parser("log")
    parser.feed(text)
    found = lower(parser.finish(), LoweringOptions(page_size=2 * M, vm_processes=chosen))
    assert found.accounting.balanced()
    return found


def addresses(found: Lowered, operation: Operation = Operation.GUEST_FAULT) -> list[int]:
    return [int(address) for address in found.records.address[found.records.op == operation]]


TWO = line(11, fault(0x1000), 10) + line(21, fault(0x40000000), 20, "other") + line(12, fault(0x2000, 1), 10)


def test_two_processes_are_refused_and_named() -> None:
    with pytest.raises(
        InputError,
        match=r"^log: several VMs in it: process 10 \(qemu, 2 inputs\), process 20 \(other, 1 input\): "
        r"choose with --vm-process, which may be repeated, or merge them with --vm-process all$",
    ):
        lowered(TWO)


def test_the_chosen_process_alone_is_read_and_named() -> None:
    found = lowered(TWO, 20)
    assert addresses(found) == [0x40000000]
    assert found.accounting.without_operation == {OTHER_PROCESS: 2}
    assert found.notes == ("the VM of process 20 (other, 1 input)", "left out: process 10 (qemu, 2 inputs)")


def test_merging_is_asked_for_and_said() -> None:
    for chosen in (("all",), (10, 20)):
        assert addresses(lowered(TWO, *chosen)) == [0x1000, 0x40000000, 0x2000]
    assert lowered(TWO, "all").notes == ("merged as asked: process 10 (qemu, 2 inputs), process 20 (other, 1 input)",)
    assert lowered(TWO, 10, 20).notes == ("the VM of process 10 (qemu, 2 inputs), process 20 (other, 1 input)",)


def test_a_process_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^log: --vm-process 30: not in it, expected one of process 10 .*, process 20"
    ):
        lowered(TWO, 30)


def test_other_processes_memory_is_not_the_vm_s() -> None:
    """A process has its own addresses: what another one does at those of guest memory concerns no guest memory."""
    text = line(10, slot(0, 2 * M, 0x7F0000000000), 10) + line(11, fault(0), 10)
    text += line(10, host(0x7F0000000000), 10) + line(30, host(0x7F0000001000), 30, "bash")
    text += line(13, host(0x7F0000002000), None)  # a thread whose process was not known yet
    found = lowered(text)
    assert addresses(found, Operation.HOST_FAULT) == [0x7F0000000000, 0x7F0000002000]
    assert found.accounting.without_operation == {OTHER_PROCESS: 1}
    assert found.notes == ("the VM of process 10 (qemu, 2 inputs)",)


def test_the_same_vcpu_in_two_threads_is_two_vms_where_no_line_names_a_process() -> None:
    text = line(11, fault(0x1000), form="plain") + line(21, fault(0x2000), form="plain")
    with pytest.raises(
        InputError,
        match=r"several VMs in it: thread 11 .*, thread 21 .*; no line names a process .*vCPU 0 faults in 11",
    ):
        lowered(text)
    assert addresses(lowered(text, 21)) == [0x2000]
    assert addresses(lowered(text, 11, 21)) == addresses(lowered(text, "all")) == [0x1000, 0x2000]


def test_threads_of_old_kernels_are_told_by_their_names() -> None:
    old = "kvm_page_fault: address 84d000 error_code 4"
    one = line(11, old, name="CPU 0/KVM", form="plain") + line(12, old, name="CPU 1/KVM", form="plain")
    assert len(addresses(lowered(one))) == 2
    with pytest.raises(InputError, match="several VMs in it: thread 11"):
        lowered(one + line(21, old, name="CPU 0/KVM", form="plain"))


def test_two_vcpus_without_a_process_are_one_vm() -> None:
    text = line(11, fault(0x1000, 0), form="plain") + line(12, fault(0x2000, 1), form="plain")
    found = lowered(text + line(10, host(0x1), form="plain"))
    assert addresses(found) == [0x1000, 0x2000]
    assert found.notes == (HOST_UNKNOWN,)
    assert OTHER_PROCESS not in found.accounting.without_operation


def test_threads_that_nothing_tells_apart_are_taken_for_one_vm_and_that_is_said() -> None:
    old = "kvm_page_fault: address 84d000 error_code 4"
    one, two = line(11, old, form="plain"), line(12, old, form="plain")
    assert lowered(one * 2).notes == ()
    said = "no line names a process or vCPU: 2 threads that fault are taken for one VM (--vm-process)"
    assert lowered(one + two).notes == (said,)
    assert len(addresses(lowered(one + two, 12))) == 1


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["tgid", "perf"]),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 511)), min_size=1, max_size=40),
)
def test_a_chosen_vm_is_what_its_own_lines_alone_say(form: str, steps: list[tuple[int, int, int]]) -> None:
    lines = [
        (vm, line(10 * vm + vcpu, fault(vm << 32 | page << 12, vcpu), 10 * vm, form=form)) for vm, vcpu, page in steps
    ]
    text = "".join(one for _, one in lines)
    vms = sorted({vm for vm, _ in lines})
    if len(vms) > 1:
        with pytest.raises(InputError, match="several VMs in it"):
            lowered(text)
    for vm in vms:
        alone = lowered("".join(one for other, one in lines if other == vm))
        chosen = lowered(text, 10 * vm)
        assert chosen.records.header().tolist() == alone.records.header().tolist()
        assert chosen.records.address.tolist() == alone.records.address.tolist()
        assert chosen.layout == alone.layout
        assert chosen.accounting.without_operation[OTHER_PROCESS] == sum(other != vm for other, _ in lines)


@pytest.mark.parametrize("name", ["ftrace-kvm.txt.xz", "ftrace-kvm-6.12.txt.xz", "ftrace-kvm-ept.txt.xz"])
def test_captures_of_several_vms_are_refused(name: str) -> None:
    from pgemu.trace import load

    with pytest.raises(InputError, match="several VMs in it"):
        load(Path(__file__).parents[1] / "data" / "traces" / name)
