"""`workload:balloon`: a balloon is inflated and deflated: holes, and faults on what comes back.

Captured (QEMU 7.2 with virtio-balloon, Linux 7.3.4, one vCPU each):

- 320 MiB in base pages, balloon to 192 MiB and back: 32,768 pages given back one by one (MADV_DONTNEED of 4096 bytes),
  and 32,768 asked for again, one by one
- 1 GiB of 2M HugeTLB pages with free page reporting: 252 holes of 4 MiB and 30 of 2 MiB (fallocate()); a balloon gives
  a 2M page back only once all of it is in the balloon
- the guest writes to each page that goes into the balloon, for its kernel zeroes what it allocates (Debian's
  init_on_alloc); pages that are only reported as free are not touched

Chosen here, and a parameter where it could be another number:

- `guest_memory`: 320 MiB in one slot, `inflated`: 128 MiB of it, `rounds`: once
- `unit`: 4096, what one hole is; from 2 MiB on these are units of free page reporting, and not touched before
- `scattered`: the share of units that lie anywhere; without it they follow one another from the end of memory down
- memory is shared, as a VM's is that has no private one (`--init private`: a confidential guest's); the guest has used
  all of it, page by page
- deflating asks for nothing; the guest then uses `reused` of what came back, all of it, each page once, ascending
- times: 10 us from one record to the next
"""

from __future__ import annotations

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu.workload.parts import (
    LARGEST,
    Pages,
    checked_number,
    checked_share,
    in_turn,
    made,
    one_slot,
    setup,
    vcpu_uses,
)
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K, Flag, Operation

__all__ = ("NAME", "build")

NAME = "workload:balloon"
MACHINE = {"vcpus": 1}
_MANY = 1 << 24  # pages touched in all
_WRITE = int(Flag.WRITE)


def build(
    seed: int = 0, guest_memory: float = 320 << 20, inflated: float = 128 << 20, unit: float = PAGE_4K,
    rounds: float = 1, reused: float = 1.0, scattered: float = 0.0,
) -> Lowered:  # fmt: skip
    """Return the workload; `seed` chooses the units that lie anywhere, and which pages are used again.

    :param guest_memory: bytes, a multiple of `unit`
    :param inflated: bytes that go into the balloon, a multiple of `unit`
    :param unit: bytes of each hole: 4096, 2 MiB or a multiple of that
    :param rounds: how often it is inflated and deflated
    :param reused: share of the pages that came back which the guest uses again, 0 to 1
    :param scattered: share of the units that lie anywhere in memory, 0 to 1
    :raises InputError: another number, with what was expected
    """
    each = checked_number("unit", unit, PAGE_4K, LARGEST, PAGE_4K, source=NAME)
    if each != PAGE_4K and each % PAGE_2M:
        raise InputError(f"unit {each}: expected {PAGE_4K} or a multiple of {PAGE_2M}", NAME)
    size = checked_number("guest_memory", guest_memory, each, LARGEST, each, source=NAME)
    given = checked_number("inflated", inflated, 0, size, each, source=NAME)
    again = checked_share("reused", reused, source=NAME)
    anywhere = checked_share("scattered", scattered, source=NAME)
    count = checked_number("rounds", rounds, 0, 1 << 20, source=NAME)
    if (touched := (size + 2 * count * given) // PAGE_4K) > _MANY:
        raise InputError(f"rounds {count} touch {touched} pages, expected at most {_MANY}", NAME)
    random = np.random.Generator(np.random.PCG64(seed))
    layout = one_slot(size)
    pieces = [vcpu_uses(np.arange(size // PAGE_4K), _WRITE)]
    for _ in range(count):
        units = _units(random, size // each, given // each, anywhere)
        pieces += [_inflated(units, each), _used(random, units, each, again)]
    return made(setup(layout), pieces, layout, NAME, init="shared", machine=MACHINE)


def _units(random: np.random.Generator, all_of_them: int, count: int, anywhere: float) -> Pages:
    """Those that go into the balloon, in this order: some of the last ones, some anywhere."""
    scattered = round(anywhere * count)
    chosen = np.arange(all_of_them - 1, all_of_them - 1 - (count - scattered), -1)
    others = random.choice(all_of_them - len(chosen), scattered, replace=False)
    return random.permutation(np.concatenate([chosen, others])) if scattered else chosen


def _inflated(units: Pages, each: int) -> Records:
    holes = Records.build(
        len(units), op=Operation.PUNCH_HOLE, actor=FIRST_HOST_ACTOR, offset=units * each, length=each
    )  # fmt: skip
    return holes if each > PAGE_4K else in_turn([vcpu_uses(units, _WRITE), holes])


def _used(random: np.random.Generator, units: Pages, each: int, share: float) -> Records:
    pages = (np.sort(units)[:, None] * (each // PAGE_4K) + np.arange(each // PAGE_4K)).reshape(-1)
    chosen = np.sort(random.permutation(len(pages))[: round(share * len(pages))])
    return vcpu_uses(pages[chosen], _WRITE)
