/* Walk the page tables of a pgemu machine in shared memory (Machine.share()) from C99 or C++11, without Python.
 *
 *     struct pgemu_shared shared;
 *     int error = pgemu_shared_open(&shared, "/name");
 *     if (error != PGEMU_SHARED_OK)
 *         fprintf(stderr, "%s\n", pgemu_shared_error(error));
 *
 * Everything is read, nothing is written; a segment is never trusted: whatever it holds, no access leaves it. What the
 * functions read of it after pgemu_shared_open() are memory, formats and lists, as they are at that moment. (A segment
 * that somebody makes shorter ends the process with SIGBUS, as any mapped file does. Its owner never does.)
 *
 * While the owner edits: a word is one that was stored, never half of two. pgemu_shared_walk() reads each entry once,
 * and may find the entries of two moments. pgemu_shared_walk_stable() reads them again: they were all in force at one
 * moment (unless an entry went away and came back meanwhile), and the sequence, which SharedMachine.edit() moves, was
 * even and the same: if the owner edits within edit() only, nothing at all changed.
 *
 * A reader's TLB. The segment tells nobody which addresses were flushed, or that any was. The sequence says that
 * something may have changed, if the owner makes all its changes within edit(): keep it from the walk that filled the
 * TLB, and when it has moved, or is odd, forget everything. An owner that changes anything outside edit() does not move
 * it (faults, conversions and zaps by themselves do not): then a reader cannot know, and has to walk each time, as
 * pgemu_shared_walk_stable() does, or to ask pgemu_shared_unchanged() of the walk that it keeps.
 *
 * Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G. A walk is that of PageTable.translate() without an access: what is present
 * and what is a leaf, no rights. Formats are data of the segment: x86-64, EPT, NPT, Arm64 stage 2, VT-d, AMD's IOMMU.
 */
#ifndef PGEMU_SHARED_H
#define PGEMU_SHARED_H

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PGEMU_SHARED_VERSION 1
#define PGEMU_SHARED_MAGIC UINT64_C(0x4d4853756d656770) /* "pgemuSHM" */

enum pgemu_shared_result {
    PGEMU_SHARED_OK = 0,
    PGEMU_SHARED_ERRNO = -1,     /* errno says what the system refused */
    PGEMU_SHARED_NOT_READY = -2, /* no magic: no machine, or one that is still being put there */
    PGEMU_SHARED_OTHER = -3,     /* a machine in another version of this layout */
    PGEMU_SHARED_DAMAGED = -4,   /* the header says what cannot be */
    PGEMU_SHARED_NO_SUCH = -5    /* there is no format of that row */
};

/* How a walk ended: pgemu.WalkStatus, of which a walk without an access has these. They are macros of the same text as
 * in pgemu_words.h, so that both headers can be included in any order. (In strict C99 pgemu.h is the first: Python.h
 * says what system headers define.) */
#define PGEMU_WALK_OK 0
#define PGEMU_WALK_NOT_PRESENT 1
#define PGEMU_WALK_RESERVED 2 /* a reserved kind of entry */
#define PGEMU_WALK_MISCONFIGURED 5 /* the same of EPT */
#define PGEMU_WALK_NOT_CANONICAL 7
#define PGEMU_WALK_ADDRESS_SIZE 8 /* beyond the input addresses of the format */
#define PGEMU_WALK_OUTSIDE_MEMORY 9 /* a table lies where there is no memory */
#define PGEMU_WALK_CHANGING 100 /* pgemu_shared_walk_stable() only: it never held still */

enum pgemu_shared_kind {
    PGEMU_ROOT_KERNEL = 1,
    PGEMU_ROOT_PROCESS = 2,
    PGEMU_ROOT_USER = 3, /* the user half of a process with page-table isolation */
    PGEMU_ROOT_VM = 4,
    PGEMU_ROOT_PRIVATE = 5, /* private memory of a VM, where that has a root of its own */
    PGEMU_ROOT_IO = 6,      /* an address space of devices */
    PGEMU_ROOT_TABLE = 7    /* Machine.create_page_table() */
};

#define PGEMU_SHARED_LIVE 1
#define PGEMU_SHARED_CLOSED 2 /* its name is gone; what is mapped stays */
#define PGEMU_SHARED_LEVELS 6
#define PGEMU_SHARED_MOST_SOURCES 64
#define PGEMU_SHARED_MOST_ROWS 65536

