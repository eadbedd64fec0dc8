"""One trace on both designs: results, sums, checks, and the document."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from comparisons import HVA, INODE, converts_nothing, lowered, mixed, mixed_records, one, setup
from pgemu.errors import InputError
from pgemu.experiments.compare import DESIGNS, compare
from pgemu.experiments.metrics import METRICS
from pgemu.machine.results import result_name
from pgemu.objects.machine import Machine
from pgemu.trace import Flag, Operation
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K

RESTRUCTURE, PFNMAP = mixed().runs


def test_both_designs_return_what_the_kernel_returns() -> None:
    found = {run.design: {op.operation: op.outcomes for op in run.operations} for run in mixed().runs}
    host = {"VM_FAULT_SIGBUS": 1, "present": 1}
    common = {
        Operation.GUEST_FAULT: {"RET_PF_FIXED": 1, "RET_PF_SPURIOUS": 1},
        Operation.PUNCH_HOLE: {"ok": 1},
        Operation.MMAP: {"ok": 1},
        Operation.MUNMAP: {"ok": 1},
        Operation.BIND: {"ok": 1},
        Operation.UNBIND: {"ok": 1},
        Operation.GET: {"ok": 1},
        Operation.PUT: {"ok": 1},
        Operation.GUEST_ACCESS: {"-EOPNOTSUPP": 1},
    }
    assert found["restructure"] == common | {
        Operation.HOST_FAULT: host | {"VM_FAULT_LOCKED": 1},
        Operation.CONVERT: {"ok": 2, "-EAGAIN": 1, "-EINVAL": 1},
        Operation.ZAP: {"ok": 1},
    }
    assert found["pfnmap"] == common | {
        Operation.HOST_FAULT: host | {"VM_FAULT_NOPAGE": 1},
        Operation.CONVERT: {"ok": 3, "-EINVAL": 1},
        Operation.ZAP: {"-EINVAL": 1},
    }


def test_every_record_is_counted_once() -> None:
    for run in mixed().runs:
        assert run.count == len(mixed().lowered.records) == 18
        by_kind = Counter(mixed().lowered.records.op.tolist())
        assert {op.operation: op.count for op in run.operations} == by_kind


def test_the_state_is_that_of_the_traces_end() -> None:
    # One 2M page was split (7 vmemmap pages restored), merged again, and 511 tails were written each time.
    state = {metric.key: [metric.value(run.statistics) for run in mixed().runs] for metric in METRICS}
    assert state["folios_split"] == [1, 0]
    assert state["folios_merged"] == [1, 0]
    assert state["vmemmap_restored"] == [7 * PAGE_4K, 0]
    assert state["vmemmap_freed"] == [7 * PAGE_4K, 0]
    assert state["flushes_kernel"] == [2, 0]
    assert state["huge_pages_whole"] == [1, 1]
    assert state["refused_conversions"] == [2, 1]
    assert state["refused_zaps"] == [0, 1]
    # dec2025 zeroes the 4K that is used first and takes the folio for zeroed; pfnmap all of the leaf, page by page.
    assert state["zeroed_by_folio"] == [0, 0]
    assert state["zeroed_by_page"] == [PAGE_4K, PAGE_2M]


def test_estimates_are_bands_in_order() -> None:
    for run in mixed().runs:
        for op in run.operations:
            for band in (op.total, op.mean, op.p50, op.p99, op.worst):
                assert 0 < band[0] <= band[1]
            for end in (0, 1):
                assert op.p50[end] <= op.p99[end] <= op.worst[end] <= op.total[end]
                assert op.mean[end] * op.count == pytest.approx(op.total[end])


def test_closing_is_no_operation_of_the_trace() -> None:
    for run in mixed().runs:
        assert run.operation(Operation.CLOSE) is None
        end = run.end_of_life
        assert end.outcome == "ok"
        assert end.pool_free == end.pool == INODE // PAGE_2M
        assert end.zombies == 0
        assert end.vmemmap == end.vmemmap_at_boot
        assert 0 < end.cost[0] < end.cost[1]


def test_a_reference_never_dropped_keeps_a_huge_page_from_the_pool() -> None:
    records = [*setup(), one(Operation.GUEST_FAULT), one(Operation.GET)]
    for run in compare(lowered(records)).runs:
        assert (run.end_of_life.zombies, run.end_of_life.pool_free) == (1, INODE // PAGE_2M - 1)
        assert run.finding is None or run.finding.explained


def test_a_trace_that_closes_the_inode_leaves_nothing_to_close() -> None:
    for run in compare(lowered([*setup(), one(Operation.CLOSE)])).runs:
        assert run.end_of_life.outcome == "-EBADF"
        closed = run.operation(Operation.CLOSE)
        assert closed
        assert closed.count == 1


def test_restructure_maps_4k_where_pfnmap_maps_2m() -> None:
    values = {m.key: [m.value(run.statistics) for run in converts_nothing().runs] for m in METRICS}
    assert values["stage2_mapped_4k"] == [PAGE_4K, 0]
    assert values["stage2_mapped_2m"] == [0, PAGE_2M]
    assert values["host_mapped_4k"] == [PAGE_4K, PAGE_4K]


@pytest.mark.parametrize("check", ["end", "every", 1, 5, 1000])
def test_checking_changes_no_result(check: int | str) -> None:
    found, expected = (one.to_json()["designs"] for one in (compare(lowered(mixed_records()), check=check), mixed()))
    for run in (*found.values(), *expected.values()):  # a broken rule is found by each check until it holds again
        assert run.pop("broken") is None or run is not found["pfnmap"]
    assert found == expected


def test_the_document_is_plain_and_repeatable() -> None:
    again = compare(lowered(mixed_records()), check="every")
    assert json.dumps(again.to_json()) == json.dumps(mixed().to_json())
    document = json.loads(json.dumps(mixed().to_json()))
    assert list(document["designs"]) == list(DESIGNS)
    for design in document["designs"].values():
        assert sum(op["count"] for op in design["operations"].values()) == document["trace"]["records"]
        for op in design["operations"].values():
            assert sum(op["outcomes"].values()) == op["count"]
    # One page was read of a folio of which dec2025 zeroed another, noticed at the end and after closing.
    broken = document["designs"]["restructure"]["broken"]
    assert [(rule["rule"], rule["explained_by"]) for rule in broken["rules"]] == [
        ("STALE_CONTENTS", ["uptodate-unzeroed"])
    ]
    assert document["designs"]["pfnmap"]["broken"] is None
    assert document["trace"]["accounting"]["operations"] == 18
    assert [machine["page_size"] for machine in document["machines"].values()] == [PAGE_2M, PAGE_2M]


@pytest.mark.parametrize("options", [
    {"order": "rfc2", "split_form": "rfc2", "defects": ("allocation-race",)},
    {"order": "fixup", "merge": "lazy", "batch": "block"},
    {"order": "jan2026", "flush": "batched", "host_huge": True, "worker": "queued", "seed": 5},
])  # fmt: skip
def test_the_same_trace_and_options_give_the_same_document(options: dict[str, object]) -> None:
    first, second = (json.dumps(compare(lowered(mixed_records()), **options).to_json()) for _ in range(2))
    assert first == second
    assert json.loads(first)["machines"]["restructure"]["order"] == options["order"]


def test_designs_run_alone_and_in_the_order_asked_for() -> None:
    alone = compare(lowered(mixed_records()), designs=["pfnmap"])
    assert [run.design for run in alone.runs] == ["pfnmap"]
    assert alone.runs[0].operations == PFNMAP.operations
    turned = compare(lowered(mixed_records()), designs=["pfnmap", "restructure"])
    assert turned.runs[1].operations == RESTRUCTURE.operations


def test_progress_ends_with_every_record() -> None:
    calls: list[tuple[str, int, int]] = []
    compare(lowered(mixed_records()), check=7, progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "pfnmap"] == [("pfnmap", n, 18) for n in (7, 14, 18)]


@pytest.mark.parametrize("check", ["end", "every", 1])
def test_a_broken_machine_is_found(monkeypatch: pytest.MonkeyPatch, check: int | str) -> None:
    run = Machine.run

    def corrupt(self: Machine, records: object) -> object:
        results = run(self, records)  # type: ignore[arg-type]
        self.arrays.stats[int(W.STATS_GAUGES) + 2 * W.Gauge.STAGE2_LEAVES_4K] += 1
        return results

    monkeypatch.setattr(Machine, "run", corrupt)
    comparison = compare(lowered([*setup(), one(Operation.GUEST_FAULT)]), check=check, zero="page")
    assert comparison.broken
    for design in comparison.runs:
        assert design.finding
        assert design.finding.rule == "COUNTS"
        assert design.finding.index == W.Gauge.STAGE2_LEAVES_4K
        assert design.finding.after == (1 if check == 1 else 3)


@settings(max_examples=20, deadline=None)
@given(ahead=st.integers(0, 700), behind=st.integers(0, 300))
def test_a_finding_is_noticed_after_the_operation_that_made_it(ahead: int, behind: int) -> None:
    """Whichever way it is looked for; a first use of which 4K are zeroed shows another page of the folio."""
    nothing = one(Operation.HOST_FAULT, address=HVA)  # of a private page: SIGBUS
    records = [*setup(), *[nothing] * ahead, one(Operation.GUEST_FAULT, address=PAGE_2M + PAGE_4K), *[nothing] * behind]
    for check in ("every", 1):
        found = compare(lowered(records), ["restructure"], check=check).runs[0].finding  # type: ignore[arg-type]
        assert found is not None
        assert found.after == ahead + 3, check


def test_guest_memory_that_cannot_be_modelled_is_refused() -> None:
    trace = lowered(setup())
    huge = type(trace)(
        trace.records,
        type(trace.layout)(1 << 52, PAGE_2M, trace.layout.regions, trace.layout.slots),
        trace.init,
        trace.converts,
        trace.accounting,
        trace.source,
    )
    with pytest.raises(InputError, match="4,096 TiB of guest memory: more than"):
        compare(huge)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kernel": "5.4"}, "kernel '5.4': expected one of"),
        ({"vcpus": 0}, "vcpus 0: expected an integer from 1 to 4096"),
        ({"check": 0}, "check 0: expected 'end', 'every' or a positive number"),
        ({"designs": ["folio"]}, "design 'folio': expected one of restructure, pfnmap"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        compare(lowered(setup()), **options)  # type: ignore[arg-type]


def test_cpus_make_flushes_dearer_and_nothing_else() -> None:
    records = [*setup(), one(Operation.GUEST_FAULT), one(Operation.CONVERT, Flag.SHARED, length=PAGE_4K)]
    few, many = (compare(lowered(records), ["pfnmap"], vcpus=cpus).runs[0] for cpus in (1, 100))
    one_cpu, hundred = few.operation(Operation.CONVERT), many.operation(Operation.CONVERT)
    assert one_cpu
    assert hundred
    # One flush of the VM: 77.4 ns to 2.19 us for each vCPU.
    assert hundred.total[0] - one_cpu.total[0] == pytest.approx(99 * 77.4, rel=1e-3)
    assert hundred.total[1] - one_cpu.total[1] == pytest.approx(99 * 2 * 276.4e3 / 252, rel=1e-3)
    assert few.operation(Operation.GUEST_FAULT) == many.operation(Operation.GUEST_FAULT)


@pytest.mark.parametrize(
    ("op", "status", "name"),
    [
        (Operation.GUEST_FAULT, 0, "RET_PF_CONTINUE"),
        (Operation.GUEST_FAULT, 5, "RET_PF_FIXED"),
        (Operation.GUEST_FAULT, -14, "-EFAULT"),
        (Operation.HOST_FAULT, 0, "present"),
        (Operation.HOST_FAULT, 0x200, "VM_FAULT_LOCKED"),
        (Operation.CONVERT, 0, "ok"),
        (Operation.CONVERT, -11, "-EAGAIN"),
        (Operation.MMAP, -999, "-errno 999"),
    ],
)
def test_result_names(op: Operation, status: int, name: str) -> None:
    assert result_name(op, status) == name


def test_hva_of_the_trace_is_not_the_inodes_offset() -> None:
    outside = compare(lowered([*setup(), one(Operation.HOST_FAULT, address=HVA + INODE)])).runs[0]
    fault = outside.operation(Operation.HOST_FAULT)
    assert fault
    assert fault.outcomes == {"VM_FAULT_SIGSEGV": 1}
