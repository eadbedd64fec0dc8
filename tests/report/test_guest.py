"""What a program costs a guest, in lines."""

from __future__ import annotations

from pgemu import Config
from pgemu.guest import GuestOptions, run_accesses
from pgemu.report.guest import text
from pgemu.trace.schema import Operation, Records


def test_designs_stand_beside_each_other_with_all_that_is_assumed() -> None:
    records = Records.build(101, op=Operation.GUEST_ACCESS, address=[4096 * (n % 10) for n in range(100)] + [1 << 47])
    found = run_accesses([records], {d: Config(d, vm="sw") for d in ("restructure", "pfnmap")}, GuestOptions(1 << 30))
    lines = text(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "101 accesses of a guest's program, TLBs of skylake-sp"
    assert "  left out: 1 (not canonical)" in lines
    assert "  first touches: 10 4K pages, 4 pages of tables" in lines
    rows = {line[2:32].strip(): line[32:].split() for line in lines if line.startswith("  ")}
    assert rows["missed by all TLBs"] == ["10", "10"]
    # The first miss reads 4 entries of the guest's tables and 2 of stage 2, with a 1G leaf; the others 1 each.
    assert rows["found in first-level TLBs"] == ["90.00%", "90.00%"]
    assert rows["entries read an access"] == ["0.150", "0.150"]
    assert rows["entries read a miss"] == ["1.50", "1.50"]
    assert rows["through 4K entries"] == ["100.0%", "100.0%"]
    said = " ".join(line.strip() for line in lines)
    for note in found.notes:
        assert note in said