/* Words of the header, uint64 in the byte order of the computer; offsets are bytes from the beginning of the segment.
 * "Once": does not change after the magic is there. pgemu_shared_header() reads one as it is now. */
enum {
    PGEMU_WORD_MAGIC = 0,    /* PGEMU_SHARED_MAGIC, written last of all: before there is no machine */
    PGEMU_WORD_VERSION = 1,  /* PGEMU_SHARED_VERSION, of this layout. Once */
    PGEMU_WORD_HEADER = 2,   /* bytes of the header, PGEMU_WORDS * 8 or more. Once */
    PGEMU_WORD_SIZE = 3,     /* bytes of the segment. Once */
    PGEMU_WORD_STATE = 4,    /* PGEMU_SHARED_LIVE, then PGEMU_SHARED_CLOSED */
    PGEMU_WORD_SEQUENCE = 5, /* odd within SharedMachine.edit() and while the lists of word 6 are
                              * written, 2 more after each; see "A reader's TLB" above */
    PGEMU_WORD_WRITTEN = 6,  /* how many times the lists of formats and of page tables were written: if it has moved,
                              * read formats and roots again. Roots of processes and VMs do not move it */
    PGEMU_WORD_OWNER = 7,    /* process id of the owner. Once */
    PGEMU_WORD_BEGAN = 8,    /* when the owner started, clock ticks since boot, word 22 of /proc/PID/stat: if there is
                              * no process OWNER that began then, the owner has crashed. Once */
    PGEMU_WORD_DIGEST = 9,   /* of the layout of the four arrays: equal where the same pgemu laid them out. For who
                              * reads more of them than this header describes. Once */
    PGEMU_WORD_ONE = 10,     /* 1: the count of what there is one of. Once */
    PGEMU_WORD_ARRAYS = 11,  /* three words for each of ram, state, stats, counts: offset, elements, bytes of one.
                              * ram is physical memory from address 0 on. Once */
    PGEMU_WORD_GUEST = 23,   /* three words: physical address of guest memory, its bytes, and the offset of a uint32 for
                              * each 4K page of it: the frame (4096 bytes, in ram) of its contents, 0: zeroes. Once */
    PGEMU_WORD_FORMATS = 26, /* four words: offset of the formats, bytes of a row, rows there is room for; rows in use,
                              * the only one that changes. A row: pgemu_shared_read_format() */
    PGEMU_WORD_SOURCES = 30, /* three words: offset of what says where roots are, bytes of a row, rows. A row:
                              * pgemu_shared_roots(). Once */
    PGEMU_WORD_TABLES = 33,  /* five words: offset of the list of Machine.create_page_table()'s, bytes of a row, rows
                              * there is room for; rows to look at, and page tables there are, more than rows where the
                              * list is full. pgemu_shared_roots() reads it, too */
    PGEMU_WORD_TEXT = 40,    /* eight words: version of pgemu as text, zeroes behind it. Once */
    PGEMU_WORDS = 64         /* those that are not named are 0 */
};

struct pgemu_shared_array {
    uint64_t at; /* bytes from the beginning of the segment */
    uint64_t elements;
    uint64_t bytes; /* of an element */
};

struct pgemu_shared {
    const unsigned char *base;
    uint64_t size;
    struct pgemu_shared_array ram, state, stats, counts;
    uint64_t guest_start, guest_bytes, contents_at; /* guest memory, and its uint32 for each 4K page */
    uint64_t formats_at, formats_stride, formats_room;
    uint64_t sources_at, sources_stride, sources;
    uint64_t owner, digest;
};

struct pgemu_shared_format {
    char name[32];
    uint64_t levels, root_bits, input_bits, sign_extended;
    uint64_t present, address;                           /* any of these bits; bits of a physical address */
    uint64_t leaf_mask, leaf_value;                      /* above level 1 a leaf: entry & mask == value */
    uint64_t page_mask, page_value;                      /* the same at level 1 */
    uint64_t largest_leaf;                               /* the highest level that may hold one */
    uint64_t sized_mask, sized_value;                    /* leaves with their size in the address; mask 0: none */
    uint64_t table_level_shift;                          /* where a table entry says its level; 0: nowhere */
    uint64_t family;                                     /* 0 x86, 1 NPT, 2 EPT, 3 Arm64, 4 VT-d, 5 AMD's IOMMU */
};

