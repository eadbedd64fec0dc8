"""Stand-ins for the tools that record, as scripts on PATH."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgemu.errors import InputError
from pgemu.recording.tools import TOOLS, Way, choose

# Each notes its arguments. Recorders write what they were asked for, run the command and exit as it does.
_TEXT = """#!/bin/sh
echo "{tool} $*" >> {log}
{fail}
while :; do
    case $1 in
        -o) out=$2; shift 2;;
        --log-fd=*) out=/dev/fd/${{1#*=}}; shift;;
        -e) shift 2;;
        -*) shift;;
        *) break;;
    esac
done
echo 'first {tool}' > $out
"$@"
status=$?
echo 'last {tool}' >> $out
exit $status
"""
_BINARY = """#!/bin/sh
echo "{tool} $*" >> {log}
{fail}
case $1 in
    record)
        shift
        while :; do
            case $1 in
                -o) out=$2; shift 2;;
                -e) events="$events $2"; shift 2;;
                --) shift; break;;
                -c) case $2 in 1) shift 2;; *) shift;; esac;;
                -*) shift;;
                *) break;;
            esac
        done
        echo "recorded $events" > $out
        "$@";;
    *)
        [ -n "{unprintable}" ] && {{ echo 'bad magic' >&2; exit 1; }}
        while [ $# -gt 0 ]; do [ "$1" = -i ] && read text < $2; shift; done
        echo "printed: $text";;
esac
"""


class Fakes:
    """A PATH with nothing but tools that were made here."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        monkeypatch.setenv("PATH", str(self.bin))
        self.add("true", "#!/bin/sh\n")

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def tool(self, tool: str, *, fail: str = "", unprintable: bool = False) -> None:
        """A tool that works, or does `fail` in place of recording."""
        text = _BINARY if tool in ("perf", "trace-cmd") else _TEXT
        self.add(tool, text.format(tool=tool, log=self.log, fail=fail, unprintable=unprintable or ""))

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """A PATH with nothing on it but what a test puts there."""
    return Fakes(tmp_path, monkeypatch)


def way_or_skip(tool: str) -> Way:
    """How the installed tool records here; the test is skipped where it does not."""
    assert tool in TOOLS
    try:
        return choose(tool)
    except InputError as error:
        pytest.skip(str(error))
