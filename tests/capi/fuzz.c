/* Random calls of every function of struct pgemu_api, for tests/capi/test_fuzz_calls.py. Numbers are any; pointers lie in
 * arrays that are large enough, or are NULL or not aligned. */
#define PGEMU_NO_PYTHON
#include <pgemu.h>
#include <string.h>

enum { MOST = 96, EDGES = 15, PLACES = 10 };

static uint64_t state;

static uint64_t any(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state * 2685821657736338717u;
}

static uint64_t below(uint64_t n)
{
	return (any() >> 20) % n;
}

static uint64_t const edges[EDGES] = {
	0, 1, 4095, 4096, (2u << 20) - 4096, 2u << 20, 1u << 30, 1ull << 31, 1ull << 32, 1ull << 40,
	1ull << 47, 1ull << 52, 1ull << 63, -4096ull, -1ull,
};

/* A number near what the scene has, at an edge, or any. */
static uint64_t number(uint64_t const *places)
{
	static uint64_t const steps[6] = { 0, 0, 4096, 5 * 4096, 2u << 20, (2u << 20) - 4096 };
	uint64_t draw = below(100);

	if (draw < 70)
		return places[below(PLACES)] + steps[below(6)];
	return draw < 90 ? edges[below(EDGES)] : any() >> below(64);
}

/* A small number, mostly. */
static uint64_t small(void)
{
	uint64_t draw = below(100);

	return draw < 85 ? below(10) : draw < 92 ? edges[below(EDGES)] : any() >> below(64);
}

static uint64_t length(uint64_t const *places)
{
	static uint64_t const usual[5] = { 4096, 2u << 20, 4u << 20, 1, 2 };

	return below(100) < 80 ? usual[below(5)] : number(places);
}

/* A pointer, now and then none that can be. */
static void *pointer(void *there)
{
	uint64_t draw = below(100);

	return draw < 94 ? there : draw < 97 ? NULL : (char *)there + 1 + below(7);
}

static uint64_t words[16][MOST * 64];
static uint8_t bytes[4][MOST * 2];

static uint64_t root(uint64_t const *roots)
{
	return below(100) < 80 ? roots[below(4)] : number(edges);
}

static void fill(uint64_t count, uint64_t const *places)
{
	for (uint64_t i = 0; i < count; i++) {
		words[0][i] = number(places);
		bytes[0][i] = (uint8_t)(below(100) < 95 ? below(6) : any());
	}
}

static int64_t walk(pgemu_api const *api, pgemu_machine *m, uint64_t which, uint64_t const *places, uint64_t const *roots)
{
	uint64_t mmu = below(100) < 90 ? below(6) : small(), count = below(100) < 97 ? below(MOST + 1) : 1ull << (40 + below(24));
	uint64_t kind = below(100) < 90 ? below(9) : small();
	uint8_t *kinds = below(2) ? bytes[0] : NULL;

	if (which == 0)
		return api->translate(m, mmu, root(roots), kind, number(places), pointer(words[1]));
	if (which == 1)
		return api->translate_nested(m, mmu, root(roots), root(roots), kind, number(places), pointer(words[1]),
					     below(2) ? pointer(words[2]) : NULL, below(2) ? pointer(words[3]) : NULL);
	fill(MOST, places);
	if (which == 2) {
		int lists = below(2);
		pgemu_translations found = {
			pointer(words[1]), pointer(words[2]), below(50) ? bytes[1] : NULL, below(50) ? bytes[2] : NULL,
			lists ? pointer(words[3]) : NULL, lists ? pointer(words[4]) : NULL, lists ? pointer(words[5]) : NULL,
		};
		memset(words[5], 0, sizeof words[5]);
		return api->translate_batch(m, mmu, root(roots), kind, kinds, count, pointer(words[0]), pointer(&found));
	} else {
		pgemu_nested_translations found = {
			pointer(words[1]), pointer(words[2]), pointer(words[3]), below(50) ? bytes[1] : NULL,
			below(50) ? bytes[2] : NULL, below(50) ? bytes[3] : NULL, below(2) ? pointer(words[4]) : NULL,
			below(2) ? pointer(words[5]) : NULL, pointer(words[6]),
		};
		memset(words[6], 0, sizeof words[6]);
		return api->translate_nested_batch(m, mmu, root(roots), root(roots), kind, kinds, count, pointer(words[0]),
						   pointer(&found));
	}
}

