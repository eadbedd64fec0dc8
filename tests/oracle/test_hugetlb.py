"""Captured HugeTLB history replayed: vmemmap, struct pages and counters of every `full` checkpoint, 90-hvo included.

Not compared, and why:

- the vmemmap below 0xffffea0004000000: RAM under 4 GiB, which is in no HugeTLB zone; and that of the device memory
  at 0xffffea03f3800000 in the small 7.3.4;
- counters of Debian's 7.3.4 once it has freed a 1G page of boot (README of the captures); all else there is compared;
- counts of page tables where the last thing that happened is a munmap(), on kernels that free tables after a grace
  period (6.14 and later).

Words of struct pages whose value is the address of a kernel object, which nobody can know, are named here with their
number: wherever the kernel has the same object, so has pgemu, and the other way round. No other word is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from oracle import capture as oracle
from oracle.operations import MismatchError, every
from oracle.replay_hugetlb import END, VMEMMAP, ZONE, History, frames_of, vmemmap_here
from pgemu_kernels import words as W


class Totals(NamedTuple):
    """What one capture has; the last three are words named as unknowable, out of `words`."""

    entries: int
    words: int
    counters: int
    list_heads: int
    address_spaces: int
    cgroups: int


CHECKPOINTS = 15  # 2 of 04-hugetlb-2m, 3 of 05-hugetlb-1g, 10 of 90-hvo
LEAVES = 263  # HugeTLB entries of processes, at all checkpoints on the way
HUGE_PAGES = 1511
SHIPPED = {
    "oracle/linux-6.12.107-debian": Totals(138630, 56320, 132, 56, 6, 6),
    "oracle/linux-6.18.15-debian": Totals(146310, 56320, 140, 54, 8, 8),
    "oracle/linux-7.3.4-debian-pti": Totals(138630, 56320, 104, 28, 4, 4),
    "oracle/linux-7.3.4-small": Totals(138630, 56320, 140, 28, 4, 0),
}
OBJECTS = ("list head in struct hstate", "struct address_space", "struct hugetlb_cgroup")


def closes_files_with_their_pages(capture: oracle.Capture) -> bool:
    """Whether a scenario maps hugetlbfs files privately and shared, which its end gives back in one go."""
    kinds = {op.words[4].split(":")[0] for op in every(capture.checkpoints) if op.name == "map"}
    return {"hfile", "phfile"} <= kinds


@pytest.fixture(scope="module")
def history(path: Path) -> History:
    """A capture whose history was run to the end: MismatchError at the first difference."""
    capture = oracle.load(path)
    if not capture.replayed:
        pytest.skip(f"{capture.kernel}: entries are decoded, operations are not run")
    if not any(checkpoint.full for checkpoint in capture.checkpoints):
        pytest.skip("no checkpoint with struct pages")
    if closes_files_with_their_pages(capture):
        pytest.skip("in which order a process that ends gives back the pages of several files is not known")
    history = History(capture)
    assert history.run() == len(history.full)
    return history


def test_every_full_checkpoint_is_equal(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    totals, unknown = history.totals, history.unknown
    with capsys.disabled():
        done = f"{totals['checkpoints']}/{len(history.full)} full checkpoints replayed"
        print(f"\n{history.capture.name}: {done}: ", end="")
        print(", ".join(f"{count} {name}" for name, count in totals.items() if name != "checkpoints"))
        print("  of these words, addresses of kernel objects, compared as the same object or not: ", end="")
        print(", ".join(f"{count} {name}" for name, count in unknown.items()))
    assert totals["checkpoints"] == len(history.full)
    assert set(unknown) <= set(OBJECTS)
    if history.capture.shipped:
        assert (totals["checkpoints"], totals["HugeTLB entries of processes"]) == (CHECKPOINTS, LEAVES)
        assert totals["HugeTLB pages"] == HUGE_PAGES
        found = (totals["entries of the vmemmap"], totals["words of struct pages"], totals["changes of counters"])
        assert Totals(*found, *(unknown[name] for name in OBJECTS)) == SHIPPED[history.capture.name]


def spoiled(history: History) -> dict[str, Callable[[], tuple[int, int]]]:
    """Words of the machine to change, each (index in `ram`, new value), at the last checkpoint."""
    machine = history.machine
    ram = machine.arrays.ram
    here = vmemmap_here(machine)
    shown = history.full[-1].struct_pages[0].pfn
    directory = here.tables[VMEMMAP, 3] & 0x000F_FFFF_FFFF_F000

    def slot(pfn: int) -> int:
        address = VMEMMAP + (pfn << 6)
        table = int(ram[directory // 8 + (address >> 21 & 511)]) & 0x000F_FFFF_FFFF_F000
        return table // 8 + (address >> 12 & 511)

    def word(pfn: int, number: int) -> int:
        return int(here.frame[pfn - ZONE >> 6]) * 512 + (pfn & 63) * 8 + number

    def bit(at: int, number: int) -> tuple[int, int]:
        return at, int(ram[at]) ^ 1 << number

    return {
        "a flag of the head": lambda: bit(word(shown, 0), 2),
        "a link of the head": lambda: bit(word(shown, 1), 15),
        "a word of a tail": lambda: bit(word(shown + 40, 5), 0),
        "a reference of the last tail shown": lambda: bit(word(shown + 127, 6), 32),
        "a writable entry of the vmemmap": lambda: bit(slot(shown), 1),
        "an entry that has another's frame": lambda: (slot(shown), int(ram[slot(shown + 512)])),
        "an entry that has a frame of its own": lambda: bit(slot(shown + 64), 40),
    }


def test_a_changed_word_is_found(history: History) -> None:
    """The comparison of the last checkpoint passes once more, and fails after any one change."""
    last = history.full[-1]
    history.compare_memory(last)
    ram = history.machine.arrays.ram
    for what, change in spoiled(history).items():
        at, value = change()
        before, ram[at] = int(ram[at]), value
        assert differs(history), f"{what} was not noticed"
        ram[at] = before
    history.compare_memory(last)


def test_a_changed_count_is_found(history: History) -> None:
    state = history.machine.arrays.state
    for word in (W.H_PAGES, W.H_FREE, W.H_RESERVED, W.H_SURPLUS):
        at = int(W.STATE_HSTATES) + int(word)
        state[at] += 1
        assert differs(history), int(word)
        state[at] -= 1
    assert not differs(history)


def differs(history: History) -> bool:
    """Whether the machine differs from the last checkpoint."""
    try:
        history.compare_memory(history.full[-1])
    except MismatchError:
        return True
    return False


def test_pages_are_those_of_the_capture(history: History) -> None:
    """What 90-hvo leaves: the pages of the pool at the end, in the order of the links in their struct pages."""
    pool = history.machine.hugetlb(W.PAGE_2M)
    assert sorted(pool.free_list()) == frames_of(history.full[-1])
    assert all(ZONE <= pfn < END for pfn in pool.free_list())
    assert history.machine.hugetlb(W.PAGE_1G).free_list() == frames_of(history.full[-1], W.PAGE_1G)
