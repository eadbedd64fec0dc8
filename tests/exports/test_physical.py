"""Accesses of a program as physical addresses: where the design's memory is, whatever runs between them."""

from __future__ import annotations

import numpy as np
import pytest

from exports_runs import M2, accesses, config, program_of, random_accesses
from pgemu import Kind, translate_nested
from pgemu.exports.physical import PhysicalRun, lines
from pgemu.trace.schema import Flag
from pgemu_kernels import words as W

DESIGNS = ("restructure", "pfnmap")


@pytest.mark.parametrize("vm", ["sw", "tdx"])
@pytest.mark.parametrize("allocation", ["sequential", "random", "thp"])
@pytest.mark.parametrize("design", DESIGNS)
def test_an_access_is_where_the_inode_has_its_page(design: str, allocation: str, vm: str) -> None:
    """Also while pages of I/O are converted between the accesses."""
    program = program_of(allocation=allocation, io_rate=0.05, io="convert")
    run = PhysicalRun(config(design, vm=vm), program)
    found, expected = [], []
    for seed in range(3):
        batch = program.feed(random_accesses(seed, 400, spaces=2))
        pieces = list(run.addresses(batch))
        found.append(np.concatenate([address for address, _ in pieces]))
        write = np.concatenate([write for _, write in pieces])
        assert np.array_equal(write, batch.accesses.flags & np.uint8(Flag.WRITE) != 0)
        expected += [((run.gmem.pfn(gpa) or 0) << 12) + gpa % 4096 for gpa in batch.physical.tolist()]
    assert np.concatenate(found).tolist() == expected
    assert run.counts == {"accesses": 1200, "without translation": 0}
    assert run.machine.check() == 0
    assert run.operations["convert"] > 50
    assert not run.failed


@pytest.mark.parametrize("design", DESIGNS)
def test_walks_read_what_a_nested_walk_reads(design: str) -> None:
    """The guest's tables, written to the machine's frames, walked by translate_nested(): the same references."""
    program = program_of(allocation="random")
    run = PhysicalRun(config(design), program)
    for _ in run.addresses(program.feed(random_accesses(1, 300))):
        pass
    batch = program.feed(random_accesses(2, 50).take(np.arange(50)))
    list(run.addresses(batch))
    again = program.feed(random_accesses(2, 50))  # nothing is left to be run between them
    assert not len(again.records)
    (address, write), *more = run.addresses(again, walks=True)
    assert not more
    run.write_tables()
    root = int(program.memory.roots[0])
    row = run.machine.register(W.R_STAGE2_FORMAT)
    walked = translate_nested(
        run.machine, 0, root, row, run.vm.root, again.accesses.address, Kind.USER_READ, references=True
    )
    assert (walked.status == 0).all()
    assert walked.references is not None
    expected, writes = [], []
    for i in range(50):
        reads = walked.references.reads[i, : walked.references.read_counts[i]].tolist()
        expected += [*reads, int(walked.physical[i])]
        writes += [*[False] * len(reads), bool(again.accesses.flags[i] & Flag.WRITE)]
    assert address.tolist() == expected
    assert write.tolist() == writes
    assert run.counts["references"] == len(expected) - 50


def test_walks_are_those_of_stage_2_as_it_is_then() -> None:
    """A page that is converted splits the 2M of the guest's tables and its page: five walks, an entry longer."""
    program = program_of()
    run = PhysicalRun(config("restructure"), program)
    batch = accesses([0x1000_0000 + n * 8 for n in range(20)])  # one page
    before = [len(address) for address, _ in run.addresses(program.feed(batch), walks=True)]
    assert run.gmem.convert(M2 - 4096, 4096, shared=True).status == 0
    run.vm.touch_many(range(0, M2, 4096))
    after = [len(address) for address, _ in run.addresses(program.feed(batch), walks=True)]
    assert before == [20 * (5 * 3 + 4 + 1)]  # five walks of stage 2 that end at level 2, four entries, the access
    assert after == [20 * (5 * 4 + 4 + 1)]
    assert run.counts == {"accesses": 40, "references": 20 * 19 + 20 * 24, "without translation": 0}


def test_lines_are_those_of_the_simulators() -> None:
    address, write = np.array([0x12340, 4096], np.uint64), np.array([False, True])
    assert lines("ramulator2", address, write) == "LD 0x12340\nST 0x1000\n"
    assert lines("ramulator", address, write) == "0x12340 R\n0x1000 W\n"
