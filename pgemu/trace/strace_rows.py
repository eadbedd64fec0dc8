"""Rows of a log from system calls as strace prints them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pgemu.trace.events import ADVICE, Input
from pgemu.trace.log import FileKind
from pgemu.trace.strace_calls import (
    fields_named,
    fields_of,
    flags_of,
    number_of,
    path_of,
    request_of,
    split_arguments,
)

__all__ = ("Call", "Rows")

FILE = 1 << 32
"""Numbers of files that are known by their name begin here; below they are descriptors."""

_DISCARDING = {4, 9, 24}
_PAGE = 4096
_HUGETLB_MOUNT = "/dev/hugepages/"
_MFD_HUGETLB, _HUGE_SHIFT = 4, 26
_ALL_ONES = (1 << 64) - 1
_NO_MEMORY = frozenset({"mbind", "msync", "mincore", "set_mempolicy", "get_mempolicy", "move_pages", "migrate_pages"})
_NOT_READ = frozenset({"shmat", "shmdt", "remap_file_pages", "userfaultfd", "process_madvise", "mmap2", "mseal"})
"""Calls that change a process's memory and that are not read."""

_CLONE_FILES = 0x400
_Where = tuple[int, int]
_Table = dict[int, int]  # of descriptors: number of the file


class Call(NamedTuple):
    """A call, whole; `begins` and `ends`: time (ns) and line."""

    name: str
    arguments: str
    result: str
    more: str  # behind the result
    begins: _Where
    ends: _Where

    @property
    def failed(self) -> bool:
        """Whether it was not done: an error, or it is restarted (linux/errno.h: ERESTARTSYS and others)."""
        return self.result.startswith("-") or self.more.startswith(" ERESTART")

    @property
    def value(self) -> int:
        """What it returned, 0 where that is not told."""
        return 0 if self.result == "?" or self.failed else number_of(self.result)


