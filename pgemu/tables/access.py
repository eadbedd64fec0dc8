"""What an access asks of a walk: its kind, the control registers, and the rows of words made of both."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from pgemu.machine.arguments import guards_creation
from pgemu.machine.field_rules import amount
from pgemu.machine.short import changed
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits
from pgemu_kernels.formats.page_format import ALL, ARM_DIRTY_MODIFIER, ARM_WRITE, Family

__all__ = ("Access", "Kind", "rows_of")

Array = np.ndarray[Any, Any]
EPT_READ, EPT_WRITE, EPT_FETCH = 1, 2, 4  # rights, and the low bits of the exit qualification
EPT_LINEAR_VALID = 1 << 7
EPT_FINAL = 1 << 8
NPF_FINAL = 1 << 32
NPF_TABLE = 1 << 33
ARM_READ = 1 << 6
ARM_EL1_EXECUTE = 1 << 53  # after folding and inverting the two bits of XN
ARM_EL0_EXECUTE = 1 << 54
ARM_WNR = 1 << 6  # of the fault word: a write
ARM_S1PTW = 1 << 7  # ... while reading a table of stage 1
ARM_ACCESS_FLAG = 1 << 10
_KEYS = amount(0, (1 << 32) - 1, "two bits for each of 16 keys, an integer from 0 to 2**32 - 1")
VTD_NO_WRITE, VTD_NO_READ = 5, 6  # drivers/iommu/intel/dmar.c:dma_remap_fault_reasons[]
AMD_RW = 1 << 5  # drivers/iommu/amd/amd_iommu_types.h:EVENT_FLAG_RW
PF_WRITE, PF_USER, PF_FETCH = 1 << 1, 1 << 2, 1 << 4


class Kind(IntEnum):
    """What an access is; the codes are those of the `kinds` arrays.

    A walk without an access (present or not, no rights, no accessed bits) is None in Python; in numba and C, which have
    no None, it is kernels.PLAIN and PGEMU_KIND_PLAIN, 8, and no member here.
    """

    READ = 0
    WRITE = 1
    FETCH = 2
    USER_READ = 3
    USER_WRITE = 4
    USER_FETCH = 5


class _Ask(NamedTuple):
    """One access row before it is one: what does not depend on levels."""

    need: int = 0
    forbid: int = 0
    keys_user: int = 0
    keys_supervisor: int = 0
    error: int = 0
    writes: bool = False


class _Format:
    """The words of a format's row that access rows are made of."""

    def __init__(self, row: Array) -> None:
        words = [int(word) for word in row]
        self.family = Family(words[int(W.F_FAMILY)])
        self.present = words[int(W.F_PRESENT)]
        self.address = words[int(W.F_ADDRESS)]
        self.levels = words[int(W.F_LEVELS)]
        self.largest_leaf = words[int(W.F_LARGEST_LEAF)]
        self.leaf = words[int(W.F_LEAF_MASK)], words[int(W.F_LEAF_VALUE)]
        self.page = words[int(W.F_PAGE_MASK)], words[int(W.F_PAGE_VALUE)]
        self.reserved_leaf = [words[int(W.F_RESERVED_LEAF) + level] for level in range(6)]
        self.reserved_table = [words[int(W.F_RESERVED_TABLE) + level] if level > 1 else 0 for level in range(7)]
        self.sized = words[int(W.F_SIZED_MASK)]
        self.table_level = words[int(W.F_TABLE_LEVEL)]
        self.rights = words[int(W.F_READ)], words[int(W.F_WRITE)]
        self.invert = words[int(W.F_INVERT)]
        self.fold = words[int(W.F_FOLD)]
        self.table_rights = words[int(W.F_TABLE_RIGHTS)]
        self.bad_low = words[int(W.F_BAD_LOW)]
        self.bad_memory_type = words[int(W.F_BAD_MEMORY_TYPE)]
        self.accessed = words[int(W.F_ACCESSED)]
        self.dirty = words[int(W.F_DIRTY)]
        self.key_shift = words[int(W.F_KEY_SHIFT)]
        self.leaf_4k = words[int(W.F_LEAF_4K)]


