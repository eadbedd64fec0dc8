"""NUMA policies of guest_memfd inodes, as get_mempolicy() tells them; pgemu_kernels.folios.policy goes by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("MemoryPolicy", "policy_at")

_NAMES = {W.MPOL_PREFERRED: "preferred", W.MPOL_BIND: "bind", W.MPOL_INTERLEAVE: "interleave"}


class MemoryPolicy(NamedTuple):
    """mode: "default", "preferred", "bind", "interleave" or "local". nodes: their numbers, ascending."""

    mode: str
    nodes: tuple[int, ...]


def policy_at(machine: Core, inode: int, offset: int) -> MemoryPolicy:
    """See GuestMemfd.mempolicy."""
    state = machine.arrays.state
    rows = state[int(W.STATE_POLICIES) :][: W.POLICIES * W.MP_WORDS].reshape(-1, W.MP_WORDS)
    for row in rows[: machine.register(W.R_POLICIES)]:
        if row[W.MP_LIVE] and row[W.MP_INODE] == inode and row[W.MP_START] <= offset >> 12 < row[W.MP_END]:
            mask = int(row[W.MP_NODES])
            return _policy(int(row[W.MP_MODE]), tuple(node for node in range(64) if mask >> node & 1))
    return MemoryPolicy("default", ())


def _policy(mode: int, nodes: tuple[int, ...]) -> MemoryPolicy:
    """As mpol_new() keeps it: "preferred" has one node, or none, which is MPOL_LOCAL."""
    if mode != W.MPOL_PREFERRED:
        return MemoryPolicy(_NAMES[mode], nodes)
    return MemoryPolicy("preferred", nodes[:1]) if nodes else MemoryPolicy("local", ())
