"""The machine as a library: what it refuses, and that no record whatever can harm it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine import boot
from pgemu.objects.machine import Config, Machine
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats, page_format
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K, Operation

HVA = 0x7F00_0000_0000
WORDS = st.one_of(
    st.sampled_from(
        [
            0, 1, 4095, 4096, PAGE_2M - 4096, PAGE_2M, 2 * PAGE_2M, 4 * PAGE_2M, HVA, HVA + 4096, HVA + 4 * PAGE_2M,
            1 << 47, (1 << 47) - 4096, 1 << 48, (1 << 48) - 4096, 1 << 52, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
        ]
    ),
    st.integers(0, 3 * PAGE_2M // PAGE_4K).map(lambda page: page * PAGE_4K),
    st.integers(0, 3 * PAGE_2M // PAGE_4K).map(lambda page: HVA + page * PAGE_4K),
    st.integers(0, (1 << 64) - 1),
)  # fmt: skip
SMALL = st.one_of(st.integers(0, 2), st.sampled_from([63, 64, 65535]))
CODES = st.one_of(st.sampled_from(sorted(Operation)), st.integers(0, 255))


@st.composite
def any_records(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Headers and columns, sensible and not: (op, flags, vm, space, object, address, offset, length)."""
    row = st.tuples(CODES, st.integers(0, 63), SMALL, SMALL, SMALL, WORDS, WORDS, WORDS)
    return draw(st.lists(row, min_size=1, max_size=40))


