"""Every entry of every captured table decodes: right kind, no unknown bit; tables and leaves recounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest

from oracle.capture import FRAME, SHIPPED, Capture, Checkpoint, Run, Table, Tree, load, name_of
from pgemu.tables.entries import Entry, EntryKind, classify, decode
from pgemu_kernels.formats import bits, leaves as K
from pgemu_kernels.formats.page_format import PageFormat, ept, npt, x86_64

pytestmark = pytest.mark.same_with_checks

CHECKPOINTS = {
    "oracle/linux-6.1.192-debian": 324,
    "oracle/linux-6.12.107-debian": 324,
    "oracle/linux-6.18.15-debian": 324,
    "oracle/linux-7.3.4-debian-pti": 324,
    "oracle/linux-7.3.4-small": 324,
    "oracle/linux-7.3.4-small-ept": 109,
    "oracle-2/linux-6.12.107-debian": 304,
    "oracle-2/linux-7.3.4-small": 304,
    "oracle-2/linux-7.3.4-small-ept": 95,
    "oracle-pfnmap/linux-7.3.4-debian-pfnmap": 979,
    "oracle-pfnmap/linux-7.3.4-debian-pfnmap-2m": 177,
}
"""Checkpoints of each shipped file: 3,588 together."""

HOST_LEAVES = {EntryKind.LEAF, EntryKind.PROTECTION_NONE, EntryKind.GUARD, EntryKind.SWAP}
SWP_HWPOISON = 24  # include/linux/swap.h, with migration entries' types below it and device memory's above: a page
# with a memory failure. Nothing is ever swapped out in the captures.
GUARD = 0xFFFF_FFFF_FFFF_F600
LEVELS = {4: "pud", 3: "pmd", 2: "pte"}  # an entry of this level points to a table counted there


@pytest.fixture(scope="module")
def capture(path: Path) -> Capture:
    return load(path)


def formats(capture: Capture) -> tuple[PageFormat, PageFormat, PageFormat]:
    """Formats of a capture's processes, of their user copies of the top table, and of stage 2."""
    amd = capture.stage2 == "npt"
    common = {"kernel": capture.kernel, "maxphyaddr": capture.maxphyaddr}
    host = x86_64(amd=amd, pti=capture.pti, **common)
    user = x86_64(amd=amd, **common)
    if amd:
        return host, user, npt(**common)
    # Haswell has L1TF, and its L1 cache is taken to have 44 address bits (arch/x86/kernel/cpu/bugs.c).
    return host, user, ept(nx_huge_pages=capture.haswell, l1tf_cache_bits=44, **common)


class Decoder:
    """Decodes each distinct (level, bits outside the frame) once: a frame changes neither kind nor names.

    seen, decoded: entries, and those of them that are of the right kind and have a name for every bit.
    """

    def __init__(self, fmt: PageFormat) -> None:
        self.fmt = fmt
        self.seen = 0
        self.decoded = 0
        self.kinds: Counter[EntryKind] = Counter()
        self.bad: list[str] = []
        self._decoded: dict[tuple[int, int], Entry] = {}

    def entry(self, level: int, value: int) -> Entry:
        frame = value & FRAME
        if value & self.fmt.present and not frame >> self.fmt.maxphyaddr:
            value ^= frame & self.fmt.frame(level)
        if (level, value) not in self._decoded:
            self._decoded[level, value] = decode(self.fmt, level, value)
        return self._decoded[level, value]

    def known(self, kind: EntryKind) -> list[Entry]:
        """Those of a kind among the distinct entries that were decoded."""
        return [entry for entry in self._decoded.values() if entry.kind is kind]

    def see(self, level: int, value: int, kinds: Collection[EntryKind], count: int = 1) -> EntryKind:
        """Decode `count` entries like `value`, which should be one of `kinds`: the kind found."""
        found = self.entry(level, value)
        self.seen += count
        if found.kind in kinds and not found.unknown and not found.reserved:
            self.decoded += count
        else:
            self.bad.append(f"level {level} {value:#x}: {found.kind}, unknown {found.unknown:#x} {found.problem}")
        self.kinds[found.kind] += count
        return found.kind

    def tables(self, rows: Iterable[Table]) -> None:
        for row in rows:
            self.see(row.level, row.entry, {EntryKind.TABLE})

    def leaves(self, runs: Iterable[Run], kinds: Collection[EntryKind]) -> None:
        """Entries of runs. Within a run only the frame differs, so its first entry stands for all."""
        for run in runs:
            last = run.entry + (run.count - 1) * run.step
            assert not (last ^ run.entry) & ~FRAME, run
            assert run.step in (0, 4096 << 9 * (run.level - 1)), run
            self.see(run.level, run.entry, kinds, run.count)


