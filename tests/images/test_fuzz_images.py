"""Damaged images: every command ends in bounded steps with 0, 1 or 2, and with 2 says why in one line."""

from __future__ import annotations

import io
import json
import struct
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzzing import Random, attacked, mutated, rounds
from pgemu.cli import main
from pgemu.images.image import Image
from pgemu_kernels.formats.page_format import FORMATS, x86_64
from pgemu_kernels.formats.struct_page import RELEASES
from trees import PAGE, Array, Tree, core

pytestmark = pytest.mark.same_with_checks

VMEMMAP = 0xFFFF_EA00_0000_0000
VA = 0x7F00_0000_0000
HEAD = 0x1_0200
MOST_READS = 300_000
ALL = (1 << 64) - 1


def note(name: bytes, data: bytes) -> bytes:
    return struct.pack("<III", len(name), len(data), 0) + name.ljust(len(name) + 3 & ~3, b"\0") + data.ljust(
        len(data) + 3 & ~3, b"\0"
    )  # fmt: skip


def kernel_image(mask: bool) -> Tree:
    """A vmemmap with a HugeTLB folio of 2M with poisoned pages, and a process's pages beside it."""
    tree = Tree(x86_64())
    frame, heap = tree.memory.add(0x200_0000), tree.memory.add(0x200_1000)
    info = ALL << 15 & ALL | 1 if mask else VMEMMAP + 64 * HEAD | 1
    tails = [[0, info, 0, 0xFFFF_8880_0000_0010, 0, 0, 0xFFFF_FFFF, 512] for _ in range(1, 64)]
    tails[0][0] = 9 | 1 << 8
    tails[0][2] = 9 << 8
    tails[2][5] = tails[1][5] = 0xFFFF_8880_0000_0010  # the list of poisoned pages of 6.12 and of 7.3
    head = [0x10058, 0, 0, 0xFFFF_8881_803F_8980, 0x200, 0x12, 513 << 32 | 0xF400_0000, 0]
    head[0] |= 1 << 6
    tree.memory.pages[frame][:] = [word for row in (head, *tails) for word in row]
    tree.memory.pages[heap][2:4] = [0xFFFF_8880_0000_0040, VMEMMAP + 64 * (HEAD + 3)]
    tree.memory.pages[heap][8:10] = [0, VMEMMAP + 64 * (HEAD + 9)]
    for i in range(8):
        tree.map(VMEMMAP + 64 * HEAD + PAGE * i, frame, 1)
    tree.map(0xFFFF_8880_0000_0000, heap, 1)
    for i in range(3):
        tree.map(VA + PAGE * i, (1 << 30) + i * PAGE, 1, 0x8000_0000_0000_0867)
    tree.map(VA + (2 << 20), 3 << 30, 2, 0xE7)
    return tree


def samples() -> list[bytes]:
    """Cores with the notes of all who write them, and raw memory."""
    roots = b"kernel x86-64 0x1000000\nprocess:0 x86-64 0x1000000\n"
    cpu = struct.pack("<II18Q", 1, 432, *range(18)) + bytes(10 * 24) + struct.pack("<5Q", 0, 0, 0, 0x100_0000, 0x6F0)
    info = b"SYMBOL(init_top_pgt)=ffffffff81000000\nNUMBER(phys_base)=0\nNUMBER(sme_mask)=0\n"
    found = []
    for mask, notes in ((True, note(b"pgemu\0", roots)), (False, note(b"QEMU\0", cpu) + note(b"VMCOREINFO\0", info))):
        pages = sorted(kernel_image(mask).memory.pages.items())
        found.append(core([(at, words.tobytes(), PAGE) for at, words in pages], note=notes))
        found.append(core([(at, words.tobytes(), 2 * PAGE) for at, words in pages], note=notes, many=True))
    for name in FORMATS:
        fmt = FORMATS[name]()
        tree = Tree(fmt)
        for i in range(4):
            tree.map(0x40_0000 + i * PAGE, (1 << 30) + i * PAGE, 1)
        pages = sorted(tree.memory.pages.items())
        found.append(
            core(
                [(at, words.tobytes(), PAGE) for at, words in pages],
                note=note(b"pgemu\0", f"vm:0 {name} 0x1000000\n".encode()),
            )
        )
    found.append(bytes(PAGE) + np.arange(512, dtype=np.uint64).tobytes() * 3)
    return found


