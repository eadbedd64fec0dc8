"""Captures of guest_memfd mapped in three ways: every entry decodes, the scenarios of faults and holes are replayed."""

from __future__ import annotations

from collections import Counter

import pytest

from oracle.capture import FRAME, PFNMAP, Capture, captures, load, shipped
from oracle.replay_pfnmap import MismatchError, ReplayPfnmap, replayable, variant_of
from oracle.test_decode import (
    GUARD,
    HOST_LEAVES,
    LEVELS,
    Decoder,
    check_tree,
    entries_of,
    formats,
    written_by_kvm,
    written_by_linux,
)
from pgemu.tables.entries import EntryKind
from pgemu_kernels.formats import bits, leaves as K

OTHER = {"unmap": "pfnmap", "pfnmap": "unmap"}
SWP_HWPOISON = 24  # include/linux/swap.h, with migration entries' types below it and device memory's above

CHECKPOINTS = {"linux-7.3.4-debian-pfnmap": 979, "linux-7.3.4-debian-pfnmap-2m": 177}
REPLAYED = {  # checkpoints that were equal, of those of a scenario
    "01-faults-pfnmap": 15, "01-faults-plain": 12, "06-punch-pfnmap": 13, "06-punch-plain": 13, "06-punch-unmap": 13,
    "14-two-views-both": 7, "52-huge-punch-pfnmap": 11, "52-huge-punch-unmap": 11,
}  # fmt: skip
BY_THE_ORDINARY_KIND = {"01-faults-plain": 12, "06-punch-plain": 13}
REASONS = {  # by the number of a scenario, why it is not replayed
    "02": "madvise() beyond MADV_DONTNEED and MADV_POPULATE",
    "03": "mlock(), MAP_LOCKED and MAP_POPULATE of the designs' guest_memfd",
    "04": "mremap() of other than anonymous memory",
    "05": "fork() of a process with other memory than the designs' guest_memfd",
    "07": "a file that lives on while it is mapped or a slot shows it",
    "08": "slots of guest_memfd that a process's mapping changes under",
    "09": "slots over a process's mapping of the designs' guest_memfd",
    "10": "software-protected VMs with memory attributes over the designs' guest_memfd",
    "11": "users of pages: what `pgemu consumers` tells of, not what it runs",
    "12": "memory failure", "13": "memory failure",
    "31": "a random mix with mremap()", "32": "a random mix with mremap()", "33": "a random mix with mremap()",
    "34": "a random mix with mremap()", "35": "a random mix with mremap()", "36": "a random mix with mremap()",
    "37": "a random mix with mremap()", "38": "a random mix with mremap()",
    "51": "mprotect(), mremap() and fork() of large folios of the page allocator",
    "52": "large folios of the page allocator that entries count",
    "53": "large folios of the page allocator in stage 2", "54": "large folios of the page allocator in stage 2",
    "55": "large folios of the page allocator in stage 2", "56": "users of pages, memory failure",
}  # fmt: skip


@pytest.fixture(scope="module", params=captures(PFNMAP), ids=lambda path: path.name.removesuffix(".json.xz"))
def capture(request: pytest.FixtureRequest) -> Capture:
    return load(request.param)


def test_every_entry_decodes(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    host_format, _, stage2_format = formats(capture)
    host, stage2 = Decoder(host_format), Decoder(stage2_format)
    for checkpoint in capture.checkpoints:
        host.tables(checkpoint.tables)
        host.leaves(checkpoint.leaves, HOST_LEAVES | {EntryKind.SWAP})
        counted = Counter(LEVELS[table.level] for table in checkpoint.tables)
        assert counted == Counter(checkpoint.table_pages), checkpoint.name
        assert 4 * counted.total() == checkpoint.check["table_pages_walked_kb"]
        for tree in (tree for machine in checkpoint.stage2 for tree in machine.trees):
            check_tree(tree, stage2)
    assert not host.bad + stage2.bad, (host.bad + stage2.bad)[:5]
    decoded = host.decoded + stage2.decoded
    assert decoded == sum(map(entries_of, capture.checkpoints))
    with capsys.disabled():
        total = len(capture.checkpoints)
        print(f"\n{capture.name}: {total}/{total} checkpoints, {decoded} entries decoded")
    if shipped(PFNMAP):
        assert total == CHECKPOINTS[capture.name]
        assert host.kinds[EntryKind.SWAP] == (14 if capture.name == "linux-7.3.4-debian-pfnmap" else 0)


def test_every_leaf_is_one_that_linux_is_said_to_write(capture: Capture) -> None:
    host_format, _, stage2_format = formats(capture)
    known = written_by_linux(K.ProcessLeaves(capture.kernel))
    poison = Decoder(host_format)
    for checkpoint in capture.checkpoints:
        for run in checkpoint.leaves:
            flags = run.entry & ~FRAME if run.entry & bits.PRESENT else run.entry | FRAME
            if flags not in known[run.level] and run.entry != GUARD:
                entry = poison.entry(run.level, run.entry)
                assert (entry.kind, entry.swap_type) == (EntryKind.SWAP, SWP_HWPOISON), hex(run.entry)
        for tree in (tree for machine in checkpoint.stage2 for tree in machine.trees):
            for run in tree.leaves:
                known_to_kvm = written_by_kvm(stage2_format, run)
                assert run.entry & ~FRAME in known_to_kvm, f"{checkpoint.scenario} {checkpoint.name} {run.entry:#x}"


def test_faults_and_holes_are_replayed(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    done, ordinary = {}, {}
    for name, checkpoints in capture.scenarios().items():
        if not replayable(capture, name):
            continue
        replay = ReplayPfnmap(capture, checkpoints)
        done[name] = replay.run()
        if variant_of(name) == "plain" and not replay.huge:
            ordinary[name] = ReplayPfnmap(capture, checkpoints, ordinary=True).run()
        with capsys.disabled():
            rest = f"; then {replay.stopped}" if replay.stopped else ""
            print(f"\n{capture.name} {name}: {done[name]}/{len(checkpoints)} checkpoints{rest}", end="")
    if shipped(PFNMAP):
        assert done == {name: count for name, count in REPLAYED.items() if name in capture.scenarios()}
        assert ordinary == {name: count for name, count in BY_THE_ORDINARY_KIND.items() if name in capture.scenarios()}


def test_a_preset_does_not_replay_the_other_ones_holes(capture: Capture) -> None:
    holes = {name: variant for name in capture.scenarios()
             if name[:2] in ("06", "52") and (variant := variant_of(name)) in OTHER}  # fmt: skip
    for name, variant in holes.items():
        with pytest.raises(MismatchError, match=r"(hole_punched_pages_reused|whole_block): leaves"):
            ReplayPfnmap(capture, capture.scenarios()[name], like=OTHER[variant]).run()
    assert len(holes) == 2 or not shipped(PFNMAP)


def test_every_scenario_is_replayed_or_has_a_reason(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    left = {}
    replayed = 0
    for name, checkpoints in capture.scenarios().items():
        if replayable(capture, name):
            replayed += REPLAYED[name] if shipped(PFNMAP) else len(checkpoints)
        else:
            left[name] = (len(checkpoints), REASONS[name[:2]])
    with capsys.disabled():
        total = len(capture.checkpoints)
        print(f"\n{capture.name}: {total}/{total} checkpoints decoded, {replayed}/{total} replayed; not replayed:")
        for name, (count, reason) in left.items():
            print(f"  {name}, {count} checkpoints: {reason}")
