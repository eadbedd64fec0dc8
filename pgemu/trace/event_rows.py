"""Events of a log: who parses which, and the rows of inputs that they make."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable

from pgemu.trace.events import ADVICE, CALLS, OUTCOMES, Input, event_name
from pgemu.trace.fast_lines import FastLines
from pgemu.trace.fields import MalformedLineError, fields_of
from pgemu.trace.lines import is_name
from pgemu.trace.log import NO_VCPU
from pgemu.trace.nested import NESTED, NestedGuests
from pgemu.trace.outcomes import SET_SPTE, SPTE_CHANGED, Outcomes
from pgemu.trace.process_calls import CALLS_OF_PROCESSES, ProcessCalls
from pgemu.trace.task_calls import TaskCalls
from pgemu_kernels.words.log_words import ROW_WORDS

__all__ = ("EventRows", "Handler", "Handlers")

_STATE = 9
_GUEST_FAULT = int(Input.GUEST_FAULT)
_FAILED = 1
_PADDING = tuple((0,) * (ROW_WORDS - 4 - words) for words in range(ROW_WORDS - 4))
_ADDRESSES = 1 << 64
_FIRST_ERROR = (1 << 64) - 4095  # IS_ERR_VALUE()
_LOW = (1 << 32) - 1
_FETCH = 0x14  # X86_PF_USER | X86_PF_INSTR
_PERF_FAULT = re.compile(r"\S+\s+(?:0x)?([0-9a-f]{1,16})(?:\s.*?)?\s(?:0x)?([0-9a-f]{5,16})(?:\s|$)")

_DISCARDING = {4, 9, 24}  # MADV_DONTNEED, MADV_REMOVE, MADV_DONTNEED_LOCKED
_IOMMU = " IOMMU: "
_MAP_GPA_RANGE = " nr 0xc "  # KVM_HC_MAP_GPA_RANGE, include/uapi/linux/kvm_para.h

Handler = Callable[[str, int, int, int], None]


class Handlers(dict[str, Handler | None]):
    """First word of an event -> who parses it; None for events that are only counted."""

    def __init__(self, parser: EventRows) -> None:
        super().__init__()
        self._parser = parser
        self._by_name: dict[str, Handler | None] = {
            "page_fault_user": parser.page_fault_user,
            "kvm_page_fault": parser.kvm_page_fault,
            "kvm_vm_set_mem_attributes": parser.kvm_vm_set_mem_attributes,
            "kvm_hypercall": parser.kvm_hypercall,
            "kvm_unmap_hva_range": parser.kvm_unmap_hva_range,
            "kvm_memslot": parser.kvm_memslot,
            "sys_madvise": parser.sys_madvise,
            "sys_munmap": parser.sys_munmap,
            "sys_mmap": parser.sys_mmap,
            **dict.fromkeys(CALLS_OF_PROCESSES, parser.process_call),
            **dict.fromkeys(
                (f"{name} return" for name in CALLS_OF_PROCESSES if name not in CALLS), parser.process_return
            ),
            **dict.fromkeys(("page-faults", "minor-faults", "major-faults"), parser.perf_fault),
            "sys_fallocate": parser.sys_fallocate,
            "hugetlbfs_fallocate": parser.hugetlbfs_fallocate,
            **dict.fromkeys(("map", "unmap"), parser.iommu),
            SET_SPTE: parser.kvm_mmu_set_spte,
            **parser.outcomes(),
            **dict.fromkeys(("PERF_RECORD_LOST", "PERF_RECORD_LOST_SAMPLES"), parser.perf_record_lost),
            **dict.fromkeys((*NESTED, "kvm_exit"), parser.nested),
        }
        self._call_return = parser.call_return
        self._displaced: Handler = parser.displaced

    def __missing__(self, token: str) -> Handler | None:
        if not is_name(token):  # and the next one may be another number, so it is not kept
            return self._displaced
        name = event_name(token)
        is_return = name.removesuffix(" return") in CALLS and name.endswith(" return")
        handler = self._by_name.get(name, self._call_return if is_return else None)
        self[token] = handler
        self._parser.token(token, handler is not None)
        return handler

    def only_count(self, name: str) -> None:
        """From now on an event is counted, and not parsed."""
        if self._by_name.pop(name, None) is not None:
            self._forget(name)

    def parse(self, name: str, handler: Handler | None) -> None:
        """From now on an event is parsed, or only counted (None)."""
        if self._by_name.get(name) != handler:  # bound methods are equal, and never the same object
            self._by_name[name] = handler
            self._forget(name)

    def _forget(self, name: str) -> None:
        forgotten = [token for token in self if event_name(token) == name]
        for token in forgotten:
            del self[token]
        self._parser.forget(forgotten)


class EventRows:
    """State while events are read: calls that have not returned, rows and counts so far."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._rows = array("Q")
        self._lost = 0
        self._nested = NestedGuests()
        self._calls = TaskCalls()
        self._of_process = ProcessCalls()
        self._fast: FastLines | None = None
        self._advices: set[int] = set()  # that madvise() was given
        self._inputs: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()  # events that are only counted, by their first word
        self._outcomes: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._of_stage2 = Outcomes(self._rows, self._calls, self._outcomes, keep=keep)
        self._handlers = Handlers(self)

    def displaced(self, event: str, task: int, time: int, line: int) -> None:
        """An event behind padding or other columns."""
        raise NotImplementedError

    def token(self, token: str, is_parsed: bool) -> None:
        """An event's first word was seen."""
        if self._fast is not None:
            self._fast.add_token(token, is_parsed)

    def forget(self, tokens: list[str]) -> None:
        """What is done with events has changed."""
        if self._fast is not None:
            self._fast.drop_tokens(tokens)

    def outcomes(self) -> dict[str, Handler]:
        """Who parses which outcomes: most of them only where they are kept."""
        of_stage2 = self._of_stage2
        handlers: dict[str, Handler] = {SPTE_CHANGED: of_stage2.spte_changed}
        if self._keep:
            handlers |= {
                "kvm_mmu_zap_all_fast": of_stage2.zap_all,
                "fast_page_fault": of_stage2.fast_page_fault,
                "kvm_mmu_get_page": of_stage2.get_page,
            }
        return handlers

    def perf_record_lost(self, event: str, task: int, time: int, line: int) -> None:
        """tools/perf/util/event.c:perf_event__fprintf_lost(), also of PERF_RECORD_LOST_SAMPLES."""
        count = event.rpartition(" ")[2]
        self._lost += int(count) if count.isdecimal() else 1
        self._ignored[event_name(event.partition(" ")[0])] += 1

    def nested(self, event: str, task: int, time: int, line: int) -> None:
        """What a vCPU does on its way to and from an L2 guest, and exits until one told whose stage 2 there is."""
        name = event_name(event.partition(" ")[0])
        self._ignored[name] += 1
        self._nested.event(name, event, task)
        self._calls.note_l2(task, self._nested.is_l2(task))
        for other, is_wanted in self._nested.wanted.items():
            self._handlers.parse(other, self.nested if is_wanted else None)

    def _add(self, name: str, kind: Input, time: int, task: int, line: int, *words: int) -> int:
        """Append an input row; return its position."""
        position = len(self._rows)
        self._rows.extend((kind, time, task, line, *words, *_PADDING[len(words)]))
        self._inputs[name] += 1
        return position

    def page_fault_user(self, event: str, task: int, time: int, line: int) -> None:
        address, code = fields_of("page_fault_user", event)
        self._calls.end(task)  # the task is in user mode, so its call is over
        self._add("page_fault_user", Input.HOST_FAULT, time, task, line, int(address, 16), int(code, 16))

    def kvm_page_fault(self, event: str, task: int, time: int, line: int) -> None:
        vcpu, address, code = fields_of("kvm_page_fault", event)
        self._calls.note_fault(task, len(self._rows))
        number = NO_VCPU if vcpu is None else int(vcpu)
        # As _add() does it, written out: most inputs of a log are these.
        l2 = self._nested.is_l2(task)
        self._rows.extend((_GUEST_FAULT, time, task, line, int(address, 16), int(code, 16), number, 0, l2, 0))
        self._inputs["kvm_page_fault"] += 1

    def kvm_mmu_set_spte(self, event: str, task: int, time: int, line: int) -> None:
        if self._of_stage2.set_spte(event, task, time, line) and not self._keep:
            self._handlers.only_count(SPTE_CHANGED)  # which says the same of a fault, and more that nobody asks for

    def kvm_vm_set_mem_attributes(self, event: str, task: int, time: int, line: int) -> None:
        words = [int(field, 16) for field in fields_of("kvm_vm_set_mem_attributes", event)]
        self._calls.end(task)
        self._add("kvm_vm_set_mem_attributes", Input.ATTRIBUTES, time, task, line, *words)

    def kvm_hypercall(self, event: str, task: int, time: int, line: int) -> None:
        if _MAP_GPA_RANGE not in event:
            self._ignored["kvm_hypercall"] += 1
            return
        gpa, pages, attributes, _ = (int(field, 16) for field in fields_of("kvm_hypercall", event))
        self._add("kvm_hypercall", Input.MAP_GPA_RANGE, time, task, line, gpa, pages, attributes)

    def kvm_unmap_hva_range(self, event: str, task: int, time: int, line: int) -> None:
        start, end = (int(field, 16) for field in fields_of("kvm_unmap_hva_range", event))
        name, position = self._calls.current(task)
        if self._fast is not None:
            self._fast.add_unmap(is_input=not name)
        if not name:
            self._add("kvm_unmap_hva_range", Input.UNMAP, time, task, line, start, end)
            return
        self._outcomes["kvm_unmap_hva_range"] += 1
        if name == "sys_fallocate" and self._rows[position + 8] == 0:
            self._rows[position + 8] = start

    def kvm_memslot(self, event: str, task: int, time: int, line: int) -> None:
        hexadecimal, decimal, *rest = fields_of("kvm_memslot", event)
        slot = int(hexadecimal, 16) if hexadecimal else int(decimal)
        flags, gpa, size, hva = (int(field, 16) for field in rest)
        if max(gpa, hva) + size > _ADDRESSES:
            raise MalformedLineError(f"memory slot that ends beyond 64 bits: {event[:120]!r}")
        self._calls.end(task)
        self._add("kvm_memslot", Input.MEMSLOT, time, task, line, slot, flags, gpa, size, hva)

    def sys_madvise(self, event: str, task: int, time: int, line: int) -> None:
        start, length, behavior = fields_of("sys_madvise", event)
        advice = int(behavior, 16)
        position = -1
        if advice in _DISCARDING:
            words = int(start, 16), int(length, 16), advice
            position = self._add("sys_madvise", Input.MADVISE, time, task, line, *words)
        else:
            name = f"sys_madvise {ADVICE.get(advice, advice)}"
            self._ignored[name] += 1
            self._of_process.add(name, Input.MADVISE, time, task, line, int(start, 16), int(length, 16), advice)
        self._calls.begin(task, "sys_madvise", position)
        self._advices.add(advice)
        if self._fast is not None:
            self._fast.add_advice(advice)

    def sys_munmap(self, event: str, task: int, time: int, line: int) -> None:
        start, length = (int(field, 16) for field in fields_of("sys_munmap", event))
        position = self._add("sys_munmap", Input.MUNMAP, time, task, line, start, length)
        self._calls.begin(task, "sys_munmap", position)

    def sys_mmap(self, event: str, task: int, time: int, line: int) -> None:
        address, length, prot, flags, fd, offset = (int(field, 16) for field in fields_of("sys_mmap", event))
        words = address, length, fd, offset, flags & _LOW | (prot & _LOW) << 32
        position = self._add("sys_mmap", Input.MMAP, time, task, line, *words)
        self._calls.begin(task, "sys_mmap", position)

    def process_call(self, event: str, task: int, time: int, line: int) -> None:
        """What concerns a process's own memory: no inputs of a VM, but what sys_mprotect and sys_mremap unmap is their
        outcome."""
        name = event_name(event.partition(" ")[0])
        (self._outcomes if name in OUTCOMES else self._ignored)[name] += 1
        if name in CALLS:
            self._calls.begin(task, name, -1)
        self._of_process.event(name, event, task, time, line)

    def process_return(self, event: str, task: int, time: int, line: int) -> None:
        """The return of such a call."""
        name = event_name(event.partition(" ")[0])
        self._outcomes[name] += 1
        self._of_process.returned(task, name.removesuffix(" return"), _returned(event))

    def perf_fault(self, event: str, task: int, time: int, line: int) -> None:
        """perf's own events of faults: with the address, if they were recorded and printed with it, and no kind."""
        name = event_name(event.partition(" ")[0])
        found = _PERF_FAULT.match(event)
        if found is None:
            self._ignored[f"{name} without an address (perf record -d, perf script -F +addr)"] += 1
            return
        self._calls.end(task)
        address, instruction = int(found[1], 16), int(found[2], 16)
        code = _FETCH if address == instruction else 0
        self._add(name, Input.HOST_FAULT, time, task, line, address, code, int(not code))

    def sys_fallocate(self, event: str, task: int, time: int, line: int) -> None:
        words = [int(field, 16) for field in fields_of("sys_fallocate", event)]
        position = self._add("sys_fallocate", Input.FALLOCATE, time, task, line, *words)
        self._calls.begin(task, "sys_fallocate", position)

    def hugetlbfs_fallocate(self, event: str, task: int, time: int, line: int) -> None:
        inode, mode, offset, length, size, result = fields_of("hugetlbfs_fallocate", event)
        self._of_process.sizes[int(inode)] = int(size)
        if self._calls.current(task)[0] == "sys_fallocate":
            self._outcomes["hugetlbfs_fallocate"] += 1
            return
        words = int(inode), int(mode or "0", 8), int(offset), int(length)
        position = self._add("hugetlbfs_fallocate", Input.HUGETLBFS_FALLOCATE, time, task, line, *words)
        if int(result) < 0:
            self._rows[position + _STATE] = _FAILED

    def iommu(self, event: str, task: int, time: int, line: int) -> None:
        """iommu:map, iommu:unmap; other systems may have events of these names, too."""
        name = event_name(event.partition(" ")[0])
        if _IOMMU not in event:
            self._tokens[name] += 1
            return
        iova, _, *rest, size = fields_of(name, event)
        kind = Input.IOMMU_MAP if name == "map" else Input.IOMMU_UNMAP
        words = int(iova, 16), int(size), *(int(field, 16) for field in rest)
        self._add(f"iommu:{name}", kind, time, task, line, *words)

    def call_return(self, event: str, task: int, time: int, line: int) -> None:
        value = _returned(event)
        name = event_name(event.partition(" ")[0])
        self._outcomes[name] += 1
        self._of_process.returned(task, name.removesuffix(" return"), value)
        call, position = self._calls.end(task)
        if position < 0 or not name.startswith(call):
            return
        if value < 0 or value >= _FIRST_ERROR:
            self._rows[position + _STATE] = _FAILED
        elif call == "sys_mmap":
            self._rows[position + 4] = value


def _returned(event: str) -> int:
    """What a system call returned: "sys_x -> 0x0" or "sys_exit_x: 0x0", and behind it what columns perf has."""
    try:
        return int(event.replace(" -> ", " ", 1).split(maxsplit=2)[1], 16)
    except (ValueError, IndexError):
        raise MalformedLineError(f"malformed return of a system call, expected a number: {event[:120]!r}") from None
