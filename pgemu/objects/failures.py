"""What a memory failure did: read off the machine's record of the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgemu.machine.results import status_name
from pgemu_kernels import words as W
from pgemu_kernels.words.failures import MfPage, MfResult
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("MemoryFailure", "MfPage", "MfResult", "Signal", "fail_page", "last_failure")


class Signal(NamedTuple):
    """A SIGBUS that was sent.

    Attributes:
        space: number of the process
        address: si_addr
        code: si_code, 4 (BUS_MCEERR_AR) or 5 (BUS_MCEERR_AO)
        lsb: si_addr_lsb, log2 of the bytes that are lost
    """

    space: int
    address: int
    code: int
    lsb: int


class MemoryFailure(NamedTuple):
    """What memory_failure() returned, and did. mm/memory-failure.c

    Attributes:
        status: 0 or -errno, as Machine.memory_failure() lists them
        pfn: of the page
        action: what the kernel prints as the recovery action: IGNORED, FAILED, DELAYED, RECOVERED; NONE: none was taken
        page: the kind of page that it prints, None without an action
        replaced: page-table entries that became hwpoison entries
        dropped: large entries that a split dropped, and tables that sharers let go of
        stage2_dropped: stage-2 leaves dropped
        signals: the SIGBUS sent, the first words.SIGNALS of them
        signals_sent: how many there were
    """

    status: int
    pfn: int
    action: MfResult
    page: MfPage | None
    replaced: int
    dropped: int
    stage2_dropped: int
    signals: tuple[Signal, ...]
    signals_sent: int

    def __repr__(self) -> str:
        rest = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields[1:], self[1:], strict=True))
        return f"MemoryFailure(status={status_name(None, self.status)}, {rest})"


def last_failure(machine: Core) -> MemoryFailure:
    """The record of the last memory failure."""
    words = machine.arrays.state[int(W.STATE_FAILURE) :][: W.MF_WORDS].tolist()
    sent = words[int(W.MF_SIGNALS)]
    signals = []
    for i in range(min(sent, W.SIGNALS)):
        at = int(W.MF_SIGNAL) + i * W.MF_SIGNAL_WORDS
        space, address, code = words[at : at + W.MF_SIGNAL_WORDS]
        signals.append(Signal(space, address, code & 0xFF, code >> 8))
    action = MfResult(words[int(W.MF_ACTION)])
    page = None if action is MfResult.NONE else MfPage(words[int(W.MF_TYPE)])
    status = words[int(W.MF_STATUS)]
    replaced, dropped, stage2 = (words[int(word)] for word in (W.MF_REPLACED, W.MF_DROPPED, W.MF_STAGE2))
    status -= (status >> 63) << 64
    return MemoryFailure(status, words[int(W.MF_PFN)], action, page, replaced, dropped, stage2, tuple(signals), sent)


def fail_page(machine: Core, inode: int, offset: int, hardware: bool, early_kill: bool) -> MemoryFailure:
    """memory_failure() of a file's page: -EBADF, -EINVAL and -ENOENT where the file has none there."""
    flags = (Flag.HARDWARE if hardware else 0) | (Flag.EARLY_KILL if early_kill else 0)
    result = machine.operate(Operation.MEMORY_FAILURE, flags=flags, object_=inode, offset=offset)
    if -result.status in (W.EBADF, W.EINVAL, W.ENOENT):
        return MemoryFailure(result.status, 0, MfResult.NONE, None, 0, 0, 0, (), 0)
    return last_failure(machine)
