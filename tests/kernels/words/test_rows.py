"""No two fields of a row share a word, and each row has room for its fields."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pgemu_kernels.words import registers, rows, table_words

# Rows by the first part of their fields' names, and how many words each has.
ROWS = {
    "R": registers.R_WORD_COUNT, "I": rows.I_WORDS, "A": rows.A_WORDS, "V": rows.V_WORDS, "M": rows.M_WORDS,
    "S": rows.S_WORDS, "B": rows.B_WORDS, "O": rows.O_WORDS, "N": rows.N_WORDS, "P": rows.P_WORDS,
    "PIN": rows.PIN_WORDS, "MP": rows.MP_WORDS, "Q": rows.Q_WORDS, "E": table_words.E_WORDS, "W": table_words.W_WORDS,
}  # fmt: skip


def fields(prefix: str) -> dict[str, int]:
    """Words of a row by the names of its fields."""
    named = {**vars(registers), **vars(rows), **vars(table_words)}
    return {
        name: int(value)
        for name, value in named.items()
        if name.partition("_")[0] == prefix and isinstance(value, np.uint64)
    }


@pytest.mark.parametrize("prefix", ROWS)
def test_each_field_has_a_word_of_its_own(prefix: str) -> None:
    found = fields(prefix)
    assert len(found) > 4
    shared = {word for word, count in Counter(found.values()).items() if count > 1}
    assert {name: word for name, word in found.items() if word in shared} == {}
    assert {name: word for name, word in found.items() if word >= ROWS[prefix]} == {}