def machine_in_use(design: str) -> Machine:
    config = Config(design, pool=4 * PAGE_2M, page_size=PAGE_2M, order="jan2026", punch="zero")  # type: ignore[arg-type]
    machine = Machine(config)
    gmem = machine.create_guest_memfd(3 * PAGE_2M, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == 0
    assert vm.bind(gmem, 0).status == 0
    assert process.touch(HVA).status != 0
    return machine


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@given(records=any_records())
@settings(max_examples=150)
def test_no_record_harms_the_machine(design: str, records: list[tuple[int, ...]]) -> None:
    """Whatever it asks for, a record returns a result and the recount holds; the bounds-checked run has its say too."""
    machine = machine_in_use(design)
    columns = np.array(records, dtype=np.uint64).T
    op, flags, vm, space, object_, address, offset, length = columns
    header = op | flags << np.uint64(8) | vm << np.uint64(32) | space << np.uint64(48)
    machine.check_each()
    results = machine.run_columns(header, object_, address, offset, length, count=len(records))
    unknown = ~np.isin(op, [int(operation) for operation in Operation])
    assert (results.status[unknown] == -W.EOPNOTSUPP).all()
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@given(op=st.sampled_from([Operation.HOST_FAULT, Operation.GUEST_FAULT, Operation.CONVERT, Operation.ZAP]), word=WORDS,
       stride=st.integers(1, 1 << 48), flags=st.integers(0, 63))  # fmt: skip
@settings(max_examples=60)
def test_no_scattered_batch_harms_the_machine(design: str, op: Operation, word: int, stride: int, flags: int) -> None:
    """Batches of 64 and more look ahead at what they will touch; a mapping that reaches past the file is among it."""
    machine = machine_in_use(design)
    # Up to the largest offset that a file may have: mm/mmap.c:file_mmap_ok().
    past_the_file = {"address": HVA + (1 << 32), "offset": (1 << 63) - (1 << 31), "length": 1 << 30}
    assert machine.operate(Operation.MMAP, **past_the_file).status == 0
    steps = np.arange(200, dtype=np.uint64) * np.uint64(stride)
    spread = np.array([word], np.uint64) + steps
    past = np.uint64(HVA + (1 << 32)) + steps % np.uint64(1 << 30)
    header = np.uint64(op | flags << 8)
    for column in (spread, past, spread & np.uint64(0xFFFF_F000)):
        machine.run_columns(header, 0, column, column, PAGE_4K, count=200)
    assert machine.check() == 0, machine.broken


def test_an_entry_that_goes_astray_is_found_after_the_hole_beside_it() -> None:
    """A hole over part of a split huge page zeroes and leaves the entries, so a wrong one stays to be found."""
    machine = machine_in_use("restructure")
    machine.check_each()
    assert machine.operate(Operation.PUNCH_HOLE, length=PAGE_4K).status == 0
    assert machine.broken[0] == 0
    level, address, _ = machine.walk(int(machine.arrays.state[W.STATE_SPACES + W.S_ROOT]), HVA >> 12)[-1]
    assert level == 1
    machine.arrays.ram[address // 8] += np.uint64(PAGE_4K)
    assert machine.operate(Operation.PUNCH_HOLE, length=PAGE_4K).status == 0
    assert machine.broken[1] == W.Broken.WRONG_PFN


def test_operations_of_later_versions_are_refused_and_counted() -> None:
    machine = machine_in_use("pfnmap")
    assert machine.operate(Operation.GUEST_ACCESS).status == -W.EOPNOTSUPP
    assert machine.statistics.results(Operation.GUEST_ACCESS) == {-W.EOPNOTSUPP: 1}


def test_an_actor_beyond_the_records_is_misuse() -> None:
    machine = machine_in_use("pfnmap")
    with pytest.raises(ValueError, match="actor 1024: expected less than 1024"):
        machine.run(Records.build(1, op=Operation.GUEST_FAULT, actor=W.ACTORS))
    with pytest.raises(ValueError, match="actor -1"):
        machine.begin(-1, Operation.GUEST_FAULT)
    with pytest.raises(ValueError, match="flags 256: expected 0 to 255"):
        machine.operate(Operation.GUEST_FAULT, flags=256)
    with pytest.raises(ValueError, match="actor 5000"):
        machine.result(5000)


def test_an_actor_has_one_operation_at_a_time() -> None:
    machine = machine_in_use("restructure")
    with pytest.raises(ValueError, match="no operation under way"):
        machine.step(0)
    machine.begin(0, Operation.HOST_FAULT, address=HVA + PAGE_4K)
    assert machine.step(0) == W.GO
    with pytest.raises(ValueError, match="in the middle"):
        machine.begin(0, Operation.HOST_FAULT, address=HVA + PAGE_4K)
    assert machine.operate(Operation.HOST_FAULT, address=HVA + 2 * PAGE_4K).status == W.VM_FAULT_LOCKED
    assert [machine.step(0), machine.step(0)] == [W.GO, W.STOP]
    assert machine.result(0) == (W.VM_FAULT_LOCKED, 1)
    assert machine.check() == 0


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_what_goes_away_under_a_fault_is_not_mapped(design: str) -> None:
    """munmap, unbind and close between two steps of a fault: it retries, and maps nothing."""
    machine = machine_in_use(design)
    machine.begin(0, Operation.HOST_FAULT, address=HVA + PAGE_4K)
    machine.begin(1, Operation.GUEST_FAULT, address=2 * PAGE_4K)
    for actor in (1, 1, 0):
        assert machine.step(actor) == W.GO
    if design == "restructure":
        assert machine.step(1) == W.GO  # the folio is put
        assert machine.step(0) == W.GO  # the folio is looked up and the lock dropped
    held = machine.operate(Operation.UNBIND, address=0).status
    assert held == (0 if design == "restructure" else -W.EBUSY)  # pfnmap holds the lock until the entry is in
    assert machine.operate(Operation.MUNMAP, address=HVA, length=3 * PAGE_2M).status == 0
    while machine.step(0) == W.GO:
        pass
    assert machine.result(0).status == W.VM_FAULT_RETRY
    assert machine.operate(Operation.UNBIND, address=0).status == (-W.ENOENT if design == "restructure" else 0)
    assert machine.step(1) == W.STOP
    assert machine.result(1).status == W.RET_PF_RETRY
    assert machine.check() == 0, machine.broken


def test_a_reference_of_a_fault_under_way_is_not_the_callers_to_drop() -> None:
    machine = machine_in_use("restructure")
    machine.begin(0, Operation.HOST_FAULT, address=HVA + PAGE_4K)
    machine.step(0)
    machine.step(0)
    assert machine.operate(Operation.PUT, object_=0, offset=PAGE_4K).status == -W.ENOENT
    assert machine.step(0) == W.STOP
    assert machine.check() == 0


def test_columns_are_as_long_as_the_batch_or_one() -> None:
    machine = machine_in_use("pfnmap")
    with pytest.raises(ValueError, match="address of 2 elements: expected 3 or 1"):
        machine.run_columns(np.uint64(1), 0, np.zeros(2, np.uint64), count=3)
    for wrong in (np.array([-4096]), np.array([1.5])):
        with pytest.raises(ValueError, match=r"^address .*: expected an integer, or a sequence or array of integers"):
            machine.run_columns(np.uint64(1), 0, wrong, count=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"design": "split"}, "design"),
        ({"page_size": 8192}, "page_size 8192: expected bytes as an integer: 4096, 2097152, 1073741824"),
        ({"kernel": "5.15"}, "kernel"),
        ({"stage2": "s2"}, "stage2 's2': expected one of npt, ept"),
        ({"zero": "never"}, "zero"),
        ({"vcpus": 0}, "vcpus"),
        ({"frames": 0}, "frames"),
        ({"seed": -1}, "seed"),
        ({"profile": "guess"}, "cost profile"),
        ({"pool": PAGE_2M + 4096}, "multiple"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, object], text: str) -> None:
    good: dict[str, object] = {"design": "pfnmap", "pool": PAGE_2M, "page_size": PAGE_2M}
    with pytest.raises(ValueError, match=text):
        Config(**(good | change))  # type: ignore[arg-type]