struct pgemu_shared_root {
    int kind;        /* enum pgemu_shared_kind */
    uint64_t number; /* of the process, VM, I/O space, place in the list of page tables */
    uint64_t address;
    uint64_t format;     /* row, for pgemu_shared_format() */
    uint64_t generation; /* of a process and a page table: how many had this number before */
};

struct pgemu_shared_walked {
    int status;        /* PGEMU_WALK_* */
    unsigned level;    /* of the leaf, or of the entry at fault */
    unsigned count;    /* entries that were read */
    uint64_t physical; /* 0 unless the status is PGEMU_WALK_OK */
    uint64_t where[PGEMU_SHARED_LEVELS]; /* their physical addresses, from the top table on */
    uint64_t entry[PGEMU_SHARED_LEVELS];
};

/* ------------------------------------------------------------------ words of the segment */

static inline uint64_t pgemu_shared_word_at(const unsigned char *place)
{
#if defined(__GNUC__) || defined(__clang__)
    return __atomic_load_n((const uint64_t *)(const void *)place, __ATOMIC_ACQUIRE);
#else
    return *(const volatile uint64_t *)(const void *)place;
#endif
}

/* Whether `count` things of `bytes` each lie in the segment from `at` on. */
static inline int pgemu_shared_holds(const struct pgemu_shared *shared, uint64_t at, uint64_t count, uint64_t bytes)
{
    return at <= shared->size && bytes != 0 && count <= (shared->size - at) / bytes;
}

/* The word at a byte offset of the segment: 1, or 0 where there is none. */
static inline int pgemu_shared_word(const struct pgemu_shared *shared, uint64_t at, uint64_t *value)
{
    if (at % 8 != 0 || !pgemu_shared_holds(shared, at, 1, 8))
        return 0;
    *value = pgemu_shared_word_at(shared->base + at);
    return 1;
}

/* A word of the header (PGEMU_WORD_*), as it is now. */
static inline uint64_t pgemu_shared_header(const struct pgemu_shared *shared, unsigned word)
{
    return word < PGEMU_WORDS ? pgemu_shared_word_at(shared->base + 8 * (size_t)word) : 0;
}

/* ------------------------------------------------------------------ opening */

static inline const char *pgemu_shared_error(int error)
{
    switch (error) {
    case PGEMU_SHARED_OK: return "no error";
    case PGEMU_SHARED_ERRNO: return "the segment cannot be opened or mapped (errno)";
    case PGEMU_SHARED_NOT_READY: return "no pgemu machine in it, or one that is still being put there";
    case PGEMU_SHARED_OTHER: return "a machine in another version of the layout";
    case PGEMU_SHARED_DAMAGED: return "damaged: its header says what cannot be";
    case PGEMU_SHARED_NO_SUCH: return "no format of that row, or one that cannot be";
    default: return "unknown error";
    }
}

static inline int pgemu_shared_read_array(const struct pgemu_shared *shared, unsigned number, uint64_t bytes,
                                          struct pgemu_shared_array *array)
{
    unsigned word = PGEMU_WORD_ARRAYS + 3 * number;
    array->at = pgemu_shared_header(shared, word);
    array->elements = pgemu_shared_header(shared, word + 1);
    array->bytes = pgemu_shared_header(shared, word + 2);
    return array->bytes == bytes && array->at % 8 == 0 &&
           pgemu_shared_holds(shared, array->at, array->elements, bytes);
}

