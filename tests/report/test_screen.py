"""The first screen: small, plain, and complete."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from comparisons import HVA, converts_nothing, lowered, mixed, mixed_records, one, setup
from pgemu.experiments.compare import Comparison, compare
from pgemu.experiments.effects import with_effects
from pgemu.experiments.sensitivity import Sensitivity, sensitivity
from pgemu.experiments.verdict import QUESTIONS, Trial, measure, paired, refused, verdict
from pgemu.machine.config import DEFECTS
from pgemu.machine.presets import LIKE, PFNMAP, Versions
from pgemu.report.screen import HEIGHT, WIDTH, causes, mixed as by_hand, screen
from pgemu.trace import Flag, Lowered, LoweringOptions, Operation, Records, load, shipped
from pgemu.trace.log import Doubt
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from pgemu_kernels.words.rows import SPINS
from random_traces import traces

HUGETLB = Path(__file__).parents[1] / "data" / "traces" / "vm-boot-microvm-hugetlb.ftrace.txt.xz"


def shown(comparison: Comparison, found: Sensitivity | None = None) -> str:
    return screen(comparison, verdict(comparison, found), found)


def assert_fits(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= HEIGHT == 24
    assert max(map(len, lines)) <= WIDTH == 80
    assert text.isascii()
    assert text.isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}
    assert all(line == line.rstrip() for line in lines)
    for question in QUESTIONS.values():
        assert sum(line.startswith(f"{question.text} ") for line in lines) == 1


@pytest.mark.parametrize("trace", [shipped(), HUGETLB], ids=lambda path: path.name.split(".")[0])
def test_recorded_traces(trace: Path) -> None:
    comparison = compare(load(trace, LoweringOptions()))
    found = sensitivity(comparison)
    text = shown(comparison, found)
    assert_fits(text)
    assert "\nrestructure like dec2025 (branch of Dec 2025); pfnmap corrected (slides, mended)\n" in text
    assert "1 vCPU, Linux 6.18\n" in text
    assert f"{len(found.trials)} alternatives tried" in text
    assert_fits(shown(comparison))
    if trace == HUGETLB:
        assert "refuses huge pages that are shared at first (-EINVAL)" in " ".join(text.split())


def test_a_confidential_boot_with_and_without_overlap() -> None:
    """The workload's ends: the screen says what the other one would be, though there is no room for all causes."""
    trace = load("workload:tdx-boot", LoweringOptions(), 0, overlap=1.0)
    comparison = compare(trace)
    text = shown(comparison)
    assert_fits(text)
    assert "both: tdx VM, memory private at first, EPT, 8 vCPUs, Linux 6.18" in text


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(traces())
def test_random_comparisons_fit(trace: Lowered) -> None:
    comparison = compare(trace)
    assert_fits(shown(comparison, sensitivity(comparison)))


def test_what_a_question_rests_on_is_named() -> None:
    comparison = compare(load(shipped(), LoweringOptions()))
    text = " ".join(shown(comparison, sensitivity(comparison)).split())
    assert "guest faults undecided if pfnmap zeroed whole folios (pfnmap-zeroing)" in text
    assert "leaves >= 2M alike if pfnmap mapped whole huge pages or 4K, no level between (pfnmap-level)" in text


def test_what_is_broken_names_its_defect() -> None:
    # One page of the 2M folio is zeroed; the guest's leaf shows it whole.
    assert "restructure shows stale contents of 511 pages (uptodate-unzeroed)" in " ".join(shown(mixed()).split())


def test_a_defect_without_effect_explains_nothing() -> None:
    """Until that is tried each of those that could explain it may be the one."""
    comparison = compare(lowered(mixed_records()), defects=("uptodate-unzeroed", "punch-keeps-entries"))
    text = " ".join(shown(comparison).split())
    assert "restructure shows stale contents of 511 pages (punch-keeps-entries or uptodate-unzeroed)" in text
    tried = with_effects(comparison)
    text = " ".join(shown(tried).split())
    assert "restructure shows stale contents of 511 pages (uptodate-unzeroed)" in text
    assert verdict(tried)["broken"].basis.rules == (("uptodate-unzeroed", "without", -1),)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces(), st.sampled_from(["rfc2", "dec2025"]), st.sets(st.sampled_from(sorted(DEFECTS)), max_size=4))
