/*
 * pgemu.h: machines of pgemu from C (C99) and C++ (C++11).
 *
 * A machine is made in Python. Calls through the table of functions that pgemu_import() gives run machine code: they
 * never return to Python, and need no GIL (hold it or not). Only the first operation of a kind does, to load or compile
 * the code behind it. One machine is called by one thread at a time; two machines may be called by two threads.
 *
 *     pgemu_api const *api = pgemu_import();            // NULL: a Python exception is set
 *     pgemu_machine *m = pgemu_handle(machine);         // machine: a pgemu.Machine, which the caller keeps alive
 *     pgemu_translation found;
 *     if (api->translate(m, PGEMU_MMU_HOST, root, PGEMU_KIND_READ, address, &found) == PGEMU_WALK_OK) ...
 *
 * Arguments. Any uint64_t is taken: what cannot be is refused by a code of its own (PGEMU_ERROR_*, below -4095), what
 * the kernel would refuse by -errno. Pointers are the caller's promise, as memcpy()'s are: NULL and what is not aligned
 * are refused (PGEMU_ERROR_POINTER), where NULL is not said to mean something; arrays must have the length that is
 * told. A machine is a pointer that pgemu_handle() gave while the Python object is alive; NULL is PGEMU_ERROR_MACHINE.
 *
 * Constants are in pgemu_words.h, with what each operation reads. Build, with the python that has pgemu:
 *
 *     cc $(python -m pgemu.capi --cflags) program.c $(python -m pgemu.capi --ldflags)
 *
 * A program that embeds Python finds a virtual environment by the name it starts under: before it starts set
 * PyConfig.program_name to ENVIRONMENT/bin/python3 (pgemu/examples/c/embedding.h does), or PYTHONPATH to the folder that
 * pgemu is in.
 *
 * Who has no Python.h defines PGEMU_NO_PYTHON, and gets numbers from Python by whatever calls it:
 * pgemu.capi.functions() are the addresses of the functions by name, in the order of the table, to be put behind `abi`
 * (pgemu.capi.ABI) and `size`; pgemu.capi.handle(machine) is the pgemu_machine *.
 */
#ifndef PGEMU_H
#define PGEMU_H

#ifndef PGEMU_NO_PYTHON
#include <Python.h>
#endif
#include <stdint.h>

#include "pgemu_words.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Version of the table and of every struct here: changed by what an older program would not survive. What is added at
 * the end of the table leaves it, and shows in `size`. */
#define PGEMU_ABI 1

/* What a function returns where it was not called as it must be; nothing was done then. */
#define PGEMU_ERROR_MACHINE (-5001)  /* no machine of pgemu_handle() */
#define PGEMU_ERROR_ARGUMENT (-5002) /* a number beyond what it may be: an MMU that is none or of the other sort, a kind
                                      * that it has not, a root that is no multiple of 4096 or not below 2^52, a column
                                      * of an operation, a count of 2^40 or more, an event, a gauge */
#define PGEMU_ERROR_POINTER (-5003)  /* a pointer that is NULL or not aligned */
#define PGEMU_ERROR_CODE (-5004)     /* machine code could not be loaded or compiled; Python said why on stderr */

/* Numbers of MMUs that every machine has: entries of a format, under the control registers of Linux. Others are made by
 * pgemu.capi.mmu() and pgemu.capi.nested_mmu(). */
#define PGEMU_MMU_HOST 0   /* x86-64, of processes */
#define PGEMU_MMU_NPT 1    /* stage 2, AMD */
#define PGEMU_MMU_EPT 2    /* stage 2, Intel */
#define PGEMU_MMU_NESTED 3 /* a guest's x86-64 tables over the machine's stage 2: for translate_nested() only */

typedef struct pgemu_machine pgemu_machine;

/* A walk. physical: 0 on failure. error: page-fault error code, exit qualification, ...: see pgemu.Translation. */
typedef struct pgemu_translation {
    uint64_t physical;
    uint64_t error;
    uint8_t status; /* PGEMU_WALK_* */
    uint8_t level;  /* of the leaf, or of the entry at fault: 1 = 4K, 2 = 2M, 3 = 1G */
    uint8_t unused[6];
} pgemu_translation;

