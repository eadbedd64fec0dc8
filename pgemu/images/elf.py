"""ELF64 cores of physical memory, as QEMU's dump-guest-memory, kdump and pgemu write them: headers, segments, notes.

Little-endian only. Sources: System V ABI, chapter 5 (program header, note section); elf(5) for PN_XNUM;
QEMU's target/i386/arch_dump.c:QEMUCPUState; Linux's kernel/vmcore_info.c and
arch/x86/kernel/vmcore_info_64.c:arch_crash_save_vmcoreinfo().
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pgemu.errors import InputError

__all__ = ("MAGIC", "Contents", "Note", "Root", "Segment", "parse", "prologue")

MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NOTE = struct.Struct("<III")
_CLASS_64, _LITTLE_ENDIAN, _CORE, _X86_64 = 2, 1, 4, 62
_LOAD, _NOTES = 1, 4
_MANY_PROGRAM_HEADERS = 0xFFFF  # PN_XNUM: their number is in sh_info of section 0
DIRECT_MAP = 0xFFFF_8880_0000_0000  # where Linux sees physical address 0 without KASLR
_KERNEL_TEXT = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map
_QEMU_CR3 = struct.calcsize("<II18Q") + 10 * struct.calcsize("<IIIIQ") + 3 * 8  # offset in QEMUCPUState
_PGEMU_ROOTS = 0x706765  # type of the note; none of those that readelf knows
_SME_MASKS = frozenset(1 << bit for bit in range(32, 52))
PAGE = 4096
# What no core needs, and what a damaged one may say: a number of segments (makedumpfile leaves out runs of 256 pages:
# so many are 1 TiB), bytes of notes (of 8192 processors QEMU writes 7 MiB) and of a note that is text (a page).
_MOST_HEADERS = 1 << 20
_MOST_NOTES = 16 << 20
_LONGEST_TEXT = 1 << 20
_LONGEST_RELEASE = 64  # include/uapi/linux/utsname.h:__NEW_UTS_LEN
_TOLD = re.compile(r"[A-Z]{1,16}=[!-~]{1,64}")
_ROOT = re.compile(r"([!-~]{1,64}) ([!-~]{1,64}) 0x([0-9a-f]{1,16})")


class Segment(NamedTuple):
    """A PT_LOAD: physical address, bytes in memory, offset and bytes in the file."""

    address: int
    size: int
    offset: int
    file_size: int


class Note(NamedTuple):
    """An entry of a PT_NOTE; its data lie in the file."""

    name: str
    kind: int
    data: memoryview


class Root(NamedTuple):
    """A top table that an image names: what it belongs to, its format (page_format.FORMATS), its physical address."""

    name: str
    format: str
    address: int


class Contents(NamedTuple):
    """What a core holds: segments in the order of the file, the top tables that its notes name, and SME's bit.

    sme_mask: the bit that entries of the host's tables have for encrypted memory, 0 for none (VMCOREINFO's sme_mask).
    problems: what of the notes was not understood, a line each. kernel: release of the kernel that wrote it, as
    VMCOREINFO's OSRELEASE or pgemu's note has it, "" where none says; configuration: pgemu's note, too.
    """

    segments: list[Segment]
    roots: list[Root]
    sme_mask: int
    problems: list[str]
    kernel: str
    configuration: str


# --------------------------------------------------------------------------- reading


def parse(data: memoryview, file: str) -> Contents:
    """What a core holds.

    data: the file's bytes. InputError, naming `file`, for what is no whole little-endian ELF64 core, or has more
    segments or notes than any core.
    """
    segments, notes_at, note_bytes = [], [], 0
    for kind, _, offset, _, address, file_size, size, _ in _PROGRAM.iter_unpack(_program_headers(data, file)):
        if kind not in (_LOAD, _NOTES) or not file_size:
            continue
        if offset + file_size > len(data):
            what = "PT_NOTE" if kind == _NOTES else f"PT_LOAD of physical address {address:#x}"
            where = f"{what} ends at {offset + file_size:#x}"
            raise InputError(f"{where}, the file at {len(data):#x}: file truncated?", file)
        if kind == _LOAD:
            segments.append(Segment(address, max(size, file_size), offset, file_size))
            continue
        notes_at.append((offset, offset + file_size))
        note_bytes += file_size
    if note_bytes > _MOST_NOTES:
        raise InputError(f"notes of {note_bytes} bytes: expected at most {_MOST_NOTES}", file)
    problems: list[str] = []
    notes = [note for start, end in notes_at for note in _notes(data[start:end], start, problems)]
    roots = list(_roots(notes, file, problems))
    return Contents(
        segments, roots, _sme_mask(notes, file), problems, _told(notes, file, "OSRELEASE"),
        _told(notes, file, "CONFIGURATION"),
    )  # fmt: skip


def _program_headers(data: memoryview, file: str) -> memoryview:
    """The bytes of the program headers."""
    if len(data) < _HEADER.size:
        raise InputError(f"{len(data)} bytes: expected an ELF header of {_HEADER.size}", file)
    header = _HEADER.unpack_from(data)
    ident, kind, headers_at, sections_at = header[0], header[1], header[5], header[6]
    header_size, count = header[9:11]
    if ident[4] != _CLASS_64:
        raise InputError(f"ELF class {ident[4]}: expected 64-bit ({_CLASS_64})", file)
    if ident[5] != _LITTLE_ENDIAN:
        raise InputError(f"ELF byte order {ident[5]}: expected little-endian ({_LITTLE_ENDIAN})", file)
    if kind != _CORE:
        raise InputError(f"ELF type {kind}: expected a core ({_CORE})", file)
    if count == _MANY_PROGRAM_HEADERS:
        if sections_at == 0 or sections_at + _SECTION.size > len(data):
            raise InputError("no section header for the number of program headers: expected one, file truncated?", file)
        count = _SECTION.unpack_from(data, sections_at)[7]
    if count and header_size != _PROGRAM.size:
        raise InputError(f"program headers of {header_size} bytes: expected {_PROGRAM.size}", file)
    end = headers_at + count * _PROGRAM.size
    if end > len(data):
        raise InputError(f"program headers end at {end:#x}, the file at {len(data):#x}: file truncated?", file)
    if count > _MOST_HEADERS:
        raise InputError(f"{count} program headers: expected at most {_MOST_HEADERS}", file)
    return data[headers_at:end]


def _notes(data: memoryview, start: int, problems: list[str]) -> Iterator[Note]:
    """Entries of a note segment at `start` of the file, as far as they are whole, that have a name."""
    at = 0
    while at + _NOTE.size <= len(data):
        name_size, size, kind = _NOTE.unpack_from(data, at)
        begin = at + _NOTE.size + (name_size + 3 & ~3)
        if begin + size > len(data):
            end = f"ends at {start + begin + size:#x}, its segment at {start + len(data):#x}"
            problems.append(f"the note at {start + at:#x} {end}: it and what follows are left out")
            return
        if name_size:
            name = bytes(data[at + _NOTE.size : at + _NOTE.size + min(name_size, 64)]).decode("latin-1")
            yield Note(name.partition("\0")[0], kind, data[begin : begin + size])
        at = begin + (size + 3 & ~3)
    if any(data[at:]):
        problems.append(f"{len(data) - at} bytes at {start + at:#x}, behind the last note, are left out")


def _text(note: Note, file: str) -> str:
    if len(note.data) > _LONGEST_TEXT:
        raise InputError(f"{note.name}'s note of {len(note.data)} bytes: expected at most {_LONGEST_TEXT}", file)
    return bytes(note.data).decode("latin-1")


def _roots(notes: list[Note], file: str, problems: list[str]) -> Iterator[Root]:
    """Top tables named by pgemu's own note, by QEMU's processors (CR3) and by a kernel's VMCOREINFO."""
    processors = 0
    for note in notes:
        if note.name == "pgemu":
            for line in filter(None, _text(note, file).rstrip("\0").split("\n")):
                if _TOLD.fullmatch(line):
                    continue
                if (match := _ROOT.fullmatch(line)) is None:
                    raise InputError(f"pgemu's note has {line[:80]!a}: expected a name, a format, 0x...", file)
                yield Root(match[1], match[2], int(match[3], 16))
        elif note.name == "QEMU" and len(note.data) >= _QEMU_CR3 + 16:
            cr3, cr4 = struct.unpack_from("<QQ", note.data, _QEMU_CR3)
            yield Root(f"cpu:{processors}", "x86-64-5" if cr4 >> 12 & 1 else "x86-64", cr3)
            processors += 1
        elif note.name == "QEMU":
            problems.append(f"QEMU's note of {len(note.data)} bytes has no CR3: it is left out")
        elif note.name == "VMCOREINFO":
            yield from _kernel_root(_vmcoreinfo(note, file), problems)


