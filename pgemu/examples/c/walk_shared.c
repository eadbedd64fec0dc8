/* Walk the page tables of a machine in shared memory.
 *
 *     cc -O2 -I "$(python -c 'import pgemu, os; print(os.path.dirname(pgemu.__file__))')/include" walk_shared.c
 *
 *     ./a.out NAME                    list the roots and their formats
 *     ./a.out NAME ROOT               for each address on stdin (hexadecimal): status, level, physical address
 *     ./a.out NAME ROOT COUNT STEP    COUNT walks from address 0 on, each STEP further, modulo 1 GiB: how many, and
 *                                     how they ended; for a table that the machine's owner edits meanwhile
 *
 * ROOT is a name as the list has it: process:0, vm:0, table:0.
 */
#include "pgemu_shared.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define MOST 4500

static struct pgemu_shared_root roots[MOST];

static const char *name_of(const struct pgemu_shared_root *root)
{
    static char text[64];
    const char *kind = pgemu_shared_kind_name(root->kind);
    if (root->kind == PGEMU_ROOT_KERNEL)
        snprintf(text, sizeof text, "%s", kind);
    else
        snprintf(text, sizeof text, "%s:%" PRIu64, kind, root->number);
    return text;
}

static int find_root(const struct pgemu_shared *shared, const char *name, struct pgemu_shared_root *root)
{
    size_t i, count = pgemu_shared_roots(shared, roots, MOST);
    for (i = 0; i < count && i < MOST; i++) {
        if (strcmp(name_of(&roots[i]), name) == 0) {
            *root = roots[i];
            return 1;
        }
    }
    return 0;
}

static int list(const struct pgemu_shared *shared)
{
    size_t i, count = pgemu_shared_roots(shared, roots, MOST);
    for (i = 0; i < count && i < MOST; i++) {
        struct pgemu_shared_format format;
        int error = pgemu_shared_read_format(shared, roots[i].format, &format);
        printf("%s %s %#" PRIx64 "\n", name_of(&roots[i]), error == PGEMU_SHARED_OK ? format.name : "?",
               roots[i].address);
    }
    return 0;
}

static int walk_stdin(const struct pgemu_shared *shared, const struct pgemu_shared_format *format, uint64_t root)
{
    struct pgemu_shared_walked walked;
    uint64_t address;
    while (scanf("%" SCNx64, &address) == 1) {
        pgemu_shared_walk_stable(shared, format, root, address, 1000, &walked);
        printf("%d %u %" PRIx64 "\n", walked.status, walked.level, walked.physical);
    }
    return 0;
}

static int walk_on(const struct pgemu_shared *shared, const struct pgemu_shared_format *format, uint64_t root,
                   uint64_t count, uint64_t step)
{
    uint64_t ended[256] = {0}, i, sum = 0;
    struct pgemu_shared_walked walked;
    for (i = 0; i < count; i++) {
        uint64_t address = i * step % (UINT64_C(1) << 30);
        ended[pgemu_shared_walk_stable(shared, format, root, address, 1000, &walked) & 255]++;
        sum += walked.physical;
    }
    for (i = 0; i < 256; i++)
        if (ended[i] != 0)
            printf("%" PRIu64 " %" PRIu64 "\n", i, ended[i]);
    fprintf(stderr, "sum %" PRIx64 "\n", sum);
    return 0;
}

int main(int argc, char **argv)
{
    struct pgemu_shared shared;
    struct pgemu_shared_format format;
    struct pgemu_shared_root root;
    int error;
    if (argc < 2 || argc == 4 || argc > 5) {
        fprintf(stderr, "usage: %s NAME [ROOT [COUNT STEP]]\n", argv[0]);
        return 2;
    }
    error = pgemu_shared_open(&shared, argv[1]);
    if (error != PGEMU_SHARED_OK) {
        fprintf(stderr, "%s: %s\n", argv[1], error == PGEMU_SHARED_ERRNO ? strerror(errno) : pgemu_shared_error(error));
        return 1;
    }
    if (argc == 2)
        return list(&shared);
    if (!find_root(&shared, argv[2], &root)) {
        fprintf(stderr, "%s: no such root\n", argv[2]);
        return 1;
    }
    error = pgemu_shared_read_format(&shared, root.format, &format);
    if (error != PGEMU_SHARED_OK) {
        fprintf(stderr, "%s: %s\n", argv[2], pgemu_shared_error(error));
        return 1;
    }
    if (argc == 3)
        return walk_stdin(&shared, &format, root.address);
    return walk_on(&shared, &format, root.address, strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
}