/* A nested walk; levels are 0 where a stage was not reached. See pgemu.tables.translation.NestedTranslation. */
typedef struct pgemu_nested_translation {
    uint64_t physical;
    uint64_t error;
    uint64_t fault_address; /* what the stage that failed was asked for */
    uint64_t read_count;    /* entries of both stages read, */
    uint64_t write_count;   /* ... and written: accessed and dirty bits */
    uint8_t status;         /* PGEMU_WALK_* */
    uint8_t stage;          /* PGEMU_STAGE_*: where it failed */
    uint8_t guest_level;
    uint8_t host_level;
    uint8_t unused[4];
} pgemu_nested_translation;

/* Where a batch of walks goes, arrays of `count` elements. error[i] is written where status[i] is not PGEMU_WALK_OK.
 * Lists of references: all three NULL, or all there. reads, writes: PGEMU_WALK_READS words for each walk, physical
 * addresses of entries in order (a multiple of 8, in the low bits the stage, of a nested walk: 1 guest, 2 stage 2);
 * counts: two words for each walk, how many of reads and of writes there are, zeroed by the caller. */
typedef struct pgemu_translations {
    uint64_t *physical;
    uint64_t *error;
    uint8_t *status;
    uint8_t *level;
    uint64_t *reads;
    uint64_t *writes;
    uint64_t *counts;
} pgemu_translations;

/* The same of nested walks. levels: two bytes for each, of guest and host. counts: always there. reads, writes: NULL, or
 * PGEMU_NESTED_READS and PGEMU_NESTED_WRITES words for each walk. */
typedef struct pgemu_nested_translations {
    uint64_t *physical;
    uint64_t *error;
    uint64_t *fault_address;
    uint8_t *status;
    uint8_t *stage;
    uint8_t *levels;
    uint64_t *reads;
    uint64_t *writes;
    uint64_t *counts;
} pgemu_nested_translations;

/* One operation: the columns of a trace record. Which operation reads which, and which flags, stands beside PGEMU_OP_*
 * in pgemu_words.h; python -c "import pgemu.trace as t; print(t.columns_table())" prints it. Limits: op and flags 8
 * bits, actor below PGEMU_ACTORS, vm and space 16 bits, object 32 bits, or PGEMU_ERROR_ARGUMENT; an op that is none is
 * -PGEMU_EOPNOTSUPP. */
typedef struct pgemu_operation {
    uint64_t op; /* PGEMU_OP_* */
    uint64_t flags;
    uint64_t actor;
    uint64_t vm;
    uint64_t space;
    uint64_t object;
    uint64_t address;
    uint64_t offset;
    uint64_t length;
} pgemu_operation;

/* Many operations as columns. header: op | flags << 8 | actor << 16 | vm << 32 | space << 48. single: bit n set, and
 * column n (0 header .. 4 length) has one element, which is for all; other bits are ignored, set none. NULL, but for
 * header: 0 for all. */
typedef struct pgemu_columns {
    uint64_t const *header;
    uint64_t const *object;
    uint64_t const *address;
    uint64_t const *offset;
    uint64_t const *length;
    uint64_t single;
} pgemu_columns;

/* The table. `m` is the machine. Operations return what the kernel returns: 0, -errno, of faults PGEMU_VM_FAULT_* or
 * PGEMU_RET_PF_*; a few codes are named at each, others stand for what Linux has them for. `detail` of one operation
 * may be NULL; the arrays of run() may not. Flags are PGEMU_FLAG_*. */