def test_no_defect_without_effect_is_named_as_a_cause(trace: Lowered, like: Any, names: set[str]) -> None:
    comparison = with_effects(compare(trace, versions=Versions(like), defects=tuple(names)))
    idle = comparison.without_effect.defects
    for name in {name for run in comparison.runs for name in run.config.defects}:
        if all(name in idle.get(run.design, ()) for run in comparison.runs if name in run.config.defects):
            found = sensitivity(comparison)
            assert not [text for text in causes(comparison, found) if name in text]
            assert name not in shown(comparison, found).partition("-" * WIDTH)[2]


def test_a_design_that_zeroes_by_page_does_not_zero_by_folio_for_a_defect() -> None:
    comparison = compare(lowered(mixed_records()), defects=("uptodate-unzeroed",))
    text = " ".join(causes(comparison))  # what is untested takes its room on the screen
    assert "restructure 4 KiB (first 4K of each folio: uptodate-unzeroed), pfnmap 2 MiB (by page)" in text


@pytest.mark.parametrize("unknown", [{}, {"kvm_guest_fault": 2}, {"a": 3, "b": 2, "c": 1, "d": 1}])
@pytest.mark.parametrize(("lost", "others"), [(0, 0), (1, 1), (900_000, 12)])
def test_what_is_left_out_is_on_the_first_screen(unknown: dict[str, int], lost: int, others: int) -> None:
    comparison = mixed()
    accounting = replace(
        comparison.lowered.accounting, lost=lost, unknown=Counter(unknown), without_operation=Counter({"why": others})
    )
    comparison = replace(comparison, lowered=replace(comparison.lowered, accounting=accounting))
    text = " ".join(shown(comparison).split())
    assert ("left out: " in text) == bool(unknown or lost or others)
    assert (f"{lost:,} event{'s' * (lost > 1)} lost by the ring buffer" in text) == bool(lost)
    assert (f"{others} input{'s' * (others > 1)} not of guest memory" in text) == bool(others)
    for name, count in list(unknown.items())[:2]:
        assert f"{count} {name}" in text
    assert ("2 more names" in text) == (len(unknown) == 4)
    assert_fits(shown(comparison))


def test_what_is_doubted_and_what_is_assumed_is_on_the_first_screen() -> None:
    trace = lowered(mixed_records())
    text = shown(compare(trace))
    assert "both: sw VM, memory private at first, Linux 6.18 (assumed: NPT, 1 vCPU)\n" in text
    text = shown(compare(replace(trace, machine={"vcpus": 3}), vm="snp"))  # whose stage 2 can only be NPT
    assert "both: snp VM, memory private at first, NPT, 3 vCPUs, Linux 6.18\n" in text
    text = shown(compare(trace, stage2="ept"))
    assert "both: sw VM, memory private at first, EPT, Linux 6.18 (assumed: 1 vCPU)\n" in text
    assert compare(trace, vcpus=1).to_json()["assumed"] == ["stage2"]
    doubted = replace(trace, doubts=(Doubt("only 1 of 9 guest faults is of this memory", "guest faults"),))
    text = shown(compare(doubted))
    assert text.splitlines()[1] == "doubtful: only 1 of 9 guest faults is of this memory"
    assert_fits(text)


@pytest.mark.parametrize("table", [False, True])
def test_a_table_is_no_log(table: bool) -> None:
    trace = lowered([*setup(), one(Operation.GUEST_FAULT, address=0)])
    trace = replace(trace, table=table, layout=replace(trace.layout, origin="inferred"))
    text = " ".join(shown(compare(trace)).split())
    assert f"the {'table' if table else 'log'} has no memory slots: inferred from the addresses seen" in text
    assert ("the log" in text) != table