/* Use what lies in memory already: `base` is aligned to 8, `size` bytes are mapped. */
static inline int pgemu_shared_use(struct pgemu_shared *shared, const void *base, uint64_t size)
{
    uint64_t said, pages, counts_end;
    memset(shared, 0, sizeof *shared);
    shared->base = (const unsigned char *)base;
    shared->size = size;
    if (size < PGEMU_WORDS * 8 || pgemu_shared_header(shared, PGEMU_WORD_MAGIC) != PGEMU_SHARED_MAGIC)
        return PGEMU_SHARED_NOT_READY;
    if (pgemu_shared_header(shared, PGEMU_WORD_VERSION) != PGEMU_SHARED_VERSION)
        return PGEMU_SHARED_OTHER;
    said = pgemu_shared_header(shared, PGEMU_WORD_SIZE);
    if (said > size || pgemu_shared_header(shared, PGEMU_WORD_HEADER) < PGEMU_WORDS * 8)
        return PGEMU_SHARED_DAMAGED;
    if (!pgemu_shared_read_array(shared, 0, 8, &shared->ram) || !pgemu_shared_read_array(shared, 1, 8, &shared->state) ||
        !pgemu_shared_read_array(shared, 2, 8, &shared->stats) ||
        !pgemu_shared_read_array(shared, 3, 4, &shared->counts))
        return PGEMU_SHARED_DAMAGED;
    shared->guest_start = pgemu_shared_header(shared, PGEMU_WORD_GUEST);
    shared->guest_bytes = pgemu_shared_header(shared, PGEMU_WORD_GUEST + 1);
    shared->contents_at = pgemu_shared_header(shared, PGEMU_WORD_GUEST + 2);
    pages = shared->guest_bytes / 4096;
    counts_end = shared->counts.at + shared->counts.elements * 4;
    if (shared->contents_at % 4 != 0 || shared->contents_at < shared->counts.at || shared->contents_at > counts_end ||
        pages > (counts_end - shared->contents_at) / 4 || shared->guest_start % 4096 != 0)
        return PGEMU_SHARED_DAMAGED;
    shared->formats_at = pgemu_shared_header(shared, PGEMU_WORD_FORMATS);
    shared->formats_stride = pgemu_shared_header(shared, PGEMU_WORD_FORMATS + 1);
    shared->formats_room = pgemu_shared_header(shared, PGEMU_WORD_FORMATS + 2);
    shared->sources_at = pgemu_shared_header(shared, PGEMU_WORD_SOURCES);
    shared->sources_stride = pgemu_shared_header(shared, PGEMU_WORD_SOURCES + 1);
    shared->sources = pgemu_shared_header(shared, PGEMU_WORD_SOURCES + 2);
    if (shared->formats_stride < 19 * 8 || shared->sources_stride < 10 * 8 ||
        !pgemu_shared_holds(shared, shared->formats_at, shared->formats_room, shared->formats_stride) ||
        !pgemu_shared_holds(shared, shared->sources_at, shared->sources, shared->sources_stride))
        return PGEMU_SHARED_DAMAGED;
    shared->owner = pgemu_shared_header(shared, PGEMU_WORD_OWNER);
    shared->digest = pgemu_shared_header(shared, PGEMU_WORD_DIGEST);
    return PGEMU_SHARED_OK;
}

/* Map the segment of a name read-only. With any result but PGEMU_SHARED_OK nothing stays open. */
static inline int pgemu_shared_open(struct pgemu_shared *shared, const char *name)
{
    struct stat about;
    void *base;
    int file, result, saved;
    memset(shared, 0, sizeof *shared);
    file = shm_open(name, O_RDONLY, 0);
    if (file < 0)
        return PGEMU_SHARED_ERRNO;
    if (fstat(file, &about) != 0) {
        saved = errno;
        close(file);
        errno = saved;
        return PGEMU_SHARED_ERRNO;
    }
    if (about.st_size < PGEMU_WORDS * 8) {
        close(file);
        return PGEMU_SHARED_NOT_READY;
    }
    base = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_SHARED, file, 0);
    saved = errno;
    close(file);
    errno = saved;
    if (base == MAP_FAILED)
        return PGEMU_SHARED_ERRNO;
    result = pgemu_shared_use(shared, base, (uint64_t)about.st_size);
    if (result != PGEMU_SHARED_OK) {
        munmap(base, (size_t)about.st_size);
        memset(shared, 0, sizeof *shared);
    }
    return result;
}

static inline void pgemu_shared_close(struct pgemu_shared *shared)
{
    if (shared->base != NULL)
        munmap((void *)(uintptr_t)shared->base, (size_t)shared->size);
    memset(shared, 0, sizeof *shared);
}

/* ------------------------------------------------------------------ formats and roots */

