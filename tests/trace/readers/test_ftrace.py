"""Lines of ftrace, trace-cmd and perf script: every shape, every kind of event, every kind of damage."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, strategies as st

from pgemu.errors import InputError
from pgemu.trace import load
from pgemu.trace.events import IGNORED, LEVELS, OUTCOMES, Input
from pgemu.trace.log import NO_VCPU, Log
from pgemu.trace.readers.ftrace import _Parser, read

pytestmark = pytest.mark.same_with_checks

FAULT = "kvm_page_fault: vcpu 3 rip 0x10 address 0x0000000000084123 error_code 0x100000006"
HEAD = "  CPU 3/KVM-61883   [078] .....     5.250001: "


def parse(text: str) -> Log:
    parser = _Parser("log")
    *whole, last = text.split("\n")
    if whole:
        parser.feed("\n".join(whole) + "\n")
    if last:
        parser.feed(last)
    return parser.finish()


def words(log: Log) -> list[list[int]]:
    return [row[4:9] for row in log.rows.tolist()]


@pytest.mark.parametrize(
    "line",
    [
        "VCPU-0-61883   [078] ..... 72276.115679: " + FAULT,
        "qemu-system-x86-8397    [002] d..1 72276.115679: " + FAULT,
        "           <...>-1946910 [226] ..Zff 72276.115679: " + FAULT,
        " CPU 0/KVM-126     [000] .....  72276.115679000: " + FAULT,
        "a: b-126 (   77) [000] ..... 72276.115679: " + FAULT,
        "      vm-126 (-------) [000] ..... 72276.115679: " + FAULT,
        "      vm-126     [000] 72276.115679: kvm_page_fault:       " + FAULT.partition(" ")[2],
        "      vm  126/127 [000] 72276.115679: kvm:" + FAULT,
    ],
)
def test_shapes_of_a_line(line: str) -> None:
    log = parse(line + "\n" + line + "\n")
    assert log.rows.tolist() == [
        [Input.GUEST_FAULT, 72276115679000, 0, number, 0x84123, 0x100000006, 3, 0, 0, 0] for number in (1, 2)
    ]


@given(
    comm=st.from_regex(r"[!-~]([ -~]{0,13}[!-~])?", fullmatch=True).filter(lambda name: not name.startswith("#")),
    pid=st.integers(0, 4194304),
    flags=st.from_regex(r"[.dDnNpbBX][.A-Za-z0-9#]{3,4}", fullmatch=True),
    micros=st.integers(0, 10**12),
)
def test_any_thread_name_flags_and_time(comm: str, pid: int, flags: str, micros: int) -> None:
    # A name that looks like the columns behind it cannot be told apart.
    assume(re.search(r"[- ]\s*\d+(/\d+)?\s+(\(\s*(\d+|-+)\)\s+)?\[\d+\]\s", comm) is None)
    stamp = f"{micros // 10**6}.{micros % 10**6:06}"
    log = parse(f"{comm:>16}-{pid:<7} [001] {flags} {stamp:>12}: {FAULT}\n")
    assert log.rows[0].tolist()[:5] == [Input.GUEST_FAULT, micros * 1000, 0, 1, 0x84123]


def test_old_form_names_no_vcpu() -> None:
    log = parse("VCPU-0-61883   [078] ..... 72276.115679: kvm_page_fault: address 84d000 error_code 4\n")
    assert words(log) == [[0x84D000, 4, NO_VCPU, 0, 0]]


@pytest.mark.parametrize(
    ("event", "kind", "expected"),
    [
        ("page_fault_user: address=0x7f00 ip=0x1 error_code=0x14", Input.HOST_FAULT, [0x7F00, 0x14]),
        ("exceptions:page_fault_user: address=0x7f00 ip=0x1 error_code=0x14", Input.HOST_FAULT, [0x7F00, 0x14]),
        (
            "kvm_vm_set_mem_attributes: 0x00000000018000 -- 0x0000000001c000 [0x8]",
            Input.ATTRIBUTES,
            [0x18000, 0x1C000, 8],
        ),
        ("kvm_unmap_hva_range: mmu notifier unmap range: 0x007f1000 -- 0x007f2000", Input.UNMAP, [0x7F1000, 0x7F2000]),
        (
            "kvm_memslot: (kvm_set_memory_region+0x0/0x560 [kvm]) slot=65537 flags=0x2 gpa=0xc0000 size=0x0 hva=0x7f",
            Input.MEMSLOT,
            [65537, 2, 0xC0000, 0, 0x7F],
        ),
        ("kvm_memslot: slot=1 flags=3 gpa=0x0 size=0x1000 hva=0x7f", Input.MEMSLOT, [1, 3, 0, 0x1000, 0x7F]),
        ("sys_madvise(start: 0x7f000, len_in: 0x2000, behavior: 4)", Input.MADVISE, [0x7F000, 0x2000, 4]),
        ("sys_enter_madvise: start: 0x7f000, len_in: 0x2000, behavior: 0x18", Input.MADVISE, [0x7F000, 0x2000, 24]),
        ("sys_madvise(start: 7f000, len: 2000, behavior: 9)", Input.MADVISE, [0x7F000, 0x2000, 9]),
        ("sys_munmap(addr: 0x7f000, len: 0x1ff)", Input.MUNMAP, [0x7F000, 0x1FF]),
        (
            "sys_mmap(addr: 0, len: 0x2000, prot: 3, flags: 0x22, fd: 0xffffffff, off: 0)",
            Input.MMAP,
            [0, 0x2000, 0xFFFFFFFF, 0, 0x22 | 3 << 32],
        ),
        ("sys_fallocate(fd: 0xf, mode: 3, offset: 0x400000, len: 0x1000)", Input.FALLOCATE, [15, 3, 0x400000, 0x1000]),
        (
            "hugetlbfs_fallocate: dev 0,17 ino 98636 mode 03 offset 4194304 len 2097152 size 33554432 ret 0",
            Input.HUGETLBFS_FALLOCATE,
            [98636, 3, 4194304, 2097152],
        ),
        (
            "map: IOMMU: iova=0x0000000000100000 - 0x0000000000200000 paddr=0x0000000123400000 size=1048576",
            Input.IOMMU_MAP,
            [0x100000, 0x100000, 0x123400000],
        ),
        ("iommu:map: IOMMU: iova=0x1000 paddr=0x2000 size=4096", Input.IOMMU_MAP, [0x1000, 0x1000, 0x2000]),
        (
            "unmap: IOMMU: iova=0x0000000000100000 - 0x0000000000103000 size=12288 unmapped_size=8192",
            Input.IOMMU_UNMAP,
            [0x100000, 0x2000],
        ),
        ("iommu:unmap: IOMMU: iova=0x1000 size=4096 unmapped_size=4096", Input.IOMMU_UNMAP, [0x1000, 0x1000]),
    ],
)
def test_fields_of_inputs(event: str, kind: Input, expected: list[int]) -> None:
    log = parse(HEAD + event + "\n")
    assert log.rows[0, 0] == kind
    assert words(log)[0] == expected + [0] * (5 - len(expected))


def test_what_iommus_say_beside() -> None:
    """A fault of a device is an outcome; events of other systems that are called map are not known."""
    fault = "io_page_fault: IOMMU:intel-iommu 0000:01:00.0 iova=0x00000000fee00000 flags=0x0001\n"
    log = parse(HEAD + fault + HEAD + "attach_device_to_domain: IOMMU: device=0000:01:00.0\n" + HEAD + "map: x=1\n")
    assert log.outcomes == {"io_page_fault": 1}
    assert log.ignored == {"attach_device_to_domain": 1}
    assert log.unknown == {"map": 1}
    with pytest.raises(InputError, match="malformed map, expected IOMMU: iova=, paddr=, size="):
        parse(HEAD + "map: IOMMU: iova=0x1000 paddr=0x2000\n")


def test_unmap_inside_a_call_is_its_outcome() -> None:
    unmap = "kvm_unmap_hva_range: mmu notifier unmap range: 0x00780000200000 -- 0x00780000201000\n"
    other = HEAD.replace("61883", "61884")
    log = parse(
        HEAD + "sys_fallocate(fd: 5, mode: 3, offset: 0x200000, len: 0x1000)\n" + other + unmap + HEAD + unmap
        + HEAD + "hugetlbfs_fallocate: dev 0,17 ino 9 mode 03 offset 0 len 0 size 0 ret 0\n"
        + HEAD + "sys_fallocate -> 0x0\n" + HEAD + unmap
    )  # fmt: skip
    assert log.inputs == {"sys_fallocate": 1, "kvm_unmap_hva_range": 2}
    assert log.outcomes == {"kvm_unmap_hva_range": 1, "hugetlbfs_fallocate": 1, "sys_fallocate return": 1}
    assert log.rows[0, 8] == 0x780000200000


def test_a_fault_from_user_mode_ends_a_call_whose_return_is_not_traced() -> None:
    unmap = "kvm_unmap_hva_range: mmu notifier unmap range: 0x00780000200000 -- 0x00780000201000\n"
    munmap = HEAD + "sys_munmap(addr: 0x780000200000, len: 0x1000)\n"
    fault = HEAD + "page_fault_user: address=0x7f00 ip=0x1 error_code=0x6\n"
    assert parse(munmap + HEAD + unmap).inputs == {"sys_munmap": 1}
    assert parse(munmap + fault + HEAD + unmap).inputs["kvm_unmap_hva_range"] == 1


@pytest.mark.parametrize("value", ["0xffffffffffffffea", "-22"])
def test_calls_that_fail_are_marked(value: str) -> None:
    madvise = HEAD + "sys_madvise(start: 0x7f000, len_in: 0x2000, behavior: 4)\n"
    log = parse(madvise + HEAD + f"sys_madvise -> {value}\n" + madvise + HEAD + "sys_madvise -> 0x0\n")
    assert log.rows[:, 9].tolist() == [1, 0]


def test_an_mmap_row_holds_the_address_it_returned() -> None:
    log = parse(
        HEAD + "sys_mmap(addr: 0, len: 0x2000, prot: 3, flags: 0x22, fd: 0xffffffff, off: 0)\n"
        + HEAD + "sys_mmap -> 0x7fd5bbce8000\n"
    )  # fmt: skip
    assert log.rows[0, 4] == 0x7FD5BBCE8000


def test_classes_are_counted_by_name() -> None:
    log = parse(
        "# tracer: nop\ncpus=2\nCPU 1 is empty\n\nCPU:1 [LOST 77 EVENTS]\nCPU:0 [LOST EVENTS]\n"
        + "CPU:3 [5 EVENTS DROPPED]\n"
        + HEAD + "kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 4 old_spte 0 new_spte 114\n"
        + HEAD + "kvm_exit: vcpu 0 reason npf\n"
        + HEAD + "sys_madvise(start: 0x7f000, len_in: 0x2000, behavior: 3)\n"
        + HEAD + "sched_switch: prev_comm=a\n"
        + HEAD + "sched:sched_switch: prev_comm=a\n"
        + HEAD + "<stack trace>\n => do_syscall_64\n"
        + HEAD + "sys_brk -> 0x5ec000\n"
    )  # fmt: skip
    assert (log.lost, log.events, len(log.rows)) == (83, 7, 0)
    assert log.outcomes == {"kvm_tdp_mmu_spte_changed": 1, "sys_brk return": 1}
    assert log.ignored == {"kvm_exit": 1, "sys_madvise WILLNEED": 1, "<stack trace>": 1}
    assert log.unknown == {"sched_switch": 2}
    assert log.skipped == {"lines of call chains": 1}


SET = "kvm_mmu_set_spte: gfn {gfn:x} spte 114800ee7 (rwxu) level {level} at 114287000"
CHANGED = "kvm_tdp_mmu_spte_changed: as id 0 gfn {gfn:x} level {level} old_spte 0 new_spte {new:x}"
LEAF, TABLE, REMOVED = 0x114800EE7, 0x114287827, 0x80000000000005A0


@pytest.mark.parametrize(
    ("events", "level"),
    [
        ([SET.format(gfn=0x84, level=1)], 1),
        ([SET.format(gfn=0, level=2)], 2),
        ([SET.format(gfn=0, level=3)], 3),
        ([SET.format(gfn=0x85, level=1)], 0),  # another page
        ([SET.format(gfn=0x200, level=2)], 0),
        ([SET.format(gfn=0, level=4)], 0),  # no leaf has that level
        ([CHANGED.format(gfn=0x84, level=1, new=LEAF & ~0x80)], 1),
        ([CHANGED.format(gfn=0, level=2, new=TABLE), CHANGED.format(gfn=0x84, level=1, new=LEAF)], 1),
        ([CHANGED.format(gfn=0, level=2, new=LEAF)], 2),
        ([CHANGED.format(gfn=0, level=2, new=REMOVED)], 0),
        ([CHANGED.format(gfn=0x84, level=1, new=0)], 0),
        # Both are printed of one leaf.
        ([CHANGED.format(gfn=0, level=2, new=LEAF), SET.format(gfn=0, level=2)], 2),
    ],
)
def test_a_fault_knows_the_level_of_its_leaf(events: list[str], level: int) -> None:
    log = parse("".join(f"{HEAD}{event}\n" for event in [FAULT, *events, "kvm_entry: vcpu 3"]))
    assert words(log) == [[0x84123, 0x100000006, 3, level, 0]]
    assert log.outcomes.total() == len(events)
    assert log.outcomes.keys() <= LEVELS <= OUTCOMES


def test_levels_go_to_the_last_fault_of_their_task() -> None:
    other = HEAD.replace("CPU 3/KVM-61883", "CPU 2/KVM-61882")
    both = [SET.format(gfn=0, level=2), CHANGED.format(gfn=0x84, level=1, new=LEAF)]
    log = parse(
        f"{HEAD}{FAULT}\n{HEAD}{FAULT}\n{other}{FAULT}\n{HEAD}{both[0]}\n{other}{SET.format(gfn=0x84, level=1)}\n"
        f"{HEAD}{both[1]}\nvm-1 [000] ..... 1.000000: {SET.format(gfn=0, level=3)}\n"
    )
    assert [row[3] for row in words(log)] == [0, 2, 1]
    # Once kvm_mmu_set_spte is there, the other event is only counted.
    assert log.outcomes == {"kvm_mmu_set_spte": 3, "kvm_tdp_mmu_spte_changed": 1}


@pytest.mark.parametrize("event", ["kvm_mmu_set_spte: gfn zz", "kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level one"])
def test_an_outcome_that_is_not_understood_is_named(event: str) -> None:
    log = parse(f"{HEAD}{FAULT}\n{HEAD}{event}\n")
    assert log.outcomes == {f"{event.partition(':')[0]} (not understood)": 1}
    assert words(log)[0][3] == 0


def test_no_name_has_two_classes() -> None:
    assert not OUTCOMES & IGNORED


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("what is this", "text that is no log's: 'what is this'"),
        ("vm-126 [000] ..... 12.34567: kvm_exit: x", "malformed line"),
        ("vm-126 ..... 12.345678: kvm_exit: x", "malformed line"),
        (HEAD + "kvm_page_fault: vcpu 0 rip 0x0 address 0xZZ error_code 0x6", "malformed kvm_page_fault, expected"),
        (HEAD + "kvm_page_fault: vcpu 0 rip 0x0 addr", "malformed kvm_page_fault"),
        (HEAD + "kvm_page_fault: vcpu 0 rip 0x0 address 0x12345678123456780 error_code 0x6", "malformed kvm_page"),
        (HEAD + "page_fault_user: address=0x7f00 ip=0x1", "malformed page_fault_user"),
        (HEAD + "sys_madvise(start: 0x7f000, len_in:", "malformed sys_madvise"),
        (HEAD + "sys_madvise -> soon", "malformed return"),
        (HEAD + "kvm_memslot: slot=one", "malformed kvm_memslot"),
        ("caf\udcc3 is \udcff no text", "binary data"),
    ],
)
def test_malformed_lines_name_file_and_line(line: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^log:2: {re.escape(message)}"):
        parse(HEAD + FAULT + "\n" + line + "\n" + HEAD + FAULT + "\n")


@pytest.mark.parametrize(
    "event",
    [
        FAULT,
        "kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 4 old_spte 0 new_spte 114288827",
        "sys_madvise(start: 0x7f000, len_in: 0x2000, behavior: 4)",
        "kvm_mmu_set_spte: gfn 0 spte 114800ee7 (rwxu) level 2 at 114287000",
    ],
)
def test_a_cut_last_line_is_refused_and_a_whole_one_is_not(event: str) -> None:
    before = HEAD + FAULT + "\n"
    assert parse(before + HEAD + event).events == 2
    first_value = event.rstrip("0123456789abcdefx)")  # any cut after it may be a whole, shorter number
    for length in range(len(before) + 3, len(before) + len(HEAD) + len(first_value)):
        with pytest.raises(InputError, match=r"^log:2: "):
            parse((before + HEAD + event)[:length])


def test_line_numbers_go_on_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text((HEAD + FAULT + "\n") * 5000 + "cut\n")
    with pytest.raises(InputError) as caught:
        read(path)
    assert (caught.value.file, caught.value.line) == (str(path), 5001)


def test_a_log_without_events_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("# tracer: nop\n#\n")
    with pytest.raises(InputError, match="no event in it"):
        read(path)


@given(
    blanks=st.text(" \t\v\f\x85\u3000", max_size=6),
    name=st.one_of(st.just("kvm_page_fault:"), st.text("a_:([<\x1b\xe9", min_size=1, max_size=300)),
    blank=st.sampled_from(" \t\v\f\x85\u2003"),
    fields=st.text("abc =:0x\t", max_size=40),
)
def test_an_event_behind_any_blanks_is_read_or_counted(blanks: str, name: str, blank: str, fields: str) -> None:
    """Whatever blank follows a name, it is looked at once; what is no name, however long, is told by its line."""
    try:
        log = parse(f"{HEAD}{FAULT}\n{HEAD}{blanks}{name}{blank}{fields}\n")
    except InputError as error:
        assert "log:2: malformed " in str(error) or "log:2: a number of more" in str(error)  # noqa: PT017
        return
    assert log.events == 2
    assert log.events == sum(map(Counter.total, (log.inputs, log.outcomes, log.ignored, log.unknown)))
    assert all(len(event) <= 128 for event in log.unknown)


@given(st.integers(0, 200_000), st.sampled_from(["sys_mmap -> ", "sys_exit_munmap: ", "kvm_memslot: slot=1 ", "x"]))
def test_a_message_is_short_however_long_the_line(length: int, event: str) -> None:
    try:
        parse(f"{HEAD}{FAULT}\n{HEAD}{event}{'z' * length}\n")
    except InputError as error:
        assert len(str(error)) < 400  # noqa: PT017


def test_a_last_line_that_is_none_and_lacks_its_newline_is_named(tmp_path: Path) -> None:
    """What is wrong is found before the first line is read."""
    path = tmp_path / "cut"
    line = " CPU 1/KVM-127 [119] ...1 2.769275: kvm_entry: vcpu 0"
    path.write_text(f" CPU 1/KVM-127 [119] ...1 1.769275: kvm_entry: vcpu 0\n{'0' * 90}{line}")
    with pytest.raises(InputError, match=r"cut:2: something stands in front of the task's name: '0+'.*\(head -n -1\)"):
        load(path)
