"""Standard output of every command: full, closed, of another encoding; and no name reaches a terminal as it is."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

import pgemu.cli
from announcement import complaints
from pgemu import Config, Machine
from pgemu.cli import main
from pgemu.cli._output import escaped_output
from pgemu.errors import InputError, printable

CASES = Path(__file__).parents[1] / "data" / "cases"
LOG = CASES / "tdx-shared-bit.txt"
COMPARE = ("compare", "--page-size", "2M", "--no-sensitivity")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of each command with which it prints something."""
    folder = tmp_path_factory.mktemp("output")
    machine = Machine(Config("pfnmap", pool=4 << 20, page_size=2 << 20))
    gmem, vm = machine.create_guest_memfd(2 << 20), machine.create_vm()
    vm.bind(gmem, gpa=0)
    vm.touch(0)
    machine.write_image(folder / "image")
    (folder / "log").write_text(
        " vmm-9 [000] ..... 1.000000: kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x200000 hva=0x7f0000000000\n"
        " vmm-9 [000] ..... 1.000001: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
        " vmm-9 [000] ..... 1.000002: kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 4 "
        "old_spte 8000000000000000 new_spte 1000827\n"
    )
    document = folder / "a.json"
    document.write_text(in_process(*COMPARE, str(LOG), "--format", "json")[1])
    return {
        "audit": ["--only", "vfio-maps-ram"],
        "calibrate": ["--seconds", "0.1"],
        "compare": [*COMPARE[1:], str(LOG)],
        "consumers": [],
        "defects": [],
        "decode": ["1"],
        "diff": [str(document), str(document)],
        "dump": [str(folder / "image"), "--root", "vm:0"],
        "export": ["gdb", str(folder / "image"), "--root", "kernel", "-o", str(folder / "core")],
        "guest": [str(ACCESSES), "--guest-memory", "1G"],
        "page": [str(folder / "image"), "0", "--root", "kernel"],
        "record": ["--events"],
        "replay": [str(LOG), "--design", "pfnmap", "-o", str(folder / "outcomes")],
        "scenario": ["smallest-pfnmap"],
        "trace": ["formats"],
        "walk": [str(folder / "image"), "--root", "vm:0", "0"],
        "verify": [str(folder / "log")],
        "warmup": [],
        "workload": ["list"],
    }


ACCESSES = Path(__file__).parents[1] / "data" / "accesses" / "lackey-ls.txt.xz"

COMMANDS = sorted(module.name for module in pkgutil.iter_modules(pgemu.cli.__path__) if module.name[0] != "_")
QUICK = [name for name in COMMANDS if name != "calibrate"]


def in_process(*arguments: str, output: Any = None) -> tuple[object, str, str]:
    """Status, stdout and stderr of a command."""
    kept = sys.stdout, sys.stderr
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict") if output is None else output
    complaint = io.StringIO()
    sys.stdout, sys.stderr = stream, complaint
    status: object = None
    try:
        main(list(arguments), prog_name="pgemu")
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout, sys.stderr = kept
    said = "" if not isinstance(stream, io.TextIOWrapper) or output else stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    return status, said, complaint.getvalue()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
@pytest.mark.parametrize("command", QUICK)
def test_a_full_disk_is_one_line(command: str, commands: dict[str, list[str]]) -> None:
    with open("/dev/full", "w") as full:
        status, _, complaint = in_process(command, *commands[command], output=full)
    assert (status, complaints(complaint)) == (2, "pgemu: standard output: No space left on device\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_output_is_one_line(command: str, commands: dict[str, list[str]], monkeypatch: Any) -> None:
    complaint = io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", complaint)
    with pytest.raises(SystemExit) as end:
        main([command, *commands[command]], prog_name="pgemu")
    assert (end.value.code, complaint.getvalue()) == (2, "pgemu: standard output is closed\n")


@pytest.mark.parametrize("command", QUICK)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_will_do(command: str, encoding: str, commands: dict[str, list[str]]) -> None:
    for arguments in ([command, *commands[command]], [command, "--help"]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        status, _, complaint = in_process(*arguments, output=stream)
        assert (status, complaints(complaint)) == (0 if command != "page" or "--help" in arguments else status, "")
        assert status in (0, 1)
        assert stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", ["--help", "compare --help", "decode 1 2 3", f"compare {LOG} --page-size 2M"])
def test_who_stops_reading_is_left_in_peace(arguments: str) -> None:
    python = shlex.quote(sys.executable)
    script = f"set -o pipefail; sleep 0.1 | {python} -m pgemu {arguments} | true; echo ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert complaints(done.stderr) == ""
    assert done.stdout.strip() in ("0", "141")  # 0: it was quicker


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "1>&- 2>&-", ">/dev/full 2>/dev/full"])
@pytest.mark.parametrize("arguments", ["decode nothing", "compare /no/such/file", "calibrate -o /no/such/file"])
def test_the_status_tells_where_nobody_can_be_told(arguments: str, closed: str) -> None:
    done = subprocess.run(["sh", "-c", f"{shlex.quote(sys.executable)} -m pgemu {arguments} {closed}"])
    assert done.returncode == 2


