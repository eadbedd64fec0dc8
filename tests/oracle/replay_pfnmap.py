"""Runs captured scenarios of guest_memfd mapped three ways: as merged, as VM_PFNMAP, as that with holes that unmap.

The designs' machines run them: "plain" is restructure with 4K pages, which is what is merged, "pfnmap" is the preset
slides2025 of pfnmap, "unmap" is corrected. A scenario named "both" maps one file both ways on a machine of slides2025.
"plain" is also run by the ordinary kind of guest_memfd, on the machine that replays the other captures.

Compared: what replay_process compares; the frames that the scenario named, by what else has the same frame; their
struct pages (references, mapcount, uptodate, dirty, mapping, index) and first words; what loads return.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from oracle.capture import Capture, Checkpoint, Operation
from oracle.replay_process import (
    MismatchError,
    Replay,
    Snapshot,
    captured_entries,
    entries_here,
    frame,
    number,
    protection,
    returned,
    same_flags,
    size_of,
)
from pgemu.machine.presets import PFNMAP
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

FLAG_PFNMAP, FLAG_UNMAP, FLAG_HUGE = 1 << 16, 1 << 17, 1 << 18  # of creation, in the kernel that was captured
ESTALE, EPERM = 116, 1
UPTODATE, DIRTY, ON_LRU = 1 << 3, 1 << 4, 1 << 5
BUDDY = 0xF000_0000
TOUCHED = 0x5A5A_0000_0000_0000  # what the i-th store of a `touch` writes, plus i


class NotModelledError(Exception):
    """An operation that pgemu does not have: the replay ends before it."""


class Named(NamedTuple):
    """A frame that the scenario named: there, and here."""

    there: int
    here: int


def machine_of(variant: str, capture: Capture) -> Machine:
    """The machine that is like a variant of the captured kernel.

    Folios of 2 MiB are the page allocator's there, not HugeTLB pages, and so they are here.
    """
    common: dict[str, Any] = {
        "pool": 32 * W.PAGE_2M, "page_size": W.PAGE_4K, "kernel": capture.kernel, "stage2": capture.stage2,
    }  # fmt: skip
    if variant == "plain":
        return Machine(Config("restructure", order="next4k", **common))
    preset = "corrected" if variant == "unmap" else "slides2025"
    huge = is_huge(capture)
    return Machine(Config("pfnmap", defects=PFNMAP[preset].defects, large_folios=huge, host_huge=huge, **common))


class ReplayPfnmap(Replay):
    """One scenario of such a capture.

    ordinary: "plain" by the ordinary kind of guest_memfd. like: the variant whose machine it is, if not its own.
    """

    def __init__(
        self, capture: Capture, checkpoints: list[Checkpoint], *, ordinary: bool = False, like: str | None = None
    ) -> None:
        self.variant = like or variant_of(checkpoints[0].scenario)
        self.ordinary = ordinary
        self.huge = is_huge(capture)
        super().__init__(capture, checkpoints, None if ordinary else machine_of(self.variant, capture))
        self.named: dict[str, Named] = {}
        self.pfnmap: set[str] = set()  # files that are mapped as VM_PFNMAP
        self.gmem_pfnmap = False  # kvm.gmem_pfnmap
        self.elsewhere: set[int] = set()  # frames that served as something else there, as a page table
        self.stopped = ""

    def run(self) -> int:
        """Replay: how many checkpoints were equal, up to the first operation that pgemu does not have (`stopped`)."""
        done = 0
        for checkpoint in self.checkpoints:
            try:
                for operation in checkpoint.ops:
                    self.operate(checkpoint, operation)
            except NotModelledError as error:
                self.stopped = str(error)
                break
            self.compare(checkpoint)
            done += 1
        return done

    # ------------------------------------------------------------------ operations

    def op_gmem(self, operation: Operation, name: str, vm: str, size: str, bits: str) -> int | None:
        if self.ordinary:
            return super().op_gmem(operation, name, vm, size, str(int(bits, 0) & 3))
        made: Any = self.machine.create_guest_memfd(number(size), flags=int(bits, 0) & 3)
        self.gmems[name] = made
        if int(bits, 0) & FLAG_PFNMAP:
            self.pfnmap.add(name)
        return None

    def op_write(self, operation: Operation, path: str, value: str) -> None:
        if path.endswith("gmem_pfnmap"):
            self.gmem_pfnmap = value == "Y"
        elif self.variant not in ("pfnmap", "unmap"):  # which it does nothing to, as captured
            raise NotModelledError(f"{path}: page tables are not walked for it")

    def op_map(self, operation: Operation, address: str, length: str, rights: str, kind: str, option: str = "") -> int:
        at, size, prot = number(address), number(length), protection(rights)
        _, name, offset = kind.split(":")
        if prot & 4:
            return -EPERM  # the file system is mounted noexec: mm/mmap.c:do_mmap(), which pgemu is not asked
        more = {} if self.ordinary else {"counted": not (self.gmem_pfnmap or name in self.pfnmap)}
        file: Any = self.gmems[name]
        result = self.process.mmap(
            file, at, offset=number(offset), length=size, read_only=not prot & 2, private=option == "private", **more
        )
        return at if result.status == 0 else result.status

    def op_touch(self, operation: Operation, address: str, stride: str, count: str, how: str) -> int:
        done = super().op_touch(operation, address, stride, count, how)
        if how == "w" and done >= 0:
            for i in range(int(count)):
                self.put(number(address) + i * number(stride), TOUCHED + i)
        return done

    def op_prot(self, operation: Operation, address: str, length: str, rights: str) -> int:
        status = super().op_prot(operation, address, length, rights)
        if status == -W.EOPNOTSUPP:
            raise NotModelledError("mprotect() of a mapping of the designs' guest_memfd")
        return status

    def op_store(self, operation: Operation, address: str, value: str) -> int:
        status = self.process.touch(number(address), write=True).status
        self.put(number(address), int(value, 0))
        return 0 if status in (0, W.VM_FAULT_NOPAGE, W.VM_FAULT_LOCKED) else -W.EFAULT

    def op_storeif(self, operation: Operation, address: str, value: str, one: str, other: str) -> int:
        if self.named[one].here != self.named[other].here:
            return -ESTALE
        return self.op_store(operation, address, value)

    def op_peek(self, operation: Operation, address: str) -> int:
        self.process.touch(number(address))
        return self.word(self.pfn_at(number(address)))

    def op_pfnof(self, operation: Operation, name: str, address: str) -> None:
        self.named[name] = Named(returned(operation), self.pfn_at(number(address)))

    def op_mincore(self, operation: Operation, *words: str) -> None:
        """Not an operation of pgemu: it changes nothing."""

    def op_hwpoison(self, operation: Operation, *words: str) -> None:
        raise NotModelledError("memory failure")

    # ------------------------------------------------------------------ contents

    def pfn_at(self, address: int) -> int:
        level, _, entry = self.process.walk(address)[-1]
        return frame(entry) + ((address & size_of(level) - 1) >> 12)

    def put(self, address: int, value: int) -> None:
        """Store a word at the beginning of the page of an address."""
        pfn = self.pfn_at(address)
        if self.ordinary:
            self.machine.arrays.ram[pfn * 512] = value
        else:
            self.machine.write_frame(pfn, struct.pack("<Q", value))

    def word(self, pfn: int) -> int:
        """The first word of a page."""
        if self.ordinary:
            return int(self.machine.arrays.ram[pfn * 512])
        return int(struct.unpack("<Q", self.machine.read_frame(pfn)[:8])[0])

    # ------------------------------------------------------------------ comparing

    def compare(self, checkpoint: Checkpoint) -> None:
        where = f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}"
        leaves, tables = captured_entries(checkpoint, self.ranges)
        leaves_here, tables_here = entries_here(self.process, self.ranges)
        same_flags(f"{where}: leaves", leaves, leaves_here)
        same_flags(f"{where}: tables", tables, tables_here)
        self.compare_counts(where, tables)
        there = {(va, level, False): frame(entry) for (va, level), entry in leaves.items()}
        here = {(va, level, False): frame(entry) for (va, level), entry in leaves_here.items()}
        for row in checkpoint.raw.get("frames", []):
            there[row["name"], 0, False], here[row["name"], 0, False] = self.named[str(row["name"])]
        self.frames.compare(where, self.process.space, Snapshot(there, here))
        for row in checkpoint.raw.get("frames", []):
            self.compare_frame(where, row, self.named[str(row["name"])].here)
        self.compare_rules(where, checkpoint)

    def compare_frame(self, where: str, row: dict[str, Any], pfn: int) -> None:
        """The struct page of a frame that was named and is the file's or free, and what the page holds."""
        words = [int(word, 16) for word in row["words"]]
        free = words[3] == 0
        if free and row["refcount"]:
            self.elsewhere.add(row["name"])
            return  # it serves as something else there
        if not free:
            self.elsewhere.discard(row["name"])
        told = words[0] & UPTODATE or (free and row["name"] not in self.elsewhere)
        if told and self.word(pfn) != int(row["first_word"], 16):
            raise MismatchError(f"{where}: frame {row['name']} holds {self.word(pfn):#x}, captured {row['first_word']}")
        if self.ordinary:
            return
        ours = [int(word) for word in self.machine.struct_page(pfn)]
        if words[1] & 1 or ours[1] & 1:  # a tail
            theirs, found = [words[1], *words[3:7]], [ours[1], *ours[3:7]]
            if theirs != found:
                raise MismatchError(f"{where}: tail {row['name']}: {found}, captured {theirs}")
            return
        waits = not free and not words[0] & ON_LRU  # for the LRU list, in a batch that holds a reference
        theirs = [
            words[0] & (UPTODATE | DIRTY), words[3] != 0, words[4], words[5], words[6] - ((1 << 32) if waits else 0),
        ]  # fmt: skip
        found = [ours[0] & (UPTODATE | DIRTY), ours[3] != 0, ours[4], ours[5], ours[6]]
        in_buddy = any(word & 0xFFFF_FFFF == BUDDY for word in (words[6], ours[6]))
        if free and in_buddy:  # in which list a free page waits, and joined to how many, is the allocator's choice
            theirs, found = theirs[:3], found[:3]
        if theirs != found:
            raise MismatchError(
                f"{where}: frame {row['name']}: {list(map(hex, found))}, captured {list(map(hex, theirs))}"
            )

    def compare_rules(self, where: str, checkpoint: Checkpoint) -> None:
        """No rule is broken but by entries that a hole left, where the preset has that defect."""
        if self.machine.check() == 0:
            return
        first = self.machine.register(W.R_BROKEN_FIRST) >> 48
        defects = self.machine.config.defects
        if "punch-keeps-entries" not in defects or first != W.Broken.WRONG_PFN:
            raise MismatchError(f"{where}: rules broken: {self.machine.broken}")


def variant_of(scenario: str) -> str:
    """ "plain", "pfnmap", "unmap" or "both"."""
    return scenario.rsplit("-", 1)[1]


def is_huge(capture: Capture) -> bool:
    """Whether a capture's folios are of 2 MiB."""
    return capture.name.endswith("-2m")


def replayable(capture: Capture, scenario: str) -> bool:
    """Whether a scenario of these captures is one of those replayed."""
    if is_huge(capture):
        return scenario[:2] == "52" and variant_of(scenario) != "plain"
    return scenario[:2] in ("01", "06", "14")
