/* Attaches to a device that belongs to nobody, as a user without privileges. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

static int attach(int *file)
{
	struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};

	strcpy(request.ifr_name, "ownerless");
	*file = open("/dev/net/tun", O_RDWR);
	return *file < 0 || ioctl(*file, TUNSETIFF, &request);
}

int main(void)
{
	int file;

	if (attach(&file) || ioctl(file, TUNSETPERSIST, 1))
		return 1;
	close(file);
	if (!fork()) {
		if (setgid(65534) || setuid(65534))
			return 1;
		puts(attach(&file) ? strerror(errno) : "attached");
		return 0;
	}
	wait(NULL);
	if (!attach(&file))
		ioctl(file, TUNSETPERSIST, 0);
	return 0;
}
