/*
 * Both designs from C: a VM's memory is touched by host and guest, converted to and fro, and walked at random. Python
 * makes the machines; millions of calls never return to it.
 *
 *     cc -O2 -o designs designs.c $(python -m pgemu.capi)
 *     ./designs [PAGES [CALLS]]
 *
 * `python` is that of the environment with pgemu; the program finds it by VIRTUAL_ENV, which `activate` sets.
 */
#define _POSIX_C_SOURCE 200809L
#include "embedding.h"

#include <inttypes.h>
#include <time.h>

#define HVA 0x7f0000000000u
#define VM_FAULT_ERROR (PGEMU_VM_FAULT_OOM | PGEMU_VM_FAULT_SIGBUS | PGEMU_VM_FAULT_SIGSEGV | PGEMU_VM_FAULT_HWPOISON)

static char const MACHINE[] =
    "from pgemu import Config, Machine\n"
    "machine = Machine(Config(design, pool=max(size, 1 << 30)))\n"
    "gmem = machine.create_guest_memfd(max(size, 1 << 30), shared=True)\n"
    "process = machine.create_process()\n"
    "vm = machine.create_vm(process, protected=True)\n"
    "assert process.mmap(gmem, HVA).status == vm.bind(gmem, 0).status == 0\n";

/* A fault that did not end well: -errno, or an error among VM_FAULT_*. */
static int failed(int64_t status)
{
    return status < 0 || status & VM_FAULT_ERROR;
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void told(char const *what, uint64_t calls, uint64_t wrong, double began)
{
    double took = seconds() - began;

    printf("  %-22s %9" PRIu64 " calls, %6.1f million a second\n", what, calls, calls / took / 1e6);
    if (wrong) {
        fprintf(stderr, "%s: %" PRIu64 " results are not as expected\n", what, wrong);
        exit(1);
    }
}

static void run(pgemu_api const *api, char const *design, uint64_t pages, uint64_t calls)
{
    PyObject *names = must(PyDict_New());
    uint64_t space, vm, inode, root, wrong = 0, random = 88172645463325252u, i;
    pgemu_machine *m;
    pgemu_translation found;
    double began;

    PyDict_SetItemString(names, "design", must(PyUnicode_FromString(design)));
    PyDict_SetItemString(names, "size", must(PyLong_FromUnsignedLongLong(pages * PGEMU_PAGE_4K)));
    PyDict_SetItemString(names, "HVA", must(PyLong_FromUnsignedLongLong(HVA)));
    run_python(MACHINE, names);
    m = machine_of("machine", names); /* `names` keeps the machine alive */
    space = number_of("process.space", names);
    vm = number_of("vm.vm", names);
    inode = number_of("gmem.inode", names);
    root = number_of("process.root", names);
    /* The first operations load machine code: do not time that. */
    wrong += api->guest_fault(m, vm, 0, PGEMU_FLAG_WRITE, NULL) < 0;
    wrong += failed(api->host_fault(m, space, HVA, PGEMU_FLAG_WRITE, NULL));
    wrong += api->convert(m, vm, inode, 0, PGEMU_PAGE_4K, PGEMU_FLAG_PRIVATE, NULL) != 0;
    wrong += api->convert(m, vm, inode, 0, PGEMU_PAGE_4K, PGEMU_FLAG_SHARED, NULL) != 0;

    printf("%s\n", design);
    began = seconds();
    for (i = 0; i < pages; i++)
        wrong += failed(api->host_fault(m, space, HVA + i * PGEMU_PAGE_4K, PGEMU_FLAG_WRITE, NULL));
    told("host faults", pages, wrong, began);
    began = seconds();
    for (i = 0; i < pages; i++)
        wrong += api->guest_fault(m, vm, i * PGEMU_PAGE_4K, PGEMU_FLAG_WRITE, NULL) < 0;
    told("guest faults", pages, wrong, began);
    began = seconds();
    for (i = 0; i < calls; i++) {
        uint64_t address = HVA + next_random(&random) % pages * PGEMU_PAGE_4K + 8;

        wrong += api->translate(m, PGEMU_MMU_HOST, root, PGEMU_KIND_USER_READ, address, &found) != PGEMU_WALK_OK;
    }
    told("translate, random", calls, wrong, began);
    began = seconds();
    for (i = 0; i < pages; i += 2)
        wrong += api->convert(m, vm, inode, i * PGEMU_PAGE_4K, PGEMU_PAGE_4K, PGEMU_FLAG_PRIVATE, NULL) != 0;
    told("convert to private", (pages + 1) / 2, wrong, began);
    wrong += api->translate(m, PGEMU_MMU_HOST, root, PGEMU_KIND_USER_READ, HVA, &found) != PGEMU_WALK_NOT_PRESENT;
    told("... and nothing there", 1, wrong, began);
    printf("  folios split: %" PRId64 ", table pages: %" PRId64 "\n", api->event_count(m, PGEMU_EVENT_FOLIO_SPLIT),
           api->gauge_value(m, PGEMU_GAUGE_HOST_TABLES));
    if (number_of("machine.check()", names)) {
        fprintf(stderr, "a rule was broken\n");
        exit(1);
    }
    Py_DECREF(names);
}

int main(int count, char **words)
{
    uint64_t pages = count > 1 ? strtoull(words[1], NULL, 0) : 1 << 18;
    uint64_t calls = count > 2 ? strtoull(words[2], NULL, 0) : 4000000;
    pgemu_api const *api;

    start_python();
    api = must_import();
    run(api, "restructure", pages, calls);
    run(api, "pfnmap", pages, calls);
    return Py_FinalizeEx() < 0;
}
