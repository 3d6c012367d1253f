// SPDX-License-Identifier: GPL-2.0
/*
 * Functions with static variables of their own, in every shape that a compiler names otherwise each time. A patch of them must
 * go on with what the running module has. Each reading of /proc/vmpatch_statics calls each function once and shows what it says.
 */
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/string.h>

static noinline int initialised(void)
{
	static int at = 100;

	return ++at;
}

static noinline int zero(void)
{
	static int at;

	return at += 2;
}

static noinline const char *array(void)
{
	static char letters[32] = "a";
	size_t length = strlen(letters);

	if (length < sizeof(letters) - 1)
		letters[length] = 'b';
	return letters;
}

static noinline int one_up(int from)
{
	barrier();
	return from + 1;
}

static noinline int one_down(int from)
{
	barrier();
	return from - 1;
}

static noinline int pointer(void)
{
	static int (*next)(int from) = one_up;
	int said = next(50);

	next = next == one_up ? one_down : one_up;
	return said;
}

static __always_inline int total(int more)
{
	static int sum;

	return sum += more;
}

static noinline int inlined_here(void)
{
	return total(1);
}

static noinline int inlined_there(void)
{
	return total(10);
}

static noinline int named(void)
{
	static int count;

	return count += 3;
}

static noinline int named_alike(void)
{
	static int count;

	return count += 5;
}

static int statics_show(struct seq_file *m, void *unused)
{
	seq_printf(m, "initialised %d\n", initialised());
	seq_printf(m, "zero %d\n", zero());
	seq_printf(m, "array %s\n", array());
	seq_printf(m, "pointer %d\n", pointer());
	seq_printf(m, "inlined %d\n", inlined_here());
	seq_printf(m, "inlined %d\n", inlined_there());
	seq_printf(m, "named %d\n", named());
	seq_printf(m, "named %d\n", named_alike());
	return 0;
}

static int __init statics_init(void)
{
	return proc_create_single("vmpatch_statics", 0444, NULL, statics_show) ? 0 : -ENOMEM;
}

static void __exit statics_exit(void)
{
	remove_proc_entry("vmpatch_statics", NULL);
}

module_init(statics_init);
module_exit(statics_exit);
MODULE_DESCRIPTION("functions with static variables of their own");
MODULE_LICENSE("GPL");
