"""`pgemu decode`: page-table entries, bit by bit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import rich_click as click

from pgemu.cli._lines import folded
from pgemu.cli._options import number
from pgemu.errors import InputError
from pgemu.tables.entries import Entry, EntryKind, Field, decode as decode_entry
from pgemu_kernels.formats.bits import RELEASES
from pgemu_kernels.formats.page_format import FORMATS, PageFormat

__all__ = ("decode",)

_MAKERS = FORMATS
_SIZES = ("4K", "2M", "1G", "512G", "256T", "128P")
_RIGHTS = ("read", "write", "user", "execute", "execute_user")


c_bit_option = click.option(
    "--c-bit",
    type=int,
    metavar="BIT",
    help="Memory encryption bit (x86-64, npt).  [default: sme_mask of the image's VMCOREINFO, or none]",
)


def has_parameter(name: str, parameter: str) -> bool:
    """Whether a format has a parameter."""
    return parameter in inspect.signature(_MAKERS[name]).parameters


def make_format(name: str, **parameters: Any) -> PageFormat:
    """Return the format with those parameters that are not None.

    :raises InputError: a parameter that the format does not have, or a value that it cannot have
    """
    given = {parameter: value for parameter, value in parameters.items() if value is not None}
    maker = _MAKERS[name]
    for parameter in given.keys() - inspect.signature(maker).parameters.keys():
        raise InputError(f"--{parameter.replace('_', '-')}: {name} has no such parameter")
    try:
        return maker(**given)
    except ValueError as error:
        raise InputError(str(error)) from None


def _address(entry: Entry) -> str:
    what = {EntryKind.TABLE: "table", EntryKind.MMIO: "guest physical"}.get(entry.kind, "page")
    return "" if entry.address is None else f", {what} {entry.address:#x}"


def _summary(entry: Entry) -> str:
    """Rights and states in words, "" for what has none."""
    words = [entry.problem] if entry.problem else []
    words += [right.replace("_", " ") for right in _RIGHTS if getattr(entry, right)]
    words += [state for state in ("accessed", "dirty") if getattr(entry, state)]
    words += ["global"] if entry.global_ else []
    words += [entry.memory_type] if entry.memory_type else []
    words += [f"key {entry.key}"] if entry.key else []
    words += [f"generation {entry.generation}"] if entry.generation is not None else []
    words += [f"swap type {entry.swap_type}, offset {entry.swap_offset:#x}"] if entry.swap_type is not None else []
    return ", ".join(words)


def _show(fmt: PageFormat, entry: Entry) -> Iterator[str]:
    """An entry in lines: what it is, and each field that is set, the highest first."""
    kind = entry.kind.value.replace("_", " ")
    size = _SIZES[entry.level - 1]
    yield f"{entry.value:#018x}  {fmt.name} level {entry.level} ({size}): {kind}{_address(entry)}"
    if summary := _summary(entry):
        yield f"  {summary}"
    lines = [(field.high, f"{field.bits:>5}  {field.name:<16}{_value(field)}") for field in entry.fields]
    for what, mask in (("reserved", entry.reserved), ("no name", entry.unknown)):
        lines += [(bit, f"{bit:>5}  ({what})") for bit in range(64) if mask >> bit & 1]
    for _, line in sorted(lines, reverse=True):
        yield f"  {line.rstrip()}"


def _value(field: Field) -> str:
    return "" if field.high == field.low else f" {field.value:#x}"


def to_json(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON: numbers above 2^53 may be among them, so values and masks are "0x..." strings."""
    plain = ("level", *_RIGHTS, "accessed", "dirty", "memory_type", "key", "problem", "generation", "swap_type")
    document: dict[str, Any] = {"value": f"{entry.value:#018x}", "kind": entry.kind.value}
    document |= {name: getattr(entry, name) for name in plain}
    document["global"] = entry.global_
    for name in ("address", "swap_offset", "software", "reserved", "unknown"):
        value = getattr(entry, name)
        document[name] = None if value is None else f"{value:#x}"
    document["fields"] = [
        {"bits": field.bits, "name": field.name, "value": f"{field.value:#x}"} for field in entry.fields
    ]
    return document


@click.command(short_help="Name each bit of page-table entries.")
@click.argument("values", nargs=-1, required=True, metavar="VALUE...", type=number)
@click.option(
    "--format", "name", type=click.Choice(list(_MAKERS)), default="x86-64", show_default=True, help="Entry format."
)
@click.option(
    "--level",
    type=click.IntRange(1, 6),
    default=1,
    show_default=True,
    help="Level of the table that the entry lies in: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G, 5 = 256T, 6 = 128P.",
)
@click.option(
    "--kernel",
    type=click.Choice(list(RELEASES)),
    help="Linux that wrote the entry: software bits differ.  [default: 7.3]",
)
@click.option(
    "--maxphyaddr", type=int, metavar="BITS", help="Physical address bits of the CPU.  [default: the format's]"
)
@c_bit_option
@click.option(
    "--l1tf-cache-bits",
    type=int,
    metavar="BITS",
    help="Address bits of the L1 cache of a CPU with L1TF, 44 on Haswell (ept): where MMIO entries keep the frame.",
)
@click.option(
    "--fwb/--no-fwb", default=None, help="FEAT_S2FWB memory attributes (arm64-s2).  [default: fwb]", show_default=False
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def decode(values: tuple[int, ...], name: str, level: int, as_json: bool, **parameters: Any) -> None:
    """Name each bit of page-table entries: kind, rights, memory type, software bits, reserved bits.

    VALUE is hexadecimal, with or without 0x, as kernels and crash print it. Of kernel 7.3's EPT entries bits 53 and
    55 are named by inference.
    """
    fmt = make_format(name, **parameters)
    if level > fmt.levels:
        raise InputError(f"--level {level}: {name} has levels 1 to {fmt.levels}")
    entries = [decode_entry(fmt, level, value) for value in values]
    if as_json:
        click.echo(json.dumps([to_json(entry) for entry in entries], indent=2))
        return
    for index, entry in enumerate(entries):
        if index:
            click.echo()
        click.echo("\n".join(folded(_show(fmt, entry))))
