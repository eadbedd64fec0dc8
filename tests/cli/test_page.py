"""pgemu page: what it prints of struct pages in an image, and what it says of a bad one."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pgemu.cli import main
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import x86_64
from trees import Tree, core, write

VMEMMAP = 0xFFFF_EA00_0000_0000
HEAD = 0x180400
DEBIAN = 0x17_FFFF_C000_0000
UNMAPPED = 0xFFFF_FFFF
ALL = (1 << 64) - 1
TAIL = 0xDEAD_0000_0000_0400
READ_WRITE, READ_ONLY = 0x8000_0000_0000_0163, 0x8000_0000_0000_0121
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit status, stdout, stderr)."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(
                ["page", *(hex(argument) if isinstance(argument, int) else str(argument) for argument in arguments)],
                prog_name="pgemu",
            )
        return (int(end.value.code or 0), *capsys.readouterr())

    return run_it


def rows(kernel: str) -> list[list[int]]:
    """The first 64 struct pages of a 2M page of a file, mapped once, as 7.3.4 and 6.18.15 have them."""
    info = ALL << 15 & ALL | 1 if kernel == "7.3" else VMEMMAP + 64 * HEAD | 1
    page = VMEMMAP + 64 * HEAD
    head = [
        DEBIAN | 0x58, 0xFFFF_FFFF_8215_3A40, page + 512 * 64 + 8, 0xFFFF_8881_803F_8980, 0x200, 0x12,
        513 << 32 | 0xF400_0000, 0,
    ]  # fmt: skip
    second = [DEBIAN | 9, info, 0, 0, ALL, 0, UNMAPPED, 512]
    third = [DEBIAN, info, page + 0x90, page + 0x90, 0, 0, UNMAPPED, 0]
    fourth = [DEBIAN, info, 0, 0xFFFF_8881_8031_5000, 0, 0, UNMAPPED, 0]
    tails = [[DEBIAN, info, page + 64 * i + 8, TAIL, 0, 0, UNMAPPED, 0] for i in range(4, 64)]
    return [head, second, third, fourth, *tails]


def image(path: Path, kernel: str, root: str = "cpu:0") -> Path:
    """A core with those struct pages, optimised, and a page of slab behind them."""
    tree = Tree(x86_64())
    own, shared, other = (tree.memory.add(address) for address in (0x18030_1000, 0x18028_3000, 0x18028_4000))
    tree.memory.pages[own][:] = [word for row in rows(kernel) for word in row]
    if kernel == "7.3":
        info = ALL << 15 & ALL | 1
        tree.memory.pages[shared][:] = [DEBIAN & 7 << 51, info, 0, TAIL, 0, 0, UNMAPPED, 0] * 64
    else:
        shared = own
    start = VMEMMAP + 64 * HEAD
    for i in range(8):
        tree.map(start + 4096 * i, shared if i else own, 1, READ_ONLY if i else READ_WRITE)
    tree.map(start + 4096 * 8, other, 1, READ_WRITE)
    tree.memory.pages[other][:8] = [
        DEBIAN,
        0xFFFF_8881_0001_0000,
        0,
        0,
        0xFFFF_8881_0200_0000,
        0x10_0010,
        0xF500_0000,
        0,
    ]
    text = f"{root} x86-64 {tree.root:#x}\n".encode()
    text += b"\n" * (-len(text) % 4)
    note = struct.pack("<III", 6, len(text), 0x706765) + b"pgemu\0\0\0" + text
    segments = [(address, words.tobytes(), 4096) for address, words in sorted(tree.memory.pages.items())]
    return write(path, core(segments, note=note))


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    return image(tmp_path / "core", "7.3")


FOLIO = """\
  folio 0x180400: order 9 (2M), 512 pages, hugetlb
  refcount 513, expected 513, pincount 0
  mapcount 1, of the whole 1, mm ids none
  hugetlb migratable|vmemmap_optimized, cgroup 0xffff888180315000 (direct map, physical 0x180315000)
  vmemmap
    0xffffea0006010000      1 page  0x8000000180301163  read-write  frame 0x180301
    0xffffea0006011000     7 pages  0x8000000180283121  read-only   frame 0x180283, shared
