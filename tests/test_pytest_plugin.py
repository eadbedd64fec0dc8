"""The pytest plugin, in sessions of pytest's own: off, both designs, controls, what is stored and what is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pgemu.benchmarking.summary
import pgemu.cost.difference
import pgemu.pytest_plugin as plugin
from pgemu.benchmarking.controls import walk_and_store
from pgemu.benchmarking.counts import Counts
from pgemu.objects.machine import Config, Machine

PLUGIN, BENCHMARK = ("-p", "pgemu.pytest_plugin"), ("-p", "pytest_benchmark.plugin")
QUICK = "import pytest\nimport numpy as np\nPAGES = np.arange(0, 1 << 21, 4096, dtype=np.uint64)\n"
CONVERT = (
    QUICK
    + """
WHERE = {"footprint": 2 << 20, "order": "sequential"}

@pytest.mark.pgemu(pool=2 << 20, page_size=2 << 20)
def test_convert(pgemu_benchmark, pgemu_machine, pgemu_design):
    gmem = pgemu_machine().create_guest_memfd(2 << 20)
    pgemu_benchmark(
        lambda: gmem.convert_many(PAGES, shared=False),
        setup=lambda: gmem.convert_many(PAGES, shared=True),
        operations=len(PAGES),
        **WHERE,
    )

def test_control(pgemu_benchmark, pgemu_control, pgemu_design):
    pgemu_benchmark(pgemu_control(PAGES), **WHERE)
"""
)
EMULATOR, MODELLED = pgemu.benchmarking.summary.EMULATOR_TITLE, pgemu.benchmarking.summary.MODELLED_TITLE


@pytest.fixture(scope="module")
def loaded() -> None:
    """Modules that sessions in this process use: what they import they forget, and nothing compiled may come twice."""
    machine = Machine(Config(pool=2 << 20, page_size=2 << 20))
    machine.create_guest_memfd(2 << 20).convert(0, 4096, shared=True)
    walk_and_store(np.zeros(1, np.uint64))()
    Counts([machine]).info()
    plugin.Warm()("translate")
    machine.create_process().translate(np.zeros(1, np.uint64))


@pytest.fixture
def session(loaded: None, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """session(text, *arguments): the result of pytest on a file of this text, without plugins that are not named."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("PYTEST_PLUGINS", raising=False)

    def run(text: str, *arguments: str, plugins: tuple[str, ...] = (*PLUGIN, *BENCHMARK)) -> pytest.RunResult:
        pytester.makepyfile(text)
        return pytester.runpytest_inprocess(
            *plugins, "-p", "no:cacheprovider", "--strict-markers", "-W", "error", *arguments
        )

    return run


def passed(result: pytest.RunResult, count: int) -> str:
    """What was printed by a session in which so many tests passed and none failed."""
    result.assert_outcomes(passed=count)
    return result.stdout.str()


def stored(path: Path) -> dict[str, dict[str, Any]]:
    return {bench["name"]: bench for bench in json.loads(path.read_text())["benchmarks"]}


