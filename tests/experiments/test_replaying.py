"""Replays: outcomes as a machine returns them, however a run was interrupted, and on however many machines it went."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from comparisons import HVA, INODE, lowered, mixed_records, one, setup
from pgemu import InputError, LoweringOptions
from pgemu.experiments.compare import run as compare_run
from pgemu.experiments.configuration import configuration
from pgemu.experiments.replaying import jobs as jobs_module
from pgemu.experiments.replaying.jobs import Job, run_job
from pgemu.experiments.replaying.opened import OpenTrace, in_memory, open_trace
from pgemu.experiments.replaying.outcomes import Rows, merged
from pgemu.experiments.replaying.run import Every, Replayed, Run, replay
from pgemu.experiments.replaying.shards import plan
from pgemu.experiments.setting_up import boot, fill
from pgemu.machine.presets import Versions
from pgemu.machine.results import operation_name, result_name
from pgemu.report.replay import document
from pgemu.trace import Flag, Lowered, Operation, Records, shipped
from pgemu.trace.readers import parquet
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from random_traces import traces

DESIGNS = ("restructure", "pfnmap")
VERSIONS = Versions()


def how(trace: OpenTrace, design: Any, **fields: Any) -> Run:
    config = configuration(trace.lowered, design, VERSIONS, {}, trace.survey.named.inodes)
    return Run(config, VERSIONS, **fields)


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[b"pgemu.replay"])
    return found


def expected(trace: Lowered, run: Run) -> list[tuple[Any, ...]]:
    """What one call of machine.run() returns, named."""
    machine = boot(trace, run.config)
    fill(machine, trace)
    results = machine.run(trace.records)
    columns = (trace.records.op.tolist(), results.status.tolist(), results.detail.tolist())
    return [
        (i, operation_name(Operation(op)), result_name(Operation(op), status), detail)
        for i, (op, status, detail) in enumerate(zip(*columns, strict=True))
    ]


def stored(trace: Lowered, folder: Path) -> str:
    path = folder / "trace.parquet"
    parquet.write(replace(trace, records=trace.records), path)
    return str(path)


def stop_after(calls: int) -> Callable[[], bool]:
    left = [calls]

    def stopped() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stopped


# --------------------------------------------------------------------------- outcomes


@settings(max_examples=20, deadline=None)
@given(trace=traces(), design=st.sampled_from(DESIGNS))
def test_a_row_is_what_the_machine_returned_from_memory_and_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, trace: Lowered, design: Any
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    held = in_memory(trace)
    read = open_trace(stored(trace, folder), LoweringOptions(PAGE_2M))
    assert (read.path is None, len(read.lowered.records), read.count) == (False, 0, len(trace.records))
    assert read.lowered.converts == trace.converts
    runs = [replay(each, how(each, design), folder / name) for each, name in ((held, "held"), (read, "read"))]
    for name in ("held", "read"):
        assert rows_of(folder / name) == expected(trace, how(held, design))
    assert runs[0].statistics == runs[1].statistics
    compared = compare_run(trace, how(held, design).config, VERSIONS)
    assert [(run.operation, run.outcomes) for run in runs[0].operations if run.operation is not Operation.CLOSE] == [
        (run.operation, run.outcomes) for run in compared.operations if run.operation is not Operation.CLOSE
    ]


def test_the_file_says_what_it_is_and_equal_runs_write_equal_files(tmp_path: Path) -> None:
    trace = in_memory(lowered(mixed_records()))
    run = how(trace, "pfnmap")
    for name in ("one", "other"):
        replay(trace, run, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    said = about(tmp_path / "one")
    assert (said["records"], said["complete"], said["version"]) == (18, True, 1)
    assert said["trace"] == "made by hand"
    assert said["machine"]["design"] == "pfnmap"
    assert pq.read_table(tmp_path / "one").column_names == ["index", "operation", "result", "detail"]


def test_numbers_of_row_groups_follow_from_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgemu.experiments.replaying.outcomes.ROW_GROUP", 5)
    trace = in_memory(lowered(mixed_records()))
    replay(trace, how(trace, "pfnmap"), tmp_path / "o")
    metadata = pq.read_metadata(tmp_path / "o")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [5, 5, 5, 3]
    assert [row[0] for row in rows_of(tmp_path / "o")] == list(range(18))


def test_the_shipped_trace(tmp_path: Path) -> None:
    trace = open_trace(str(shipped()), LoweringOptions())
    replayed = replay(trace, how(trace, "restructure"), tmp_path / "o")
    assert (replayed.records, replayed.complete, replayed.finding) == (17716, True, None)
    results = Counter(row[2] for row in rows_of(tmp_path / "o"))
    assert results["RET_PF_FIXED"] == 13872
    assert results["RET_PF_SPURIOUS"] == 2953


def test_batches_go_through_stages_in_order(tmp_path: Path) -> None:
    trace = in_memory(lowered(mixed_records()))
    seen: list[int] = []

    def twice(records: Records) -> Records:
        seen.append(len(records))
        return Records.concatenate([records, records])

    def without_conversions(records: Records) -> Records:
        return records.take(np.flatnonzero(records.op != Operation.CONVERT))

    run = how(trace, "restructure", stages=(twice, without_conversions))
    replayed = replay(trace, run, tmp_path / "o")
    assert seen == [18]
    assert (replayed.records, replayed.total, replayed.complete) == (28, 28, True)
    assert [row[0] for row in rows_of(tmp_path / "o")] == list(range(28))
    assert "convert" not in {row[1] for row in rows_of(tmp_path / "o")}


def test_bad_rows_and_actors_leave_no_file(tmp_path: Path) -> None:
    trace = in_memory(lowered(mixed_records()))

    def actor(records: Records) -> Records:
        return replace(records, actor=np.full(len(records), 5000, np.uint16))

    with pytest.raises(InputError, match="actor 5000, expected less than 1024"):
        replay(trace, how(trace, "pfnmap", stages=(actor,)), tmp_path / "o")
    point = str(tmp_path / "point")
    with pytest.raises(InputError, match="actor 5000"):
        replay(trace, how(trace, "pfnmap", stages=(actor,), checkpoint=point), tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_memory_beyond_what_is_allowed_ends_the_run(tmp_path: Path) -> None:
    trace = in_memory(lowered(mixed_records()))
    with pytest.raises(InputError, match=r"--max-memory 1M: [0-9]+M are in use after 0 records"):
        replay(trace, how(trace, "pfnmap", max_memory=1 << 20), tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
    assert replay(trace, how(trace, "pfnmap", max_memory=1 << 40), tmp_path / "o").complete


def test_a_version_may_refuse_the_trace(tmp_path: Path) -> None:
    trace = in_memory(lowered([*setup(), one(Operation.GUEST_FAULT)], "shared"))
    replayed = replay(trace, how(trace, "restructure", strict=True), tmp_path / "o")
    assert "dec2025 refuses" in replayed.refusal
    assert (replayed.records, replayed.complete, rows_of(tmp_path / "o")) == (0, False, [])


# --------------------------------------------------------------------------- interrupted


@settings(max_examples=25, deadline=None)
@given(
    trace=traces(), design=st.sampled_from(DESIGNS), stops=st.lists(st.integers(0, 6), max_size=4),
    every=st.integers(1, 9), is_stored=st.booleans(), check=st.sampled_from(["end", 4, "every"]),
)  # fmt: skip
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    tmp_path_factory: pytest.TempPathFactory, trace: Lowered, design: Any, stops: list[int], every: int,
    is_stored: bool, check: Any,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("resume")
    opened = open_trace(stored(trace, folder), LoweringOptions(PAGE_2M)) if is_stored else in_memory(trace)
    whole = replay(opened, how(opened, design, check=check), folder / "whole")
    run = how(
        opened, design, check=check, checkpoint=str(folder / "point"), every=Every(every, 0.0), resume=True,
        stages=(lambda records: records,),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgemu.experiments.setting_up._FIRST_PIECE", 2)
        patch.setattr("pgemu.experiments.setting_up.Pace.took", lambda *_: None)
        for calls in stops:
            stopped = replay(opened, run, folder / "o", None, stop_after(calls))
            done = rows_of(folder / "o")
            assert done == rows_of(folder / "whole")[: len(done)]
            assert len(done) == stopped.records == about(folder / "o")["records"]
            assert about(folder / "o")["complete"] == stopped.complete
            if stopped.complete:
                break
            assert (folder / "point").is_file()
        replayed = replay(opened, run, folder / "o")
    assert (folder / "o").read_bytes() == (folder / "whole").read_bytes()
    assert replayed.statistics == whole.statistics
    assert document(replayed, "o") == document(whole, "o")
    assert not (folder / "point").exists()
    assert not (folder / "point.rows").exists()


def interrupted(folder: Path, trace: OpenTrace, run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgemu.experiments.setting_up._FIRST_PIECE", 4)
        patch.setattr("pgemu.experiments.setting_up.Pace.took", lambda *_: None)
        assert not replay(trace, run, folder / "o", None, stop_after(2)).complete


def test_a_checkpoint_is_of_one_run(tmp_path: Path) -> None:
    trace = in_memory(lowered(mixed_records()))
    point = tmp_path / "point"
    run = how(trace, "pfnmap", checkpoint=str(point), every=Every(4, 0.0))
    interrupted(tmp_path, trace, run)
    with pytest.raises(InputError, match="a checkpoint is there: expected --resume"):
        replay(trace, run, tmp_path / "o")
    again = replace(run, resume=True)
    other = in_memory(lowered([*mixed_records(), one(Operation.GUEST_FAULT)]))
    with pytest.raises(InputError, match="a checkpoint of another run: trace"):
        replay(other, again, tmp_path / "o")
    with pytest.raises(InputError, match=r"another run: design pfnmap, expected restructure;") as refused:
        replay(trace, how(trace, "restructure", checkpoint=str(point), resume=True), tmp_path / "o")
    assert "{" not in str(refused.value)
    with pytest.raises(InputError, match=r"another run: ") as refused:
        replay(trace, replace(again, check="every", strict=True), tmp_path / "o")
    assert str(refused.value).endswith("another run: strict False, expected True; check end, expected every")
    next((tmp_path / "point.rows").iterdir()).unlink()
    with pytest.raises(InputError, match="rows that the checkpoint names are not there"):
        replay(trace, again, tmp_path / "o")
    point.write_bytes(point.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged or cut off"):
        replay(trace, again, tmp_path / "o")
    boot(trace.lowered, run.config).save(point)
    with pytest.raises(InputError, match="expected a checkpoint of pgemu replay"):
        replay(trace, again, tmp_path / "o")


def test_rows_that_no_checkpoint_names_are_removed(tmp_path: Path) -> None:
    trace = in_memory(lowered(mixed_records()))
    run = how(trace, "pfnmap", checkpoint=str(tmp_path / "point"), every=Every(4, 0.0))
    interrupted(tmp_path, trace, run)
    (tmp_path / "point.rows" / "000009.parquet").write_bytes(b"PAR1 of a process that was killed")
    replay(trace, replace(run, resume=True), tmp_path / "o")
    replay(trace, replace(run, checkpoint=None), tmp_path / "whole")
    assert (tmp_path / "o").read_bytes() == (tmp_path / "whole").read_bytes()


# --------------------------------------------------------------------------- on several machines

VMS = 3


def of_vm(records: Records, number: int) -> Records:
    """The records of VM 0, as those of another one, its process and its inode."""
    columns = {"vm": np.uint16, "space": np.uint16, "object": np.uint32}
    return replace(records, **{name: np.full(len(records), number, kind) for name, kind in columns.items()})


@st.composite
def fleets(draw: st.DrawFn) -> Lowered:
    """Traces of some VMs, one record of one after some of others."""
    each = [of_vm(draw(traces()).records, number) for number in range(VMS)]
    order = draw(st.permutations([number for number in range(VMS) for _ in range(len(each[number]))]))
    at = Counter[int]()
    found = []
    for number in order:
        found.append(each[number][at[number] : at[number] + 1])
        at[number] += 1
    return lowered(found, draw(st.sampled_from(["private", "shared"])))


def in_this_process(function: Any, tasks: Any, jobs: int, stopped: Any) -> Any:
    """What jobs.run_all() does, without processes; the last task first."""
    for number in reversed(range(len(tasks))):
        yield number, function(tasks[number], lambda: False)


def job(trace: str, out: Path, shards: int, design: Any, **fields: Any) -> Job:
    return Job(trace, str(out), LoweringOptions(PAGE_2M), design, VERSIONS, fields, shards=shards)


@settings(max_examples=15, deadline=None)
@given(trace=fleets(), design=st.sampled_from(DESIGNS))
def test_outcomes_are_the_same_on_any_number_of_machines(
    tmp_path_factory: pytest.TempPathFactory, trace: Lowered, design: Any
) -> None:
    folder = tmp_path_factory.mktemp("fleet")
    path = stored(trace, folder)
    found: list[tuple[bytes, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_module, "run_all", in_this_process)
        for shards in (1, 2, VMS, 8):
            replayed = run_job(job(path, folder / "o", shards, design))
            assert replayed.shards == min(shards, VMS)
            assert replayed.instead == ""
            document_of = document(replayed, "o")
            del document_of["shards"]
            if broken := document_of["broken"]:  # which of several was the first, one machine alone can tell
                del broken["rule"], broken["index"]
                broken["rules"] = sorted((rule["rule"], rule["count"]) for rule in broken["rules"])
            found.append(((folder / "o").read_bytes(), document_of))
    for content, said in found[1:]:
        assert said == found[0][1]
        assert content == found[0][0]


def fleet(more: list[Records] | None = None) -> Lowered:
    records = [of_vm(each, number) for number in range(VMS) for each in setup()]
    records += [
        of_vm(one(Operation.GUEST_FAULT, address=page * PAGE_4K), n) for page in range(5) for n in range(VMS)
    ]  # fmt: skip
    return lowered([*records, *(more or [])])


JOINING = {
    "a memory slot over another VM's inode": one(Operation.BIND, vm=0, object=1, address=1 << 40, length=PAGE_2M),
    "a mapping of another VM's inode": one(Operation.MMAP, space=2, object=1, address=1 << 40, length=PAGE_2M),
}
UNDIVIDED = {
    "work: of all VMs": one(Operation.WORK),
    "pool resize: of all VMs": one(Operation.POOL_RESIZE, object=9, length=1),
    "fork: of all VMs": one(Operation.FORK),
    "get: by numbers of frames": one(Operation.GET),
    "nested map: by numbers of frames": one(Operation.NESTED_MAP),
    "anonymous memory comes from the host's page allocator": one(
        Operation.MMAP, Flag.PRIVATE | Flag.READ, object=0xFFFF_FFFF, address=1 << 30, length=PAGE_4K
    ),
}


def test_records_that_join_vms_keep_them_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "run_all", in_this_process)
    for record in JOINING.values():
        trace = fleet([record])
        found = plan(in_memory(trace).columns(), 8)
        assert found is not None
        assert sorted(found.counts) == [7, 15]
    everything = fleet([*JOINING.values()])
    replayed = run_job(job(stored(everything, tmp_path), tmp_path / "o", 4, "pfnmap"))
    assert (replayed.shards, replayed.records) == (1, len(everything.records))
    assert replayed.instead == "--jobs 4: on one machine, for records join all of its VMs, processes and inodes"


@pytest.mark.parametrize("why", UNDIVIDED)
def test_what_is_asked_of_all_is_not_divided(tmp_path: Path, why: str) -> None:
    path = stored(fleet([UNDIVIDED[why]]), tmp_path)
    replayed = run_job(job(path, tmp_path / "o", 2, "restructure"))
    assert replayed.shards == 1
    assert why in replayed.instead


def test_machines_that_could_be_short_together_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each VM alone has room for its mappings, all of them together have not."""
    monkeypatch.setattr(jobs_module, "run_all", in_this_process)
    mappings = [
        of_vm(one(Operation.MMAP, address=HVA + 2 * i * INODE, length=PAGE_4K), number)
        for i in range(1, 400)
        for number in range(VMS)
    ]
    path = stored(fleet(mappings), tmp_path)
    alone = run_job(job(path, tmp_path / "alone", 1, "pfnmap"))
    replayed = run_job(job(path, tmp_path / "o", 3, "pfnmap"))
    assert (replayed.shards, alone.statistics) == (1, replayed.statistics)
    assert "could have been short of the same: mappings: 1,200 of 1,024" in replayed.instead
    assert (tmp_path / "o").read_bytes() == (tmp_path / "alone").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "o", "trace.parquet"]
    assert Counter(row[2] for row in rows_of(tmp_path / "o") if row[1] == "mmap")["-ENOMEM"] == 1200 - 1024


