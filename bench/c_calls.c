/* Loops of bench/test_capi.py over the functions of pgemu.h: a caller in C. */
#define PGEMU_NO_PYTHON
#include <pgemu.h>
#include <stddef.h>

/* One call for each address. How many are translated. */
uint64_t single(pgemu_api const *api, pgemu_machine *m, uint64_t mmu, uint64_t root, uint64_t kind,
		uint64_t const *addresses, uint64_t count, uint64_t *physical)
{
	uint64_t translated = 0;

	for (uint64_t i = 0; i < count; i++) {
		pgemu_translation found;

		translated += api->translate(m, mmu, root, kind, addresses[i], &found) == PGEMU_WALK_OK;
		physical[i] = found.physical;
	}
	return translated;
}

/* Batches of `together` addresses; below 64 none asks for an entry before it needs it. 0. */
int64_t batches(pgemu_api const *api, pgemu_machine *m, uint64_t mmu, uint64_t root, uint64_t kind,
		uint64_t const *addresses, uint64_t count, uint64_t together, uint64_t *physical, uint64_t *error,
		uint8_t *status, uint8_t *level)
{
	for (uint64_t i = 0; i < count; i += together) {
		uint64_t n = count - i < together ? count - i : together;
		pgemu_translations found = { physical + i, error + i, status + i, level + i, NULL, NULL, NULL };
		int64_t wrong = api->translate_batch(m, mmu, root, kind, NULL, n, addresses + i, &found);

		if (wrong)
			return wrong;
	}
	return 0;
}

/* One host fault for each address. How many ended without an error. */
uint64_t host_faults(pgemu_api const *api, pgemu_machine *m, uint64_t space, uint64_t const *addresses, uint64_t count)
{
	uint64_t fine = 0;

	for (uint64_t i = 0; i < count; i++)
		fine += api->host_fault(m, space, addresses[i], PGEMU_FLAG_WRITE, NULL) >= 0;
	return fine;
}
