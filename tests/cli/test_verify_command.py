"""`pgemu verify`: what it prints, and how it ends."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgemu.cli import main
from pgemu.report.answers import WIDTH

LOG = Path(__file__).parents[1] / "data" / "traces" / "vm-convert-swprot.ftrace.txt.xz"
LINES = 2000


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "log"
    with lzma.open(LOG, "rt", encoding="utf-8") as file:
        path.write_text("".join(line for line, _ in zip(file, range(LINES), strict=False)))
    return path


@pytest.fixture(scope="module")
def wrong(log: Path) -> Path:
    """The log with a leaf at another level."""
    lines = log.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if i > LINES // 2 and "spte_changed" in line and "level 1" in line)
    lines[at] = lines[at].replace("level 1", "level 2")
    path = log.with_name("wrong")
    path.write_text("".join(lines))
    return path


def test_a_log_that_agrees(log: Path) -> None:
    found = run(str(log))
    assert found.exit_code == 0
    first, *rest = found.stdout.splitlines()
    assert first.endswith("compared entries agree (100.00 %)")
    assert "  memory behind the slots: thp (2M leaves; --backing)" in rest
    assert "differ" not in found.stdout


def test_a_log_that_does_not(wrong: Path) -> None:
    found = run(str(wrong), "--first", "1")
    assert found.exit_code == 1
    assert "differ, 0 of them for a reason that is known:" in found.stdout
    assert found.stdout.count("    model ") == 1
    assert max(map(len, found.stdout.splitlines()[3:])) <= WIDTH + 20


def test_the_document(wrong: Path) -> None:
    found = run(str(wrong), "--json", "--first", "2")
    assert found.exit_code == 1
    document = json.loads(found.stdout)
    assert len(document["first"]) == 2
    assert document["compared"] - document["agreed"] == sum(one["entries"] for one in document["differences"])
    assert {"address_space", "level", "gfn", "log", "model", "line", "kind"} <= document["first"][0].keys()


@pytest.mark.parametrize(("option", "value"), [("--backing", "4K"), ("--stage2", "ept"), ("--kernel", "6.12")])
def test_options_are_what_the_model_is(option: str, value: str, log: Path) -> None:
    document = json.loads(run(str(log), "--json", option, value).stdout)
    assert document["configuration"][option[2:]] in (value, [value])


def test_bad_input(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    assert run(str(empty)).exit_code == 2
    other = tmp_path / "other"
    other.write_text(" a-1 [000] ..... 1.000001: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x6\n")
    found = run(str(other))
    assert found.exit_code == 2
    assert len(found.stderr.splitlines()) == 1
