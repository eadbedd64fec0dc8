"""What other tools and the kernel record, as the files that pgemu reads."""
