"""The tables of --details: complete, and readable at any width."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given, strategies as st
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from comparisons import INODE, converts_nothing, lowered, mixed, mixed_records, one, setup
from pgemu import cost, report
from pgemu.experiments.compare import Comparison, Finding, compare
from pgemu.experiments.metrics import METRICS
from pgemu.machine.results import operation_name
from pgemu.report import units
from pgemu.report.details import write, write_sources
from pgemu.report.fit import show
from pgemu.report.limits import LIMITS
from pgemu.report.sources import METRIC_SOURCES, OPERATION_SOURCES
from pgemu.trace import Flag, Layout, Operation, RefusedSlot


def text(comparison: Comparison, width: int = 80, sources: bool = False, encoding: str = "utf-8") -> str:
    out = StringIO()
    console = Console(file=out, width=width, highlight=False)
    if encoding != "utf-8":
        console = Console(file=_Encoded(encoding), width=width, highlight=False)
        out = console.file  # type: ignore[assignment]
    write(comparison, console)
    if sources:
        write_sources(comparison, console)
    return out.getvalue()


class _Encoded(StringIO):
    """A stream that claims an encoding, as a pipe in the C locale does."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def words(printed: str) -> str:
    return " ".join(printed.split())


@pytest.mark.parametrize("width", [30, 40, 80, 140])
def test_every_count_and_every_size_is_printed(width: int) -> None:
    """A console may be too narrow for the numbers: then lines are wider, and no number is broken."""
    printed = text(mixed(), width)
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= max(width, 80)
    lines = [words(line) for line in printed.splitlines()]
    for name in {name for run in mixed().runs for op in run.operations for name in op.outcomes}:
        assert any(name in line.split() for line in lines), name
    for metric in METRICS:
        write = units.size if metric.unit == "bytes" else units.count
        values = " ".join(write(metric.value(run.statistics)) for run in mixed().runs)
        assert f"{metric.label} {values}" in lines
    assert "all 18 18" in lines


@pytest.mark.parametrize("width", [80, 140])
def test_no_cell_is_cut(width: int) -> None:
    printed = text(mixed(), width, sources=True)
    assert "…" not in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_no_name_of_a_function_is_broken(width: int) -> None:
    """Every word of what a row models, and of every limit and price, is printed whole."""
    printed = set(text(mixed(), width, sources=True).split())
    functions = {
        source.function
        for table in (OPERATION_SOURCES, METRIC_SOURCES)
        for by_design in table.values()
        for sources in by_design.values()
        for source in sources
    }
    functions |= {limit.function for limits in LIMITS.values() for limit in limits}
    assert len(functions) > 50
    said = {word for function in functions for word in function.replace(".c:", ".c: ").replace(".h:", ".h: ").split()}
    assert said <= printed
    assert {word for price in cost.profile("published").values() for word in price.source.split()} <= printed


