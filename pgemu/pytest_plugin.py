"""The pytest plugin: fixtures for benchmarks of pgemu, and for tests on machines of both designs.

It is off unless a test uses one of its fixtures, all named pgemu_*: until then it adds two options and a marker, and
imports neither NumPy nor numba. `pgemu_benchmark` needs pytest-benchmark, the others do not. (PYTEST_DONT_REWRITE)

A round does something only if `setup` undoes the one before: of faults it drops the VM's leaves, by `vm.unbind(0)` and
`vm.bind(gmem, 0)`. A benchmark file, which times both designs beside a control::

    import numpy as np
    import pytest

    PAGES = np.arange(0, 1 << 30, 4096, dtype=np.uint64)
    WHERE = {"footprint": 1 << 30, "order": "sequential"}


    @pytest.mark.pgemu(pool=1 << 30)
    def test_convert(pgemu_benchmark, pgemu_machine, pgemu_design):
        gmem = pgemu_machine().create_guest_memfd(1 << 30)
        pgemu_benchmark(
            lambda: gmem.convert_many(PAGES, shared=False),
            setup=lambda: gmem.convert_many(PAGES, shared=True),
            operations=len(PAGES),
            **WHERE,
        )


    def test_control(pgemu_benchmark, pgemu_control, pgemu_design):
        pgemu_benchmark(pgemu_control(PAGES), **WHERE)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pgemu.benchmarking.controls import Control
    from pgemu.benchmarking.summary import Timed
    from pgemu.machine.config import Config
    from pgemu.machine.core import Core
    from pgemu.objects.machine import Machine

__all__ = ("Benchmark", "Controls", "MachineFactory", "Warm")

DESIGNS = ("restructure", "pfnmap")
_MARKER = "pgemu(design=None, **fields): fields of pgemu.Config for the machines that pgemu_machine makes"
_ABSENT = "pgemu_benchmark needs pytest-benchmark, which is not installed or is off (pip install 'pgemu[bench]')"
_TIMED = pytest.StashKey[list["Timed"]]()
_UNITS = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which designs and what machines."""
    group = parser.getgroup("pgemu")
    group.addoption(
        "--pgemu-design",
        action="append",
        choices=DESIGNS,
        help="only this design, in tests that use pgemu_design (repeatable; default both)",
    )
    group.addoption(
        "--pgemu-config",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of pgemu.Config for pgemu_machine, where neither test nor marker says it: kernel=6.12, pool=2G",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Offer pgemu_benchmark as pytest-benchmark's presence allows."""
    config.addinivalue_line("markers", _MARKER)
    manager = config.pluginmanager
    there = any(manager.hasplugin(name) for name in ("benchmark", "pytest_benchmark.plugin"))
    manager.register(_WithBenchmark() if there else _WithoutBenchmark(), "pgemu benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses pgemu_design once per design."""
    if "pgemu_design" in metafunc.fixturenames:
        designs = metafunc.config.getoption("--pgemu-design", None) or DESIGNS
        metafunc.parametrize("pgemu_design", list(dict.fromkeys(designs)), indirect=True)


# --------------------------------------------------------------------------- machines


@pytest.fixture(scope="session")
def pgemu_design(request: pytest.FixtureRequest) -> str:
    """The design: the test runs for "restructure" and for "pfnmap", or for what --pgemu-design names."""
    return str(request.param)


class MachineFactory:
    """Makes machines, of a Config or of fields. `made`: those it made in this test."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields
        self.made: list[Machine] = []

    def __call__(self, config: Config | None = None, **fields: Any) -> Machine:
        """Return a new machine of `config`, or of fields of pgemu.Config.

        Fields come from here, else from the marker `pgemu`, else from --pgemu-config; `design` is that of pgemu_design
        if the test uses it.

        A name that is no field fails the test.

        :raises TypeError: a Config and fields
        :raises ValueError: a value that a field may not have
        """
        from pgemu.machine.config import Config
        from pgemu.objects.machine import Machine

        if config is not None and fields:
            raise TypeError(f"{', '.join(fields)}: expected a Config or fields, not both")
        _check_names("pgemu_machine", fields)
        machine = Machine(Config(**{**self._fields, **fields}) if config is None else config)
        self.made.append(machine)
        return machine


@pytest.fixture
def pgemu_machine(request: pytest.FixtureRequest) -> MachineFactory:
    """A factory of machines: pgemu_machine(pool=1 << 30); see `MachineFactory`."""
    fields: dict[str, Any] = dict(map(_field_of, request.config.getoption("--pgemu-config", [])))
    for marker in reversed(list(request.node.iter_markers("pgemu"))):
        fields |= _fields_of(marker)
    if "pgemu_design" in request.fixturenames:
        fields["design"] = request.getfixturevalue("pgemu_design")
    return MachineFactory(fields)


def _fields_of(marker: pytest.Mark) -> dict[str, Any]:
    """What a marker says, checked. The test fails for what is no field."""
    if len(marker.args) > 1:
        pytest.fail(f"pytest.mark.pgemu{marker.args}: expected one design, and fields of Config by name", pytrace=False)
    fields: dict[str, Any] = {**dict(zip(("design",), marker.args, strict=False)), **marker.kwargs}
    _check_names("pytest.mark.pgemu", fields)
    return fields


def _check_names(where: str, fields: dict[str, Any]) -> None:
    from dataclasses import fields as fields_of

    from pgemu.machine.config import Config

    known = [field.name for field in fields_of(Config)]
    for name in fields:
        if name not in known:
            pytest.fail(f"{where}: Config has no field {name!r}; expected one of {', '.join(known)}", pytrace=False)


def _field_of(text: str) -> tuple[str, Any]:
    """A field and its value: "pool=2G" as bytes, "hvo=no" as a truth value, "private_level=none", "kernel=6.12"."""
    name, _, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not value:
        raise pytest.UsageError(f"--pgemu-config {text}: expected FIELD=VALUE")
    _check_names(f"--pgemu-config {text}", {name: value})
    from pgemu.machine.config import Config

    default = getattr(Config(), name)
    if isinstance(default, bool):
        if value.lower() not in ("yes", "no", "true", "false", "1", "0"):
            raise pytest.UsageError(f"--pgemu-config {text}: expected yes or no")
        return name, value.lower() in ("yes", "true", "1")
    if isinstance(default, tuple):
        return name, tuple(value.split(","))
    if value.lower() == "none":
        return name, None
    if isinstance(default, int) or name == "frames":
        return name, _number_of(value, text)
    return name, value


def _number_of(value: str, text: str) -> int:
    unit = dict(_UNITS).get(value[-1:].upper(), 1)
    digits = value[:-1] if unit > 1 else value
    if not digits.isdecimal():
        raise pytest.UsageError(f"--pgemu-config {text}: expected a number or a size like 2M")
    return int(digits) * unit


class Warm:
    """Sees to it that machine code is there before anything is timed."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, *names: str, all: bool = False) -> None:
        """Compile or load entries: those that operations of machines need, and others by name, or all.

        :param names: of pgemu_kernels.run.entries: "translate", "translate_nested", "edit", ...
        :raises ValueError: no such entry
        """
        from pgemu_kernels.engine.ahead import compile_ahead
        from pgemu_kernels.run.entries import declared

        known = {entry.name: entry for entry in declared}
        for name in names:
            if name not in known:
                raise ValueError(f"entry {name!r}: expected one of {', '.join(sorted(known))}")
        wanted = [entry for entry in declared if all or entry.needed or entry.name in names]
        compile_ahead(wanted)
        for entry in wanted:
            entry.make_ready()
        self.names |= {entry.name for entry in wanted}


@pytest.fixture(scope="session")
def pgemu_warm() -> Warm:
    """What `pgemu warmup` compiles is compiled and loaded; pgemu_warm("edit", "translate") does so for more."""
    warm = Warm()
    warm()
    return warm


class Controls:
    """Makes controls: calls that do the least that could be done to the same pages, for pgemu_benchmark to time."""

    def __call__(self, addresses: Any) -> Control:
        """Return the control of faults, conversions and edits: pgemu.benchmarking.controls.walk_and_store."""
        from pgemu.benchmarking.controls import walk_and_store

        return walk_and_store(addresses)

    def gather(self, array: Any, indices: Any) -> Control:
        """Return the control of translations: pgemu.benchmarking.controls.gather."""
        from pgemu.benchmarking.controls import gather

        return gather(array, indices)


@pytest.fixture(scope="session")
def pgemu_control() -> Controls:
    """Controls: pgemu_control(addresses) walks and stores, pgemu_control.gather(array, indices) loads."""
    return Controls()


# --------------------------------------------------------------------------- timing


class Benchmark:
    """Times one call with pytest-benchmark, and notes in `extra_info` what it was and what machines counted in it."""

    def __init__(self, request: pytest.FixtureRequest, fixture: Any, machines: MachineFactory) -> None:
        self._request = request
        self._fixture = fixture
        self._machines = machines
        self._by_pages = False  # whether groups are of one page size

    @property
    def disabled(self) -> bool:
        """Whether calls run once and are not timed (--benchmark-disable)."""
        return bool(self._fixture.disabled)

    def __call__(
        self,
        call: Callable[[], Any],
        *,
        operations: int | None = None,
        setup: Callable[[], object] | None = None,
        machine: Core | Sequence[Core] | None = None,
        group: str | None = None,
        footprint: int | str | None = None,
        order: str | None = None,
        role: str | None = None,
        rounds: int = 5,
        warmup_rounds: int = 1,
        **info: Any,
    ) -> Any:
        """Time `call`, and return what it returned.

        A first round is not timed: it compiles or loads machine code. Benchmarks are compared within a group, named
        by `group` (else the test's file) and always the design, page size, `order` and `footprint`; the rate of each
        is set against that of the group's control.

        :param operations: how many the call does; a control knows
        :param setup: is called before each round, untimed
        :param machine: whose statistics are taken over the call, several too; else those that pgemu_machine made
        :param footprint: bytes, or text, of memory that the operations range over
        :param order: of accesses: "sequential", "random", ...
        :param role: "control", or "peer" for another program's way; else what `call` is
        :param info: more for `extra_info`: numbers and text; of `page_size` see bench/README.md
        :raises ValueError: fewer operations than one, or none given
        """
        from pgemu.benchmarking.controls import Control
        from pgemu.benchmarking.counts import Counts
        from pgemu.benchmarking.summary import CONTROL, Timed

        control = isinstance(call, Control)
        if operations is None and isinstance(call, Control):
            operations = call.operations
        if type(operations) is not int or operations < 1:
            raise ValueError(f"operations {operations!r}: expected how many the call does, 1 or more")
        role = role or (CONTROL if control else "call")
        extra: dict[str, Any] = {"operations": operations, "role": role, "design": self._design()}
        pages = self._page_size([] if control else self._chosen(machine), info)
        extra |= {"footprint": _size(footprint), "order": order, "page_size": pages} | info
        extra = {name: value for name, value in extra.items() if value is not None}
        self._fixture.group = f"emulator time, {self._group(group, extra)}"
        self._fixture.extra_info.update(extra)
        counts = Counts([] if control else self._chosen(machine))

        def prepare() -> None:
            if setup is not None:
                setup()
            counts.begin()

        found = self._fixture.pedantic(call, setup=prepare, rounds=rounds, warmup_rounds=warmup_rounds)
        self._fixture.extra_info.update(counts.info())
        timed = Timed(self._group(group, extra), self._name(group, extra), role, self._fixture.extra_info)
        if not self.disabled:
            timed.seconds = self._fixture.stats.stats.median
        self._request.config.stash.setdefault(_TIMED, []).append(timed)
        return found

    def _design(self) -> str | None:
        used = "pgemu_design" in self._request.fixturenames
        return str(self._request.getfixturevalue("pgemu_design")) if used else None

    def _name(self, group: str | None, extra: dict[str, Any]) -> str:
        """The test's name, and those of its parameters, if they are text, that the group's name does not tell."""
        name = self._request.node.name.partition("[")[0].removeprefix("test_").replace("_", " ")
        callspec = getattr(self._request.node, "callspec", None)
        values = callspec.params.values() if callspec else ()
        told = self._group(group, extra)
        return " ".join((name, *(value for value in values if isinstance(value, str) and value not in told)))

    def _group(self, group: str | None, extra: dict[str, Any]) -> str:
        stem = self._request.path.stem.removeprefix("test_").removeprefix("bench_")
        name = group or stem.replace("_", " ")
        design, pages = extra.get("design"), extra.get("page_size") if self._by_pages else None
        parts = [f"{name} {design}" if design else name, f"{pages} pages" if pages else ""]
        parts.append(" over ".join(str(extra[key]) for key in ("order", "footprint") if key in extra))
        return ", ".join(filter(None, parts))

    def _page_size(self, machines: Sequence[Core], info: dict[str, Any]) -> str | None:
        """What the test's parameter says, else its machines, if they have one other size than the default."""
        from pgemu.machine.config import Config

        value = self._parameters().get("page_size")
        # A control has no machine: only what its test says, as that of a call does, can put both into one group.
        self._by_pages = "page_size" in info or value is not None
        if isinstance(value, (int, str)):
            return _size(value)
        sizes = {machine.config.page_size for machine in machines} - {Config().page_size}
        return _size(sizes.pop()) if len(sizes) == 1 else None

    def _parameters(self) -> dict[str, Any]:
        callspec = getattr(self._request.node, "callspec", None)
        return dict(callspec.params) if callspec else {}

    def _chosen(self, machine: Core | Sequence[Core] | None) -> Sequence[Core]:
        if machine is None:
            return self._machines.made
        return machine if isinstance(machine, Sequence) else [machine]


def _size(footprint: int | str | None) -> str | None:
    """Bytes as text: "16M"."""
    if not isinstance(footprint, int):
        return footprint
    unit, factor = next(((unit, n) for unit, n in _UNITS if footprint % n == 0 and footprint), ("", 1))
    return f"{footprint // factor}{unit}"


class _WithBenchmark:
    @pytest.fixture
    def pgemu_benchmark(
        self, request: pytest.FixtureRequest, benchmark: Any, pgemu_machine: MachineFactory
    ) -> Benchmark:
        """pytest-benchmark's `benchmark` for calls into pgemu; see `Benchmark`."""
        return Benchmark(request, benchmark, pgemu_machine)


class _WithoutBenchmark:
    @pytest.fixture
    def pgemu_benchmark(self) -> None:
        """Fail: there is nothing to time with."""
        pytest.fail(_ABSENT, pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Take the ratios to controls, before pytest-benchmark stores anything."""
    timed = session.config.stash.get(_TIMED, None)
    if timed:
        from pgemu.benchmarking.summary import set_ratios

        set_ratios(timed)
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print emulator time and modelled kernel time, each in a section of its own; nothing without timings."""
    timed = [one for one in config.stash.get(_TIMED, []) if one.seconds is not None]
    if not timed:
        return
    from pgemu.benchmarking import summary

    missing = filter(None, [summary.unmodelled_line(timed)])
    sections = (
        (summary.EMULATOR_TITLE, summary.EMULATOR_NOTE, summary.emulator_lines(timed)),
        (summary.MODELLED_TITLE, summary.MODELLED_NOTE, [*summary.modelled_lines(timed), *missing]),
    )
    for title, notes, lines in sections:
        found = list(lines)
        if found:
            terminalreporter.section(title)
            for line in (*notes, "", *found):
                terminalreporter.write_line(line)
