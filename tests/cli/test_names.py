"""One name per thing: what an option of a command, a field of Config and a key of the JSON say is called alike."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import rich_click as click
from click.testing import CliRunner

from pgemu.cli import main
from pgemu.machine.config import DEFECTS, Config
from pgemu.trace import LoweringOptions

ROOT = Path(__file__).parents[2]
CONTEXT = click.Context(main)
COMMANDS = {name: main.get_command(CONTEXT, name) for name in main.list_commands(CONTEXT)}
CONFIG = {field.name: field.default for field in fields(Config)}
LOWERING = {field.name for field in fields(LoweringOptions)}

# Where an option may be repeated its name is singular, that of what it gives is plural.
REPEATED = {
    "--design": "designs",
    "--defect": "defects",
    "--memslot": "memslots",
    "--vm-process": "vm_processes",
    "--task": "tasks",
}
# Of the run, not of a machine or a trace; `check` is a key of the document beside "machine".
OF_THE_RUN = {
    *("input_format", "memslots_from"),  # which gives memslots and other_ranges
    *("designs", "check", "format", "details", "sources", "vary", "no_sensitivity"),
    *("like", "pfnmap", "as_posted", "strict"),  # of Versions; what they mean for a machine is in its fields
    *("overlap", "late", "flips", "accesses", "buffers", "mapping", "set"),  # of workloads
}
# Follow from others (the pool's size from the trace), or concern no trace.
NO_OPTION = {
    *("pool", "frames", "notifier", "dontneed_on_pfnmap"),
    *(
        "nx_huge_pages",
        "l1tf",
        "protection_keys",
        "thp",
        "memory",
        "other_pool",
        "pti",
        "nodes",
        "buddy",
        "reserved",
        "configuration",
    ),
    *("dirty_log_guest_memfd", "in_place_conversion", "large_folios"),
}


def options(command: str) -> dict[str, click.Option]:
    """The options of a command, by the name that they have on the command line."""
    found = COMMANDS[command]
    assert found is not None
    named = [option for option in found.params if isinstance(option, click.Option)]
    return {name(option): option for option in named}


def name(option: click.Option) -> str:
    flag = max(option.opts, key=len)
    return (REPEATED if option.multiple else {}).get(flag, flag.removeprefix("--").replace("-", "_"))


@pytest.mark.parametrize("command", COMMANDS)
def test_functions_call_their_options_as_the_command_line_does(command: str) -> None:
    # json is a module, format, all and list are functions
    builtins = {"as_json": "json", "name": "format", "form": "format", "everything": "all", "listed": "list"}
    for spelled, option in options(command).items():
        assert builtins.get(str(option.name), option.name) == spelled


def test_every_option_of_compare_is_a_field_and_every_field_an_option() -> None:
    given = set(options("compare")) - OF_THE_RUN
    assert given <= CONFIG.keys() | LOWERING
    assert given >= LOWERING - {"other_ranges"}
    assert CONFIG.keys() - given - {"design"} == NO_OPTION


@pytest.mark.parametrize("command", ["compare", "consumers", "scenario"])
def test_options_have_the_defaults_and_the_values_of_the_fields(command: str) -> None:
    hints = get_type_hints(Config)
    shared = {spelled: option for spelled, option in options(command).items() if spelled in CONFIG}
    assert shared
    for spelled, option in shared.items():
        if spelled in ("page_size", "host_cpus", "defects"):  # a size as text; the profile's; one by one
            continue
        default = option.get_default(CONTEXT)
        if command == "compare" and spelled not in ("profile", "seed"):  # the version's, or the trace's
            assert default in (None, ()) or repr(default) == "Sentinel.UNSET", spelled
        else:
            assert default == CONFIG[spelled], spelled
        values = {value for one in get_args(hints[spelled]) for value in (get_args(one) or (one,))}  # Literal | None
        if isinstance(option.type, click.Choice) and values:
            assert set(option.type.choices) <= values, spelled


def test_the_document_names_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        " vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=0 gpa=0x0 size=0x200000 hva=0x7f0000000000\n"
        " vmm-9 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x1000 error_code 0x100000006\n"
    )
    found = CliRunner().invoke(
        main, ["compare", str(path), "--design", "pfnmap", "--page-size", "2M", "--format", "json"]
    )
    document = json.loads(found.stdout)
    assert document["machines"]["pfnmap"].keys() == CONFIG.keys() - {"design"}
    assert {"check", "designs", "versions"} <= document.keys()
    assert document["versions"] == {"like": "dec2025", "pfnmap": "corrected", "as_posted": False}
    assert document["trace"]["init"] == "shared"


def test_the_document_of_consumers_names_its_options() -> None:
    found = CliRunner().invoke(main, ["consumers", "--json"])
    document = json.loads(found.stdout)
    assert document.keys() - {"consumers"} == set(options("consumers")) - {"json"}


@pytest.mark.parametrize(
    ("old", "new"), [("convert_order", "order"), ("convert_batch", "batch"), ("series", "split_form")]
)
def test_an_old_field_raises_with_the_new_one(old: str, new: str) -> None:
    given: dict[str, Any] = {old: "rfc2"}
    with pytest.raises(TypeError, match=f"'{old}': it is called '{new}'"):
        Config(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["consumers", "--convert-order", "rfc2"], "--convert-order is called --order"),
        (["compare", "--convert-order=rfc2"], "--convert-order is called --order"),
        (["compare", "--convert-batch", "block"], "--convert-batch is called --batch"),
        (["compare", "--json"], "--json is called --format json"),
        (["scenario", "smallest-pfnmap", "--memory", "64M"], "--memory is called --guest-memory"),
    ],
)
def test_an_old_option_fails_with_the_new_one(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments, prog_name="pgemu")
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"pgemu: {message}\n")


def test_the_number_of_defects_is_everywhere_the_same() -> None:
    """In README, CHANGELOG and --help, and each lists only those that are."""
    option = options("compare")["defects"]
    assert isinstance(option.type, click.Choice)
    assert sorted(option.type.choices) == sorted(DEFECTS)
    texts = [(ROOT / name).read_text() for name in ("README.md", "CHANGELOG.md")] + [option.help or ""]
    for text in texts:
        numbers = re.findall(r"(\d+)\W+defects", text)
        assert numbers == [str(len(DEFECTS))] * len(numbers) != []
    listed = re.search(r"the defects\s+((?:`[a-z-]+`,?\s*)+)", texts[1])
    assert listed is not None
    assert set(re.findall(r"`([a-z-]+)`", listed[1])) <= set(DEFECTS)