static inline int pgemu_shared_read_format(const struct pgemu_shared *shared, uint64_t row,
                                           struct pgemu_shared_format *format)
{
    uint64_t words[19], at;
    unsigned i;
    memset(format, 0, sizeof *format);
    if (row >= shared->formats_room)
        return PGEMU_SHARED_NO_SUCH;
    at = shared->formats_at + row * shared->formats_stride;
    for (i = 0; i < 19; i++)
        if (!pgemu_shared_word(shared, at + 8 * i, &words[i]))
            return PGEMU_SHARED_DAMAGED;
    memcpy(format->name, words, 31);
    format->levels = words[4];
    format->root_bits = words[5];
    format->input_bits = words[6];
    format->sign_extended = words[7];
    format->present = words[8];
    format->address = words[9];
    format->leaf_mask = words[10];
    format->leaf_value = words[11];
    format->page_mask = words[12];
    format->page_value = words[13];
    format->largest_leaf = words[14];
    format->sized_mask = words[15];
    format->sized_value = words[16];
    format->table_level_shift = words[17];
    format->family = words[18];
    if (format->levels < 1 || format->levels > PGEMU_SHARED_LEVELS || format->root_bits < 1 ||
        format->root_bits > 16 || format->input_bits < 13 || format->input_bits > 64 || format->sign_extended > 1 ||
        format->largest_leaf > PGEMU_SHARED_LEVELS || format->table_level_shift > 61)
        return PGEMU_SHARED_NO_SUCH;
    return PGEMU_SHARED_OK;
}

/* The field of a row that a place (byte offset and one; 0: none) names. */
static inline int pgemu_shared_field(const struct pgemu_shared *shared, uint64_t row_at, uint64_t place,
                                     uint64_t stride, uint64_t *value)
{
    return place != 0 && place - 1 < stride && pgemu_shared_word(shared, row_at + (place - 1), value);
}

/* List the roots there are now: how many, of which the first `room` stand in `roots`. */
static inline size_t pgemu_shared_roots(const struct pgemu_shared *shared, struct pgemu_shared_root *roots, size_t room)
{
    size_t found = 0;
    uint64_t source;
    for (source = 0; source < shared->sources && source < PGEMU_SHARED_MOST_SOURCES; source++) {
        uint64_t words[10], count, row, shared_format = 0;
        uint64_t at = shared->sources_at + source * shared->sources_stride;
        unsigned i, whole = 1;
        for (i = 0; i < 10; i++)
            whole &= (unsigned)pgemu_shared_word(shared, at + 8 * i, &words[i]);
        if (!whole || words[0] > 0xffff || words[2] == 0 || !pgemu_shared_word(shared, words[3], &count))
            continue;
        if (words[7] != 0 && !pgemu_shared_word(shared, words[7], &shared_format))
            continue;
        if (count > words[4])
            count = words[4];
        if (count > PGEMU_SHARED_MOST_ROWS)
            count = PGEMU_SHARED_MOST_ROWS;
        for (row = 0; row < count && pgemu_shared_holds(shared, words[1], row + 1, words[2]); row++) {
            struct pgemu_shared_root root;
            uint64_t row_at = words[1] + row * words[2], none;
            root.kind = (int)words[0];
            root.number = row;
            root.format = shared_format;
            root.generation = 0;
            if (!pgemu_shared_field(shared, row_at, words[5], words[2], &root.address) || root.address == 0)
                continue;
            if (pgemu_shared_field(shared, row_at, words[6], words[2], &none) && none == root.address)
                continue;
            pgemu_shared_field(shared, row_at, words[8], words[2], &root.format);
            pgemu_shared_field(shared, row_at, words[9], words[2], &root.generation);
            if (found < room)
                roots[found] = root;
            found++;
        }
    }
    return found;
}

static inline const char *pgemu_shared_kind_name(int kind)
{
    static const char *const names[] = {"?", "kernel", "process", "user", "vm", "private", "io", "table"};
    return names[kind >= PGEMU_ROOT_KERNEL && kind <= PGEMU_ROOT_TABLE ? kind : 0];
}

/* ------------------------------------------------------------------ memory and walks */

/* The word at a physical address, a multiple of 8: 1, or 0 where there is no memory. */
static inline int pgemu_shared_load(const struct pgemu_shared *shared, uint64_t physical, uint64_t *value)
{
    uint64_t word = physical / 8, page, place, frame;
    uint32_t number;
    if (word < shared->ram.elements)
        return pgemu_shared_word(shared, shared->ram.at + word * 8, value);
    if (physical < shared->guest_start || physical - shared->guest_start >= shared->guest_bytes / 4096 * 4096)
        return 0;
    page = (physical - shared->guest_start) / 4096;
    place = shared->contents_at + page * 4; /* pgemu_shared_use() saw that it lies in the segment */
    number = *(const volatile uint32_t *)(const void *)(shared->base + place);
    frame = number;
    if (frame == 0) {
        *value = 0;
        return 1;
    }
    word = frame * 512 + physical % 4096 / 8;
    return word < shared->ram.elements && pgemu_shared_word(shared, shared->ram.at + word * 8, value);
}

