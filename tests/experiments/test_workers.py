"""Tasks in processes: their results, what they raise, how they end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.experiments.replaying.workers import run_all
from pgemu.whole_file import whole_file

pytestmark = pytest.mark.same_with_checks

Stopped = Callable[[], bool]


def never() -> bool:
    return False


def doubled(task: int, stopped: Stopped) -> tuple[int, int]:
    assert not stopped()
    return 2 * task, os.getpid()


def large(task: int, _stopped: Stopped) -> bytes:
    return bytes(task)


def refusing(task: str, _stopped: Stopped) -> str:
    raise InputError("no trace", task, 7)


def failing(task: str, _stopped: Stopped) -> str:
    raise ZeroDivisionError(task)


def dying(_task: str, _stopped: Stopped) -> str:
    os._exit(3)


def writing(path: str, stopped: Stopped) -> str:
    """Write a file for half a minute, after whole seconds of loading, and until it is asked to stop."""
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        Path(f"{path}.begun").touch()
        for _ in range(600 if "loading" in path else 0):  # an exception that a library loses comes once more
            try:
                time.sleep(0.05)
            except SystemExit:
                if "losing" not in path or Path(f"{path}.lost").exists():
                    raise
                Path(f"{path}.lost").touch()
        for _ in range(600):
            if stopped():
                return "stopped"
            time.sleep(0.05)
    raise AssertionError("nobody stopped it")


def test_every_task_comes_once_and_processes_go_on() -> None:
    found = dict(run_all(doubled, range(9), 2, never))
    assert {number: result[0] for number, result in found.items() if not isinstance(result, InputError)} == {
        number: 2 * number for number in range(9)
    }
    assert len({result[1] for result in found.values() if not isinstance(result, InputError)}) <= 2
    assert [len(result) for _, result in run_all(large, [1 << 24], 3, never) if isinstance(result, bytes)] == [1 << 24]
    assert list(run_all(doubled, [], 2, never)) == []


def test_what_a_task_refuses_is_its_result_and_what_it_raises_is_raised() -> None:
    ((number, refused),) = run_all(refusing, ["a"], 2, never)
    assert (number, type(refused), str(refused)) == (0, InputError, "a:7: no trace")
    with pytest.raises(ZeroDivisionError, match="why"):
        list(run_all(failing, ["why"], 2, never))
    with pytest.raises(InputError, match="a process of the run ended before its time"):
        list(run_all(dying, ["a"], 2, never))


def files(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if one.suffix not in (".begun", ".lost"))


@pytest.mark.parametrize("name", ["loading", "loading and losing"])
def test_what_has_not_begun_ends_where_it_is_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """The task writes for half a minute before it asks whether to stop."""
    path = tmp_path / name
    begun = tmp_path / f"{name}.begun"
    before = time.monotonic()
    assert list(run_all(writing, [str(path), str(path) + " too"], 1, begun.exists)) == []
    assert time.monotonic() - before < 25
    assert files(tmp_path) == []


def test_what_has_begun_ends_as_it_likes_beside_what_has_not(tmp_path: Path) -> None:
    tasks = [str(tmp_path / "running"), str(tmp_path / "loading")]
    both = [tmp_path / "running.begun", tmp_path / "loading.begun"]

    def stopped() -> bool:
        if not all(one.exists() for one in both):
            return False
        time.sleep(0.2)  # it asks at once
        return True

    assert list(run_all(writing, tasks, 2, stopped)) == [(0, "stopped")]
    assert files(tmp_path) == ["running"]


def test_who_stops_to_take_results_ends_all(tmp_path: Path) -> None:
    tasks = [str(tmp_path / "running"), str(tmp_path / "loading")]

    def stopped() -> bool:
        if not (tmp_path / "loading.begun").exists():
            return False
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_all(writing, tasks, 2, stopped))
    assert not [name for name in files(tmp_path) if name != "running"]
