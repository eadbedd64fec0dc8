"""Entry formats and struct pages as data."""
