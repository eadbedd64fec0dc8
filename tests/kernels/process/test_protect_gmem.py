"""mprotect() of a guest_memfd mapping, entry by entry as captured on Linux 7.3.4: folios of 4K counted (as merged) and
frames without counts (VM_PFNMAP); 2M entries of the latter."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
READ, WRITE, EXEC = 1, 2, 4
FRAME = (1 << 40) - 1 << 12


class Scene:
    """A shared inode of two 2M, mapped and bound whole."""

    def __init__(self, design: str, page_size: int = PAGE, **parameters: Any) -> None:
        config = Config(design, pool=4 * M2, page_size=page_size, kernel="7.3", **parameters)  # type: ignore[arg-type]
        self.machine = Machine(config)
        self.gmem = self.machine.create_guest_memfd(2 * M2, shared=True)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.process.mmap(self.gmem, VA).status == 0
        assert self.vm.bind(self.gmem, 0).status == 0

    def entry(self, page: int, level: int = 1) -> str:
        """Flags of an entry in hexadecimal as the captures have them, "~" where the frame is inverted."""
        found, _, value = self.process.walk(VA + page * PAGE)[-1]
        assert found == level
        if value == 0:
            return ""
        frame = (value & FRAME) >> 12
        pfn = self.gmem.pfn(page * PAGE if level == 1 else page * PAGE // M2 * M2)
        assert pfn is not None
        inverted = frame == ~pfn & (1 << 40) - 1
        assert inverted or frame == pfn
        return ("~" if inverted else "") + f"{value & ~FRAME:x}"

    def protect(self, prot: int, page: int = 0, pages: int = 16) -> None:
        assert self.process.protect(VA + page * PAGE, pages * PAGE, prot).status == 0


@pytest.mark.parametrize(
    ("design", "dirty", "clean", "written"),
    [
        ("restructure",
         ["8000000000000867", "8400000000000825", "8000000000000867", "~400000000000920"],
         ["8000000000000027", "8000000000000025", "8000000000000027", "~120"],
         "8000000000000067"),
        ("pfnmap",
         ["8000000000000267", "8400000000000225", "8000000000000267", "~400000000000320"],
         ["8000000000000227", "8000000000000225", "8000000000000227", "~320"],
         "8000000000000267"),
    ],
)  # fmt: skip
def test_4k_entries(design: str, dirty: list[str], clean: list[str], written: str) -> None:
    s = Scene(design)
    assert s.process.touch(VA, write=True).detail == s.process.touch(VA + PAGE).detail == 1
    found: list[list[str]] = [[s.entry(0)], [s.entry(1)]]
    for prot in (READ, READ | WRITE, 0):
        s.protect(prot)
        for page in (0, 1):
            found[page].append(s.entry(page))
        write = s.process.touch(VA, write=True).status if prot != READ | WRITE else W.VM_FAULT_SIGSEGV
        read = s.process.touch(VA).status if prot == 0 else W.VM_FAULT_SIGSEGV
        assert write == read == W.VM_FAULT_SIGSEGV
    assert found == [dirty, clean]
    assert s.machine.check() == 0, s.machine.broken
    s.protect(READ | WRITE)
    assert s.process.touch(VA + PAGE, write=True) == (0, 1)
    assert s.entry(1) == written
    assert s.machine.check() == 0, s.machine.broken
    s.protect(0)
    assert s.process.munmap(VA, 2 * M2).status == 0  # entries without rights are entries
    assert s.machine.check() == 0, s.machine.broken


def test_2m_entries() -> None:
    s = Scene("pfnmap", page_size=M2, host_huge=True)
    assert s.process.touch(VA, write=True).detail == s.process.touch(VA + M2).detail == 2
    assert (s.entry(0, 2), s.entry(512, 2)) == ("8000000000000ae7", "80000000000002a7")
    s.protect(READ, pages=1024)
    assert (s.entry(0, 2), s.entry(512, 2)) == ("8400000000000aa5", "80000000000002a5")
    s.protect(READ | WRITE, pages=1024)
    # Of 4 KiB: the whole entry is dropped, and what is used comes back by 4K, for the table is there.
    s.protect(READ, page=5, pages=1)
    assert s.process.walk(VA)[-1][2] & 1 == 0
    assert s.process.touch(VA + 5 * PAGE) == (W.VM_FAULT_NOPAGE, 1)
    assert s.entry(5) == "8000000000000225"
    assert s.process.touch(VA + 6 * PAGE, write=True) == (W.VM_FAULT_NOPAGE, 1)
    assert s.process.touch(VA + 7 * PAGE) == (W.VM_FAULT_NOPAGE, 1)
    assert (s.entry(6), s.entry(7)) == ("8000000000000267", "8000000000000227")
    assert s.process.touch(VA + 5 * PAGE, write=True).status == W.VM_FAULT_SIGSEGV
    assert s.machine.check() == 0, s.machine.broken


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_kvm_is_told_and_nothing_may_be_executed(design: str) -> None:
    """The slot's stage-2 entries go with the host's mprotect, though the slot does not use them; the next access of
    the guest works, whatever the host may do."""
    s = Scene(design)
    assert s.vm.touch(0).status == W.RET_PF_FIXED
    s.protect(READ)
    assert s.vm.touch(0, write=True).status == W.RET_PF_FIXED
    assert s.process.protect(VA, PAGE, READ | EXEC).status == -W.EACCES
    assert s.process.protect(VA + 4 * M2, PAGE, READ).status == -W.ENOMEM
    assert s.gmem.convert(0, PAGE, shared=False).status == 0
    assert s.process.touch(VA).status == W.VM_FAULT_SIGBUS
    assert s.machine.check() == 0, s.machine.broken
