"""What a claim is: who made it, what is run on a machine of each design, and how what was measured is judged.

A claim says something of one design, the one on trial, and sets it beside the other. Its experiment runs on both and
returns figures; its judge looks at these figures and at nothing else, so that a verdict is a fact about the machines.
Where a parameter has more than one defensible value, it is a switch: the experiment runs under each, and a claim whose
verdict follows the switch depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pgemu.machine.designs import DESIGNS, Design
from pgemu.machine.presets import Versions
from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.machine import Machine
    from pgemu.objects.vm import Vm

__all__ = ("HVA", "Claim", "Evidence", "Figure", "Figures", "Found", "Pair", "Scene", "Setting", "Switch", "Verdict")

Value = int | float | str
HVA = 0x7F00_0000_0000


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    PRICE = "holds at a price"
    PART = "in part"
    FALSE = "does not hold"
    DEPENDS = "depends"


class Evidence(StrEnum):
    """What the weakest step behind an experiment rests on; see README, "What to believe"."""

    CAPTURED = "captured"
    MAIN = "main"
    POSTED = "posted"
    SLIDES = "slides"
    INFERENCE = "inference"


class Figure(NamedTuple):
    """One quantity, measured on both machines. unit: "", "bytes", "ns"."""

    what: str
    trial: Value
    other: Value
    unit: str = ""


Figures = Mapping[str, Figure]


class Found(NamedTuple):
    """A judge's verdict, and why: a sentence that has the figures that decided."""

    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Setting:
    """Under what an experiment runs.

    on_trial: the design that the claim is about. like, pfnmap: versions (pgemu.machine.presets). fields: of Config,
    of both machines; own: of the machine of a design alone. what: parameters of the experiment itself.
    """

    on_trial: Design = "pfnmap"
    page_size: int = W.PAGE_1G
    like: str = "dec2025"
    pfnmap: str = "corrected"
    as_posted: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    what: Mapping[str, Any] = field(default_factory=dict)

    @property
    def other(self) -> Design:
        """The design beside the one on trial."""
        return next(design for design in DESIGNS if design != self.on_trial)

    def changed(self, changes: Mapping[str, Any]) -> Setting:
        """The setting with attributes, or else parameters of the experiment, changed."""
        known = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        rest = {name: value for name, value in changes.items() if name not in known}
        return replace(self, **known, what={**self.what, **rest})

    def scene(self, design: Design, pages: int = 2, *, shared: bool = False, **given: Any) -> Scene:
        """A machine of the design, with a guest_memfd of so many huge pages that a process maps and a VM is bound to.

        given: fields of Config. RuntimeError where that does not work.
        """
        from pgemu.objects.machine import Machine

        versions = Versions(self.like, self.pfnmap, self.as_posted)
        own = self.own.get(design, {})
        fields = {
            "page_size": self.page_size,
            "pool": pages * self.page_size,
            "vm": "sw",
            **given,
            **self.fields,
            **own,
        }
        machine = Machine(versions.configuration(design, **fields))
        gmem = machine.create_guest_memfd(pages * self.page_size)
        process = machine.create_process()
        vm = machine.create_vm(process)
        for what, result in (("mmap", process.mmap(gmem, HVA)), ("bind", vm.bind(gmem, 0))):
            if result.status:
                raise RuntimeError(f"{what} of the guest_memfd: {result.name}")
        if shared:
            gmem.convert(0, gmem.size, shared=True)
        return Scene(machine, gmem, process, vm)


class Scene(NamedTuple):
    """A machine with one of everything: the process maps the guest_memfd at HVA, the VM has it from address 0."""

    machine: Machine
    gmem: GuestMemfd
    process: AddressSpace
    vm: Vm


class Pair(NamedTuple):
    """What one quantity is on both machines."""

    trial: Any
    other: Any

    def figure(self, what: str, unit: str = "") -> Figure:
        """The same as a figure."""
        return Figure(what, self.trial, self.other, unit)


@dataclass(frozen=True)
class Switch:
    """A parameter that a verdict may follow. name: in a word; settings: by label, what each changes (Setting.changed).

    The first is that of the first run.
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    source: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim or a remark, and its experiment.

    Attributes:
        name: for --only
        claim: in a sentence
        by: who said so, and where
        tried: what is done
        measure: the figures, by a short name
        judge: the verdict on them
        evidence: what the weakest step rests on
        expected: the verdict that is documented
        switches: what it may depend on
        setting: under what it runs first
        note: what a reader should know beside it
        kind: "claim" of the slides, "remark" on them, or "question" that was asked elsewhere
    """

    name: str
    claim: str
    by: str
    tried: str
    measure: Callable[[Setting], dict[str, Figure]]
    judge: Callable[[Figures], Found]
    evidence: Evidence
    expected: Verdict
    switches: tuple[Switch, ...] = ()
    setting: Setting = Setting()
    note: str = ""
    kind: Literal["claim", "remark", "question"] = "claim"

    def both(self, setting: Setting, measured: Callable[[Design], Any]) -> Pair:
        """What a measurement gives on both machines."""
        return Pair(measured(setting.on_trial), measured(setting.other))
