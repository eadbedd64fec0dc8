"""Memory slots from QEMU's info mtree: flat views are QEMU's own; trees are, too, and those that hypothesis draws are
compared with a page-by-page rendering."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.trace import LoweringOptions, load
from pgemu.trace.memory_layout import GivenSlot
from pgemu.trace.qemu_mtree import Memory, memory_of
from pgemu.trace.slot_history import ALIASED_SLOT, READ_ONLY_SLOT
from pgemu.trace.source import Source

pytestmark = pytest.mark.same_with_checks

DATA = Path(__file__).parents[1] / "data" / "qemu"
FLAT_HEAD = 'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'


def parse(text: str) -> Memory:
    data = text.encode()
    return memory_of(Source("m.txt", None, io.BytesIO(data[1 << 16 :]), data[: 1 << 16]))


def ranges(memory: Memory) -> list[tuple[int, int]]:
    return [(slot.gpa, slot.gpa + slot.size) for slot in memory.slots]


def refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(text)
    return str(caught.value)


def test_the_flat_view_of_q35() -> None:
    """As the file says: RAM of which parts are shown read-only, and a ROM."""
    found = memory_of(DATA / "mtree-flat-q35.txt")
    parts = [0, 0xC3000, 0xE8000, 0xF0000, 0x100000, 512 << 20]
    assert ranges(found) == list(pairwise(parts))
    assert found.slots[0] == GivenSlot(0, 0xC3000)
    assert found.left_out == {READ_ONLY_SLOT: 1, "device": 6}
    rom = [(one.gpa, one.size) for one in found.others if one.reason == READ_ONLY_SLOT]
    assert rom == [(0xFFFC0000, 0x40000)]


def test_slots_are_those_that_qemu_made_of_it() -> None:
    """The same VM's trace output: what stood at its end, but the ROM."""
    slots = {}
    for line in (DATA / "slots-q35.log").read_text().splitlines():
        if "kvm_set_user_memory" in line:
            words = line.partition("Slot#")[2].split()
            flags, gpa, size = (int(word.partition("=")[2], 16) for word in words[1:4])
            slots[words[0]] = (gpa, gpa + size, flags)
    made = sorted((gpa, end) for gpa, end, flags in slots.values() if gpa < end and not flags & 2)
    assert made == ranges(memory_of(DATA / "mtree-flat-q35.txt"))


