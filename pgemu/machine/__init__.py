"""A machine's arrays, registers and running operations; it knows no object."""