def check_host(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Tables and leaves of the process; table pages counted against the kernel's VmPTE."""
    decoder.tables(checkpoint.tables)
    decoder.leaves(checkpoint.leaves, HOST_LEAVES)
    assert all(entry.swap_type == SWP_HWPOISON for entry in decoder.known(EntryKind.SWAP))
    counted = Counter(LEVELS[table.level] for table in checkpoint.tables)
    assert counted == Counter(checkpoint.table_pages), checkpoint.name
    check = checkpoint.check
    assert 4 * counted.total() == check["table_pages_walked_kb"]
    assert 4 * (counted.total() + check["anon_thp_pmds"]) == check["VmPTE_kb"]


def check_vmemmap(checkpoint: Checkpoint, decoder: Decoder, leaves: K.ProcessLeaves) -> None:
    """Tables and leaves of the vmemmap, and that leaves are those that `leaves` writes."""
    decoder.tables(checkpoint.vmemmap_tables)
    decoder.leaves(checkpoint.vmemmap_leaves, {EntryKind.LEAF})
    written = {leaves.vmemmap(level=2), leaves.vmemmap()}
    written |= {leaves.vmemmap(write=False), leaves.vmemmap(write=False, boot=True)}
    assert {run.entry & ~FRAME for run in checkpoint.vmemmap_leaves} <= written


def check_pti(checkpoint: Checkpoint, kernel: Decoder, user: Decoder) -> None:
    """Both top tables: all of their entries point to tables, the same ones below the user half."""
    roots = checkpoint.pti_roots
    for half, decoder in (("kernel", kernel), ("user", user)):
        decoder.tables(Table(index << 39, 4, entry) for index, entry in roots.get(half, {}).items())
    if roots:
        below = {half: {i: e & FRAME for i, e in roots[half].items() if i < 256} for half in ("kernel", "user")}
        assert below["kernel"] == below["user"]
        top = {table.va >> 39: table.entry for table in checkpoint.tables if table.level == 4}
        assert top == {i: e for i, e in roots["kernel"].items() if i < 256}


def check_stage2(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Trees of every VM: leaves and table pages counted against KVM's statistics."""
    fmt = decoder.fmt
    found: Counter[int] = Counter()
    pages = 0
    trees = [tree for machine in checkpoint.stage2 for tree in machine.trees]
    for tree in trees:
        check_tree(tree, decoder)
        pages += 1 + len(tree.tables)
        for run in tree.leaves:
            if classify(fmt, run.level, run.entry) is EntryKind.LEAF:
                found[run.level] += run.count
    if trees:
        check = checkpoint.check
        if "stage2_leaves_walked" not in check:
            return  # the machine's VMs had none when it was asked
        assert [found[level] for level in (1, 2, 3)] == check["stage2_leaves_walked"]
        assert check["stage2_leaves_walked"] == check["stage2_leaves_counted_by_kvm"]
        assert pages == check["stage2_table_pages_walked"]


def check_tree(tree: Tree, decoder: Decoder) -> None:
    """One tree. A cached MMIO access is a `leaf` on AMD, where it has bit 0, and `other_nonpresent` on Intel."""
    fmt = decoder.fmt
    decoder.tables(tree.tables)
    decoder.leaves(tree.leaves, {EntryKind.LEAF, EntryKind.MMIO})
    for row in tree.other_nonpresent:
        decoder.see(row.level, row.entry, {EntryKind.MMIO})
    mapped = [(run.va, run.entry) for run in tree.leaves] + [(row.va, row.entry) for row in tree.other_nonpresent]
    for va, entry in mapped:
        if classify(fmt, 1, entry) is EntryKind.MMIO:
            assert decode(fmt, 1, entry).address == va, hex(entry)
    for value in tree.nonpresent_values:
        assert classify(fmt, 1, value) is (EntryKind.ABSENT if value == fmt.empty else EntryKind.MMIO)
    # Every word of every table page is one of these.
    words = sum(tree.nonpresent_values.values()) + sum(run.count for run in tree.leaves) + len(tree.tables)
    assert words == 512 * (1 + len(tree.tables))


def entries_of(checkpoint: Checkpoint) -> int:
    """Table entries and leaves of a checkpoint, counted from the document itself."""
    raw = checkpoint.raw
    trees = [tree for machine in raw.get("stage2", []) for tree in machine["trees"]]
    lists = [raw, *trees, *([raw["vmemmap"]] if "vmemmap" in raw else [])]
    count = sum(len(words) for words in raw.get("pti_pgd", {}).values())
    count += sum(len(tree["other_nonpresent"]) for tree in trees)
    return count + sum(len(part["tables"]) + sum(run[3] for run in part["leaves"]) for part in lists)


def test_every_entry_decodes(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    host_format, user_format, stage2_format = formats(capture)
    decoders = host, user, stage2, vmemmap = [
        Decoder(fmt) for fmt in (host_format, user_format, stage2_format, host_format)
    ]
    leaves = K.ProcessLeaves(capture.kernel, pti=capture.pti)
    checkpoints = 0
    for scenario, moments in capture.scenarios().items():
        before = [sum(decoder.decoded for decoder in decoders), checkpoints]
        for checkpoint in moments:
            bad = sum(len(decoder.bad) for decoder in decoders)
            check_host(checkpoint, host)
            check_pti(checkpoint, host, user)
            check_vmemmap(checkpoint, vmemmap, leaves)
            check_stage2(checkpoint, stage2)
            checkpoints += bad == sum(len(decoder.bad) for decoder in decoders)
        decoded = sum(decoder.decoded for decoder in decoders) - before[0]
        total = sum(map(entries_of, moments))
        print(f"{scenario}: {checkpoints - before[1]}/{len(moments)} checkpoints, {decoded}/{total} entries decoded")
        assert decoded == total, "\n".join(line for decoder in decoders for line in decoder.bad[:5])
    with capsys.disabled():
        decoded = sum(decoder.decoded for decoder in decoders)
        total = len(capture.checkpoints)
        print(f"\n{capture.name}: {checkpoints}/{total} checkpoints, {decoded} entries decoded")
    assert checkpoints == total
    assert host.kinds[EntryKind.LEAF]
    assert stage2.kinds[EntryKind.LEAF]
    if capture.shipped:
        assert total == CHECKPOINTS[capture.name]
        if capture.path.parent == SHIPPED[0]:
            assert stage2.kinds[EntryKind.MMIO] > 0


# --------------------------------------------------------------------------- values that Linux writes


def first_faults(leaves: K.ProcessLeaves, level: int) -> set[int]:
    """Leaves of `level` as faults and mmap write them, without a frame."""
    yes_no = (False, True)
    found = {leaves.hugetlb(level, shared=s, write=w, write_fault=w and f) for s in yes_no for w in yes_no
             for f in yes_no if level > 1}  # fmt: skip
    if level == 1 or bits.RELEASES[leaves.kernel].huge_pfn:
        found |= {leaves.special_pfn(level, write=w, cache=c) for w in yes_no for c in ("WB", "UC-")}
    if level > 1:
        return found
    for execute in yes_no:
        found |= {leaves.zero_page(execute=execute), leaves.anonymous(execute=execute)}
        found |= {
            leaves.file_page(write_fault=w and f, folio_dirty=d, write=w, shared=s, execute=execute)
            for w in yes_no for f in yes_no for d in yes_no for s in yes_no
        }  # fmt: skip
    return found


def later(leaves: K.ProcessLeaves, entry: int, *, thp: bool = False) -> Iterable[int]:
    """What becomes of a leaf: the hardware's updates, ageing, fork, mprotect, mremap."""
    if entry & bits.PRESENT:
        yield from (leaves.mkold(entry), entry | bits.ACCESSED, leaves.wrprotect(entry))
        yield from (leaves.fork_child(entry), leaves.moved(entry))
        if entry & bits.WRITE:
            yield entry | bits.DIRTY
    for write, execute, shared in ((False, False, False), (False, True, False), (True, False, True)):
        yield leaves.modify(entry, leaves.protection(write=write, execute=execute, shared=shared), thp=thp)
    yield leaves.protection_none(entry, thp=thp)
    yield leaves.modify(
        entry, leaves.protection(write=False, execute=True, shared=False) | bits.EXECUTE_ONLY_KEY, thp=thp
    )


def written_by_linux(leaves: K.ProcessLeaves) -> dict[int, set[int]]:
    """All flags that leaves of each level can have."""
    thp = grow({leaves.anonymous(level=2), leaves.huge_zero_page()}, lambda entry: later(leaves, entry, thp=True))
    found = {level: grow(first_faults(leaves, level), lambda entry: later(leaves, entry)) for level in (1, 2, 3)}
    split = {leaves.split_thp(entry) for entry in thp if entry & bits.PRESENT}
    return {1: found[1] | grow(split, lambda entry: later(leaves, entry)), 2: found[2] | thp, 3: found[3]}


def grow(start: set[int], later: Callable[[int], Iterable[int]]) -> set[int]:
    found: set[int] = set()
    rest = set(start)
    while rest:
        found |= rest
        rest = {new for entry in rest for new in later(entry)} - found
    return found


def test_every_captured_leaf_is_one_that_linux_is_said_to_write(capture: Capture) -> None:
    leaves = K.ProcessLeaves(capture.kernel)
    known = written_by_linux(leaves)
    poison = Decoder(formats(capture)[0])
    assert max(map(len, known.values())) < 400  # of the 2^24 that flags could be
    for checkpoint in capture.checkpoints:
        for run in checkpoint.leaves:
            # Frame 0, or its inverse: of a transparent huge page only bits from 21 up are inverted.
            flags = run.entry & ~FRAME if run.entry & bits.PRESENT else run.entry | FRAME
            if run.entry == GUARD:
                assert leaves.guard() == GUARD
            elif flags not in known[run.level] and not run.entry & bits.PRESENT:
                entry = poison.entry(run.level, run.entry)
                assert (entry.kind, entry.swap_type) == (EntryKind.SWAP, SWP_HWPOISON), hex(run.entry)
            else:
                assert flags in known[run.level], f"{checkpoint.scenario} {checkpoint.name} {run.entry:#x}"


def written_by_kvm(fmt: PageFormat, run: Run) -> set[int]:
    """All flags that the stage-2 leaves of a run can have."""
    if classify(fmt, run.level, run.entry) is EntryKind.MMIO:
        return {K.mmio(fmt, run.va >> 12, K.mmio_generation(run.entry)) & ~FRAME}
    writable = {K.stage2_leaf(fmt, run.level), K.stage2_leaf(fmt, run.level, prefetched=True)}
    return writable | {K.write_protected(fmt, leaf) for leaf in writable} | {K.read_only(fmt, run.level)}


def test_every_captured_stage2_entry_is_one_that_kvm_is_said_to_write(capture: Capture) -> None:
    fmt = formats(capture)[2]
    for checkpoint in capture.checkpoints:
        for tree in (tree for machine in checkpoint.stage2 for tree in machine.trees):
            assert {table.entry & ~FRAME for table in tree.tables} <= {fmt.table_entry(0)}
            for run in tree.leaves:
                known = written_by_kvm(fmt, run)
                assert run.entry & ~FRAME in known, f"{checkpoint.scenario} {checkpoint.name} {run.entry:#x}"
            for row in tree.other_nonpresent:
                assert row.entry == K.mmio(fmt, row.va >> 12, K.mmio_generation(row.entry))


def test_all_shipped_captures_are_here() -> None:
    assert {name_of(path) for folder in SHIPPED for path in folder.glob("*.json.xz")} == set(CHECKPOINTS)
    assert sum(CHECKPOINTS.values()) == 3588
