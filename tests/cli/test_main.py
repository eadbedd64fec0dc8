"""The command as a process: help, version, imports, pipes, terminals."""

from __future__ import annotations

import lzma
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import rich_click as click
from click.testing import CliRunner

from announcement import complaints
from pgemu.cli import main

HELP = """\
import sys
from pathlib import Path
from pgemu.cli import main
try:
    main({args}, prog_name="pgemu")
except SystemExit as end:
    heavy = {{"numba", "llvmlite", "pyarrow"}} & set(sys.modules)
    print("loaded:", *sorted(heavy), file=sys.stderr)
    raise
"""


def python(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.same_with_checks
@pytest.mark.parametrize("args", [["--help"], ["compare", "--help"], ["--version"], []])
def test_help_and_version_load_no_compiler_and_no_arrow(args: list[str]) -> None:
    result = python("-c", HELP.format(args=args))
    assert result.returncode == 0, result.stderr
    assert result.stderr == "loaded:\n"
    assert "pgemu" in result.stdout


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    "module",
    [
        "pgemu",
        "pgemu.cli",
        "pgemu.trace",
        "pgemu.report",
        "pgemu.experiments.compare",
        "pgemu.cost",
    ],
)
def test_importing_loads_no_compiler_and_no_arrow(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'numba', 'pyarrow'}} & set(sys.modules)))"
    assert python("-c", code).stdout == "\n"


def test_help_names_every_option() -> None:
    shown = python("-m", "pgemu", "compare", "--help", env={**os.environ, "COLUMNS": "120"}).stdout
    options = set(re.findall(r"--[a-z][a-z0-9-]+", shown))
    assert options >= {
        *("--page-size", "--guest-memory", "--design", "--no-hvo", "--kernel", "--stage2", "--vcpus", "--host-cpus"),
        *("--zero", "--init", "--dontneed", "--seed", "--check", "--memslot", "--format", "--sources", "--help"),
        *(
            "--order",
            "--batch",
            "--split-to",
            "--merge",
            "--flush",
            "--host-huge",
            "--worker",
            "--lru-cache",
            "--defect",
        ),
    }


def test_help_explains_every_option_once_in_one_or_two_lines() -> None:
    """At 80 columns, each under a heading; what a value may be stands behind."""
    shown = python("-m", "pgemu", "compare", "--help", env={**os.environ, "COLUMNS": "80"}).stdout
    lines = [line[2:-1].rstrip() for line in shown.splitlines() if line.startswith("│")]
    assert all(len(line) <= 80 for line in shown.splitlines())
    starts = [number for number, line in enumerate(lines) if line.startswith("--")]
    heights = {lines[a].split()[0]: b - a for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)}
    command = main.get_command(None, "compare")  # type: ignore[arg-type]
    assert command
    named = {max(one.opts, key=len): one for one in command.params if isinstance(one, click.Option)}
    assert sorted({name.split("/")[0] for name in heights}) == sorted([*named, "--help"])
    assert len(starts) == len(named) + 1
    assert {name: height for name, height in heights.items() if height > 2} == {}
    headings = [line.strip("╭─╮ ") for line in shown.splitlines() if line.startswith("╭")]
    assert headings[:2] == ["What is compared", "What is printed"]
    assert "Options" not in headings  # those that stand under no heading


@pytest.mark.same_with_checks
def test_names_of_the_package_resolve() -> None:
    code = "import pgemu; print(all(hasattr(pgemu, name) for name in pgemu.__all__), hasattr(pgemu, 'nothing'))"
    assert python("-c", code).stdout == "True False\n"