@guards_creation(pkru=_KEYS, pkrs=_KEYS)
@dataclass(frozen=True)
class Access:
    """Control registers that decide what an access may do; defaults are those of Linux on a current processor.

    write_protect: CR0.WP. smep, smap: CR4. ac: EFLAGS.AC, which suspends SMAP. pke, pkru: CR4.PKE and PKRU;
    pks, pkrs: CR4.PKS and IA32_PKRS; a key k has its access-disable bit at 2k and its write-disable bit at 2k + 1.
    EFER.NXE is a parameter of the format (it makes bit 63 reserved), as are EPT accessed and dirty flags,
    mode-based execute control, and Arm's hardware access flag.
    hardware_dirty: Arm HD, hardware update of dirty state through DBM. xnx: FEAT_XNX; without it bit 53 is
    ignored. update: let the hardware set accessed and dirty bits, as far as the format has it do so.
    table_fault_reads: a violation at a guest table under EPT with accessed and dirty flags sets the read bit
    beside the write bit, as SDM "EPT Violations" has it; the captured 7.3 kernel's model sets only the write bit.

    >>> Access(), Access(smap=False, pke=True, pkru=4)
    (Access(), Access(smap=False, pke=True, pkru=4))
    """

    write_protect: bool = True
    smep: bool = True
    smap: bool = True
    ac: bool = False
    pke: bool = False
    pkru: int = 0
    pks: bool = False
    pkrs: int = 0
    hardware_dirty: bool = False
    xnx: bool = True
    update: bool = True
    table_fault_reads: bool = False

    def __repr__(self) -> str:
        return changed(self)

    def _rows(self, format_row: Array, ram_bytes: int) -> Array:
        """uint64[ACCESS_ROWS * X_WORDS]: the access rows of a format (uint64[F_WORDS]), by `Kind`.

        The last two are a nested walk's reading and writing of guest tables (zero for a process's format).
        `ram_bytes`: size of the machine's metadata zone; an entry that points beyond it gets a closer look.
        """
        fmt = _Format(format_row)
        asks = {
            Family.X86: self._x86, Family.NPT: self._npt, Family.EPT: self._ept, Family.ARM64: self._arm64,
            Family.VTD: self._device, Family.AMD_IOMMU: self._device,
        }  # fmt: skip
        rows = np.zeros((W.ACCESS_ROWS, W.X_WORDS), np.uint64)
        for row, ask in zip(rows, asks[fmt.family](fmt), strict=False):
            self._fill(row, fmt, ask)
            _fill_masks(row, fmt, ram_bytes)
        return rows.reshape(-1)

    def _fill(self, row: Array, fmt: _Format, ask: _Ask) -> None:
        arm = fmt.family == Family.ARM64
        set_table = 0 if arm else fmt.accessed
        set_leaf = fmt.accessed | (fmt.dirty if ask.writes and not arm else 0)
        dirty_state = self.hardware_dirty and arm and ask.writes
        words = {
            W.X_NEED: ask.need,
            W.X_FORBID: ask.forbid,
            W.X_KEYS_USER: ask.keys_user,
            W.X_KEYS_SUPERVISOR: ask.keys_supervisor,
            W.X_USER: bits.USER if fmt.key_shift else 0,
            W.X_ERROR: ask.error,
            W.X_SET_TABLE: set_table if self.update else 0,
            W.X_SET_LEAF: set_leaf if self.update else 0,
            W.X_FLAG: ARM_ACCESS_FLAG if arm and not fmt.accessed else 0,
            W.X_DIRTY_IF: ARM_DIRTY_MODIFIER if dirty_state and self.update else 0,
            W.X_DIRTY_GIVES: ARM_WRITE if dirty_state and self.update else 0,
            # Arm's are RES0: software must not set them, hardware does not look.
            W.X_RESERVED: 0 if arm else ALL,
        }
        for word, value in words.items():
            row[word] = value

    def _keys(self, fmt: _Format, write: bool, user: bool) -> tuple[int, int]:
        """Keys that deny a data access to a user page and to a supervisor page. SDM "Protection Keys"."""
        if not fmt.key_shift:
            return 0, 0
        writes_checked = write and (user or self.write_protect)
        denied = []
        for enabled, register in ((self.pke, self.pkru), (self.pks, self.pkrs)):
            keys = 0
            for key in range(16 if enabled else 0):
                disabled = register >> 2 * key & 0b11
                keys |= (disabled & 1 | (disabled >> 1 if writes_checked else 0)) << key
            denied.append(keys)
        return denied[0], denied[1]

    def _x86(self, fmt: _Format) -> list[_Ask]:
        no_execute = not fmt.reserved_leaf[1] & bits.NO_EXECUTE
        asks = []
        for user in (False, True):
            for kind in (Kind.READ, Kind.WRITE, Kind.FETCH):
                need = bits.USER if user else 0
                forbid = bits.USER if not user and self.smap and not self.ac else 0
                error = PF_USER if user else 0
                if kind == Kind.FETCH:
                    need |= bits.NO_EXECUTE if no_execute else 0
                    forbid = bits.USER if not user and self.smep else 0
                    error |= PF_FETCH if no_execute or self.smep else 0
                    asks.append(_Ask(need, forbid, error=error))
                    continue
                write = kind == Kind.WRITE
                if write:
                    need |= bits.WRITE if user or self.write_protect else 0
                    error |= PF_WRITE
                keys = self._keys(fmt, write, user)
                asks.append(_Ask(need, forbid, *keys, error=error, writes=write))
        return asks

    def _npt(self, fmt: _Format) -> list[_Ask]:
        """Every nested access counts as a user's; guest tables are read with intent to write. APM 15.25."""
        no_execute = not fmt.reserved_leaf[1] & bits.NO_EXECUTE
        fetch = bits.NO_EXECUTE if no_execute else 0
        three = [
            _Ask(bits.USER, error=PF_USER | NPF_FINAL),
            _Ask(bits.USER | bits.WRITE, error=PF_USER | PF_WRITE | NPF_FINAL, writes=True),
            _Ask(bits.USER | fetch, error=PF_USER | (PF_FETCH if no_execute else 0) | NPF_FINAL),
        ]
        table = _Ask(bits.USER | bits.WRITE, error=PF_USER | PF_WRITE | NPF_TABLE, writes=True)
        return [*three, *three, table, table]

    def _ept(self, fmt: _Format) -> list[_Ask]:
        """SDM "EPT Violations": with accessed and dirty flags, reading a guest table counts as a write."""
        final = EPT_LINEAR_VALID | EPT_FINAL
        user_execute = bits.EPT_USER_EXECUTE if fmt.present & bits.EPT_USER_EXECUTE else EPT_FETCH
        asks = [
            _Ask(need, error=code | final, writes=code == EPT_WRITE)
            for execute in (EPT_FETCH, user_execute)
            for need, code in ((EPT_READ, EPT_READ), (EPT_WRITE, EPT_WRITE), (execute, EPT_FETCH))
        ]
        both = EPT_WRITE | (EPT_READ if self.table_fault_reads else 0)
        write = _Ask(EPT_WRITE, error=EPT_WRITE | EPT_LINEAR_VALID, writes=True)
        walk_writes = _Ask(EPT_WRITE, error=both | EPT_LINEAR_VALID, writes=True)
        walk_reads = _Ask(EPT_READ, error=EPT_READ | EPT_LINEAR_VALID)
        return [*asks, walk_writes, walk_writes] if fmt.accessed else [*asks, walk_reads, write]

    def _arm64(self, fmt: _Format) -> list[_Ask]:
        """Arm DDI 0487, stage 2 permissions. Execution asks for XN alone, not for read (inference)."""
        executes = (ARM_EL1_EXECUTE, ARM_EL0_EXECUTE) if self.xnx else (ARM_EL0_EXECUTE, ARM_EL0_EXECUTE)
        asks = []
        for execute in executes:
            asks += [_Ask(ARM_READ), _Ask(ARM_WRITE, error=ARM_WNR, writes=True), _Ask(execute)]
        table_write = _Ask(ARM_WRITE, error=ARM_WNR | ARM_S1PTW, writes=True)
        return [*asks, _Ask(ARM_READ, error=ARM_S1PTW), table_write]

    def _device(self, fmt: _Format) -> list[_Ask]:
        """A device reads and writes; nothing else is known of it. VT-d: fault reasons; AMD: RW of the event's flags."""
        read, write = (VTD_NO_READ, VTD_NO_WRITE) if fmt.family == Family.VTD else (0, AMD_RW)
        return [_Ask(fmt.rights[0], error=read), _Ask(fmt.rights[1], error=write, writes=True)]


