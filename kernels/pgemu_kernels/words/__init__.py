"""The numbers that kernels and Python share: operations, results, events, and who owns which word.

No numba here, so that trace inspection and `--help` need no compiler. A row field `X_NAME` is the index
of a 64-bit word inside row X; rows of one kind lie one after the other. Fields are uint64 because a
kernel that adds an int to a uint64 gets an int64.
"""

from pgemu_kernels.words.broken import *  # noqa: F403
from pgemu_kernels.words.enum_words import *  # noqa: F403
from pgemu_kernels.words.events import *  # noqa: F403
from pgemu_kernels.words.failures import *  # noqa: F403
from pgemu_kernels.words.mapped_pages import *  # noqa: F403
from pgemu_kernels.words.operations import *  # noqa: F403
from pgemu_kernels.words.properties import *  # noqa: F403
from pgemu_kernels.words.registers import *  # noqa: F403
from pgemu_kernels.words.rows import *  # noqa: F403
from pgemu_kernels.words.table_words import *  # noqa: F403
