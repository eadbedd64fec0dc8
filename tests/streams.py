"""Streams of accesses in tests: taken whole, from a source that gives its bytes in any pieces, and damaged."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from fuzzing import Random, attacked, mutated
from pgemu.errors import InputError
from pgemu.trace import readers
from pgemu.trace.accesses import AccessStream, Tally
from pgemu.trace.schema import Records
from pgemu.trace.source import Source, open_source

__all__ = ("DATA", "Taken", "attack", "in_pieces", "rows", "taken")

DATA = Path(__file__).parent / "data" / "accesses"


class Taken(NamedTuple):
    """A stream that was read to its end, or to what it is refused with."""

    records: Records
    tally: Tally
    refused: str
    stream: AccessStream


class _Pieces(BytesIO):
    """A file that gives its bytes in pieces of the sizes named, over and over."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        super().__init__(data)
        self._sizes, self._reads = sizes, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        return super().read(self._sizes[self._reads % len(self._sizes)])


def in_pieces(data: bytes, sizes: Sequence[int]) -> Source:
    """A source as of a pipe that gives so many bytes at a time."""
    stream: Any = _Pieces(data, sizes)
    return Source("<pieces>", None, stream, stream.read())


def taken(of: Source | Path | bytes, form: str | None = None) -> Taken:
    """What a file holds; `refused` is "" where it is read to its end."""
    if isinstance(of, bytes):
        with tempfile.NamedTemporaryFile() as file:
            file.write(of)
            file.flush()
            return taken(Path(file.name), form)
    stream = readers.read(open_source(of) if isinstance(of, Path) else of, form)
    assert isinstance(stream, AccessStream)
    pieces: list[Records] = []
    refused = ""
    try:
        pieces.extend(stream.batches)
    except InputError as error:
        refused = str(error)
    return Taken(Records.concatenate(pieces), stream.tally, refused, stream)


def rows(records: Records) -> list[tuple[int, int, int]]:
    """Address, flags and actor of each record."""
    return list(zip(records.address.tolist(), records.flags.tolist(), records.actor.tolist(), strict=True))


def attack(
    name: str, samples: Sequence[bytes], form: str | None, found: Iterable[tuple[int, Random]]
) -> dict[str, int]:
    """Read damaged samples, and count how that ends: each is read, or refused in one printable line.

    :param found: rounds()
    """
    ends = {"read": 0, "refused": 0}
    for number, random in found:
        data = mutated(random, random.choice(samples), samples) or b"\n"
        with attacked(name, number):
            try:
                refused = taken(data, form).refused
            except InputError as error:
                refused = str(error)
            assert refused.isprintable()
            assert len(refused) < 1000
            ends["refused" if refused else "read"] += 1
    return ends
