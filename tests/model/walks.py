"""Walks as the manuals tell them, one entry after the other, on Python integers. Shares nothing with the kernels.

Intel SDM volume 3 ("4-Level Paging", "EPT Violations"), AMD APM 15.25, Arm DDI 0487 (stage 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Read = Callable[[int], int | None]
OK, NOT_PRESENT, RESERVED, PERMISSION, KEY, MISCONFIGURED, ACCESS_FLAG, NOT_CANONICAL, SIZE, OUTSIDE = range(10)


def bit(value: int, n: int) -> bool:
    return bool(value >> n & 1)


def any_bit(value: int, low: int, high: int) -> bool:
    return any(bit(value, n) for n in range(low, high + 1))


@dataclass
class Outcome:
    status: int = OK
    level: int = 0
    physical: int = 0
    error: int = 0
    reads: list[int] = field(default_factory=list)
    updates: list[tuple[int, int]] = field(default_factory=list)  # address, bits to set
    user: bool = False


@dataclass(frozen=True)
class Format:
    """Parameters of a format: kind is x86, npt, ept or arm."""

    kind: str
    levels: int
    bits: int
    maxphyaddr: int = 52
    nx: bool = True
    pages_1g: bool = True
    amd: bool = False
    accessed_dirty: bool = True
    execute_only: bool = True
    mode_based: bool = False
    root_bits: int = 9


def address_refused(fmt: Format, address: int) -> int:
    if fmt.kind == "x86":
        high = address >> (fmt.bits - 1)
        return OK if high in (0, (1 << (65 - fmt.bits)) - 1) else NOT_CANONICAL
    return OK if address >> fmt.bits == 0 else SIZE


def is_leaf(fmt: Format, entry: int, level: int) -> bool:
    if fmt.kind == "arm":
        return bit(entry, 1) if level == 1 else level <= 3 and not bit(entry, 1)
    return level == 1 or (level <= (3 if fmt.pages_1g else 2) and bit(entry, 7))


def present(fmt: Format, entry: int) -> bool:
    if fmt.kind == "ept":
        return any_bit(entry, 0, 2) or (fmt.mode_based and bit(entry, 10))
    return bit(entry, 0)


def wrong_form(fmt: Format, entry: int, level: int) -> bool:
    """An entry that says it is a leaf where there can be none, or no page at the last level."""
    if fmt.kind == "arm":
        return not bit(entry, 1) and level in (1, 4)
    return bit(entry, 7) and level >= (4 if fmt.pages_1g else 3)


def x86_reserved(fmt: Format, entry: int, level: int) -> bool:
    leaf = is_leaf(fmt, entry, level)
    if any_bit(entry, fmt.maxphyaddr, 51) or (bit(entry, 63) and not fmt.nx) or wrong_form(fmt, entry, level):
        return True
    if (fmt.amd or fmt.kind == "npt") and level >= 3 and not leaf and bit(entry, 8):
        return True
    return leaf and level > 1 and any_bit(entry, 13, 20 if level == 2 else 29)


def ept_misconfigured(fmt: Format, entry: int, level: int) -> bool:
    low = entry & 7
    if low in (2, 6) or (low == 4 and not fmt.execute_only) or any_bit(entry, fmt.maxphyaddr, 51):
        return True
    if not is_leaf(fmt, entry, level):
        return any_bit(entry, 3, 7 if level >= 4 else 6)
    return (entry >> 3 & 7) in (2, 3, 7) or (level > 1 and any_bit(entry, 12, 20 if level == 2 else 29))


def x86_error(status: int, fmt: Format, write: bool, user: bool, fetch: bool, denied: bool, smep: bool) -> int:
    if status in (OK, NOT_CANONICAL, OUTSIDE):
        return 0
    error = 2 * write + 4 * user + 16 * (fetch and (fmt.nx or smep))
    error += status in (RESERVED, PERMISSION, KEY)
    return error + 8 * (status == RESERVED) + 32 * denied


def key_denies(registers: Any, entry: int, page_user: bool, write: bool, user: bool) -> bool:
    enabled, register = (registers.pke, registers.pkru) if page_user else (registers.pks, registers.pkrs)
    key = entry >> 59 & 15
    if not enabled:
        return False
    if bit(register, 2 * key):
        return True
    return write and (user or registers.write_protect) and bit(register, 2 * key + 1)


def finish_x86(fmt: Format, out: Outcome, entries: list[int], kind: int, registers: Any, table: bool) -> None:
    """Rights and error of an x86 or NPT walk; `table`: the nested access is one to a guest's table."""
    write, fetch, user = kind % 3 == 1, kind % 3 == 2, kind >= 3
    denied = False
    nested = fmt.kind == "npt"
    if nested:
        user = True
    if out.status == OK:
        writable = all(bit(entry, 1) for entry in entries)
        out.user = all(bit(entry, 2) for entry in entries)
        executable = not any(bit(entry, 63) for entry in entries)
        fails = user and not out.user
        if fetch:
            fails |= not executable or (not user and registers.smep and out.user)
        elif not user:
            fails |= registers.smap and not registers.ac and out.user
        if write and (user or registers.write_protect):
            fails |= not writable
        if not nested and not fetch:
            denied = key_denies(registers, entries[-1], out.user, write, user)
        out.status = PERMISSION if fails else KEY if denied else OK
    out.error = x86_error(out.status, fmt, write, user, fetch, denied, registers.smep and not nested)
    if nested and out.status not in (OK, OUTSIDE):
        out.error += 1 << (33 if table else 32)
    if out.status == OK and registers.update:
        for n, address in enumerate(out.reads, 1):
            out.updates.append((address, 0x60 if write and n == len(out.reads) else 0x20))


