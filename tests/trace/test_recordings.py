"""Recordings of perf and trace-cmd are printed by their tools: by programs of the test's own, and by perf if there is
one that may record. No file that trace-cmd wrote was read."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.trace import readers
from pgemu.trace.log import Log
from pgemu.trace.recordings import printed
from pgemu.trace.source import open_source

pytestmark = pytest.mark.same_with_checks

LINE = "CPU 3/KVM-61883 [078] ..... 5.250001: kvm_page_fault: vcpu 3 rip 0x10 address 0x84123 error_code 0x100000006"
PERF, TRACE_CMD = b"PERFILE2\0\0recorded\n", b"\x17\x08\x44tracing6\0recorded\n"
SHOWS = """
import os, sys
print("# arguments", sys.argv[1:-1], "locale", os.environ["LC_ALL"], "input", sys.stdin.read())
data = open(sys.argv[-1], "rb").read()
assert b"recorded" in data, data
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only one where tools are looked for."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)


def recording(tmp_path: Path, data: bytes = PERF, name: str = "a.data") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def load(path: Path | str) -> Log:
    found = readers.read(open_source(path))
    assert isinstance(found, Log)
    return found


def refused(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        readers.read(open_source(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "arguments"),
    [
        ("perf", PERF, "'script' '--show-lost-events' '-F' 'trace:comm,pid,tid,cpu,time,event,trace' '-i'"),
        ("trace-cmd", TRACE_CMD, "'report' '-i'"),
    ],
)
@pytest.mark.parametrize("how", ["file", "compressed", "standard input", "dash"])
def test_the_tool_prints_it(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, arguments: str, how: str
) -> None:
    """With the file as an argument, or a copy of what is none; without a shell; in the locale C; with no input."""
    seen = tmp_path / "seen"
    tool(tools, name, f"{SHOWS}open({str(seen)!r}, 'w').write(' '.join(map(repr, sys.argv[1:])))\nprint({LINE!r})")
    path: Path | str = recording(tmp_path, data, "-x $(touch y)" if how == "dash" else "a.data")
    where = str(path)
    if how == "compressed":
        path = recording(tmp_path, gzip.compress(data), "a.gz")
    elif how == "standard input":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        path = "-"
    elif how == "dash":
        monkeypatch.chdir(tmp_path)
        path = Path("-x $(touch y)")
    log = load(path)
    assert log.inputs == {"kvm_page_fault": 1}
    shown = "<stdin>" if how == "standard input" else str(path)
    assert log.source == f"{shown} ({name} {'script' if name == 'perf' else 'report'})"
    assert seen.read_text().startswith(arguments)
    if how in ("file", "dash"):
        assert seen.read_text() == f"{arguments} {where!r}"
    assert not (tmp_path / "y").exists()


def test_locale_and_input(tools: Path, tmp_path: Path) -> None:
    tool(tools, "perf", f"{SHOWS}print({LINE!r})")
    source = printed(open_source(recording(tmp_path)))
    assert source.head.decode().splitlines()[0].endswith("'-i'] locale C input ")
    source.close()


@pytest.mark.parametrize(
    ("data", "helps"),
    [
        (PERF, "perf script -i FILE -F comm"),
        (PERF.replace(b"\0", b"x"), "perf script -i FILE -F"),  # of which one buffer has no binary zero
        (TRACE_CMD, "trace-cmd report"),
    ],
)
def test_without_the_tool_it_is_said_what_prints_it(tools: Path, tmp_path: Path, data: bytes, helps: str) -> None:
    for read in (readers.read, readers.read_log):
        with pytest.raises(InputError, match=rf"a\.data: a recording of .*{helps}"):
            read(open_source(recording(tmp_path, data)))


@pytest.mark.parametrize("lines", [1, 20_000])
def test_a_tool_that_fails_is_an_error(tools: Path, tmp_path: Path, lines: int) -> None:
    """Whatever it printed before."""
    output = f"print('\\n'.join([{LINE!r}] * {lines}))"
    body = f"import sys\n{output}\nprint('a\\nbroken \\x1b[1m header', file=sys.stderr)\n"
    tool(tools, "perf", f"{body}sys.exit(3)")
    said = refused(recording(tmp_path))
    assert said.endswith("a recording of perf: perf script ends with status 3: broken \\x1b[1m header")
    tool(tools, "perf", f"{body}sys.stdout.flush()\nimport os\nos.kill(os.getpid(), 9)")
    assert "a recording of perf: perf script ends with signal 9: broken" in refused(recording(tmp_path))


def test_a_tool_that_prints_nothing(tools: Path, tmp_path: Path) -> None:
    tool(tools, "trace-cmd", "import sys\nprint('no such version', file=sys.stderr)")
    said = refused(recording(tmp_path, TRACE_CMD))
    assert said.endswith("a recording of trace-cmd: trace-cmd report prints nothing of it: no such version")


def test_a_tool_that_cannot_be_run(tools: Path, tmp_path: Path) -> None:
    path = tools / "perf"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    assert "a recording of perf: " in refused(recording(tmp_path))
    assert "cannot be run" in refused(recording(tmp_path))


def test_errors_in_what_it_prints_name_file_and_tool(tools: Path, tmp_path: Path) -> None:
    tool(tools, "perf", f"print({LINE!r})\nprint({LINE[:-40]!r})\nprint({LINE!r})")
    assert "a.data (perf script):2: malformed kvm_page_fault" in refused(recording(tmp_path))


@pytest.mark.parametrize("how", ["closed", "malformed"])
def test_reading_that_stops_ends_the_tool(tools: Path, tmp_path: Path, how: str) -> None:
    """It would go on for ever; without a reader it would even be stopped by a full pipe."""
    number = tmp_path / "number"
    first = LINE if how == "closed" else LINE[:-40]
    tool(
        tools,
        "perf",
        "import os, signal, sys, time\nsignal.signal(signal.SIGPIPE, signal.SIG_IGN)\n"
        f"open({str(number)!r}, 'w').write(str(os.getpid()))\nprint({first!r})\nprint({LINE!r})\n"
        "print('\\n' * 500_000, flush=True)\ntime.sleep(600)",
    )  # fmt: skip
    if how == "closed":
        source = printed(open_source(recording(tmp_path)))
        assert source.head.startswith(b"CPU 3")
        source.close()
    else:
        assert "malformed kvm_page_fault" in refused(recording(tmp_path))
    child = int(number.read_text())
    for _ in range(500):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the tool runs on")


def test_what_is_no_recording_stays_as_it_is(tmp_path: Path) -> None:
    source = open_source(recording(tmp_path, LINE.encode()))
    assert printed(source) is source
    source.close()


def test_a_recording_of_the_installed_perf(tmp_path: Path) -> None:
    """A tracepoint beside an event that has no CPU."""
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("perf is not installed")
    path = tmp_path / "perf.data"
    command = [perf, "record", "-q", "-e", "exceptions:page_fault_user,page-faults", "-c", "1", "-o", str(path), "true"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    if done.returncode or not path.exists():
        pytest.skip("perf may not record here")
    log = load(path)
    assert log.inputs["page_fault_user"] > 10
    assert log.ignored["page-faults without an address (perf record -d, perf script -F +addr)"] > 10
    assert log.tasks[0].name == "true"
    assert log.tasks[0].process is not None
    assert load(recording(tmp_path, gzip.compress(path.read_bytes()), "a.gz")).inputs == log.inputs
    assert "perf script ends with status" in refused(recording(tmp_path, path.read_bytes()[:3000]))
