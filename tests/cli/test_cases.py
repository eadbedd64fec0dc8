"""Commands on images that were read wrongly once (tests/data/cases), with what is right; and copied numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import rich_click as click
from click.testing import CliRunner, Result
from hypothesis import given, strategies as st

from pgemu.cli import main
from pgemu.cli._options import number
from pgemu_kernels.formats.page_format import x86_64
from trees import Tree, core, write

pytestmark = pytest.mark.same_with_checks

CASES = Path(__file__).parents[1] / "data" / "cases"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


# --------------------------------------------------------------------------- numbers


def test_a_bare_number_is_hexadecimal() -> None:
    image = str(CASES / "bare-hex-read-as-decimal.elf")
    for address in ("700000000000", "0x700000000000"):
        result = run("walk", image, "--root", "101bb6000", address)
        assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "0x700000000000")
        assert "physical 0x17bbf3000, page of 4K" in result.stdout
    shown = run("decode", "2424067", "2425063").stdout
    assert shown == run("decode", "0x2424067", "0x2425063").stdout
    assert shown.startswith("0x0000000002424067  x86-64 level 1 (4K): leaf, page 0x2424000\n")


@given(st.integers(0, (1 << 64) - 1), st.booleans(), st.sampled_from([0, 4]))
def test_a_number_is_the_same_however_it_is_copied(value: int, upper: bool, group: int) -> None:
    digits = f"{value:X}" if upper else f"{value:x}"
    forms = [digits, f"0x{digits}", digits.zfill(16), f"0x{digits.zfill(16)}"]
    if group:
        forms.append("_".join(digits.zfill(16)[i : i + group] for i in range(0, 16, group)))
    assert {number(form) for form in forms} == {value}


@given(st.text("0123456789abcdefxgh_-+ .", max_size=20))
def test_anything_else_is_refused(text: str) -> None:
    bare = text.removeprefix("0x").replace("_", "")
    try:
        value = number(text)
    except click.BadParameter as error:
        assert "expected a number of 64 bits, in hexadecimal" in str(error)  # noqa: PT017
    else:
        assert value == int(bare, 16) < 1 << 64


# --------------------------------------------------------------------------- entries of the kernel


def test_a_page_that_the_direct_map_lacks_keeps_its_frame() -> None:
    image = str(CASES / "kernel-entry-not-present.elf")
    result = run("walk", image, "--root", "0x3bbc0000", "0xffff880142aca000")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "  not mapped: the PTE is kernel not present, page 0x142aca000"
    assert "swap" not in result.stdout
    shown = run("decode", "0x800ffffebd535062").stdout
    assert shown.startswith("0x800ffffebd535062  x86-64 level 1 (4K): kernel not present, page 0x142aca000\n")
    assert "swap" not in shown.lower()


# --------------------------------------------------------------------------- memory encryption


def encrypted_image(path: Path, bit: int, *, says_so: bool) -> Path:
    """A page at a user's and one at the vmemmap's address, tables and pages encrypted (SME)."""
    tree = Tree(x86_64(c_bit=bit))
    vmemmap, page = 0xFFFF_EA00_0000_0000, tree.memory.add(0x18030_1000)
    tree.memory.pages[page][:8] = [0x17_FFFF_C000_0000, 0, 0, 0, 0, 0, 0xFFFF_FFFF, 0]
    for address in (0x7F00_0000_0000, vmemmap + 64 * 0x1000):
        tree.map(address, page, 1, 0x8000_0000_0000_0063 | 1 << bit)
    info = f"NUMBER(sme_mask)={1 << bit if says_so else 0}\n".encode()
    info += b"\n" * (-len(info) % 4)
    note = struct.pack("<III", 11, len(info), 0) + b"VMCOREINFO\0\0" + info
    segments = [(address, words.tobytes(), 4096) for address, words in sorted(tree.memory.pages.items())]
    return write(path, core(segments, note=note))


@pytest.mark.parametrize("bit", [40, 47, 51])
def test_every_command_knows_of_sme(tmp_path: Path, bit: int) -> None:
    commands = (("walk", "7f0000000000"), ("dump",), ("page", "1000"))
    plain = encrypted_image(tmp_path / "plain", bit, says_so=False)
    said = encrypted_image(tmp_path / "said", bit, says_so=True)
    for command, *rest in commands:
        arguments = (*rest, "--root", "1000000", "--json")
        documents = [
            json.loads(run(command, str(image), *arguments, *option).stdout)
            for image, option in ((said, ()), (plain, ("--c-bit", str(bit))))
        ]
        for document in documents:
            assert document.pop("c_bit") == bit
            document.pop("image")
        assert documents[0] == documents[1]
    assert json.loads(run("walk", str(said), "7f0000000123", "--root", "1000000", "--json").stdout)["walks"][0][
        "physical"
    ] == hex(0x18030_1123)
    assert run("walk", str(plain), "7f0000000000", "--root", "1000000").exit_code == 1  # the tables lie nowhere
    shown = run("page", str(said), "1000", "--root", "1000000").stdout
    assert shown.startswith("PFN 0x1000: page, struct page 0xffffea0000040000 at physical 0x180301000\n")
    assert "ENC" in run("decode", hex(1 << bit | 0x1234067), "--c-bit", str(bit)).stdout


# --------------------------------------------------------------------------- widths of page->flags


def test_page_flags_of_another_configuration() -> None:
    arguments = (str(CASES / "page-flags-other-config.elf"), "0x123456", "--kernel", "6.18")
    shown = run("page", *arguments).stdout
    assert "zone 7?, node 3?\n" in shown
    assert "note: zone 7 is none of this configuration: other --flag-widths, or a --dump-page line?\n" in shown
    shown = run("page", *arguments, "--flag-widths", "node=6,zone=3,lastcpupid=11").stdout
    assert "zone 1 (DMA32), node 0\n" in shown
    line = "flags: 0xfff200000000a9(locked|uptodate|lru|waiters|node=0|zone=1|lastcpupid=0x7ff)"
    shown = run("page", *arguments, "--dump-page", line).stdout
    assert "zone 1? (DMA32), node 0?\n" in shown
    document = json.loads(run("page", *arguments, "--dump-page", line, "--json").stdout)
    assert (document["flag_widths"]["node"], document["flag_widths"]["last_cpupid"]) == (6, 11)
    assert document["doubtful"] == ["node", "zone"]
    assert (document["pages"][0]["node"], document["pages"][0]["zone"]) == (0, 1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--flag-widths", "node=60"), "--flag-widths: node of 60 bits: expected at most 39"),
        (("--flag-widths", "nodes"), "--flag-widths: 'nodes': expected widths like node=6,zone=3,lastcpupid=17"),
        (("--dump-page", "lru"), "--dump-page: 'lru': expected a line like 'flags: 0x17ffff...(lru|node=0|zone=2)'"),
        (("--dump-page", "x", "--flag-widths", "node=6"), "--flag-widths: expected either these or --dump-page"),
    ],
)
def test_widths_that_cannot_be_are_refused(options: tuple[str, ...], complaint: str) -> None:
    result = run("page", str(CASES / "page-flags-other-config.elf"), "0x123456", "--kernel", "6.18", *options)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"pgemu: {complaint}\n")
