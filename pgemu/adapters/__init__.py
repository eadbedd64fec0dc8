"""pgemu behind the interfaces of other simulators."""
