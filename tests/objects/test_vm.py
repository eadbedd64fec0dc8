"""VMs as they are created: of which kind, and with which stage 2."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pgemu.machine.vm_kinds import KINDS
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.properties import VmProperty


def has_private_memory(vm: Vm) -> bool:
    """Whether an attribute may make memory private."""
    return vm.set_attributes(0, W.PAGE_4K, private=True).status == 0


def word(machine: Machine, vm: Vm, name: Any) -> int:
    return int(machine.arrays.state[int(W.STATE_VMS) + vm.vm * W.V_WORDS + int(name)])


@pytest.mark.parametrize(
    ("default", "given", "kind"),
    [
        ("plain", {}, "plain"),
        ("plain", {"protected": True}, "sw"),
        ("plain", {"protected": False}, "plain"),
        ("plain", {"kind": "tdx"}, "tdx"),
        ("tdx", {}, "tdx"),
        ("tdx", {"protected": True}, "tdx"),
        ("tdx", {"protected": False}, "plain"),
        ("tdx", {"kind": "sw"}, "sw"),
        ("sw", {"kind": "plain"}, "plain"),
    ],
)
def test_the_kind_of_a_vm(default: Any, given: dict[str, Any], kind: str) -> None:
    machine = Machine(Config(stage2="ept", vm=default))
    vm = machine.create_vm(machine.create_process(), **given)
    row = KINDS[kind]
    assert word(machine, vm, W.V_PROPERTIES) == row.properties
    assert word(machine, vm, W.V_PRIVATE_LEVEL) == row.private_level
    assert (vm.private_root != vm.root) == (kind == "tdx")
    assert has_private_memory(vm) == row.private
    # A kind that does anything otherwise is one for the loops that know every parameter.
    assert machine.register(W.R_FULL) == (kind == "tdx")


@pytest.mark.parametrize(("kind", "stage2"), [("tdx", "npt"), ("snp", "ept")])
def test_a_kind_has_the_stage_2_of_its_processors(kind: Any, stage2: Any) -> None:
    said = f" '{kind}' with stage 2 '{stage2}': expected {KINDS[kind].stage2}"
    with pytest.raises(ValueError, match=re.escape(f"vm{said}")):
        Config(vm=kind, stage2=stage2)
    machine = Machine(Config(stage2=stage2))
    with pytest.raises(ValueError, match=re.escape(f"kind{said}")):
        machine.create_vm(kind=kind)
    assert machine.register(W.R_VMS) == 0
    assert machine.check() == 0


def test_what_is_no_kind() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"vm": "sev"}, "vm 'sev': expected one of plain, sw, snp, tdx"),
        ({"zap_filter": "none"}, "zap_filter 'none': expected one of both, target"),
        ({"private_level": "512G"}, "private_level '512G': expected None or one of 4K, 2M, 1G"),
    ]
    for fields, said in wrong:
        with pytest.raises(ValueError, match=re.escape(said)):
            Config(**fields)
    with pytest.raises(ValueError, match="kind 'sw' and protected False: expected one of them"):
        Machine(Config()).create_vm(kind="sw", protected=False)
    with pytest.raises(TypeError, match="no field 'rounded_zap_drops_both_kinds': it is called 'zap_filter'"):
        Config(rounded_zap_drops_both_kinds=True)  # type: ignore[call-arg]


def test_rows_of_kinds() -> None:
    """Who accepts zeroes by accepting, and only firmware that owns the page can."""
    for kind, row in KINDS.items():
        assert ("accept" in row.zeroed_by) == bool(row.properties & VmProperty.ACCEPT_ZEROES), kind
        assert "kernel" in row.zeroed_by
        assert row.private or not row.properties
    assert [kind for kind, row in KINDS.items() if "accept" in row.zeroed_by] == ["tdx"]
