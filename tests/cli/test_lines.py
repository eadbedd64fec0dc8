"""Lines on a narrow terminal: nothing is lost, and no number is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st

from pgemu import Config, Machine
from pgemu.cli import main
from pgemu.cli._lines import folded, terminal_width

WORDS = st.text("ab0|x", min_size=1, max_size=30)


@pytest.mark.same_with_checks
@given(st.lists(st.tuples(st.integers(0, 6), st.lists(WORDS, max_size=8)), max_size=4), st.integers(1, 120))
def test_folding_keeps_every_word_and_the_width_where_it_can(parts: list[tuple[int, list[str]]], width: int) -> None:
    lines = [" " * blanks + "  ".join(words) for blanks, words in parts]
    found = list(folded(lines, width))
    assert "".join("".join(found).split()) == "".join("".join(lines).split())
    for line in found:
        pieces = [piece for piece in line.replace("|", "| ").split() if piece]
        assert len(line) <= width or len(pieces) == 1
        assert not line.endswith(" ") or line in lines
    assert [line for line in lines if len(line) > width] or found == lines


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert list(folded(["x " * 200], terminal_width())) == ["x " * 200] or terminal_width()
    monkeypatch.setenv("COLUMNS", "40")
    assert terminal_width() == 40


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A guest_memfd page that a process and a VM map, in an image, and its PFN."""
    machine = Machine(Config("pfnmap", pool=4 << 20, page_size=2 << 20))
    gmem, process = machine.create_guest_memfd(4 << 20, shared=True), machine.create_process()
    vm = machine.create_vm(process)
    assert process.mmap(gmem, 0x7F00_0000_0000).status == vm.bind(gmem, 0).status == 0
    process.touch(0x7F00_0000_0000)
    vm.touch(0)
    path = tmp_path_factory.mktemp("image") / "m.elf"
    machine.write_image(path)
    pfn = gmem.pfn(0)
    assert pfn is not None
    return path, pfn


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", ["walk", "dump", "page", "scenario", "decode"])
def test_commands_fit_the_terminal_with_every_word(
    image: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    path, pfn = image
    arguments = {
        "walk": ["walk", str(path), "0x7f0000000000", "--root", "process:0"],
        "dump": ["dump", str(path), "--root", "vm:0"],
        "page": ["page", str(path), hex(pfn)],
        "scenario": ["scenario", "smallest-pfnmap"],
        "decode": ["decode", "0x8000000100000767", "0x8000000100000e67", "--format", "npt"],
    }[command]
    whole = CliRunner().invoke(main, arguments)
    assert whole.exit_code == 0, whole.output
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = CliRunner().invoke(main, arguments).stdout
    assert "".join(narrow.split()) == "".join(whole.stdout.split())
    numbers = {word for word in whole.stdout.replace("|", " ").split() if word.startswith("0x")}
    assert numbers <= set(narrow.replace("|", " ").split())
    assert max(map(len, narrow.splitlines())) <= columns
