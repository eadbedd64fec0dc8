"""Table pages of real kernels in an image: walking it must give what the kernel itself said in /proc/self/pagemap.

Every page of every checkpoint is compared. Frames of VM_PFNMAP mappings are hidden by pagemap: those are compared
with the captured leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle.capture import FRAME, Capture, Checkpoint, Tree, load
from oracle.rebuilt import Leaves, Rebuilt, expand, shift_of
from oracle.replay_pfnmap import kind_of
from pgemu.images.image import open_image
from pgemu.tables.ranges import MappedRange, Summary, mapped_ranges
from pgemu.tables.walk import Kind, Status, translate, walk
from pgemu_kernels.formats import bits, page_format
from pgemu_kernels.formats.page_format import PageFormat

pytestmark = pytest.mark.same_with_checks

Array = np.ndarray[Any, Any]
U = np.uint64
PRESENT = 1 << 63  # of a pagemap word
PFN = (1 << 55) - 1
PROTECTION_NONE = 1 << 8

# Checkpoints, pages present by pagemap, pages of VM_PFNMAP mappings.
PROCESSES = {
    "oracle/linux-6.1.192-debian": (324, 4_714_632, 7_433_344),
    "oracle/linux-6.12.107-debian": (324, 4_715_064, 5_780_115),
    "oracle/linux-6.18.15-debian": (324, 4_715_089, 5_780_115),
    "oracle/linux-7.3.4-debian-pti": (324, 4_716_385, 5_780_115),
    "oracle/linux-7.3.4-small-ept": (109, 767_233, 0),
    "oracle/linux-7.3.4-small": (324, 4_716_500, 5_780_115),
    "oracle-2/linux-6.12.107-debian": (304, 3_094_233, 1_321_826),
    "oracle-2/linux-7.3.4-small-ept": (95, 1_261_040, 0),
    "oracle-2/linux-7.3.4-small": (304, 3_112_314, 1_321_826),
}
# Trees, pages, pages that lie where the process has them (the others are guest_memfd's).
STAGE2 = {
    "oracle/linux-6.1.192-debian": (84, 2_164_788, 2_164_788),
    "oracle/linux-6.12.107-debian": (84, 4_526_630, 4_526_630),
    "oracle/linux-6.18.15-debian": (83, 4_788_813, 4_788_771),
    "oracle/linux-7.3.4-debian-pti": (84, 4_788_817, 4_788_775),
    "oracle/linux-7.3.4-small-ept": (95, 610_496, 610_374),
    "oracle/linux-7.3.4-small": (99, 4_788_942, 4_788_820),
    "oracle-2/linux-6.12.107-debian": (77, 1_869_049, 1_869_049),
    "oracle-2/linux-7.3.4-small-ept": (81, 832_293, 826_081),
    "oracle-2/linux-7.3.4-small": (85, 1_881_393, 1_875_181),
}
PAGE = 4096
HOST = page_format.x86_64()

HIDDEN = {"/dev/mem", "anon_inode:[vfio-device]", "[vvar_vclock]"}  # VM_PFNMAP mappings
VVAR_HAS_PAGES = "7.3"  # before, [vvar] is a VM_PFNMAP mapping, too


class Pages:
    """Pages and the frames they map to, as runs: uint64 arrays of address, number of pages, first frame; canonical."""

    def __init__(self, address: Array, pages: Array, frame: Array) -> None:
        order = np.argsort(address, kind="stable")
        self.address, self.pages, self.frame = address[order], pages[order], frame[order]
        ends = self.address + self.pages * U(PAGE)
        goes_on = (ends[:-1] == self.address[1:]) & (self.frame[:-1] + self.pages[:-1] == self.frame[1:])
        begins = np.flatnonzero(np.concatenate([[True], ~goes_on])) if address.size else np.zeros(0, np.intp)
        self.pages = np.add.reduceat(self.pages, begins) if begins.size else self.pages
        self.address, self.frame = self.address[begins], self.frame[begins]

    @property
    def total(self) -> int:
        return int(self.pages.sum())

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Pages)
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("address", "pages", "frame"))

    def __hash__(self) -> int:
        raise TypeError

    def clip(self, ranges: Iterable[tuple[int, int]]) -> Pages:
        """What lies in [(start, end)]."""
        ends = self.address + self.pages * U(PAGE)
        found = []
        for start, end in ranges:
            first = np.maximum(self.address, U(start))
            last = np.minimum(ends, U(end))
            inside = first < last
            frame = self.frame + (first - self.address) // U(PAGE)
            found.append((first[inside], (last - first)[inside] // U(PAGE), frame[inside]))
        return Pages(*(np.concatenate(column) for column in zip(*found, strict=True))) if found else NOTHING

    def __add__(self, other: Pages) -> Pages:
        return Pages(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in COLUMNS))


COLUMNS = ("address", "pages", "frame")
NOTHING = Pages(*np.zeros((3, 0), U))


def walked(memory: Any, fmt: PageFormat, root: int, summary: Summary) -> Pages:
    """What the walker finds mapped."""
    rows = np.array(list(mapped_ranges(memory, fmt, root, summary)), U).reshape(-1, len(MappedRange._fields))
    address, length, physical, level, _, _, step = rows.T
    # The same frame again and again: one run per page.
    size = np.where(step == 0, U(1) << level * U(9) + U(3), length)
    times = (length // np.maximum(size, U(1))).astype(np.int64)
    nth = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    size = np.repeat(size, times)
    address = np.repeat(address, times) + nth.astype(U) * size
    return Pages(address, size // U(PAGE), np.repeat(physical, times) // U(PAGE))


def pagemap(checkpoint: Checkpoint) -> Pages:
    """What the kernel says is present. The rows are read here: most of a capture is pagemap."""
    rows = ((va, pages, int(word, 16)) for va, pages, word, _, _ in checkpoint.raw["pagemap"] if len(word) == 18)
    found = [(int(va, 16), pages, word & PFN) for va, pages, word in rows if word & PRESENT]
    return Pages(*np.array(found, U).reshape(-1, 3).T)


def captured(leaves: Leaves) -> Pages:
    """Leaves of a process as captured: present, or protection-none, which has its frame inverted."""
    entry = leaves.entry
    entry = np.where(entry & U(PROTECTION_NONE | 1) == U(PROTECTION_NONE), ~entry | U(1), entry)
    mapped = entry & U(1) != 0
    size = U(1) << shift_of(leaves.level[mapped])
    return Pages(leaves.address[mapped], size >> U(12), (entry[mapped] & U(FRAME) & ~(size - U(1))) >> U(12))


def protection_none(memory: Any, checkpoint: Checkpoint) -> Pages:
    """Pages that the hardware does not find but pagemap calls present; their frames from the entries in the image."""
    found = []
    for run in checkpoint.leaves:
        if run.entry & (PROTECTION_NONE | 1) == PROTECTION_NONE:
            size = PAGE << 9 * (run.level - 1)
            for address, _ in run.entries():
                last = walk(memory, HOST, checkpoint.root, address)[-1]
                assert (last.level, last.kind) == (run.level, Kind.ABSENT)
                found.append((address, size // PAGE, (~last.entry & FRAME & -size) // PAGE))
    return Pages(*np.array(found, U).reshape(-1, 3).T)


def compare_host(memory: Any, capture: Capture, checkpoint: Checkpoint, leaves: Leaves) -> tuple[int, int]:
    """Compare one process; returns pages present by pagemap, and pages of VM_PFNMAP mappings."""
    summary = Summary()
    pages = walked(memory, HOST, checkpoint.root, summary) + protection_none(memory, checkpoint)
    names = HIDDEN if capture.kernel == VVAR_HAS_PAGES else HIDDEN | {"[vvar]"}
    hidden = pages.clip((a.start, a.end) for a in checkpoint.areas if a.name in names)
    shown = pages.clip((a.start, a.end) for a in checkpoint.areas if a.name not in names)
    assert pages.total == hidden.total + shown.total, "a page outside every mapping"
    assert shown == pagemap(checkpoint)
    assert pages == captured(leaves)
    assert hidden.total == checkpoint.check["pages_in_pfnmap_vmas"]
    tables = checkpoint.table_pages
    assert [summary.tables[level] for level in (4, 3, 2, 1)] == [1, tables["pud"], tables["pmd"], tables["pte"]]
    assert not summary.problem_counts
    assert not summary.reserved
    return shown.total, hidden.total


def compare_translations(memory: Any, root: int, expected: Pages) -> None:
    """First and last page of each run, and the pages around it, one by one."""
    first, last = expected.address, expected.address + (expected.pages - U(1)) * U(PAGE)
    addresses = np.concatenate([first, last, first - U(PAGE), last + U(PAGE)]) + U(0x123)
    found = translate(memory, HOST, root, addresses)
    index = (np.searchsorted(first, addresses, side="right") - 1).clip(0)
    inside = addresses - first[index]
    mapped = inside < expected.pages[index] * U(PAGE)
    assert np.array_equal(found.status == Status.MAPPED, mapped)
    assert np.array_equal(found.physical[mapped], (expected.frame[index] * U(PAGE) + inside)[mapped])


def through_a_file(memory: Rebuilt, capture: Capture, checkpoint: Checkpoint, leaves: Leaves, path: Path) -> None:
    """The same from a file, with segments at odd offsets; and with page-table isolation from the user's top table."""
    memory.write_elf(path, offset_in_page=0x9C3)
    with open_image(path) as image:
        compare_host(image, capture, checkpoint, leaves)
        compare_translations(image, checkpoint.root, captured(leaves.where(leaves.entry & U(1) != 0)))
    for address, entry in checkpoint.pti_roots.get("user", {}).items():
        if address < 256:
            assert entry & FRAME == int(memory.words(checkpoint.root + 8 * address, 1)[0]) & FRAME


