"""What objects of a machine are to each other: equal, foreign, outlived, never copied; how notebooks show results."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu import Config, Machine, Result
from pgemu.objects.address_space import AddressSpace
from pgemu_kernels import words as W

M2, PAGE, VA = W.PAGE_2M, W.PAGE_4K, 0x400000


def build() -> Machine:
    return Machine(Config("pfnmap", pool=4 * M2, page_size=M2, allow_unsafe_mappings=True))


def objects(machine: Machine) -> dict[str, Any]:
    gmem = machine.create_guest_memfd(M2, shared=True)
    assert gmem.allocate(0, M2).status == 0
    process = machine.create_process()
    vm = machine.create_vm(process)
    assert process.mmap(gmem, VA).status == vm.bind(gmem, 0).status == 0
    return {
        "machine": machine, "gmem": gmem, "mapped": vm.map_page(0), "cache": vm.pfn_cache(0, 8),
        "small": machine.create_guest_memfd_4k(M2),
        "huge": machine.create_hugetlb_file(M2), "device": machine.create_device(0x1000, 512),
        "process": process, "vm": vm, "pool": machine.hugetlb(),
        "table": machine.create_page_table("ept"), "folio": machine.folio(gmem.pfn(0) or 0), "memory": machine.memory,
    }  # fmt: skip


KINDS = tuple(objects(build()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_nothing_that_stands_on_a_machine_is_copied(kind: str, copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^\w+ cannot be copied or pickled: .* Machine.copy\(\) makes"):
        copied(objects(build())[kind])


def test_results_and_configurations_are_copied() -> None:
    machine = build()
    for value in (machine.config, machine.work(), machine.statistics.gauge(W.Gauge.POOL_FREE)):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


@pytest.mark.parametrize("kind", KINDS)
def test_equal_is_what_names_the_same_object_of_the_same_machine(kind: str) -> None:
    one, other = (objects(build())[kind] for _ in range(2))
    assert one == one
    assert hash(one) == hash(one)
    assert one != other
    assert len({one, other}) == 2


def calls(mine: dict[str, Any], theirs: dict[str, Any]) -> list[Callable[[], Any]]:
    """Every call that takes an object, with one of another machine."""
    machine, process, vm = mine["machine"], mine["process"], mine["vm"]
    return [
        lambda: vm.bind(theirs["gmem"], 0), lambda: vm.release(theirs["gmem"]),
        lambda: vm.set_memory_region(0, 0, M2, VA, gmem=theirs["small"]),
        lambda: machine.create_vm(theirs["process"]), lambda: process.mmap(theirs["gmem"], VA),
        lambda: process.mmap(theirs["small"], VA), lambda: process.mmap_device(theirs["device"], VA),
        lambda: process.mmap_hugetlb(VA, file=theirs["huge"]),
    ]  # fmt: skip


def test_objects_of_another_machine_are_refused() -> None:
    mine, theirs = objects(build()), objects(build())
    for call in calls(mine, theirs):
        with pytest.raises(ValueError, match="expected one of the same machine"):
            call()
    assert mine["machine"].check() == 0


def test_objects_of_another_class_are_refused() -> None:
    mine = objects(build())
    for wrong in (mine["small"], mine["process"], 0, None, "gmem"):
        with pytest.raises(TypeError, match=r"^gmem .*: expected a GuestMemfd$"):
            mine["vm"].bind(wrong, 0)
    with pytest.raises(TypeError, match=r"^gmem .*: expected None or a GuestMemfd4K$"):
        mine["vm"].set_memory_region(0, 0, M2, VA, gmem=mine["gmem"])


def test_a_process_that_ended_is_not_the_next_one() -> None:
    machine = build()
    ended = machine.create_process()
    before = answers(ended) if ended.exit().status == 0 else []
    following = machine.create_process()
    assert following.space == ended.space
    assert following != ended
    assert following.mmap_anonymous(VA, PAGE).status == following.touch(VA, write=True).status & 0xFF == 0
    assert answers(ended) == before
    assert (ended.root, ended.rss, ended.minor_faults, ended.ended) == (0, 0, 0, True)
    assert (following.rss, following.ended) == (1, False)
    for call in (lambda: ended.walk(VA), lambda: ended.translate([VA]), lambda: machine.create_vm(ended)):
        with pytest.raises(ValueError, match="has ended"):
            call()
    assert AddressSpace(machine, following.space) == following
    assert machine.check() == 0


def answers(process: AddressSpace) -> list[Any]:
    return [
        process.mmap_anonymous(VA, PAGE), process.munmap(VA, PAGE), process.touch(VA),
        process.touch_many([VA]).status.tolist(), process.protect(VA, PAGE, 0), process.populate(VA, PAGE),
        process.exit(), process.madvise_dontneed(VA, PAGE), process.read_smaps(),
    ]  # fmt: skip


def test_a_vm_keeps_its_process_s_number_from_others() -> None:
    machine = build()
    process = machine.create_process()
    vm = machine.create_vm(process)
    assert process.mmap_anonymous(VA, M2).status == vm.set_memory_region(0, 0, M2, VA).status == 0
    assert process.exit().status == 0
    other = machine.create_process()
    assert other.mmap_anonymous(VA, M2).status == 0
    assert other.touch(VA, write=True).status == W.VM_FAULT_NOPAGE
    child = other.fork()
    assert process.space not in (other.space, child.space)
    assert vm.touch(0).status == -W.EFAULT
    assert vm.close().status == 0
    assert machine.create_process().space == process.space
    assert machine.check() == 0


@pytest.mark.parametrize("kind", ["huge", "device"])
def test_a_file_that_was_closed_is_not_the_next_one(kind: str) -> None:
    machine = build()
    file = objects(machine)[kind]
    process = machine.create_process()
    assert file.close().status == 0
    following = machine.create_hugetlb_file(M2)
    assert following.inode == file.inode
    assert following != file
    mmap = process.mmap_device if kind == "device" else lambda f, at: process.mmap_hugetlb(at, file=f)
    closing = [file.close, file.close, lambda: mmap(file, 16 * M2)]
    closing += [file.revoke, file.restore] if kind == "device" else [lambda: file.allocate(0, M2)]
    assert {call().status for call in closing} == {-W.EBADF}
    assert following.allocate(0, M2).status == following.close().status == 0
    assert machine.check() == 0


@pytest.mark.parametrize("kind", ["mapped", "cache"])
def test_a_mapping_that_is_gone_is_not_the_next_one(kind: str) -> None:
    machine = build()
    mapping = objects(machine)[kind]
    end = mapping.unmap if kind == "mapped" else mapping.deactivate
    assert (mapping.live, end().status, mapping.live) == (True, 0, False)
    process = machine.create_process()
    vm = machine.create_vm(process)
    gmem = machine.create_guest_memfd(M2, shared=True)
    assert process.mmap(gmem, VA).status == vm.bind(gmem, 0).status == 0
    following = vm.map_page(0) if kind == "mapped" else vm.pfn_cache(0, 8)
    assert following.number == mapping.number
    assert following != mapping
    assert end().status == -W.ENOENT
    assert [mapping.pfn, mapping.gpa, mapping.vm, mapping.references] == [0] * 4
    calls = [mapping.read, lambda: mapping.write(b"")]
    if kind == "cache":
        assert not mapping.check()
        calls += [mapping.refresh, lambda: mapping.activate(0, 8)]
    for call in calls:
        with pytest.raises(ValueError, match="it is gone, expected one that is not"):
            call()
    assert following.live
    assert vm.close().status == 0
    assert not following.live
    with pytest.raises(ValueError, match=r"^number [01]: expected that of a (MappedPage|PfnCache)$"):
        type(mapping)(machine, 1 - mapping.number)  # of the other kind
    assert machine.check() == 0


def test_a_vm_that_is_closed_has_nothing_to_walk() -> None:
    vm = build().create_vm()
    assert vm.close().status == 0
    for call in (lambda: vm.walk(0), lambda: vm.translate([0]), lambda: vm.translate_virtual(0, [0], 0)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is closed"):
            call()
    assert vm.leaves() == (0, 0, 0)


def test_references_past_the_last_frame_are_refused() -> None:
    """A frame number of 52 bits is an address of 64; one bit more would be another page's."""
    machine = build()
    gmem = machine.create_guest_memfd(M2, shared=True)
    assert gmem.allocate(0, M2).status == 0
    pfn = gmem.get_reference(0).detail
    for wrong in (pfn + (1 << 52), -1, pfn + 0.5, True, "0"):
        for call in (gmem.put_reference, lambda one: gmem.put_reference_many([one])):
            with pytest.raises((TypeError, ValueError), match=r"^pfns? .*: expected .*2\*\*52 - 1$"):
                call(wrong)
    assert gmem.put_reference_many([pfn]).status.tolist() == [0]
    assert machine.check() == 0


