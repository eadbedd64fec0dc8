"""Lines of any length: whatever a line repeats, twice as much takes no more than about twice as long to read."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fuzzing import Random, attacked, rounds
from mutations import logs
from pgemu.errors import InputError
from pgemu.trace import load

pytestmark = pytest.mark.same_with_checks

CHARACTERS = 30_000
AT_ONCE = 0.1  # seconds: what takes less is not looked at; a pattern that is quadratic takes more than ten times that
WORDS = (
    " ",
    "a",
    "0",
    "(",
    ")",
    "[",
    "<",
    ">",
    ", ",
    ": ",
    "a=1 ",
    ") = 0",
    ") = 0<",
    "= ",
    "\t",
    "0x",
    "-",
    ".",
    "\\",
    '"',
)


def seconds(path: Path, text: str) -> float:
    path.write_text(text, errors="surrogateescape")
    began = time.process_time()
    with suppress(InputError):
        load(path)
    return time.process_time() - began


def changed(random: Random) -> tuple[str, str]:
    """Some lines of a sample, with one that repeats something, and with one that repeats it twice as often."""
    lines = random.choice(logs()).decode("utf-8", "surrogateescape").splitlines(keepends=True) or [""]
    first = random.randrange(len(lines))
    lines = lines[:2] + lines[first : first + random.choice((1, 10))]
    at = random.randrange(len(lines))
    line = lines[at].rstrip("\n")
    tokens = re.findall(r"\s+|\w+|\W", line)
    word = random.choice(WORDS) if random.random() < 0.5 or not tokens else "".join(random.sample(tokens, 1))
    if random.random() < 0.3 and len(tokens) > 3:
        begin = random.randrange(len(tokens) - 2)
        word = "".join(tokens[begin : begin + random.choice((2, 3))])
    place = random.randint(0, len(line))
    found = []
    for count in (CHARACTERS // len(word), 2 * CHARACTERS // len(word)):
        lines[at] = line[:place] + word * count + line[place:] + "\n"
        found.append("".join(lines))
    return found[0], found[1]


def test_twice_as_long_a_line_takes_twice_as_long(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for number, random in rounds("growth", 3):
        with attacked("growth", number):
            once, twice = changed(random)
            long = seconds(path, twice)
            if long > AT_ONCE:  # once more each: the machine may have been busy
                long = min(long, seconds(path, twice))
                short = max(seconds(path, once), seconds(path, once))
                assert long < max(2.5 * short, AT_ONCE), (once[:200], short, long)
