"""A trace of one's own: records made in Python, stored as CSV and as Parquet, run and compared.

What each column means for an operation is in pgemu.trace.COLUMNS; `pgemu compare FILE` and `pgemu replay FILE` take the
same files.

It prints:

    Records(32,802: 32,768 guest fault, 32 convert, 1 mmap, 1 bind)
    the same records: True
    restructure: {'RET_PF_FIXED': 16416, 'RET_PF_SPURIOUS': 16352}, {'ok': 32}
    pfnmap: {'RET_PF_FIXED': 16416, 'RET_PF_SPURIOUS': 16352}, {'ok': 32}
    Results(4: 3 status 0x6, 1 status 0x5; detail=[3 3 3 3])
    {'RET_PF_FIXED': 1, 'RET_PF_SPURIOUS': 3}
"""

import csv
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgemu import Config, Machine, Operation, Records, compare, load

PAGE, MEMORY = 4096, 64 << 20


def rows() -> list[dict[str, int | str]]:
    """A guest that uses 64 MiB, has one page of each 2M made shared, and uses it all again."""
    use: list[dict[str, int | str]] = [{"op": "guest fault", "address": at} for at in range(0, MEMORY, PAGE)]
    shared: list[dict[str, int | str]] = [
        {"op": "convert", "flags": "shared", "offset": at, "length": PAGE} for at in range(0, MEMORY, 2 << 20)
    ]
    return use + shared + use


def stored(folder: Path) -> tuple[Path, Path]:
    """The rows as both formats; the order of the rows is that of `time`, nanoseconds."""
    text, table = folder / "own.csv", folder / "own.parquet"
    made = [
        {"time": time, "flags": "", "address": 0, "offset": 0, "length": 0} | row for time, row in enumerate(rows())
    ]
    with text.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]))
        writer.writeheader()
        writer.writerows(made)
    pq.write_table(pa.Table.from_pylist(made), table)
    return text, table


def main() -> None:
    """Both files are the same trace; and records run on a machine without any file."""
    with tempfile.TemporaryDirectory() as folder:
        traces = [load(path) for path in stored(Path(folder))]
    print(traces[0].records)
    print("the same records:", all(np.array_equal(*(getattr(one.records, name) for one in traces)) for name in COLUMNS))
    comparison = compare(traces[0])
    for run in comparison.runs:
        fault, convert = run.operation(Operation.GUEST_FAULT), run.operation(Operation.CONVERT)
        assert fault is not None and convert is not None  # noqa: PT018
        print(f"{run.design}: {fault.outcomes}, {convert.outcomes}")

    machine = Machine(Config("pfnmap", pool=1 << 30))
    machine.create_vm(protected=True).bind(machine.create_guest_memfd(1 << 30), gpa=0)
    accesses = Records.build(4, op=Operation.GUEST_FAULT, address=[0, 4096, 2 << 20, 4096])
    print(machine.run(accesses))
    print(machine.statistics.as_dict()["operations"]["guest fault"]["outcomes"])


COLUMNS = ("op", "flags", "address", "offset", "length")

if __name__ == "__main__":
    main()