"""
HEAD_TEXT = """\
PFN 0x180400: head, struct page 0xffffea0006010000 at physical 0x180301000
  +0x00  flags                  0x0017ffffc0000058  uptodate|dirty|head, zone 2 (Normal), node 0
  +0x08  lru.next               0xffffffff82153a40  kernel image
  +0x10  lru.prev               0xffffea0006018008  struct page of PFN 0x180600 + 0x8
  +0x18  mapping                0xffff8881803f8980  address_space, direct map, physical 0x1803f8980
  +0x20  index                  0x0000000000000200
  +0x28  private                0x0000000000000012  migratable|vmemmap_optimized
  +0x30  page_type                      0xf4000000  hugetlb
  +0x34  _refcount                      0x00000201  513
  +0x38  memcg_data             0x0000000000000000
"""


def test_a_head_is_named_word_by_word(run: Run, debian: Path) -> None:
    assert run(debian, hex(HEAD)) == (0, HEAD_TEXT + FOLIO, "")


def test_tails_have_the_fields_of_the_folio(run: Run, debian: Path) -> None:
    """A number in the vmemmap is the address of a struct page."""
    status, shown, _ = run(debian, HEAD + 1, hex(VMEMMAP + 64 * (HEAD + 3)), HEAD + 100)
    second, fourth, shared = shown.split("\n\n")
    assert status == 0
    assert [block.count("  folio 0x180400: order 9 (2M), 512 pages, hugetlb\n") for block in (second, fourth)] == [1, 1]
    assert second.startswith("""\
PFN 0x180401: tail of 0x180400, struct page 0xffffea0006010040 at physical 0x180301040
  +0x00  _flags_1               0x0017ffffc0000009  order 9, zone 2 (Normal), node 0
  +0x08  _head_1                0xffffffffffff8001  tail of PFN 0x180400
  +0x10  _large_mapcount                0x00000000  1
  +0x14  _nr_pages_mapped               0x00000000  0
  +0x18  _entire_mapcount               0x00000000  1
  +0x1c  _pincount                      0x00000000  0
  +0x20  _mm_id_mapcount[0]             0xffffffff  0
""")
    assert (
        "  +0x38  _nr_pages                      0x00000200\n  +0x3c  (unused)                       0x00000000\n"
        in second
    )
    assert "  +0x18  _hugetlb_cgroup        0xffff888180315000  direct map, physical 0x180315000\n" in fourth
    assert shared == """\
PFN 0x180464: tail of 0x180400, struct page 0xffffea0006011900 at physical 0x180283900
  +0x00  flags                  0x0010000000000000  zone 2 (Normal), node 0
  +0x08  compound_info          0xffffffffffff8001  tail of PFN 0x180400
  +0x10  lru.prev               0x0000000000000000
  +0x18  mapping                0xdead000000000400  TAIL_MAPPING
  +0x20  index                  0x0000000000000000
  +0x28  private                0x0000000000000000
  +0x30  _mapcount                      0xffffffff  0
  +0x34  _refcount                      0x00000000  0
  +0x38  memcg_data             0x0000000000000000
