"""`pgemu walk`: addresses through the page tables in a memory image, entry by entry."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import rich_click as click

from pgemu.cli._lines import folded
from pgemu.cli._options import number
from pgemu.cli.decode import c_bit_option, has_parameter, make_format, to_json
from pgemu.errors import InputError
from pgemu.tables.entries import Entry, EntryKind, decode as decode_entry
from pgemu.tables.walk import (
    Kind,
    Rights,
    Step,
    granted,
    in_range,
    leaf_address,
    rights_of,
    root_table,
    walk as walk_tables,
)
from pgemu_kernels.formats.bits import RELEASES
from pgemu_kernels.formats.page_format import FORMATS, Family, PageFormat

if TYPE_CHECKING:
    from pgemu.images.image import Image

__all__ = ("walk",)

_NAMES = {
    Family.X86: ("PTE", "PMD", "PUD", "PGD", "PGD"),
    Family.EPT: ("PTE", "PDE", "PDPTE", "PML4E", "PML5E"),
    Family.NPT: ("PTE", "PDE", "PDPTE", "PML4E", "PML5E"),
    Family.ARM64: ("L3", "L2", "L1", "L0", "L-1"),
    Family.VTD: ("PTE", "PDE", "PDPTE", "PML4E", "PML5E"),
    Family.AMD_IOMMU: ("L1", "L2", "L3", "L4", "L5", "L6"),
}
_PROBLEMS, _ROOTS = 10, 16  # that are shown
SIZES = ("4K", "2M", "1G", "512G", "256T", "128P")


def level_name(fmt: PageFormat, level: int) -> str:
    """The name of an entry of a level: PGD to PTE (Linux's), PML4E to PTE (the manuals'), L0 to L3 (Arm's), ..."""
    return "P4D" if fmt.family is Family.X86 and level == 4 < fmt.levels else _NAMES[fmt.family][level - 1]


def page_size(fmt: PageFormat, level: int, entry: int) -> str:
    """The size of the page that a leaf maps: "2M"; "16M" of one that has its size in its address."""
    if not fmt.is_sized(entry):
        return SIZES[level - 1]
    size = fmt.size_of_leaf(level, entry)
    unit = (size.bit_length() - 1) // 10
    return f"{size >> 10 * unit}{' KMGTP'[unit]}"


def flag_names(entry: Entry) -> str:
    """Return the names of an entry's flags, lowest first: "PRESENT|RW|USER", fields of several bits with values.

    Every set bit is in one of them, but for those of a frame that is the entry's address.
    """
    names = []
    for field in reversed(entry.fields):
        if field.high == field.low:
            names.append(field.name)
        elif field.name.endswith("PFN") and entry.address == field.value << 12:
            continue
        elif field.value or entry.value >> field.low & (1 << field.high - field.low + 1) - 1:  # of "~" 0 is all ones
            names.append(f"{field.name}={field.value:#x}")
    names += [f"RESERVED={entry.reserved:#x}"] if entry.reserved else []
    names += [f"UNKNOWN={entry.unknown:#x}"] if entry.unknown else []
    return "|".join(names)


def rights_letters(fmt: PageFormat, rights: Rights) -> str:
    """Return "rwxu": execute is s or e where only the supervisor (EL1) or only the user (EL0) may."""
    execute = {(True, True): "x", (True, False): "s", (False, True): "e"}.get(rights[3:], "-")
    user = ("u" if rights.user else "-") if fmt.user else ""
    return f"{'r' if rights.read else '-'}{'w' if rights.write else '-'}{execute}{user}"


# --------------------------------------------------------------------------- options shared with dump


def table_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say where tables begin and how entries look."""
    options = (
        click.option(
            "--root",
            metavar="ADDR|NAME",
            help="Physical address of the top table, or a name that the image gives (process:0, vm:0, cpu:0, kernel). "
            "A CR3, EPTP, nCR3 or VTTBR will do: bits that are no address are masked.",
        ),
        click.option(
            "--format",
            "name",
            type=click.Choice(list(FORMATS)),
            help="Entry format.  [default: that of the named root, else x86-64]",
        ),
        click.option(
            "--kernel",
            type=click.Choice(list(RELEASES)),
            help="Linux that wrote the entries: software bits differ.  [default: the image's, else 7.3]",
        ),
        click.option("--maxphyaddr", type=int, metavar="BITS", help="Physical address bits of the CPU."),
        c_bit_option,
        click.option("--ipa-bits", type=int, metavar="BITS", help="Input address bits (arm64-s2).  [default: 40]"),
        click.option(
            "--fwb/--no-fwb",
            default=None,
            help="FEAT_S2FWB memory attributes (arm64-s2).  [default: fwb]",
            show_default=False,
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def find_root(image: Image, text: str | None, name: str | None, **parameters: Any) -> tuple[int, PageFormat]:
    """Return the top table that --root says and the format of its entries; say what of the image was left out.

    :raises InputError: no such root, or it lies outside the image, or the format cannot have such parameters
    """
    for problem in image.problems[:_PROBLEMS]:
        click.echo(f"pgemu: {image.path}: {problem}", err=True)
    if (more := len(image.problems) - _PROBLEMS) > 0:
        click.echo(f"pgemu: {image.path}: ... and {more} more like these", err=True)
    named = {root.name: root for root in reversed(image.roots)}  # of one name the first
    known = ", ".join(f"{root.name} {root.address:#x} ({root.format})" for root in image.roots[:_ROOTS])
    known += f", ... and {more} more" if (more := len(image.roots) - _ROOTS) > 0 else ""
    known = f"; the image names {known}" if known else ""
    if text is None:
        raise InputError(f"--root is missing{known}")
    if text in named:
        root, name = named[text].address, name or named[text].format
        if name not in FORMATS:
            raise InputError(f"root {text} of format {name!r}: expected --format", image.path)
    else:
        try:
            root = number(text)
        except click.BadParameter:
            raise InputError(f"--root {text!r}: expected an address, or a name that the image gives{known}") from None
    name = name or "x86-64"
    if parameters.get("c_bit") is None and image.sme_mask and has_parameter(name, "c_bit"):
        parameters["c_bit"] = image.sme_mask.bit_length() - 1
    if parameters.get("kernel") is None and has_parameter(name, "kernel"):
        from pgemu.images.image import release_of

        parameters["kernel"] = release_of(image, list(RELEASES))
    fmt = make_format(name, **parameters)
    table = root_table(fmt, root)
    try:
        image.words(table, 512 * fmt.root_tables)
    except ValueError:
        count = len(image.ranges)
        covered = f"{image.ranges[0].start:#x} to {image.ranges[-1].end:#x} in {count} range{'s' * (count > 1)}"
        raise InputError(f"root table {table:#x}: not in the image, which covers {covered}", image.path) from None
    return root, fmt


def c_bit_of(fmt: PageFormat) -> int | None:
    """The position of SME's bit in a format's entries, None where it has none."""
    return fmt.c_bit.bit_length() - 1 if fmt.c_bit else None


# --------------------------------------------------------------------------- the command


def _page(fmt: PageFormat, steps: list[Step], virtual: int) -> tuple[int, int] | None:
    """(physical address, level) of a walk that ends at a leaf."""
    if not steps or steps[-1].kind != Kind.LEAF:
        return None
    last = steps[-1]
    return leaf_address(fmt, last.level, last.entry, virtual), last.level


def _reason(fmt: PageFormat, steps: list[Step], virtual: int) -> str:
    """Why a walk did not end at a leaf."""
    if not in_range(fmt, virtual):
        what = "not canonical" if fmt.sign_extended else f"wider than {fmt.input_bits} bits"
        return f"the address is {what}"
    last = steps[-1]
    name = level_name(fmt, last.level)
    if last.kind == Kind.UNREADABLE:
        return f"the table of the {name} lies outside the image"
    entry = decode_entry(fmt, last.level, last.entry, virtual)
    frame = entry.address if entry.kind is EntryKind.KERNEL_NOT_PRESENT else None
    page = "" if frame is None else f", page {frame:#x}"
    return f"the {name} is {entry.kind.value.replace('_', ' ')}{page}" + (f", {entry.problem}" if entry.problem else "")


def _show(fmt: PageFormat, steps: list[Step], virtual: int) -> list[str]:
    lines = [f"{virtual:#x}"]
    for step in steps:
        name = level_name(fmt, step.level)
        if step.kind == Kind.UNREADABLE:
            lines.append(f"  {name:>5}  {step.address:#015x}  not in the image")
            continue
        entry = decode_entry(fmt, step.level, step.entry, virtual)
        kind = entry.kind.value.replace("_", " ")
        shown = f"  {name:>5}  {step.address:#015x}  {step.entry:#018x}  {kind:<6}"
        if entry.address is not None:
            shown += f" {entry.address:#015x}"
        lines.append(f"{shown}  {flag_names(entry)}".rstrip())
    page = _page(fmt, steps, virtual)
    if page is None:
        return [*lines, f"  not mapped: {_reason(fmt, steps, virtual)}"]
    entry = decode_entry(fmt, steps[-1].level, steps[-1].entry, virtual)
    rights = rights_letters(fmt, rights_of(fmt, granted(fmt, steps)))
    type_ = f", {entry.memory_type}" if entry.memory_type else ""
    size = page_size(fmt, steps[-1].level, steps[-1].entry)
    return [*lines, f"  physical {page[0]:#x}, page of {size}, {rights}{type_}"]


def _document(fmt: PageFormat, steps: list[Step], virtual: int) -> dict[str, Any]:
    page = _page(fmt, steps, virtual)
    entries = []
    for step in steps:
        about = {"level": step.level, "name": level_name(fmt, step.level), "entry_address": f"{step.address:#x}"}
        readable = step.kind != Kind.UNREADABLE
        entries.append(
            about | (to_json(decode_entry(fmt, step.level, step.entry, virtual)) if readable else {"value": None})
        )
    return {
        "address": f"{virtual:#x}",
        "entries": entries,
        "physical": f"{page[0]:#x}" if page else None,
        "page_level": page[1] if page else None,
        "rights": rights_of(fmt, granted(fmt, steps))._asdict() if page else None,
        "not_mapped": None if page else _reason(fmt, steps, virtual),
    }


@click.command(short_help="Walk addresses through the page tables in a memory image.")
@click.argument("image", metavar="IMAGE")
@click.argument("addresses", nargs=-1, required=True, metavar="VA...", type=number)
@table_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def walk(image: str, addresses: tuple[int, ...], root: str | None, as_json: bool, **parameters: Any) -> int:
    """Walk addresses through the page tables in a memory image: the entry at every level, then the physical address.

    VA is hexadecimal, with or without 0x, as kernels and crash print it.
    IMAGE is an ELF core of physical memory (QEMU's dump-guest-memory, an uncompressed vmcore, Machine.write_image) or
    raw memory. Each line has the entry's name, its physical address, its value, its kind, what it points to and its
    flags. Rights are those that all levels grant: read, write, execute (s or e: only by supervisor, EL1, or user, EL0),
    user.

    Exit status: 0; 1 if an address is not mapped; 2 for bad input.
    """
    from pgemu.images.image import open_image

    with open_image(image) as opened:
        where, fmt = find_root(opened, root, **parameters)
        walks = [(virtual, walk_tables(opened, fmt, where, virtual)) for virtual in addresses]
    if as_json:
        about = {"image": image, "root": f"{root_table(fmt, where):#x}", "format": fmt.name, "c_bit": c_bit_of(fmt)}
        documents = [_document(fmt, steps, virtual) for virtual, steps in walks]
        sys.stdout.write(json.dumps(about | {"walks": documents}, indent=2) + "\n")
    else:
        blocks = ("\n".join(folded(_show(fmt, steps, virtual))) + "\n" for virtual, steps in walks)
        sys.stdout.write("\n".join(blocks))
    sys.stdout.flush()
    return 0 if all(_page(fmt, steps, virtual) for virtual, steps in walks) else 1
