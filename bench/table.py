"""What README.md tells of benchmarks, printed from pytest-benchmark's JSON; see README.md beside this file.

pytest bench --readme --benchmark-json=FILE
python -m bench.table FILE            print it
python -m bench.table FILE --store    put it into README.md, and its figures into tests/data/bench/readme.json
--force stores figures of a machine that was busy, too
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pgemu.errors import InputError
from pgemu.whole_file import whole_file

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
STORED = ROOT / "tests" / "data" / "bench" / "readme.json"
HEADING = "## What it costs"
FOOTPRINT, PAGE_SIZE = "16G", "1G"
WIDTH = 120
UNEVEN = 1.5  # a control that differs more between designs, for which it does the same, tells of a busy machine
DESIGNS, ORDERS = ("restructure", "pfnmap"), ("sequential", "random")

ROWS = {
    "host fault": "test_fault.py::test_host_fault",
    "guest fault": "test_fault.py::test_guest_fault",
    "convert to private, nothing mapped": "test_convert.py::test_to_private",
    "convert to private, mapped by both": "test_convert.py::test_mapped_to_private",
}
SPLIT = "test_split.py::test_split_and_merge[1G-"
BOOT = "test_boot.py::test_boot[1T-"
PLAIN, NESTED = "test_translate.py::test_plain[", "test_nested.py::test_nested["
CONTROLS = (
    "test_fault.py::test_control",
    "test_convert.py::test_control",
    "test_split.py::test_control[1G-",
    "test_translate.py::test_gather[random",
    "test_translate.py::test_c[sequential",
)
KEPT = ("operations", "role", "design", "page_size", "order", "footprint", "ratio_to_control", "modelled_ns")
_BRAND = re.compile(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core\b", re.IGNORECASE)


def wanted(file: str, name: str) -> bool:
    """Whether a test is one of those that the table is made of."""
    return f"{file}::{name}".startswith((*ROWS.values(), SPLIT, BOOT, PLAIN, NESTED, *CONTROLS))


class Benchmarks:
    """The benchmarks of a file of pytest-benchmark's, and the machine that they ran on."""

    def __init__(self, path: Path) -> None:
        self._file = str(path)
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"no JSON: {error}"
            raise InputError(str(reason), self._file) from None
        try:
            self.cpu: dict[str, Any] = document["machine_info"]["cpu"]
            self._found = [self._kept(bench) for bench in document["benchmarks"]]
        except (KeyError, TypeError, AttributeError):
            raise InputError("expected what pytest --benchmark-json writes", self._file) from None

    @staticmethod
    def _kept(bench: dict[str, Any]) -> dict[str, Any]:
        info = {key: value for key, value in bench["extra_info"].items() if key in KEPT}
        name = bench["fullname"].rpartition("/")[2]
        return {"fullname": name, "extra_info": info, "stats": {"median": float(bench["stats"]["median"])}}

    def of(self, start: str, **properties: str) -> list[dict[str, Any]]:
        """Those whose names begin so and which have these properties; InputError if there are none."""
        found = [
            bench
            for bench in self._found
            if bench["fullname"].startswith(start) and properties.items() <= bench["extra_info"].items()
        ]
        if not found:
            what = ", ".join((start.rstrip("["), *properties.values()))
            raise InputError(f"no benchmark {what}: expected those of pytest bench --readme", self._file)
        return found

    def uneven(self) -> str | None:
        """The control whose rates with each design differ most, if by more than UNEVEN; it is the same for both."""
        medians: dict[str, list[float]] = {}
        for bench in self._found:
            info = bench["extra_info"]
            if info.get("role") == "control" and (design := info.get("design")):
                medians.setdefault(bench["fullname"].replace(design, "*"), []).append(bench["stats"]["median"])
        factor, name = max(((max(found) / min(found), name) for name, found in medians.items()), default=(1.0, ""))
        if factor <= UNEVEN:
            return None
        return (
            f"{name}: the control took {factor:.1f} times as long with one design as with the other, so the machine "
            "was busy: columns of designs cannot be compared"
        )

    def ratios(self, found: Iterable[dict[str, Any]]) -> list[float]:
        """Of rates to that of the control; InputError without one."""
        try:
            return [bench["extra_info"]["ratio_to_control"] for bench in found]
        except KeyError:
            raise InputError("a benchmark has no ratio to its control: was there a C compiler?", self._file) from None

    def stripped(self) -> str:
        """JSON with what the table needs."""
        flags = [flag for flag in self.cpu.get("flags", []) if flag == "hypervisor"]
        cpu = {"brand_raw": self.cpu.get("brand_raw", ""), "count": self.cpu.get("count", 0), "flags": flags}
        found = [bench for bench in self._found if wanted(*bench["fullname"].split("::"))]
        return json.dumps({"machine_info": {"cpu": cpu}, "benchmarks": found}, indent=1) + "\n"