def test_conversions_that_the_model_drops_are_no_refusals() -> None:
    pages = [page % 511 * PAGE_4K for page in range(SPINS + 2)]
    records = [
        *setup(),
        one(Operation.GUEST_FAULT, address=0),
        one(Operation.GET, offset=0),
        Records.build(len(pages), op=Operation.CONVERT, flags=Flag.SHARED, offset=pages, length=PAGE_4K),
    ]
    comparison = compare(lowered(records))
    text = " ".join(shown(comparison).split())
    assert (
        "restructure: 2 conversions that would spin beyond 4,096 at a time were dropped, a limit of this model" in text
    )
    assert [refused(run) for run in comparison.runs] == [0, 0]
    assert_fits(shown(comparison))


def test_a_refusal_is_the_result() -> None:
    text = " ".join(shown(compare(lowered(setup(), "shared"), strict=True)).split())
    assert "restructure: dec2025 refuses huge pages that are shared at first (-EINVAL)" in text
    assert "created as rfc2 does" not in text
    assert "dec2025 refuses huge pages that are shared at first (-EINVAL): created as rfc2 does" in " ".join(
        shown(converts_nothing()).split()
    )


def test_an_interruption_is_said() -> None:
    found = sensitivity(mixed())
    cut = replace(found, trials=found.trials[:2], complete=False)
    assert "2 alternatives tried, interrupted; " in " ".join(shown(mixed(), cut).split())
    assert_fits(shown(mixed(), cut))
    assert "interrupted" not in shown(mixed(), found)
    assert "no alternatives tried" in shown(mixed())


def test_what_is_mixed_by_hand_is_one_line() -> None:
    assert by_hand(mixed()) == ""
    options = {"order": "jan2026", "zero": "page", "kernel": "7.3", "punch": "refuse", "host_huge": True}
    comparison = compare(lowered(mixed_records()), **options)  # type: ignore[arg-type]
    assert by_hand(comparison) == "order jan2026, host-huge True, zero page, kernel 7.3"
    assert "\nmixed by hand: order jan2026, host-huge True, zero page, kernel 7.3\n" in shown(comparison)


def test_a_plan_without_code_is_said_to_be_one() -> None:
    text = " ".join(shown(compare(lowered(mixed_records()), versions=Versions("jan2026"))).split())
    assert "restructure like jan2026 (the plan of January 2026, without code: dec2025 but for its order)" in text


def test_an_alternative_that_moves_a_time_is_said_though_it_turns_nothing() -> None:
    """Flips that overlap take a hundredth of what others do; pfnmap is better either way."""
    comparison = compare(load(shipped(), LoweringOptions()))
    base = measure(*comparison.runs)
    low, high = base["conversions"].difference  # type: ignore[misc]
    moved = base | {"conversions": base["conversions"]._replace(difference=(low / 100, high / 100))}
    runs = (comparison.runs[0], comparison.runs[1])
    text = shown(comparison, Sensitivity((Trial("overlap", "1", "", moved, runs),)))
    assert "conversions: pfnmap by 3." in " ".join(text.split())
    assert_fits(text)
    near = base | {"conversions": base["conversions"]._replace(difference=(low / 2, high / 2))}
    assert "stayed shared all the time" not in shown(comparison, Sensitivity((Trial("overlap", "1", "", near, runs),)))


