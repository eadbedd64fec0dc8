"""A process's memory: VMAs, entries, system calls, faults."""
