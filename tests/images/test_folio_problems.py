"""Struct pages of a damaged image: what cannot be is named, and nothing in them is counted on for long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from pgemu.cli import main
from pgemu.images.folio import Folio, FolioProblem
from pgemu.images.folio_problems import LARGEST_ORDER, folio_problem
from pgemu.images.image import Image
from pgemu_kernels.formats.page_format import x86_64
from pgemu_kernels.formats.struct_page import RELEASES, page_layout
from trees import Array, Tree, core, write

pytestmark = pytest.mark.same_with_checks

VMEMMAP = 0xFFFF_EA00_0000_0000
UNMAPPED = 0xFFFF_FFFF
HUGETLB = 0xF400_0000
ALL = (1 << 64) - 1
MOST_READS = 3000  # of memory for one struct page: some words, walks, and the tables that map 4096 pages
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `pgemu page` in this process: (exit status, stdout, stderr)."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["page", *map(str, arguments)], prog_name="pgemu")
        return (int(end.value.code or 0), *capsys.readouterr())

    return run_it


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many words each read of an image asks for."""
    found: list[int] = []
    words = Image.words

    def counted(self: Image, address: int, count: int) -> Array:
        found.append(count)
        return words(self, address, count)

    monkeypatch.setattr(Image, "words", counted)
    return found


def second(release: str, order: int, info: int) -> list[int]:
    """A folio's second struct page: _folio_order of 6.1, the low byte of the flags since."""
    words = [0 if release == "6.1" else order, info, 0, 0, 0, 0, UNMAPPED << 32 | UNMAPPED, 0]
    if release == "6.1":
        words[2] = order << 8
    return words


def heads(path: Path, release: str, pages: dict[int, int], kind: int = UNMAPPED) -> Path:
    """An image with a large folio's first two struct pages at each PFN, of an order."""
    layout, tree = page_layout(release), Tree(x86_64())
    for i, (pfn, order) in enumerate(pages.items()):
        frame = tree.memory.add(0x1_0000_0000 + 4096 * i)
        info = ALL << 15 & ALL | 1 if layout.mask_tails else VMEMMAP + 64 * pfn | 1
        at = pfn % 64 * 8
        tree.memory.pages[frame][at : at + 16] = [
            layout.head,
            0,
            0,
            0,
            0,
            0,
            1 << 32 | kind,
            0,
            *second(release, order, info),
        ]
        tree.map(VMEMMAP + 64 * pfn & -4096, frame, 1)
    segments = [(address, words.tobytes(), 4096) for address, words in sorted(tree.memory.pages.items())]
    return write(path, core(segments))


@pytest.mark.parametrize("release", RELEASES)
def test_any_order_is_shown_in_bounded_steps(run: Run, reads: list[int], tmp_path: Path, release: str) -> None:
    """Every order byte, each of a head at a multiple of 1G: 1 to 18 are folios, of others the words are shown."""
    pfns = {order + 1 << 18: order for order in range(256)}
    path = heads(tmp_path / "core", release, pfns)
    status, shown, _ = run(path, *map(hex, pfns), "--kernel", release, "--root", "0x1000000")
    assert status == 1
    assert len(reads) < MOST_READS * len(pfns)
    assert sum(reads) < (1 << 14) * len(pfns)
    for (pfn, order), block in zip(pfns.items(), shown.split("\n\n"), strict=True):
        assert block.startswith(f"PFN {pfn:#x}: head, struct page ")
        *_, last = block.rstrip().splitlines()
        if 1 <= order <= LARGEST_ORDER:
            assert f"\n  folio {pfn:#x}: order {order} (" in block
            assert "problem" not in block
        else:
            assert last == f"  problem: folio {pfn:#x}: order {order}: expected 1 to 18 (1G)"


@given(order=st.integers(0, 255), pfn=st.integers(0, 1 << 30), offset=st.integers(-(1 << 20), 1 << 20))
@example(order=18, pfn=1 << 18, offset=(1 << 18) - 1)
@example(order=18, pfn=1 << 18, offset=1 << 18)
@example(order=9, pfn=512, offset=-1)
@settings(max_examples=300)
def test_a_folio_can_be_where_its_order_fits(order: int, pfn: int, offset: int) -> None:
    fits = 1 <= order <= 18 and pfn % 2**order == 0 and 0 <= offset < 2**order
    assert (folio_problem(pfn + offset, pfn, True, order) is None) == fits
    assert (folio_problem(pfn + offset, pfn, False, 0) is None) == (offset == 0)


