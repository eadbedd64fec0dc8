/* The sequential translation of pgemu_kernels/tables/translate.py in C, for bench/test_translate.py: the control.
 *
 * Takes the same row of format words (layout.F_*), writes the same three arrays, remembers the last level-1 table
 * in the same way. Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G.
 */
#include <stddef.h>
#include <stdint.h>

enum { /* layout.F_* */
	F_PRESENT = 0, F_ADDRESS = 2, F_LEVELS = 16, F_ROOT_BITS = 17, F_INPUT_BITS = 18, F_SIGN_EXTENDED = 19,
	F_LEAF_MASK = 20, F_LEAF_VALUE = 21, F_PAGE_MASK = 22, F_PAGE_VALUE = 23, F_LARGEST_LEAF = 24,
};
enum { NOT_PRESENT = 1, RESERVED = 2, NOT_CANONICAL = 7, OUTSIDE_MEMORY = 9 }; /* layout.WalkStatus */

struct found {
	uint64_t entry, slot, level, status;
};

static inline struct found walk(const uint64_t *restrict ram, uint64_t words, const uint64_t *restrict f, uint64_t root,
				uint64_t address)
{
	uint64_t level = f[F_LEVELS], table = root >> 3, mask = (1ull << f[F_ROOT_BITS]) - 1;
	uint64_t half = f[F_SIGN_EXTENDED] << (f[F_INPUT_BITS] - 1);

	if ((address + half) >> f[F_INPUT_BITS])
		return (struct found){ 0, 0, level, NOT_CANONICAL };
#pragma GCC unroll 5
	for (; level; level--, mask = 511) {
		uint64_t slot = table + (address >> (12 + 9 * (level - 1)) & mask), entry;
		int leaf;

		if (slot >= words)
			return (struct found){ 0, 0, level, OUTSIDE_MEMORY };
		entry = ram[slot];
		if (!(entry & f[F_PRESENT]))
			return (struct found){ entry, slot, level, NOT_PRESENT };
		leaf = level == 1 ? (entry & f[F_PAGE_MASK]) == f[F_PAGE_VALUE]
				  : (entry & f[F_LEAF_MASK]) == f[F_LEAF_VALUE];
		if (leaf ? level > f[F_LARGEST_LEAF] : level == 1)
			return (struct found){ entry, slot, level, RESERVED };
		if (leaf)
			return (struct found){ entry, slot, level, 0 };
		table = (entry & f[F_ADDRESS]) >> 3;
	}
	return (struct found){ 0, 0, 1, RESERVED };
}

void translate(const uint64_t *restrict ram, uint64_t words, const uint64_t *restrict f, uint64_t root,
	       const uint64_t *restrict addresses, size_t n, uint64_t *restrict physical, uint8_t *restrict status,
	       uint8_t *restrict levels)
{
	uint64_t last = ~0ull, table = 0;

	for (size_t i = 0; i < n; i++) {
		uint64_t address = addresses[i], inside;
		struct found found;

		if (address >> 21 == last) {
			uint64_t entry = ram[table + (address >> 12 & 511)];

			if (entry & f[F_PRESENT] && (entry & f[F_PAGE_MASK]) == f[F_PAGE_VALUE]) {
				physical[i] = (entry & f[F_ADDRESS]) | (address & 4095);
				status[i] = 0;
				levels[i] = 1;
				continue;
			}
		}
		found = walk(ram, words, f, root, address);
		inside = (1ull << (12 + 9 * (found.level - 1))) - 1;
		physical[i] = found.status ? 0 : (found.entry & f[F_ADDRESS] & ~inside) | (address & inside);
		status[i] = found.status;
		levels[i] = found.level;
		last = found.level == 1 && !found.status ? address >> 21 : ~0ull;
		table = found.slot & ~511ull;
	}
}