def machine(cpu: dict[str, Any]) -> str:
    """ "2-core AMD EPYC virtual machine"."""
    brand = " ".join(_BRAND.sub("", cpu.get("brand_raw", "")).split()[:3]) or "unknown"
    kind = "virtual machine" if "hypervisor" in cpu.get("flags", ()) else "machine"
    return f"{cpu.get('count', '?')}-core {brand} {kind}"


def number(value: float) -> str:
    """Two digits, as many as there are in front of the point: "4.2", "23", "135"."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def between(values: Iterable[float], digits: int | None = None) -> str:
    """ "1.3", or "1.2 to 1.4" where they differ."""
    texts = [number(value) if digits is None else f"{value:.{digits}f}" for value in sorted(values)]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def rates(found: Iterable[dict[str, Any]]) -> list[float]:
    """Million operations a second."""
    return [bench["extra_info"]["operations"] / bench["stats"]["median"] / 1e6 for bench in found]


def milliseconds(found: Iterable[dict[str, Any]]) -> list[float]:
    return [bench["stats"]["median"] * 1e3 for bench in found]


def cell(benchmarks: Benchmarks, start: str, design: str) -> str:
    """ "23 (0.05) / 10 (0.06)": in order, then in random order."""
    parts = []
    for order in ORDERS:
        found = benchmarks.of(start, design=design, order=order, footprint=FOOTPRINT, page_size=PAGE_SIZE)
        parts.append(f"{between(rates(found))} ({between(benchmarks.ratios(found), 2)})")
    return " / ".join(parts)


def section(benchmarks: Benchmarks) -> Iterator[str]:
    """The lines below the heading."""
    yield from textwrap.wrap(
        f"Million operations a second of the emulator on a core of a {machine(benchmarks.cpu)}, counted and priced "
        "(medians of `pytest bench --readme`, 1G pages, 4K at a time); in parentheses the ratio to a walk and store.",
        WIDTH,
    )
    yield ""
    yield f"| operation over 16 GiB (sequential / random) | {' | '.join(DESIGNS)} |"
    yield "| --- | --- | --- |"
    for name, start in ROWS.items():
        yield f"| {name} | {' | '.join(cell(benchmarks, start, design) for design in DESIGNS)} |"
    yield ""
    split, boot = benchmarks.of(SPLIT), benchmarks.of(BOOT)
    walks = [benchmarks.of(f"{PLAIN}{order}") for order in ORDERS]
    sequential, random = ((between(rates(one)), between(benchmarks.ratios(one), 2)) for one in walks)
    yield from textwrap.wrap(
        f"A 1G folio splits and merges in {between(milliseconds(split))} ms ({between(benchmarks.ratios(split), 1)} of "
        f"a C loop's rate), a 1 TiB pool boots in {between(milliseconds(boot))} ms. Walks: {random[0]} M/s random over "
        f"2^22 pages ({random[1]} of a gather), {sequential[0]} in order ({sequential[1]} of C); nested, 24 "
        f"references, {between(rates(benchmarks.of(NESTED)))}.",
        WIDTH,
    )


def replaced(readme: str, lines: Iterable[str]) -> str:
    """README.md's text with these lines below the heading. InputError if the heading is not there once."""
    before, *rest = readme.split(f"\n{HEADING}\n")
    if len(rest) != 1:
        raise InputError(f"expected the heading {HEADING!r} once", "README.md")
    after = rest[0][rest[0].index("\n## ") :] if "\n## " in rest[0] else ""
    return "\n".join((before, HEADING, "", *lines, after))


def main(arguments: list[str]) -> int:
    """Print the section, or store it; 2 and one line on stderr for what cannot be done."""
    store, force = "--store" in arguments, "--force" in arguments
    paths = [argument for argument in arguments if argument not in ("--store", "--force")]
    if len(paths) > 1 or any(path.startswith("-") for path in paths):
        print("usage: python -m bench.table [JSON] [--store [--force]]", file=sys.stderr)
        return 2
    try:
        benchmarks = Benchmarks(Path(paths[0]) if paths else STORED)
        lines = list(section(benchmarks))
        if uneven := benchmarks.uneven():
            print(uneven, file=sys.stderr)
            if store and not force:
                raise InputError("not stored: expected even controls, or --force", paths[0] if paths else str(STORED))
        if store:
            text = replaced(README.read_text(), lines)
            for path, contents in ((STORED, benchmarks.stripped()), (README, text)):
                with whole_file(path) as file:
                    file.write(contents.encode())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