@pytest.mark.same_with_checks
def test_importing_it_loads_neither_numpy_nor_numba() -> None:
    code = (
        "import sys, pgemu.pytest_plugin; print([m for m in ('numpy', 'numba', 'pgemu_kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unused_it_adds_nothing(session: Any) -> None:
    text = passed(session("def test_nothing():\n    pass\n", "-v"), 1)
    assert "pgemu" not in text


@pytest.mark.same_with_checks
def test_unused_it_loads_nothing(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # installed, it would come twice
    pytester.makepyfile(
        "import sys\ndef test_nothing():\n    assert not {'numpy', 'numba', 'pgemu_kernels'} & {*sys.modules}\n"
    )
    result = pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)


def test_both_designs_beside_a_control(session: Any, pytester: pytest.Pytester) -> None:
    text = passed(session(CONVERT, "--benchmark-json=o.json"), 4)
    found = stored(pytester.path / "o.json")
    assert set(found) == {f"test_{name}[{design}]" for name in ("convert", "control") for design in plugin.DESIGNS}
    for design in plugin.DESIGNS:
        call, control = found[f"test_convert[{design}]"], found[f"test_control[{design}]"]
        assert call["group"] == control["group"]
        assert call["group"].startswith("emulator time, ")
        info = call["extra_info"]
        assert (info["operations"], info["footprint"], info["order"]) == (512, "2M", "sequential")
        assert (info["role"], info["design"], control["extra_info"]["role"]) == ("call", design, "control")
        ratio = control["stats"]["median"] / call["stats"]["median"]
        assert info["ratio_to_control"] == pytest.approx(ratio)
        assert "ratio_to_control" not in control["extra_info"]
        # 512 conversions of the last timed round, and nothing of the rounds before or of their setup.
        assert info["counts"]["operations"] == {"convert": {"ok": 512}}
        assert info["counts"]["events"]["convert_ioctl"] == 512
        low, high = info["modelled_ns"]
        assert 0 < low < high
        assert info["profile"] == "published"
        assert "modelled_ns" not in control["extra_info"]
    assert text.index(EMULATOR) < text.index(MODELLED)
    emulator, modelled = text[text.index(EMULATOR) : text.index(MODELLED)], text[text.index(MODELLED) :]
    assert len(re.findall(r"convert [\d.]+ \([\d.]+\), control [\d.]+", emulator)) == 2
    assert len(re.findall(r"convert [\d.]+-[\d.]+ [un]s$", modelled, re.MULTILINE)) == 2
    assert ", control" not in modelled


def test_counts_are_those_of_a_machine_that_did_it_once(session: Any, pytester: pytest.Pytester) -> None:
    passed(session(CONVERT, "--benchmark-json=o.json", "-k", "convert"), 2)
    pages = np.arange(0, 1 << 21, 4096, dtype=np.uint64)
    for design in plugin.DESIGNS:
        machine = Machine(Config(design, pool=2 << 20, page_size=2 << 20))  # type: ignore[arg-type]
        gmem = machine.create_guest_memfd(2 << 20)
        gmem.convert_many(pages, shared=True)
        before = machine.statistics
        gmem.convert_many(pages, shared=False)
        after = machine.statistics
        (op,) = (op for op in type(pgemu_operation()) if after.count(op) != before.count(op))
        costs = [late - early for late, early in zip(after.cost(op), before.cost(op), strict=True)]
        info = stored(pytester.path / "o.json")[f"test_convert[{design}]"]["extra_info"]
        assert info["modelled_ns"] == pytest.approx(costs)


def pgemu_operation() -> Any:
    from pgemu_kernels.words.operations import Operation

    return Operation.CONVERT


def test_disabled_benchmarks_run_once_and_say_nothing(session: Any) -> None:
    text = passed(session(CONVERT, "--benchmark-disable"), 4)
    assert EMULATOR not in text
    assert MODELLED not in text


def test_benchmarks_are_skipped_and_chosen_as_pytest_benchmark_does(session: Any) -> None:
    session(CONVERT, "--benchmark-skip").assert_outcomes(skipped=4)
    both = CONVERT + "\ndef test_other():\n    pass\n"
    session(both, "--benchmark-only", "--benchmark-warmup=off").assert_outcomes(passed=4, skipped=1)


def test_parameters_that_the_group_does_not_tell_are_in_the_name(session: Any) -> None:
    text = QUICK + (
        "@pytest.mark.parametrize('policy', ['mirror', 'revoke'])\n"
        "def test_it(pgemu_benchmark, pgemu_design, policy):\n"
        "    pgemu_benchmark(lambda: None, operations=10**9, group='g')\n"
    )
    printed = passed(session(text), 4)
    for design in plugin.DESIGNS:
        assert re.search(rf"^g {design}: it mirror [\d.]+, it revoke [\d.]+$", printed, re.MULTILINE)


def test_one_design_by_option(session: Any) -> None:
    text = passed(session(CONVERT, "--pgemu-design", "pfnmap", "--benchmark-disable", "-v"), 2)
    assert "restructure" not in text


def test_without_pytest_benchmark_only_its_fixture_fails(session: Any) -> None:
    text = QUICK + (
        "def test_machine(pgemu_machine, pgemu_design):\n    assert pgemu_machine().config.design == pgemu_design\n"
        "def test_control(pgemu_control):\n    pgemu_control(PAGES)()\n"
        "def test_time(pgemu_benchmark):\n    raise AssertionError\n"
    )
    result = session(text, plugins=PLUGIN)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["pgemu_benchmark needs pytest-benchmark*pip install 'pgemu?bench?'*"])
    assert "AssertionError" not in result.stdout.str()


def test_fields_come_from_the_call_the_marker_and_the_option(session: Any) -> None:
    text = """
import pytest
from pgemu import Config
pytestmark = pytest.mark.pgemu(vcpus=3, host_cpus=5)

@pytest.mark.pgemu("pfnmap", host_cpus=6, kernel="6.18")
def test_fields(pgemu_machine):
    config = pgemu_machine(kernel="6.12").config
    assert (config.design, config.vcpus, config.host_cpus, config.kernel) == ("pfnmap", 3, 6, "6.12")
    assert (config.pool, config.l1tf, config.private_level) == (2 << 30, True, None)
    assert (config.defects, config.profile) == ((), "epyc-252vcpu")
    assert [m.config.design for m in pgemu_machine.made] == ["pfnmap"]
    assert pgemu_machine(Config("restructure")).config == Config("restructure")

def test_misuse(pgemu_machine):
    with pytest.raises(TypeError, match="pool: expected a Config or fields, not both"):
        pgemu_machine(Config(), pool=1 << 30)
    with pytest.raises(ValueError, match="^pool"):
        pgemu_machine(pool=5)
"""
    options = ("kernel=7.3", "vcpus=9", "pool=2G", "l1tf=yes", "private-level=none", "profile=epyc-252vcpu")
    passed(session(text, *(f"--pgemu-config={option}" for option in options)), 2)


