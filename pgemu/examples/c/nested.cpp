/*
 * A TLB in front of nested walks, in C++: the guest's own tables lie in its memory, each of their entries is read
 * through stage 2, and what a walk reads is listed for a model of caches. Leaves of both stages decide what an entry of
 * the TLB covers; after a conversion it is dropped.
 *
 *     c++ -O2 -std=c++11 -o nested nested.cpp $(python -m pgemu.capi)
 *     ./nested [ACCESSES]
 */
#include "embedding.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include <vector>

static char const MACHINE[] =
    "from pgemu import Config, Machine\n"
    "machine = Machine(Config(design, pool=2 << 30))\n"
    "gmem = machine.create_guest_memfd(2 << 30)\n"
    "vm = machine.create_vm(protected=True)\n"
    "assert vm.bind(gmem, 0).status == 0\n"
    "vm.touch_many([0, 4096, 8192, 1 << 30], write=True)\n"
    // The guest's tables: level 4 at 0, level 3 at 4096, level 2 at 8192 with leaves of 2M over the second 1G.
    "word = lambda value: value.to_bytes(8, 'little')\n"
    "machine.write_frame(gmem.pfn(0), word(0x1067))\n"
    "machine.write_frame(gmem.pfn(4096), word(0x2067))\n"
    "machine.write_frame(gmem.pfn(8192), b''.join(word((1 << 30) + (i << 21) | 0xe7) for i in range(512)))\n";

class Tlb {
  public:
    uint64_t hits = 0, walks = 0, references = 0;

    Tlb(pgemu_api const *api, pgemu_machine *m, uint64_t vm, uint64_t stage2_root)
        : api(api), m(m), vm(vm), stage2_root(stage2_root), reads(PGEMU_NESTED_READS)
    {
    }

    /* Host physical address of a guest's virtual one. */
    uint64_t translate(uint64_t address)
    {
        for (int shift : {12, 21, 30}) {
            auto hit = entries.find(address >> shift << shift | shift);
            if (hit != entries.end()) {
                hits++;
                return hit->second | (address & ((1ull << shift) - 1));
            }
        }
        pgemu_nested_translation found = walk(address);
        if (found.status != PGEMU_WALK_OK && found.stage == PGEMU_STAGE_FINAL) {
            // An exit: KVM maps the page, the guest tries again.
            int64_t status = api->guest_fault(m, vm, found.fault_address, PGEMU_FLAG_WRITE, nullptr);
            if (status < 0) {
                std::fprintf(stderr, "guest fault: %" PRId64 "\n", status);
                std::exit(1);
            }
            found = walk(address);
        }
        if (found.status != PGEMU_WALK_OK) {
            std::fprintf(stderr, "walk: status %d at stage %d\n", found.status, found.stage);
            std::exit(1);
        }
        uint8_t level = found.guest_level < found.host_level ? found.guest_level : found.host_level;
        int shift = 3 + 9 * level;
        entries[address >> shift << shift | shift] = found.physical >> shift << shift;
        return found.physical;
    }

    void flush() { entries.clear(); }

  private:
    pgemu_nested_translation walk(uint64_t address)
    {
        pgemu_nested_translation found;
        int64_t status = api->translate_nested(m, PGEMU_MMU_NESTED, 0, stage2_root, PGEMU_KIND_USER_WRITE, address, &found,
                                               reads.data(), nullptr);
        if (status < 0) {
            std::fprintf(stderr, "translate_nested: %" PRId64 "\n", status);
            std::exit(1);
        }
        walks++;
        references += found.read_count; // reads[i] & ~7 is what a cache would be asked for
        return found;
    }

    pgemu_api const *api;
    pgemu_machine *m;
    uint64_t vm, stage2_root;
    std::vector<uint64_t> reads;
    std::unordered_map<uint64_t, uint64_t> entries;
};

static void run(pgemu_api const *api, char const *design, uint64_t accesses)
{
    PyObject *names = must(PyDict_New());
    PyDict_SetItemString(names, "design", must(PyUnicode_FromString(design)));
    run_python(MACHINE, names);
    pgemu_machine *m = machine_of("machine", names);
    uint64_t vm = number_of("vm.vm", names), inode = number_of("gmem.inode", names), random = 1, sum = 0;
    Tlb tlb(api, m, vm, number_of("vm.root", names));

    for (uint64_t i = 0; i < accesses; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        uint64_t address = random >> 34; // below 1G
        sum += tlb.translate(address);
        if (i == accesses / 2) { // half way, one page becomes shared
            int64_t status = api->convert(m, vm, inode, 3ull << 29, PGEMU_PAGE_4K, PGEMU_FLAG_SHARED, nullptr);
            if (status != 0) {
                std::fprintf(stderr, "convert: %" PRId64 "\n", status);
                std::exit(1);
            }
            tlb.flush();
        }
    }
    std::printf("%-12s %" PRIu64 " accesses, %" PRIu64 " hits, %" PRIu64 " walks, %.1f references a walk, sum %" PRIx64 "\n",
                design, accesses, tlb.hits, tlb.walks, double(tlb.references) / double(tlb.walks), sum);
    Py_DECREF(names);
}

int main(int count, char **words)
{
    uint64_t accesses = count > 1 ? std::strtoull(words[1], nullptr, 0) : 2000000;

    start_python();
    pgemu_api const *api = must_import();
    run(api, "restructure", accesses);
    run(api, "pfnmap", accesses);
    return Py_FinalizeEx() < 0;
}
