"""How tests run; Hypothesis profiles: no deadline, first runs compile kernels; CI always draws the same examples."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from hypothesis import settings

from bounds_checks import (
    pytest_runtest_call as pytest_runtest_call,
    pytest_runtest_setup as pytest_runtest_setup,
    pytest_runtest_teardown as pytest_runtest_teardown,
)

pytest_plugins = ("pytester",)  # of tests/test_pytest_plugin.py

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP: programs that tests interrupt would
# inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# A terminal's width folds lines; tests that are about it set it. readline sets it, too, where os.environ does not see.
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many steps test_designs_machine.py does, how long random attacks go on (fuzzing.py)."""
    parser.addoption("--designs-steps", type=int, metavar="N", help="random steps of both designs against the model")
    parser.addoption("--fuzz-seconds", type=float, metavar="N", help="random attacks of each kind, as long as this")


def pytest_configure(config: pytest.Config) -> None:
    steps = config.getoption("--designs-steps", None)
    if steps is not None:
        os.environ["PGEMU_STEPS"] = str(steps)
    seconds = config.getoption("--fuzz-seconds", None)
    if seconds is not None:
        os.environ["PGEMU_FUZZ_SECONDS"] = str(seconds)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What reads kernels' types must compile all of them in this process, and goes first: the others load them."""
    items.sort(key=lambda item: "compiled_entries" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """What is there by now stays: the collector of garbage need not go through it again and again."""
    gc.collect()
    gc.freeze()
