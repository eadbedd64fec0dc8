"""The model without a machine beside it: the same operations, nothing to compare them with but the rules."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from model import rules
from model.model import PAGE, Model, Outcome
from model.pair import Pair
from model.parameters import Parameters


class Alone(Pair):
    """A pair whose machine agrees with everything."""

    def __init__(self, parameters: Parameters) -> None:
        self.machine = MagicMock()
        self.model = Model(parameters)
        self.inodes = []
        self.spaces = []
        self.vms = []
        self.written = {}
        self.areas = {}

    @staticmethod
    def create(objects: list[Any], expected: int | None, make: Any, *args: Any, **kwargs: Any) -> None:
        if expected is not None:
            objects[expected : expected + 1] = [MagicMock(size=args[0] if args else 0)]

    def agree(self, got: Any, expected: Outcome) -> None:
        pass

    def write(self, inode: int, index: int, data: bytes) -> None:
        pfn = self.model.pfn(inode, index)
        assert pfn is not None
        if self.model.memory.write(pfn, data):
            self.written[inode, index] = data

    def compare_contents(self, inode: int, index: int) -> None:
        """What was written last is what the model's frame holds."""
        pfn = self.model.pfn(inode, index)
        assert pfn is not None
        if not self.model.parameters.flag_stays:
            assert self.model.memory.contents.get(pfn, bytes(PAGE)) == self.written.get((inode, index), bytes(PAGE))

    def compare_host(self, space: int, address: int) -> None:
        pass

    def compare_guest(self, vm: int, gpa: int) -> None:
        pass

    def check_findings(self) -> None:
        memory = self.model.memory
        assert self.model.parameters.keeps_shown or not (memory.stale or memory.lost)

    def compare_gauges(self) -> None:
        """Frames are where the parts say they are."""
        memory = self.model.memory
        objects = -(-memory.nodes // 7) + -(-memory.stashes // 64)
        pins = sum(self.model.pin_nodes(len(frames)) for frames in self.model.pins.values())
        tables = sum(space.table_pages for space in self.model.spaces if space.live)
        tables += sum(tree.table_pages for tree in (*self.model.vms, *self.model.mirrors.values()))
        fixed = memory.kernel_tables + memory.vmemmap_pages + len(memory.contents)
        assert memory.frames.used == fixed + tables + objects + pins

    def compare_devices(self) -> None:
        pass

    def compare_everything(self) -> None:
        self.compare_gauges()
        self.check_rules()

    def check_rules(self) -> None:
        rules.check(rules.view_of_model(self.model), self.model)
