"""What objects show of themselves: a line that says what they are, however much they hold."""

from __future__ import annotations

import copy
import enum
import os
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import pgemu
from comparisons import mixed
from pgemu.experiments.sensitivity import sensitivity
from pgemu.machine.config import Config
from pgemu.machine.results import RESULT_OF, RESULTS_OF, Errno, Result, RetPf, VmFault, result_name
from pgemu.machine.short import column, counted
from pgemu.objects.machine import Machine
from pgemu.tables.translation import Access, translate, translate_nested
from pgemu.trace import GivenSlot, LoweringOptions, load
from pgemu_kernels import words as W
from pgemu_kernels.words import operations
from pgemu_kernels.words.operations import PAGE_2M, Operation

VA = 0x7F00_0000_0000
LONGEST = 240


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """An object of every public class, each as large as makes a difference, by the class's name."""
    machine = Machine(Config("pfnmap", pool=64 << 20, page_size=PAGE_2M))
    gmem, process = machine.create_guest_memfd(64 << 20, shared=True), machine.create_process()
    vm = machine.create_vm(process)
    results = [process.mmap(gmem, VA), vm.bind(gmem, 0), process.touch(VA), vm.touch(0)]
    many = np.arange(16 << 10, dtype=np.uint64) << np.uint64(12)
    batch = vm.touch_many(many)
    table = machine.create_page_table("x86-64")
    edits = [table.map(0x5000, 0x1000), table.map(0x5000, 0x1000), table.unmap(0x5000)]
    path = tmp_path_factory.mktemp("image") / "m.elf"
    machine.write_image(path)
    trace = load("workload:tdx-boot")
    walks = translate(machine, 0, process.root, many + np.uint64(VA))
    nested = translate_nested(machine, 0, process.root, 1, vm.root, many)
    spaces = [machine.create_vfio_container(), machine.create_iommufd().create_ioas()]
    tlb = pgemu.Tlb()
    files = [machine.create_device(0x100, 4), machine.create_guest_memfd_4k(PAGE_2M), machine.create_memfd(PAGE_2M)]
    with machine.share(f"pgemu-short-{os.getpid()}", reserve=False) as shared:
        text = repr(shared)
    assert text.startswith("SharedMachine(")
    more = [
        *spaces, *files, machine.create_iommufd(), spaces[0].attach(), tlb, tlb.translate(table, many), tlb.counts,
        pgemu.Versions(), pgemu.GuestOptions(), nested, translate(machine, 0, process.root, many, references=True)[4],
    ]  # fmt: skip
    return {type(one).__name__: [one] for one in more} | {
        "Access": [Access(), Access(smep=False, pkru=5)],
        "AddressSpace": [process],
        "Comparison": [mixed(), *mixed().runs],
        "Config": [Config(), machine.config],
        "EditResult": edits,
        "EditResults": [table.map_many(many, many), table.unmap_many(many)],
        "Folio": [machine.folio(machine.register(W.R_POOL_BASE))],
        "GuestMemfd": [gmem],
        "Image": [pgemu.open_image(path)],
        "Lowered": [trace],
        "LoweringOptions": [LoweringOptions(), LoweringOptions(memslots=(GivenSlot(0, 1 << 30, None),))],
        "Machine": [machine],
        "PageTable": [table],
        "Records": [trace.records, trace.records[:0]],
        "Result": results,
        "Results": [batch, machine.run(trace.records[:0])],
        "Statistics": [machine.statistics],
        "Translation": [walks, nested],
        "Vm": [vm],
        "Layout": [trace.layout],
        "HugetlbPool": [machine.hugetlb()],
        "PhysicalMemory": [machine.memory],
        "OperationRun": list(mixed().runs[0].operations),
        "Sensitivity": [sensitivity(mixed()), *sensitivity(mixed()).trials],
    }


def test_every_object_is_one_short_line(instances: dict[str, list[Any]]) -> None:
    # A message, numbers; a list of entries; those of which the fixture has told, or that need HugeTLB of their own.
    others = {"InputError", "Flush", "Walk", "TlbFound", "SharedMachine", "HugetlbFile"}
    public = {name for name in pgemu.__all__ if isinstance(getattr(pgemu, name), type)}
    enums = {name for name in public if issubclass(getattr(pgemu, name), enum.Enum)}
    assert public - enums - others <= instances.keys()
    for name, objects in instances.items():
        for one in objects:
            text = repr(one)
            assert "\n" not in text, name
            assert len(text) <= LONGEST, (name, text)
            assert "array(" not in text, name
            assert " object at 0x" not in text, name
            assert text.startswith(type(one).__name__), name


def test_what_they_say(instances: dict[str, list[Any]]) -> None:
    assert [repr(one) for one in instances["Result"]] == [
        "Result(status=0, detail=0)",
        "Result(status=0, detail=0)",
        "Result(status=VM_FAULT_NOPAGE, detail=1)",
        "Result(status=RET_PF_FIXED, detail=2)",
    ]
    # 32 blocks of 2M, of which the first was touched before.
    assert repr(instances["Results"][0]) == (
        "Results(16,384: 16,353 RET_PF_SPURIOUS, 31 RET_PF_FIXED; detail=[2 2 2 ... 2 2 2])"
    )
    assert instances["Results"][0].outcomes == {"RET_PF_FIXED": 31, "RET_PF_SPURIOUS": 16353}
    names = instances["Results"][0].names
    assert len(names) == 16384
    assert [i for i, name in enumerate(names) if name == "RET_PF_FIXED"] == [512 * i for i in range(1, 32)]
    assert repr(instances["Machine"][0]) == "Machine(config=Config('pfnmap', pool=64 << 20, page_size=2 << 20))"
    assert repr(instances["GuestMemfd"][0]) == "GuestMemfd(inode=0, size=67108864, form='main')"
    assert repr(instances["Access"][1]) == "Access(smep=False, pkru=5)"
    assert repr(instances["Records"][1]) == "Records(0: none)"
    assert [one.name for one in instances["EditResult"]] == ["ok", "-EEXIST", "ok"]
    # A process's translation of what one touch mapped; everything else was never touched by the host.
    assert repr(instances["Translation"][0]).startswith("Translation(16,384: 16,383 NOT_PRESENT, 1 OK; physical=[0x")


