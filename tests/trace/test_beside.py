"""Text around a log, and what mailers make of one: named with what helps, and never read as something else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from pgemu.errors import InputError
from pgemu.trace.forms import form_of
from pgemu.trace.readers.ftrace import _Parser

pytestmark = pytest.mark.same_with_checks

HEAD = "       CPU 0/KVM-4321    [002] ..... 50.000000: "
FAULT = f"{HEAD}kvm_page_fault: vcpu 0 rip 0xffff address 0x0000000003c43000 error_code 0x182"
EXIT = f"{HEAD}kvm_exit: vcpu 0 reason npf rip 0xffff info1 0x5 info2 0x6 intr_info 0x0 error_code 0x0"
HEADERS = ["# tracer: nop", "#", "cpus=8", ""]


def complaint(lines: list[str]) -> str:
    parser = _Parser("log")
    with pytest.raises(InputError) as caught:
        parser.feed("".join(f"{line}\n" for line in lines))
    return str(caught.value)


@given(
    lines=st.lists(st.sampled_from([*HEADERS, FAULT, EXIT]), min_size=1, max_size=8),
    mark=st.sampled_from(["> ", ">> ", "> > ", ">>> > "]), plain=st.integers(0, 3),
)  # fmt: skip
def test_quoted_lines_are_named_wherever_they_begin(lines: list[str], mark: str, plain: int) -> None:
    quoted = [f"{mark}{line}" for line in lines]
    found = complaint([FAULT] * plain + quoted)
    assert found.startswith(f"log:{plain + 1}: text quoted as in a mail: cut the marks off: sed -E 's/^(> ?)+//'")
    assert [re.sub("^(> ?)+", "", line).strip() for line in quoted] == [line.strip() for line in lines]


@given(line=st.sampled_from([FAULT, EXIT]), at=st.integers(0, 30), before=st.integers(0, 3), more=st.booleans())
def test_a_line_that_a_mailer_wrapped_is_named(line: str, at: int, before: int, more: bool) -> None:
    places = [match.start() for match in re.finditer(" (?=rip|address|error_code|info)", line)]
    place = places[at % len(places)]
    broken = [line[:place], line[place + 1 :]]
    found = complaint([FAULT] * before + broken + [FAULT] * (1 + more))
    assert re.match(rf"log:({before + 1}|{before + 2}): a line that was wrapped, as mailers do: join it", found), found


@given(
    text=st.lists(st.from_regex(r"[A-Za-z',.]{1,9}", fullmatch=True), min_size=2, max_size=7).map(" ".join),
    before=st.integers(0, 2), behind=st.integers(1, 2),
)  # fmt: skip
def test_prose_is_named_as_what_it_is(text: str, before: int, behind: int) -> None:
    if re.search("snip|trim|omit|elide|skip|cut", text, re.I) or form_of(text):  # "aa a" may be hex
        return
    found = complaint([FAULT] * before + [text] + [FAULT] * behind)
    assert found.startswith(f"log:{before + 1}: ")
    assert "cut off what stands before and behind the log" in found


@pytest.mark.parametrize(
    "mark", ["[snip]", "<snip>", "[...]", "...", "--- snip ---", "[ 12 lines snipped ]", "8< cut here >8", "(omitted)"]
)
def test_marks_of_what_was_cut_out_are_named(mark: str) -> None:
    for before in (0, 1):
        found = complaint([FAULT] * before + [mark, FAULT])
        assert found.startswith(f"log:{before + 1}: a mark that lines were cut out here: {mark!r}")


@given(st.integers(1, len(HEAD) - len("50.000000: ") - 1), st.sampled_from([FAULT, EXIT]))
def test_a_first_line_whose_beginning_is_missing_is_no_other_form(at: int, line: str) -> None:
    rest = line[at:]
    parser = _Parser("log")
    try:
        parser.feed(f"{rest}\n{FAULT}\n")
    except InputError as error:
        text = str(error)
        assert text.startswith("log:1: ")
        assert "tail -n +2" in text
        assert "perf script" not in text
    else:  # the rest still names a task
        assert parser.finish().events == 2


def test_a_table_as_text_is_named() -> None:
    for head in ("op,address,flags", '"op";"address"', "op\taddress\tflags"):
        assert "(CSV) without a header that names the column op: its columns" in complaint(
            [head, "guest_fault,1,write"]
        )
