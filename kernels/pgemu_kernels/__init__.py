"""Compiled page-table kernels of pgemu: functions over arrays, nothing of pgemu itself.

Importing this package, `layout`, `formats`, `page_format` or `leaves` does not import numba; every other module does.
"""
