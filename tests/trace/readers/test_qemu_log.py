"""QEMU's trace output. Slots are QEMU's own; conversions and memory faults are written here as its sources print them,
for no real file of them was to be had."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import LoweringOptions, Operation, load
from pgemu.trace.events import Input
from pgemu.trace.guest_addresses import PRIVATE_ACCESS
from pgemu.trace.log import NO_VCPU, Log
from pgemu.trace.lowering import lower
from pgemu.trace.readers import qemu_log
from pgemu.trace.schema import Flag
from pgemu.trace.source import Source, open_source

pytestmark = pytest.mark.same_with_checks

SLOTS = Path(__file__).parents[2] / "data" / "qemu" / "slots-q35.log"
SLOT = "kvm_set_user_memory AddrSpace#0 Slot#0 flags=0x4 gpa=0x0 size=0x40000000 ua=0x7f0000000000 ret=0\n"
SHARE = "kvm_convert_memory start 0x4000000 size 0x1000 private_to_shared\n"
FAULT = "kvm_memory_fault start 0x4000000 size 0x1000 flags 0x0\n"


def parse(text: str) -> Log:
    data = text.encode("utf-8", "surrogateescape")
    return qemu_log.read(Source("log", None, io.BytesIO(), data))


def refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(text)
    return str(caught.value)


def test_slots_as_qemu_prints_them() -> None:
    log = qemu_log.read(open_source(SLOTS))
    lines = SLOTS.read_text().splitlines()
    slots = [line for line in lines if "kvm_set_user_memory" in line]
    assert log.inputs == {"kvm_set_user_memory": len(slots)}
    assert log.ignored == {"kvm_run_exit": 5}
    assert log.events == len(lines)
    assert not log.unknown
    assert not log.skipped
    words = [line.replace("#", "=").split(":")[1].split()[1:] for line in slots]
    told = [[int(word.partition("=")[2], 0) for word in one[:5]] for one in words]
    assert sorted(log.rows[:, 4:9].tolist()) == sorted(told)
    assert set(log.rows[:, 0].tolist()) == {Input.MEMSLOT}
    assert {str(task.tid) for task in log.tasks} == {line.partition("@")[0] for line in lines}
    assert int(log.rows[0, 1]) == 1796065301086245000
    assert np.all(np.diff(log.rows[:, 1].astype(np.int64)) >= 0)


def test_a_slot_of_each_version() -> None:
    """Their fields changed: the slot's number held the address space, guest_memfd came, another tree put it last."""
    fields = "flags=0x4 gpa=0x100000 size=0x2000 ua=0x7f0000000000"
    log = parse(
        f"kvm_set_user_memory Slot#65539 {fields} ret=0\n"
        f"kvm_set_user_memory AddrSpace#1 Slot#3 {fields} ret=0\n"
        f"kvm_set_user_memory AddrSpace#1 Slot#3 {fields} guest_memfd=-1 guest_memfd_offset=0x0 ret=0\n"
        f"kvm_set_user_memory AddrSpace#1 Slot#3 {fields} gmem_fd=7 gmem_fd_offset=0x1000 ret=0\n"
        f"kvm_set_user_memory AddrSpace#1 Slot#3 {fields} ret=0 restricted_fd=8 restricted_offset=0x0\n"
        f"kvm_set_user_memory AddrSpace#0 Slot#3 {fields} ret=-17\n"
    )
    assert log.rows[:, 4:9].tolist() == [[65539, 4, 0x100000, 0x2000, 0x7F0000000000]] * 5
    assert log.ignored == {"kvm_set_user_memory that failed": 1}


def test_rows_of_conversions_and_faults() -> None:
    log = parse(
        "31@7.000002:kvm_memory_fault start 0x4000000 size 0x1000 flags 0x8\n"
        "31@7.000003:kvm_convert_memory start 0x4000000 size 0x3000 shared_to_private\n"
        "32@7.000004:kvm_convert_memory start 0x4001000 size 0x1000 private_to_shared\n"
        "32@7.000005:kvm_memory_fault start 0x4000fff size 0x1000 flags 0x0\n"
    )
    assert log.rows.tolist() == [
        [Input.GUEST_FAULT, 7000002000, 0, 1, 0x4000000, PRIVATE_ACCESS, NO_VCPU, 0, 0, 0],
        [Input.ATTRIBUTES, 7000003000, 0, 2, 0x4000, 0x4003, 8, 0, 0, 0],
        [Input.ATTRIBUTES, 7000004000, 1, 3, 0x4001, 0x4002, 0, 0, 0, 0],
        [Input.GUEST_FAULT, 7000005000, 1, 4, 0x4000FFF, 0, NO_VCPU, 0, 0, 0],
    ]
    assert log.kinds_told
    assert log.notes == ("2 conversions are taken as done: QEMU prints what it is going to ask of KVM",)


