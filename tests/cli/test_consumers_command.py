"""`pgemu consumers` as people call it."""

from __future__ import annotations

import json

import pytest

from pgemu.cli import main


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["consumers", *args], prog_name="pgemu")
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return captured.out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    assert lines[0].split() == ["restructure", "pfnmap"]
    rows = {line.split("  ")[0]: line.split() for line in lines[2:]}
    assert rows["RDMA ibv_reg_mr()"][-6:-1] == ["-EAGAIN", "at", "0x5000", "-EFAULT", "ok"]
    assert rows["kvm_{read,write}_guest()"][1:6] == ["copy", "ok", "ok", "ok", "ok"]
    assert any(line.startswith("15 of 20 work with restructure and not with pfnmap: O_DIRECT,") for line in lines)
    assert "The same keep restructure from converting while they hold the page; not afterwards." in lines


def test_json_twice_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--json", "--page-size", "2M")
    document = json.loads(text)
    assert (document["page_size"], document["order"]) == (2 << 20, "fixup")
    named = {row["consumer"]: row for row in document["consumers"]}
    assert len(named) == 20
    assert named["VFIO type1"]["pfnmap"]["status"] == "-EFAULT"
    assert named["udmabuf"]["restructure"]["status"] == "-EBADFD"
    assert output(capsys, "--json") == text


def test_an_order_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["consumers", "--order", "nothing"], prog_name="pgemu")
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