@pytest.mark.parametrize(
    ("pfn", "order", "asked", "what"),
    [
        (0x201, 9, 0x201, "order 9: expected a head at a multiple of 0x200"),
        (0x200, 1, 0x202, "order 1: expected the head of a folio that holds PFN 0x202"),
        (0x202, 1, 0x201, "order 1: expected the head of a folio that holds PFN 0x201"),
    ],
)
def test_what_is_no_folio_is_said(run: Run, tmp_path: Path, pfn: int, order: int, asked: int, what: str) -> None:
    layout, tree = page_layout("6.12"), Tree(x86_64())
    frame = tree.memory.add(0x1_0000_0000)
    rows = [[0, VMEMMAP + 64 * pfn | 1, 0, 0, 0, 0, UNMAPPED, 0] for _ in range(64)]
    rows[pfn % 64] = [layout.head, 0, 0, 0, 0, 0, 1 << 32 | UNMAPPED, 0]
    rows[pfn % 64 + 1] = second("6.12", order, VMEMMAP + 64 * pfn | 1)
    tree.memory.pages[frame][:] = [word for row in rows for word in row]
    tree.map(VMEMMAP + 64 * pfn & -4096, frame, 1)
    path = write(tmp_path / "core", core([(at, words.tobytes(), 4096) for at, words in tree.memory.pages.items()]))
    status, shown, _ = run(path, hex(asked), "--kernel", "6.12", "--root", "0x1000000")
    assert status == 1
    assert shown.endswith(f"\n  problem: folio {pfn:#x}: {what}\n")


def test_what_counts_pages_refuses_an_order_that_no_page_has() -> None:
    tree = Tree(x86_64())
    layout = page_layout("6.12")
    frame = tree.memory.add(0x1_0000_0000)
    words = [layout.head, 0, 0, 0, 0, 0, UNMAPPED, 0, *second("6.12", 200, VMEMMAP | 1)]
    tree.memory.pages[frame][:16] = words
    tree.map(VMEMMAP, frame, 1)
    folio = Folio(tree.memory, 0, layout, tree.root)
    assert folio.order == 200
    assert folio.problem == FolioProblem(0, "order 200: expected 1 to 18 (1G)")
    for count in (lambda: folio.vmemmap, lambda: folio.expected_references):
        with pytest.raises(ValueError, match="folio 0x0: order 200: expected 1 to 18"):
            count()


def poisoned(nodes: dict[int, tuple[int, int]], first: int) -> Any:
    """The list of poisoned pages of a 2M HugeTLB folio at PFN 0x200 of 6.12. nodes: offset -> (next, page) of a node
    in a page at 0xffff888000000000."""
    tree, layout = Tree(x86_64()), page_layout("6.12")
    frame, heap = tree.memory.add(0x1_0000_0000), tree.memory.add(0x1_0000_1000)
    info = VMEMMAP + 64 * 0x200 | 1
    rows = [
        [layout.head, 0, 0, 0, 0, 0, 1 << 32 | HUGETLB, 0],
        second("6.12", 9, info),
        [0, info, 0, 0, 0, first, 0, 0],
    ]
    tree.memory.pages[frame][:24] = [word for row in rows for word in row]
    for at, words in nodes.items():
        tree.memory.pages[heap][at // 8 : at // 8 + 2] = words
    tree.map(VMEMMAP + 64 * 0x200, frame, 1)
    tree.map(HEAP, heap, 1)
    return Folio(tree.memory, 0x200, layout, tree.root).poisoned_pages


HEAP = 0xFFFF_8880_0000_0000


def page(pfn: int) -> int:
    return VMEMMAP + 64 * pfn


def test_a_list_of_poisoned_pages_is_followed_to_its_end_or_not_at_all() -> None:
    two = {16: (HEAP + 64, page(0x3FF)), 64: (0, page(0x200))}
    assert poisoned(two, HEAP + 16) == [0x3FF, 0x200]
    assert poisoned(two | {64: (HEAP + 16, page(0x200))}, HEAP + 16) is None  # back to its first
    assert poisoned({16: (HEAP + 16, page(0x201))}, HEAP + 16) is None  # to itself
    assert poisoned(two | {64: (0, page(0x400))}, HEAP + 16) is None  # a page of another folio
    assert poisoned(two | {64: (HEAP + 4096, page(0x200))}, HEAP + 16) is None  # to where nothing is mapped
    assert poisoned(two, 0) == []