@pytest.fixture(scope="module")
def capture(path: Path) -> Capture:
    capture = load(path)
    told = all("pagemap" in checkpoint.raw for checkpoint in capture.checkpoints)
    if not told or kind_of(list(capture.checkpoints)).pfnmap:
        pytest.skip("without what pagemap said, which hides guest_memfd that is mapped as VM_PFNMAP")
    return capture


def test_processes(capture: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = hidden = 0
    for checkpoint in capture.checkpoints:
        leaves = expand(checkpoint.leaves)
        memory = Rebuilt(checkpoint.root, 4, checkpoint.tables, leaves)
        pages = compare_host(memory, capture, checkpoint, leaves)
        shown += pages[0]
        hidden += pages[1]
        if checkpoint in (capture.checkpoints[0], capture.checkpoints[-1]):
            through_a_file(memory, capture, checkpoint, leaves, tmp_path / "core")
    with capsys.disabled():
        print(f"\n{capture.name}: {len(capture.checkpoints)} checkpoints, {shown} pages as in pagemap, {hidden} hidden")
    if capture.shipped:
        assert (len(capture.checkpoints), shown, hidden) == PROCESSES[capture.name]


# --------------------------------------------------------------------------- stage 2


def stage2_format(capture: Capture) -> PageFormat:
    if capture.stage2 == "ept":
        return page_format.ept(kernel=capture.kernel, nx_huge_pages=capture.haswell)
    return page_format.npt()


UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def number(word: str) -> int:
    """ "64M", "0x1000+2M"."""
    parts = [(part[:-1], UNITS[part[-1]]) if part[-1] in UNITS else (part, 1) for part in word.split("+")]
    return sum(int(digits, 0) * unit for digits, unit in parts)


def user_slots(checkpoints: Iterable[Checkpoint]) -> dict[tuple[int, int], tuple[int, int, int]]:
    """Memory slots without guest_memfd as operations leave them: (VM, slot) -> GPA, size, HVA."""
    slots: dict[tuple[int, int], tuple[int, int, int]] = {}
    for operation in (operation for checkpoint in checkpoints for operation in checkpoint.ops):
        words = operation.words
        if words[0] in ("slot", "slot2") and operation.result == "0x0":
            vm, slot, gpa, size, hva = (number(word) for word in words[1:6])
            slots.pop((vm, slot), None)
            if size and words[0] == "slot":
                slots[vm, slot] = gpa, size, hva
        elif words[0] == "vmclose":
            slots = {key: where for key, where in slots.items() if key[0] != number(words[1])}
    return slots


def compare_tree(fmt: PageFormat, tree: Tree) -> Pages:
    """Rebuild and walk a stage-2 tree and compare it with its leaves; returns what it maps."""
    leaves = expand(tree.leaves)
    summary = Summary()
    pages = walked(Rebuilt(tree.root, 4, tree.tables, leaves, fmt.empty), fmt, tree.root, summary)
    mapped = leaves.where(leaves.entry & U(bits.MMU_PRESENT) != 0)  # the others are cached MMIO accesses
    size = U(1) << shift_of(mapped.level)
    assert pages == Pages(mapped.address, size >> U(12), (mapped.entry & U(FRAME) & ~(size - U(1))) >> U(12))
    assert sum(summary.tables.values()) == len(tree.tables) + 1
    assert sum(summary.leaves.values()) == mapped.level.size
    assert sum(summary.reserved.values()) == leaves.level.size - mapped.level.size
    assert not summary.problem_counts
    return pages


def behind_slots(pages: Pages, host: Pages, slots: Iterable[tuple[int, int, int]]) -> int:
    """Every page of stage 2 in a slot lies where the process has it: how many there are."""
    compared = 0
    for gpa, size, hva in slots:
        part = pages.clip([(gpa, gpa + size)])
        address = part.address + U(hva - gpa & (1 << 64) - 1)
        # Runs are as long as can be, so one of stage 2 lies within one of the process.
        index = (np.searchsorted(host.address, address, side="right") - 1).clip(0)
        behind = (address - host.address[index]) // U(PAGE)
        assert (behind + part.pages <= host.pages[index]).all()
        assert np.array_equal(part.frame, host.frame[index] + behind)
        compared += part.total
    return compared


def test_stage2(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    fmt = stage2_format(capture)
    totals = [0, 0, 0]  # trees, pages, pages compared with the process
    for checkpoints in capture.scenarios().values():
        for nth, checkpoint in enumerate(checkpoints):
            if not any(vm.trees for vm in checkpoint.stage2):
                continue
            host = captured(expand(checkpoint.leaves))  # as walked: test_processes
            slots = user_slots(checkpoints[: nth + 1])
            for vm in checkpoint.stage2:
                own = [where for (number_, _), where in slots.items() if number_ == vm.number]
                own.append((0, 0x4000, vm.boot_hva))
                for tree in vm.trees:
                    pages = compare_tree(fmt, tree)
                    compared = behind_slots(pages, host, own)
                    totals = [old + new for old, new in zip(totals, (1, pages.total, compared), strict=True)]
    with capsys.disabled():
        print(f"\n{capture.name}: {totals[0]} stage-2 trees, {totals[1]} pages, {totals[2]} as the process has them")
    if capture.shipped:
        assert tuple(totals) == STAGE2[capture.name]
