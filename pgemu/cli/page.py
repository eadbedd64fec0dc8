"""`pgemu page`: struct pages and their folios in a memory image, word by word."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import rich_click as click

from pgemu.cli._lines import folded
from pgemu.cli._options import number
from pgemu.cli.decode import c_bit_option
from pgemu.cli.walk import c_bit_of, find_root
from pgemu.errors import InputError
from pgemu.images.flag_widths import derived_widths, given_widths
from pgemu.images.folio import Folio, VmemmapPage
from pgemu.images.image import Image
from pgemu.images.struct_page import VMEMMAP_SIZE, Page, Value, is_mask, pointer_name
from pgemu.tables.walk import root_table
from pgemu_kernels.formats.struct_page import (
    CONFIGURATIONS,
    FLAG_FIELDS,
    RELEASES,
    STRUCT_PAGE,
    VMEMMAP,
    PageLayout,
    page_layout,
)

__all__ = ("page",)

_PAGE = 4096
_ZONE_ENDS = {"DMA": 16 << 8, "DMA32": 4 << 18}  # PFNs: 16 MiB, 4 GiB


def _size(number: int) -> str:
    """Bytes of a page: "4K", "2M", "1G"."""
    return next(
        f"{number // unit}{name}" for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")) if number >= unit
    )


class _Run(NamedTuple):
    """Vmemmap pages in a row whose entries have like flags and whose frames are the same or follow one another."""

    first: VmemmapPage
    pages: int
    step: int


def _runs(pages: Iterable[VmemmapPage]) -> Iterator[_Run]:
    run: _Run | None = None
    for page in pages:
        longer = _longer(run, page) if run else None
        if run and not longer:
            yield run
        run = longer or _Run(page, 1, 0)
    if run:
        yield run


def _longer(run: _Run, page: VmemmapPage) -> _Run | None:
    """The run with one page more, None where the page does not continue it."""
    first = run.first
    if (page.level, page.writable, page.shared) != (first.level, first.writable, first.shared):
        return None
    if page.frame is None or first.frame is None:
        return run._replace(pages=run.pages + 1) if page.entry == first.entry and page.frame == first.frame else None
    if page.level == 1 and page.entry ^ page.frame << 12 != first.entry ^ first.frame << 12:
        return None
    step = page.frame - first.frame if run.pages == 1 else run.step
    return _Run(first, run.pages + 1, step) if step in (0, 1) and page.frame == first.frame + run.pages * step else None


# --------------------------------------------------------------------------- text


def _value_line(value: Value) -> str:
    number = f"{value.value:#0{2 * value.size + 2}x}"
    return f"  +{value.offset:#04x}  {value.name:<21}  {number:>18}  {value.meaning}".rstrip()


def _notes(folio: Folio, page: Page) -> list[str]:
    """What does not fit the layout."""
    layout, notes = folio.layout, []
    if page.unknown:
        notes.append(f"flags {page.unknown:#x} have no name in this kernel")
    if page.zone is not None and page.pfn >= _ZONE_ENDS.get(page.zone_name or "", 1 << 64):
        notes.append(f"zone {page.zone_name} ends before this PFN: another --configuration or --flag-widths?")
    elif page.zone is not None and page.zone_name is None and layout.zones:
        notes.append(f"zone {page.zone} is none of this configuration: other --flag-widths, or a --dump-page line?")
    if page.type is not None and page.type.startswith("0x"):
        notes.append(f"page type {page.type} is none of {layout.release}: another --kernel?")
    if folio.large and is_mask(info := folio.words(1)[1]) != layout.mask_tails:
        form = "a mask" if is_mask(info) else "no mask"
        notes.append(f"tails hold {form}, unlike those of {layout.release}: another --kernel?")
    return notes


def _title(folio: Folio, page: Page) -> str:
    where = folio.vmemmap_base + STRUCT_PAGE * page.pfn
    index = page.pfn - folio.pfn
    what = f"tail of {folio.pfn:#x}" if index else page.kind
    if not folio.problem and (shown := folio.shown(index)) != index:
        what += f" (shows {folio.pfn + shown:#x})"
    return f"PFN {page.pfn:#x}: {what}, struct page {where:#x} at physical {folio.given_physical:#x}"


def _references(folio: Folio) -> str:
    """Who holds it, as far as its own words tell."""
    expected, count = folio.expected_references, folio.refcount
    rest = "" if count == expected else f", {abs(count - expected)} {'more' if count > expected else 'fewer'}"
    pins = f", pincount {folio.pincount}" if folio.pincount is not None else ""
    pinned = ", maybe pinned for DMA" if folio.maybe_dma_pinned else ""
    return f"refcount {count}, expected {expected}{rest}{pins}{pinned}"


def _mapcounts(folio: Folio) -> str:
    counts = [f"mapcount {folio.mapcount}"]
    if folio.entire_mapcount is not None:
        counts.append(f"of the whole {folio.entire_mapcount}")
    if (ids := folio.mm_ids) is not None:
        owners = [f"{mm} ({count})" for mm, count in zip(ids.ids, ids.mapcounts, strict=True) if mm]
        counts.append("mm ids " + (", ".join(owners) or "none") + (", shared" if ids.shared else ""))
    return ", ".join(counts)


def _hugetlb_line(folio: Folio) -> str | None:
    hugetlb = folio.hugetlb
    if hugetlb is None:
        return None
    words = [f"hugetlb {'|'.join(hugetlb.flags) or 'no flags'}"]
    for name in ("subpool", "cgroup", "cgroup_rsvd", "hwpoison"):
        pointer = getattr(hugetlb, name)
        if pointer:
            words.append(f"{name} {pointer:#x} ({pointer_name(pointer, folio.vmemmap_base) or 'no kernel address'})")
    if hugetlb.hwpoison:
        pages = folio.poisoned_pages
        words.append("poisoned " + ("unreadable" if pages is None else ", ".join(f"{pfn:#x}" for pfn in pages)))
    return ", ".join(words)


def _vmemmap_lines(folio: Folio) -> Iterator[str]:
    for first, pages, step in _runs(folio.vmemmap):
        count = f"{pages} page{'s' * (pages > 1)}"
        if first.frame is None:
            what = "not mapped"
        else:
            frames = f"{first.frame:#x}" + (f"-{first.frame + pages - 1:#x}" if step else "")
            what = f"{'read-write' if first.writable else 'read-only '}  frame {frames}{', shared' * first.shared}"
            what += f", part of a {_size(_PAGE << 9 * (first.level - 1))} entry" if first.level > 1 else ""
        yield f"    {first.address:#x}  {count:>10}  {first.entry:#018x}  {what}"


def _show(folio: Folio) -> list[str]:
    page = folio.given_page
    lines = [_title(folio, page), *map(_value_line, page.values)]
    lines += [f"  note: {note}" for note in _notes(folio, page)]
    if problem := folio.problem:
        return [*lines, f"  problem: {problem}"]
    kind = f", {folio.type}" if folio.type else ""
    if not folio.large and folio.type not in (None, "hugetlb"):
        return [*lines, f"  order 0{kind}"]
    pages = f"{folio.nr_pages} page{'s' * (folio.nr_pages > 1)}"
    lines.append(f"  folio {folio.pfn:#x}: order {folio.order} ({_size(_PAGE << folio.order)}), {pages}{kind}")
    lines += [f"  {line}" for line in (_references(folio), _mapcounts(folio), _hugetlb_line(folio)) if line]
    return [*lines, "  vmemmap", *_vmemmap_lines(folio)]


# --------------------------------------------------------------------------- JSON


def _document(folio: Folio) -> dict[str, Any]:
    page = folio.given_page
    plain = ("kind", "node", "zone", "zone_name", "last_cpupid", "lru_gen", "lru_refs", "type", "refcount", "mapcount")
    return {
        "pfn": f"{page.pfn:#x}",
        "address": f"{folio.vmemmap_base + STRUCT_PAGE * page.pfn:#x}",
        "physical": f"{folio.given_physical:#x}",
        "words": [f"{word:#018x}" for word in page.words],
        "shows_another_head": folio.fake,
        "flags": list(page.flags),
        "unknown": f"{page.unknown:#x}",
        "unconfirmed": f"{page.unconfirmed:#x}",
        **{name: getattr(page, name) for name in plain},
        "values": [value._asdict() | {"value": f"{value.value:#x}"} for value in page.values],
        "notes": _notes(folio, page),
        **({"problem": str(folio.problem)} if folio.problem else {}),
        "folio": None if folio.problem else _folio_document(folio),
    }


def _folio_document(folio: Folio) -> dict[str, Any]:
    plain = (
        "order", "nr_pages", "type", "refcount", "expected_references", "mapcount", "large_mapcount", "entire_mapcount",
        "pincount", "maybe_dma_pinned", "optimized",
    )  # fmt: skip
    mapping, hugetlb, ids = folio.mapping, folio.hugetlb, folio.mm_ids
    document: dict[str, Any] = {"pfn": f"{folio.pfn:#x}", "flags": list(folio.flags)}
    document |= {name: getattr(folio, name) for name in plain}
    document["mapping"] = mapping and {"kind": mapping.kind, "address": f"{mapping.address:#x}"}
    document["index"] = f"{folio.index:#x}"
    document["mm_ids"] = ids and ids._asdict()
    document["hugetlb"] = hugetlb and {
        "flags": list(hugetlb.flags),
        **{name: f"{getattr(hugetlb, name):#x}" for name in ("subpool", "cgroup", "cgroup_rsvd", "hwpoison")},
    }
    document["vmemmap"] = [
        {
            "address": f"{run.first.address:#x}",
            "pages": run.pages,
            "level": run.first.level,
            "entry_address": f"{run.first.entry_address:#x}",
            "entry": f"{run.first.entry:#x}",
            "frame": None if run.first.frame is None else f"{run.first.frame:#x}",
            "same_frame": run.step == 0,
            "writable": run.first.writable,
            "shared": run.first.shared,
        }
        for run in _runs(folio.vmemmap)
    ]
    return document


# --------------------------------------------------------------------------- the command


def _pfn(number: int, vmemmap: int) -> int:
    """The PFN that a number is, or whose struct page lies there.

    :raises InputError: it is neither
    """
    if 0 <= number - vmemmap < VMEMMAP_SIZE:
        pfn, inside = divmod(number - vmemmap, STRUCT_PAGE)
        if inside:
            first = f"{number - inside:#x}, of which PFN {pfn:#x} is"
            raise InputError(f"{number:#x}: within the struct page at {first}; expected the address that one begins at")
        return pfn
    if number < VMEMMAP_SIZE // STRUCT_PAGE:
        return number
    raise InputError(f"{number:#x}: expected a PFN, or the address of a struct page in the vmemmap at {vmemmap:#x}")


def _layout(kernel: str, configuration: str, given: str | None, lines: tuple[str, ...]) -> PageLayout:
    """The layout, with widths that are given or derived.

    :raises InputError: both, or none that fit
    """
    if given and lines:
        raise InputError("--flag-widths: expected either these or --dump-page")
    try:
        widths = given_widths(given, configuration) if given else derived_widths(lines) if lines else None
        return page_layout(kernel, configuration, widths)
    except ValueError as problem:
        raise InputError(f"{'--flag-widths' if given else '--dump-page'}: {problem}") from None


def _kernel_root(image: Image, root: str | None) -> str | None:
    """The --root to use: given, "kernel", or else the first root of a CPU or process, which maps the kernel, too."""
    names = [named.name for named in image.roots if named.format.startswith("x86-64")]
    return root or ("kernel" if "kernel" in names else names[0] if names else None)


@click.command(short_help="Name every word of struct pages and their folios in a memory image.")
@click.argument("image", metavar="IMAGE")
@click.argument("numbers", nargs=-1, required=True, metavar="PFN...", type=number)
@click.option(
    "--kernel",
    type=click.Choice(RELEASES),
    help="Linux whose struct pages these are.  [default: as the image's notes say, else 7.3]",
)
@click.option(
    "--configuration",
    type=click.Choice(CONFIGURATIONS),
    help="Which fields page->flags has: Debian's, or those of a kernel without NUMA and memory cgroups.  [default: as "
    "Machine.write_image notes it, else debian]",
)
@click.option(
    "--flag-widths",
    metavar="node=N,zone=N,lastcpupid=N",
    help="How many bits of page->flags these fields have.  [default: the configuration's]",
)
@click.option(
    "--dump-page",
    metavar="LINE",
    multiple=True,
    help="A line of the kernel's dump_page(), 'flags: 0x...(...|node=0|zone=2|lastcpupid=0x1ffff)', from which widths "
    "are derived; may be repeated. Fields that could be otherwise end in '?'.",
)
@click.option(
    "--root",
    metavar="ADDR|NAME",
    help="Physical address of the kernel's top table, or a name that the image gives.  [default: kernel, or the first]",
)
@click.option("--format", "name", type=click.Choice(["x86-64", "x86-64-5"]), help="Format of the kernel's page table.")
@click.option(
    "--vmemmap", type=number, metavar="ADDR", default=f"{VMEMMAP:#x}", show_default=True,
    help="Virtual address of the struct page of PFN 0: vmemmap_base, which KASLR moves.",
)  # fmt: skip
@c_bit_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def page(
    image: str, numbers: tuple[int, ...], kernel: str | None, configuration: str | None, flag_widths: str | None,
    dump_page: tuple[str, ...], root: str | None, name: str | None, vmemmap: int, c_bit: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Name every word of struct pages, and show their folios and the page-table entries that map them.

    IMAGE is an ELF core of physical memory (QEMU's dump-guest-memory, an uncompressed vmcore, Machine.write_image) or
    raw memory. PFN is a page frame number, or the address of a struct page, hexadecimal with or without 0x. Each line
    has the offset in the struct page, the field, its value and what that means; pointers are told by their address. A
    tail's folio is shown, too; before Linux 7.1 also where a tail of an optimised folio shows the head's words. Flags
    ending in "?" are inference.

    Exit status: 0; 1 if a struct page is not mapped or belongs to no folio that can be; 2 for bad input.
    """
    from pgemu.images.image import open_image, release_of

    pfns = [_pfn(number, vmemmap) for number in numbers]
    blocks: list[str] = []
    documents: list[dict[str, Any]] = []
    failed = False
    with open_image(image) as opened:
        kernel = kernel or release_of(opened, RELEASES) or "7.3"
        configuration = configuration or (opened.configuration if opened.configuration in CONFIGURATIONS else "debian")
        layout = _layout(kernel, configuration, flag_widths, dump_page)
        where, fmt = find_root(opened, _kernel_root(opened, root), name, c_bit=c_bit)
        for pfn in pfns:
            try:
                folio = Folio(opened, pfn, layout, where, fmt=fmt, vmemmap=vmemmap)
                failed |= folio.problem is not None
                if as_json:
                    documents.append(_document(folio))
                else:
                    blocks.append("\n".join(folded(_show(folio))) + "\n")
            except ValueError as problem:
                failed = True
                documents.append({"pfn": f"{pfn:#x}", "problem": str(problem)})
                blocks.append(f"{problem}\n")
    if as_json:
        about = {
            "image": image,
            "root": f"{root_table(fmt, where):#x}",
            "kernel": kernel,
            "configuration": configuration,
            "flag_widths": {bits.name: bits.high - bits.low + 1 for bits in layout.flags if bits.name in FLAG_FIELDS},
            "doubtful": sorted(layout.doubtful),
            "c_bit": c_bit_of(fmt),
        }
        sys.stdout.write(json.dumps(about | {"pages": documents}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(blocks))
    sys.stdout.flush()
    return 1 if failed else 0
