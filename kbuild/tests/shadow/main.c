/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What a fix may expect of vmpatch/shadow.h, alone and among threads. */
#include "kernel.h"
#include <vmpatch/shadow.h>

struct vmpatch_shadow_root vmpatch_shadow_root;

#define CHECK(what)                                                         \
	do {                                                                \
		if (!(what)) {                                              \
			fprintf(stderr, "%d: not %s\n", __LINE__, #what);   \
			exit(1);                                            \
		}                                                           \
	} while (0)

enum { ONE = 1, OTHER = 2, THREADS = 4, OBJECTS = 32, ROUNDS = 10000 };

static char objects[OBJECTS][16] __aligned(16);

static int made(void *obj, void *data, void *value)
{
	*(long *)data = *(long *)value;
	return *(long *)value < 0;
}

static int gone;

static void told(void *obj, void *data)
{
	CHECK(*(long *)data == 7);
	gone++;
}

static void alone(void)
{
	long good = 7, bad = -1, *data;

	CHECK(!vmpatch_shadow_get(objects[0], ONE));
	CHECK(!vmpatch_shadow_alloc(objects[0], ONE, sizeof(long), GFP_KERNEL, made, &bad));
	CHECK(!vmpatch_shadow_get_or_alloc(objects[0], ONE, sizeof(long), GFP_KERNEL, made, &bad));
	CHECK(!vmpatch_shadow_get(objects[0], ONE) && !allocated);
	for (int i = 0; i < OBJECTS; i++) {
		data = vmpatch_shadow_alloc(objects[i], ONE, sizeof(long), GFP_KERNEL, made, &good);
		CHECK(data && *data == 7 && data == vmpatch_shadow_get(objects[i], ONE));
		CHECK(!vmpatch_shadow_get(objects[i], OTHER));
		data = vmpatch_shadow_get_or_alloc(objects[i], OTHER, 64, GFP_KERNEL, NULL, NULL);
		CHECK(data && !data[0] && !data[7] && (unsigned long)data % 8 == 0);
	}
	CHECK(!vmpatch_shadow_alloc(objects[3], ONE, sizeof(long), GFP_KERNEL, made, &good));
	data = vmpatch_shadow_get(objects[3], ONE);
	CHECK(data == vmpatch_shadow_get_or_alloc(objects[3], ONE, 8, GFP_KERNEL, made, &bad));
	vmpatch_shadow_free(objects[3], ONE, told);
	vmpatch_shadow_free(objects[3], ONE, told);
	CHECK(gone == 1 && !vmpatch_shadow_get(objects[3], ONE));
	CHECK(vmpatch_shadow_get(objects[3], OTHER));
	vmpatch_shadow_free_all(ONE, told);
	CHECK(gone == OBJECTS);
	for (int i = 0; i < OBJECTS; i++)
		CHECK(!vmpatch_shadow_get(objects[i], ONE) && vmpatch_shadow_get(objects[i], OTHER));
	vmpatch_shadow_free_all(OTHER, NULL);
	for (int i = 0; i < 1 << VMPATCH_SHADOW_BITS; i++)
		CHECK(!vmpatch_shadow_root.heads[i]);
}

/* Each thread counts in all objects, and frees and makes again what is its own in between. */
static pthread_barrier_t start;

static void *among_others(void *mine)
{
	pthread_barrier_wait(&start);
	for (int round = 0; round < ROUNDS; round++) {
		void *obj = objects[round % OBJECTS];
		long *count, *own;

		count = vmpatch_shadow_get_or_alloc(obj, ONE, sizeof(long), GFP_KERNEL, NULL, NULL);
		__atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
		own = vmpatch_shadow_alloc(obj, (unsigned long)mine, 8, GFP_KERNEL, made, &(long){ round });
		CHECK(own && own == vmpatch_shadow_get(obj, (unsigned long)mine) && *own == round);
		if (round % 1000)
			vmpatch_shadow_free(obj, (unsigned long)mine, NULL);
		else
			vmpatch_shadow_free_all((unsigned long)mine, NULL);
	}
	return NULL;
}

int main(void)
{
	pthread_t threads[THREADS];
	long sum = 0;

	alone();
	pthread_barrier_init(&start, NULL, THREADS);
	for (long i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, among_others, (void *)(100 + i)));
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < OBJECTS; i++)
		sum += *(long *)vmpatch_shadow_get(objects[i], ONE);
	CHECK(sum == THREADS * ROUNDS);
	vmpatch_shadow_free_all(ONE, NULL);
	while (waiting) {
		struct rcu_head *head = waiting;

		waiting = head->next;
		kfree(head->what);
	}
	CHECK(!allocated);
	return 0;
}