_rows_made: dict[tuple[bytes, int, bool, Access | None], Array] = {}
_ROWS_KEPT = 256


def rows_of(format_row: Array, ram_bytes: int, access: Access | None, *, plain: bool) -> Array:
    """uint64[ACCESS_ROWS * X_WORDS]: access rows, made once for each format (uint64[F_WORDS]) and `access`, by `Kind`.

    Entries only read them. `plain`: one row that asks for nothing, whatever `access` is. `ram_bytes`: see Access._rows.
    """
    key = format_row.tobytes(), ram_bytes, plain, access
    rows = _rows_made.get(key)
    if rows is None:
        rows = _plain_rows(format_row, ram_bytes) if plain else (access or Access())._rows(format_row, ram_bytes)
        if len(_rows_made) >= _ROWS_KEPT:
            _rows_made.clear()
        _rows_made[key] = rows
    return rows


def _plain_rows(format_row: Array, ram_bytes: int) -> Array:
    """Access rows, one, that ask for nothing: only present or not, leaf or table."""
    row = np.zeros(W.X_WORDS, np.uint64)
    _fill_masks(row, _Format(format_row), ram_bytes)
    return row


def _fill_masks(row: Array, fmt: _Format, ram_bytes: int) -> None:
    """The masks that an entry which passes at one look has (X_TABLE_MASK and its neighbours).

    They may refuse an entry that is fine after all, as `walks.walk` will find; they never pass one that is not.
    """
    need = int(row[W.X_NEED])
    reserved = int(row[W.X_RESERVED])
    # One bit of those that make an entry present; in EPT it is R, without which W is a misconfiguration.
    present = fmt.present & -fmt.present
    if fmt.family == Family.EPT and need & (EPT_FETCH | bits.EPT_USER_EXECUTE):
        # Which of the two counts is known only after the guest's walk.
        need |= EPT_FETCH | bits.EPT_USER_EXECUTE & fmt.present
    for level in range(2, min(fmt.levels, 5) + 1):
        rights = need & ~fmt.table_rights
        ones = present | rights & ~fmt.invert | int(row[W.X_SET_TABLE]) | fmt.leaf[0] & ~fmt.leaf[1]
        if fmt.table_level:
            # Which level a table is of tells it from a leaf.
            ones = ones & ~fmt.sized | level - 1 << fmt.table_level
        far = fmt.address & ALL << (ram_bytes.bit_length() - 1)
        zeroes = rights & fmt.invert | fmt.leaf[1] | fmt.reserved_table[level] & reserved | far | fmt.sized & ~ones
        _set_mask(row, int(W.X_TABLE_MASK) + level, int(W.X_TABLE_VALUE) + level, ones, zeroes)
    for level in range(1, min(fmt.largest_leaf, 3) + 1):
        ones, zeroes = _leaf_bits(row, fmt, level, need)
        ones |= present
        _set_mask(row, int(W.X_LEAF_MASK) + level, int(W.X_LEAF_VALUE) + level, ones, zeroes)
    for level in range(fmt.largest_leaf + 1, 4):
        row[W.X_LEAF_VALUE + np.uint64(level)] = 1  # of a mask of none: never


