"""Programs that use pgemu: run one with `python -m pgemu.examples.NAME`."""
