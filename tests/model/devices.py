"""What a VFIO container maps: long-term pins of all pages of a range, or nothing.

Files that an IOAS maps without references change nothing in the model: what a device reaches is compared with what is
shared and there (pair.py).
"""

from __future__ import annotations

from model.outcome import OK, Outcome
from model.parameters import PAGE
from model.references import References
from pgemu_kernels import words as W


class Devices(References):
    """VFIO_IOMMU_MAP_DMA and _UNMAP_DMA of areas that do not overlap but by being the same."""

    def map_for_device(self, area: int, space: int, address: int, length: int, write: bool) -> Outcome:
        if area in self.device_pins:
            return Outcome(-W.EEXIST)
        frames = []
        for page in range(address // PAGE, (address + length) // PAGE):
            error = self.pin_page(space, page, write)
            if error:
                self.follow_special(space, page, write)
                for folio, unit in frames:
                    folio.pinned[unit] -= 1
                    self.memory.dropped(folio)
                return Outcome(error)
            entry = self.spaces[space].entries[page]
            folio = self.memory.folio_of(entry.pfn)
            assert folio is not None
            frames.append((folio, folio.unit(entry.pfn)))
            folio.pinned[frames[-1][1]] += 1
        self.device_pins[area] = frames
        return OK

    def follow_special(self, space: int, page: int, write: bool) -> None:
        """follow_fault_pfn(), asked where GUP refuses VM_PFNMAP: it has the page faulted in, and finds RAM."""
        vma = next((v for v in self.vmas if v.owner == space and page in v.pages), None)
        if vma is None or not self.is_special(vma) or (write and vma.read_only):
            return
        found = self.spaces[space].find(page)
        if found is None or (write and not found[1].writable):
            self.host_fault(space, page * PAGE, write)

    def unmap_for_device(self, area: int) -> Outcome:
        """How many bytes; 0 where nothing is mapped."""
        frames = self.device_pins.pop(area, [])
        for folio, unit in frames:
            folio.pinned[unit] -= 1
            self.memory.dropped(folio)
        return Outcome(0, len(frames) * PAGE)