def finish_ept(fmt: Format, out: Outcome, entries: list[int], kind: int, registers: Any, table: bool) -> None:
    write, fetch, user = kind % 3 == 1, kind % 3 == 2, kind >= 3
    rights = 0x7 | 1 << 10
    for entry in entries:
        rights &= entry
    if out.status == SIZE:
        rights = 0
    if out.status == OK:
        wanted = 2 if write else (10 if user and fmt.mode_based else 2) if fetch else 0
        out.status = OK if bit(rights, 1 if write else wanted) else PERMISSION
    if out.status not in (OK, OUTSIDE, MISCONFIGURED):
        out.error = (2 if write else 4 if fetch else 1) + 128 + (0 if table else 256) + (rights & 7) * 8
        out.error += 64 * (fmt.mode_based and bit(rights, 10))
    if out.status == OK and registers.update and fmt.accessed_dirty:
        for n, address in enumerate(out.reads, 1):
            out.updates.append((address, 0x300 if write and n == len(out.reads) else 0x100))


def finish_arm(fmt: Format, out: Outcome, entries: list[int], kind: int, registers: Any, table: bool) -> None:
    write, fetch, user = kind % 3 == 1, kind % 3 == 2, kind >= 3
    hardware_dirty = registers.hardware_dirty and registers.update and write
    if out.status == OK:
        leaf = entries[-1]
        writable = bit(leaf, 7) or (hardware_dirty and bit(leaf, 51))
        xn = leaf >> 53 & 3
        executable = xn in ((0, 1) if user else (0, 3)) if registers.xnx else not bit(leaf, 54)
        allowed = executable if fetch else writable if write else bit(leaf, 6)
        if not fmt.accessed_dirty and not bit(leaf, 10):
            out.status = ACCESS_FLAG
        elif not allowed:
            out.status = PERMISSION
        elif registers.update:
            bits = (0x400 if fmt.accessed_dirty else 0) | (0x80 if hardware_dirty and bit(leaf, 51) else 0)
            out.updates.append((out.reads[-1], bits))
    if out.status not in (OK, OUTSIDE):
        base = {PERMISSION: 0b1100, ACCESS_FLAG: 0b1000}.get(out.status, 0b0100)
        out.error = base + (0 if out.status == SIZE else 4 - out.level) + 64 * write + 128 * table


FINISH = {"x86": finish_x86, "npt": finish_x86, "ept": finish_ept, "arm": finish_arm}


def walk(
    fmt: Format, read: Read, root: int, address: int, kind: int, registers: Any, *, table: bool = False
) -> Outcome:
    """One walk of an access; `registers` None: a plain walk, present and leaf only."""
    out = Outcome(status=address_refused(fmt, address), level=fmt.levels)
    entries: list[int] = []
    at = root
    mask = (1 << (48 if fmt.kind == "arm" else 52)) - 4096
    while out.status == OK:
        width = fmt.root_bits if out.level == fmt.levels else 9
        where = at + 8 * (address >> (12 + 9 * (out.level - 1)) & (1 << width) - 1)
        entry = read(where)
        if entry is None:
            out.status = OUTSIDE
            break
        out.reads.append(where)
        entries.append(entry)
        out.status = judge(fmt, entry, out.level, registers is None)
        if out.status != OK or is_leaf(fmt, entry, out.level):
            break
        at = entry & mask
        out.level -= 1
    if registers is not None:
        FINISH[fmt.kind](fmt, out, entries, kind, registers, table)
    elif out.status in (MISCONFIGURED, OUTSIDE, NOT_CANONICAL):
        out.error = 0
    elif out.status != OK:
        out.error = -1  # of a plain walk nobody asks
    if out.status == OK:
        offset = (1 << (12 + 9 * (out.level - 1))) - 1
        out.physical = entries[-1] & mask & ~offset | address & offset
    return out