def test_notebooks_show_results_by_name_and_escaped() -> None:
    machine = build()
    process = machine.create_process()
    assert "<td>-EINVAL</td>" in machine.create_process().munmap(1, 1)._repr_html_()
    assert "<td>ok</td><td>7</td>" in Result(0, 7)._repr_html_()
    assert process.mmap_anonymous(VA, 64 * PAGE, populate=True).status == 0
    shown = process.translate(np.arange(VA, VA + 64 * PAGE, PAGE, np.uint64))._repr_html_()
    assert shown.count("<td>OK</td>") == 20
    assert shown.endswith("<p>20 of 64</p>")
    table = machine.create_page_table("x86-64")
    table.map(VA, 0)
    assert table._repr_html_().count("<tr>") == 5
    table.destroy()
    assert table._repr_html_().count("<tr>") == 1
    assert "<td>VM_FAULT_SIGSEGV</td><td>1</td>" in process.touch_many([VA + PAGE * 99])._repr_html_()
    from pgemu.machine.short import html_table

    assert "<td>&lt;b&gt;</td>" in html_table(("a",), [("<b>",)])


@pytest.mark.parametrize(
    "sizes",
    [{"pool": 1 << 50}, {"memory": 1 << 50}, {"frames": 1 << 40}, {"buddy": 1 << 50}, {"reserved": 1 << 50},
     {"pool": 1 << 46, "hvo": False}],
)  # fmt: skip
def test_a_machine_larger_than_this_computer_is_one_error(sizes: dict[str, Any]) -> None:
    with pytest.raises(OSError, match="more than this computer can hold") as told:
        Machine(Config("pfnmap", page_size=M2, **sizes))
    assert told.value.errno == W.ENOMEM
    assert "bytes for the metadata of Config(" in str(told.value)


