"""`pgemu diff`: two documents of compare side by side; `pgemu compare --vary`: several in one table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from announcement import complaints
from comparisons import lowered, mixed, mixed_records
from pgemu.cli import main
from pgemu.experiments.compare import compare
from pgemu.machine.presets import Versions

LOG = """\
 vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=4 gpa=0x0 size=0x400000 hva=0x7f0000000000
 CPU 0/KVM-10 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000000010000 error_code 0x2
 vmm-9 [000] ..... 1.000003: kvm_vm_set_mem_attributes: 0x0000000000000010 -- 0x0000000000000011 [0x0]
"""


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.fixture
def documents(tmp_path: Path) -> tuple[str, str]:
    """The mixed trace like dec2025, and like rfc2 on another kernel."""
    other = compare(lowered(mixed_records()), versions=Versions("rfc2"), kernel="7.3")
    for name, comparison in (("a.json", mixed()), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(comparison.to_json()))
    return str(tmp_path / "a.json"), str(tmp_path / "b.json")


def test_text_has_what_differs_design_by_design(documents: tuple[str, str]) -> None:
    result = invoke("diff", *documents)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:4] == [
        "restructure",
        "",
        "A: made, dec2025, sw VM, 2M pages, Linux 6.18",
        "B: made, rfc2, sw VM, 2M pages, Linux 7.3",
    ]
    # rfc2 writes 24 bytes of each of 511 tails less than the in-place form, and zeroes all of the folio.
    assert any(line.split()[:2] == ["struct", "pages"] for line in lines)
    assert any(line.split() == ["whole", "folios", "0", "2", "MiB", "+2", "MiB", "new"] for line in lines)
    assert not any(line.split()[:3] == ["huge", "folios", "split"] for line in lines)
    everything = invoke("diff", *documents, "--all").stdout
    assert any(line.split() == ["huge", "folios", "split", "1", "1", "0"] for line in everything.splitlines())


def test_equal_documents_say_that_nothing_differs(documents: tuple[str, str]) -> None:
    result = invoke("diff", documents[0], documents[0])
    assert result.exit_code == 0
    assert result.stdout.count("  nothing differs\n") == 2


def test_csv_and_markdown(documents: tuple[str, str]) -> None:
    table = list(csv.DictReader(io.StringIO(invoke("diff", *documents, "--format", "csv").stdout)))
    zeroed = next(row for row in table if row["group"] == "restructure: Zeroed" and row["quantity"] == "whole folios")
    assert (zeroed["unit"], zeroed["A"], zeroed["B"], zeroed["difference"]) == ("bytes", "0", "2097152", "2097152")
    text = invoke("diff", *documents, "--format", "markdown").stdout
    assert text.startswith("## restructure\n\nA: made, dec2025, sw VM, 2M pages, Linux 6.18\nB: made, rfc2, sw VM, ")
    assert "Linux 7.3\n\n| | A | B |" in text
    assert "| whole folios | 0 | 2 MiB | +2 MiB | new |" in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "no such file"),
        ("not json", "expected a document of `pgemu compare --format json`"),
        ("[]", "expected a document of `pgemu compare --format json`"),
        ('{"designs": {}}', "expected a document of `pgemu compare --format json`"),
        ('{"designs": {"other": {}}, "versions": {}}', "has no design that"),
        ('{"designs": {"pfnmap": {}}, "versions": {}}', "of this version"),
        ('{"designs": {"pfnmap": 3}, "versions": {}, "trace": 3}', "of this version"),
    ],
)
def test_a_bad_file_is_one_line_and_status_2(
    documents: tuple[str, str], tmp_path: Path, text: str | None, complaint: str
) -> None:
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    for pair in ((documents[0], str(bad)), (str(bad), documents[0])):
        result = invoke("diff", *pair)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert result.stderr.count("\n") == 1
        assert complaint in result.stderr
        assert result.stderr.startswith("pgemu: ")


# --------------------------------------------------------------------------- --vary


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "small.txt"
    path.write_text(LOG)
    return str(path)


def varied(log: str, *args: str) -> str:
    result = invoke("compare", log, "--page-size", "2M", *args)
    assert result.exit_code == 0, result.output
    assert complaints(result.stderr) == ""
    return result.stdout


def test_every_combination_is_one_row_in_order(log: str) -> None:
    options = ("--vary", "like=rfc2,dec2025", "--vary", "page-size=2M,1G", "--format")
    found = json.loads(varied(log, *options, "json"))
    assert [(row["like"], row["page-size"]) for row in found] == [
        ("rfc2", "2M"),
        ("rfc2", "1G"),
        ("dec2025", "2M"),
        ("dec2025", "1G"),
    ]
    # 4095 pages of vmemmap instead of 7 where the page is of 1G.
    assert found[0]["memory"] != found[1]["memory"]
    table = list(csv.DictReader(io.StringIO(varied(log, *options, "csv"))))
    assert table == found
    assert varied(log, *options, "markdown").startswith("| like | page-size | conversions | ")
    text = varied(log, *options, "text")
    assert text.startswith("like rfc2, page-size 2M\n  conversions ")
    assert max(map(len, text.splitlines())) <= 80


def test_an_option_that_may_be_repeated_varies_one_value_at_a_time(log: str) -> None:
    found = json.loads(varied(log, "--vary", "defect=merge-keeps-flag,rollback-at-zero", "--format", "json"))
    assert [row["defect"] for row in found] == ["merge-keeps-flag", "rollback-at-zero"]


def test_a_varied_value_is_the_one_of_the_option(log: str) -> None:
    (row,) = json.loads(varied(log, "--vary", "order=jan2026", "--format", "json"))
    assert row["order"] == "jan2026"
    assert row["refused"] == "alike"