# --------------------------------------------------------------------------- names

ODD = st.text(
    st.one_of(
        st.sampled_from("\x1b\x07\x08\r\x7f\x9b\x85\u202e\u2028\udcff\ud800[]/:;m0"),
        st.characters(exclude_characters="\n\0"),
    ),
    min_size=1,
    max_size=12,
)


def obeyed(text: str) -> str:
    """What of a text a terminal would obey."""
    turns = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join(one for one in text if one in turns or (unicodedata.category(one) in ("Cc", "Cs") and one != "\n"))


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_is_printable_and_what_is_so_stays(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert InputError(text, text, 1).args[0].isprintable()
    if text.isprintable():
        assert printable(text) == text


@given(st.lists(st.text(st.characters(exclude_categories=()))))
def test_no_control_byte_is_ever_printed(texts: list[str]) -> None:
    stream, kept = io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace"), sys.stdout
    sys.stdout = stream
    try:
        with escaped_output():
            for text in texts:
                print(text, end="")
    finally:
        sys.stdout = kept
    stream.flush()
    data = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert all(byte in b"\n\t" or 32 <= byte < 127 for byte in data)
    if all(text.isascii() and text.isprintable() for text in texts):
        assert data.decode() == "".join(texts)


def odd_log(name: str) -> str:
    """A log in which tasks and events, of several VMs, have a name."""
    word = "".join(name.split()) or "x"
    lines = [f"{name}-{10 + vm} [000] ..... 1.{vm:06}: kvm_page_fault: vcpu 0 rip 0x0 address 0x{vm}000 error_code 0x6"
             for vm in range(2)]  # fmt: skip
    return "\n".join([*lines, f"{name}-10 [000] ..... 1.000003: x{word}: 1", ""])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=ODD, options=st.sampled_from([("--vm-process", "all", "--details"), ("--vm-process", "11"), ()]))
@example(name="\x1b[2J", options=("--vm-process", "all", "--details"))
@example(name="[/red]\x9b", options=("--vm-process", "all", "--details"))
def test_names_of_a_log_are_printed_escaped(tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    file = name.replace("/", "").encode("utf-8", "replace").decode()
    path = tmp_path / f"a{file}\x1b\udcff"
    path.write_bytes(odd_log(name).encode("utf-8", "surrogatepass"))
    status, said, complaint = in_process(*COMPARE, "--design", "pfnmap", *options, str(path))
    assert status in (0, 2)
    assert (status == 2) == (complaints(complaint).count("\n") == 1) != bool(said)
    assert obeyed(said + complaints(complaint)) == ""


def test_a_document_with_odd_names_is_printed_escaped(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    path = Path(commands["diff"][0])
    document = json.loads(path.read_text())
    document["trace"]["source"] = "a\x1b[2J\udcff\u202e"
    other = tmp_path / "b\x1b.json"
    other.write_text(json.dumps(document))
    for form in ("text", "markdown", "csv"):
        status, said, complaint = in_process("diff", str(path), str(other), "--format", form)
        assert (status, complaint, obeyed(said)) == (0, "", "")
        assert form == "csv" or r"a\x1b[2J\udcff\u202e" in said
