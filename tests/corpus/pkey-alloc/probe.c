/* Asks for a protection key of memory where the processor has none. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
	puts(syscall(SYS_pkey_alloc, 0, 0) < 0 ? strerror(errno) : "allocated");
	return 0;
}
