"""Compiled page-table kernels of pgemu: functions over arrays, nothing of pgemu itself.

Importing this package, `layout` or a module that describes entries (`formats`, `page_format`, `iommu_format`,
`leaves`) does not import numba; every other module does.
"""