def judge(fmt: Format, entry: int, level: int, plain: bool) -> int:
    if not present(fmt, entry):
        return NOT_PRESENT
    if plain:
        wrong = wrong_form(fmt, entry, level)
        return (MISCONFIGURED if fmt.kind == "ept" else RESERVED) if wrong else OK
    if fmt.kind == "ept":
        return MISCONFIGURED if ept_misconfigured(fmt, entry, level) else OK
    if fmt.kind == "arm":
        return RESERVED if wrong_form(fmt, entry, level) else OK
    return RESERVED if x86_reserved(fmt, entry, level) else OK


@dataclass
class NestedOutcome:
    status: int = OK
    stage: int = 0  # 1 guest, 2 guest table through stage 2, 3 final address through stage 2
    guest_level: int = 0
    host_level: int = 0
    physical: int = 0
    error: int = 0
    fault: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)  # address, stage
    updates: list[tuple[int, int, int]] = field(default_factory=list)  # address, bits, stage


class Nested:
    """A guest's walk over stage 2; memory is read and written by host physical address."""

    def __init__(self, guest: Format, stage2: Format, read: Read, write: Callable[[int, int], None]) -> None:
        self.guest, self.stage2, self.read, self.write = guest, stage2, read, write

    def host(self, out: NestedOutcome, root: int, gpa: int, kind: int, registers: Any, table: bool) -> Outcome:
        """Stage 2 of one address; its own updates happen at once."""
        found = walk(self.stage2, self.read, root, gpa, kind, registers, table=table)
        out.reads += [(address, 2) for address in found.reads]
        if found.status != OK:
            out.status, out.stage, out.fault = found.status, 2 if table else 3, gpa
            out.error, out.host_level = found.error, found.level
        return found

    def apply(self, out: NestedOutcome, updates: list[tuple[int, int]], stage: int) -> None:
        for address, bits in updates:
            old = self.read(address)
            assert old is not None
            if old | bits != old:
                self.write(address, old | bits)
                out.updates.append((address, bits & ~old, stage))

    def translate(self, roots: tuple[int, int], address: int, kind: int, registers: Any) -> NestedOutcome:
        out = NestedOutcome()
        table_kind = 1 if self.stage2.kind == "npt" or (self.stage2.kind == "ept" and self.stage2.accessed_dirty) else 0
        places: list[tuple[int, int]] = []
        level = self.guest.levels

        def read_guest(gpa: int) -> int | None:
            nonlocal level
            out.guest_level = level
            level -= 1
            found = self.host(out, roots[1], gpa, table_kind, registers, True)
            if found.status != OK:
                raise StageTwoError
            value = self.read(found.physical)
            if value is None:
                out.status, out.stage, out.fault, out.host_level = OUTSIDE, 2, gpa, found.level
                raise StageTwoError
            self.apply(out, found.updates, 2)
            out.reads.append((found.physical, 1))
            places.append((gpa, found.physical))
            return value

        try:
            found = walk(self.guest, read_guest, roots[0], address, kind, registers)
        except StageTwoError:
            return out
        out.guest_level = found.level
        if found.status != OK:
            out.status, out.stage, out.error, out.fault = found.status, 1, found.error, address
            return out
        self.finish(out, found, places, roots[1], kind, table_kind, registers)
        return out

    def finish(self, out: NestedOutcome, found: Outcome, places: list[tuple[int, int]], root: int, kind: int,
               table_kind: int, registers: Any) -> None:  # fmt: skip
        """Whether the guest's entries may be written, the final translation, then all updates."""
        level = self.guest.levels
        writes = []
        quiet = NestedOutcome()
        for (gpa, host), (_, bits) in zip(places, found.updates, strict=False):
            value = self.read(host)
            assert value is not None
            if value | bits != value:
                again = self.host(quiet, root, gpa, 1, registers, True) if table_kind == 0 else Outcome()
                if again.status != OK:
                    out.status, out.stage, out.fault = again.status, 2, gpa
                    out.error, out.guest_level, out.host_level = again.error, level, again.level
                    return
                writes.append((host, bits, again.updates))
            level -= 1
        last = self.host(out, root, found.physical, kind % 3 + 3 * found.user, registers, False)
        if last.status != OK:
            return
        out.physical, out.host_level = last.physical, last.level
        self.apply(out, last.updates, 2)
        for _, _, updates in writes:
            self.apply(out, updates, 2)
        for host, bits, _ in writes:
            self.apply(out, [(host, bits)], 1)


class StageTwoError(Exception):
    """A guest's table could not be read."""
