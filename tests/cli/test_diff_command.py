"""`pgemu diff`: two documents of compare side by side; `pgemu compare --vary`: several in one table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, strategies as st

from announcement import complaints
from comparisons import lowered, mixed, mixed_records
from pgemu.cli import main
from pgemu.experiments.compare import Comparison, compare
from pgemu.experiments.sensitivity import sensitivity
from pgemu.experiments.verdict import QUESTIONS, Kind
from pgemu.machine.presets import Versions
from pgemu.report import document
from pgemu.report.answers import Answer, Rest, row

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
    return written(tmp_path, mixed(), other)


def written(folder: Path, one: Comparison, other: Comparison) -> tuple[str, str]:
    """Two comparisons as documents of `--format json`, with what sensitivity() found."""
    for name, comparison in (("a.json", one), ("b.json", other)):
        found = sensitivity(comparison) if len(comparison.runs) > 1 else None
        (folder / name).write_text(document(comparison, found, "json"))
    return str(folder / "a.json"), str(folder / "b.json")


def section(text: str, title: str) -> list[str]:
    """The lines below a title, up to the next blank line behind them."""
    lines = text.splitlines()
    start = lines.index(title) + 2
    return lines[start : lines.index("", start)]


def test_text_has_what_differs_design_by_design(documents: tuple[str, str]) -> None:
    result = invoke("diff", *documents)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "A: made by hand, restructure dec2025, pfnmap corrected, sw VM, 2M pages, Linux",
        "  6.18",
    ]
    assert "restructure" in lines
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
    assert section(result.stdout, "Configuration") == ["A and B are configured alike"]
    assert "turns from" not in result.stdout


def test_what_is_configured_otherwise_is_said_once(documents: tuple[str, str]) -> None:
    """rfc2 differs from dec2025 in its order, batch, split form, holes and defects; the kernel was given by hand."""
    said = section(invoke("diff", *documents).stdout, "Configuration")
    assert [line.split() for line in said[2:]] == [
        ["like", "dec2025", "rfc2"],
        ["check", "every", "end"],
        ["kernel", "6.18", "7.3"],
        ["restructure:", "split_form", "jan2026", "rfc2"],
        ["restructure:", "order", "fixup", "rfc2"],
        ["restructure:", "batch", "block", "range"],
        ["restructure:", "defects"],
        ["A", "uptodate-unzeroed"],
        ["B", "convert-keeps-leaves,", "hole-zeroes-from-start,", "merge-keeps-flag"],
        ["punch", "refuse", "zero"],
    ]


def test_every_answer_of_both_is_shown_as_compare_shows_it(documents: tuple[str, str]) -> None:
    """And what became of it is what both say."""
    said = section(invoke("diff", *documents).stdout, "Who is better at what")
    verdicts = [json.loads(Path(path).read_text())["verdict"] for path in documents]
    assert len(said) == 2 + 3 * len(QUESTIONS)
    for number, question in enumerate(QUESTIONS.values()):
        title, *rows = said[2 + 3 * number : 5 + 3 * number]
        answers = [Answer.from_json(found[list(QUESTIONS)[number]]) for found in verdicts]
        assert title.startswith(f"{question.text}: ")
        for name, line, answer in zip("AB", rows, answers, strict=True):
            assert line == row(f"  {name}", *answer.cells)
        one, other = (answer.said for answer in answers)
        assert (f"turns from {one} to {other}" in title) == (one != other)
        assert (title.endswith(("stays better", "in both"))) == (one == other)
    # The mixed trace reads what dec2025 did not zero; rfc2 zeroes whole folios.
    assert "broken: turns from neither to alike" in said


def test_runs_of_other_traces_and_designs_the_other_way_round_answer_the_same(tmp_path: Path) -> None:
    one = compare(lowered(mixed_records()), designs=("restructure", "pfnmap"))
    other = compare(lowered(mixed_records(), source="another"), designs=("pfnmap", "restructure"))
    text = invoke("diff", *written(tmp_path, one, other)).stdout
    assert [line.split() for line in section(text, "Configuration")[2:]] == [["trace", "made", "by", "hand", "another"]]
    rows = section(text, "Who is better at what")[2:]
    assert [line[3:] for line in rows[1::3]] == [line[3:] for line in rows[2::3]]
    assert not any("turns from" in line for line in rows)


def test_a_quantity_that_another_version_does_not_count_is_named(documents: tuple[str, str]) -> None:
    older = json.loads(Path(documents[1]).read_text())
    for design in older["designs"].values():
        del design["state"]["vmemmap_restored"]
    older["pgemu"] = "0.0.1"
    Path(documents[1]).write_text(json.dumps(older))
    result = invoke("diff", *documents)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert said.count("B was counted by another version of pgemu, without Memory for struct pages: vmemmap rest") == 2
    assert ["pgemu", "0.0.1"] in [line.split()[::2] for line in section(result.stdout, "Configuration")]


def test_one_design_alone_has_no_answers_and_all_else(tmp_path: Path) -> None:
    alone = compare(lowered(mixed_records()), designs=("pfnmap",))
    text = invoke("diff", *written(tmp_path, mixed(), alone)).stdout
    assert "no answers beside each other: B has no verdict: it is of one design" in text
    assert [line for line in text.splitlines() if line in ("pfnmap", "restructure")] == ["pfnmap"]


@given(
    st.sampled_from(["ns", "bytes", "count", "share"]),
    st.lists(st.integers(0, 10**15), min_size=6, max_size=6),  # of picoseconds
    st.sampled_from(["restructure", "pfnmap", "alike", None]),
    st.sampled_from(get_args(Kind)),
)
def test_an_answer_is_the_same_after_json_and_after_two_swaps(
    unit: str, numbers: list[float], better: str | None, basis: str
) -> None:
    values: list[Any] = numbers[:3]
    if unit == "ns":
        values = [tuple(sorted(n / 1000 for n in numbers[i : i + 2])) for i in (0, 2, 4)]
    answer = Answer("question", better, *values, unit, basis, (Rest("rule", "other", "alike"),))
    back = Answer.from_json(json.loads(json.dumps(answer.to_json())))
    assert back == (answer._replace(better="neither") if basis == "defect" else answer)
    assert (back.said, back.by) == (answer.said, answer.by)
    assert answer.swapped().swapped() == answer
    assert answer.swapped().cells[1::-1] == answer.cells[:2]
    assert answer.swapped().cells[2:] == answer.cells[2:]
    line, widths = row("leaves >= 2M, end", *answer.cells), [len(cell) for cell in answer.cells]
    if max(widths[:2]) <= 12 and widths[3] <= 13:
        assert len(line) <= 80
    assert line.split() == " ".join(("leaves >= 2M, end", *answer.cells)).split()


def test_csv_and_markdown(documents: tuple[str, str]) -> None:
    table = list(csv.DictReader(io.StringIO(invoke("diff", *documents, "--format", "csv").stdout)))
    zeroed = next(row for row in table if row["group"] == "restructure: Zeroed" and row["quantity"] == "whole folios")
    assert (zeroed["unit"], zeroed["A"], zeroed["B"], zeroed["difference"]) == ("bytes", "0", "2097152", "2097152")
    assert {row["group"] for row in table} >= {"configuration", "better", "by", "basis", "restructure: Zeroed"}
    assert len({tuple(row) for row in table}) == 1
    assert [row["A"] for row in table if row["group"] == "configuration"][:3] == ["dec2025", "every", "6.18"]
    assert len({row["key"] for row in table}) == len(table)
    (broken,) = (row for row in table if (row["group"], row["quantity"]) == ("better", "broken"))
    assert (broken["A"], broken["B"], broken["difference"]) == ("neither", "alike", "turns from neither to alike")
    text = invoke("diff", *documents, "--format", "markdown").stdout
    assert text.startswith("A: made by hand, restructure dec2025, ")
    assert "## restructure\n\n| | A | B |" in text
    assert text.count("```text") == 2
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
        ('{"designs": {"pfnmap": {}}, "versions": {}, "machines": {}, "trace": {"source": ""}}', "of this version"),
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
    size = () if any(one.startswith("page-size=") for one in args) else ("--page-size", "2M")
    result = invoke("compare", log, *size, *args)
    assert result.exit_code == 0, result.output
    assert complaints(result.stderr) == ""
    return result.stdout


def test_every_combination_is_one_row_in_order(log: str) -> None:
    options = ("--vary", "like=rfc2,dec2025", "--vary", "page-size=2M,1G", "--format")
    found = json.loads(varied(log, *options, "json"))
    combinations = [("rfc2", "2M"), ("rfc2", "1G"), ("dec2025", "2M"), ("dec2025", "1G")]
    assert [tuple(row["options"].values()) for row in found] == combinations
    assert all(list(row["verdict"]) == list(QUESTIONS) for row in found)
    assert all(row["designs"] == ["restructure", "pfnmap"] for row in found)
    # 4095 pages of vmemmap instead of 7 where the page is of 1G.
    memory = [row["verdict"]["memory"] for row in found]
    assert memory[1]["first"] - memory[0]["first"] > 4000 * 4096
    for answer in memory:
        assert answer["difference"] == answer["second"] - answer["first"]
        assert (answer["better"], answer["basis"]) == ("pfnmap", "fact")
    table = list(csv.DictReader(io.StringIO(varied(log, *options, "csv"))))
    assert [(row["like"], row["page-size"]) for row in table] == [one for one in combinations for _ in QUESTIONS]
    for line, data in zip(table, (one for run in found for one in run["verdict"].values()), strict=True):
        answer = Answer.from_json(data)
        low, high = answer.first if isinstance(answer.first, tuple) else (answer.first, answer.first)
        assert [float(line[f"restructure_{end}"] or "nan") for end in ("low", "high")] == pytest.approx(
            [float("nan") if end is None else end for end in (low, high)], rel=0, abs=0, nan_ok=True
        )
        assert (line["better"], line["basis"], line["question"]) == (answer.said, answer.basis, answer.named)
        assert QUESTIONS[line["key"]].text == line["question"].removesuffix(" (slot-reach)")
    markdown = varied(log, *options, "markdown").splitlines()
    assert markdown[0] == "| like | page-size | question | restructure | pfnmap | better | by | basis |"
    assert len(markdown) == 2 + len(table)
    lines = varied(log, *options, "text").splitlines()
    at = lines.index("")
    assert lines[0] == "small.txt: 4 combinations of like, page-size"
    assert lines[1:at] == [
        "pfnmap corrected (slides, mended)",
        "both: sw VM, memory private at first, 1 vCPU, Linux 6.18 (assumed: NPT)",
    ]
    assert lines[at + 1].split() == ["restructure", "pfnmap", "better", "by", "basis"]
    assert lines[at + 3] == "like rfc2, page-size 2M"
    assert max(map(len, lines)) <= 80
    for question, data in found[0]["verdict"].items():
        assert row(QUESTIONS[question].text, *Answer.from_json(data).cells) in lines


def test_a_sweep_without_alternatives_says_that_nothing_was_tried(log: str) -> None:
    (row,) = json.loads(varied(log, "--vary", "like=rfc2", "--no-sensitivity", "--format", "json"))
    assert row["verdict"]["memory"]["basis"] == "untested"


def test_a_combination_that_is_none_is_said_in_every_form(log: str) -> None:
    options = ("--vary", "like=rfc2,next", "--format")
    why = "pages of 2M: next knows pages of 4K only"
    assert [row["not_run"] for row in json.loads(varied(log, *options, "json"))] == [None, why]
    assert list(csv.DictReader(io.StringIO(varied(log, *options, "csv"))))[-1]["not_run"] == why
    assert f"| next | not run: {why} |" in varied(log, *options, "markdown")
    assert f"like next\n  not run: {why}\n" in varied(log, *options, "text")


def test_an_option_that_may_be_repeated_varies_one_value_at_a_time(log: str) -> None:
    found = json.loads(varied(log, "--vary", "defect=merge-keeps-flag,rollback-at-zero", "--format", "json"))
    assert [row["options"]["defect"] for row in found] == ["merge-keeps-flag", "rollback-at-zero"]


def test_a_varied_value_is_the_one_of_the_option(log: str) -> None:
    (row,) = json.loads(varied(log, "--vary", "order=jan2026", "--format", "json"))
    assert row["options"] == {"order": "jan2026"}
    assert row["verdict"]["refused"]["better"] == "alike"
