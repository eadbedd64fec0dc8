"""README's section on performance is what `python -m bench.table` prints of the figures in tests/data/bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import table
from pgemu.errors import InputError

pytestmark = pytest.mark.same_with_checks

ROOT = Path(__file__).parents[1]


def below_the_heading(readme: str) -> list[str]:
    text = readme.split(f"\n{table.HEADING}\n")[1]
    return text[: text.index("\n## ")].strip().splitlines()


def test_readme_is_the_command_s_output() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "bench.table", str(table.STORED)]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert below_the_heading((ROOT / "README.md").read_text()) == done.stdout.splitlines()


def test_stored_figures_are_all_that_the_table_needs() -> None:
    benchmarks = table.Benchmarks(table.STORED)
    assert benchmarks.stripped() == table.STORED.read_text()
    for bench in json.loads(table.STORED.read_text())["benchmarks"]:
        assert table.wanted(*bench["fullname"].split("::"))


@pytest.fixture
def document() -> dict[str, Any]:
    """pytest-benchmark's, with rates and ratios that are easily seen."""
    found = []

    def add(name: str, rate: float, ratio: float | None = None, operations: int = 1_000_000, **info: str) -> None:
        extra = {"operations": operations, **info} | ({} if ratio is None else {"ratio_to_control": ratio})
        stats = {"median": operations / (rate * 1e6), "min": 0.0, "data": []}
        found.append({"fullname": f"bench/{name}", "group": "g", "extra_info": extra, "stats": stats})

    for row, start in enumerate(table.ROWS.values()):
        for number, (design, order) in enumerate((d, o) for d in table.DESIGNS for o in table.ORDERS):
            where = {"design": design, "order": order, "page_size": "1G", "footprint": "16G"}
            add(f"{start}[{design}-{order}]", 10.0 * row + number + 1, 0.01 * (row + 1), **where)
            add(f"{start}[{design}-{order}-2M]", 1e6, 1e6, **where | {"page_size": "2M"})
    add(f"{table.SPLIT}rfc2-7.3]", 200.0, 0.5, 200_000)  # 1 ms
    add(f"{table.SPLIT}rfc2-6.18]", 100.0, 0.7, 200_000)  # 2 ms
    add(f"{table.BOOT}7.3]", 0.0512, operations=1024)  # 20 ms
    add(f"{table.PLAIN}random]", 131.0, 0.726, order="random")
    add(f"{table.PLAIN}sequential]", 534.0, 2.31, order="sequential")
    add(f"{table.NESTED}npt]", 16.2)
    add(f"{table.NESTED}ept]", 15.9)
    cpu = {"brand_raw": "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "count": 2, "flags": ["sse", "hypervisor"]}
    return {"machine_info": {"node": "build-host", "cpu": cpu}, "benchmarks": found, "version": "5"}


@pytest.fixture
def read(document: dict[str, Any], tmp_path: Path) -> Callable[[], table.Benchmarks]:
    def read() -> table.Benchmarks:
        path = tmp_path / "o.json"
        path.write_text(json.dumps(document))
        return table.Benchmarks(path)

    return read


def test_each_figure_stands_in_its_place(read: Callable[[], table.Benchmarks]) -> None:
    lines = list(table.section(read()))
    assert max(map(len, lines)) <= 120
    assert " ".join(lines[:2]) == (
        "Million operations a second of the emulator on a core of a 2-core Intel Xeon Platinum virtual machine, "
        "counted and priced (medians of `pytest bench --readme`, 1G pages, 4K at a time); in parentheses the ratio to "
        "a walk and store."
    )
    assert lines[2:10] == [
        "",
        "| operation over 16 GiB (sequential / random) | restructure | pfnmap |",
        "| --- | --- | --- |",
        "| host fault | 1.0 (0.01) / 2.0 (0.01) | 3.0 (0.01) / 4.0 (0.01) |",
        "| guest fault | 11 (0.02) / 12 (0.02) | 13 (0.02) / 14 (0.02) |",
        "| convert to private, nothing mapped | 21 (0.03) / 22 (0.03) | 23 (0.03) / 24 (0.03) |",
        "| convert to private, mapped by both | 31 (0.04) / 32 (0.04) | 33 (0.04) / 34 (0.04) |",
        "",
    ]
    assert " ".join(lines[10:]) == (
        "A 1G folio splits and merges in 1.0 to 2.0 ms (0.5 to 0.7 of a C loop's rate), a 1 TiB pool boots in 20 ms. "
        "Walks: 131 M/s random over 2^22 pages (0.73 of a gather), 534 in order (2.31 of C); nested, 24 references, 16."
    )
    assert len(lines) == 12  # README.md has 200 lines


def test_what_is_stored_gives_the_same_section(read: Callable[[], table.Benchmarks], tmp_path: Path) -> None:
    benchmarks, path = read(), tmp_path / "stored.json"
    path.write_text(benchmarks.stripped())
    again = table.Benchmarks(path)
    assert list(table.section(again)) == list(table.section(benchmarks))
    assert again.stripped() == benchmarks.stripped()
    assert "build-host" not in benchmarks.stripped()


def test_the_section_is_replaced_and_nothing_else() -> None:
    readme = f"# a\n\n{table.HEADING}\n\nold\n\n| x |\n\nold\n\n## Next\n\nmore\n"
    assert (
        table.replaced(readme, ["new", "", "| y |"]) == f"# a\n\n{table.HEADING}\n\nnew\n\n| y |\n\n## Next\n\nmore\n"
    )
    with pytest.raises(InputError, match=r"README.md: expected the heading"):
        table.replaced("# a\n", [])


def test_store_writes_both_files(
    read: Callable[[], table.Benchmarks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = list(table.section(read()))
    monkeypatch.setattr(table, "README", tmp_path / "README.md")
    monkeypatch.setattr(table, "STORED", tmp_path / "readme.json")
    table.README.write_text(f"{'# a'}\n\n{table.HEADING}\n\nold\n\n## Next\n")
    assert table.main([str(tmp_path / "o.json"), "--store"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert below_the_heading(table.README.read_text()) == lines
    assert list(table.section(table.Benchmarks(table.STORED))) == lines


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.clear(), "expected what pytest --benchmark-json writes"),
        (lambda d: d["benchmarks"].clear(), "no benchmark .*host_fault.*restructure.*: expected those of pytest bench"),
        (lambda d: d["benchmarks"][0].pop("stats"), "expected what pytest --benchmark-json writes"),
        (lambda d: d["benchmarks"][0]["extra_info"].pop("ratio_to_control"), "a benchmark has no ratio to its control"),
        (lambda d: d["benchmarks"].pop(), None),  # one of two kernels' or formats': the other's figure stands
    ],
)
def test_what_is_missing_is_named(
    document: dict[str, Any], read: Any, damage: Any, message: str | None, capsys: Any, tmp_path: Path
) -> None:
    damage(document)
    (tmp_path / "o.json").write_text(json.dumps(document))
    status = table.main([str(tmp_path / "o.json")])
    printed = capsys.readouterr()
    if message is None:
        assert (status, printed.err) == (0, "")
        return
    assert status == 2
    assert printed.out == ""
    assert printed.err.startswith(f"{tmp_path / 'o.json'}: ")
    assert printed.err.count("\n") == 1
    with pytest.raises(InputError, match=message):
        list(table.section(read()))


def test_usage_and_unreadable_files(tmp_path: Path, capsys: Any) -> None:
    assert table.main(["a", "b"]) == 2
    assert table.main(["--stor"]) == 2
    assert table.main([str(tmp_path / "none.json")]) == 2
    (tmp_path / "bad.json").write_text("{")
    assert table.main([str(tmp_path / "bad.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["usage: python -m bench.table [JSON] [--store [--force]]"] * 2
    assert lines[2] == f"{tmp_path / 'none.json'}: No such file or directory"
    assert lines[3].startswith(f"{tmp_path / 'bad.json'}: no JSON: ")


def test_an_uneven_control_is_told_and_not_stored(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for design, median in (("pfnmap", 0.002), ("restructure", 0.0033)):
        extra = {"role": "control", "design": design, "operations": 1}
        name = f"bench/test_fault.py::test_control[{design}]"
        document["benchmarks"].append({"fullname": name, "extra_info": extra, "stats": {"median": median}})
    path = tmp_path / "o.json"
    path.write_text(json.dumps(document))
    for name in ("README", "STORED"):
        monkeypatch.setattr(table, name, tmp_path / name)
    (tmp_path / "README").write_text(f"a\n{table.HEADING}\nold\n\n## b\n")
    assert table.main([str(path), "--store"]) == 2
    told, refusal = capsys.readouterr().err.splitlines()
    assert told.startswith("test_fault.py::test_control[*]: the control took ")
    assert "--force" in refusal
    assert not (tmp_path / "STORED").exists()
    assert table.main([str(path), "--store", "--force"]) == 0
    assert (tmp_path / "STORED").exists()
    assert capsys.readouterr().err.splitlines() == [told]
    document["benchmarks"][-1]["stats"]["median"] = 0.0029
    path.write_text(json.dumps(document))
    assert table.main([str(path)]) == 0
    assert not capsys.readouterr().err
