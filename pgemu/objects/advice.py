"""What a process tells the kernel about its memory, or asks it to do to it: madvise(). mm/madvise.c"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgemu.machine.arguments import OfMachine
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.results import Result

__all__ = ("Advice",)


class Advice(OfMachine):
    """The advice of madvise(), of whatever has memory: a process."""

    def _operate(
        self, op: Operation, address: int = 0, length: int = 0, flags: int = 0, *, object_: int = 0, offset: int = 0
    ) -> Result:
        raise NotImplementedError

    def madvise_dontneed(self, address: int, length: int, *, locked: bool = False) -> Result:
        """madvise(MADV_DONTNEED): 0, -EINVAL for PFN and locked mappings, -ENOMEM over a hole, after all was done.

        locked: MADV_DONTNEED_LOCKED, of locked mappings too.

        From 6.14 on a last-level table that one call covers whole is freed. mm/madvise.c

        >>> process.rss, process.madvise_dontneed(0x80_0000, 8192).name, process.rss
        (3, 'ok', 1)
        """
        return self._operate(Operation.ZAP, address, length, Flag.MADVISE | (Flag.LOCKED_TOO if locked else 0))

    def madvise_dontfork(self, address: int, length: int) -> Result:
        """madvise(MADV_DONTFORK): a child does not get the mapping, also VM_PFNMAP. 0; -ENOMEM over a hole, all done;
        -EINVAL: address unaligned, range wraps, cut through a HugeTLB page. mm/madvise.c:is_madvise_valid()

        >>> process.madvise_dontfork(0x80_0000, 1 << 20).name, process.fork().touch(0x80_0000).name
        ('ok', 'VM_FAULT_SIGSEGV')
        """
        return self._operate(Operation.DONTFORK, address, length)

    def madvise_dofork(self, address: int, length: int) -> Result:
        """madvise(MADV_DOFORK): 0, -EINVAL for VM_PFNMAP, -ENOMEM over a hole. mm/madvise.c

        >>> process.madvise_dofork(0x80_0000, 4096).name
        'ok'
        """
        return self._operate(Operation.DOFORK, address, length)

    def madvise_hugepage(self, address: int, length: int) -> Result:
        """madvise(MADV_HUGEPAGE): faults may get huge pages where Config.thp is "madvise". 0, -ENOMEM over a hole.

        mm/khugepaged.c:hugepage_madvise()

        >>> process.madvise_hugepage(0x80_0000, 1 << 20).name
        'ok'
        """
        return self._operate(Operation.ADVISE_HUGE, address, length, Flag.WRITE)

    def madvise_nohugepage(self, address: int, length: int) -> Result:
        """madvise(MADV_NOHUGEPAGE): no fault gets a huge page; those that are there stay. 0, -ENOMEM over a hole.

        >>> process.madvise_nohugepage(0x80_0000, 1 << 20).name
        'ok'
        """
        return self._operate(Operation.ADVISE_HUGE, address, length)

    def madvise_collapse(self, address: int, length: int) -> Result:
        """madvise(MADV_COLLAPSE): what each 2M of anonymous memory has becomes a huge page, whatever Config.thp says.

        0; -EINVAL where not all could be, or the mapping cannot have huge pages (too short, MADV_NOHUGEPAGE, never
        written, a guest_memfd, HugeTLB, VM_PFNMAP); -ENOMEM without a huge page, frames for its contents, or over a
        hole; -EOPNOTSUPP for shmem, whose huge pages are not modelled. mm/khugepaged.c:madvise_collapse()

        >>> process.madvise_collapse(0x80_0000, 1 << 20).name  # no whole 2M
        '-EINVAL'
        """
        return self._operate(Operation.COLLAPSE, address, length)

    def populate(self, address: int, length: int, *, write: bool = False) -> Result:
        """madvise(MADV_POPULATE_READ) or _WRITE: 0, -ENOMEM, -EINVAL for VM_PFNMAP or without the right, -EFAULT.

        mm/madvise.c:madvise_populate()

        >>> process.populate(0x80_0000, 16384, write=True).name, process.touch(0x80_3000).name
        ('ok', 'present')
        """
        return self._operate(Operation.POPULATE, address, length, Flag.WRITE if write else 0)

    def guard_install(self, address: int, length: int) -> Result:
        """madvise(MADV_GUARD_INSTALL), 6.13 and later: pages go, every access ends in SIGSEGV; no mapping is cut.

        0, -EINVAL for VM_PFNMAP, HugeTLB and locked memory, -ENOMEM over a hole. mm/madvise.c

        >>> process.guard_install(0x80_0000, 4096).name, process.touch(0x80_0000).name
        ('ok', 'VM_FAULT_SIGSEGV')
        """
        return self._operate(Operation.GUARD_INSTALL, address, length)

    def guard_remove(self, address: int, length: int) -> Result:
        """madvise(MADV_GUARD_REMOVE): guards go, the pages are empty. 0, -EINVAL, -ENOMEM. mm/madvise.c

        >>> process.guard_install(0x80_0000, 4096).name, process.guard_remove(0x80_0000, 4096).name
        ('ok', 'ok')
        >>> process.touch(0x80_0000).name
        'VM_FAULT_NOPAGE'
        """
        return self._operate(Operation.GUARD_REMOVE, address, length)

    def madvise_hwpoison(self, address: int, length: int) -> Result:
        """madvise(MADV_HWPOISON): memory_failure() of each page, which this process met: it gets SIGBUS at once
        if the page is dirty.

        0; what memory_failure() returns at the first page that fails, -EBUSY of guest_memfd; -EFAULT for VM_PFNMAP and
        where no page can be had; -EINVAL, -ENOMEM. Machine.last_failure tells what was done to the last page.
        mm/madvise.c:madvise_inject_error()

        >>> process.madvise_hwpoison(0x80_0000, 4096).name, process.touch(0x80_0000).name
        ('ok', 'VM_FAULT_HWPOISON')
        """
        return self._operate(Operation.INJECT, address, length)

    def madvise_soft_offline(self, address: int, length: int) -> Result:
        """madvise(MADV_SOFT_OFFLINE): -EBUSY of guest_memfd, -EFAULT for VM_PFNMAP; see Machine.soft_offline().

        >>> process.madvise_soft_offline(0x4000_0000, 4096).name
        '-EBUSY'
        """
        return self._operate(Operation.INJECT, address, length, Flag.SOFT)
