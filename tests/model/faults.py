"""Faults of processes and guests, allocation, and the level at which they map."""

from __future__ import annotations

from model.folio import PIECE, Folio
from model.inode import Inode, Window
from model.machine import State
from model.outcome import OK, Outcome
from model.parameters import PAGE
from model.tables import Entry
from pgemu_kernels import words as W


class Faults(State):
    """Host and guest faults, prefault, allocate, memory policy."""

    # ------------------------------------------------------------------ folios

    def taken(self, inode: Inode) -> int:
        """Huge pages that came from an inode's subpool, those that left the inode included."""
        return sum(folio.owner is inode for folio in self.memory.in_use.values())

    def folio(self, inode: Inode, index: int) -> Folio | None:
        """The folio at a page, allocated if need be: restructure splits it at once where any page is shared."""
        number = index >> self.order
        if number in inode.blocks:
            return inode.blocks[number]
        # Its subpool's limit. Pages of 4K have no subpool.
        full = self.order > 0 and self.taken(inode) == inode.pages // self.block_pages
        place = next(i for i, other in enumerate(self.inodes) if other is inode), number
        folio = None if full else self.memory.take(self.nodes_of(inode, number), place)
        if folio is None:
            return None
        folio.owner = inode
        if self.restructure and self.order and not inode.shared.isdisjoint(self.block_of(index)):
            if self.parameters.in_pieces:
                first = self.block_of(index).start
                touched = {
                    piece
                    for piece in range(self.block_pages // PIECE)
                    if not inode.shared.isdisjoint(range(first + piece * PIECE, first + piece * PIECE + PIECE))
                }
                self.memory.split_pieces(folio, touched)
            elif not self.memory.split(folio):
                self.memory.uncache(folio)
                return None
        inode.blocks[number] = folio
        return folio

    def nodes_of(self, inode: Inode, block: int) -> list[int]:
        """NUMA nodes that may give a huge page, the preferred one first.

        The inode's policy, which rfc2 does not know, else the task's; interleaving is not rfc2's either.
        """
        every = list(range(self.parameters.nodes))
        mode, mask = self.task_policy
        if not self.parameters.by_page and block in inode.policies:
            mode, mask = inode.policies[block]
        chosen = [node for node in every if mask >> node & 1]
        if mode == W.MPOL_BIND:
            return chosen
        if mode == W.MPOL_PREFERRED and chosen:
            first = chosen[0]
        elif mode == W.MPOL_INTERLEAVE and not self.parameters.by_page:
            first = chosen[block % len(chosen)]
        else:
            first = 0
        return [first] + [node for node in every if node != first]

    def set_policy(self, inode: int | None, offset: int, length: int, mode: int, nodes: int) -> Outcome:
        """mbind() of an inode's range, or set_mempolicy() of whoever faults. A huge page goes by its first page's."""
        if nodes:
            wrong = nodes >> self.parameters.nodes or mode == W.MPOL_DEFAULT
        else:  # preferred without nodes: the local one
            wrong = mode not in (W.MPOL_DEFAULT, W.MPOL_PREFERRED)
        if mode > W.MPOL_INTERLEAVE or wrong:
            return Outcome(-W.EINVAL)
        if inode is not None and not self.inodes[inode].open:
            return Outcome(-W.EBADF)
        if inode is None:
            self.task_policy = mode, nodes
            return OK
        for block in self.blocks_of(range(offset // PAGE, (offset + length) // PAGE)):
            if block << self.order < offset // PAGE:
                continue  # its first page has another policy
            self.inodes[inode].policies.pop(block, None)
            if mode != W.MPOL_DEFAULT:
                self.inodes[inode].policies[block] = mode, nodes
        return OK

    def allocate(self, inode: int, offset: int, length: int) -> Outcome:
        """fallocate(): what was allocated before a failure stays; detail is where it failed."""
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-W.EBADF)
        if (offset | length) % PAGE or not length or (offset + length) // PAGE > node.pages:
            return Outcome(-W.EINVAL)
        for number in range(offset // PAGE >> self.order, (offset + length) // PAGE >> self.order):
            if self.folio(node, number << self.order) is None:
                return Outcome(-W.ENOMEM, (number << self.order) * PAGE)
        return OK

    # ------------------------------------------------------------------ host

    def host_fault(self, space: int, address: int, write: bool) -> Outcome:
        page = address // PAGE
        vma = next((v for v in self.vmas if v.owner == space and page in v.pages), None)
        if vma is None or (write and vma.read_only):
            return Outcome(W.VM_FAULT_SIGSEGV)
        host = self.spaces[space]
        present = host.find(page)
        if present:
            return Outcome(0, present[0])
        if page in host.poisoned:
            return Outcome(W.VM_FAULT_HWPOISON)
        index = vma.file_page(page)
        inode = self.inodes[vma.inode]
        if index >= inode.pages or index not in inode.shared:
            if self.order == 0:  # as captured
                host.link(page, 2)
            return Outcome(W.VM_FAULT_SIGBUS)
        folio = self.folio(inode, index)
        if folio is None:
            return Outcome(W.VM_FAULT_OOM)
        special = self.is_special(vma)
        if not special and folio.size(folio.unit(folio.head + index % self.block_pages)) > 1:
            return Outcome(W.VM_FAULT_SIGBUS)  # a large folio is a WARN in kvm_gmem_fault_user_mapping()
        if not special and folio.poisoned(folio.unit(folio.head + index % self.block_pages)):
            return Outcome(W.VM_FAULT_HWPOISON)
        level = self.host_level(vma, page)
        size = 1 << 9 * (level - 1)
        pfn = folio.head + index % self.block_pages
        self.memory.first_use(folio, pfn)
        if not host.map(page, Entry(pfn - page % size, special, not vma.read_only), level):
            return Outcome(W.VM_FAULT_OOM)
        self.memory.first_use(folio, pfn, size)
        self.memory.show(folio, pfn, size)
        if special:
            return Outcome(W.VM_FAULT_NOPAGE, level)
        folio.mapped[folio.unit(pfn)] += 1
        return Outcome(W.VM_FAULT_LOCKED, level)

    def host_level(self, vma: Window, page: int) -> int:
        """pfnmap with large entries: the largest level at which all is shared, aligned and inside the VMA."""
        if not self.is_special(vma) or not self.parameters.host_huge:
            return 1
        index = vma.file_page(page)
        shared = self.inodes[vma.inode].shared
        for level in range(1 + self.order // 9, 1, -1):
            size = 1 << 9 * (level - 1)
            start = page // size * size
            inside = start in vma.pages and start + size - 1 in vma.pages
            aligned = (page - index) % size == 0
            file = range(index // size * size, index // size * size + size)
            if inside and aligned and shared.issuperset(file) and self.spaces[vma.owner].takes_leaf(page, level):
                return level
        return 1

    # ------------------------------------------------------------------ guest

    def guest_fault(self, vm: int, gpa: int, private: bool | None = None, accept: bool = False) -> Outcome:
        """`private`: the kind of access, where the hardware tells. `accept`: of 4K, which some kinds of VM honor."""
        gfn = gpa // PAGE
        slot = next((s for s in self.slots if s.owner == vm and gfn in s.pages), None)
        if slot is None:
            return self.outside(vm, gfn, private)
        if slot.released:
            return Outcome(-W.EFAULT)
        inode = self.inodes[slot.inode]
        index = slot.file_page(gfn)
        # page_fault_can_be_fast() leaves an access of the wrong kind to the slow path, which exits.
        if private is not None and private == (index in inode.shared):
            return Outcome(-W.EFAULT)
        tree = self.tree_of(vm, index not in inode.shared)
        accept = accept and index not in inode.shared and self.kinds[vm] in ("snp", "tdx")
        present = tree.find(gfn)
        if present and accept and present[0] > 1:
            if vm in self.mirrors:
                split = tree.split_boundary(gfn) and tree.split_boundary(gfn + 1)
                return Outcome(W.RET_PF_SPURIOUS, 1) if split else Outcome(-W.ENOMEM)
            inode.assigned_2m.discard(index // 512)
            tree.zap(range(gfn // 512 * 512, gfn // 512 * 512 + 512))
        elif present:
            return Outcome(W.RET_PF_SPURIOUS, present[0])
        folio = self.folio(inode, index)
        if folio is None:
            return Outcome(-W.ENOMEM)
        pfn = folio.head + index % self.block_pages
        if folio.poisoned(folio.unit(pfn)):
            return Outcome(-W.EHWPOISON)
        level = self.stage2_level(slot, gfn, folio)
        if self.kinds[vm] == "snp" and index not in inode.shared:
            inode.assign(index, min(level, self.private_level(vm)))
            if accept:
                inode.assigned_2m.discard(index // 512)
        level = 1 if accept else self.level_of_kind(slot, gfn, level)
        self.memory.first_use(folio, pfn, 1 << 9 * (level - 1))
        level = tree.map(gfn, level, pfn)
        if not level:
            return Outcome(-W.ENOMEM)
        self.memory.show(folio, pfn, 1 << 9 * (level - 1))
        return Outcome(W.RET_PF_FIXED, level)

    def private_level(self, vm: int) -> int:
        """The largest leaf over private memory by the VM's kind."""
        own = {"plain": "1G", "sw": "1G", "snp": "2M", "tdx": "2M"}[self.kinds[vm]]
        asked = None if self.kinds[vm] == "plain" else self.parameters.private_level
        return {"4K": 1, "2M": 2, "1G": 3}[asked or own]

    def level_of_kind(self, slot: Window, gfn: int, level: int) -> int:
        """What the kind of its VM leaves of a leaf's level. SNP maps by the RMP, where shared pages are not."""
        inode = self.inodes[slot.inode]
        index = slot.file_page(gfn)
        if self.kinds[slot.owner] == "snp":
            return min(level, 2 if index // 512 in inode.assigned_2m else 1)
        return level if index in inode.shared else min(level, self.private_level(slot.owner))

    def outside(self, vm: int, gfn: int, private: bool | None) -> Outcome:
        """No slot: an MMIO exit, which a 4K entry caches; what is outside slots is not private memory."""
        if private:
            return Outcome(-W.EFAULT)
        if gfn >= 1 << 36:
            return Outcome(W.RET_PF_EMULATE)
        return Outcome(W.RET_PF_EMULATE, 1) if self.vms[vm].link(gfn, 1) else Outcome(-W.ENOMEM)

    def stage2_level(self, slot: Window, gfn: int, folio: Folio | None) -> int:
        """The largest level that slot, alignment and folio (restructure) or shareability (pfnmap) permit."""
        if slot.dirty:
            return 1
        shared = self.inodes[slot.inode].shared
        index = slot.file_page(gfn)
        for level in range(1 + self.order // 9, 1, -1):
            size = 1 << 9 * (level - 1)
            start = gfn // size * size
            if start not in slot.pages or start + size - 1 not in slot.pages:
                continue
            if (slot.pages.start - slot.pgoff) % size:
                continue
            block = range(index // size * size, index // size * size + size)
            if self.restructure:
                fits = folio is not None and folio.size(folio.unit(folio.head + index % self.block_pages)) >= size
            else:
                fits = shared.isdisjoint(block) or shared.issuperset(block)
            if fits:
                return level
        return 1

    def prefault(self, vm: int, gpa: int, length: int) -> Outcome:
        """KVM_PRE_FAULT_MEMORY: guest faults from leaf to leaf, until one fails: the bytes that are mapped."""
        if (gpa | length) % PAGE or not length:
            return Outcome(-W.EINVAL)
        at = gpa
        while at < gpa + length:
            outcome = self.guest_fault(vm, at)
            if outcome.status not in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS):
                error = -W.ENOENT if outcome.status == W.RET_PF_EMULATE else outcome.status
                return Outcome(0, at - gpa) if at > gpa else Outcome(error)
            size = PAGE << 9 * (outcome.detail - 1)
            at = at // size * size + size
        return Outcome(0, length)

    def log_dirty_pages(self, vm: int, gpa: int, on: bool) -> Outcome:
        """KVM_MEM_LOG_DIRTY_PAGES of a slot with guest_memfd: leaves of 4K only, while it is on."""
        if not self.parameters.dirty_log_guest_memfd:
            return Outcome(-W.EINVAL)
        slot = next((s for s in self.slots if s.owner == vm and gpa // PAGE in s.pages), None)
        if slot is None:
            return Outcome(-W.ENOENT)
        if on == slot.dirty:
            return OK
        slot.dirty = on
        if on:
            for tree in self.trees(vm):
                tree.split(slot.pages)
        else:
            self.recover_large_leaves(slot)
        return OK

    def recover_large_leaves(self, slot: Window) -> None:
        """Large leaves come back in place, or (6.12) at the next access; in a mirror they do not."""
        stage2 = self.vms[slot.owner]
        gfn = slot.pages.start
        while gfn < slot.pages.stop:
            folio = self.inodes[slot.inode].blocks.get(slot.file_page(gfn) >> self.order)
            level = self.level_of_kind(slot, gfn, self.stage2_level(slot, gfn, folio))
            step = 1 << 9 * (max(level, 2) - 1)
            if level > 1:
                recover = self.parameters.kernel != "6.12"
                if stage2.collapse(level, gfn >> 9 * (level - 1), recover) and recover:
                    assert folio is not None
                    pfn = folio.head + slot.file_page(gfn) % self.block_pages
                    self.memory.first_use(folio, pfn, step)
                    self.memory.show(folio, pfn, step)
            gfn = gfn // step * step + step