def _united(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def test_pc_with_a_hole_below_4g_and_memory_that_was_plugged() -> None:
    wanted = [
        *[(0, 0xA0000), (0xC0000, 3 << 30), (0xFD000000, 0xFE000000), (4 << 30, 6 << 30)],
        *[(6 << 30, (6 << 30) + (128 << 20)), ((6 << 30) + (128 << 20), (6 << 30) + (192 << 20))],
    ]
    assert ranges(memory_of(DATA / "mtree-flat-pc.txt")) == wanted
    assert ranges(memory_of(DATA / "mtree-pc.txt")) == wanted


def test_the_tree_says_what_the_flat_view_says() -> None:
    flat, tree = memory_of(DATA / "mtree-flat-q35.txt"), memory_of(DATA / "mtree-q35.txt")
    assert ranges(tree) == _united(ranges(flat))
    assert tree.others == flat.others


def test_the_flat_view_counts_where_both_stand_in_a_terminal() -> None:
    flat, tree = (DATA / name for name in ("mtree-flat-q35.txt", "mtree-q35.txt"))
    text = f"QEMU 7.2.22 monitor\n(qemu) \x1b[Kinfo mtree\n{tree.read_text()}"
    text += f"\n(qemu) info mtree -f\n{flat.read_text()}"
    assert parse(text.replace("\n", "\r\n")) == memory_of(flat)


def test_kinds_of_memory() -> None:
    found = parse(
        FLAT_HEAD + "  0000000000000000-0000000000000fff (prio 0, ram): a (b) @c KVM\n"
        "  0000000000001000-0000000000001fff (prio 0, nv-ram): n owner:{obj path=/x} KVM\n"
        "  0000000000002000-0000000000002fff (prio 0, ram): no slot\n"
        "  0000000000003000-0000000000003fff (prio 0, romd): flash KVM\n"
        "  0000000000004000-0000000000004fff (prio 0, ramd): bar KVM\n"
        "  0000000000005000-0000000000005fff (prio 0, nv-rom): r KVM\n"
        "  0000000000006000-0000000000006fff (prio 0, new): x KVM\n"
        "  0000000000007000-00000000000073ff (prio 0, ram): small KVM\n"
        "  0000000000007400-00000000000097ff (prio 0, ram): odd KVM\n"
        "  000000000000a000-000000000000bfff (prio 0, ram): odd @0000000000001000 KVM\n"
        "  000000000000c000-000000000000cfff (prio 0, ram): odd @0000000000003000 KVM\n"
        "  0010000000000000-00100000000fffff (prio 0, ram): far KVM\n\n"
        "  0000000000000000-0000000000000fff (prio 0, ram): of no view KVM\n"
    )
    assert ranges(found) == [(0, 0x1000), (0x1000, 0x2000), (0x8000, 0x9000), (0xC000, 0xD000)]
    assert found.left_out == {
        "memory without a slot of KVM": 1, "memory of a ROM device": 1, "memory of a device": 1, READ_ONLY_SLOT: 1,
        "memory of kind new": 1, "less than a page": 1, ALIASED_SLOT: 1,
    }  # fmt: skip


def test_a_view_that_is_longer_than_what_is_read_at_once() -> None:
    lines = [f"  {n << 12:016x}-{(n << 12) + 4095:016x} (prio 0, ram): a{n} KVM\n" for n in range(3000)]
    assert len(parse(FLAT_HEAD + "".join(lines)).slots) == 3000


def test_without_kvm_all_memory_counts() -> None:
    found = parse(FLAT_HEAD + "  0000000000000000-0000000000000fff (prio 0, ram): a\n")
    assert ranges(found) == [(0, 0x1000)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "m.txt: no address space of memory in it, expected what QEMU's monitor prints for info mtree -f"),
        ("FlatView #0\n Root memory region: io\n  0-1 (prio 0, ram): a\n", "m.txt: no address space of memory"),
        (
            FLAT_HEAD + "  0000000000000000-0000000000000fff (prio 0, i/o): a\n",
            "m.txt: no memory in it, found 1 device",
        ),
        (FLAT_HEAD, "m.txt: no memory in it, found nothing"),
        (FLAT_HEAD + "  0000000000000000-0000000000000fff (prio", "m.txt:4: malformed region"),
        (FLAT_HEAD + "  0000000000001000-0000000000000fff (prio 0, ram): a\n", "m.txt:4: region that ends before"),
        (FLAT_HEAD + "  0000000000002000-0000000000000fff (prio 0, ram): a\n", "m.txt:4: region that ends before"),
        (
            "address-space: memory\n  0000000000000000-00000000000fffff (prio 0, i/o): alias a @b 00000000-000fffff\n\n"
            "memory-region: b\n  0000000000000000-00000000000fffff (prio 0, i/o): alias b @b 00000000-000fffff\n",
            "m.txt: regions in regions or aliases of aliases without an end",
        ),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    assert refused(text).startswith(expected)


def test_too_many_regions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgemu.trace.qemu_mtree._MOST", 2)
    text = FLAT_HEAD + "  0000000000000000-0000000000000fff (prio 0, ram): a\n" * 3
    assert refused(text).startswith("m.txt:6: more than 2 regions")


# --------------------------------------------------------------------------- trees


@dataclass
class Node:
    """A region as QEMU has it: page numbers, relative to its parent."""

    start: int
    size: int
    priority: int
    kind: str
    name: str
    disabled: bool = False
    below: list[Node] = field(default_factory=list)


@st.composite
def nodes(draw: st.DrawFn, depth: int = 0) -> Node:
    """Priorities differ within a parent: of equal ones QEMU prints no order."""
    size = draw(st.integers(4, 24))
    kind = draw(st.sampled_from(["ram", "rom", "i/o", "i/o"]))
    node = Node(draw(st.integers(0, 12)), size, 0, kind, "", draw(st.integers(0, 7)) == 0)
    if depth < 2 and kind == "i/o":
        node.below = draw(st.lists(nodes(depth + 1), max_size=3))
        for one, priority in zip(node.below, draw(st.permutations(range(len(node.below)))), strict=True):
            one.priority = priority - 1
    return node


def printed(node: Node, base: int, depth: int) -> str:
    first, last = base + node.start << 12, (base + node.start + node.size << 12) - 1
    disabled = " [disabled]" * node.disabled
    text = f"{'  ' * depth}{first:016x}-{last:016x} (prio {node.priority}, {node.kind}): {node.name}{disabled}\n"
    below = sorted(node.below, key=lambda one: (one.start, -one.priority))
    return text + "".join(printed(one, base + node.start, depth + 1) for one in below)


def seen(node: Node, base: int, page: int) -> Node | None:
    """What the guest sees at a page: the child of the highest priority that has something there, else itself."""
    if node.disabled or not base + node.start <= page < base + node.start + node.size:
        return None
    for one in sorted(node.below, key=lambda one: -one.priority):
        found = seen(one, base + node.start, page)
        if found is not None:
            return found
    return None if node.kind == "i/o" and node.below else node


@settings(max_examples=300)
@given(tops=st.lists(nodes(), min_size=1, max_size=4), first=st.integers(0, 4), move=st.integers(0, 40))
def test_a_tree_is_rendered_as_page_by_page(tops: list[Node], first: int, move: int) -> None:
    """And an alias of it shows a part of it elsewhere."""
    _named(tops, iter(range(1000)))
    root = Node(0, 1 << 20, 0, "i/o", "system", below=tops)
    for priority, one in enumerate(tops):
        one.priority = priority
    start, size = 100 + move, 20
    alias = (
        f"    {start << 12:016x}-{(start + size << 12) - 1:016x} (prio 9, i/o): "
        f"alias part @system {first << 12:016x}-{(first + size << 12) - 1:016x}\n"
    )
    tree = printed(root, 0, 1)
    text = f"address-space: memory\n{tree}{alias}\nmemory-region: system\n{tree}\n"
    wanted = {page: found for page in range(60) if (found := seen(root, 0, page))}
    ram = {page for page, found in wanted.items() if found.kind == "ram"}
    if not ram:
        assert "no memory in it" in refused(text)
        return
    found = parse(text)
    got = {page for low, high in ranges(found) for page in range(low >> 12, high >> 12)}
    assert got == ram  # what the alias shows once more is memory that another slot has
    aliased = {page for one in found.others if one.reason == ALIASED_SLOT for page in _pages(one.gpa, one.size)}
    assert aliased >= {start + page - first for page in ram if first <= page < first + size}
    rom = {page for one in found.others if one.reason == READ_ONLY_SLOT for page in _pages(one.gpa, one.size)}
    assert rom & set(range(60)) == {page for page, one in wanted.items() if one.kind == "rom"}


def _named(found: list[Node], numbers: Iterator[int]) -> None:
    """Give each its own name."""
    for node in found:
        node.name = f"r{next(numbers)}"
        _named(node.below, numbers)


def _pages(gpa: int, size: int) -> range:
    return range(gpa >> 12, gpa + size >> 12)


# --------------------------------------------------------------------------- a log over them


def test_faults_at_what_is_no_slot_are_left_out_by_name(tmp_path: Path) -> None:
    memory = memory_of(DATA / "mtree-flat-q35.txt")
    line = " CPU 0/KVM-9 [000] ..... 1.00000{}: kvm_page_fault: vcpu 0 rip 0x0 address {:#x} error_code 0x100000006\n"
    path = tmp_path / "log"
    path.write_text("".join(line.format(n, a) for n, a in enumerate((0x100000, 0xFED00000, 0xFFFC0000, 0xFFFC1000))))
    options = LoweringOptions(page_size=2 << 20, memslots=memory.slots, other_ranges=memory.others)
    lowered = load(path, options)
    assert lowered.layout.origin == "given"
    assert lowered.accounting.without_operation == {
        "not guest memory: device": 1, f"not guest memory: {READ_ONLY_SLOT}": 2,
    }  # fmt: skip
    assert lowered.accounting.balanced()
    path.write_text(line.format(1, 0x50000000))
    with pytest.raises(InputError, match="guest fault at 0x50000000 lies outside the given memory slots"):
        load(path, options)
