/* The control of bench/test_split.py: what a split and a merge of folios write at least.
 *
 * The struct pages lie in a row. For each folio all vmemmap pages but the first are copied, then one pass stores what a
 * split stores in each struct page, and one what a merge stores. Fields as in pgemu_kernels/folios/folio.py, in 64-bit words.
 */
#include <stdint.h>
#include <string.h>

enum { FLAGS = 0, COMPOUND = 1, MAPPING = 3, INDEX = 4, PRIVATE = 5, COUNTS = 6, MEMCG = 7, WORDS = 8, FRAME = 512 };

void copy_and_store(uint64_t *restrict pages, const uint64_t *restrict source, uint64_t count, uint64_t folios,
		    uint64_t times, int memcg)
{
	for (uint64_t n = 0; n < folios * times; n++) {
		uint64_t *first = pages + n % folios * count * WORDS, *end = first + count * WORDS;

		for (uint64_t *page = first + FRAME; page < end; page += FRAME)
			memcpy(page, source, FRAME * sizeof(*page));
		for (uint64_t i = 0; i < count; i++) {
			uint64_t *page = first + i * WORDS;

			page[FLAGS] = 8;
			page[COMPOUND] = 0;
			page[MAPPING] = n;
			page[INDEX] = i;
			page[COUNTS] = 0x1ffffffff;
			if (memcg)
				page[MEMCG] = n;
		}
		for (uint64_t *page = first; page < end; page += WORDS) {
			page[FLAGS] = 0;
			page[COMPOUND] = 1;
			page[MAPPING] = 0xdead000000000400;
			page[PRIVATE] = 0;
			page[COUNTS] = 0xffffffff;
		}
	}
}
