/* Gives the smallest buffer there may be and asks where in it the answer begins. */
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>

int main(void)
{
	struct dm_ioctl asked = {
		.version = {4, 0, 0},
		.data_size = offsetof(struct dm_ioctl, data),
	};
	int file = open("/dev/mapper/control", O_RDWR);

	if (file < 0 || ioctl(file, DM_LIST_VERSIONS, &asked))
		return 1;
	puts(asked.data_start > offsetof(struct dm_ioctl, data) ? "beyond the buffer" : "at its end");
	return 0;
}
