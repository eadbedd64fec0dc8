"""Translate addresses: what an access asks of a walk, and what a walk gives back.

>>> from pgemu import Config, Machine
>>> from pgemu.tables.translation import Access, Kind, translate
>>> machine = Machine(Config("pfnmap", pool=4 << 30))
>>> gmem = machine.create_guest_memfd(4 << 30, shared=True)
>>> process = machine.create_process()
>>> process.mmap(gmem, 0x7F00_0000_0000).status, process.touch(0x7F00_0000_1234).status
(0, 256)
>>> found = translate(machine, 0, process.root, [0x7F00_0000_1234, 0x7F00_0000_2000], Kind.USER_WRITE, Access())
>>> found.status.tolist(), found.level.tolist(), [hex(error) for error in found.error.tolist()]
([0, 1], [1, 1], ['0x0', '0x6'])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu.machine.columns import addresses_of
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits
from pgemu_kernels.formats.page_format import ALL, ARM_DIRTY_MODIFIER, ARM_WRITE, Family
from pgemu_kernels.words.table_words import WalkStage, WalkStatus

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("Access", "Kind", "NestedTranslation", "References", "Translation", "WalkStage", "WalkStatus",
           "translate", "translate_nested")  # fmt: skip

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
PF_WRITE, PF_USER, PF_FETCH = 1 << 1, 1 << 2, 1 << 4


class Kind(IntEnum):
    """What an access is; the codes are those of the `kinds` arrays."""

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
        self.reserved_table = [words[int(W.F_RESERVED_TABLE) + level] if level > 1 else 0 for level in range(6)]
        self.invert = words[int(W.F_INVERT)]
        self.fold = words[int(W.F_FOLD)]
        self.table_rights = words[int(W.F_TABLE_RIGHTS)]
        self.bad_low = words[int(W.F_BAD_LOW)]
        self.bad_memory_type = words[int(W.F_BAD_MEMORY_TYPE)]
        self.accessed = words[int(W.F_ACCESSED)]
        self.dirty = words[int(W.F_DIRTY)]
        self.key_shift = words[int(W.F_KEY_SHIFT)]
        self.leaf_4k = words[int(W.F_LEAF_4K)]


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

    def rows(self, format_row: Array, ram_bytes: int) -> Array:
        """uint64[ACCESS_ROWS * X_WORDS]: the access rows of a format (uint64[F_WORDS]), by `Kind`.

        The last two are a nested walk's reading and writing of guest tables (zero for a process's format).
        `ram_bytes`: size of the machine's metadata zone; an entry that points beyond it gets a closer look.
        """
        fmt = _Format(format_row)
        asks = {Family.X86: self._x86, Family.NPT: self._npt, Family.EPT: self._ept, Family.ARM64: self._arm64}
        if fmt.family not in asks:
            raise ValueError(f"accesses through {fmt.family.name} tables: not modelled, expected no kinds of access")
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
    for level in range(2, fmt.levels + 1):
        rights = need & ~fmt.table_rights
        ones = present | rights & ~fmt.invert | int(row[W.X_SET_TABLE]) | fmt.leaf[0] & ~fmt.leaf[1]
        far = fmt.address & ALL << (ram_bytes.bit_length() - 1)
        zeroes = rights & fmt.invert | fmt.leaf[1] | fmt.reserved_table[level] & reserved | far
        _set_mask(row, int(W.X_TABLE_MASK) + level, int(W.X_TABLE_VALUE) + level, ones, zeroes)
    for level in range(1, fmt.largest_leaf + 1):
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


class References(NamedTuple):
    """Entries read and written by each walk, in order: what a cache or TLB simulator feeds on.

    reads: uint64[n, k], physical addresses of entries, k the most that any walk read; of row i the first
    `read_counts[i]` count (uint8[n]). writes, write_counts: the same of the 8-byte writes of accessed and dirty
    bits. The stages (uint8, shaped like the addresses) are those of a nested walk: 1 an entry of the guest's,
    2 one of stage 2; 0 in a walk of one stage.
    """

    reads: Array
    read_counts: Array
    writes: Array
    write_counts: Array
    read_stages: Array
    write_stages: Array


class Translation(NamedTuple):
    """What a batch of walks gave, in the order of the addresses.

    physical: uint64[n], 0 on failure. status: uint8[n], `WalkStatus`. level: uint8[n], of the leaf or of the
    entry at fault (the top level where the address itself is refused). error: uint64[n], the error word: x86
    page-fault error code; EPT exit qualification; NPT EXITINFO1; Arm DFSC[5:0], WnR in bit 6, S1PTW in bit 7;
    0 for a general protection fault, an EPT misconfiguration and OUTSIDE_MEMORY. references: if asked for.
    """

    physical: Array
    status: Array
    level: Array
    error: Array
    references: References | None = None


def _kinds(kinds: int | Sequence[int] | Array, count: int) -> Array:
    """The codes as uint8[1] or uint8[n]. ValueError for others."""
    given = np.atleast_1d(np.asarray(kinds))
    if given.size not in (1, count):
        raise ValueError(f"{given.size} kinds of access: expected {count} or 1")
    if given.size and given.dtype.kind not in "ui":
        raise ValueError(f"kinds of access of {given.dtype}: expected integers")
    if given.size and not (given.min() >= Kind.READ and given.max() <= Kind.USER_FETCH):
        raise ValueError(f"kind of access {given.max()}: expected {int(Kind.READ)} to {int(Kind.USER_FETCH)}")
    return np.ascontiguousarray(given, np.uint8)


def _checked_root(root: int) -> np.uint64:
    if not 0 <= root < 1 << 52 or root % W.PAGE_4K:
        raise ValueError(f"root {root:#x}: expected the physical address of a page")
    return np.uint64(root)


def _outputs(count: int, reads: int, writes: int, wanted: bool) -> tuple[Array, Array, Array]:
    """Lists of references as kernels fill them: reads, writes, and how many there are of each."""
    room = count if wanted else 0
    return np.zeros(room * reads, np.uint64), np.zeros(room * writes, np.uint64), np.zeros(room * 2, np.uint64)


def _unpack(lists: Array, counts: Array) -> tuple[Array, Array]:
    """Addresses and stages of lists as kernels fill them (the stage in the low bits), as wide as the longest."""
    used = lists[:, : int(counts.max(initial=0))]
    stages = np.bitwise_and(used, np.uint64(7), out=np.empty(used.shape, np.uint8), casting="unsafe")
    return used & ~np.uint64(7), stages


def _references(reads: Array, writes: Array, counts: Array, count: int) -> References:
    """Lists as kernels fill them as `References`."""
    read_counts, write_counts = counts[0::2], counts[1::2]
    read, read_stages = _unpack(reads.reshape(count, reads.size // max(count, 1)), read_counts)
    written, write_stages = _unpack(writes.reshape(count, writes.size // max(count, 1)), write_counts)
    return References(
        read, read_counts.astype(np.uint8), written, write_counts.astype(np.uint8), read_stages, write_stages
    )


def translate(
    machine: Core,
    format_row: int,
    root: int,
    addresses: Sequence[int] | Array,
    kinds: Kind | Sequence[int] | Array | None = None,
    access: Access | None = None,
    *,
    references: bool = False,
    out: Translation | None = None,
) -> Translation:
    """Translate addresses (uint64[n]) through the tables below physical address `root`, in order.

    format_row: row of the machine's formats (Machine.add_format; 0 host, 1 NPT, 2 EPT).
    kinds: `Kind` codes, one for each address or one for all, checked under `access`; the hardware's accessed and
    dirty bits are set where a walk succeeds. None: a plain walk, present or not, nothing checked, nothing set.
    references: also list the entries read and written, at most 5 of each. out: arrays of an earlier call with as
    many addresses, to be filled again. Tables may lie in the metadata zone or in guest frames.
    ValueError for a format row or kind that is not there, a root that is no page, or arrays that do not fit.
    """
    from pgemu_kernels.run.entries import translate as entry

    given = addresses_of(addresses)
    count = given.size
    row = machine.format_row(format_row)
    ram_bytes = machine.arrays.ram.nbytes
    rows = _plain_rows(row, ram_bytes) if kinds is None else (access or Access()).rows(row, ram_bytes)
    codes = _kinds(0 if kinds is None else kinds, count)
    result = out or Translation(
        np.empty(count, np.uint64), np.empty(count, np.uint8), np.empty(count, np.uint8), np.zeros(count, np.uint64)
    )
    if any(array.shape != (count,) for array in result[:4]):
        raise ValueError(f"out: expected arrays of {count} elements")
    reads, writes, counts = _outputs(count, W.WALK_READS, W.WALK_READS, references)
    scratch = np.zeros(W.WALK_SCRATCH, np.uint64)
    entry(
        machine.descriptor, np.uint64(format_row), _checked_root(root), given, codes, rows,
        result.physical, result.status, result.level, result.error, reads, writes, counts, scratch,
    )  # fmt: skip
    return result._replace(references=_references(reads, writes, counts, count) if references else None)


class NestedTranslation(NamedTuple):
    """What a batch of nested walks gave, in the order of the addresses.

    physical: uint64[n], host physical addresses, 0 on failure. status: uint8[n], `WalkStatus`. stage: uint8[n],
    `WalkStage`, where it failed. guest_level: uint8[n], of the guest's leaf, of its entry at fault, or (stage
    TABLE) of the entry that was to be read. host_level: uint8[n], the same of stage 2, 0 if the guest's tables
    failed; a TLB entry covers the smaller of the two leaves. error: uint64[n], the word of the stage that failed,
    as in `Translation`; an x86 guest gets a page fault's. fault_address: uint64[n], the virtual address for
    stage GUEST, the guest physical address for TABLE and FINAL. read_count, write_count: uint64[n], entries
    of both stages read and written; the latter only counts accessed and dirty bits. references: if asked for.
    """

    physical: Array
    status: Array
    stage: Array
    guest_level: Array
    host_level: Array
    error: Array
    fault_address: Array
    read_count: Array
    write_count: Array
    references: References | None = None


def _nested_rows(machine: Core, rows: tuple[int, int], accesses: tuple[Access, Access]) -> Array:
    """Access rows of the guest, then of stage 2. ValueError for formats that cannot stand there."""
    guest, stage2 = (machine.format_row(row) for row in rows)
    if guest[W.F_FAMILY] != Family.X86 or stage2[W.F_FAMILY] == Family.X86:
        raise ValueError("nested walk: expected a guest with x86-64 tables over EPT, NPT or Arm stage 2")
    # Where a guest's table may lie is for stage 2 to say.
    anywhere = 1 << 52
    return np.concatenate([accesses[0].rows(guest, anywhere), accesses[1].rows(stage2, machine.arrays.ram.nbytes)])


def translate_nested(
    machine: Core,
    guest_format: int,
    guest_root: int,
    stage2_format: int,
    stage2_root: int,
    addresses: Sequence[int] | Array,
    kinds: Kind | Sequence[int] | Array = Kind.READ,
    access: Access | None = None,
    *,
    stage2_access: Access | None = None,
    references: bool = False,
    together: int = W.WALK_BLOCK,
) -> NestedTranslation:
    """Translate a guest's virtual addresses (uint64[n]) through its tables and stage 2, in order.

    guest_format, stage2_format: rows of the machine's formats. guest_root: guest physical address of the guest's
    top table; its tables lie in guest memory, reached through stage 2 (Machine.write_frame puts them there).
    access: the guest's control registers; stage2_access: those of stage 2, where they matter (default: the same).
    references: also list every entry read and written. together: how many walks are interleaved, at most 64;
    1 walks one after the other (to see what interleaving brings).
    ValueError for formats, kinds, roots or `together` that cannot be.
    """
    from pgemu_kernels.run.entries import translate_nested as entry

    given = addresses_of(addresses)
    count = given.size
    if not 1 <= together <= W.WALK_BLOCK:
        raise ValueError(f"{together} walks together: expected 1 to {W.WALK_BLOCK}")
    access = access or Access()
    rows = _nested_rows(machine, (guest_format, stage2_format), (access, stage2_access or access))
    physical, error, fault = (np.empty(count, np.uint64) for _ in range(3))
    status, stage = (np.empty(count, np.uint8) for _ in range(2))
    levels = np.empty((count, 2), np.uint8)
    reads, writes, counts = _outputs(count, W.NESTED_READS, W.NESTED_WRITES, references)
    counts = np.zeros(count * 2, np.uint64)
    entry(
        machine.descriptor, np.uint64(guest_format), _checked_root(guest_root), np.uint64(stage2_format),
        _checked_root(stage2_root), given, _kinds(kinds, count), rows, physical, status, stage, levels.reshape(-1),
        error, fault, reads, writes, counts, np.zeros(W.NESTED_SCRATCH, np.uint64), np.uint64(together),
    )  # fmt: skip
    return NestedTranslation(
        physical, status, stage, levels[:, 0], levels[:, 1], error, fault, counts[0::2], counts[1::2],
        _references(reads, writes, counts, count) if references else None,
    )  # fmt: skip
