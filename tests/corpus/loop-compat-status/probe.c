/* Sets the status of a loop device that is open for reading only, as a user without privileges, by the 32-bit system call. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void)
{
	void *low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	int file = open("/dev/loop0", O_RDONLY);
	int answer = 54; /* ioctl */

	if (low == MAP_FAILED || file < 0 || setgid(65534) || setuid(65534))
		return 1;
	__asm__ volatile("int $0x80" : "+a"(answer) : "b"(file), "c"(0x4C02), "d"(low) : "memory", "r8", "r9", "r10", "r11");
	puts(strerror(-answer));
	return 0;
}