/* Bits of an address within a leaf: 12, 21, 30, ...; of a sized one what its address says, at most 63. */
static inline unsigned pgemu_shared_leaf_bits(const struct pgemu_shared_format *format, unsigned level, uint64_t entry)
{
    unsigned bits = 12;
    if (format->sized_mask == 0 || (entry & format->sized_mask) != format->sized_value)
        return 12 + 9 * (level - 1);
    while (bits < 63 && ((entry & format->address) >> bits & 1) != 0)
        bits++;
    return bits < 63 ? bits + 1 : 63;
}

/* Walk one address; `root` and the format's row are those of a pgemu_shared_root. Returns walked->status. */
static inline int pgemu_shared_walk(const struct pgemu_shared *shared, const struct pgemu_shared_format *format,
                                    uint64_t root, uint64_t address, struct pgemu_shared_walked *walked)
{
    uint64_t half = format->sign_extended != 0 ? UINT64_C(1) << (format->input_bits - 1) : 0;
    uint64_t mask = (UINT64_C(1) << format->root_bits) - 1, table = root, entry;
    unsigned level = (unsigned)format->levels;
    int wrong = format->family == 2 ? PGEMU_WALK_MISCONFIGURED : PGEMU_WALK_RESERVED;
    walked->level = level;
    walked->count = 0;
    walked->physical = 0;
    if (format->input_bits < 64 && (address + half) >> format->input_bits != 0)
        return walked->status = half != 0 ? PGEMU_WALK_NOT_CANONICAL : PGEMU_WALK_ADDRESS_SIZE;
    for (;;) {
        unsigned shift = 12 + 9 * (level - 1);
        uint64_t where = table + (address >> shift & mask) * 8;
        int leaf, sized;
        walked->level = level;
        if (!pgemu_shared_load(shared, where, &entry))
            return walked->status = PGEMU_WALK_OUTSIDE_MEMORY;
        walked->where[walked->count] = where;
        walked->entry[walked->count++] = entry;
        if ((entry & format->present) == 0)
            return walked->status = PGEMU_WALK_NOT_PRESENT;
        sized = format->sized_mask != 0 && (entry & format->sized_mask) == format->sized_value;
        leaf = level == 1 ? (entry & format->page_mask) == format->page_value
                          : (entry & format->leaf_mask) == format->leaf_value;
        if (leaf || sized) {
            unsigned bits = pgemu_shared_leaf_bits(format, level, entry);
            uint64_t inside = (UINT64_C(1) << bits) - 1;
            if (level > format->largest_leaf)
                return walked->status = wrong;
            walked->physical = (entry & format->address & ~inside) | (address & inside);
            return walked->status = PGEMU_WALK_OK;
        }
        if (level == 1 ||
            (format->table_level_shift != 0 && (entry >> format->table_level_shift & 7) != level - 1))
            return walked->status = wrong;
        table = entry & format->address;
        mask = 511;
        level--;
    }
}

/* Whether every entry of a walk is still the same. */
static inline int pgemu_shared_unchanged(const struct pgemu_shared *shared, const struct pgemu_shared_walked *walked)
{
    unsigned i;
    for (i = 0; i < walked->count; i++) {
        uint64_t entry;
        if (!pgemu_shared_load(shared, walked->where[i], &entry) || entry != walked->entry[i])
            return 0;
    }
    return 1;
}

/* A walk of one moment; after `tries` that were disturbed PGEMU_WALK_CHANGING, with the last one in `walked`. */
static inline int pgemu_shared_walk_stable(const struct pgemu_shared *shared, const struct pgemu_shared_format *format,
                                           uint64_t root, uint64_t address, unsigned tries,
                                           struct pgemu_shared_walked *walked)
{
    do {
        uint64_t before = pgemu_shared_header(shared, PGEMU_WORD_SEQUENCE);
        int status = pgemu_shared_walk(shared, format, root, address, walked);
        if (before % 2 == 0 && pgemu_shared_unchanged(shared, walked) &&
            pgemu_shared_header(shared, PGEMU_WORD_SEQUENCE) == before)
            return status;
    } while (tries-- > 1);
    return walked->status = PGEMU_WALK_CHANGING;
}

#ifdef __cplusplus
}
#endif

#endif
