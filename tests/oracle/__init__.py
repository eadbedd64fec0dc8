"""Captures of real kernels (tests/data/oracle/README.md) and the tests that hold pgemu against them."""
