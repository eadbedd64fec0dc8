"""NUMA policies of guest_memfd inodes, as get_mempolicy() tells them; pgemu_kernels.policy goes by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgemu_kernels import layout as L

if TYPE_CHECKING:
    from pgemu.guest_memfd import GuestMemfd

__all__ = ("MemoryPolicy", "policy_at")

_NAMES = {L.MPOL_PREFERRED: "preferred", L.MPOL_BIND: "bind", L.MPOL_INTERLEAVE: "interleave"}


class MemoryPolicy(NamedTuple):
    """mode: "default", "preferred", "bind", "interleave" or "local". nodes: their numbers, ascending."""

    mode: str
    nodes: tuple[int, ...]


def policy_at(gmem: GuestMemfd, offset: int) -> MemoryPolicy:
    """See GuestMemfd.mempolicy."""
    state = gmem.machine.arrays.state
    rows = state[int(L.STATE_POLICIES) :][: L.POLICIES * L.MP_WORDS].reshape(-1, L.MP_WORDS)
    for row in rows[: gmem.machine.register(L.R_POLICIES)]:
        if row[L.MP_LIVE] and row[L.MP_INODE] == gmem.inode and row[L.MP_START] <= offset >> 12 < row[L.MP_END]:
            mask = int(row[L.MP_NODES])
            return _policy(int(row[L.MP_MODE]), tuple(node for node in range(64) if mask >> node & 1))
    return MemoryPolicy("default", ())


def _policy(mode: int, nodes: tuple[int, ...]) -> MemoryPolicy:
    """As mpol_new() keeps it: "preferred" has one node, or none, which is MPOL_LOCAL."""
    if mode != L.MPOL_PREFERRED:
        return MemoryPolicy(_NAMES[mode], nodes)
    return MemoryPolicy("preferred", nodes[:1]) if nodes else MemoryPolicy("local", ())