@pytest.mark.parametrize(
    ("before", "tid", "name", "time"),
    [
        ("", 0, "qemu", 0),
        ("9@1.000001:", 9, "qemu", 1000001000),
        ("qemu-system-x86_64: warning: memory fault: GPA 0x4000000 is privat", 0, "qemu", 0),
        ("qemu-system-x86_64: warning: memory fault: GPA 0x4000000 9@1.000001:", 9, "qemu", 1000001000),
        ("(12:CPU 0/KVM): ", 12, "CPU 0/KVM", 0),
        ("qemu-system-x86_64: (12:main): ", 12, "main", 0),
        ("1970-01-01T00:00:02.5Z [a b] qemu-kvm: (12:main): ", 12, "main", 2500000000),
        ("1970-13-01T00:00:02.5Z [a b] qemu-kvm: (12:main): ", 12, "main", 0),
        ("\udcff\x1b[0m", 0, "qemu", 0),
    ],
)
def test_what_stands_before_an_event(before: str, tid: int, name: str, time: int) -> None:
    log = parse(before + SHARE)
    assert log.inputs == {"kvm_convert_memory": 1}
    assert log.tasks[0] == (tid, None, name)
    assert int(log.rows[0, 1]) == time
    assert any("no line has a time" in note for note in log.notes) == (time == 0)


def test_several_events_in_a_line_count_each() -> None:
    log = parse(FAULT.strip() + SHARE.strip() + " " + SHARE)
    assert log.inputs == {"kvm_memory_fault": 1, "kvm_convert_memory": 2}
    assert log.events == 3


def test_other_lines_are_counted_by_name() -> None:
    log = parse(
        "qemu-system-x86_64: warning: host does not support it\nqemu-system-x86_64 -trace kvm_convert_memory -m 4G\n"
        "SeaBIOS (version 1.16)\n\n  indented text\n"
        "kvm_run_exit cpu_index 0, reason 39\n7@1.000001:kvm_ioctl type 0xae03, arg 0x1\n"
        "7@1.000002:vfio_dma_map 0x1\nkvm_new_event a 1\n(7:main): virtio_notify vdev 0x1\n"
        "kvm_memory_fault gfn 0x10 size 0x1 operation 1\nkvm_convert_memory start 0x10 size 0x1000 shared_to_private\n"
        "kvm_convert_memory start 0x1000 size 0x0 shared_to_private\n" + SHARE
    )
    assert log.inputs == {"kvm_convert_memory": 1}
    assert log.ignored == {"kvm_run_exit": 1, "kvm_ioctl": 1, "kvm_convert_memory of no whole pages": 2}
    assert log.unknown == {
        "vfio_dma_map": 1,
        "kvm_new_event": 1,
        "virtio_notify": 1,
        "kvm_memory_fault (gfn, operation)": 1,
    }
    assert log.skipped == {"messages of QEMU": 2, "other lines": 2}
    assert log.events == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            SHARE + "kvm_convert_memory start 0x1000 size 0x1000\n",
            "log:2: malformed kvm_convert_memory, expected start",
        ),
        (SHARE + "kvm_convert_memory start 0x1000 si", "if it is cut off: leave it out (head -n -1)"),
        ("kvm_convert_memory start 0x1000 size 0x1000 both\n", "shared_to_private or private_to_shared"),
        ("kvm_convert_memory start 0x" + "1" * 17 + " size 0x1000 shared_to_private\n", "malformed"),
        ("kvm_convert_memory start 0xfffffffffffff000 size 0x2000 shared_to_private\n", "ends beyond 64 bits"),
        ("kvm_memory_fault start 0x1000 size 0x1000 flags 8\n", "expected start, size, flags"),
        (SLOT.replace("ret=0", "ret="), "expected Slot#, flags=, gpa=, size=, ua=, ret="),
        (SLOT.replace("0x40000000", "0xffff900000000000"), "ends beyond 64 bits"),
        ("", "found no event"),
        (
            "7@1.000001:kvm_run_exit cpu_index 0, reason 39\n",
            "no conversion, memory slot or memory fault in it, found 1 ",
        ),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    assert expected in refused(text)


def test_a_last_line_without_a_newline_is_taken() -> None:
    log = parse(FAULT + SHARE.strip())
    assert log.events == 2
    assert log.notes[-1] == "its last line has no newline and is taken to be whole"


