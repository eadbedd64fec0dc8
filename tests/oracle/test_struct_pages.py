"""Every captured struct page decodes, and every folio reads through the captured vmemmap as the kernel counts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from oracle.capture import Capture, Checkpoint, load
from oracle.rebuilt import Rebuilt, expand
from pgemu.images.folio import Folio
from pgemu.images.struct_page import Page, decode_page
from pgemu_kernels.formats.page_format import x86_64
from pgemu_kernels.formats.struct_page import PageLayout, page_layout

pytestmark = pytest.mark.same_with_checks

Array = np.ndarray[Any, Any]
VMEMMAP = 0xFFFF_EA00_0000_0000
FOLIOS = {"oracle": 55, "oracle-2": 50}  # in the 15 or 14 full checkpoints of a file

# A page of the boot pool's 1G folio was demoted to 2M folios: those after the first one keep the reference counts of 1
# that 7.3's boot allocator left in the shared tail page (FACTS.md), though they are free.
COUNTED_THOUGH_FREE = {
    "oracle/linux-7.3.4-debian-pti": [("one_1g_demoted", 0x140200)],
    "oracle/linux-7.3.4-small": [("one_1g_demoted", 0x140200)],
    "oracle-2/linux-7.3.4-small": [("all_1g_demoted", 0x100200), ("half_freed", 0x100200)],
}
# 6.18 maps the tails of the boot pool's 1G folios read-only in the first 63 of 4095 entries only.
WRITABLE_TAILS = {"6.18": {4032}}


class Sample(NamedTuple):
    """One captured folio: two vmemmap pages as 64 x 8 words, and the frames of its first eight."""

    checkpoint: Checkpoint
    pfn: int
    pages: int
    mapcount: int
    frames: list[int]
    head_page: Array
    tail_page: Array


def samples(checkpoint: Checkpoint) -> Iterator[Sample]:
    mapcounts = {folio["pfn"]: folio["mapcount"] for folio in checkpoint.raw["hugetlb_folios"]}
    for row in checkpoint.raw["struct_pages"]:
        contents = [
            np.frombuffer(bytes.fromhex(row[f"{which}_page_bytes"]), "<u8").reshape(64, 8) for which in ("head", "tail")
        ]
        frames = [int(physical, 16) >> 12 for _, physical in row["vmemmap_pages"]]
        yield Sample(checkpoint, row["pfn"], row["pages"], mapcounts[row["pfn"]], frames, *contents)


class Memory:
    """The captured tables of the vmemmap, and the captured pages of struct pages."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tables = Rebuilt(checkpoint.root, 4, checkpoint.vmemmap_tables, expand(checkpoint.vmemmap_leaves))
        self.frames: dict[int, Array] = {}
        for sample in samples(checkpoint):
            for frame, page in zip(sample.frames, (sample.head_page, sample.tail_page), strict=False):
                assert (self.frames.setdefault(frame, page.reshape(-1)) == page.reshape(-1)).all()

    def words(self, address: int, count: int) -> Array:
        page = self.frames.get(address >> 12)
        if page is None:
            return self.tables.words(address, count)
        return page[address >> 3 & 511 :][:count]

    def holds(self, addresses: Array) -> Array:
        raise NotImplementedError

    load = holds


@pytest.fixture(scope="module")
def capture(path: Path) -> Capture:
    capture = load(path)
    if not any(checkpoint.full for checkpoint in capture.checkpoints):
        pytest.skip("no checkpoint with struct pages")
    return capture


def layout_of(capture: Capture) -> PageLayout:
    numa = "numa_hit" in capture.checkpoints[0].raw["vmstat"]
    return page_layout(capture.kernel, "debian" if numa else "small")


def full(capture: Capture) -> list[Checkpoint]:
    """Checkpoints with struct pages."""
    return [checkpoint for checkpoint in capture.checkpoints if checkpoint.full]


def expected_folios(capture: Capture) -> int:
    return FOLIOS[capture.path.parent.name]


def decoded(sample: Sample, layout: PageLayout) -> Iterator[Page]:
    """The 128 struct pages that were captured: the second 64 show the first ones again where they share a frame."""
    for k, page in enumerate((sample.head_page, sample.tail_page)):
        again = sample.frames[k] == sample.frames[0]
        for i, words in enumerate(page.tolist()):
            yield decode_page(words, sample.pfn + 64 * k + i, layout, index=i if again else None)


def test_every_struct_page_decodes(capture: Capture) -> None:
    """No flag without a name, the right zone and node, and the way to the head from every tail."""
    layout = layout_of(capture)
    kinds: Counter[tuple[str, str | None]] = Counter()
    known: dict[
        tuple[int, bytes], Counter[tuple[str, str | None]]
    ] = {}  # checkpoints repeat folios that nobody touched
    for checkpoint in full(capture):
        for sample in samples(checkpoint):
            key = sample.pfn, sample.head_page.tobytes() + sample.tail_page.tobytes()
            if key not in known:
                known[key] = Counter((page.kind, page.type) for page in checked(sample, layout))
            kinds += known[key]
    type_ = None if capture.kernel == "6.1" else "hugetlb"  # 6.1 keeps it in the second struct page
    total = sum(kinds.values())
    heads = total // (128 if layout.mask_tails else 64)
    assert kinds == Counter({("head", type_): heads, ("tail", None): total - heads})
    if capture.shipped:
        assert total == 128 * expected_folios(capture)