""" + FOLIO  # fmt: skip


def test_fake_heads_are_seen_through(run: Run, tmp_path: Path) -> None:
    path = image(tmp_path / "core", "6.18", root="kernel")
    _, shown, _ = run(path, HEAD + 64, HEAD + 65, "--kernel", "6.18")
    fake, second = shown.split("\n\n")
    assert fake.startswith(
        "PFN 0x180440: tail of 0x180400 (shows 0x180400), struct page 0xffffea0006011000 at physical"
    )
    assert (
        "\n  +0x00  flags                  0x0017ffffc0000058  uptodate|dirty|head, zone 2 (Normal), node 0\n" in fake
    )
    assert "\n  +0x34  _refcount                      0x00000201  513\n" in fake
    assert "\n  folio 0x180400: order 9 (2M), 512 pages, hugetlb\n" in fake
    assert "\n    0xffffea0006010000      1 page  0x8000000180301163  read-write  frame 0x180301, shared\n" in fake
    assert second.startswith("PFN 0x180441: tail of 0x180400 (shows 0x180401), struct page")
    assert "\n  +0x00  _flags_1               0x0017ffffc0000009  order 9, zone 2 (Normal), node 0\n" in second
    assert "note" not in shown


@pytest.mark.parametrize(
    ("kernel", "flag", "type_"),
    [
        ("6.6", 1 << 8, UNMAPPED),
        ("6.8", 1 << 8, UNMAPPED),
        ("6.6", 0, UNMAPPED & ~0x800),
        ("6.8", 0, UNMAPPED & ~0x800),
    ],
)
def test_huge_pages_of_6_6_and_6_8(run: Run, tmp_path: Path, kernel: str, flag: int, type_: int) -> None:
    """HugeTLB's mark is a flag of the second struct page, in later point releases a page type."""
    tree = Tree(x86_64())
    frame, info = tree.memory.add(0x18030_1000), VMEMMAP + 64 * HEAD | 1
    head = [DEBIAN | 0x58, 0, 0, 0xFFFF_8881_803F_8980, 0x200, 0x2, 2 << 32 | type_, 0]
    second = [DEBIAN | 9 | flag, info, 0, 0, 512 << 32, 0, UNMAPPED, 0]
    third = [DEBIAN, info, 0, 0xFFFF_8881_8031_5000, 0, 0, UNMAPPED, 0]
    tails = [[DEBIAN, info, 0, TAIL, 0, 0, UNMAPPED, 0] for _ in range(3, 64)]
    tree.memory.pages[frame][:] = [word for row in (head, second, third, *tails) for word in row]
    for i in range(8):
        tree.map(VMEMMAP + 64 * HEAD + 4096 * i, frame, 1, READ_ONLY if i else READ_WRITE)
    segments = [(address, words.tobytes(), 4096) for address, words in sorted(tree.memory.pages.items())]
    path = write(tmp_path / "core", core(segments))
    status, shown, _ = run(path, HEAD, HEAD + 1, "--kernel", kernel, "--root", tree.root)
    assert status == 0
    first, other = shown.split("\n\n")
    assert "  folio 0x180400: order 9 (2M), 512 pages, hugetlb\n" in first
    assert "  mapcount 1, of the whole 1\n" in first
    cached = 1 if kernel == "6.6" else 512  # mm/filemap.c:__filemap_add_folio()
    assert f"  refcount 2, expected {cached + 1}" in first
    assert "hugetlb migratable, cgroup 0xffff888180315000" in first
    assert "  +0x18  _entire_mapcount               0x00000000  1\n" in other
    assert ("order 9, hugetlb" in other) == bool(flag)


def test_a_typed_page_is_no_folio(run: Run, debian: Path) -> None:
    status, shown, _ = run(debian, HEAD + 512)
    assert (status, shown) == (0, """\
PFN 0x180600: page, struct page 0xffffea0006018000 at physical 0x180284000
  +0x00  flags                  0x0017ffffc0000000  zone 2 (Normal), node 0
  +0x08  slab_cache             0xffff888100010000  direct map, physical 0x100010000
  +0x10  slab_list.next         0x0000000000000000
  +0x18  slab_list.prev         0x0000000000000000
  +0x20  freelist               0xffff888102000000  direct map, physical 0x102000000
  +0x28  counters               0x0000000000100010
  +0x30  page_type                      0xf5000000  slab
  +0x34  _refcount                      0x00000000  0
  +0x38  obj_exts               0x0000000000000000
  order 0, slab
""")  # fmt: skip


def test_what_does_not_fit_is_noted(run: Run, debian: Path, tmp_path: Path) -> None:
    _, shown, _ = run(debian, HEAD, "--kernel", "6.12")
    assert "  note: tails hold a mask, unlike those of 6.12: another --kernel?\n" in shown
    _, shown, _ = run(debian, HEAD, "--configuration", "small")
    assert "  note: flags 0x17ffffc0000000 have no name in this kernel\n" in shown
    assert "  note: zone DMA32 ends before this PFN: another --configuration or --flag-widths?\n" in shown
    _, shown, _ = run(image(tmp_path / "old", "6.18"), HEAD, "--json")
    assert json.loads(shown)["pages"][0]["notes"] == [
        "tails hold no mask, unlike those of 7.3: another --kernel?"
    ]  # fmt: skip


def test_json(run: Run, debian: Path) -> None:
    status, shown, _ = run(debian, HEAD, 5, "--json")
    document = json.loads(shown)
    assert status == 1
    assert (document["kernel"], document["configuration"], document["root"]) == ("7.3", "debian", "0x1000000")
    head, missing = document["pages"]
    assert missing == {"pfn": "0x5", "problem": "PFN 0x5: its struct page at 0xffffea0000000140 is not mapped"}
    assert (head["pfn"], head["kind"], head["type"], head["refcount"], head["mapcount"]) == (
        hex(HEAD), "head", "hugetlb", 513, None
    )  # fmt: skip
    assert (head["node"], head["zone"], head["zone_name"], head["last_cpupid"]) == (0, 2, "Normal", -1)
    assert head["words"] == [f"{word:#018x}" for word in rows("7.3")[0]]
    assert head["values"][5] == {
        "name": "private", "offset": 40, "size": 8, "value": "0x12", "meaning": "migratable|vmemmap_optimized"
    }  # fmt: skip
    folio = head["folio"]
    assert (folio["order"], folio["mapcount"], folio["expected_references"], folio["optimized"]) == (9, 1, 513, True)
    assert folio["mapping"] == {"kind": "address_space", "address": "0xffff8881803f8980"}
    assert folio["hugetlb"]["cgroup"] == "0xffff888180315000"
    assert folio["mm_ids"] == {"ids": [0, 0], "mapcounts": [0, 0], "locked": False, "shared": False}
    assert [(run["pages"], run["frame"], run["writable"], run["shared"]) for run in folio["vmemmap"]] == [
        (1, "0x180301", True, False), (7, "0x180283", False, True)
    ]  # fmt: skip


