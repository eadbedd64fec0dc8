"""One page table of any format: walks, translations, entries."""
