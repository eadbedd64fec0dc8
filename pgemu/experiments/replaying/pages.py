"""Parquet written page by page, of columns that hardly say anything new: numbers that follow one another, one value
again and again, few different ones. Encoding such a page takes next to nothing where a writer of any columns looks at
every value.

A file is row groups, each with a chunk of every column: a page of its dictionary, if it has one, and pages of values,
each compressed by itself. Headers and the footer are Thrift's compact protocol. Sources: Apache Parquet format 2.11,
parquet.thrift and Encodings.md; Apache Thrift, thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = ("Column", "PageFile")

Array = np.ndarray[Any, Any]
_Value = tuple[int, bytes]  # type of Thrift's, and how a value is written

_PLAIN, _RLE, _DELTA, _DICTIONARY = 0, 3, 5, 8  # Encoding
_LZ4_RAW = 7  # CompressionCodec
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2  # PageType
_DELTA_BLOCK, _MINIBLOCKS = 128, 4
_NUMBERED = 256  # numbers below this are their own places in a dictionary

# --------------------------------------------------------------------------- Thrift


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _truth(value: bool) -> _Value:
    return (1 if value else 2), b""


def _i8(value: int) -> _Value:
    return 3, bytes([value])


def _i32(value: int) -> _Value:
    return 5, _zigzag(value)


def _i64(value: int) -> _Value:
    return 6, _zigzag(value)


def _binary(value: bytes) -> _Value:
    return 8, _varint(len(value)) + value


def _list(items: Sequence[_Value]) -> _Value:
    kind, count = items[0][0] if items else 12, len(items)
    head = bytes([count << 4 | kind]) if count < 15 else bytes([0xF0 | kind]) + _varint(count)
    return 9, head + b"".join(value for _, value in items)


def _struct(fields: Mapping[int, _Value]) -> _Value:
    """Fields by their numbers, ascending, none 16 or more behind the one before."""
    out, last = bytearray(), 0
    for number, (kind, value) in fields.items():
        out.append(number - last << 4 | kind)
        out += value
        last = number
    out.append(0)
    return 12, bytes(out)


# --------------------------------------------------------------------------- values


def _packed(places: Array) -> bytes:
    """Places in a dictionary, of uint8 or uint16: as a run where all are one, else as they are."""
    size = places.itemsize
    if int(places.min()) == int(places.max()):
        return bytes([8 * size]) + _varint(places.size << 1) + places[:1].tobytes()
    groups = -(-places.size // 8)
    padding = bytes((groups * 8 - places.size) * size)
    return b"".join((bytes([8 * size]), _varint(groups << 1 | 1), places.tobytes(), padding))


def _consecutive(first: int, count: int) -> bytes:
    """`count` numbers from `first` on, as differences, each of which is 1 and takes no bits."""
    head = b"".join((_varint(_DELTA_BLOCK), _varint(_MINIBLOCKS), _varint(count), _zigzag(first)))
    return head + (_zigzag(1) + bytes(_MINIBLOCKS)) * -(-(count - 1) // _DELTA_BLOCK)


class Column(NamedTuple):
    """A column: of uint64, or of texts; no value is ever missing."""

    name: str
    texts: bool = False

    def element(self) -> _Value:
        """Its SchemaElement."""
        kind = {1: _i32(6 if self.texts else 2), 3: _i32(0), 4: _binary(self.name.encode())}
        integer = _struct({10: _struct({1: _i8(64), 2: _truth(False)})})
        return _struct(
            {**kind, 6: _i32(0 if self.texts else 14), 10: _struct({1: _struct({})}) if self.texts else integer}
        )


class _Chunk:
    """A column's pages of the row group that is under way."""

    def __init__(self, column: Column, codec: Any) -> None:
        self.column, self._codec = column, codec
        self.clear()

    def clear(self) -> None:
        """Begin another row group."""
        self.pages: list[bytes] = []
        self.encodings: set[int] = set()
        self.count = self.plain = self.used = 0  # values, bytes before compression, places in the dictionary
        self.least = self.most = 0

    def page(self, kind: int, count: int, encoding: int, data: bytes) -> bytes:
        """A page, as it is stored."""
        packed: bytes = self._codec.compress(data, asbytes=True)
        about = {1: _i32(count), 2: _i32(encoding)}
        levels = {3: _i32(_RLE), 4: _i32(_RLE)} if kind == _DATA_PAGE else {}  # of which there are none
        own = {5 if kind == _DATA_PAGE else 7: _struct({**about, **levels})}
        head = _struct({1: _i32(kind), 2: _i32(len(data)), 3: _i32(len(packed)), **own})[1]
        self.plain += len(head) + len(data)
        self.encodings.add(encoding)
        return head + packed

    def add(self, values: Array) -> None:
        """Take a page of numbers (uint64[n], n > 0), or of places in the dictionary of texts (uint8[n], uint16[n])."""
        count = values.size
        if self.column.texts:
            encoding, data = _DICTIONARY, _packed(values)
        else:
            first, last = int(values[0]), int(values[-1])
            self.least, self.most = first if not self.count else self.least, last
            if last - first == count - 1 > 0 and last < 1 << 63 and bool((values[1:] > values[:-1]).all()):
                encoding, data = _DELTA, _consecutive(first, count)
            elif (most := int(values.max())) < _NUMBERED:
                encoding, data = _DICTIONARY, _packed(values.astype(np.uint8))
                self.used = max(self.used, most + 1)
            else:
                encoding, data = _PLAIN, values.tobytes()
        self.pages.append(self.page(_DATA_PAGE, count, encoding, data))
        self.count += count

    def dictionary(self, texts: Sequence[str]) -> bytes:
        """The dictionary's page, if there are any places in it."""
        if self.column.texts:
            words = [text.encode() for text in texts]
            data = b"".join(len(word).to_bytes(4, "little") + word for word in words)
            return self.page(_DICTIONARY_PAGE, len(words), _PLAIN, data)
        if not self.used:
            return b""
        return self.page(_DICTIONARY_PAGE, self.used, _PLAIN, np.arange(self.used, dtype="<u8").tobytes())

    def about(self, offset: int, dictionary: bytes, ascending: bool) -> _Value:
        """Its ColumnChunk, of a chunk that begins at `offset`."""
        size = len(dictionary) + sum(map(len, self.pages))
        fields = {
            1: _i32(6 if self.column.texts else 2), 2: _list([_i32(one) for one in sorted(self.encodings)]),
            3: _list([_binary(self.column.name.encode())]), 4: _i32(_LZ4_RAW), 5: _i64(self.count),
            6: _i64(self.plain), 7: _i64(size), 9: _i64(offset + len(dictionary)),
        }  # fmt: skip
        if dictionary:
            fields[11] = _i64(offset)
        if ascending:
            least, most = (value.to_bytes(8, "little") for value in (self.least, self.most))
            fields[12] = _struct({3: _i64(0), 5: _binary(most), 6: _binary(least)})
        return _struct({2: _i64(offset), 3: _struct(fields)})