# --------------------------------------------------------------------------- one design alone


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_one_design_alone_has_its_values_and_no_verdict(design: Any) -> None:
    """Every value is that of the comparison of both, and what it breaks and refuses is said."""
    comparison = compare(lowered(mixed_records()), designs=(design,), check="every")
    text = screen(comparison, {}, None)
    assert_fits(text)
    both = [row.split() for row in shown(mixed()).splitlines()]
    for question in QUESTIONS.values():
        (row,) = (line for line in text.splitlines() if line.startswith(f"{question.text} "))
        value = row.removeprefix(question.text).split()
        words = question.text.split()
        (beside,) = (line[len(words) :] for line in both if line[: len(words)] == words)
        assert value == (beside[: len(value)] if design == "restructure" else beside[len(value) :][: len(value)])
    joined = " ".join(text.split())
    assert "one design, no verdict" in joined
    assert not {"better", "basis", "both"} & set(joined.replace(":", " ").split())
    expected = {
        "restructure": ("stale contents", "(uptodate-unzeroed)", "refuses 1 times convert (-EAGAIN)"),
        "pfnmap": ("pfnmap refuses 1 times zap (-EINVAL)", "zeroed: pfnmap"),
    }
    for said in expected[design]:
        assert said in joined


def test_one_design_that_a_version_refuses() -> None:
    text = screen(compare(lowered(setup(), "shared"), designs=("restructure",), strict=True), {}, None)
    assert_fits(text)
    assert "- restructure: dec2025 refuses huge pages that are shared at first (-EINVAL)" in " ".join(text.split())
    assert text.count("\n- ") == 1  # nothing ran: there is nothing else to say


# --------------------------------------------------------------------------- defects


def test_defects_that_are_active_are_named_on_the_first_screen() -> None:
    assert "\ndefects: restructure uptodate-unzeroed\n" in shown(mixed())
    without = compare(lowered(mixed_records()), zero="folio")  # takes the place of uptodate-unzeroed
    assert "defects:" not in shown(without)


@pytest.mark.parametrize("hole", [False, True])
def test_a_version_whose_defects_change_nothing_says_so(hole: bool) -> None:
    """What the slides' change leaves in a hole needs a hole over memory that a process has mapped."""
    records = [
        *setup(),
        one(Operation.CONVERT, Flag.SHARED, offset=0, length=PAGE_2M),
        one(Operation.HOST_FAULT, address=HVA),
        *[one(Operation.PUNCH_HOLE, offset=0, length=PAGE_2M)] * hole,
    ]
    comparison = with_effects(compare(lowered(records), versions=Versions(pfnmap="slides2025")))
    names = PFNMAP["slides2025"].defects
    idle = {"restructure": ("uptodate-unzeroed",), "pfnmap": names[:1] if hole else names}
    assert comparison.without_effect == (idle, ())
    shown_names = {design: list(found) for design, found in idle.items()}
    assert comparison.to_json()["without_effect"] == {"defects": shown_names, "options": []}
    text = " ".join(shown(comparison).split())
    said = f"without effect here: restructure uptodate-unzeroed; pfnmap {', '.join(idle['pfnmap'])}"
    assert ("defects: pfnmap punch-keeps-entries; " * hole or "defects: ") + said in text
    assert_fits(shown(comparison))


def test_what_changes_something_is_not_said_to_change_nothing() -> None:
    assert with_effects(mixed()).without_effect == ({}, ())
    refused = compare(lowered(setup(), "shared"), versions=Versions(as_posted=True), strict=True)
    assert with_effects(refused).without_effect == ({"pfnmap": ("cut-huge-pfn",)}, ())  # nothing is cut


