"""A guest's accesses by virtual address: what of them a machine has to run, and what TLBs make of them."""
