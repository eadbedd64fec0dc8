"""Captured logs, replayed and compared line by line; and what is wrong in a log is found."""

from __future__ import annotations

import functools
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from pgemu.errors import InputError
from pgemu.experiments.verification.recording import Options
from pgemu.experiments.verification.run import Verification, document, verify

FOLDER = Path(os.environ.get("PGEMU_TRACES", Path(__file__).parents[1] / "data" / "traces"))
WHOLE = "PGEMU_TRACES" in os.environ
CHANGED, SET = "kvm_tdp_mmu_spte_changed", "kvm_mmu_set_spte"

# Lines of the longest logs; with PGEMU_TRACES all of them.
WITH_SLOTS = {
    "vm-convert-swprot": None,
    "vm-boot-microvm-hugetlb": None,
    "vm-boot-q35-migrate": None,
    "vm-boot-q35-4k": None if WHOLE else 60_000,
    "vm-boot-q35-thp": None if WHOLE else 60_000,
}
WITHOUT_SLOTS = ("ftrace-kvm", "ftrace-kvm-6.12", "ftrace-kvm-ept")


@functools.cache
def lines(name: str) -> tuple[str, ...]:
    suffix = ".ftrace.txt.xz" if name in WITH_SLOTS else ".txt.xz"
    with lzma.open(FOLDER / f"{name}{suffix}", "rt", encoding="utf-8", errors="surrogateescape") as file:
        return tuple(file)


def verified(path: Path, text: str | tuple[str, ...] | list[str], options: Options | None = None) -> Verification:
    path.write_text("".join(text), encoding="utf-8", errors="surrogateescape")
    return verify(path, options)


@functools.cache
def whole(name: str) -> tuple[Verification, Counter[str]]:
    """What a captured log gives, and how many lines of each event it has."""
    taken = lines(name)[: WITH_SLOTS.get(name)]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"pgemu-{os.getpid()}-{name}"
    try:
        return verified(path, taken), Counter(
            event for line in taken for event in (CHANGED, SET) if f" {event}: " in line
        )
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_every_entry_of_a_log_with_slots_agrees(name: str) -> None:
    found, counted = whole(name)
    assert {event: found.lines[event] for event in counted} == counted
    assert found.compared == counted
    assert found.differences == {}
    assert found.agreed == counted
    assert not found.refused


@pytest.mark.parametrize("name", WITHOUT_SLOTS)
def test_entries_of_a_log_without_slots_agree_or_have_a_reason(name: str) -> None:
    found, counted = whole(name)
    assert {event: found.lines[event] for event in counted} == counted
    assert sum(found.compared.values()) >= 0.95 * sum(counted.values())
    assert sum(found.agreed.values()) >= 0.95 * found.entries
    assert [cause for _, _, cause in found.differences if not cause] == []
    assert any("no slot lines" in said for said in found.said)


def test_what_was_inferred_is_said() -> None:
    found, _ = whole("vm-boot-q35-migrate")
    assert found.configuration["backing"] == ["thp"]
    assert found.inferred["the end of a VM"] == 1
    assert found.inferred["reads of a slot's dirty log"] == 1
    assert "memory behind the slots: thp (2M leaves; --backing)" in found.said
    ept, _ = whole("ftrace-kvm-ept")
    assert (ept.configuration["stage2"], ept.configuration["nx_huge_pages"]) == ("ept", True)
    old, _ = whole("ftrace-kvm-6.12")
    assert old.configuration["kernel"] == "6.12"


def test_without_inferred_inputs_they_are_missed(tmp_path: Path) -> None:
    name = "vm-convert-swprot"
    found = verified(tmp_path / "log", lines(name), Options(inferred_inputs=False))
    teardown = [line for line in lines(name) if "kvm-nx-lpage-re" in line and CHANGED in line]
    missed = whole(name)[0].agreed[CHANGED] - found.agreed[CHANGED]
    assert missed >= len(teardown) > 0
    assert found.differences == {(CHANGED, "not in the model", ""): missed}
    assert not found.inferred