def test_creating_too_much_fails_like_a_system_call() -> None:
    machine = Machine(Config("restructure", pool=2 * PAGE_2M, page_size=PAGE_2M))
    with pytest.raises(OSError, match="multiple of the huge page") as unaligned:
        machine.create_guest_memfd(4096)
    assert unaligned.value.errno == W.EINVAL
    machine.create_guest_memfd(PAGE_2M)
    with pytest.raises(OSError, match="cannot reserve") as too_large:
        machine.create_guest_memfd(2 * PAGE_2M)
    assert too_large.value.errno == W.ENOMEM
    with pytest.raises(OSError, match="needs more frames"):
        Machine(Config("restructure", pool=2 * PAGE_2M, page_size=PAGE_2M, frames=3))


def test_one_terabyte_of_optimised_pages_boots() -> None:
    """1024 huge pages: each its own vmemmap page and 8 pages of entries, as on a real machine."""
    machine = Machine(Config("pfnmap", pool=1 << 40))
    gauge = machine.statistics.gauge
    assert gauge(W.Gauge.VMEMMAP_PAGES) == 1024 + 1
    # 8 level-1 tables each; the pool's 16 GiB of vmemmap begin 512 MiB into a GiB (the frames before it
    # are 2^23), so 17 level-2 tables; one level-3 table and the root.
    assert machine.register(W.R_POOL_BASE) == 33 << 18
    assert gauge(W.Gauge.KERNEL_TABLES) == 8 * 1024 + 17 + 1 + 1


def test_a_machine_without_a_pool_has_ordinary_memory() -> None:
    machine = Machine(Config())
    assert machine.register(W.R_FRAMES) >= (64 << 20) // PAGE_4K
    assert machine.create_process().root
    assert machine.check() == 0
    with pytest.raises(OSError, match="cannot reserve"):
        machine.create_guest_memfd(W.PAGE_1G)


def test_ordinary_memory_adds_frames() -> None:
    assert Machine(Config(memory=1 << 30)).register(W.R_FRAMES) >= (1 << 30) // PAGE_4K
    with pytest.raises(ValueError, match="memory of 100 bytes"):
        Config(memory=100)


def test_each_register_is_set_once() -> None:
    """A register in two tables would have the value of whichever is written last."""
    read_off = (boot._OF_KERNEL, boot._OF_KERNEL_CONFIGURATION, boot._OF_CONFIG, boot._CHOICES, boot._ALIKE)
    names = [int(register) for table in (*read_off, boot._derived(Config(), 1 << 20)) for register in table]
    assert len(names) == len(set(names)) > 60


def test_a_format_has_one_row() -> None:
    machine = Machine(Config())
    first = machine.add_format(page_format.x86_64())
    assert first == 3
    assert machine.add_format(page_format.ept()) == formats.STAGE2_EPT  # what every machine has anyway
    assert machine.add_format(page_format.x86_64()) == first
    for bits in range(36, 48):
        machine.add_format(page_format.x86_64(maxphyaddr=bits))
        machine.add_format(page_format.ept(maxphyaddr=bits))
    for bits in range(36, 40):
        machine.add_format(page_format.npt(maxphyaddr=bits))
    with pytest.raises(ValueError, match="has 32 formats already"):
        machine.add_format(page_format.npt(maxphyaddr=40))


def test_the_fixed_formats_know_what_walkers_need() -> None:
    machine = Machine(Config(kernel="6.12", nx_huge_pages=True))
    first = int(W.STATE_FORMATS)
    rows = machine.arrays.state[first : first + 3 * W.F_WORDS].reshape(3, W.F_WORDS)
    ept = page_format.ept(kernel="6.12", nx_huge_pages=True)
    for row, fmt in zip(rows, (page_format.x86_64(kernel="6.12"), page_format.npt(kernel="6.12"), ept), strict=True):
        assert (row[16:] == fmt.row()[16:]).all()
    # ... and what the designs' mappings hold, which is not what PageFormat.encode() starts from.
    assert rows[0, W.F_LEAF_4K] == 0x8000_0000_0000_0867
    assert rows[0, W.F_SPECIAL_4K] == 0x8000_0000_0000_0227


def test_frames_can_run_short_at_will() -> None:
    machine = Machine(Config(frames=100))
    limit = machine.register(W.R_FRAMES_LIMIT)
    machine.limit_frames(0)
    with pytest.raises(OSError, match="no frame for a top table"):
        machine.create_process()
    machine.limit_frames(1)
    machine.create_process()
    with pytest.raises(OSError, match="no frame for a top table"):
        machine.create_process()
    machine.limit_frames(1000)
    assert machine.register(W.R_FRAMES_LIMIT) == limit
    machine.limit_frames(3)
    machine.limit_frames(None)
    assert machine.register(W.R_FRAMES_LIMIT) == limit
    with pytest.raises(ValueError, match="free -1: expected"):
        machine.limit_frames(-1)
