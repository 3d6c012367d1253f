/* Sets a write hint on a file that was made immutable after it had been opened. */
#include <fcntl.h>
#include <errno.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
	uint64_t hint = 2; /* RWH_WRITE_LIFE_SHORT */
	int flags = FS_IMMUTABLE_FL, none = 0, failed;
	int file = open("/tmp/hinted", O_RDWR | O_CREAT, 0600);

	if (file < 0 || ioctl(file, FS_IOC_SETFLAGS, &flags))
		return 1;
	failed = fcntl(file, 1024 + 12, &hint) ? errno : 0;
	puts(strerror(failed));
	ioctl(file, FS_IOC_SETFLAGS, &none);
	unlink("/tmp/hinted");
	return 0;
}
