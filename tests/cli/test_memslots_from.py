"""`--memslots-from`: memory slots of QEMU's info mtree beside a trace that has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgemu.cli import main
from pgemu.trace import load

pytestmark = pytest.mark.same_with_checks

FLAT = Path(__file__).parents[1] / "data" / "qemu" / "mtree-flat-q35.txt"
LINE = " CPU 0/KVM-9 [000] ..... 1.00000{}: kvm_page_fault: vcpu 0 rip 0x0 address {:#x} error_code 0x100000006\n"


def convert(folder: Path, *options: str, addresses: tuple[int, ...] = (0x100000, 0xFED00000, 0xC3000)) -> Result:
    path = folder / "log"
    path.write_text("".join(LINE.format(number, address) for number, address in enumerate(addresses)))
    return CliRunner().invoke(main, ["trace", "convert", str(path), "-o", str(folder / "out"), *options])


def test_slots_are_taken_and_the_rest_is_said(tmp_path: Path) -> None:
    found = convert(tmp_path, "--memslots-from", str(FLAT))
    assert found.exit_code == 0, found.output
    expected = f"pgemu: --memslots-from {FLAT}: 5 memory slots; left out: 6 device, 1 read-only memory slot\n"
    assert found.stderr == expected
    lowered = load(tmp_path / "out")
    assert lowered.layout.origin == "given"
    assert [(slot.gpa, slot.size) for slot in lowered.layout.slots][-1] == (0x100000, 511 << 20)
    assert lowered.accounting.without_operation == {"not guest memory: device": 1}


@pytest.mark.parametrize(
    ("options", "addresses", "expected"),
    [
        (("--memslots-from", str(FLAT), "--memslot", "0:4K"), (0,), "--memslots-from: expected no --memslot beside it"),
        (
            ("--memslots-from", str(FLAT)),
            (0x50000000,),
            "guest fault at 0x50000000 lies outside the given memory slots",
        ),
        (("--memslots-from", "nothing"), (0,), "nothing: no such file"),
        (("--memslots-from", __file__), (0,), "no address space of memory in it, expected what QEMU's monitor prints"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: tuple[str, ...], addresses: tuple[int, ...], expected: str) -> None:
    found = convert(tmp_path, *options, addresses=addresses)
    assert found.exit_code == 2
    assert expected in found.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
