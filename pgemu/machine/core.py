"""A machine's arrays, registers and running operations; of the objects that stand on them it knows none."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pgemu.machine.arrays import I64, U64, Bools, Integers
from pgemu.machine.boot import allocate, set_registers
from pgemu.machine.columns import check_fields, column_of
from pgemu.machine.config import Config
from pgemu.machine.contents import FrameContents
from pgemu.machine.field_rules import shown
from pgemu.machine.findings import BrokenRule, findings_of
from pgemu.machine.physical import PhysicalMemory
from pgemu.machine.results import RESULT_OF, RESULTS_OF, Result, Results
from pgemu.machine.single import ACTORS, Single
from pgemu.machine.statistics import Statistics
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import Machine as Arrays, describe
from pgemu_kernels.formats import bits as formats, page_format
from pgemu_kernels.formats.page_format import PageFormat
from pgemu_kernels.words.operations import Entry

__all__ = ("Columns", "Core", "row_of_format", "run_all", "run_one")

Array = np.ndarray[Any, Any]
NONE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # "no operation" of run_pooling()
_FIRST = np.uint64(0)
_NOBODY = np.uint64(W.ACTORS)  # no actor's operation, but those of the columns
_FULL = int(W.R_FULL)
_SPINS = int(W.R_SPINS)
_PLAIN = {int, W.Operation, W.Flag}
_FORMATS, _FORMAT_WORDS = int(W.STATE_FORMATS), int(W.F_WORDS)


class Columns(Protocol):
    """Operations as the columns of `Core.run_columns`: pgemu.trace.schema.Records."""

    @property
    def actor(self) -> Array: ...
    @property
    def object(self) -> Array: ...
    @property
    def address(self) -> Array: ...
    @property
    def offset(self) -> Array: ...
    @property
    def length(self) -> Array: ...
    def __len__(self) -> int: ...
    def header(self) -> Array: ...


@dataclass(eq=False)
class Core(FrameContents, but=("operate", "begin", "fast_entry")):
    """What pgemu.Machine creates its objects on, and what they hold of it.

    Not thread-safe; two machines may run on two threads, kernels release the GIL.
    """

    config: Config
    arrays: Arrays = field(init=False, repr=False)
    descriptor: I64 = field(init=False, repr=False)
    _frames_limit: int = field(init=False, repr=False, default=0)
    single: Single = field(init=False, repr=False, default_factory=Single)
    _entry: Any = field(init=False, repr=False, default=None)
    tables_made: list[Any] = field(init=False, repr=False, default_factory=list)  # page tables, also destroyed ones
    formats_made: dict[int, PageFormat] = field(init=False, repr=False, default_factory=dict)  # by row, beside its own
    walk_rows: dict[Any, Array] = field(init=False, repr=False, default_factory=dict)  # of plain walks, by format row
    _tables_changed: Any = field(init=False, repr=False, default=None)  # called by _tell_of_tables(), if set

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise TypeError(f"config {shown(self.config)} ({type(self.config).__name__}): expected a Config")
        self.arrays = allocate(self.config)
        self.descriptor = describe(self.arrays)
        set_registers(self.config, self.arrays)
        from pgemu_kernels.run.entries import provide
        from pgemu_kernels.words.requests import MACHINE

        if provide(self.descriptor, MACHINE, np.uint64(0)) != 0 or not self._prepare_memory():
            raise OSError(W.ENOMEM, f"the vmemmap of {self.config.pool_pages} pages needs more frames")
        self._frames_limit = self.register(W.R_FRAMES_LIMIT)

    def _prepare_memory(self) -> bool:
        """The second part of boot, of memory whose struct pages are all there, if any: whether the frames sufficed."""
        small = self.config.page_order == 0 and self.config.pool
        if self.config.hvo and not (self.config.buddy or self.config.reserved or small):
            return True
        from pgemu_kernels.run.entries import run_pooling

        return int(run_pooling(self.descriptor, *_no_columns(), NONE, _NOBODY)) == 0

    def _tell_of_tables(self) -> None:
        """A page table came, has another root, or is gone: whoever shows the machine elsewhere is told."""
        if self._tables_changed is not None:
            self._tables_changed()

    # ------------------------------------------------------------------ formats

    def format_row(self, index: int) -> U64:
        """uint64[F_WORDS]: row `index` of the machine's formats (a view). ValueError for a row that is not in use.

        Rows 0 to 2 are the host's x86-64, NPT and EPT (formats.HOST_X86_64, STAGE2_NPT, STAGE2_EPT).

        >>> machine.format_row(0).dtype, machine.format_row(0).size > 16
        (dtype('uint64'), True)
        """
        return row_of_format(self, "index", index)

    def add_format(self, fmt: PageFormat, taller: int = 0) -> int:
        """The row of an entry format, added if the machine has none that is equal. ValueError past words.FORMATS.

        taller: row of the format that its tables go over to for higher addresses, 0 for none.

        >>> machine.add_format(machine.host_format)  # the row that it has
        3
        """
        row = fmt.row()
        row[W.F_TALLER] = taller
        used = self.register(W.R_FORMATS)
        for index in range(used):
            if np.array_equal(self.format_row(index), row):
                self.formats_made.setdefault(index, fmt)
                return index
        if used == W.FORMATS:
            raise ValueError(f"fmt {fmt.name}: the machine has {W.FORMATS} formats already, expected one of those")
        self.arrays.state[W.R_FORMATS] = used + 1
        self.format_row(used)[:] = row
        self.formats_made[used] = fmt
        return used

    @cached_property
    def host_format(self) -> PageFormat:
        """The format of process and kernel page tables."""
        return self._formats[formats.HOST_X86_64]

    @cached_property
    def stage2_format(self) -> PageFormat:
        """The format of VMs' page tables."""
        return self._formats[self.register(W.R_STAGE2_FORMAT)]

    @property
    def _formats(self) -> tuple[PageFormat, PageFormat, PageFormat]:
        return page_format.machine_formats(self.config.kernel, **self.config.format_parameters)

    # ------------------------------------------------------------------ running

    def run(self, records: Columns) -> Results:
        """Run trace records in order. ValueError for actors beyond words.ACTORS.

        >>> records = Records.build(2, op=Operation.GUEST_FAULT, address=[0x20_0000, 0x20_1000])
        >>> machine.run(records).detail.tolist()
        [2, 2]
        """
        if len(records) and int(records.actor.max()) >= W.ACTORS:
            raise ValueError(f"actor {int(records.actor.max())}: expected less than {W.ACTORS}")
        columns = (records.object, records.address, records.offset, records.length)
        return self.run_columns(records.header(), *columns, count=len(records))

    def run_columns(
        self, header: Any, object_: Any = 0, address: Any = 0, offset: Any = 0, length: Any = 0, *, count: int
    ) -> Results:
        """Run `count` operations given as columns: uint64 arrays of `count` elements, or of one for all.

        header: op | flags << 8 | actor << 16 | vm << 32 | space << 48. OSError ENOMEM where this computer cannot hold
        the results.

        >>> machine.run_columns(Operation.GUEST_FAULT, 0, [0x20_0000, 0x20_1000], count=2).names
        ['RET_PF_FIXED', 'RET_PF_SPURIOUS']
        """
        if count >> 60:
            raise MemoryError  # NumPy's own for less
        given = {"header": header, "object_": object_, "address": address, "offset": offset, "length": length}
        columns = [column_of(values, count, name) for name, values in given.items()]
        status = np.empty(count, np.int64)
        detail = np.empty(count, np.uint64)
        if count:
            run_all(self, (*columns, status, detail), count)
        kind = RESULTS_OF[int(columns[0][0]) & 0xFF] if columns[0].size == 1 else Results
        return kind(status, detail)

    def fast_entry(self) -> Any:
        """The entry of default machines, which stops at the first operation that is for another one.

        >>> machine.fast_entry().__name__
        'run'
        """
        from pgemu_kernels.run.entries import run

        self._entry = run
        return run

    def operate(
        self,
        op: W.Operation,
        *,
        flags: int = 0,
        actor: int = 0,
        vm: int = 0,
        space: int = 0,
        object_: int = 0,
        address: int = 0,
        offset: int = 0,
        length: int = 0,
    ) -> Result:
        """Run one operation; the arguments are the columns of the trace schema.

        TypeError for what is no integer, ValueError where one does not fit its column.

        >>> machine.operate(Operation.GUEST_FAULT, vm=vm.vm, address=0x20_0000)
        Result(status=RET_PF_FIXED, detail=2)
        """
        values = (op, flags, actor, vm, space, object_, address, offset, length)
        if {*map(type, values)} <= _PLAIN and actor < ACTORS:
            return run_one(self, *values)
        return run_one(self, *check_fields(*values))

    # ------------------------------------------------------------------ step by step

    def begin(
        self,
        actor: int,
        op: W.Operation,
        *,
        flags: int = 0,
        vm: int = 0,
        space: int = 0,
        object_: int = 0,
        address: int = 0,
        offset: int = 0,
        length: int = 0,
    ) -> None:
        """Begin an operation of an actor, to be advanced by `step`.

        What is none of the designs' is one step. TypeError for an argument that is no integer, ValueError for one that
        does not fit its column, or while an operation of the actor is under way.

        >>> machine.begin(1, Operation.CONVERT, flags=Flag.SHARED, object_=gmem.inode, length=4096)
        >>> sum(1 for _ in iter(lambda: machine.step(1), 1))  # steps that were not the last one
        6
        >>> machine.result(1)
        Result(status=0, detail=0)
        """
        check_fields(op, flags, actor, vm, space, object_, address, offset, length)
        if self._record(actor, W.O_ACTIVE):
            raise ValueError(f"actor {actor} is in the middle of an operation: expected one that has ended its own")
        words = {
            W.O_OP: op, W.O_FLAGS: flags, W.O_ACTOR: actor, W.O_VM: vm, W.O_SPACE: space, W.O_OBJECT: object_,
            W.O_ADDRESS: address, W.O_OFFSET: offset, W.O_LENGTH: length,
        }  # fmt: skip
        row = int(W.STATE_OPS) + actor * W.O_WORDS
        for word, value in words.items():
            self.arrays.state[row + int(word)] = value
        self._step(actor, beginning=True)

    def step(self, actor: int) -> int:
        """Do the next step of an actor's operation: words.GO, STOP (it ended, see `result`) or BLOCKED.

        ValueError if the actor has no operation under way.

        >>> machine.begin(1, Operation.WORK)
        >>> machine.step(1)  # 0: there are more, 1: it has ended, 2: a lock is held
        1
        """
        if not self._record(actor, W.O_ACTIVE):
            raise ValueError(f"actor {actor} has no operation under way: expected one that began one")
        return self._step(actor, beginning=False)

    def _step(self, actor: int, *, beginning: bool) -> int:
        from pgemu_kernels.words.requests import BEGIN, STEP

        outcome = self._call_designs(actor, BEGIN if beginning else STEP)
        other, _ = _stopped(outcome)
        if other is Entry.NOBODY:
            return outcome
        return int(_kernel(other)(self.descriptor, *_no_columns(), _FIRST, np.uint64(actor)))  # all of it in one step

    def _call_designs(self, actor: int, mode: int, columns: tuple[Array, ...] = ()) -> int:
        """full.run_designs() without columns, or with the first of them."""
        from pgemu_kernels.run.entries import run_designs

        given = (*columns, *_no_columns()[len(columns) :])
        return int(run_designs(self.descriptor, *given, _FIRST, np.uint64(actor), mode))

    def _call_devices(self, what: int, number: int) -> int:
        """devices.run_devices() for an address space by its number (words.requests.ATTACH, ...): 0 or -errno."""
        from pgemu_kernels.run.entries import run_devices

        asked = np.uint64(W.ACTORS + 1 + what)
        done = run_devices(self.descriptor, *_no_columns(), np.uint64(number), asked)
        return int(np.uint64(done).astype(np.int64))

    def result(self, actor: int) -> Result:
        """What the operation in an actor's record returned.

        >>> machine.begin(1, Operation.WORK), machine.step(1)
        (None, 1)
        >>> machine.result(1)
        Result(status=0, detail=0)
        """
        status = np.uint64(self._record(actor, W.O_STATUS)).astype(np.int64)
        return RESULT_OF[self._record(actor, W.O_OP)](int(status), self._record(actor, W.O_DETAIL))

    def _record(self, actor: int, word: np.uint64) -> int:
        if not 0 <= actor < W.ACTORS:
            raise ValueError(f"actor {actor}: expected 0 to {W.ACTORS - 1}")
        return int(self.arrays.state[int(W.STATE_OPS) + actor * W.O_WORDS + int(word)])

    # ------------------------------------------------------------------ looking

    @property
    def statistics(self) -> Statistics:
        """Counters, gauges, results and costs as they stand (a copy)."""
        return Statistics(self.arrays.stats.copy())

    def check_each(self, on: bool = True) -> None:
        """Check after every operation what it touched; `broken` tells what was found.

        >>> machine.check_each()
        >>> gmem.convert(0, 4096, shared=True).name, machine.broken[0]
        ('ok', 0)
        """
        self.arrays.state[W.R_CHECK] = on

    @property
    def broken(self) -> tuple[int, W.Broken, int]:
        """(findings, kind of the first one, the page or count it is about)."""
        first = self.register(W.R_BROKEN_FIRST)
        return self.register(W.R_BROKEN), W.Broken(first >> 48), first & (1 << 48) - 1

    @property
    def findings(self) -> tuple[BrokenRule, ...]:
        """Every rule that was found broken, with the defects of this machine that explain it."""
        return findings_of(self.arrays.state, self.config.defects)

    # ------------------------------------------------------------------ physical memory

    @cached_property
    def memory(self) -> PhysicalMemory:
        """What lies at physical addresses, and which frames are in use."""
        return PhysicalMemory(self.arrays)

    def words(self, address: int, count: int) -> U64:
        """uint64[count] at a physical address, read-only: of the metadata zone a view, of HugeTLB frames a copy.

        ValueError for an unaligned address or where there is no memory.

        >>> machine.words(vm.root, 2).tolist()
        [47143, 9223372036854775808]
        """
        return self.memory.words(address, count)

    def load(self, addresses: Integers) -> U64:
        """uint64[n]: the words at physical addresses (uint64[n]). ValueError if unaligned or where no memory is.

        >>> [hex(entry) for entry in machine.load([vm.walk(0)[-1][1]]).tolist()]
        ['0x100000ee7']
        """
        return self.memory.load(addresses)

    def holds(self, addresses: Integers) -> Bools:
        """bool[n]: whether there is memory at each physical address (uint64[n], multiples of 8).

        >>> machine.holds([0, gmem.pfn(0) << 12, 1 << 51]).tolist()
        [True, True, False]
        """
        return self.memory.holds(addresses)

    def limit_frames(self, free: int | None) -> None:
        """Let only `free` more metadata frames be taken before -ENOMEM; frames given back meanwhile add to them.

        None: as configured (Config.frames). A number beyond what was configured changes nothing. Injection of failures,
        as fail_page_alloc of mm/fail_page_alloc.c does it.

        >>> process = machine.create_process()
        >>> process.mmap_anonymous(0x40_0000, 4096).name
        'ok'
        >>> machine.limit_frames(0)
        >>> process.touch(0x40_0000, write=True).name
        'VM_FAULT_OOM'
        >>> machine.limit_frames(None)
        """
        limit = self._frames_limit
        if free is not None:
            limit = min(limit, int(self.arrays.stats[int(W.STATS_GAUGES) + 2 * W.Gauge.FRAMES_USED]) + free)
        self.arrays.state[W.R_FRAMES_LIMIT] = limit


