"""Rounds of random attacks: some seconds in CI, as long as `--fuzz-seconds` (PGEMU_FUZZ_SECONDS) says elsewhere.

Rounds are numbered and each has its own random numbers: PGEMU_FUZZ_FIRST begins at another one, and a failure names its
round. Long runs begin wherever they like; CI always does the same.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ("Random", "attacked", "mutated", "rounds")

Random = random.Random
_SECONDS = 3.0
_LEAST = 20  # rounds, however slow
_LARGE = [0, 1, 7, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 52, 1 << 63, (1 << 64) - 1]


def rounds(name: str, seconds: float = _SECONDS, least: int = _LEAST) -> Iterator[tuple[int, Random]]:
    """Yield the number and the random numbers of each round, until time is up; at least some.

    :param seconds: without PGEMU_FUZZ_SECONDS
    :param least: rounds, however long they take
    """
    first = number = int(os.environ.get("PGEMU_FUZZ_FIRST", "0"))
    end = time.monotonic() + float(os.environ.get("PGEMU_FUZZ_SECONDS", seconds))
    while number < first + least or time.monotonic() < end:
        yield number, Random(f"{name} {number}")
        number += 1
    print(f"{name}: {number - first} rounds")


@contextmanager
def attacked(name: str, number: int) -> Iterator[None]:
    """Name the round in which something fails."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"{name}: round {number} (PGEMU_FUZZ_FIRST={number})")
        raise


def mutated(chance: Random, data: bytes, others: Sequence[bytes] = (), within: int | None = None) -> bytes:
    """Data with up to eight things wrong: bits, bytes and words, what is missing, repeated, too much, or from others.

    :param within: what is changed begins within so many bytes
    """
    found = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        end = min(len(found), within or len(found))
        at = chance.randrange(end) if end else 0
        what = chance.randrange(9)
        if what == 0 and found:
            found[at] ^= 1 << chance.randrange(8)
        elif what == 1 and found:
            found[at] = chance.randrange(256)
        elif what in (2, 3):
            size = chance.choice((2, 4, 8))
            at &= -size
            value = chance.choice(_LARGE) if chance.random() < 0.7 else chance.getrandbits(64)
            found[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")[: max(0, len(found) - at)]
        elif what == 4:
            found[at : at + chance.choice((1, 8, 64, 4096))] = b""
        elif what == 5:
            del found[at : len(found) if chance.random() < 0.2 else at + 1]
        elif what == 6:
            found[at : at + 64] = bytes(min(64, len(found) - at))
        elif what == 7:
            piece = found[at : at + chance.choice((1, 8, 56, 64))]
            found[at:at] = piece * chance.choice((1, 2, 16))
        elif others:
            other = chance.choice(others)
            start = chance.randrange(len(other)) if other else 0
            piece = other[start : start + chance.choice((4, 8, 64))]
            found[at : at + len(piece)] = piece
    return bytes(found)
