/* Says whether statx() knows of files with fs-verity: bit 0x100000 of the mask of attributes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

int main(void)
{
	struct statx it;

	if (statx(AT_FDCWD, "/", 0, STATX_BASIC_STATS, &it))
		return 1;
	puts(it.stx_attributes_mask & 0x100000 ? "known" : "unknown");
	return 0;
}