/* Neither of these alone: a reservation would be nobody's, and who freezes a folio holds its lock. */
static uint64_t code(void)
{
	uint64_t op;

	do
		op = below(100) < 98 ? below(64) : below(256);
	while (op == PGEMU_OP_POOL_RESERVE || op == PGEMU_OP_FOLIO_FREEZE);
	return op;
}

static uint64_t flags(void)
{
	static uint64_t const usual[6] = { 0, 1, 4, 8, 133, 128 };
	uint64_t draw = below(100);

	return draw < 70 ? usual[below(6)] : draw < 97 ? below(256) : any() >> below(64);
}

static int64_t operation(pgemu_api const *api, pgemu_machine *m, uint64_t const *places)
{
	pgemu_operation one = {
		code(), flags(), below(100) < 95 ? below(8) : small(), small(), small(), small(), number(places), number(places),
		length(places),
	};

	return api->operate(m, pointer(&one), pointer(words[1]));
}

static int64_t column(pgemu_api const *api, pgemu_machine *m, uint64_t const *places)
{
	uint64_t count = below(100) < 97 ? below(MOST + 1) : 1ull << (40 + below(24));
	pgemu_columns columns = {
		pointer(words[0]), below(5) ? pointer(words[1]) : NULL, below(5) ? pointer(words[2]) : NULL,
		below(5) ? pointer(words[3]) : NULL, below(5) ? pointer(words[4]) : NULL, below(4) ? 0 : any(),
	};

	for (int i = 0; i < MOST; i++) {
		words[0][i] = code() | (flags() & 255) << 8 | below(8) << 16 | (small() & 0xffff) << 32 | small() << 48;
		words[1][i] = small();
		words[2][i] = number(places);
		words[3][i] = number(places);
		words[4][i] = length(places);
	}
	return api->run(m, pointer(&columns), count, pointer(words[5]), pointer(words[6]));
}

static int64_t one(pgemu_api const *api, pgemu_machine *m, uint64_t which, uint64_t const *places)
{
	uint64_t a = number(places), n = length(places), *detail = below(4) ? pointer(words[1]) : NULL;

	switch (which) {
	case 0:
		return api->host_fault(m, small(), a, flags(), detail);
	case 1:
		return api->guest_fault(m, small(), a, flags(), detail);
	case 2:
		return api->convert(m, small(), small(), a, n, flags(), detail);
	case 3:
		return api->zap(m, small(), a, n, flags(), detail);
	case 4:
		return api->munmap(m, small(), a, n, detail);
	case 5:
		return api->punch_hole(m, small(), a, n, detail);
	case 6:
		return api->pin(m, small(), small(), a, n, flags(), detail);
	case 7:
		return api->unpin(m, small(), detail);
	case 8:
		return api->dma_map(m, small(), small(), a, n, below(2) ? PGEMU_NO_INODE : small(), number(places), flags(),
				    detail);
	case 9:
		return api->dma_unmap(m, small(), a, n, detail);
	case 10:
		return api->dma_access(m, small(), small(), a, n, any(), flags(), detail);
	case 11:
		return api->event_count(m, small());
	default:
		return api->gauge_value(m, below(4) ? below(48) : any());
	}
}

/* `calls` random calls, of `walks` or of everything else (a walk of any root may set bits anywhere), counted in `counts`: [which function][0 refused, 1 the machine's answer]. 0, or 1 for an answer
 * that no function gives. */
int fuzz(pgemu_api const *api, pgemu_machine *machine, uint64_t seed, uint64_t calls, uint64_t const *places,
	 uint64_t const *roots, int walks, uint64_t (*counts)[2])
{
	state = seed * 2 + 1;
	for (int i = 0; i < 8; i++)
		any();
	while (calls--) {
		pgemu_machine *m = below(200) ? machine : NULL;
		uint64_t which = walks ? below(4) : 4 + below(15);
		int64_t answer = which < 4   ? walk(api, m, which, places, roots)
				 : which < 5 ? operation(api, m, places)
				 : which < 6 ? column(api, m, places)
					     : one(api, m, which - 6, places);

		if (answer < -4095 && (answer > PGEMU_ERROR_MACHINE || answer < PGEMU_ERROR_POINTER))
			return 1;
		counts[which][answer >= -4095]++;
	}
	return 0;
}