@pytest.mark.parametrize("op", Operation)
def test_results_are_tuples_that_know_their_operation(op: Operation) -> None:
    for status in (0, 5, -11, -W.WOULD_SPIN):
        result = RESULT_OF[op](status, 7)
        assert result == (status, 7) == Result(status, 7)
        assert isinstance(result, Result)
        assert result.name == result_name(op, status)
        assert (result.name in repr(result)) == (status != 0)
        for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), result._replace(detail=7)):
            assert (again, repr(again), again.operation) == (result, repr(result), op)
    batch = RESULTS_OF[op](np.array([0, -11, -11]), np.zeros(3, np.uint64))
    assert batch.outcomes == {"-EAGAIN": 2, result_name(op, 0): 1}
    assert repr(pickle.loads(pickle.dumps(batch))) == repr(batch)


def test_results_of_no_known_operation_are_numbers() -> None:
    assert repr(Result(4, 0)) == "Result(status=status 0x4, detail=0)"
    assert repr(Result(-22, 0)) == "Result(status=-EINVAL, detail=0)"
    assert pickle.loads(pickle.dumps(Result(4, 1))) == (4, 1)
    machine = Machine(Config("pfnmap", pool=PAGE_2M, page_size=PAGE_2M))
    assert repr(machine.operate(255)) == "Result(status=-EOPNOTSUPP, detail=0)"  # type: ignore[arg-type]


def test_statuses_are_members_of_what_the_kernel_calls_them() -> None:
    words = {name: value for name, value in vars(W).items() if name.startswith(("RET_PF_", "VM_FAULT_"))}
    words |= {name: value for name, value in vars(operations).items() if re.fullmatch(r"E[A-Z]+", name)}
    members = {f"RET_PF_{one.name}": one for one in RetPf} | {f"VM_FAULT_{one.name}": one for one in VmFault if one}
    assert {name: int(one) for name, one in (members | {one.name: one for one in Errno}).items()} == words
    machine = Machine(Config("pfnmap", pool=PAGE_2M, page_size=PAGE_2M))
    process, vm = machine.create_process(), machine.create_vm()
    assert process.mmap_anonymous(VA, 4096).code is None
    assert process.touch(VA, write=True).code is VmFault.NOPAGE
    assert process.touch(VA).code is VmFault.PRESENT
    assert process.touch(0).code is VmFault.SIGSEGV
    assert vm.touch(0).code is RetPf.EMULATE
    assert (process.munmap(1, 1).code, process.munmap(1, 1).status) == (Errno.EINVAL, -Errno.EINVAL)
    assert Result(5, 0).code is Result(-W.WOULD_SPIN, 0).code is None


@pytest.mark.parametrize("op", Operation)
def test_a_member_and_a_name_say_the_same(op: Operation) -> None:
    for status in (*range(8), *(1 << bit for bit in range(3, 12)), *(-n for n in range(1, 130))):
        code, name = RESULT_OF[op](status, 0).code, RESULT_OF[op](status, 0).name
        if code is None:
            assert status >= 0 or name.startswith("-errno ")
            assert (
                status < 0
                or op not in (Operation.HOST_FAULT, Operation.GUEST_FAULT)
                or str(status) in name
                or "x" in name
            )
        else:
            assert abs(status) == code
            assert name in (f"RET_PF_{code.name}", f"VM_FAULT_{code.name}", f"-{code.name}", code.name.lower())


def test_a_stepped_operation_is_named_as_a_whole_one_is() -> None:
    machine = Machine(Config("pfnmap", pool=PAGE_2M, page_size=PAGE_2M))
    machine.create_guest_memfd(PAGE_2M)
    machine.create_vm(protected=True)
    machine.begin(3, Operation.GUEST_FAULT, address=0)
    while machine.step(3) == W.GO:
        pass
    assert machine.result(3).operation is Operation.GUEST_FAULT
    assert machine.result(3).name == machine.operate(Operation.GUEST_FAULT, address=0).name


@settings(deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 1 << 60)), st.lists(st.integers(0, (1 << 64) - 1)))
def test_counts_lose_nothing_and_columns_stay_short(counts: dict[str, int], values: list[int]) -> None:
    numbers = [int(part.split()[0].replace(",", "")) for part in counted(counts).split(", ") if counts]
    assert sum(numbers) == sum(counts.values())
    text = column(np.array(values, np.uint64))
    assert "\n" not in text
    assert len(text) <= 7 * 22


def test_a_walk_says_what_its_entries_are() -> None:
    machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
    gmem, process = machine.create_guest_memfd(2 << 20, shared=True), machine.create_process()
    assert process.mmap(gmem, 0x7000_0000_0000).status == 0
    *_, absent = process.walk(0x7000_0000_0000)
    process.touch(0x7000_0000_0000, write=True)
    walk = process.walk(0x7000_0000_0000)
    level, address, entry = walk[-1]
    assert (absent.entry, level) == (0, 1)
    assert repr(walk[-1]) == f"(1, {address:#x}, {entry:#x})"
    assert repr(walk).endswith(f"{walk[-1]} PRESENT RW USER ACCESSED DIRTY SPECIAL NX]")
    assert "<td>PRESENT RW USER ACCESSED DIRTY SPECIAL NX</td>" in walk._repr_html_()