def _vmcoreinfo(note: Note, file: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in _text(note, file).split("\n") if "=" in line)


def _told(notes: list[Note], file: str, key: str) -> str:
    """What VMCOREINFO or pgemu's own note says of the kernel under `key`, "" where neither does."""
    for note in notes:
        if note.name in ("VMCOREINFO", "pgemu") and (value := _vmcoreinfo(note, file).get(key)):
            return value.rstrip("\0")[:_LONGEST_RELEASE]
    return ""


def _decimal(text: str) -> int | None:
    """A number of 64 bits as VMCOREINFO has it, None for what is none."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None


def _sme_mask(notes: list[Note], file: str) -> int:
    """SME's bit, as a kernel's VMCOREINFO has it; 0 for none."""
    for note in notes:
        text = _vmcoreinfo(note, file).get("NUMBER(sme_mask)", "0") if note.name == "VMCOREINFO" else "0"
        if text == "0":
            continue
        mask = _decimal(text)
        if mask not in _SME_MASKS:
            raise InputError(f"VMCOREINFO's sme_mask is {text[:80]!a}: expected one of bits 32 to 51", file)
        return mask
    return 0


def _kernel_root(values: dict[str, str], problems: list[str]) -> Iterator[Root]:
    """The kernel's own top table from VMCOREINFO, whose symbols are virtual addresses of the kernel's image."""
    symbol = values.get("SYMBOL(init_top_pgt)", values.get("SYMBOL(swapper_pg_dir)"))
    base = values.get("NUMBER(phys_base)")
    if not symbol or not base:
        return
    address = int(symbol, 16) - _KERNEL_TEXT if re.fullmatch(r"[0-9a-f]{1,16}", symbol) else None
    offset = _decimal(base)
    if address is None or offset is None or not 0 <= address + offset < 1 << 52:
        where = f"init_top_pgt {symbol[:80]!a} and phys_base {base[:80]!a}"
        problems.append(f"VMCOREINFO's {where} are no physical address: the kernel's root is left out")
        return
    format_ = "x86-64-5" if values.get("NUMBER(pgtable_l5_enabled)") == "1" else "x86-64"
    yield Root("kernel", format_, address + offset)


# --------------------------------------------------------------------------- writing


def prologue(
    ranges: list[tuple[int, int]], roots: list[Root], kernel: str, configuration: str,
    views: Sequence[tuple[int, int, int]] = (),
) -> tuple[bytes, list[int]]:  # fmt: skip
    """What stands before the memory in a core with one PT_LOAD for each range, and the file offset of each range.

    ranges: (start, end) of physical memory, multiples of 4096, fewer than PN_XNUM of them. The others go into a note.
    views: (virtual address, physical address, bytes) of segments over the same bytes of the file, each within a range,
    or outside all of them: over what stands behind the last one.
    """
    lines = [f"OSRELEASE={kernel}", f"CONFIGURATION={configuration}"]
    lines += [f"{root.name} {root.format} {root.address:#x}" for root in roots]
    text = "".join(f"{line}\n" for line in lines).encode()
    note = _NOTE.pack(6, len(text), _PGEMU_ROOTS) + b"pgemu\0\0\0" + text + bytes(-len(text) % 4)
    count = len(ranges) + len(views) + 1
    note_at = _HEADER.size + count * _PROGRAM.size
    at = note_at + len(note) + (-(note_at + len(note)) % PAGE)
    ident = MAGIC + bytes((_CLASS_64, _LITTLE_ENDIAN, 1)) + bytes(9)
    parts = [
        _HEADER.pack(ident, _CORE, _X86_64, 1, 0, _HEADER.size, 0, 0, _HEADER.size, _PROGRAM.size, count, 0, 0, 0),
        _PROGRAM.pack(_NOTES, 0, note_at, 0, 0, len(note), len(note), 4),
    ]
    offsets = []
    for start, end in ranges:
        size = end - start
        parts.append(_PROGRAM.pack(_LOAD, 0b110, at, DIRECT_MAP + start, start, size, size, PAGE))
        offsets.append(at)
        at += size
    starts = [start for start, _ in ranges]
    for virtual, physical, size in views:
        within = bisect_right(starts, physical) - 1
        is_held = within >= 0 and physical < ranges[within][1]
        place = offsets[within] + physical - starts[within] if is_held else at
        parts.append(_PROGRAM.pack(_LOAD, 0b110, place, virtual, physical, size, size, PAGE))
    return b"".join(parts) + note, offsets
