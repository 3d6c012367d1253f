/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
#ifndef VMPATCH_SHADOW_H
#define VMPATCH_SHADOW_H

/*
 * Shadow data: what a fix would have put into a structure as a new member, kept beside the objects that live
 * already, whose layout no patch can change. `vmpatch build` finds this file by itself:
 *
 *	#include <vmpatch/shadow.h>
 *
 *	#define WRITES 0x77726974		// one number for each kind of data
 *
 *	// where the member is used
 *	u64 *writes = vmpatch_shadow_get_or_alloc(file, WRITES, sizeof(*writes), GFP_KERNEL, NULL, NULL);
 *	if (writes)
 *		(*writes)++;
 *
 *	// where the object is freed
 *	vmpatch_shadow_free(file, WRITES, NULL);
 *
 * The functions are those of the kernel's own livepatch (Documentation/livepatch/shadow-vars.rst) by another
 * prefix, and work alike; they are part of the patch, so the kernel need not have livepatch.
 *
 * Data are found by the address of the object and an id. They belong to the boot, not to a patch: every patch
 * that asks with the same id gets the same data, whatever patches have come and gone since. So
 *
 *  - choose ids that no other patch uses for something else, and never change what stands behind one;
 *  - free the data where the object is freed. Otherwise they stay, and the next object that happens to lie at
 *    that address is taken for the owner;
 *  - a rollback leaves the data as they are. The patch that is applied next finds them, with what has happened
 *    since not in them. vmpatch_shadow_free_all() takes away all of an id.
 *
 * What the data hold is yours to lock. Pointers to them are good as long as nobody frees them: with
 * rcu_read_lock() held from before vmpatch_shadow_get() on, or because the object cannot go.
 *
 * All of it may be called wherever kfree() may, with interrupts on or off, but not in an NMI; allocating as the
 * flags say. Locks are waited for, so none of it is for a callback of a patch, which runs while other CPUs stand
 * still, perhaps with a lock: there, VMPATCH_SHADOW_FREE_LATER.
 */

#include <linux/processor.h>
#include <linux/bit_spinlock.h>
#include <linux/hash.h>
#include <linux/irq_work.h>
#include <linux/irqflags.h>
#include <linux/kmemleak.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/types.h>

/* Makes the data of a new entry, zeroes so far. Not 0: there is to be none. No sleeping: a lock is held. */
typedef int (*vmpatch_shadow_ctor_t)(void *obj, void *shadow_data, void *ctor_data);
/* Is told of data that go. Readers under RCU may still look at them. No sleeping: a lock is held. */
typedef void (*vmpatch_shadow_dtor_t)(void *obj, void *shadow_data);

#define VMPATCH_SHADOW_BITS 9

/*
 * The heads of all chains. Nobody defines this: vmpatch knows the name and links it to a page of its own, zero
 * when the guest booted, that all patches share. Bit 0 of a head is the lock of its chain. This and the entries
 * are the same for patches built by whatever version of vmpatch; another layout would have another name.
 */
extern struct vmpatch_shadow_root {
	unsigned long heads[1 << VMPATCH_SHADOW_BITS];
} vmpatch_shadow_root;

/* One entry. `next` is the address of the next one, a plain number so that it is like a head. */
struct vmpatch_shadow {
	unsigned long next;
	struct rcu_head rcu;
	void *obj;
	unsigned long id;
	char data[] __aligned(8);
};

static inline unsigned long *vmpatch_shadow_head(const void *obj)
{
	return &vmpatch_shadow_root.heads[hash_ptr(obj, VMPATCH_SHADOW_BITS)];
}

static inline unsigned long vmpatch_shadow_lock(unsigned long *head)
{
	unsigned long flags;

	local_irq_save(flags);
	bit_spin_lock(0, head);
	return flags;
}

static inline void vmpatch_shadow_unlock(unsigned long *head, unsigned long flags)
{
	bit_spin_unlock(0, head);
	local_irq_restore(flags);
}

/* What a link, a head or a `next`, leads to. */
static inline struct vmpatch_shadow *vmpatch_shadow_at(const unsigned long *link)
{
	return (struct vmpatch_shadow *)(smp_load_acquire(link) & ~1UL);
}

/* Lets a link lead elsewhere; a head stays locked. */
static inline void vmpatch_shadow_link(unsigned long *link, unsigned long to)
{
	smp_store_release(link, to | (READ_ONCE(*link) & 1));
}

/* Follows a chain to an entry and leaves `link` at what leads to it. */
static inline struct vmpatch_shadow *vmpatch_shadow_find(unsigned long **link, void *obj,
							 unsigned long id)
{
	struct vmpatch_shadow *it;

	while ((it = vmpatch_shadow_at(*link)) && (it->obj != obj || it->id != id))
		*link = &it->next;
	return it;
}