typedef struct pgemu_api {
    uint32_t abi;  /* PGEMU_ABI */
    uint32_t size; /* of this struct, bytes */

    /* Walks; kind: PGEMU_KIND_*. They return PGEMU_WALK_*, batches 0. root: physical address of the top table, as
     * Vm.root or AddressSpace.root says at this moment; it is 0 once they are closed, and from 0 a walk finds nothing
     * (PGEMU_WALK_NOT_PRESENT); where there is no memory it is PGEMU_WALK_OUTSIDE_MEMORY. */
    int64_t (*translate)(pgemu_machine *m, uint64_t mmu, uint64_t root, uint64_t kind, uint64_t address,
                         pgemu_translation *found);
    /* kinds: one byte for each address, or NULL: `kind` is that of all. */
    int64_t (*translate_batch)(pgemu_machine *m, uint64_t mmu, uint64_t root, uint64_t kind, uint8_t const *kinds,
                               uint64_t count, uint64_t const *addresses, pgemu_translations const *found);
    /* reads: NULL, or PGEMU_NESTED_READS words; writes: NULL, or PGEMU_NESTED_WRITES words. */
    int64_t (*translate_nested)(pgemu_machine *m, uint64_t mmu, uint64_t guest_root, uint64_t stage2_root, uint64_t kind,
                                uint64_t address, pgemu_nested_translation *found, uint64_t *reads, uint64_t *writes);
    int64_t (*translate_nested_batch)(pgemu_machine *m, uint64_t mmu, uint64_t guest_root, uint64_t stage2_root,
                                      uint64_t kind, uint8_t const *kinds, uint64_t count, uint64_t const *addresses,
                                      pgemu_nested_translations const *found);

    /* Any operation; and `count` of them, in order: 0, the results in status and detail, arrays of `count`, both there
     * unless count is 0. */
    int64_t (*operate)(pgemu_machine *m, pgemu_operation const *operation, uint64_t *detail);
    int64_t (*run)(pgemu_machine *m, pgemu_columns const *columns, uint64_t count, int64_t *status, uint64_t *detail);

    /* What simulators do most, one operation each. Faults: detail is the level of the leaf. What other simulators' TLBs
     * must forget no operation says: look whether event_count() of PGEMU_EVENT_TLB_FLUSH_VM (VMs) or _TLB_FLUSH_MM
     * (processes) has grown, and forget all of VMs, or of processes. To forget the range alone is not enough: a leaf of
     * 2M or 1G goes as a whole.
     *
     * host_fault: 0 if the entry was there, PGEMU_VM_FAULT_NOPAGE or _LOCKED if it is now; _SIGSEGV: no mapping, or no
     * such process; _SIGBUS: private memory, or behind the end of a file; _OOM.
     * guest_fault: PGEMU_RET_PF_FIXED, _SPURIOUS (it was there), _EMULATE (no slot); -EFAULT: memory of the other kind
     * than PRIVATE or SHARED of the flags says; -EBADF: no such VM. */
    int64_t (*host_fault)(pgemu_machine *m, uint64_t space, uint64_t address, uint64_t flags, uint64_t *detail);
    int64_t (*guest_fault)(pgemu_machine *m, uint64_t vm, uint64_t address, uint64_t flags, uint64_t *detail);
    /* flags: one of PRIVATE and SHARED, both or neither is -EINVAL, as is a range that is empty, not of whole pages, or
     * not in the inode, and where vm is a plain one with slots of the inode (one that does not exist is not refused);
     * -EBADF: no such inode; -EAGAIN: somebody holds a page, detail is its offset in the inode. */
    int64_t (*convert)(pgemu_machine *m, uint64_t vm, uint64_t inode, uint64_t offset, uint64_t length, uint64_t flags,
                       uint64_t *detail);
    /* flags: MADVISE or 0. -ENOMEM: something of the range is not mapped (the rest is zapped); -EINVAL: no such
     * process, address not of a page, MADVISE of VM_PFNMAP. */
    int64_t (*zap)(pgemu_machine *m, uint64_t space, uint64_t address, uint64_t length, uint64_t flags,
                   uint64_t *detail);
    /* 0 where nothing is mapped, too; -EINVAL: no such process, address not of a page. */
    int64_t (*munmap)(pgemu_machine *m, uint64_t space, uint64_t address, uint64_t length, uint64_t *detail);
    /* -EBADF: no such inode; -EINVAL: part of a huge page (Config.punch). */
    int64_t (*punch_hole)(pgemu_machine *m, uint64_t inode, uint64_t offset, uint64_t length, uint64_t *detail);
    /* pin: the caller's number for what it pins, 0 to PGEMU_PINS - 1 (255). detail: pages, of 4K. pin: -EEXIST: it is in
     * use; -EINVAL: one from 256 on; -EFAULT: nothing that can be pinned is there (VM_PFNMAP never can), or no such
     * process. unpin: -ENOENT: no such pin. */
    int64_t (*pin)(pgemu_machine *m, uint64_t space, uint64_t pin, uint64_t address, uint64_t length, uint64_t flags,
                   uint64_t *detail);
    int64_t (*unpin)(pgemu_machine *m, uint64_t pin, uint64_t *detail);
    /* inode: PGEMU_NO_INODE for memory of the process at virtual address `offset`. -ENODEV: no such domain. */
    int64_t (*dma_map)(pgemu_machine *m, uint64_t domain, uint64_t space, uint64_t iova, uint64_t length, uint64_t inode,
                       uint64_t offset, uint64_t flags, uint64_t *detail);
    int64_t (*dma_unmap)(pgemu_machine *m, uint64_t domain, uint64_t iova, uint64_t length, uint64_t *detail);
    int64_t (*dma_access)(pgemu_machine *m, uint64_t domain, uint64_t device, uint64_t iova, uint64_t length,
                          uint64_t word, uint64_t flags, uint64_t *detail);

    /* How often an event (PGEMU_EVENT_*) was counted, in all; the value of a gauge (PGEMU_GAUGE_*) now. What each is
     * stands beside it in pgemu_words.h. */
    int64_t (*event_count)(pgemu_machine *m, uint64_t event);
    int64_t (*gauge_value)(pgemu_machine *m, uint64_t gauge);
} pgemu_api;