def test_options_that_change_nothing_are_named_and_others_are_not() -> None:
    given: dict[str, Any] = {"zap": "rounded", "flush": "batched", "worker": "queued", "order": "fixup", "hvo": False}
    given |= {"seed": 3, "profile": "published", "host_cpus": 1}
    comparison = with_effects(compare(lowered(mixed_records()), **given))
    text = " ".join(shown(comparison).split())
    idle = comparison.without_effect.options
    assert f"without effect here: {', '.join('--' + name for name in idle)}" in text
    assert not {"hvo", "order"} & set(idle)  # one changes much, the other is the version's own
    for name in ("zap", "flush", "worker", "seed"):
        without = compare(lowered(mixed_records()), **{key: value for key, value in given.items() if key != name})
        pairs = zip(comparison.runs, without.runs, strict=True)
        alike = all(np.array_equal(one.statistics.words, other.statistics.words) for one, other in pairs)
        assert (name in idle) == alike


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    versions=st.builds(Versions, st.sampled_from(["rfc2", "dec2025"]), st.sampled_from(sorted(PFNMAP)), st.booleans()),
    defects=st.sets(st.sampled_from(sorted(DEFECTS)), max_size=10),
    designs=st.sampled_from([("restructure", "pfnmap"), ("pfnmap",), ("restructure",)]),
    source=st.text("abc/ ", min_size=1, max_size=200),
)
def test_every_screen_fits_and_names_its_defects_or_how_many(
    versions: Versions, defects: set[str], designs: Any, source: str
) -> None:
    records = lowered(mixed_records(), source=source)
    options = {"order": "jan2026", "zap_filter": "target", "merge_zero": "unzeroed", "level_rule": "whole"}
    comparison = with_effects(
        compare(records, designs, versions=versions, defects=tuple(defects), kernel="7.3", **options)  # type: ignore[arg-type]
    )
    text = shown(comparison) if len(designs) > 1 else screen(comparison, {}, None)
    assert_fits(text)
    joined = " ".join(text.split())
    for run in comparison.runs:
        every = all(name in joined for name in run.config.defects)
        assert every or f"{run.design} {len(run.config.defects)}" in joined
    for run in comparison.runs:
        assert set(comparison.without_effect.defects.get(run.design, ())) <= set(run.config.defects)


@settings(max_examples=15, deadline=None)
@given(hvo=st.booleans(), pages=st.integers(1, 4), back=st.booleans(), kernel=st.sampled_from(["6.12", "6.18", "7.3"]))
def test_waits_for_rcu_are_named_where_they_make_most_of_a_difference(
    hvo: bool, pages: int, back: bool, kernel: Any
) -> None:
    """HVO waits before it restores a vmemmap; without it nobody waits."""
    records = [*setup()]
    for page in range(pages):
        place = {"offset": page * PAGE_2M, "length": PAGE_4K}
        records.append(one(Operation.GUEST_FAULT, address=page * PAGE_2M))
        records.append(one(Operation.CONVERT, Flag.SHARED, **place))
        records += [one(Operation.CONVERT, Flag.PRIVATE, **place)] * back
    comparison = compare(lowered(records), hvo=hvo, kernel=kernel)
    run = comparison.runs[0]
    waits = {
        what: run.statistics.event(Event.RCU_SYNCHRONIZED, op)
        for op, what in ((Operation.CONVERT, "conversions"), (Operation.GUEST_FAULT, "guest faults"))
    }
    line = next((text for text in causes(comparison) if "waits for RCU" in text), "")
    assert hvo or not (line or any(waits.values()))
    for what, op in (("conversions", Operation.CONVERT), ("guest faults", Operation.GUEST_FAULT)):
        events = paired(*comparison.runs, op).events
        most = sum(one.size for one in events if one.event is Event.RCU_SYNCHRONIZED) * 2 >= sum(
            one.size for one in events
        )
        times = f"{waits[what]} time{'s' * (waits[what] != 1)} in {what}"
        assert (times in line) == (bool(waits[what]) and most)


@pytest.mark.parametrize("like", ["rfc2", "dec2025", "next"])
def test_a_screen_of_pfnmap_alone_names_what_it_has_of_a_version_of_restructure(like: str) -> None:
    common = LIKE[like].common
    records = lowered(mixed_records())
    if like == "next":
        records = replace(records, layout=replace(records.layout, page_size=PAGE_4K))
    alone = compare(records, ["pfnmap"], versions=Versions(like))
    text = screen(alone, {}, None)
    assert f"\nas {like} has it (--like): punch {common['punch']}, kernel {common['kernel']}\n" in text
    by_hand_too = screen(compare(records, ["pfnmap"], versions=Versions(like), kernel="7.3"), {}, None)
    assert f"\nas {like} has it (--like): punch {common['punch']}\n" in by_hand_too
    both = compare(records, versions=Versions(like))
    assert "(--like)" not in shown(both)
    assert_fits(text)