def checked(sample: Sample, layout: PageLayout) -> Iterator[Page]:
    for page in decoded(sample, layout):
        where = f"{sample.checkpoint.name}: {page}"
        assert (page.unknown, page.unconfirmed) == (0, 0), where
        assert page.zone_name == "Normal", where
        assert page.node == (0 if layout.configuration == "debian" else None), where
        # What optimisation shows in the place of a tail is the head, before 7.1.
        fake = not layout.mask_tails and (page.pfn - sample.pfn) % 64 == 0
        assert page.head == (page.pfn if fake else sample.pfn), where
        yield page


def folios(capture: Capture) -> Iterator[tuple[Sample, Folio]]:
    """Every captured folio behind the captured tables, found from its head."""
    layout = layout_of(capture)
    fmt = x86_64(pti=capture.pti, kernel=capture.kernel, maxphyaddr=capture.maxphyaddr)
    for checkpoint in full(capture):
        memory = Memory(checkpoint)
        for sample in samples(checkpoint):
            yield sample, Folio(memory, sample.pfn, layout, checkpoint.root, fmt=fmt)


def test_folios_are_what_the_kernel_counts(capture: Capture) -> None:
    """Order, type, mapcount, flags, references: those of the page cache and of mappings, or none in the pool."""
    seen, odd = 0, []
    for sample, folio in folios(capture):
        where = f"{sample.checkpoint.scenario} {sample.checkpoint.name} {folio}"
        assert (folio.pfn, 1 << folio.order, folio.nr_pages) == (sample.pfn, sample.pages, sample.pages), where
        assert (folio.type, folio.mapcount, folio.fake) == ("hugetlb", sample.mapcount, False), where
        assert folio.entire_mapcount == sample.mapcount, where
        assert (folio.pincount, folio.maybe_dma_pinned, folio.optimized) == (0, False, True), where
        hugetlb = folio.hugetlb
        assert hugetlb is not None
        free = "freed" in hugetlb.flags
        assert hugetlb.flags == (("freed" if free else "migratable"), "vmemmap_optimized"), where
        assert (folio.mapping is None, hugetlb.hwpoison) == (free, 0), where
        if folio.refcount != folio.expected_references:
            odd.append((sample.checkpoint.name, sample.pfn))
            assert (free, folio.refcount) == (True, 1), where
        if free:
            assert (folio.expected_references, folio.mapcount, folio.poisoned_pages) == (0, 0, []), where
        else:
            private = bool(sample.head_page[0, 3] & np.uint64(1))  # PAGE_MAPPING_ANON
            cached = 0 if private else sample.pages if capture.kernel != "6.1" else 1
            assert folio.expected_references == cached + sample.mapcount, where
            assert folio.mapping is not None, where
            assert folio.mapping.kind == ("anon_vma" if private else "address_space"), where
            assert (hugetlb.cgroup >> 47 == 0x1FFFF) == (folio.layout.configuration == "debian"), where
        seen += 1
    if capture.shipped:
        assert seen == expected_folios(capture)
        assert odd == (COUNTED_THOUGH_FREE.get(capture.name, []) if seen else [])


def test_pools_have_as_many_folios_as_they_say(capture: Capture) -> None:
    for checkpoint in full(capture):
        sizes = Counter(folio["pages"] for folio in checkpoint.raw["hugetlb_folios"])
        mapped = Counter(folio["pages"] for folio in checkpoint.raw["hugetlb_folios"] if folio["mapcount"])
        pools = checkpoint.raw["hugepages"]
        for pages, kilobytes in ((512, 2048), (262144, 1048576)):
            number, free = (pools[f"{kilobytes}kB.{what}_hugepages"] for what in ("nr", "free"))
            assert sizes[pages] == number
            assert mapped[pages] <= number - free


def test_every_tail_leads_to_its_folio(capture: Capture) -> None:
    """Through pointers, masks, and the heads that tails of optimised folios show before 7.1."""
    found: Counter[bool] = Counter()
    for sample, head in folios(capture):
        last = sample.pages - 1
        for offset in (1, 2, 3, 4, 63, 64, 65, 66, 127, 128, last - 63, last):
            folio = Folio(head.memory, sample.pfn + offset, head.layout, head.root, fmt=head.format)
            assert (folio.pfn, folio.given) == (sample.pfn, sample.pfn + offset)
            found[folio.fake] += 1
    if capture.shipped:
        count = expected_folios(capture)
        fakes = 0 if layout_of(capture).mask_tails else 3 * count
        assert found == Counter({False: 12 * count - fakes, True: fakes})


def test_vmemmap_is_what_the_flag_says(capture: Capture) -> None:
    """The first page is the folio's own and writable, the others show one frame, which frame says the release."""
    writable_tails: set[int] = set()
    for sample, folio in folios(capture):
        vmemmap = folio.vmemmap
        where = f"{sample.checkpoint.name} {sample.pfn:#x}"
        assert len(vmemmap) == sample.pages // 64, where
        assert [page.frame for page in vmemmap[:8]] == sample.frames, where
        assert {page.level for page in vmemmap} == {1}, where
        assert vmemmap[0].address == VMEMMAP + 64 * sample.pfn
        (shared,) = {page.frame for page in vmemmap[1:]}
        assert (shared == vmemmap[0].frame) == (not folio.layout.mask_tails), where
        assert vmemmap[0].shared == (not folio.layout.mask_tails), where
        assert all(page.shared for page in vmemmap[1:]), where
        assert vmemmap[0].writable, where
        writable_tails.add(sum(page.writable for page in vmemmap[1:]))
    if capture.shipped:
        assert writable_tails - {0} == WRITABLE_TAILS.get(capture.kernel, set())
