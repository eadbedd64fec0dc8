"""Programs to start from. `python -m pgemu.examples` lists them, `python -m pgemu.examples NAME` runs one.

page_tables    page tables in ten lines: map, walk, unmap, and what must be flushed
nested_walk    a guest's walk through both its tables and stage 2, with every entry that it reads
both_designs   one operation, one VM and one workload on both designs
own_trace      records of one's own, stored as CSV and as Parquet, and compared
tlb            a TLB in front of translations, kept valid by what edits return
own_design     a design of one's own as a row of properties
gem5_mmu       a TLB and a walker in the shape of gem5's, over a guest's tables
njit_tlb       a simulator's compiled loop with a TLB of its own over pgemu.kernels

Each says in its documentation what it prints; tests run them all.
"""
