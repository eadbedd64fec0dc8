"""Calibration: measurements are made and cleaned up after, and put to prices as the rules say."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from pgemu import Config, Machine, cost
from pgemu.cost import measurements
from pgemu.cost.calibrate import RULES, Calibration, calibrate, machine_name, prices
from pgemu.cost.measurements import WHAT, Measurement, NotMeasuredError, duration, footprint, last_level_cache
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

PUBLISHED = cost.profile("published")


def made_up(**changed: Measurement | None) -> dict[str, Measurement]:
    """Measurement number i of WHAT is 100 (i + 1) ns, and 10 more or less."""
    found = {key: Measurement(key, 100.0 * i - 10, 100.0 * i, 100.0 * i + 10, 5) for i, key in enumerate(WHAT, start=1)}
    for key, measurement in changed.items():
        if measurement is None:
            del found[key]
        else:
            found[key] = measurement
    return found


def priced(measured: dict[str, Measurement]) -> dict[Event, cost.Price]:
    return {price.event: price for price in prices(measured)}


def test_this_machine_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "footprint", lambda: 64 << 20)
    cpus, threads, files = os.sched_getaffinity(0), threading.active_count(), len(os.listdir("/proc/self/fd"))
    heard: list[str] = []
    calibration = calibrate("here", seconds=0.1, progress=heard.append)
    assert os.sched_getaffinity(0) == cpus
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files
    assert heard == ["compiling the loops", *WHAT.values()]
    measured = calibration.measured
    assert list(measured) == list(WHAT)
    for key, measurement in measured.items():
        assert measurement.key == key
        if measurement.problem:
            assert (measurement.low, measurement.median, measurement.high) == (0, 0, 0)
            continue
        assert measurement.repetitions >= 5
        assert measurement.low <= measurement.median <= measurement.high
        assert key == "shootdown" or measurement.low > 0
    # What needs no permission is there, and in the order that no load upsets.
    plain = ("copy_hot", "copy_cold", "zero_hot", "zero_cold", "line_sequential", "line_random", "miss", "atomic")
    assert not any(measured[key].problem for key in (*plain, "system_call", "touch", "zap_anonymous"))
    assert measured["atomic"].median < measured["miss"].median
    assert measured["miss"].median < measured["touch"].median
    profile = calibration.profile
    assert (profile.name, profile.machine, profile.host_cpus) == ("here", machine_name(), os.cpu_count())
    assert {Event.PAGE_COPIED, Event.STRUCT_PAGE_WRITTEN, Event.SYSCALL} <= set(profile.own)

    path = tmp_path / "here.toml"
    cost.write_profile(profile, path)
    assert cost.profile(path) == profile
    machine = Machine(Config(profile=path))
    row = int(W.STATS_PRICES) + Event.PAGE_COPIED * W.PRICE_WORDS
    low, high = profile[Event.PAGE_COPIED].each
    assert machine.arrays.stats[row : row + W.PRICE_WORDS].tolist() == [0, 0, round(low * 1000), round(high * 1000)]


def test_every_rule_asks_for_what_is_measured_and_prices_an_event_once() -> None:
    assert all(set(rule.needs) <= set(WHAT) for rule in RULES)
    parts = [(rule.event, rule.part) for rule in RULES]
    assert len(set(parts)) == len(parts)
    # Whatever is measured prices something; "touch" only stands in for "populate".
    assert set(WHAT) - {key for rule in RULES for key in rule.needs} == {"touch"}
    # And by the part of the price that pgemu publishes, so that counts mean the same; a flush has a fixed part, too.
    for rule in RULES:
        if rule.needs == ("shootdown",):
            continue
        assert getattr(PUBLISHED[rule.event], rule.part)[1] > 0, rule.event.name


def test_prices_are_what_the_rules_say() -> None:
    # copy 100 and 200, zero 300 and 400, line 500 and 600, miss 700, slot 800 and 900, atomic 1000, calls 1100 and
    # 1200, populate 1300, touch 1400, zap_anonymous 1500, refault 1600, zap_memfd 1700, shootdown 1800, each more 1900,
    # grace_period 2000; each 10 more or less.
    found = priced(made_up(zap_anonymous=Measurement("zap_anonymous", 1890, 1900, 1910, 5)))
    bands = {event: (price.fixed, price.each, price.per_cpu) for event, price in found.items()}
    none = (0.0, 0.0)
    assert bands == {
        Event.HOST_FAULT: ((1610 - 40 - 45, 1590 - 20 - 30), none, none),  # narrower than what is deducted
        Event.SYSCALL: ((1090, 1210), none, none),
        Event.TABLE_PAGE_ALLOCATED: (none, (290, 1310), none),
        Event.TABLE_PAGE_FREED: (none, (1890 - 1710, 1000), none),
        Event.LEAF_CLEARED: (none, (1690 - 30, 1710 - 45), none),
        Event.TLB_FLUSH_MM: ((1790, 1810), none, (1890, 1910)),
        Event.TLB_FLUSH_KERNEL: ((1790, 1810), none, (1890, 1910)),
        Event.PAGE_ZEROED: (none, (290, 410), none),
        Event.FOLIO_ZEROED_PAGES: (none, (390, 410), none),
        Event.VMEMMAP_PAGE_RESTORED: (none, (390, 1310), none),
        Event.STRUCT_PAGE_WRITTEN: (none, (490, 510), none),
        Event.FOLIO_GATE_CHECKED: (none, (2 * 990 + 490, 2 * 1010 + 610), none),
        Event.FOLIO_FROZEN: (none, (990, 1010), none),
        Event.PAGE_CACHE_STORED: (none, (790, 910 + 1010), none),
        Event.PAGE_COPIED: (none, (90, 210), none),
        Event.VMEMMAP_HEAD_COPIED: (none, (90, 210 + 1310 - 390), none),
        Event.RCU_SYNCHRONIZED: (none, (1990, 2010), none),
        Event.REFERENCE_CHANGED: (none, (990, 1010 + 710), none),
    }


def test_what_is_measured_says_so_and_what_assumes_does_not() -> None:
    found = priced(made_up())
    assumed = {Event.FOLIO_GATE_CHECKED, Event.TLB_FLUSH_KERNEL, Event.TABLE_PAGE_FREED}
    assert {event for event, price in found.items() if price.basis != "measured"} == assumed
    for rule in RULES:
        assert rule.why.startswith("assumption") <= (rule.basis == "assumption")
    # Where a part stays as published, the price rests on that, too.
    two_cpus = priced(made_up(shootdown_more=Measurement("shootdown_more", problem="needs 3 CPUs")))
    assert found[Event.TLB_FLUSH_MM].basis == "measured"
    assert two_cpus[Event.TLB_FLUSH_MM].basis == PUBLISHED[Event.TLB_FLUSH_MM].basis == "assumption"


def test_sources_say_what_was_measured() -> None:
    source = priced(made_up())[Event.SYSCALL].source
    assert source == (
        "pgemu calibrate: system call that does nothing (getppid) 1.09 us to 1.11 us; system call on an empty page "
        "(madvise) 1.19 us to 1.21 us: nothing done, to a lookup of a VMA"
    )


@pytest.mark.parametrize("gone", [None, Measurement("grace_period", problem="Operation not permitted")])
def test_what_is_not_measured_keeps_its_published_price(gone: Measurement | None) -> None:
    measured = made_up(grace_period=gone)
    found = priced(measured)
    assert Event.RCU_SYNCHRONIZED not in found
    assert set(found) == {rule.event for rule in RULES} - {Event.RCU_SYNCHRONIZED}
    profile = cost.Profile.of("n", "m", PUBLISHED.measured, 2, found.values(), PUBLISHED)
    calibration = Calibration(profile, measured)
    assert Event.RCU_SYNCHRONIZED in calibration.published
    assert Event.VMEMMAP_FAULT not in calibration.published  # it has no price anywhere
    assert profile[Event.RCU_SYNCHRONIZED].each == PUBLISHED[Event.RCU_SYNCHRONIZED].each
    assert calibration.priced("shootdown") == [Event.TLB_FLUSH_MM, Event.TLB_FLUSH_KERNEL]
    assert calibration.priced("grace_period") == calibration.priced("touch") == []


def test_a_shootdown_that_took_no_time_prices_nothing() -> None:
    nothing = Measurement("shootdown", -40, -1, 30, 5)
    found = priced(made_up(shootdown=nothing, shootdown_more=None))
    assert not {Event.TLB_FLUSH_MM, Event.TLB_FLUSH_KERNEL} & set(found)
    found = priced(made_up(shootdown=Measurement("shootdown", -40, 1, 30, 5)))
    assert found[Event.TLB_FLUSH_MM].fixed == (0, 30)


def test_two_cpus_tell_the_first_of_a_shootdown_only() -> None:
    found = priced(
        made_up(shootdown_more=Measurement("shootdown_more", problem="needs 3 CPUs, this process may use 2"))
    )
    price = found[Event.TLB_FLUSH_KERNEL]
    assert (price.fixed, price.per_cpu) == ((1790, 1810), PUBLISHED[Event.TLB_FLUSH_KERNEL].per_cpu)
    assert price.source.endswith("1.79 us to 1.81 us: assumption: as TLB_FLUSH_MM; per_cpu as published")
    assert "published" not in priced(made_up())[Event.TLB_FLUSH_KERNEL].source
    # Alone, a CPU waits for nobody.
    assert price.total(0, 1) == PUBLISHED[Event.TLB_FLUSH_KERNEL].total(0, 1)
    assert price.total(0, 2)[0] == pytest.approx(1790 + 2 * price.per_cpu[0])


def test_a_touched_page_stands_in_for_a_populated_one() -> None:
    measured = made_up(populate=Measurement("populate", problem="Invalid argument"))
    found = priced(measured)
    assert found[Event.TABLE_PAGE_ALLOCATED].each == (290, 1410)
    assert "anonymous page faulted in 1.39 us to 1.41 us" in found[Event.TABLE_PAGE_ALLOCATED].source
    calibration = Calibration(cost.Profile.of("n", "m", PUBLISHED.measured, 2, found.values(), PUBLISHED), measured)
    users = [Event.TABLE_PAGE_ALLOCATED, Event.VMEMMAP_PAGE_RESTORED, Event.VMEMMAP_HEAD_COPIED]
    assert (calibration.priced("touch"), calibration.priced("populate")) == (users, [])


@pytest.mark.same_with_checks
@given(
    st.dictionaries(
        st.sampled_from(list(WHAT)),
        st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=6) | st.sampled_from(["Invalid argument"]),
    )
)
def test_whatever_is_measured_makes_a_profile_that_can_be_written(samples: dict[str, list[float] | str]) -> None:
    measured = {
        key: Measurement(key, problem=found) if isinstance(found, str) else Measurement.of(key, found)
        for key, found in samples.items()
    }
    found = prices(measured)
    text = cost.to_toml(cost.Profile.of("n", "m", PUBLISHED.measured, 2, found, PUBLISHED))
    assert text.count("[prices.") == len(found)
    for price in found:
        rules = [rule for rule in RULES if rule.event is price.event]
        good = {key for key, measurement in measured.items() if measurement.median > 0} | {"populate"}
        assert any(good.issuperset(rule.needs) for rule in rules)


def test_a_busy_machine_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_PATIENCE", 0.0)
    with pytest.raises(NotMeasuredError, match="other programs keep the CPUs busy"):
        measurements._repeat(lambda: float("nan"), 0.0)
    samples = iter([1.0, *(float("nan") if i % 2 else 7.0 for i in range(100))])
    monkeypatch.setattr(measurements, "_PATIENCE", 60.0)
    assert measurements._repeat(lambda: next(samples), 0.0) == [7.0] * 5


def test_one_cpu_has_no_shootdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    bench = object.__new__(measurements._Bench)
    with pytest.raises(NotMeasuredError, match="needs 2 CPUs, this process may use 1"), bench.shootdown():
        pass


def test_a_cpu_that_went_away_is_not_waited_for() -> None:
    bench = object.__new__(measurements._Bench)
    bench.loops = SimpleNamespace(spin=lambda *_: pytest.fail("ran"))  # type: ignore[assignment]
    with pytest.raises(NotMeasuredError, match="no thread can be put"), bench._counting([1 << 15]):
        pass


def test_importing_loads_no_compiler() -> None:
    modules = "pgemu.cost.calibrate, pgemu.cost.measurements"
    code = f"import sys, {modules}; print(*sorted({{'numba', 'pyarrow'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("name", ["published", "e7-8895", "", " ", "two\nlines"])
def test_a_name_that_files_cannot_have_is_refused_before_measuring(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgemu.cost.calibrate.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="expected printable text"):
        calibrate(name)


def test_sizes_and_durations() -> None:
    assert 1 << 16 <= last_level_cache() <= 1 << 34
    assert 64 << 20 <= footprint() <= 1 << 30
    assert footprint() % (2 << 20) == 0
    assert [duration(x) for x in (0, 1.97, 999.4, 999.6, 12_345, 8.06e6, -42)] == [
        *("0 ns", "1.97 ns", "999 ns", "1 us", "12.3 us", "8.06 ms", "-42 ns"),
    ]