class Rows:
    """Rows and counts so far, and the files that descriptors stand for.

    Attributes:
        rows, calls: as Log's, in no order
        inputs, ignored, unknown, called: as Log's
        files: as Log's
        pointers: requests of KVM of which strace knows only the number
    """

    def __init__(self, task_of: Mapping[int, int]) -> None:
        """task_of: tasks by the numbers of their threads, as far as they have lines."""
        self.rows: list[tuple[int, ...]] = []
        self.calls: list[tuple[int, ...]] = []
        self.inputs: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.called: Counter[str] = Counter()
        self.pointers: Counter[str] = Counter()
        self.files: dict[int, FileKind] = {}
        self._task_of = task_of
        self._tables: dict[int, _Table] = {}  # of a task
        self._inherited: dict[int, _Table] = {}  # of a thread that has no line yet, by its number
        self._by_path: dict[str, int] = {}
        self._by_name: dict[str, Callable[[str, int, Call, list[str]], None]] = {
            "mmap": self._mmap,
            "munmap": self._munmap,
            "madvise": self._madvise,
            "fallocate": self._fallocate,
            "ioctl": self._ioctl,
            "mprotect": self._range(Input.PROTECT),
            "pkey_mprotect": self._range(Input.PROTECT),
            "mlock": self._range(Input.LOCK, 1),
            "munlock": self._range(Input.LOCK, 0),
            "mlock2": self._mlock2,
            "mlockall": self._lock_all,
            "munlockall": self._lock_all,
            "mremap": self._mremap,
            "brk": self._brk,
            **dict.fromkeys(("clone", "clone3", "fork", "vfork"), self._clone),
            **dict.fromkeys(("execve", "execveat"), self._exec),
            "exit_group": self._exit,
            **dict.fromkeys(("open", "openat", "openat2", "creat", "memfd_create", "close"), self._open_or_close),
            **dict.fromkeys(("dup", "dup2", "dup3"), self._dup),
        }

    def call(self, task: int, tid: int, call: Call) -> str:
        """Add a call of a thread; what was not understood of it, "" if nothing was."""
        if task not in self._tables:
            self._tables[task] = self._inherited.pop(tid, {})
        handler = self._by_name.get(call.name)
        name = f"sys_{call.name}"
        if handler is None:
            (self.unknown if call.name in _NOT_READ else self.ignored)[name] += 1
            return ""
        try:
            handler(name, task, call, split_arguments(call.arguments))
        except (ValueError, IndexError, KeyError) as error:
            self.unknown[f"{name} that is not understood"] += 1
            return f"{name[4:]}: {str(error)[:80] if isinstance(error, ValueError) else 'an argument is missing'}"
        return ""

    def add(self, name: str, kind: Input, time: int, task: int, line: int, *words: int, failed: bool = False) -> None:
        """A row of a process alone."""
        row = (int(kind), time, task, line, *words, *(0,) * (5 - len(words)), int(failed))
        _check(row)
        self.calls.append(row)
        self.ignored[name] += 1
        self.called[name] += 1

    def _input(self, name: str, kind: Input, where: _Where, task: int, call: Call, *words: int) -> None:
        row = (int(kind), where[0], task, where[1], *words, *(0,) * (5 - len(words)), int(call.failed))
        _check(row)
        self.rows.append(row)
        self.inputs[name] += 1

    # ------------------------------------------------------------------ memory

    def _mmap(self, name: str, task: int, call: Call, given: list[str]) -> None:
        address, length, prot, flags, descriptor, offset = given
        file = self._file(task, descriptor)
        asked = number_of(address)
        word = flags_of(flags) & 0xFFFFFFFF | (flags_of(prot) & 0xFFFFFFFF) << 32
        words = asked if call.failed else call.value, number_of(length), file, number_of(offset), word
        self._input(name, Input.MMAP, call.ends, task, call, *words)

    def _munmap(self, name: str, task: int, call: Call, given: list[str]) -> None:
        start, length = map(number_of, given)
        self._input(name, Input.MUNMAP, call.begins, task, call, start, length)

    def _madvise(self, name: str, task: int, call: Call, given: list[str]) -> None:
        start, length, advice = number_of(given[0]), number_of(given[1]), flags_of(given[2])
        if advice in _DISCARDING:
            self._input(name, Input.MADVISE, call.begins, task, call, start, length, advice)
            return
        name = f"{name} {ADVICE.get(advice, advice)}"
        time, line = call.begins
        self.add(name, Input.MADVISE, time, task, line, start, length, advice, failed=call.failed)

    def _range(self, kind: Input, word: int | None = None) -> Callable[[str, int, Call, list[str]], None]:
        def add(name: str, task: int, call: Call, given: list[str]) -> None:
            last = flags_of(given[2]) if word is None else word
            time, line = call.begins
            words = number_of(given[0]), number_of(given[1]), last
            self.add(name, kind, time, task, line, *words, failed=call.failed)

        return add

    def _mlock2(self, name: str, task: int, call: Call, given: list[str]) -> None:
        words = number_of(given[0]), number_of(given[1]), 2 if flags_of(given[2]) & 1 else 1
        self.add(name, Input.LOCK, call.begins[0], task, call.begins[1], *words, failed=call.failed)

    def _lock_all(self, name: str, task: int, call: Call, given: list[str]) -> None:
        flags = flags_of(given[0]) if given else 0
        self.add(name, Input.LOCK_ALL, call.begins[0], task, call.begins[1], flags, failed=call.failed)

    def _mremap(self, name: str, task: int, call: Call, given: list[str]) -> None:
        words = *map(number_of, given[:3]), flags_of(given[3]), call.value
        self.add(name, Input.REMAP, call.ends[0], task, call.ends[1], *words, failed=call.failed)

    def _brk(self, name: str, task: int, call: Call, given: list[str]) -> None:
        words = number_of(given[0]), call.value
        self.add(name, Input.BREAK, call.ends[0], task, call.ends[1], *words, failed=call.failed)

    # ------------------------------------------------------------------ processes

    def _clone(self, name: str, task: int, call: Call, given: list[str]) -> None:
        fields = fields_named(given)
        if given and given[0].startswith("{"):
            fields = fields_of(given[0].partition("=>")[0].strip() if "=>" in given[0] else given[0])
        flags = 0x4100 if call.name == "vfork" else flags_of(fields["flags"]) if "flags" in fields else 0
        if not call.failed:
            self._share_files(task, call.value, shared=bool(flags & _CLONE_FILES))
        time, line = call.begins
        self.add(name, Input.FORK, time, task, line, call.value, flags, failed=call.failed or not call.value)

    def _exec(self, name: str, task: int, call: Call, given: list[str]) -> None:
        self.add(name, Input.EXEC, call.ends[0], task, call.ends[1], failed=call.failed)

    def _exit(self, name: str, task: int, call: Call, given: list[str]) -> None:
        self.add(name, Input.EXIT, call.begins[0], task, call.begins[1], 1)

    # ------------------------------------------------------------------ files

    def _share_files(self, task: int, child: int, *, shared: bool) -> None:
        """A child has its parent's descriptors, or a copy; it may have opened some before its parent's line."""
        table = self._tables[task]
        number = self._task_of.get(child)
        own = self._tables.get(number, {}) if number is not None else {}
        if shared:
            table.update(own)
        inherited = table if shared else {**table, **own}
        if number is None:
            self._inherited[child] = inherited
        else:
            self._tables[number] = inherited

    def _file(self, task: int, text: str) -> int:
        """The number of the file of a descriptor: one of its own if its name is known, else the descriptor."""
        descriptor, path = path_of(text)
        known = self._tables[task].get(descriptor)
        if known is None and path:
            return self._named(path)
        return descriptor if known is None else known

    def _named(self, path: str, kind: FileKind = "shmem") -> int:
        """The number of the file of that name."""
        if path not in self._by_path:
            self._by_path[path] = FILE + len(self._by_path)
            kind = "hugetlb-2M" if path.startswith(_HUGETLB_MOUNT) else kind
            self.files[self._by_path[path]] = kind
        return self._by_path[path]

    def _open_or_close(self, name: str, task: int, call: Call, given: list[str]) -> None:
        self.ignored[name] += 1
        if call.failed:
            return
        table = self._tables[task]
        if call.name == "close":
            table.pop(path_of(given[0])[0], None)
            return
        path = given[1 if call.name.startswith("openat") else 0].strip('"')
        if call.name != "memfd_create":
            number = self._named(path)
        else:
            flags = flags_of(given[1])
            huge: FileKind = "hugetlb-1G" if flags >> _HUGE_SHIFT & 63 == 30 else "hugetlb-2M"
            number = self._named(f"memfd {len(self._by_path)} {path}", huge if flags & _MFD_HUGETLB else "shmem")
        table[call.value] = number

    def _dup(self, name: str, task: int, call: Call, given: list[str]) -> None:
        self.ignored[name] += 1
        if not call.failed:
            table, number = self._tables[task], self._file(task, given[0])
            table.pop(call.value, None)
            if number >= FILE:
                table[call.value] = number

    def _fallocate(self, name: str, task: int, call: Call, given: list[str]) -> None:
        file, mode = self._file(task, given[0]), flags_of(given[1])
        words = file, mode, number_of(given[2]), number_of(given[3])
        self._input(name, Input.FALLOCATE, call.begins, task, call, *words)

    # ------------------------------------------------------------------ KVM

    def _ioctl(self, name: str, task: int, call: Call, given: list[str]) -> None:
        request = request_of(given[1])
        argument = given[2] if len(given) > 2 else ""
        if request in ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2", "KVM_SET_MEMORY_ATTRIBUTES"):
            if call.failed:
                self.ignored[f"{name} {request} that failed"] += 1
            elif not argument.startswith("{"):
                self.unknown[f"{name} {request}, of which only a pointer is printed"] += 1
                self.pointers[request] += 1
            else:
                self._of_kvm(f"{name} {request}", task, call, fields_of(argument))
            return
        self.ignored[f"{name} {request}" if request.startswith("KVM_") else name] += 1

    def _of_kvm(self, name: str, task: int, call: Call, fields: dict[str, str]) -> None:
        if name.endswith("ATTRIBUTES"):
            start, size = number_of(fields["address"]), number_of(fields["size"])
            if start + size >= 1 << 64:
                raise ValueError("a range that ends beyond 64 bits")
            words = start // _PAGE, (start + size) // _PAGE, flags_of(fields["attributes"])
            self._input(name, Input.ATTRIBUTES, call.ends, task, call, *words)
            return
        gpa, size, hva = (number_of(fields[field]) for field in ("guest_phys_addr", "memory_size", "userspace_addr"))
        if max(gpa, hva) + size > 1 << 64:
            raise ValueError("a memory slot that ends beyond 64 bits")
        slot = number_of(fields["slot"])
        self._input(name, Input.MEMSLOT, call.ends, task, call, slot, flags_of(fields["flags"]), gpa, size, hva)


def _check(row: tuple[int, ...]) -> None:
    if any(word > _ALL_ONES for word in row):
        raise ValueError("a number of more than 64 bits")