/* Takes the entry that a link leads to out of its locked chain. Whoever reads it goes on to its next. */
static inline void vmpatch_shadow_drop(unsigned long *link, vmpatch_shadow_dtor_t dtor)
{
	struct vmpatch_shadow *it = vmpatch_shadow_at(link);

	vmpatch_shadow_link(link, it->next);
	if (dtor)
		dtor(it->obj, it->data);
	kfree_rcu(it, rcu);
}

/* The data of an object, NULL if there are none. */
static inline void *vmpatch_shadow_get(void *obj, unsigned long id)
{
	unsigned long *link = vmpatch_shadow_head(obj);
	struct vmpatch_shadow *it;

	rcu_read_lock();
	it = vmpatch_shadow_find(&link, obj, id);
	rcu_read_unlock();
	return it ? it->data : NULL;
}

/* Puts an entry in, unless there is one already, which `there` then tells. The data, or NULL by the ctor. */
static inline void *vmpatch_shadow_add(struct vmpatch_shadow *it, vmpatch_shadow_ctor_t ctor,
				       void *ctor_data, void **there)
{
	unsigned long *head = vmpatch_shadow_head(it->obj), *link = head, flags;
	struct vmpatch_shadow *found;
	void *data = NULL;

	flags = vmpatch_shadow_lock(head);
	found = vmpatch_shadow_find(&link, it->obj, it->id);
	if (found) {
		*there = found->data;
	} else if (!ctor || !ctor(it->obj, it->data, ctor_data)) {
		data = it->data;
		it->next = (unsigned long)vmpatch_shadow_at(head);
		vmpatch_shadow_link(head, (unsigned long)it);
	}
	vmpatch_shadow_unlock(head, flags);
	return data;
}

static inline void *vmpatch_shadow_make(void *obj, unsigned long id, size_t size, gfp_t gfp_flags,
					vmpatch_shadow_ctor_t ctor, void *ctor_data, void **there)
{
	struct vmpatch_shadow *it = kzalloc(sizeof(*it) + size, gfp_flags);
	void *data;

	if (!it)
		return NULL;
	/* What leads to it is no memory that kmemleak searches. */
	kmemleak_not_leak(it);
	it->obj = obj;
	it->id = id;
	data = vmpatch_shadow_add(it, ctor, ctor_data, there);
	if (!data)
		kfree(it);
	return data;
}

/* Gives an object data that has none. NULL if it has, if there is no memory, or if the ctor says so. */
static inline void *vmpatch_shadow_alloc(void *obj, unsigned long id, size_t size, gfp_t gfp_flags,
					 vmpatch_shadow_ctor_t ctor, void *ctor_data)
{
	void *there = NULL;

	return vmpatch_shadow_make(obj, id, size, gfp_flags, ctor, ctor_data, &there);
}

/* The data of an object, new ones if it has none. NULL if there is no memory, or if the ctor says so. */
static inline void *vmpatch_shadow_get_or_alloc(void *obj, unsigned long id, size_t size,
						gfp_t gfp_flags, vmpatch_shadow_ctor_t ctor,
						void *ctor_data)
{
	void *there = vmpatch_shadow_get(obj, id), *data;

	if (there)
		return there;
	data = vmpatch_shadow_make(obj, id, size, gfp_flags, ctor, ctor_data, &there);
	return data ? data : there;
}

/* Takes the data of an object away, if it has any. */
static inline void vmpatch_shadow_free(void *obj, unsigned long id, vmpatch_shadow_dtor_t dtor)
{
	unsigned long *head = vmpatch_shadow_head(obj), *link = head, flags;

	flags = vmpatch_shadow_lock(head);
	if (vmpatch_shadow_find(&link, obj, id))
		vmpatch_shadow_drop(link, dtor);
	vmpatch_shadow_unlock(head, flags);
}

/* Takes all data of an id away, of whatever object. */
static inline void vmpatch_shadow_free_all(unsigned long id, vmpatch_shadow_dtor_t dtor)
{
	unsigned long *head = vmpatch_shadow_root.heads, *link, flags;
	struct vmpatch_shadow *it;

	for (; head < vmpatch_shadow_root.heads + (1 << VMPATCH_SHADOW_BITS); head++) {
		flags = vmpatch_shadow_lock(head);
		for (link = head; (it = vmpatch_shadow_at(link));) {
			if (it->id == id)
				vmpatch_shadow_drop(link, dtor);
			else
				link = &it->next;
		}
		vmpatch_shadow_unlock(head, flags);
	}
}

/*
 * Defines a function that lets all data of an id be freed as soon as the guest goes on, without waiting for
 * anything: for a callback (<vmpatch/callbacks.h>), which can be that function itself.
 *
 *	VMPATCH_SHADOW_FREE_LATER(forget, WRITES)
 *	VMPATCH_POST_ROLLBACK(forget);
 */
#define VMPATCH_SHADOW_FREE_LATER(name, id)				\
	static void name##_now(struct irq_work *work)			\
	{								\
		vmpatch_shadow_free_all(id, NULL);			\
	}								\
	static void name(void)						\
	{								\
		static struct irq_work work = IRQ_WORK_INIT(name##_now);	\
									\
		irq_work_queue(&work);					\
	}

#endif