def row_of_format(machine: Core, name: str, index: int) -> U64:
    """Core.format_row() of an argument of that name."""
    state = machine.arrays.state
    used = int(state[W.R_FORMATS])
    if not 0 <= index < used:
        raise ValueError(f"{name} {index}: expected a row of the machine's formats, 0 to {used - 1}")
    begin = _FORMATS + index * _FORMAT_WORDS
    return state[begin : begin + _FORMAT_WORDS]


def run_one(
    machine: Core, op: int, flags: int, actor: int, vm: int, space: int, object_: int, address: int, offset: int,
    length: int,
) -> Result:  # fmt: skip
    """Core.operate() of what are integers, none of them a bool, the actor one of words.ACTORS: the shortest way."""
    single = machine.single
    try:
        single.write(single.buffer, 0, op, flags, actor, vm, space, object_, address, offset, length)
    except (struct.error, TypeError):
        check_fields(op, flags, actor, vm, space, object_, address, offset, length)
        raise
    entry = machine._entry
    if entry is None or machine.arrays.state[_FULL]:
        run_all(machine, single.columns, 1)
    elif (stopped := entry(machine.descriptor, *single.columns, _FIRST)) != 1:
        run_all(machine, single.columns, 1, stopped)
    return single.result(op)


def run_all(machine: Core, columns: tuple[Array, ...], count: int, stopped: int | None = None) -> None:
    """Run `count` operations, of columns as entries take them, through one entry after the other.

    stopped: what the first of them returned, if it was called.
    """
    done = 0
    while True:
        if stopped is None:
            # The entry that runs the designs' operations: the fast loops, or what knows every parameter.
            entry = _run_designs if machine.arrays.state[_FULL] else machine._entry or machine.fast_entry()
            stopped = entry(machine.descriptor, *columns, np.uint64(done) if done else _FIRST)
        if stopped == count:
            return
        other, done = _stopped(stopped)
        _, done = _stopped(_run_elsewhere(other, machine.descriptor, *columns, np.uint64(done)))
        if other is Entry.DEVICES and machine.arrays.state[_SPINS]:  # what was unpinned may be what a conversion awaits
            _run_designs(machine.descriptor, *_no_columns(), np.uint64(1))
        if done == count:
            return
        stopped = None


