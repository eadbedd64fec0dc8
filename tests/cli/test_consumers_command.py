"""`pgemu consumers` as people call it."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from pgemu.cli import main
from pgemu.experiments.consumers import CONSUMERS, try_all


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["consumers", *args], prog_name="pgemu")
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return captured.out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    assert lines[0].split() == ["restructure", "pfnmap"]
    rows = {line.split("  ")[0]: line.split() for line in lines[2:24]}
    assert rows["RDMA ibv_reg_mr()"][-4:] == ["ok", "-EAGAIN", "-EFAULT", "ok"]
    assert rows["kvm_{read,write}_guest()"][1:6] == ["copy", "ok", "ok", "ok", "ok"]
    assert lines[0].index("pfnmap") == lines[1].rindex("access")
    said = " ".join(" ".join(lines).split())
    assert "16 of 22 work with restructure and not with pfnmap: O_DIRECT," in said
    assert "The same keep restructure from converting while they hold the page; not afterwards." in said
    assert "Every conversion that fails does so at offset 0x5000." in said


@pytest.mark.parametrize("columns", ["", "80", "200"])
def test_lines_are_those_of_a_mail_and_name_every_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = output(capsys).splitlines()
    assert max(map(len, lines)) <= 80
    sources = lines[lines.index("", lines.index("") + 1) + 1 :]
    assert {(line.split("  ")[0], line.split()[-1]) for line in sources[1:]} == {
        (consumer.name, consumer.source) for consumer in CONSUMERS
    }


def test_it_fits_its_terminal_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 40 columns on: where lines become too long, what stands beside each other is on lines of its own."""
    rows = try_all(page_size=2 << 20, order="fixup")
    monkeypatch.setattr("pgemu.experiments.consumers.try_all", lambda **_: rows)
    said = {}
    for columns in range(40, 201):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = CliRunner().invoke(main, ["consumers"]).output.splitlines()
        assert max(map(len, lines)) <= columns
        said[columns] = sorted(re.findall(r"[^\s,]+", " ".join(lines).replace(":", ": ")))
    assert all(words == said[200] for words in said.values())


def test_json_twice_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--json", "--page-size", "2M")
    document = json.loads(text)
    assert (document["page_size"], document["order"]) == (2 << 20, "fixup")
    named = {row["consumer"]: row for row in document["consumers"]}
    assert len(named) == 22
    assert named["VFIO type1"]["pfnmap"]["status"] == "-EFAULT"
    assert named["udmabuf"]["restructure"]["status"] == "-EBADFD"
    assert output(capsys, "--json") == text


def test_an_order_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["consumers", "--order", "nothing"], prog_name="pgemu")
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
