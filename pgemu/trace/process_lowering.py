"""From what a log says of processes to operations on ordinary memory.

A log without a VM is about the memory of its processes: mappings, what they give back, faults. Each becomes an
operation of a process of the machine (`space`), at the addresses of the log. What stands before the log, or is in no
line of it (areas that execve() and the dynamic loader made, the stack), is inferred from what is touched, and said.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from pgemu.sizes import size as size_text
from pgemu.trace.events import Input
from pgemu.trace.log import Log
from pgemu.trace.lowered import Accounting, Lowered, LoweringOptions
from pgemu.trace.memory_layout import Layout
from pgemu.trace.process_areas import ANONYMOUS, Area, Areas
from pgemu.trace.process_files import Files
from pgemu.trace.process_memories import Memories
from pgemu.trace.process_player import NO_ROOM, Player
from pgemu.trace.process_survey import Before, Survey
from pgemu.trace.schema import ACTOR_LIMIT, FIRST_HOST_ACTOR, Records
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE, SPACES, TASK_SIZE, VMAS

__all__ = ("is_of_processes", "lower_processes")

_KIND, _TIME, _TASK, _LINE = range(4)
_OF_PROCESSES = (Input.HOST_FAULT, Input.MADVISE, Input.MUNMAP, Input.MMAP, Input.FALLOCATE, Input.HUGETLBFS_FALLOCATE)
_NO_FILE = int(NO_INODE)
UNTOLD = "faults of which no line says their kind: reads where the page faults again, else as it can (fault_kind)"
_SETUP = -1  # position of what is done before the first event


def is_of_processes(log: Log, options: LoweringOptions) -> bool:
    """Whether a log is lowered as that of processes: LoweringOptions.kind."""
    if options.kind != "auto":
        return options.kind == "process"
    if options.memslots or options.vm_processes:
        return False
    events = (log.inputs, log.outcomes, log.ignored, log.unknown)
    if any(name.startswith(("kvm", "mark_mmio", "iommu:")) for names in events for name in names):
        return False
    if not np.isin(log.rows[:, _KIND], np.array(_OF_PROCESSES, np.uint64)).all():
        return False
    return len(log.rows) + len(log.calls) > 0


def lower_processes(log: Log, options: LoweringOptions) -> Lowered:
    """Make records of what a log says of processes."""
    rows = np.concatenate([log.rows, log.calls])
    rows = rows[np.lexsort((rows[:, _LINE], rows[:, _TIME]))]
    memories = Memories(log.tasks, rows, options.new_tasks)
    survey = Survey(log, rows, memories, Files(), options)
    survey.run()
    replay = _Replay(log, rows, memories, Files(), options)
    replay.prepare(survey)
    replay.run()
    return replay.result()


class _Replay(Player):
    """Plays a log to make records."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self._made: list[tuple[int, ...]] = []
        self._reasons: dict[int, str] = {}
        self._told: Counter[str] = Counter()
        self._before: dict[int, Before] = {}
        self._maps: dict[int, int] = {}
        self._untold: Counter[tuple[int, int]] = Counter()
        self._space: dict[int, int] = {}  # of a memory
        self._alive: list[bool] = []
        self._inferred: Counter[str] = Counter()
        self.processes = 0

    def prepare(self, survey: Survey) -> None:
        """Make the processes that stand before the log, and their areas."""
        self._before, self._maps, self._untold = survey.before(), survey.inode_of_map, survey.untold
        first = [number for number, memory in enumerate(self.memories.memories) if memory.begins < 0]
        self.processes = min(len(first), SPACES)
        self._alive = [True] * self.processes
        for space, memory in enumerate(first[:SPACES]):
            self._space[memory] = space
            self.areas[memory] = Areas()
            self._stand(_SETUP, memory)

    def _stand(self, at: int, memory: int) -> None:
        """Map the areas that stand from the beginning of a memory on, as far as there is room."""
        before = self._before.get(memory, Before([], {}))
        for area in before.areas:
            inode = before.inodes.get(area.start)
            if not self.has_room(1):
                return
            flags = int(Flag.PRIVATE)
            if inode is not None:
                file = self.files.use(("hugetlbfs", inode), "hugetlb-2M", area.end - area.start)
                if file is None:
                    return
                area, flags = area._replace(rights=int(Flag.READ | Flag.WRITE), file=file), int(Flag.SHARED)
            else:
                area = area._replace(rights=area.rights | int(Flag.READ))
            self._infer(at, memory, area, flags, "before")

    def _infer(self, at: int, memory: int, area: Area, flags: int, when: str) -> None:
        self.areas[memory].add(area)
        self._inferred[when] += 1
        self._inferred["bytes"] += area.end - area.start
        self.emit_map(at, memory, area, flags | area.rights)

    # ------------------------------------------------------------------ what Player asks

    def begin(self, at: int, memory: int) -> bool:
        """Of a program that is executed: what was there goes, in the same process; of vfork's child in a new one."""
        about = self.memories.memories[memory]
        if about.before is None or about.before not in self._space:
            return False
        if self.memories.ended.get(about.begins) == about.before:
            self._space[memory] = self._space.pop(about.before)
            self.areas.pop(about.before, None)
        elif not self.has_room(len(self.areas[about.before])) or not self.fork(at, about.before, memory):
            return False
        self.areas[memory] = Areas()
        self.emit(at, Operation.MUNMAP, memory, address=0, length=int(TASK_SIZE))
        self._stand(at, memory)
        return True

    def need(self, at: int, memory: int, start: int, end: int, rights: int) -> bool:
        """What is not mapped is mapped now: something made it of which the log says nothing."""
        for first, last in self.areas[memory].gaps(start, end):
            if not self.has_room(1):
                return False
            self._infer(at, memory, Area(first, last, rights | int(Flag.READ)), int(Flag.PRIVATE), "later")
        return True

    def emit(self, at: int, op: Operation, memory: int, **columns: int) -> None:
        """An operation."""
        names = ("flags", "address", "length", "offset", "object")
        self._made.append((at, int(op), self._space.get(memory, 0), *(columns.get(name, 0) for name in names)))

    def emit_map(self, at: int, memory: int, area: Area, flags: int) -> None:
        """mmap() of an area."""
        file = _NO_FILE if area.file == ANONYMOUS else area.file
        where = {"address": area.start, "length": area.end - area.start, "offset": area.offset}
        self.emit(at, Operation.MMAP, memory, flags=flags, object=file, **where)

    def without(self, at: int, reason: str) -> None:
        """An event is no operation."""
        self._reasons[at] = reason

    def told(self, what: str) -> None:
        """Something is modelled as something else."""
        self._told[what] += 1

    def has_room(self, more: int) -> bool:
        """Whether a machine has so many VMAs."""
        return sum(map(len, self.areas.values())) + more <= VMAS

    def faults_again(self, memory: int, page: int) -> bool:
        """As the survey counted them: then the first one was a read."""
        self._untold[memory, page] -= 1
        self.told(UNTOLD)
        return self._untold[memory, page] > 0

    def hugetlbfs_of(self, at: int) -> int | None:
        """As the survey found it."""
        return self._maps.get(at)

    def fork(self, at: int, memory: int, child: int) -> bool:
        """A child gets the first row that is free: pgemu_kernels/process/fork.py:make_space()."""
        space = self._alive.index(False) if False in self._alive else len(self._alive)
        if space >= SPACES:
            return False
        self.emit(at, Operation.FORK, memory)
        self._alive[space : space + 1] = [True]
        self._space[child] = space
        return True

    def end(self, at: int, memory: int) -> None:
        """A process has ended."""
        self.emit(at, Operation.EXIT, memory)
        self._alive[self._space.pop(memory)] = False

    # ------------------------------------------------------------------ result

    def result(self) -> Lowered:
        """Records, and an account of every event."""
        made = np.array(self._made, dtype=object).reshape(-1, 8)
        order = np.argsort(made[:, 0].astype(np.int64), kind="stable")
        made = made[order]
        at = made[:, 0].astype(np.int64)
        setup = int((at == _SETUP).sum())
        records = self._records(made, np.maximum(at, 0))
        called = self.log.called
        accounting = Accounting(
            self.log.events,
            self.log.inputs + called,
            self.log.outcomes - called,
            self.log.ignored - called,
            self.log.unknown,
            self.log.lost,
            self.log.skipped,
            operations=len(records),
            setup=setup,
            extra_pieces=len(at) - setup - len(set(at[setup:].tolist())),
            without_operation=Counter(self._reason(one, reason) for one, reason in self._reasons.items()),
        )
        layout = Layout(0, PAGE_4K, (), ())
        return Lowered(
            records, layout, "shared", False, accounting, self.log.source, notes=self._notes(), doubts=self.log.doubts,
            kind="process", processes=self.processes, files=self.files.listed(),
        )  # fmt: skip

    def _records(self, made: npt.NDArray[np.object_], at: npt.NDArray[np.int64]) -> Records:
        if not len(self.rows):
            return Records.build(0)
        columns = {name: made[:, 1 + number] for number, name in enumerate(_COLUMNS)}
        tasks = self.rows[at, _TASK].astype(np.int64)
        actor = FIRST_HOST_ACTOR + tasks % (ACTOR_LIMIT - FIRST_HOST_ACTOR)
        typed = {name: column.astype(np.uint64) for name, column in columns.items()}
        return Records.build(len(made), time=self.rows[at, _TIME], actor=actor, **typed)

    def _reason(self, at: int, reason: str) -> str:
        return f"{Input(int(self.rows[at, _KIND])).name.lower().replace('_', ' ')}: {reason}"

    def _notes(self) -> tuple[str, ...]:
        """What was taken to be so."""
        told = list(self.log.notes + self.memories.notes)
        inferred = size_text(self._inferred["bytes"])
        if count := self._inferred["before"]:
            gap = f"gaps up to {size_text(self.options.area_gap)} are theirs (area_gap)"
            told.append(f"areas inferred from what is touched and no line maps, {inferred}: {count}; {gap}")
        if count := self._inferred["later"]:
            told.append(f"areas inferred where the log unmapped what it uses later: {count:,}")
        told += [f"{what}: {count:,}" for what, count in self._told.items()]
        if count := self.files.beyond:
            told.append(f"mappings left out as a machine has room for {len(self.files.listed())} files: {count:,}")
        rooms = sum(reason == NO_ROOM for reason in self._reasons.values())
        if rooms:
            room = f"a machine has room for {SPACES} processes at once and {VMAS} areas of all of them"
            told.append(f"events left out: {rooms:,}; {room}")
        return tuple(told)


_COLUMNS = ("op", "space", "flags", "address", "length", "offset", "object")