def _stopped(returned: int) -> tuple[Entry, int]:
    """The entry that goes on where another stopped, and the index of the operation: routing.stopped_at()."""
    entry, index = divmod(int(returned), 1 << W.ENTRY_SHIFT)
    return Entry(entry), index


def _no_columns() -> tuple[Array, ...]:
    """Columns for a call that looks at none."""
    nothing = np.zeros(1, np.uint64)
    return (*(nothing,) * 5, nothing.view(np.int64), nothing)


def _kernel(entry: Entry) -> Any:
    """The kernel of an entry for what is none of the designs'."""
    if entry is Entry.POOLING:
        from pgemu_kernels.run.entries import run_pooling

        return run_pooling
    if entry is Entry.DEVICES:
        from pgemu_kernels.run.entries import run_devices

        return run_devices
    from pgemu_kernels.run.entries import run_ordinary

    return run_ordinary


def _run_elsewhere(entry: Entry, *arguments: Any) -> int:
    """Run operations of columns by the entry for what fast.run does not."""
    return _run_designs(*arguments) if entry is Entry.FULL else int(_kernel(entry)(*arguments, _NOBODY))


def _run_designs(*arguments: Any) -> int:
    """full.run_designs() of columns, called as the other entries are."""
    from pgemu_kernels.run.entries import run_designs
    from pgemu_kernels.words.requests import BATCH_MODE

    return int(run_designs(*arguments, np.uint64(0), BATCH_MODE))
