"""A guest's program on the machine of one design: what its accesses cost it there, by what the design maps.

The operations run exactly between the accesses that they come between, so that every walk finds stage 2 as it is then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pgemu.guest.options import GuestOptions
from pgemu.guest.processors import Processor
from pgemu.guest.program import GuestBatch, GuestProgram
from pgemu.guest.tlb import Tlb, TlbCounts, flushes_of, lookup_control, run_lookups
from pgemu.machine.results import RESULTS_OF, operation_name
from pgemu.objects.machine import Config, Machine
from pgemu.trace.schema import Operation, Records
from pgemu_kernels import words as W
from pgemu_kernels.words import guest_words as G

__all__ = ("DesignRun", "GuestComparison", "GuestRun", "run_accesses")

Array = np.ndarray[Any, Any]
_OPERATIONS = {int(op): op for op in Operation}


@dataclass(frozen=True)
class GuestRun:
    """What a stream of accesses was on one design's machine.

    Attributes:
        config: the machine's parameters
        counts: of the TLBs
        operations: operations that the machine ran, by name
        failed: those of them that ended with an error, by name and error
        stage2_leaves: leaves of stage 2 at the end, of 4K, 2M and 1G
        cost_ns: what the operations took, (low, high), by the machine's prices
    """

    config: Config
    counts: TlbCounts
    operations: Mapping[str, int]
    failed: Mapping[str, int]
    stage2_leaves: tuple[int, int, int]
    cost_ns: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, ints and floats."""
        return {
            "design": self.config.design, "config": repr(self.config), "tlb": self.counts.to_json(),
            "operations": dict(self.operations), "failed": dict(self.failed),
            "stage2_leaves": dict(zip(("4K", "2M", "1G"), self.stage2_leaves, strict=True)),
            "cost_ns": list(self.cost_ns),
        }  # fmt: skip


@dataclass(frozen=True)
class GuestComparison:
    """A stream of accesses on several machines.

    Attributes:
        runs: by the name that was given to each
        accesses: by what became of them: see GuestMemory.counts
        operations: what was made of them for the machines: see GuestProgram.operations
        processor: whose TLBs they were
        notes: what is assumed, in words
    """

    runs: Mapping[str, GuestRun]
    accesses: Mapping[str, int]
    operations: Mapping[str, int]
    processor: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, ints, floats and strings."""
        return {
            "processor": self.processor, "accesses": dict(self.accesses), "operations": dict(self.operations),
            "runs": {name: run.to_json() for name, run in self.runs.items()}, "notes": list(self.notes),
        }  # fmt: skip


class DesignRun:
    """A machine of one design that runs a guest's program, batch by batch.

    :param config: its parameters; a pool of 0 is made as large as the guest needs
    :param program: whose batches it is given
    :param tlb: TLBs of its vCPUs
    """

    def __init__(self, config: Config, program: GuestProgram, tlb: Tlb) -> None:
        layout = program.layout
        self.config = replace(config, pool=config.pool or layout.inode_size)
        self.program = program
        self.tlb = tlb
        self.machine = Machine(self.config)
        process = self.machine.create_process()
        self.gmem = self.machine.create_guest_memfd(layout.inode_size, shared=not program.options.private)
        kind = None if program.options.private == (config.vm != "plain") else program.options.private
        self.vm = self.machine.create_vm(process, protected=kind)
        self.operations: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        setup = program.setup()
        done = self.machine.run(setup)
        self._note(setup, done.status)
        tlb.words[G.TLB_SEEN] = flushes_of(self.machine)  # nothing was looked up yet

    def feed(self, batch: GuestBatch) -> None:
        """Run a batch's operations, and look its accesses up between them."""
        from pgemu_kernels.run.entries import run_address

        memory, records = self.program.memory, batch.records
        control = lookup_control(
            (0, self.machine.register(W.R_STAGE2_FORMAT)), (self.vm.root, self.vm.private_root), direct=True
        )
        full = bool(self.machine.register(W.R_FULL))
        control[G.LOOK_FULL if full else G.LOOK_RUN] = run_address(full)
        accesses = batch.accesses
        columns = [np.ascontiguousarray(getattr(accesses, name)) for name in ("address", "flags", "actor", "space")]
        status = np.zeros(len(records), np.int64)
        between = (
            batch.at, records.header(), records.object.astype(np.uint64), records.address, records.offset,
            records.length, status, np.zeros(len(records), np.uint64),
        )  # fmt: skip
        while run_lookups(self.tlb, memory.machine, self.machine, control, memory.roots, tuple(columns), (), between):
            first = int(control[G.LOOK_RECORD])
            last = int(np.searchsorted(batch.at, control[G.LOOK_AT], "right"))
            status[first:last] = self.machine.run(records[first:last]).status
            control[G.LOOK_RECORD] = last
        self._note(records, status)

    def _note(self, records: Records, status: Array) -> None:
        for op in np.unique(records.op).tolist():
            name = operation_name(_OPERATIONS[op])
            mine = status[records.op == op]
            self.operations[name] += len(mine)
            bad = mine < 0 if op != Operation.HOST_FAULT else (mine & _VM_FAULT_ERROR) != 0
            if bad.any():
                outcomes = RESULTS_OF[op](mine[bad], np.zeros(int(bad.sum()), np.uint64)).outcomes
                for error, count in outcomes.items():
                    self.failed[f"{name} {error}"] += count

    def result(self) -> GuestRun:
        """What it was by now."""
        stats = self.machine.arrays.stats
        leaves = (self.vm.stage2(private=False).leaf_counts(), self.vm.stage2(private=True).leaf_counts())
        same = self.vm.root == self.vm.private_root
        counts = leaves[0] if same else tuple(a + b for a, b in zip(*leaves, strict=True))
        cost = tuple(int(stats[word]) / 1000 for word in (W.CLOCK_LOW, W.CLOCK_HIGH))
        return GuestRun(self.config, self.tlb.counts, dict(self.operations), dict(self.failed), counts, cost)  # type: ignore[arg-type]

    def write_tables(self) -> None:
        """Write the guest's page tables to the frames of the machine that they lie in, as far as these have frames.

        For translate_nested() and images: the machine itself knows no contents. OSError ENOMEM.
        """
        guest = self.program.memory
        for table in guest.tables.values():
            for pages in table.table_pages().values():
                for gpa in pages.tolist():
                    pfn = self.gmem.pfn(gpa)
                    if pfn is not None:
                        self.machine.write_frame(pfn, guest.machine.words(gpa, 512).tobytes())