def test_threads_that_overtake_each_other() -> None:
    log = parse(f"7@2.000000:{SHARE}8@1.000000:{FAULT}")
    assert log.rows[:, 3].tolist() == [2, 1]
    assert any("its time goes back once, at line 2" in note for note in log.notes)


def test_a_log_runs_as_its_conversions_and_faults(tmp_path: Path) -> None:
    """A shared access to private memory is refused, and one behind the conversion is not."""
    path = tmp_path / "log"
    path.write_text(SLOT + FAULT + SHARE + FAULT)
    lowered = load(path, LoweringOptions(page_size=2 << 20))
    assert lowered.init == "private"
    assert lowered.layout.origin == "trace"
    records = lowered.records
    assert records.op.tolist()[-3:] == [Operation.GUEST_FAULT, Operation.CONVERT, Operation.GUEST_FAULT]
    assert records.flags.tolist()[-3:] == [Flag.SHARED] * 3
    assert lowered.accounting.balanced()


def test_threads_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(f"7@1.000000:{SHARE}8@1.000001:{SHARE}")
    lowered = load(path, LoweringOptions(page_size=2 << 20, vm_processes=(8,)))
    assert (lowered.records.op == Operation.CONVERT).sum() == 1


# --------------------------------------------------------------------------- round trip

HEX = st.integers(0, (1 << 52) - 1)
PAGES = st.integers(0, (1 << 40) - 1)


@st.composite
def event(draw: st.DrawFn) -> tuple[str, list[int]]:
    """An event as QEMU's format prints it, and its row from the kind on, without time, task and line."""
    kind = draw(st.sampled_from(["convert", "fault", "slot"]))
    if kind == "convert":
        first, pages, private = draw(PAGES), draw(st.integers(1, 1 << 30)), draw(st.booleans())
        message = "shared_to_private" if private else "private_to_shared"
        text = f"kvm_convert_memory start {first << 12:#x} size {pages << 12:#x} {message}"
        return text, [Input.ATTRIBUTES, first, first + pages, 8 * private, 0, 0]
    if kind == "fault":
        start, private = draw(HEX), draw(st.booleans())
        text = f"kvm_memory_fault start {start:#x} size 0x1000 flags {8 * private:#x}"
        return text, [Input.GUEST_FAULT, start, PRIVATE_ACCESS * private, NO_VCPU, 0, 0]
    space, slot, flags = draw(st.integers(0, 1)), draw(st.integers(0, 32767)), draw(st.integers(0, 7))
    gpa, size, hva = draw(HEX), draw(HEX), draw(HEX)
    fields = f"flags={flags:#x} gpa={gpa:#x} size={size:#x} ua={hva:#x}"
    memfd = draw(st.sampled_from(["", " guest_memfd=-1 guest_memfd_offset=0x0", " gmem_fd=3 gmem_fd_offset=0x10"]))
    text = f"kvm_set_user_memory AddrSpace#{space} Slot#{slot} {fields}{memfd} ret=0"
    return text, [Input.MEMSLOT, space << 16 | slot, flags, gpa, size, hva]


@given(
    found=st.lists(st.tuples(event(), st.integers(1, 9), st.integers(0, 10**6)), min_size=1, max_size=20),
    noise=st.lists(st.sampled_from(["", "qemu-system-x86_64: warning: x", "kvm_run_exit cpu_index 0, reason 2"])),
    glued=st.sampled_from(["", "warning: memory fault: GPA 0x1000 "]),
)
def test_what_is_printed_comes_back(found: list, noise: list[str], glued: str) -> None:
    found.sort(key=lambda one: one[2])
    lines = [f"{glued}{tid}@{micro // 10**6}.{micro % 10**6:06}:{text}" for (text, _), tid, micro in found]
    log = parse("\n".join([*noise, *lines]) + "\n")
    assert log.rows[:, [0, *range(4, 9)]].tolist() == [row for (_, row), _, _ in found]
    assert log.rows[:, 1].tolist() == [micro * 1000 for _, _, micro in found]
    assert [log.tasks[task].tid for task in log.rows[:, 2].tolist()] == [tid for _, tid, _ in found]
    assert log.rows[:, 3].tolist() == list(range(len(noise) + 1, len(noise) + len(found) + 1))
    exits = sum(one.startswith("kvm_run_exit") for one in noise)
    assert log.ignored == Counter({"kvm_run_exit": exits} if exits else {})
    assert log.events == len(found) + exits


def test_faults_say_their_kind_even_if_all_are_shared() -> None:
    lowered = lower(parse(SLOT + FAULT), LoweringOptions(page_size=2 << 20))
    assert lowered.records.flags.tolist()[-1] == Flag.SHARED
