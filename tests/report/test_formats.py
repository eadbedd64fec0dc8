"""A comparison as markdown, CSV and JSON, and two runs side by side."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest

from comparisons import mixed
from pgemu.experiments.metrics import METRICS
from pgemu.experiments.sensitivity import sensitivity
from pgemu.experiments.verdict import QUESTIONS, verdict
from pgemu.report.answers import answers_of
from pgemu.report.formats import document
from pgemu.report.two_columns import Row, render, rows

DESIGNS = mixed().to_json()["designs"]


def test_json_has_the_verdict_and_on_what_it_rests() -> None:
    found = json.loads(document(mixed(), sensitivity(mixed()), "json"))
    assert list(found["verdict"]) == list(QUESTIONS)
    assert found["verdict"]["memory"] | {"first": 0, "second": 0, "difference": 0} == {
        "question": "metadata, peak",
        "better": "pfnmap",
        "first": 0,
        "second": 0,
        "difference": 0,
        "unit": "bytes",
        "basis": "fact",
        "rests_on": [],
        "without": "",
    }
    assert {"rule": "uptodate-unzeroed", "alternative": "without", "then": "alike"} in found["verdict"]["broken"][
        "rests_on"
    ]
    assert found["sensitivity"]["complete"] is True
    assert {"rule": "pfnmap-zeroing", "alternative": "folio"} in found["sensitivity"]["tried"]
    assert found["sensitivity"]["untouched"]["overlap"] == "no workload with that parameter"
    without = json.loads(document(mixed(), None, "json"))
    assert "sensitivity" not in without
    assert set(without["verdict"]) == set(QUESTIONS)


def test_csv_has_plain_numbers() -> None:
    head, *lines = csv.reader(io.StringIO(document(mixed(), None, "csv")))
    assert head == ["key", "group", "quantity", "unit", "restructure", "pfnmap", "difference", "better", "basis"]
    assert {len(row) for row in lines} == {9}
    table = [row[:7] for row in lines if row[1] != "Answers"]
    assert all(row[7:] == ["", ""] for row in lines if row[1] != "Answers")
    for *_, first, second, difference in table:
        assert float(first) >= 0 <= float(second)
        assert difference == "" or float(difference) == float(second) - float(first)
    found = {row[2]: row[4:] for row in table}
    assert found["vmemmap restored"] == ["28672", "0", "-28672"]
    assert found["convert: -EAGAIN"] == ["1", "0", "-1"]
    assert len([row for row in table if row[2].endswith((", low", ", high"))]) == 2 * len(
        DESIGNS["pfnmap"]["operations"]
    )


def test_csv_has_a_key_in_every_row_that_plain_tools_find() -> None:
    text = document(mixed(), None, "csv")
    table = list(csv.DictReader(io.StringIO(text)))
    keys = [row["key"] for row in table]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[\w.>=-]+", key) for key in keys)
    # The key stands before the first cell that may be quoted.
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == keys
    assert {"outcomes.convert.-EAGAIN", "estimate_ns.guest_fault.low", *(metric.key for metric in METRICS)} <= set(keys)


def test_csv_has_the_answers_of_the_verdict() -> None:
    known = answers_of(verdict(mixed(), None), ["restructure", "pfnmap"])
    table = {row["key"]: row for row in csv.DictReader(io.StringIO(document(mixed(), None, "csv")))}
    for key, answer in known.items():
        for end, name in enumerate((".low", ".high") if answer.unit == "ns" else ("",)):
            row = table.pop(f"answers.{key}{name}")
            values = answer.first, answer.second, answer.difference
            numbers = [value[end] if isinstance(value, tuple) else value for value in values]
            if answer.unit == "ns":  # the ends of the difference are no differences of the ends: rows of their own
                apart = table.pop(f"answers.{key}.difference{name}")
                assert [row["difference"], apart["restructure"], apart["pfnmap"]] == [""] * 3
                row["difference"] = apart["difference"]
            cells = [row[cell] for cell in ("restructure", "pfnmap", "difference")]
            assert [float(cell) if cell else None for cell in cells] == numbers
            assert (row["better"], row["basis"], row["unit"]) == (answer.said, answer.basis, answer.unit)
            assert row["quantity"].startswith(answer.question)
    assert not [key for key in table if key.startswith("answers.")]
    alone = csv.DictReader(io.StringIO(document(replace(mixed(), runs=mixed().runs[:1]), None, "csv")))
    assert alone.fieldnames == ["key", "group", "quantity", "unit", "restructure"]


def test_markdown_is_one_table_under_the_first_screen() -> None:
    text = document(mixed(), None, "markdown")
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {6}
    assert table[0] == "| | restructure | pfnmap | difference | change |"
    assert "| vmemmap restored | 28 KiB | 0 | -28 KiB | -100% |" in table
    assert any(line.startswith("    conversions, time") for line in lines)
    assert "\n\n| | restructure" in text


def test_text_of_two_runs_is_no_wider_than_a_mail() -> None:
    text = render(rows(DESIGNS["restructure"], DESIGNS["pfnmap"]), ("restructure", "pfnmap"))
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    for metric in METRICS:
        assert any(f"{line} ".startswith(f"  {metric.label} ") for line in text.splitlines())
    assert any(line.split() == ["convert:", "ok", "2", "3", "+1", "+50%"] for line in text.splitlines())


@pytest.mark.parametrize(
    ("first", "second", "cells"),
    [
        (0, 7, ["0", "7", "+7", "new"]),
        (8, 2, ["8", "2", "-6", "-75%"]),
        (3, 3, ["3", "3", "0"]),
        ((20.0, 40.0), (900.0, 1200.0), ["20-40", "ns", "0.90-1.2", "us"]),
    ],
)
def test_differences_and_changes(first: float, second: float, cells: list[str]) -> None:
    text = render([Row("Group", "thing", "ns" if isinstance(first, tuple) else "count", first, second)], ("A", "B"))
    assert text.splitlines()[-1].split() == ["thing", *cells]


def test_the_largest_values_keep_to_the_width() -> None:
    wide = [
        Row("Kernel time, an estimate", "host fault of a long name", "ns", (1.234e3, 9.99e12), (1.234e3, 9.99e12)),
        Row("Memory", "a quantity of thirty characters", "bytes", 1023 << 50, 1 << 20),
        Row("Counts", "operations: VM_FAULT_SIGBUS_LONG", "count", 10**12, 1),
    ]
    lines = render(wide, ("restructure", "restructure")).splitlines()
    assert max(map(len, lines)) <= 80
    assert "  operations: VM_FAULT_SIGBUS_LONG" in lines  # the numbers follow in the next line
    assert ["1.2", "us-10,000", "s", "1.2", "us-10,000", "s"] in [line.split()[-6:] for line in lines]