def as_they_are(records: Records) -> Records:
    return records


def test_what_stages_make_of_records_is_not_divided(tmp_path: Path) -> None:
    path = stored(fleet(), tmp_path)
    replayed = run_job(replace(job(path, tmp_path / "o", 2, "pfnmap"), stages=(as_they_are,)))
    assert replayed.shards == 1
    assert "which records there will be, stages say" in replayed.instead


def test_shards_are_balanced() -> None:
    records = [one(Operation.GUEST_FAULT, vm=vm) for vm, count in enumerate((50, 20, 20, 10)) for _ in range(count)]
    columns = {name: getattr(Records.concatenate(records), name) for name in ("op", "vm", "space", "object")}
    found = plan([columns], 2)
    assert found is not None
    assert found.counts == (50, 50)
    assert plan([columns], 1) is None


@given(
    owners=st.lists(st.integers(0, 3), max_size=60), window=st.integers(1, 70), size=st.integers(1, 7)
)  # fmt: skip
def test_rows_are_merged_in_their_order(owners: list[int], window: int, size: int) -> None:
    def rows(numbers: list[int]) -> Rows:
        index = np.array(numbers, np.uint64)
        return Rows(index, index.astype(np.uint8), index.astype(np.int64) * -1, index * np.uint64(3))

    parts = []
    for owner in range(4):
        mine = [i for i, one in enumerate(owners) if one == owner]
        parts.append(iter([rows(mine[first : first + size]) for first in range(0, len(mine), size)]))
    found = Rows.concatenate(merged(parts, len(owners), window))
    assert found.index.tolist() == list(range(len(owners)))
    assert found.op.tolist() == list(range(len(owners)))
    assert found.status.tolist() == [-i for i in range(len(owners))]
    assert found.detail.tolist() == [3 * i for i in range(len(owners))]


def test_replayed_can_be_sent_to_another_process() -> None:
    import pickle

    trace = in_memory(lowered(mixed_records()))
    sent = pickle.loads(pickle.dumps(replace(trace, lowered=replace(trace.lowered, again=None))))
    assert sent.count == trace.count
    assert isinstance(pickle.loads(pickle.dumps(job("x", Path("o"), 1, "pfnmap"))), Job)
    assert Replayed.__dataclass_params__.frozen  # type: ignore[attr-defined]
