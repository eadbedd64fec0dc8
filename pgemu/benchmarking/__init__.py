"""What benchmarks of pgemu share: controls, machines' counts over a timed call, and how both are shown.

The fixtures of `pgemu.pytest_plugin` stand on it.
"""
