"""The names of the two designs, in the order of their numbers in pgemu_kernels.words."""

from __future__ import annotations

from typing import Literal

Design = Literal["restructure", "pfnmap"]
DESIGNS: tuple[Design, ...] = ("restructure", "pfnmap")