#define PGEMU_CAPSULE "pgemu.capi._C_API"

#ifndef PGEMU_NO_PYTHON

/* An attribute of pgemu.capi: a new reference, NULL with an exception. */
static inline PyObject *pgemu_attribute(char const *name)
{
    PyObject *module = PyImport_ImportModule("pgemu.capi");
    PyObject *found = module ? PyObject_GetAttrString(module, name) : NULL;
    Py_XDECREF(module);
    return found;
}

/* The table of functions, valid until Python ends; NULL with a Python exception (ImportError if pgemu has another ABI
 * than this header). Hold the GIL. The first call of all compiles some seconds; later processes load the code. */
static inline pgemu_api const *pgemu_import(void)
{
    PyObject *capsule = pgemu_attribute("_C_API");
    pgemu_api const *api = capsule ? (pgemu_api const *)PyCapsule_GetPointer(capsule, PGEMU_CAPSULE) : NULL;
    Py_XDECREF(capsule); /* pgemu.capi keeps it */
    if (api && api->abi != PGEMU_ABI) {
        PyErr_Format(PyExc_ImportError, "pgemu has C ABI %u, this program was built for %u: build it again",
                     (unsigned)api->abi, (unsigned)PGEMU_ABI);
        return NULL;
    }
    if (api && api->size < sizeof(pgemu_api)) {
        PyErr_Format(PyExc_ImportError, "pgemu has a C table of %u bytes, this program needs %u: a newer pgemu is needed",
                     (unsigned)api->size, (unsigned)sizeof(pgemu_api));
        return NULL;
    }
    return api;
}

/* The machine behind a pgemu.Machine, valid as long as that object lives; NULL with a Python exception. Hold the GIL. */
static inline pgemu_machine *pgemu_handle(PyObject *machine)
{
    PyObject *function = pgemu_attribute("handle");
    PyObject *number = function ? PyObject_CallFunctionObjArgs(function, machine, NULL) : NULL;
    void *found = number ? PyLong_AsVoidPtr(number) : NULL;
    Py_XDECREF(number);
    Py_XDECREF(function);
    return (pgemu_machine *)found;
}

#endif /* PGEMU_NO_PYTHON */

#ifdef __cplusplus
}
#endif

#endif /* PGEMU_H */
