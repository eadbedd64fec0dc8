"""Files appear whole or not at all, with the permissions that a shell would give them, and under the user's name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pgemu import Config, Machine, workload
from pgemu.cost import PROFILES, write_profile
from pgemu.errors import InputError
from pgemu.trace.readers import parquet
from pgemu.whole_file import whole_file

Writer = Callable[[Path], None]


def write_trace(path: Path) -> None:
    parquet.write(workload.open("tdx-boot"), path)


def write_image(path: Path) -> None:
    Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20)).write_image(path)


def write_prices(path: Path) -> None:
    write_profile(replace(PROFILES["guest-2vcpu"], name="here", measured=date(2026, 1, 1)), path)


WRITERS = [write_trace, write_image, write_prices]


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("write", WRITERS)
def test_what_pgemu_writes_has_the_umask_s_mode_or_the_one_it_had(tmp_path: Path, write: Writer) -> None:
    path = tmp_path / "file"
    with umask(0o027):
        write(path)
        assert mode(path) == 0o640
        path.chmod(0o604)
        write(path)
    assert mode(path) == 0o604
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS)
def test_what_pgemu_writes_goes_where_a_link_points(tmp_path: Path, write: Writer) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    for _ in range(2):  # a link to nothing yet, and to a file
        write(link)
        assert link.is_symlink()
        assert (folder / "file").stat().st_size > 100
        assert (sorted(os.listdir(tmp_path)), os.listdir(folder)) == (["link", "there"], ["file"])


@pytest.mark.parametrize("write", WRITERS)
def test_errors_name_the_user_s_path(tmp_path: Path, write: Writer) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("no/file", "", "fifo", "loop", "n" * 300):
        path = tmp_path / name
        before = os.listdir(tmp_path)
        with pytest.raises((InputError, OSError)) as caught:
            write(path)
        error = caught.value
        assert (
            str(path) in (error.file, str(getattr(error, "filename", None)))
            if isinstance(error, InputError)
            else (error.filename == str(path))
        )
        assert ".pgemu" not in str(error)
        assert os.listdir(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    path.chmod(0o444)
    with pytest.raises(PermissionError), whole_file(path) as file:
        file.write(b"x")
    assert path.read_text() == "before"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    permissions=st.integers(0, 0o777).map(lambda bits: bits | 0o200),
    mask=st.integers(0, 0o777),
    there=st.booleans(),
    error=st.sampled_from([None, ValueError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")]),
    data=st.binary(max_size=20),
)
def test_a_file_is_whole_or_as_it_was(
    tmp_path: Path, permissions: int, mask: int, there: bool, error: BaseException | None, data: bytes
) -> None:
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    if there:
        path.write_bytes(b"before")
        path.chmod(permissions)
    caught = None
    with umask(mask):
        try:
            with whole_file(path) as file:
                file.write(data)
                if error:
                    raise error
        except BaseException as found:
            caught = found
    assert type(caught) is type(error)
    if isinstance(caught, OSError):
        assert (caught.filename, caught.strerror) == (str(path), "full")
    assert os.listdir(tmp_path) == (["file"] if there or not error else [])
    if path.exists():
        path_mode = mode(path)
        path.chmod(0o600)
        assert path.read_bytes() == (b"before" if error else data)
        assert path_mode == (permissions if there else 0o666 & ~mask)
