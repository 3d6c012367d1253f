// SPDX-License-Identifier: GPL-2.0
/*
 * Known kthreads parked in known functions, for tests that look at a guest from outside.
 *
 * Everything sleeps interruptibly: the hung-task detector then stays silent for as long as the guest runs.
 * The chains end every function with a barrier, so that no call becomes a jump and no frame is lost.
 *
 *   vmp_chain/N   vmp_chain_thread -> vmp_chain_1 -> ... -> vmp_chain_5, in wait_event_interruptible there
 *   vmp_sleep     vmp_sleep_thread -> vmp_sleep_outer -> vmp_sleep_inner, in schedule_timeout_interruptible
 *   vmp_mutex     vmp_mutex_thread -> vmp_mutex_outer, in mutex_lock_interruptible of a mutex that is never released
 *   vmp_park      vmp_park_thread -> msleep_interruptible: always inside a function of the kernel proper
 *   vmp_tick      counts up, some ten times a second
 *
 * A module for most guests; linked into the kernel of those that must do without user space (then planted.kthreads=N
 * stands on the kernel's command line).
 *
 * /proc/vmpatch_planted tells the threads' names and pids, the counter, and what vmp_answer() returns.
 */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/version.h>
#include <linux/wait.h>

#define MAX_THREADS 1024

/* Neither inlined nor cloned: the symbol has this very name. */
#define parked noinline __attribute__((__noipa__))

static unsigned int kthreads = 4;
module_param(kthreads, uint, 0444);
MODULE_PARM_DESC(kthreads, "how many vmp_chain threads");

static bool park = true;
module_param(park, bool, 0444);
MODULE_PARM_DESC(park, "whether there is a vmp_park thread");

static struct task_struct *threads[MAX_THREADS + 4];
static unsigned int nr_threads;
static unsigned long counter;
static bool leaving;

static DECLARE_WAIT_QUEUE_HEAD(never);
static DEFINE_MUTEX(held);

static parked int vmp_chain_5(int depth)
{
	int ret = wait_event_interruptible(never, READ_ONCE(leaving) || kthread_should_stop());

	barrier();
	return ret + depth;
}

#define CHAIN(n, next)						\
	static parked int vmp_chain_##n(int depth)		\
	{							\
		int ret = vmp_chain_##next(depth + 1);		\
								\
		barrier();					\
		return ret + depth;				\
	}

CHAIN(4, 5)
CHAIN(3, 4)
CHAIN(2, 3)
CHAIN(1, 2)

/* A stopped thread must stay until kthread_stop() has seen it. */
static void wait_for_stop(void)
{
	while (!kthread_should_stop())
		schedule_timeout_interruptible(HZ);
}

static int vmp_chain_thread(void *unused)
{
	while (!kthread_should_stop())
		vmp_chain_1(0);
	return 0;
}

static parked long vmp_sleep_inner(long jiffies_left)
{
	long left = schedule_timeout_interruptible(jiffies_left);

	barrier();
	return left;
}

static parked long vmp_sleep_outer(long jiffies_left)
{
	long left = vmp_sleep_inner(jiffies_left);

	barrier();
	return left + 1;
}

static int vmp_sleep_thread(void *unused)
{
	while (!kthread_should_stop())
		vmp_sleep_outer(MAX_SCHEDULE_TIMEOUT);
	return 0;
}

static parked int vmp_mutex_outer(void)
{
	int ret = mutex_lock_interruptible(&held);

	barrier();
	if (!ret)
		mutex_unlock(&held);
	return ret;
}

static int vmp_mutex_thread(void *unused)
{
	vmp_mutex_outer();
	wait_for_stop();
	return 0;
}

static int vmp_park_thread(void *unused)
{
	while (!kthread_should_stop())
		msleep_interruptible(UINT_MAX / 4);
	return 0;
}

static int vmp_tick_thread(void *unused)
{
	while (!kthread_should_stop()) {
		WRITE_ONCE(counter, counter + 1);
		schedule_timeout_interruptible(HZ / 10);
	}
	return 0;
}

/* For patches of module functions. */
int vmp_answer(int question);

parked int vmp_answer(int question)
{
	barrier();
	return question + 41;
}
EXPORT_SYMBOL_GPL(vmp_answer);

static int planted_show(struct seq_file *m, void *unused)
{
	unsigned int i;

	for (i = 0; i < nr_threads; i++)
		seq_printf(m, "thread %s %d\n", threads[i]->comm, threads[i]->pid);
	seq_printf(m, "counter %lu\n", READ_ONCE(counter));
	seq_printf(m, "answer %d\n", vmp_answer(1));
	return 0;
}

static int plant(int (*body)(void *), const char *name)
{
	struct task_struct *task = kthread_run(body, NULL, "%s", name);

	if (IS_ERR(task))
		return PTR_ERR(task);
	threads[nr_threads++] = task;
	return 0;
}

static int plant_chains(void)
{
	char name[TASK_COMM_LEN];
	unsigned int i;
	int ret = 0;

	for (i = 0; i < min(kthreads, MAX_THREADS + 0U) && !ret; i++) {
		snprintf(name, sizeof(name), "vmp_chain/%u", i);
		ret = plant(vmp_chain_thread, name);
	}
	return ret;
}

static void uproot(void)
{
	WRITE_ONCE(leaving, true);
	mutex_unlock(&held);
	while (nr_threads)
		kthread_stop(threads[--nr_threads]);
}

static int __init planted_init(void)
{
	int ret;

	mutex_lock(&held);
	ret = plant_chains();
	if (!ret)
		ret = plant(vmp_sleep_thread, "vmp_sleep");
	if (!ret)
		ret = plant(vmp_mutex_thread, "vmp_mutex");
	if (!ret && park)
		ret = plant(vmp_park_thread, "vmp_park");
	if (!ret)
		ret = plant(vmp_tick_thread, "vmp_tick");
	if (!ret && !proc_create_single("vmpatch_planted", 0444, NULL, planted_show))
		ret = -ENOMEM;
	if (ret)
		uproot();
	else
		pr_info("planted: %u kthreads\n", nr_threads);
	return ret;
}

static void __exit planted_exit(void)
{
	remove_proc_entry("vmpatch_planted", NULL);
	uproot();
}

module_init(planted_init);
module_exit(planted_exit);
MODULE_DESCRIPTION("kthreads parked in known places");
MODULE_LICENSE("GPL");
