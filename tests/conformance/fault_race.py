"""gmem_convert_fault_race: four vCPUs fault on 512 pages while the host converts all of them, to and fro.

Here the threads take turns step by step, in an order that a seed gives, so that a fault can be anywhere when the
conversion's gate looks.
"""

from __future__ import annotations

import random

from conformance.harness import GPA, HVA, PAGE, Scene, case
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

SOURCE = "gmem_convert_fault_race"
VCPUS = 4
PAGES = 512
CONVERTER = 8
GUEST_RESULTS = {W.RET_PF_FIXED, W.RET_PF_SPURIOUS, W.RET_PF_RETRY}
HOST_RESULTS = {0, W.VM_FAULT_LOCKED, W.VM_FAULT_NOPAGE, W.VM_FAULT_RETRY, W.VM_FAULT_SIGBUS}


def race(t: Scene, *, host_faults: bool, rounds: int) -> list[tuple[int, int]]:
    """What the conversions to private returned, the faults running beside them."""
    chance = random.Random(20260922)
    machine = t.machine
    returned = []
    for _ in range(rounds):
        assert t.gmem.convert(0, PAGES * PAGE, shared=True).status == 0
        running = set()
        pages = [chance.randrange(PAGES) for _ in range(VCPUS)]
        for vcpu, page in enumerate(pages):
            if host_faults:
                machine.begin(vcpu, Operation.HOST_FAULT, flags=Flag.WRITE, address=HVA + page * PAGE)
            else:
                machine.begin(vcpu, Operation.GUEST_FAULT, flags=Flag.WRITE, address=GPA + page * PAGE)
            running.add(vcpu)
            for _ in range(chance.randrange(4)):  # ... and it gets somewhere before the conversion begins
                if machine.step(vcpu) == W.STOP:
                    running.discard(vcpu)
                    break
        machine.begin(
            CONVERTER, Operation.CONVERT, flags=Flag.PRIVATE, object_=t.gmem.inode, offset=0, length=PAGES * PAGE
        )
        running.add(CONVERTER)
        while running:
            actor = chance.choice(sorted(running))
            if machine.step(actor) == W.STOP:
                running.discard(actor)
                if actor != CONVERTER:
                    status = machine.result(actor).status
                    assert status in (HOST_RESULTS if host_faults else GUEST_RESULTS | {-W.EFAULT}), status
        returned.append(tuple(machine.result(CONVERTER)))
        if machine.result(CONVERTER).status == 0:  # no fault may have got past it
            for page in pages:
                assert not t.process.walk(HVA + page * PAGE)[-1][2] & 1
        assert machine.check() == 0, machine.broken  # leaves of guests, too
    return returned


def check(t: Scene, host_faults: bool) -> None:
    t.set_up(PAGES * PAGE, shared=True)
    t.machine.check_each(False)  # an invalidation of somebody else may be in progress at any moment
    returned = race(t, host_faults=host_faults, rounds=60)
    assert t.machine.check() == 0, t.machine.broken
    refused = [offset for status, offset in returned if status == -W.EAGAIN]
    assert {status for status, _ in returned} <= {0, -W.EAGAIN}
    assert all(offset % PAGE == 0 and offset < PAGES * PAGE for offset in refused)
    why = "no reference is taken, the entry is made under the invalidate_lock: no fault is ever seen half done"
    assert bool(refused) == t.by_design(True, False, why)


@case(SOURCE)
def test_gmem_convert_fault_race(t: Scene) -> None:
    check(t, host_faults=False)


@case(SOURCE)
def host_faults_against_conversion(t: Scene) -> None:
    """The same with threads of the host, whose references are held until their entry is there."""
    check(t, host_faults=True)