_VM_FAULT_ERROR = W.VM_FAULT_OOM | W.VM_FAULT_SIGBUS | W.VM_FAULT_HWPOISON | W.VM_FAULT_SIGSEGV


def run_accesses(
    batches: Iterable[Records], configs: Mapping[str, Config], options: GuestOptions | None = None, *,
    processor: str | Processor = "skylake-sp", vcpus: int = 1,
) -> GuestComparison:  # fmt: skip
    """Run a stream of accesses (records of GUEST_ACCESS) on a machine of each configuration, in one pass.

    vcpus: how many have TLBs of their own; a thread runs on the one of its number modulo these.

    >>> accesses = Records.build(3, op=Operation.GUEST_ACCESS, address=[0x1000, 0x1008, 0x2000])
    >>> found = run_accesses([accesses], {"pfnmap": Config("pfnmap", pool=1 << 30)}, GuestOptions(guest_memory=1 << 30))
    >>> found.runs["pfnmap"].counts
    TlbCounts(3: 2 missed, 7 references)
    """
    program = GuestProgram(options or GuestOptions())
    runs = {name: DesignRun(config, program, Tlb(processor, vcpus=vcpus)) for name, config in configs.items()}
    for records in batches:
        batch = program.feed(records)
        for run in runs.values():
            run.feed(batch)
    name = processor if isinstance(processor, str) else "own"
    tlb = Tlb(processor, vcpus=vcpus)
    results = {name: run.result() for name, run in runs.items()}
    return GuestComparison(results, dict(program.counts), program.operations, name, _notes(program.options, tlb))


def _notes(options: GuestOptions, tlb: Tlb) -> tuple[str, ...]:
    return (
        *options.notes(),
        *(f"TLBs, from {source}" for source in tlb.processor.sources),
        *(f"TLBs, assumed: {what}" for what in tlb.processor.assumed),
        f"TLBs of {tlb.vcpus} vCPUs, a thread always on the same one; no prefetching, no speculation",
        "whatever flushes the VM flushes all its TLBs and caches (INVEPT, or the ASID)",
    )