def loops(chance: Random, data: bytes) -> bytes:
    """Entries that point at tables: at their own, at the root's, at the next page's."""
    words = bytearray(data)
    for _ in range(chance.randint(1, 40)):
        at = chance.randrange(min(1024, len(words) // 2 & ~7), len(words) - 8, 8)  # behind the headers
        target = 0x100_0000 + PAGE * chance.randrange(8)
        entry = (target | chance.choice((0x67, 0x7, 0x3, 0x8000_0000_0000_0063))).to_bytes(8, "little")
        piece = entry * min(chance.choice((1, 1, 1, 64, 512)), (len(words) - at) // 8)
        words[at : at + len(piece)] = piece
    return bytes(words)


def command(chance: Random, path: Path) -> list[str]:
    """A command over an image."""
    names = ("kernel", "process:0", "cpu:0", "vm:0", "0", f"{chance.getrandbits(64):x}")
    where = ["--root", "1000000" if chance.random() < 0.8 else chance.choice(names)]
    form = ["--format", chance.choice(sorted(FORMATS))] if chance.random() < 0.3 else []
    as_json = ["--json"] if chance.random() < 0.5 else []
    addresses = [VA, VA + (2 << 20), VMEMMAP + 64 * HEAD, 0x40_0000, chance.getrandbits(64), chance.getrandbits(47)]
    match chance.randrange(3):
        case 0:
            return ["dump", str(path), *where, *form, *as_json]
        case 1:
            return ["walk", str(path), *where, *form, *as_json, *(f"{at:x}" for at in chance.sample(addresses, 3))]
    numbers = [HEAD, HEAD + 1, HEAD + 70, chance.getrandbits(30), 0]
    kernel = ["--kernel", chance.choice(RELEASES), "--configuration", chance.choice(("debian", "small"))]
    where = where if chance.random() < 0.8 else []
    return ["page", str(path), *kernel, *where, *as_json, *(f"{number:x}" for number in numbers)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often an image was read."""
    count = [0]
    for name in ("words", "holds", "load"):
        plain = getattr(Image, name)

        def counted(self: Image, *arguments: Any, plain: Any = plain) -> Array:
            count[0] += 1
            found: Array = plain(self, *arguments)
            return found

        monkeypatch.setattr(Image, name, counted)
    return count


def test_damaged_images(tmp_path: Path, reads: list[int]) -> None:
    path, good = tmp_path / "image", samples()
    statuses = [0, 0, 0]
    for number, chance in rounds("images"):
        data = chance.choice(good)
        if chance.random() < 0.5:
            data = loops(chance, data)
        if chance.random() < 0.8:
            whole = len(data)
            data = mutated(chance, data, good, chance.choice((None, None, None, 64, 1024)))
            if chance.random() < 0.8:  # so that not all are refused as cut off
                data = data[:whole].ljust(whole, b"\0")
        path.write_bytes(data)
        for arguments in (command(chance, path) for _ in range(3)):
            reads[0] = 0
            stdout, stderr = io.StringIO(), io.StringIO()
            with attacked(f"images {arguments}", number):
                with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
                    main(arguments, prog_name="pgemu")
                shown, said = stdout.getvalue(), stderr.getvalue()
                statuses[int(end.value.code or 0)] += 1
                assert reads[0] < MOST_READS
                assert shown.isascii()
                assert (shown + said).replace("\n", "").isprintable()
                assert all(line.startswith("pgemu: ") for line in said.splitlines())
                if end.value.code == 2:
                    assert shown == ""
                    assert said
                elif "--json" in arguments:
                    json.loads(shown)
    print("exit statuses 0, 1, 2:", *statuses)
    assert min(statuses) > 0
