"""`pgemu compare`: options, output, errors, exit statuses."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import rich_click as click
from click.testing import CliRunner, Result

from announcement import complaints
from pgemu.cli import main
from pgemu.machine.config import DEFECTS
from pgemu.objects.machine import Machine
from pgemu_kernels import words as W

# `pgemu.cli.compare` as an attribute is the command.
command = import_module("pgemu.cli.compare")

# Shared from gfn 0x10 on for one page; touched before and after, by the host too.
LOG = """\
# tracer: nop
 vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=4 gpa=0x0 size=0x400000 hva=0x7f0000000000
 CPU 0/KVM-10 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000000010000 error_code 0x2
 vmm-9 [000] ..... 1.000003: kvm_vm_set_mem_attributes: 0x0000000000000010 -- 0x0000000000000011 [0x0]
 vmm-9 [000] ..... 1.000004: page_fault_user: address=0x7f0000010000 ip=0x1 error_code=0x6
 CPU 0/KVM-10 [000] ..... 1.000005: kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000000010000 error_code 0x2
 CPU 0/KVM-10 [000] ..... 1.000006: kvm_exit: reason 1
"""


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "small.txt"
    path.write_text(LOG)
    return str(path)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["compare", *args])


def document(*args: str) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    result = invoke(*args, "--format", "json", "--no-sensitivity", "--page-size", "2M")
    assert result.exit_code == 0, result.output
    assert complaints(result.stderr) == ""
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("details", [True, False])
def test_the_first_screen_and_tables_go_to_stdout_and_nothing_else(log: str, details: bool) -> None:
    result = invoke(log, "--page-size", "2M", *["--details"] * details)
    assert result.exit_code == 0, result.output
    assert complaints(result.stderr) == ""
    assert "conversions, time" in result.stdout
    assert ("What every operation returned" in result.stdout) == details
    assert "\x1b" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_both_designs_and_all_records_are_in_the_document(log: str) -> None:
    found = document(log)
    assert set(found["designs"]) == {"restructure", "pfnmap"}
    # Setup maps the memory; then a slot, two guest faults, a conversion and a host fault.
    assert found["trace"]["records"] == 6
    for design in found["designs"].values():
        assert design["count"] == 6
        assert sum(op["count"] for op in design["operations"].values()) == 6


def test_the_document_is_the_same_each_time(log: str) -> None:
    options = (log, "--format", "json")
    assert invoke(*options).stdout == invoke(*options).stdout


def test_options_reach_the_machine(log: str) -> None:
    options = "--no-hvo --kernel 6.12 --stage2 ept --vcpus 4 --host-cpus 64 --zero page --seed 3 --check 2"
    found = document(log, *options.split(), "--design", "pfnmap", "--guest-memory", "8M")
    assert list(found["designs"]) == ["pfnmap"]
    machine = {"pool": 8 << 20, "page_size": 2 << 20, "kernel": "6.12", "stage2": "ept", "hvo": False}
    machine |= {"vcpus": 4, "host_cpus": 64, "zero": "page", "seed": 3, "profile": "published"}
    assert machine.items() <= found["machines"]["pfnmap"].items()
    assert found["check"] == 2


def test_orders_reach_the_machine(log: str) -> None:
    options = "--order rfc2 --batch block --merge lazy --flush batched --worker queued --split-to 2M --host-huge"
    defects = "--lru-cache --defect rollback-at-zero --defect allocation-race --defect rollback-at-zero"
    found = document(log, *options.split(), *defects.split())["machines"]["restructure"]
    expected = {
        "order": "rfc2",
        "split_form": "jan2026",
        "batch": "block",
        "merge": "lazy",
        "flush": "batched",
    }
    expected |= {"worker": "queued", "split_to": "2M"}
    assert expected.items() <= found.items()
    assert (found["host_huge"], found["lru_cache"]) == (True, True)
    assert found["defects"] == ["allocation-race", "rollback-at-zero", "uptodate-unzeroed"]
    assert tuple(sorted(DEFECTS)) == import_module("pgemu.cli._options")._DEFECTS


def test_a_split_form_does_the_same_to_pages_in_another_way(log: str) -> None:
    """The small log converts one page of a huge page in use: rfc2 splits it page by page."""
    first, second = (
        document(log, "--split-form", form)["designs"]["restructure"]["state"] for form in ("rfc2", "jan2026")
    )
    assert {name for name, value in first.items() if second[name] != value} == {"struct_page_bytes", "stores_irq_off"}
    assert (first["stores_irq_off"], second["stores_irq_off"]) == (0, 512)
    assert second["struct_page_bytes"] - first["struct_page_bytes"] == 511 * (44 - 24)


def test_what_comes_together_is_that_of_the_version(log: str) -> None:
    machines = document(log, "--like", "rfc2", "--as-posted", "--pfnmap", "slides2025")["machines"]
    rfc2 = {"order": "rfc2", "split_form": "rfc2", "batch": "range", "zero": "folio", "punch": "zero"}
    assert rfc2.items() <= machines["restructure"].items()
    assert machines["restructure"]["defects"] == [
        "allocation-race",
        "convert-keeps-leaves",
        "cut-huge-pfn",
        "hole-zeroes-from-start",
        "merge-keeps-flag",
        "rollback-at-zero",
    ]
    assert machines["pfnmap"]["defects"] == ["cut-huge-pfn", "insert-unlocked", "punch-keeps-entries"]
    assert machines["pfnmap"]["punch"] == "zero"


@pytest.mark.parametrize("options", [["--like", "next"], ["--like", "dec2025", "--page-size", "4K"]])
def test_4k_pages_are_those_of_next_and_of_others_when_asked_for(log: str, options: list[str]) -> None:
    result = invoke(log, *options, "--no-sensitivity")
    assert result.exit_code == 0, result.output
    assert "in pages of 4 KiB" in " ".join(result.stdout.split())
    assert f"restructure like {options[1]} (" in result.stdout


def test_what_a_version_refuses_is_done_and_said_or_with_strict_the_result(log: str) -> None:
    options = (log, "--page-size", "2M", "--init", "shared", "--no-sensitivity")
    done, strict = (invoke(*options, *more) for more in ([], ["--strict"]))
    assert done.exit_code == strict.exit_code == 0, strict.output
    refusal = "dec2025 refuses huge pages that are shared at first (-EINVAL)"
    assert f"{refusal}: created as rfc2 does" in " ".join(done.stdout.split())
    assert f"restructure: {refusal}" in " ".join(strict.stdout.split())
    assert "created as rfc2 does" not in strict.stdout
    assert document(*options[:1], "--init", "shared", "--strict")["designs"]["restructure"]["count"] == 0


def test_what_is_mixed_by_hand_is_one_line(log: str) -> None:
    result = invoke(log, "--page-size", "2M", "--order", "rfc2", "--zap", "rounded", "--no-sensitivity")
    assert "\nmixed by hand: order rfc2, zap rounded\n" in result.stdout
    assert "mixed by hand" not in invoke(log, "--page-size", "2M", "--order", "fixup", "--no-sensitivity").stdout


def test_next4k_wants_4k_pages(log: str) -> None:
    result = invoke(log, "--page-size", "2M", "--order", "next4k")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "next4k" in result.stderr


def test_a_repeated_design_runs_once(log: str) -> None:
    assert list(document(log, "--design", "pfnmap", "--design", "pfnmap")["designs"]) == ["pfnmap"]


def test_init_changes_what_the_guest_finds(log: str) -> None:
    assert document(log)["trace"]["init"] == "private"
    assert document(log, "--init", "shared")["trace"]["init"] == "shared"


def test_given_slots_replace_the_traces(log: str) -> None:
    memory = document(log, "--memslot", "0:2M:2M")["trace"]["memory"]
    assert [(slot["gpa"], slot["size"], slot["offset"]) for slot in memory["slots"]] == [  # type: ignore[index]
        (0, 2 << 20, 2 << 20)
    ]


def test_given_slots_may_say_where_their_host_memory_is(log: str) -> None:
    memory = document(log, "--memslot", "0:2M::0x7f3a40000000")["trace"]["memory"]
    assert [(slot["gpa"], slot["offset"], slot["hva"]) for slot in memory["slots"]] == [  # type: ignore[index]
        (0, 0, 0x7F3A40000000)
    ]


def test_sources_are_in_the_document_when_asked_for(log: str) -> None:
    assert "sources" not in document(log)
    assert "prices_ns" in document(log, "--sources")["sources"]


def test_without_a_trace_the_shipped_one_runs() -> None:
    result = invoke("--format", "json", "--design", "pfnmap")
    found = json.loads(result.stdout)
    assert found["trace"]["source"] == "vm-convert-swprot.ftrace.txt.xz (comes with pgemu)"
    assert found["designs"]["pfnmap"]["operations"]["guest fault"]["count"] == 16825
    assert found["designs"]["pfnmap"]["operations"]["convert"]["count"] == 445


def test_a_workload_runs_by_its_name() -> None:
    found = json.loads(invoke("workload:tdx-boot", "--format", "json", "--design", "pfnmap").stdout)
    assert found["designs"]["pfnmap"]["count"] == found["trace"]["records"] == 10136
    assert found["designs"]["pfnmap"]["operations"]["convert"]["count"] > 1000


@pytest.mark.same_with_checks
@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["no-such-file"], "no-such-file: no such file"),
        (["workload:none"], "workload:none: no such workload"),
        (["--page-size", "3M"], "'3M' is not one of '4K', '2M', '1G'"),
        (["--guest-memory", "much"], "'much': expected a size or an address like 16G"),
        (["--guest-memory", "4P"], "'4P': expected a size"),
        (["--guest-memory", "3M"], "3145728 bytes is not a multiple of the page size"),
        (["--guest-memory", "4000T"], "more than this computer can model"),
        (["--memslot", "0"], "'0': expected GPA:SIZE or GPA:SIZE:OFFSET"),
        (["--memslot", "0:0"], "'0:0': expected GPA:SIZE"),
        (["--memslot", "1:4K"], "GPA:SIZE:[OFFSET]:HVA, multiples of 4K"),
        (["--memslot", "0:4K:"], "'0:4K:': expected GPA:SIZE or GPA:SIZE:OFFSET or GPA:SIZE:[OFFSET]:HVA"),
        (["--memslot", "0:4K::1"], "'0:4K::1': expected GPA:SIZE"),
        (["--memslot", "0:4K:::4K"], "'0:4K:::4K': expected GPA:SIZE"),
        (["--memslot", "0:"], "'': expected a size"),
        (["--memslot", "0:1M"], "lies outside the given memory slots"),
        (["--check", "0"], "'0': expected end, every, or a number"),
        (["--check", "-1"], "'-1': expected end, every, or a number"),
        (["--vcpus", "0"], "0 is not in the range"),
        (["--design", "folio"], "design 'folio': expected one of restructure, pfnmap"),
        (["--kernel", "5.4"], "'5.4' is not one of"),
        (["--like", "v3"], "'v3' is not one of 'rfc2', 'dec2025', 'jan2026', 'next'"),
        (["--pfnmap", "slides"], "'slides' is not one of 'corrected', 'slides2025'"),
        (["--like", "next", "--page-size", "2M"], "pages of 2M: next knows pages of 4K only"),
        (["--like", "next", "--page-size", "1G"], "pages of 1G: next knows pages of 4K only"),
        (["workload:tdx-boot", "--overlap", "1.5"], "1.5 is not in the range 0<=x<=1"),
        (["--overlap", "0.5"], "overlap"),
        (["--vary", "like"], "--vary like: expected a value behind each comma"),
        (["--vary", "design=pfnmap"], "--vary design=pfnmap: expected OPTION=A,B with one of accesses, allow-"),
        (["--vary", "like=rfc2", "--design", "pfnmap"], "--vary: expected two designs to compare"),
        (["--vary", "speed=1,2"], "--vary speed=1,2: expected OPTION=A,B with one of "),
        (["--vary", "like=rfc2,v3"], "--vary like=rfc2,v3: 'v3' is not one of"),
        (["--vary", "like=rfc2,"], "--vary like=rfc2,: expected a value behind each comma"),
        (["--vary", "like=rfc2", "--vary", "like=next"], "--vary like=next: like varies already"),
        (["--vary", "vcpus=1,2", "--vcpus", "3"], "--vary vcpus=...: expected no --vcpus beside it"),
        (["--vary", "seed=" + ",".join(map(str, range(65)))], "--vary: 65 combinations, expected at most 64"),
        (["--nonsense"], "No such option"),
        (["a", "b"], "unexpected extra argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], complaint: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("pgemu: ")
    assert result.stderr.count("\n") == 1
    assert complaint in result.stderr


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_text(LOG[: LOG.index("error_code")])
    result = invoke(str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"pgemu: {path}:3: ")


def test_broken_invariants_are_told_and_exit_with_1(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Machine.run

    def corrupt(self: Machine, records: object) -> object:
        self.arrays.stats[int(W.STATS_GAUGES) + 2 * W.Gauge.STAGE2_LEAVES_4K] += 1
        return run(self, records)  # type: ignore[arg-type]

    monkeypatch.setattr(Machine, "run", corrupt)
    result = invoke(log, "--page-size", "2M", "--no-sensitivity", "--details")
    assert result.exit_code == 1, result.output
    lines = complaints(result.stderr).splitlines()
    assert [line.split(": ")[:3] for line in lines] == [
        ["pgemu", "broken invariant", design] for design in ("restructure", "pfnmap")
    ]
    assert "Broken invariants" in result.stdout


def test_an_interrupt_is_quiet(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Machine, records: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(Machine, "run", interrupt)
    result = invoke(log)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert complaints(result.stderr).strip() == "pgemu: interrupted"


@pytest.mark.parametrize(
    ("text", "size"),
    [("16G", 16 << 30), ("2m", 2 << 20), ("512MiB", 512 << 20), ("0x1000", 4096), ("4096", 4096), ("0x10k", 16384)],
)
def test_sizes(text: str, size: int) -> None:
    assert import_module("pgemu.cli._options").size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "0x", "1P", "9999999999T"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a size"):
        import_module("pgemu.cli._options").size(text)


def test_an_interrupt_while_effects_are_looked_for_shows_what_is_known(
    log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    whole = invoke(log, "--page-size", "2M", "--strict").stdout
    monkeypatch.setattr("pgemu.experiments.effects.run", interrupt)
    result = invoke(log, "--page-size", "2M", "--strict", "--like", "rfc2", "--design", "restructure")
    assert result.exit_code == 0
    assert "without effect here" in whole
    assert "without effect here" not in result.stdout
    assert "conversions, time" in result.stdout


def test_options_without_effect_are_named_whether_of_the_machine_the_trace_or_the_run(log: str) -> None:
    options = "--page-size 2M --worker queued --strict --dontneed zap --tdx-shared-bit none --as-posted --like next"
    text = invoke(log, *options.replace("2M", "4K").split()).stdout
    line = next(line for line in text.splitlines() if line.startswith("without effect here: "))
    assert line == "without effect here: --worker, --as-posted, --strict, --dontneed,"
    assert "\n  --tdx-shared-bit\n" in text
    assert "without effect here: --" not in invoke(log, "--page-size", "2M", "--no-hvo").stdout


def test_what_a_log_s_options_change_is_not_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "td.txt"
    fault = "kvm_page_fault: vcpu 0 rip 0x0 address {:#x} error_code 0x782"
    lines = [fault.format(1 << 32), fault.format(1 << 47 | 1 << 32)]
    path.write_text("".join(f"a-1 [000] ..... 1.000000: {line}\n" for line in lines))
    for bit, idle in (("47", True), ("51", False), ("none", False)):
        text = invoke(str(path), "--page-size", "2M", "--tdx-shared-bit", bit).stdout
        assert ("without effect here: --tdx-shared-bit" in text) == idle, bit


@pytest.mark.parametrize(
    ("check", "said"), [("1", True), ("10", True), ("100", False), ("every", False), ("end", False)]
)
def test_many_recounts_are_announced(tmp_path: Path, check: str, said: bool) -> None:
    path = tmp_path / "log.txt"
    lines = [
        f"a-1 [000] ..... 1.000000: kvm_page_fault: vcpu 0 rip 0x0 address {n << 12:#x} error_code 0x782\n"
        for n in range(500)
    ]
    path.write_text("".join(lines * 24))
    result = invoke(str(path), "--page-size", "2M", "--no-sensitivity", "--check", check)
    assert result.exit_code == 0
    assert (f"pgemu: --check {check}: each machine is recounted 12,0" in result.stderr) == (said and check == "1")
    assert ("each machine is recounted" in result.stderr) == said


def test_an_option_that_varies_is_refused_beside_it(log: str) -> None:
    """Whatever its value, also that which it has without being asked for."""
    varied = import_module("pgemu.cli._trace").varied_options(
        command.compare, {one.name: None for one in command.compare.params}, command._OF_THE_RUN
    )
    values = {
        "guest_memory": "4M",
        "memslot": "0:4M",
        "vm_process": "9",
        "overlap": "0",
        "seed": "0",
        "vcpus": "1",
        "area_gap": "1M",
    }
    values |= {"late": "0", "flips": "1", "accesses": "1", "buffers": "0.5", "mapping": "4K"}
    values |= {"profile": "published", "host_cpus": "1", "init": "auto", "like": "dec2025", "tdx_shared_bit": "auto"}
    tried = 0
    for name, option in varied.items():
        choices = getattr(option.type, "choices", ())
        value = values.get(name) or (choices[0] if choices else "true")
        label = name.replace("_", "-")
        beside = [f"--{label}"] if option.is_flag else [f"--{label}", value]  # type: ignore[attr-defined]
        result = invoke(log, "--vary", f"{label}={value}", *beside)
        assert (result.exit_code, result.stdout) == (2, ""), label
        assert result.stderr == f"pgemu: --vary {label}=...: expected no {option.opts[0]} beside it\n"
        tried += 1
    assert tried > 30


@pytest.mark.parametrize("more", [[], ["--no-sensitivity"], ["--init", "private"], ["--format", "json"]])
def test_a_vm_without_private_memory_is_refused_where_the_trace_has_it(log: str, more: list[str]) -> None:
    result = invoke(log, "--vm", "plain", *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "pgemu: vm plain: it has no private memory, and the trace converts: expected one of sw, snp, tdx, or memory "
        "that is shared at first (--init shared)\n"
    )
    assert invoke(log, "--vm", "plain", "--init", "shared", "--page-size", "2M").exit_code == 0