def test_a_machines_own_image(run: Run, tmp_path: Path) -> None:
    """The root has the name "kernel"; a vmemmap of 2M entries is one line."""
    machine = Machine(Config(pool=W.PAGE_1G, hvo=False, kernel="6.18"))
    machine.write_image(tmp_path / "core")
    base = machine.register(W.R_POOL_BASE)
    status, shown, _ = run(tmp_path / "core", base + 70_000)
    assert status == 0
    assert (status, shown, "") == run(tmp_path / "core", base + 70_000, "--kernel", "6.18", "--configuration", "debian")
    assert shown != run(tmp_path / "core", base + 70_000, "--kernel", "7.3")[1]
    assert shown.startswith(f"PFN {base + 70_000:#x}: tail of {base:#x}, struct page ")
    assert f"  folio {base:#x}: order 18 (1G), 262144 pages, hugetlb\n" in shown
    *_, line = shown.splitlines()
    assert line.split()[1:3] == ["4096", "pages"]
    assert line.endswith(", part of a 2M entry")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            (1 << 34,),
            "0x400000000: expected a PFN, or the address of a struct page in the vmemmap at 0xffffea0000000000",
        ),
        (("0x10", "--vmemmap", "here"), "Invalid value for '--vmemmap': 'here': expected a number of 64 bits"),
        (("ten",), "Invalid value for 'PFN...': 'ten': expected a number of 64 bits"),
        ((), "Missing argument 'PFN...'"),
        (
            ("0xffffea0000400041",),
            "within the struct page at 0xffffea0000400040, of which PFN 0x10001 is; expected the",
        ),
        (("1", "--kernel", "5.4"), "Invalid value for '--kernel': '5.4' is not one of"),
        (("1", "--configuration", "huge"), "Invalid value for '--configuration': 'huge' is not one of"),
        (("1", "--root", "vm:3"), "--root 'vm:3': expected an address, or a name that the image gives"),
        (("1", "--root", "0x10000000"), "root table 0x10000000: not in the image"),
    ],
)
def test_bad_options_are_one_line(run: Run, debian: Path, arguments: tuple[str, ...], complaint: str) -> None:
    status, shown, said = run(debian, *arguments)
    assert (status, shown, said.count("\n")) == (2, "", 1)
    assert complaint in said


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(b"", "empty"), (b"\x7fELF" + bytes(60), "ELF class 0"), (b"x" * 4097, "neither an ELF core nor raw memory")],
)
def test_bad_images_are_one_line(run: Run, tmp_path: Path, data: bytes, complaint: str) -> None:
    status, shown, said = run(write(tmp_path / "bad", data), 1)
    assert (status, shown, said.count("\n")) == (2, "", 1)
    assert said.startswith(f"pgemu: {tmp_path / 'bad'}: {complaint}")


def test_an_image_without_roots_needs_one(run: Run, tmp_path: Path) -> None:
    assert run(write(tmp_path / "raw", bytes(8192)), 1) == (
        2, "", "pgemu: --root is missing; the image names no top table: expected an address\n"
    )  # fmt: skip
    assert run(tmp_path / "raw", 1, "--root", 0)[:2] == (
        1, "PFN 0x1: its struct page at 0xffffea0000000040 is not mapped\n"
    )  # fmt: skip


CODE = """\
import sys
from pgemu.cli import main
try:
    main({arguments}, prog_name="pgemu")
except SystemExit as end:
    print(end.code, *sorted({{"numba", "llvmlite", "pyarrow"}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.same_with_checks
def test_no_compiler_is_loaded(debian: Path) -> None:
    code = CODE.format(arguments=["page", str(debian), hex(HEAD)])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (HEAD_TEXT + FOLIO, "0\n")