def test_an_operation_takes_no_number_for_a_truth() -> None:
    process = build().create_process()
    for wrong in (1, 0, "no", None):
        with pytest.raises(TypeError, match="expected True or False"):
            process.touch(VA, write=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_past_the_methods(kind: str) -> None:
    """What an object was made with stays, and a name with a mistake in it is no new one."""
    mine = objects(build())
    for name in [*(name for name in vars(mine[kind]) if not name.startswith("_")), "root", "optimise_vmemmap"]:
        before = getattr(mine[kind], name, None)
        with pytest.raises(AttributeError):
            setattr(mine[kind], name, 5)
        assert getattr(mine[kind], name, None) is before or name == "root"
    assert mine["machine"].check() == 0


def test_what_has_a_setter_is_written() -> None:
    machine = build()
    machine.optimize_vmemmap = False
    pool = machine.hugetlb()
    pool.nr_overcommit_hugepages = 3
    assert (machine.optimize_vmemmap, pool.nr_overcommit_hugepages) == (False, 3)
    for wrong in (-1, 1.5, True, None, 1 << 64):
        with pytest.raises((TypeError, ValueError), match=r"^count .*: expected an integer from 0 to 2\*\*64 - 1$"):
            pool.nr_overcommit_hugepages = wrong  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"^on 1 \(int\): expected True or False$"):
        machine.optimize_vmemmap = 1  # type: ignore[assignment]
    assert repr(pool) == (
        "HugetlbPool(page_size=2 << 20, nr_hugepages=4, free_hugepages=4, resv_hugepages=0, surplus_hugepages=0)"
    )
    assert (pool == machine.hugetlb(), machine.check()) == (True, 0)