class PageFile:
    """A file of Parquet while it is written.

    :param columns: of which the first one's numbers ascend: its extremes are noted
    """

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        import pyarrow as pa

        codec = pa.Codec("lz4_raw")
        self._file = file
        self._chunks = [_Chunk(column, codec) for column in columns]
        self._groups: list[_Value] = []
        self._at = self._rows = 0
        self._put(b"PAR1")

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._at += len(data)

    def add(self, *columns: Array) -> None:
        """Take rows, at least one: a page of each column. See _Chunk.add for what arrays they are."""
        for chunk, values in zip(self._chunks, columns, strict=True):
            chunk.add(values)

    def end_group(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Write the row group of all pages since the one before.

        :param texts: dictionaries of the columns of texts
        """
        begin, rows, abouts = self._at, self._chunks[0].count, []
        for chunk in self._chunks:
            dictionary = chunk.dictionary(texts.get(chunk.column.name, ()))
            abouts.append(chunk.about(self._at, dictionary, ascending=chunk is self._chunks[0]))
            for page in (dictionary, *chunk.pages):
                self._put(page)
        plain = sum(chunk.plain for chunk in self._chunks)
        self._groups.append(
            _struct({1: _list(abouts), 2: _i64(plain), 3: _i64(rows), 5: _i64(begin), 6: _i64(self._at - begin)})
        )
        self._rows += rows
        for chunk in self._chunks:
            chunk.clear()

    def finish(self, about: Mapping[str, bytes], writer: str) -> None:
        """Write the footer, with this beside what it says of the columns."""
        columns = [chunk.column for chunk in self._chunks]
        root = _struct({4: _binary(b"schema"), 5: _i32(len(columns))})
        pairs = [_struct({1: _binary(key.encode()), 2: _binary(value)}) for key, value in about.items()]
        order = _struct({1: _struct({})})  # of its type
        footer = _struct(
            {
                1: _i32(2), 2: _list([root, *(column.element() for column in columns)]), 3: _i64(self._rows),
                4: _list(self._groups), 5: _list(pairs), 6: _binary(writer.encode()), 7: _list([order] * len(columns)),
            }
        )[1]  # fmt: skip
        self._put(footer + len(footer).to_bytes(4, "little") + b"PAR1")
