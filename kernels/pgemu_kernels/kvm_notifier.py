"""What KVM does when a process's entries, or the pages of a guest_memfd, go: its side of the MMU notifier."""

from __future__ import annotations

from pgemu_kernels.compile import outlined


@outlined
def notify_range(m, space, start, end):
    """A process's virtual addresses [start, end) are about to lose their entries: no VM has slots over them yet."""
    return


@outlined
def notify_inode(m, inode, start, end):
    """Pages [start, end) of a guest_memfd of 4K folios are about to be freed: no VM is bound to them yet."""
    return
