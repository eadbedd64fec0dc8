"""Experiments on several machines: comparisons, scenarios, consumers."""
