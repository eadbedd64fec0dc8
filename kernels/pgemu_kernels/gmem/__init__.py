"""guest_memfd over HugeTLB: conversions, faults, holes and the end, for every design."""
