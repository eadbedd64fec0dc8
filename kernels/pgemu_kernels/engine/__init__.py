"""Decorators, arrays, rows and counting: what every kernel stands on."""