@pytest.mark.same_with_checks
@given(
    cells=st.lists(
        st.lists(st.text("ab -", max_size=30).map(str.strip), min_size=3, max_size=3), min_size=1, max_size=6
    ),
    wraps=st.lists(st.booleans(), min_size=3, max_size=3),
    width=st.integers(1, 100),
)
def test_a_fitted_table_breaks_no_word_and_is_wider_only_where_it_must(
    cells: list[list[str]], wraps: list[bool], width: int
) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for wrap in wraps:
        table.add_column("", no_wrap=not wrap, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    out = StringIO()
    console = Console(file=out, width=width)
    show(console, table)
    assert console.width == width
    words = [word for row in cells for cell in row for word in cell.split()]
    assert Counter(out.getvalue().replace("─", " ").split()) == Counter(words)
    least = [
        max((len(part) for row in cells for part in (row[i].split() if wrap else [row[i]])), default=0)
        for i, wrap in enumerate(wraps)
    ]
    widest = max(len(line) for line in out.getvalue().splitlines())
    assert widest <= max(width, sum(max(one, 1) for one in least) + 4)


def test_times_are_bands_labelled_as_an_estimate() -> None:
    printed = text(mixed())
    assert "Kernel time per operation: an estimate" in printed
    for run in mixed().runs:
        for op in run.operations:
            name = operation_name(op.operation)
            row = [units.band(*band) for band in (op.mean, op.p99, op.worst, op.total)]
            line = f"{run.design} {' '.join(row)}"
            assert line in words(printed), name


def test_what_each_design_cannot_do_is_always_said() -> None:
    printed = words(text(mixed(), 200))
    for limits in LIMITS.values():
        for limit in limits:
            assert words(limit.text) in printed


def test_one_design_has_one_column() -> None:
    printed = text(compare(lowered(mixed_records()), ["pfnmap"]))
    assert "restructure" not in printed.split("What each design cannot do")[0]
    assert "all 18" in words(printed)


def test_memory_is_told_with_its_reason() -> None:
    assert "all private, inferred: the trace converts" in words(text(mixed()))
    assert "all shared, inferred: the trace neither converts nor has private guest faults" in words(
        text(converts_nothing())
    )
    asked = compare(lowered(mixed_records(), "shared"))
    assert "all shared, as asked for" in words(text(asked))
    faults = lowered([*setup(), one(Operation.GUEST_FAULT, Flag.PRIVATE, address=0)])
    assert "all private, inferred: the trace has private guest faults" in words(text(compare(faults)))
    td = replace(lowered(setup()), machine={"vm": "tdx"})
    assert "all private, inferred: the VM is a TD" in words(text(compare(td)))
    assert "all private, as asked for" in words(text(compare(lowered(setup()))))
    assert f"{units.size(INODE)} in huge pages of 2 MiB" in words(text(mixed()))


def test_slots_left_out_name_the_reason() -> None:
    trace = lowered(setup())
    layout = Layout(
        INODE,
        trace.layout.page_size,
        trace.layout.regions,
        trace.layout.slots,
        (RefusedSlot(3, 0xFFFC_0000, 0x40000, "read-only memory slot"),),
        "inferred",
    )
    printed = words(text(compare(replace(trace, layout=layout))))
    assert "0xfffc0000 256 KiB - - left out: read-only memory slot" in printed
    assert "Memory slots, the trace has no slot lines: inferred from the guest addresses seen" in printed


def test_unknown_and_lost_events_are_named() -> None:
    trace = lowered(setup())
    trace.accounting.unknown["kvm_new_event"] = 1234
    trace.accounting.lost = 7
    printed = words(text(compare(trace)))
    assert "1,234 kvm_new_event" in printed
    assert "7 events, dropped by the ring buffer" in printed


def test_broken_invariants_are_one_line_each() -> None:
    runs = [replace(run, finding=Finding(2, "HOST_PRIVATE", 0x200, 5)) for run in mixed().runs]
    closed = replace(runs[1], finding=Finding(1, "FRAMES", 3, 19))
    broken = replace(mixed(), runs=(runs[0], closed))
    assert report.findings(broken) == [
        "restructure: 2 findings, the first: host private, page 0x200 of the guest_memfd, noticed after 5 of 18 "
        "operations",
        "pfnmap: 1 findings, the first: frames, frame, or count of frames, 0x3, noticed after closing",
    ]
    # The guest reads 4K of the folio that the branch marked after it had zeroed another: the version's own defect.
    assert [line.split(",")[0] for line in report.findings(mixed())] == ["restructure: 2 findings"]
    assert report.findings(mixed(), explained=False) == []
    assert "Broken invariants" in text(broken)
    assert "Broken invariants" not in text(converts_nothing())


def test_what_is_given_by_hand_is_told_and_versions_are() -> None:
    plain = words(text(mixed()))
    assert "by hand" not in plain.replace("made by hand", "")
    assert "restructure dec2025: branch of Dec 2025" in plain
    assert "mended allocation-race, mapping-order" in plain
    assert "zeroing restructure first 4K of each folio: uptodate-unzeroed, pfnmap by page" in plain
    options = {"order": "jan2026", "host_huge": True, "defects": ("rollback-at-zero",), "worker": "queued"}
    told = words(text(compare(lowered(mixed_records()), **options), width=200))
    assert "by hand order jan2026, defects rollback-at-zero, worker queued, host-huge True" in told


@pytest.mark.parametrize(
    ("check", "told"),
    [("end", "checked at the end: none broken"), (5, "checked every 5 operations and at the end: none broken")],
)
def test_the_way_of_checking_is_told(check: int | str, told: str) -> None:
    assert told in words(text(compare(lowered(setup()), check=check)))  # type: ignore[arg-type]


def test_sources_follow_when_asked_for() -> None:
    printed = words(text(mixed(), sources=True))
    assert "Sources: operations" in printed
    assert "mm/memory.c: vmf_insert_pfn" in printed
    assert "Prices: profile published" in printed
    assert "Sources: operations" not in text(mixed())


def test_a_pipe_without_utf8_gets_ascii() -> None:
    printed = text(mixed(), encoding="ascii", sources=True)
    assert printed.isascii()
    assert "What every operation returned" in printed