def test_an_unknown_command_is_one_line() -> None:
    result = python("-m", "pgemu", "nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "pgemu: No such command 'nothing'.\n"


@pytest.mark.parametrize(("words", "meant"), [(("compar",), "compare"), (("trace", "inof"), "info")])
def test_a_command_that_is_almost_there_is_suggested_in_every_group(words: tuple[str, ...], meant: str) -> None:
    result = python("-m", "pgemu", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"pgemu: No such command '{words[-1]}'. Did you mean '{meant}'?\n"


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "pgemu", "compare", "--design", "pfnmap", "--format", "json", "--sources"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = complaints(process.stderr.read().decode())
    assert said == ""
    assert process.returncode == 141


def on_a_terminal(code: str) -> tuple[str, str]:
    """Run Python with stderr on a terminal: what it wrote to stdout and there."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # the other end is gone
                break
            if not piece:
                break
            shown += piece
        assert process.stdout
        printed = process.stdout.read().decode()
    os.close(leader)
    return printed, shown.decode()


BAR = """
import time
from importlib import import_module
command = import_module("pgemu.cli._options")
command._PROGRESS_AFTER = {after}
with command.Bar() as bar:
    for done in (1, 2, 3):
        bar("restructure", done, 4)
        time.sleep(0.15)
print("done")
"""


def test_progress_shows_on_a_terminal_after_a_while() -> None:
    printed, shown = on_a_terminal(BAR.format(after=0.1))
    assert printed == "done\n"
    assert "restructure" in shown


def test_progress_stays_away_from_short_runs() -> None:
    assert on_a_terminal(BAR.format(after=60)) == ("done\n", "")


def test_progress_stays_away_from_pipes() -> None:
    result = python("-c", BAR.format(after=0))
    assert (result.stdout, result.stderr) == ("done\n", "")


READING = """
from importlib import import_module
command = import_module("pgemu.cli._options")
command._PROGRESS_AFTER = 0
shown = []
tell = command.Bar.__call__
def telling(self, what, done, total):
    shown.append((what, done > 0, total > 0))
    tell(self, what, done, total)
command.Bar.__call__ = telling
from pgemu.cli import main
try:
    main(["compare", "--no-sensitivity", {path!r}], prog_name="pgemu")
except SystemExit as end:
    print("shown:", *dict.fromkeys(what for what, *_ in shown), end.code)
"""


@pytest.mark.parametrize("form", ["text", "xz", "parquet"])
def test_reading_a_trace_is_shown_on_a_terminal_before_what_follows(tmp_path: Path, form: str) -> None:
    from pgemu import trace
    from pgemu.trace.readers import parquet

    path = trace.shipped()
    if form == "text":
        path = tmp_path / "log"
        path.write_bytes(lzma.decompress(trace.shipped().read_bytes()))
    elif form == "parquet":
        path = tmp_path / "log.parquet"
        parquet.write(trace.load(trace.shipped()), path)
    code = READING.format(path=str(path))
    printed, shown = on_a_terminal(code)
    assert printed.splitlines()[-1] == "shown: reading restructure pfnmap 0"
    assert shown.index("reading") < shown.index("restructure")
    piped = python("-c", code)
    assert (piped.stdout, piped.stderr) == (printed, "")


SECOND = """
import sys
from pathlib import Path
from pgemu.cli import main
try:
    main(["compare", *{args}], prog_name="pgemu")
except SystemExit as end:
    assert end.code == 0
    # Where machine code is loaded without the kernels' modules, none of them can have been compiled.
    entries = getattr(sys.modules.get("pgemu_kernels.engine.compile"), "entries", [])
    print("compiled:", *(entry.__name__ for entry in entries if entry.stats.cache_misses), file=sys.stderr)
    print("loaded:", *sorted({unneeded} & set(sys.modules)), file=sys.stderr)
"""
UNNEEDED = {
    *("pyarrow", "zstandard", "rich.progress", "tomllib", "hypothesis", "numba.cuda"),
    *("pgemu.workload", "pgemu.images.image", "pgemu.tables.walk", "pgemu.tables.translation"),
    *("pgemu_kernels.run.full", "pgemu_kernels.run.ordinary", "pgemu_kernels.run.pooling"),
}
TABLES = {"rich.table", "rich.console", "pgemu.report.details"}


@pytest.fixture(scope="module")
def a_first_run() -> None:
    """It compiles what there is to compile, which does not depend on what is printed."""
    assert python("-m", "pgemu", "compare").returncode == 0


@pytest.mark.usefixtures("a_first_run")
@pytest.mark.parametrize(
    ("args", "unneeded"),
    [([], UNNEEDED | TABLES), (["--details"], UNNEEDED), (["--format", "json"], UNNEEDED | TABLES)],
)
def test_a_second_run_compiles_nothing_and_loads_only_what_it_needs(args: list[str], unneeded: set[str]) -> None:
    second = python("-c", SECOND.format(args=args, unneeded=unneeded))
    assert second.returncode == 0, second.stderr
    assert second.stdout == CliRunner().invoke(main, ["compare", *args]).stdout  # of a process that did much before
    assert second.stderr == "compiled:\nloaded:\n"


@pytest.mark.same_with_checks
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
@pytest.mark.parametrize(
    ("output", "complaint"),
    [(">/dev/full", "standard output: No space left on device"), (">&-", "standard output is closed")],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--help", "--version", "scenario --help"])
def test_output_that_cannot_be_written_is_one_line(
    output: str, complaint: str, unbuffered: str, arguments: str
) -> None:
    command = f"{shlex.quote(sys.executable)} -m pgemu {arguments} {output}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, f"pgemu: {complaint}\n")
