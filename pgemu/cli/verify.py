"""`pgemu verify`: a log of KVM's events, replayed and compared entry by entry."""

from __future__ import annotations

import json
import sys
from typing import Any

import rich_click as click

from pgemu.cli._options import Bar, vm_process

__all__ = ("verify",)


@click.command(short_help="Replay a log of KVM's events, and compare every stage-2 entry that it wrote.")
@click.argument("trace")
@click.option(
    "--kernel", type=click.Choice(["6.12", "6.18", "7.3"]), help="Kernel of the log.  [default: by its frozen entries]"
)
@click.option("--stage2", type=click.Choice(["npt", "ept"]), help="Format of stage 2.  [default: by its tables]")
@click.option(
    "--backing", type=click.Choice(["4K", "thp", "hugetlb-2M", "hugetlb-1G"]),
    help="Memory behind the slots.  [default: by the largest leaf]",
)  # fmt: skip
@click.option(
    "--prove-mmu/--no-prove-mmu", default=None,
    help="CONFIG_KVM_PROVE_MMU, which takes trees apart from 4K on.  [default: by what it printed]",
)  # fmt: skip
@click.option(
    "--nx-huge-pages/--no-nx-huge-pages", default=None, help="kvm.nx_huge_pages, of EPT.  [default: by its leaves]"
)
@click.option(
    "--inferred-inputs/--no-inferred-inputs", default=True, show_default=True,
    help="Take what has no event to have happened where what the log has follows from it.",
)  # fmt: skip
@click.option(
    "--vm-process", "vm_processes", type=vm_process, multiple=True, metavar="PID|all",
    help="The VM, of several in a log.",
)  # fmt: skip
@click.option(
    "--first", type=click.IntRange(min=0), default=10, show_default=True, help="How many differences to show."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(trace: str, first: int, as_json: bool, **options: Any) -> int:
    """Replay what a log says went into KVM, and compare what it says came out with what the model did.

    TRACE is text of ftrace, trace-cmd or perf script, or their recording, with kvm_page_fault and
    kvm_tdp_mmu_spte_changed. Inputs are these faults, slot lines (kvm_memslot, a probe: pgemu compare --help),
    kvm_unmap_hva_range, kvm_vm_set_mem_attributes, page_fault_user, and the VMM's madvise, munmap and fallocate. Each
    kvm_tdp_mmu_spte_changed and kvm_mmu_set_spte is compared: address space, level, gfn, every bit of the old and the
    new entry; frames by what they are, not by number. What the model wrote and the log lacks is a difference, too. The
    order of lines counts where they are of one entry.
    What the log does not say is inferred, and said; --no-inferred-inputs replays what has an event alone.

    Not modelled: several vCPUs of a VM at once, TDs, SEV-SNP, L2 guests, shadow paging.

    Exit status: 0; 1 if an entry differs; 2 for bad input.
    """
    from pgemu.experiments.verification.recording import Options
    from pgemu.experiments.verification.run import document, verify as run
    from pgemu.report.verification import text

    with Bar() as bar:
        found = run(trace, Options(**options), bar)
    if as_json:
        shown = document(found)
        sys.stdout.write(json.dumps(shown | {"first": shown["first"][:first]}, indent=2) + "\n")
    else:
        sys.stdout.write(text(found, first))
    sys.stdout.flush()
    return 1 if found.differences else 0
