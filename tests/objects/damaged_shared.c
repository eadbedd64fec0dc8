/* Damage copies of a segment's words and use them: whatever they hold, nothing outside is read (AddressSanitizer). */
#include "pgemu_shared.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t seed;

static uint64_t next(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static uint64_t value(uint64_t old, uint64_t size)
{
    switch (next() % 8) {
    case 0: return next();
    case 1: return next() >> (next() % 64);
    case 2: return UINT64_MAX - next() % 16;
    case 3: return old ^ UINT64_C(1) << (next() % 64);
    case 4: return size - next() % 64;
    case 5: return old + next() % 17 - 8;
    case 6: return 0;
    default: return next() % size;
    }
}

int main(int argc, char **argv)
{
    struct pgemu_shared whole;
    struct pgemu_shared_root roots[32];
    uint64_t *copy, small, rounds, round, i, opened = 0, walks = 0, ok = 0;
    if (argc != 4 || pgemu_shared_open(&whole, argv[1]) != PGEMU_SHARED_OK)
        return 1;
    rounds = strtoull(argv[2], NULL, 0);
    seed = strtoull(argv[3], NULL, 0) | 1;
    small = whole.ram.at + 512 * 1024; /* header, lists and the first tables: all else is cut off */
    copy = (uint64_t *)malloc((size_t)small);
    memcpy(copy, whole.base, (size_t)small);
    copy[3] = small;
    copy[12] = 512 * 1024 / 8;
    for (i = 0; i < 3; i++) { /* the other arrays lie in what is left */
        copy[14 + 3 * i] = whole.ram.at;
        copy[15 + 3 * i] = 64;
    }
    copy[24] = 64 * 4096;
    copy[25] = whole.ram.at;
    for (round = 0; round < rounds; round++) {
        struct pgemu_shared shared;
        uint64_t at[4], old[4], count = 1 + next() % 4;
        size_t found;
        for (i = 0; i < count; i++) {
            at[i] = next() % 4 == 0 ? next() % (small / 8) : next() % (next() % 2 ? 64 : 2048);
            old[i] = copy[at[i]];
            copy[at[i]] = value(old[i], small);
        }
        if (pgemu_shared_use(&shared, copy, small) != PGEMU_SHARED_OK)
            goto undo;
        opened++;
        found = pgemu_shared_roots(&shared, roots, 32);
        for (i = 0; i < 40; i++) {
            struct pgemu_shared_format format;
            struct pgemu_shared_walked walked;
            uint64_t row = i < 4 ? next() : i < found ? roots[i].format : i % 32, root = i < found && i < 32 ? roots[i].address : value(4096, small);
            if (pgemu_shared_read_format(&shared, row, &format) != PGEMU_SHARED_OK)
                continue;
            walks++;
            ok += pgemu_shared_walk_stable(&shared, &format, root, 0x40000000 + next() % 4 * 0x100000, 2, &walked) == 0;
        }
    undo:
        while (count-- > 0)
            copy[at[count]] = old[count];
    }
    printf("%llu %llu %llu\n", (unsigned long long)opened, (unsigned long long)walks, (unsigned long long)ok);
    free(copy);
    pgemu_shared_close(&whole);
    return 0;
}