def test_another_backing_than_the_recorded_one_disagrees(tmp_path: Path) -> None:
    text = lines("vm-convert-swprot")[:20_000]
    assert not verified(tmp_path / "log", text).differences
    found = verified(tmp_path / "log", text, Options(backing="4K"))
    assert found.differences
    assert {one.key[1] for one in found.first[:1]} == {2}  # the shared memory's leaves were of 2M


# --------------------------------------------------------------------------- one wrong line

Mutation = Callable[[str], str]


def at(name: str, pattern: str, nth: int) -> int:
    """Position of the nth line that has a pattern."""
    return [i for i, line in enumerate(lines(name)) if re.search(pattern, line)][nth]


def replaced(pattern: str, by: str) -> Mutation:
    return lambda line: re.sub(pattern, by, line, count=1)


MADE = r"kvm_tdp_mmu_spte_changed: as id 0 gfn \w+ level 1 old_spte 8000000000000000 new_spte \w+e67"
ZAPPED = r"level 1 old_spte \w+e67 new_spte 8000000000000000"
LARGE = r"level 2 old_spte 8000000000000000 new_spte \w+ee7"

CASES: dict[str, tuple[str, int, Mutation, str]] = {
    "level": (MADE, 300, replaced("level 1", "level 2"), "not in the model"),
    "flag": (MADE, 300, replaced("e67$", "e65"), "flags"),
    "flag of a large leaf": (LARGE, 0, replaced("ee7$", "ae7"), "flags"),
    "frame": (MADE, 300, replaced(r"(\w)e67$", "fffe67"), ""),
    "old value": (ZAPPED, 10, replaced(r"old_spte (\w+)e67", r"old_spte \1e65"), "old flags"),
    "old frame": (ZAPPED, 10, replaced(r"old_spte \w+e67", "old_spte 7770e67"), "old frame"),
    "missing zap": (ZAPPED, 10, lambda line: "", "not in the log"),
    "missing leaf": (MADE, 300, lambda line: "", "not in the log"),
    "twice": (ZAPPED, 10, lambda line: f"{line}\n{line}", "not in the model"),
    "zap to another value": (ZAPPED, 10, replaced("new_spte 8000000000000000", "new_spte 0"), "entry"),
    "address space": (MADE, 300, replaced("as id 0", "as id 1"), ""),
    "leaf": (r"kvm_mmu_set_spte: .* level 1", 300, replaced("e67", "e65"), "flags"),
    "leaf's level": (r"kvm_mmu_set_spte: .* level 1", 300, replaced("level 1", "level 3"), "not in the model"),
    "leaf's address": (r"kvm_mmu_set_spte: .* level 1", 300, replaced(r"at (\w+)", "at 77"), "address"),
    "missing set_spte": (r"kvm_mmu_set_spte: .* level 1", 300, lambda line: "", "not in the log"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_line_is_found(case: str, tmp_path: Path) -> None:
    pattern, nth, mutation, kind = CASES[case]
    name = "vm-convert-swprot"
    position = at(name, pattern, nth)
    text = list(lines(name)[: at(name, ZAPPED, 40)])
    line = text[position].rstrip("\n")
    text[position] = mutation(line) + "\n" if mutation(line) else ""
    assert text[position] != lines(name)[position]
    found = verified(tmp_path / "log", text)
    if case == "address space":  # which has no slots: it is not compared, and what it was of is missed
        assert found.left_out["lines of an address space without slots"] == 1
    else:
        near = [one for one in found.first if abs(one.line - position - 1) <= 2 or one.log is None]
        assert near
        assert kind in {one.kind for one in near} or not kind
    assert 0 < found.differing < 8


def test_the_last_zap_of_a_vm_is_missed(tmp_path: Path) -> None:
    name = "vm-boot-microvm-hugetlb"
    text = list(lines(name))
    del text[at(name, ZAPPED, -1)]
    found = verified(tmp_path / "log", text)
    assert found.differences == {(CHANGED, "not in the log", ""): 1}
    assert found.first[0].model is not None
    assert found.first[0].model[1] == 1 << 63


def test_a_flag_of_a_table_is_found(tmp_path: Path) -> None:
    name = "vm-boot-microvm-hugetlb"
    text = list(lines(name))
    position = at(name, r"level 2 old_spte 8000000000000000 new_spte \w+827", 1)
    text[position] = text[position].replace("827\n", "825\n")
    found = verified(tmp_path / "log", text)
    assert (CHANGED, "flags", "") in found.differences
    assert found.first[0].line == position + 1


# --------------------------------------------------------------------------- logs that are cut off, bad input


@settings(max_examples=8, deadline=None)
@given(share=st.floats(0.05, 1.0), name=st.sampled_from(["vm-convert-swprot", "vm-boot-q35-4k", "vm-boot-q35-migrate"]))
def test_a_log_that_ends_early_agrees_as_far_as_it_goes(
    share: float, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = lines(name)[:30_000]
    first = next(i for i, line in enumerate(text) if CHANGED in line)
    cut = first + 1 + int(share * (len(text) - first - 1))
    found = verified(tmp_path_factory.mktemp("cut") / "log", text[:cut])
    assert found.differences == {}


HEAD = " vmm-9 [000] ..... 1.00000"
FAULT = f"{HEAD}1: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
ENTRY = f"{HEAD}2: {CHANGED}: as id 0 gfn 0 level 4 old_spte 8000000000000000 new_spte 1000827\n"
SLOT = f"{HEAD}0: kvm_memslot: slot=0 flags=0x0 gpa=0x0 size=%#x hva=%#x\n"


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no {CHANGED} in it"):
        verified(tmp_path / "log", FAULT)
    with pytest.raises(InputError, match="no kvm_page_fault in it"):
        verified(tmp_path / "log", ENTRY)
    (tmp_path / "binary").write_bytes(b"PAR1\0\0")
    with pytest.raises(InputError, match="this is Parquet"):
        verify(tmp_path / "binary")


@pytest.mark.parametrize(("size", "hva"), [(0x1001, 0x7000), (0x1000, 0x7001), (0x1000, 1 << 63), (0, 0x7000)])
def test_slots_that_kvm_refuses_are_counted(size: int, hva: int, tmp_path: Path) -> None:
    found = verified(tmp_path / "log", SLOT % (size, hva) + FAULT + ENTRY)
    assert found.refused == {"memory slot, errno 22": 1}


def test_a_large_vm_of_which_little_is_used_needs_little(tmp_path: Path) -> None:
    found = verified(tmp_path / "log", SLOT % (1 << 42, 0x1000_0000) + FAULT + ENTRY)
    assert found.agreed[CHANGED] == 1


NUMBER = re.compile(r"(?<=[ =x])[0-9a-f]+(?=[ ,)]|$)")


@settings(max_examples=12, deadline=None)
@given(data=st.data(), name=st.sampled_from(["vm-boot-q35-4k", "ftrace-kvm-ept", "vm-boot-microvm-hugetlb"]))
def test_whatever_numbers_a_log_has(data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It is verified, or refused in one line."""
    first = next(i for i, line in enumerate(lines(name)) if CHANGED in line)
    text = list(lines(name)[: first + 600])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(max(first - 400, 0), len(text) - 1))
        head, colon, event = text[at].rstrip("\n").partition(": ")
        found = list(NUMBER.finditer(event))
        if not found:
            continue
        one = data.draw(st.sampled_from(found))
        number = data.draw(
            st.sampled_from(["0", "3", "f" * 16, "8" + "0" * 15]) | st.integers(0, 2**64).map("{:x}".format)
        )
        text[at] = f"{head}{colon}{event[: one.start()]}{number}{event[one.end() :]}\n"
    try:
        document(verified(tmp_path_factory.mktemp("numbers") / "log", text))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 (it may also be verified)


def test_the_document_adds_up() -> None:
    found, _ = whole("ftrace-kvm-ept")
    shown = document(found)
    assert shown["compared"] == shown["agreed"] + sum(one["entries"] for one in shown["differences"])
    assert shown["agreed"] == sum(event["agreed"] for event in shown["events"].values())
    assert len(shown["first"]) == len(found.first)
