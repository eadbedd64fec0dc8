"""KVM's events by tracefs: an instance of one's own, gone at the end; on a stand-in, and on the kernel's."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pgemu.errors import InputError
from pgemu.recording import tracefs
from pgemu.recording.sink import Sink, opened
from pgemu.trace.events import PROBE, RECORDED
from pgemu.trace.readers import ftrace

pytestmark = pytest.mark.same_with_checks

LINE = " vmm-9 (      9) [000] ..... 1.000001: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
LACKING = ("kvm_vm_set_mem_attributes", "map")


class Tree:
    """A folder with tracefs's files; making an instance fills it, as the kernel does, and removing it empties it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.removed: dict[str, str] = {}
        self.pipe = LINE
        for event in RECORDED:
            if event.name not in LACKING:
                (root / "events" / event.system / event.name).mkdir(parents=True)
        (root / "instances").mkdir()
        (root / "kprobe_events").write_text("")
        monkeypatch.setattr(tracefs, "os", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mkdir(self, path: str) -> None:
        instance = Path(path)
        shutil.copytree(self.root / "events", instance / "events")
        (instance / "events" / f"pgemu_{os.getpid()}" / "kvm_memslot").mkdir(parents=True)
        (instance / "options").mkdir()
        (instance / "trace_pipe").write_text(self.pipe)

    def rmdir(self, path: str) -> None:
        files = [one for one in sorted(Path(path).rglob("*")) if one.is_file()]
        self.removed = {str(one.relative_to(path)): one.read_text() for one in files}
        shutil.rmtree(path)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    (tmp_path / "tracefs").mkdir()
    return Tree(tmp_path / "tracefs", monkeypatch)


class Written(Sink):
    """A sink that keeps what is written, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.text = b""
        self.lines = 0
        self._error = error

    def write(self, data: bytes) -> None:
        if self._error:
            raise self._error
        self.text += data


def test_events_are_turned_on_in_an_instance_that_is_gone_at_the_end(tree: Tree) -> None:
    sink = Written()
    found = tracefs.record(0.01, sink, buffer=8 << 20, root=str(tree.root))
    assert sink.text.decode() == LINE
    assert found.missing == LACKING
    assert not found.stopped
    assert list((tree.root / "instances").iterdir()) == []
    enabled = {name for name, text in tree.removed.items() if name.endswith("/enable") and text == "1"}
    expected = {f"events/{one.system}/{one.name}/enable" for one in RECORDED if one.name not in LACKING}
    assert enabled == expected | {f"events/pgemu_{os.getpid()}/kvm_memslot/enable"}
    assert (tree.removed["buffer_size_kb"], tree.removed["tracing_on"]) == ("8192", "0")
    assert tree.removed["options/record-tgid"] == "1"
    assert tree.removed["events/enable"] == "0"
    filters = {name: text for name, text in tree.removed.items() if name.endswith("/filter")}
    assert set(filters.values()) == {f"common_pid != {os.getpid()}"}
    assert {name.split("/")[1] for name in filters} == {"exceptions", "syscalls"}


def test_the_probe_is_made_and_removed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str]] = []
    write = tracefs._write

    def noted(path: str, text: str, mode: str = "w") -> None:
        written.append((Path(path).name, text))
        write(path, text, mode)

    monkeypatch.setattr(tracefs, "_write", noted)
    tracefs.record(0.01, Written(), root=str(tree.root))
    probes = [text for name, text in written if name == "kprobe_events"]
    name = f"pgemu_{os.getpid()}/kvm_memslot"
    assert probes == [f"p:{name} {tracefs.probed_function()} {PROBE}\n", f"-:{name}\n"]
    assert written.index(("enable", "0")) < written.index(("kprobe_events", probes[1]))


def test_without_kprobes_memory_slots_are_missing(tree: Tree) -> None:
    (tree.root / "kprobe_events").unlink()
    assert tracefs.record(0.01, Written(), root=str(tree.root)).missing == (*LACKING, "kvm_memslot (no kprobes)")


def test_tasks_filter_what_every_process_has(tree: Tree) -> None:
    tracefs.record(0.01, Written(), tasks=("qemu*", "CPU*"), root=str(tree.root))
    filters = {text for name, text in tree.removed.items() if name.endswith("/filter")}
    assert filters == {'comm ~ "qemu*" || comm ~ "CPU*"'}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_instance_and_probe_are_gone_whatever_happens(tree: Tree, error: BaseException) -> None:
    with pytest.raises(type(error)):
        tracefs.record(0.01, Written(error), root=str(tree.root))
    assert list((tree.root / "instances").iterdir()) == []
    assert f"-:pgemu_{os.getpid()}/kvm_memslot\n" in (tree.root / "kprobe_events").read_text()


def test_a_kernel_without_kvm_is_told(tree: Tree) -> None:
    shutil.rmtree(tree.root / "events" / "kvm")
    with pytest.raises(InputError, match=r"tracefs: no events of KVM: the module kvm is not loaded \(modprobe kvm\)$"):
        tracefs.record(0.01, Written(), root=str(tree.root))


def test_a_missing_privilege_is_told(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(tree, "mkdir", refused)
    with pytest.raises(InputError, match=r"pgemu-\d+: Permission denied: tracing needs root"):
        tracefs.record(0.01, Written(), root=str(tree.root))
    monkeypatch.setattr(tree, "listdir", refused, raising=False)
    with pytest.raises(InputError, match=r"no permission: tracing needs root$"):
        tracefs.events_here(str(tree.root))
    with pytest.raises(InputError, match=r"no permission: tracing needs root$"):
        tracefs.tracefs([str(tree.root)])


def test_no_tracefs_is_told_with_how_to_mount_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = [str(tmp_path / "none"), str(tmp_path / "empty")]
    with pytest.raises(InputError, match=r"no tracefs: as root, mount -t tracefs tracefs .*/none$"):
        tracefs.tracefs(places)


def test_the_kernel_itself(tmp_path: Path) -> None:
    """For a moment: what it prints is a log, and nothing of it stays."""
    path = tmp_path / "out"
    try:
        with opened(str(path)) as sink:
            found = tracefs.record(0.3, sink)
    except InputError as error:
        pytest.skip(str(error))
    assert 0.3 <= found.seconds < 60
    assert not Path(tracefs.tracefs(), "instances", f"pgemu-{os.getpid()}").exists()
    assert sink.lines == path.read_text(errors="replace").count("\n")
    if sink.lines:
        assert not ftrace.read(path).unknown
