"""Users of a process's pages in captured scenarios: what goes through get_user_pages() is a pin, held as long as there.

What neither takes a page nor changes an entry (userfaultfd, mbind, move_pages, ...) is passed over, its result too.
"""

from __future__ import annotations

from typing import Any

from oracle.capture import Operation
from oracle.operations import number
from pgemu_kernels import words as W

PAGE = 4096
# What a fault ends in that is a signal of a process, and -EFAULT of the kernel's own access.
SIGNALS = W.VM_FAULT_SIGBUS | W.VM_FAULT_SIGSEGV | W.VM_FAULT_HWPOISON | W.VM_FAULT_HWPOISON_LARGE
EIO = 5
SPLICED, FIXED_BUFFER, HELD, AT_ONCE = range(4)  # numbers of pins
FOLL_WRITE = 1  # of PIN_LONGTERM_TEST_START


class Consumers:
    """Operations of a replay, which has `process` and `put`."""

    process: Any
    machine: Any

    def put(self, address: int, value: int) -> None:
        raise NotImplementedError

    def _pin(self, address: str, length: str, pin: int, *, write: bool = False, longterm: bool = False) -> int:
        """Bytes pinned, or -errno."""
        at, size = number(address), number(length)
        pages = (at % PAGE + size + PAGE - 1) // PAGE
        done = self.process.pin(at - at % PAGE, pages * PAGE, pin=pin, write=write, longterm=longterm)
        return done.status or min(size, done.detail * PAGE)

    def _use(self, address: str, length: str, *, write: bool = False, longterm: bool = False) -> int:
        """The same given back at once."""
        done = self._pin(address, length, AT_ONCE, write=write, longterm=longterm)
        self.machine.unpin(AT_ONCE)
        return done

    def op_pvm(self, operation: Operation, address: str, length: str, how: str) -> int:
        return self._use(address, length, write=how == "w")

    def op_direct(self, operation: Operation, address: str, length: str, how: str) -> int:
        done = self._use(address, length, write=how == "r")
        if how == "r" and done > 0:
            self.put(number(address), 0)  # what /dev/ram0 holds
        return done

    op_aio = op_direct

    def op_ptpeek(self, operation: Operation, address: str) -> int:
        """PTRACE_PEEKDATA, _POKEDATA of a child."""
        child = self.process.fork()
        done = child.pin(number(address), PAGE, pin=AT_ONCE, write=operation.name == "ptpoke")
        self.machine.unpin(AT_ONCE)
        child.exit()
        return -EIO if done.status else 0

    op_ptpoke = op_ptpeek

    def op_selfmem(self, operation: Operation, address: str, length: str, how: str) -> int:
        done = self._use(address, length, write=how == "w")
        return -EIO if done < 0 else done

    def op_copy(self, operation: Operation, address: str, length: str, how: str) -> int:
        """copy_to_user(), copy_from_user(): accesses like any other."""
        first, size = number(address), number(length)
        statuses = [self.process.touch(at, write=how == "w").status for at in range(first, first + size, PAGE)]
        return -W.EFAULT if any(status & SIGNALS for status in statuses) else size

    def op_vmsplice(self, operation: Operation, address: str, length: str) -> int:
        return self._pin(address, length, SPLICED)

    op_vmsplicegift = op_vmsplice

    def op_splicedrop(self, operation: Operation) -> int:
        self.machine.unpin(SPLICED)
        return 0

    def op_uring(self, operation: Operation, address: str, length: str) -> int:
        return min(self._pin(address, length, FIXED_BUFFER, write=True, longterm=True), 0)

    def op_uringclose(self, operation: Operation) -> int:
        self.machine.unpin(FIXED_BUFFER)
        return 0

    def op_zerocopy(self, operation: Operation, address: str, length: str) -> int:
        return self._use(address, length)

    def op_xdpumem(self, operation: Operation, address: str, length: str) -> int:
        return min(self._use(address, length, write=True, longterm=True), 0)

    def op_guptest(self, operation: Operation, which: str, address: str, length: str, how: str = "") -> int:
        return max(self._use(address, length, write=how == "w", longterm=which == "3"), 0)

    def op_pinlong(self, operation: Operation, address: str, length: str, flags: str) -> int:
        return min(self._pin(address, length, HELD, write=bool(int(flags) & FOLL_WRITE), longterm=True), 0)

    def op_pinstop(self, operation: Operation) -> int:
        self.machine.unpin(HELD)
        return 0

    def op_futex(self, operation: Operation, address: str, how: str = "") -> int:
        """get_futex_key() takes the page for writing."""
        done = self._use(address, "4", write=True)
        return done if done < 0 else -W.EAGAIN if how == "wait" else 0

    def pass_over(self, operation: Operation, *words: str) -> None:
        """Not an operation of pgemu."""

    op_uffd = op_uffdclose = op_mbind = op_movepages = op_migratepages = op_udmabuf = op_msync = pass_over