@pytest.mark.parametrize(
    ("mark", "options", "message"),
    [
        (
            "@pytest.mark.pgemu(pol=1)",
            (),
            "pytest.mark.pgemu: Config has no field 'pol'; expected one of design, pool,*",
        ),
        ("@pytest.mark.pgemu('pfnmap', 1)", (), "pytest.mark.pgemu('pfnmap', 1): expected one design, and fields*"),
        ("", ("pol=1",), "*--pgemu-config pol=1: Config has no field 'pol'*"),
        ("", ("pool",), "*--pgemu-config pool: expected FIELD=VALUE*"),
        ("", ("pool=much",), "*--pgemu-config pool=much: expected a number or a size like 2M*"),
        ("", ("hvo=2",), "*--pgemu-config hvo=2: expected yes or no*"),
    ],
)
def test_misuse_is_one_line(session: Any, mark: str, options: tuple[str, ...], message: str) -> None:
    text = f"import pytest\n{mark}\ndef test_it(pgemu_machine):\n    raise AssertionError\n"
    result = session(text, *(f"--pgemu-config={option}" for option in options))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([re.sub(r"([\[\]])", "?", message)])
    assert "AssertionError" not in result.stdout.str()


def test_what_only_finds_its_work_done_has_no_price(session: Any) -> None:
    text = CONVERT.replace("        setup=lambda: gmem.convert_many(PAGES, shared=True),\n", "")
    text = text.replace("gmem.convert_many(PAGES, shared=False)", "vm.touch_many(PAGES)").replace(
        "    pgemu_benchmark(\n        lambda: vm",
        "    vm = gmem.machine.create_vm(protected=True)\n    vm.bind(gmem, 0)\n"
        "    pgemu_benchmark(\n        lambda: vm",
    )
    printed = passed(session(text, "-k", "convert"), 2)
    assert printed.count("convert: nothing that has a price (guest fault RET_PF_SPURIOUS)") == 2


def test_pgemu_warm_has_entries_ready(session: Any) -> None:
    text = """
import pytest

def test_warm(pgemu_warm):
    from pgemu_kernels.run.entries import declared
    ready = {entry.name for entry in declared if entry.ready()}
    assert {entry.name for entry in declared if entry.needed} <= ready
    pgemu_warm("translate")
    assert "translate" in {entry.name for entry in declared if entry.ready()}
    with pytest.raises(ValueError, match="entry 'walk': expected one of .*translate"):
        pgemu_warm("walk")
"""
    passed(session(text), 1)


def test_a_benchmark_of_no_operations_is_refused(session: Any) -> None:
    text = QUICK + (
        "@pytest.mark.parametrize('n', [None, 0, 1.5, True])\n"
        "def test_it(pgemu_benchmark, n):\n"
        "    with pytest.raises(ValueError, match='operations .*: expected how many the call does'):\n"
        "        pgemu_benchmark(lambda: None, operations=n)\n"
        "    pgemu_benchmark(lambda: None, operations=1)\n"
    )
    passed(session(text), 4)


def test_the_example_of_the_documentation_runs(session: Any) -> None:
    example = re.search(r"::\n\n((?:    .*\n|\n)+)", plugin.__doc__ or "")
    assert example
    text = "\n".join(line.removeprefix("    ") for line in example[1].splitlines()).strip()
    assert f"```python\n{text}\n```" in (Path(__file__).parents[1] / "bench" / "README.md").read_text()
    passed(session(text, "--benchmark-disable"), 4)


def test_a_wrong_field_of_pgemu_machine_is_one_line(session: Any) -> None:
    result = session("def test_it(pgemu_machine):\n    pgemu_machine(pol=1)\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["pgemu_machine: Config has no field 'pol'; expected one of design, pool,*"])


def test_page_sizes_that_are_parameters_are_groups(session: Any, pytester: pytest.Pytester) -> None:
    text = CONVERT.replace("pgemu_design):", "pgemu_design, page_size):").replace(
        "pool=2 << 20, page_size=2 << 20", "pool=1 << 30"
    )
    text = text.replace("pgemu_machine()", "pgemu_machine(page_size=page_size)").replace(
        "import pytest\n", "import pytest\npytestmark = pytest.mark.parametrize('page_size', [2 << 20, 1 << 30])\n", 1
    ).replace("create_guest_memfd(2 << 20)", "create_guest_memfd(1 << 30)")  # fmt: skip
    passed(session(text, "--benchmark-json=o.json", "--pgemu-design=pfnmap"), 4)
    found = stored(pytester.path / "o.json").values()
    assert sorted({(one["group"].split(", ")[2], one["extra_info"]["page_size"]) for one in found}) == [
        ("1G pages", "1G"),
        ("2M pages", "2M"),
    ]
    assert sum("ratio_to_control" in one["extra_info"] for one in found) == 2
