/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What vmpatch/shadow.h takes from the kernel, for a program of threads. */
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef unsigned int gfp_t;
#define GFP_KERNEL 0
#define __aligned(n) __attribute__((aligned(n)))
#define READ_ONCE(it) __atomic_load_n(&(it), __ATOMIC_RELAXED)
#define smp_load_acquire(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define smp_store_release(at, it)                               \
	do {                                                    \
		__typeof__(*(at)) value = (it);                 \
		meet();                                         \
		__atomic_store_n(at, value, __ATOMIC_RELEASE);  \
	} while (0)
#define local_irq_save(flags) ((flags) = 0)
#define local_irq_restore(flags) ((void)(flags))
#define kmemleak_not_leak(it) ((void)(it))

/* Lets other threads go first now and then where it would hurt if there were no lock. */
static inline void meet(void)
{
	static __thread unsigned int times;

	if (++times % 16 == 0)
		sched_yield();
}

static inline void bit_spin_lock(int bit, unsigned long *at)
{
	while (__atomic_fetch_or(at, 1UL << bit, __ATOMIC_ACQUIRE) & 1UL << bit)
		sched_yield();
}

static inline void bit_spin_unlock(int bit, unsigned long *at)
{
	__atomic_fetch_and(at, ~(1UL << bit), __ATOMIC_RELEASE);
}

/* Few chains, so that they are long. */
#define hash_ptr(it, bits) ((unsigned long)(it) / 16 % 3)

/* No grace period ends before the program does. */
struct rcu_head {
	struct rcu_head *next;
	void *what;
};
static struct rcu_head *waiting;
static int allocated;

static inline void rcu_read_lock(void) {}
static inline void rcu_read_unlock(void) {}

static inline void *kzalloc(size_t size, gfp_t flags)
{
	__atomic_fetch_add(&allocated, 1, __ATOMIC_RELAXED);
	return calloc(1, size);
}

static inline void kfree(void *it)
{
	__atomic_fetch_sub(&allocated, 1, __ATOMIC_RELAXED);
	free(it);
}

static inline void free_later(struct rcu_head *head, void *what)
{
	head->what = what;
	head->next = __atomic_load_n(&waiting, __ATOMIC_RELAXED);
	while (!__atomic_compare_exchange_n(&waiting, &head->next, head, false, __ATOMIC_ACQ_REL,
					    __ATOMIC_RELAXED))
		;
}
#define kfree_rcu(it, member) free_later(&(it)->member, it)
