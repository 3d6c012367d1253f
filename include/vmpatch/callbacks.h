/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * For the source of a patch; `vmpatch build` finds it as <vmpatch/callbacks.h> by itself.
 *
 * Callbacks. Each macro names one function of the file, which is called when the patch is applied or rolled back:
 *
 *	static int ready(void)
 *	{
 *		return system_state == SYSTEM_RUNNING ? 0 : -EBUSY;
 *	}
 *	VMPATCH_PRE_APPLY(ready);
 *
 * A patch has at most one of each. pre_apply and pre_rollback return 0, or a negative error number to refuse: the kernel's text
 * then stays as it is. One vCPU executes a callback while all others stand still, so
 *  - interrupts are off, and must stay off;
 *  - it must not sleep: memory only by GFP_ATOMIC, no mutex, no cond_resched();
 *  - a lock that another CPU or the interrupted task holds is never given up: try, do not wait;
 *  - no kernel_fpu_begin(): the registers of user space may still be in the CPU;
 *  - what it counts up it must count down: ended within rcu_read_lock(), it would leave the interrupted task a reader;
 *  - it must not touch user memory, nor trap: a WARN, a BUG, a bad address or a fault that a fixup would mend ends it;
 *  - it has a time limit, 10 ms unless --callback-limit says otherwise.
 * A callback that breaks one of these is ended and the change is not made; what it wrote until then stays.
 */
#ifndef VMPATCH_CALLBACKS_H
#define VMPATCH_CALLBACKS_H

#define VMPATCH_CALLBACK_(kind, type, function) \
	static type (*const vmpatch_callback_##kind)(void) __used \
		__section(".vmpatch.callbacks." #kind) = (function)

/* int function(void): before the new functions are entered; may refuse. */
#define VMPATCH_PRE_APPLY(function) VMPATCH_CALLBACK_(pre_apply, int, function)
/* void function(void): after that, within the same stop. */
#define VMPATCH_POST_APPLY(function) VMPATCH_CALLBACK_(post_apply, void, function)
/* int function(void): before the old functions are entered again; may refuse. */
#define VMPATCH_PRE_ROLLBACK(function) VMPATCH_CALLBACK_(pre_rollback, int, function)
/* void function(void): after that, within the same stop. */
#define VMPATCH_POST_ROLLBACK(function) VMPATCH_CALLBACK_(post_rollback, void, function)

#endif