def _leaf_bits(row: Array, fmt: _Format, level: int, need: int) -> tuple[int, int]:
    """Bits that must be 1 and bits that must be 0 in a leaf that passes at one look."""
    mask, value = fmt.page if level == 1 else fmt.leaf
    reserved = int(row[W.X_RESERVED])
    ones = need & ~fmt.invert | int(row[W.X_SET_LEAF]) | int(row[W.X_FLAG]) | value
    mask |= fmt.sized  # a leaf whose size is in its address gets a closer look
    zeroes = need & fmt.invert | int(row[W.X_FORBID]) | fmt.reserved_leaf[level] & reserved | mask & ~value
    if need & fmt.invert & (fmt.fold | fmt.fold << 1):
        zeroes |= fmt.fold | fmt.fold << 1
    if fmt.bad_memory_type and reserved:
        ones |= fmt.leaf_4k & 0b111 << 3
        zeroes |= ~fmt.leaf_4k & 0b111 << 3
    keys = int(row[W.X_KEYS_USER]) | int(row[W.X_KEYS_SUPERVISOR])
    if keys:
        zeroes |= 0b1111 << fmt.key_shift
    # With key 0 denied no leaf passes: a bit is asked to be 1 and 0.
    return (ones | 1 << fmt.key_shift if keys & 1 else ones), zeroes


def _set_mask(row: Array, mask: int, value: int, ones: int, zeroes: int) -> None:
    never = bool(ones & zeroes)
    row[mask] = 0 if never else ones | zeroes
    row[value] = 1 if never else ones
