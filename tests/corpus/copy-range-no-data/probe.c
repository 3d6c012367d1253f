/* Copies nothing, from the end of a file, to where no byte may be written. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

int main(void)
{
	struct rlimit none = {0, 0};
	int from = open("/tmp/from", O_RDWR | O_CREAT | O_TRUNC, 0600);
	int to = open("/tmp/to", O_RDWR | O_CREAT | O_TRUNC, 0600);
	ssize_t copied;

	if (from < 0 || to < 0)
		return 1;
	signal(SIGXFSZ, SIG_IGN);
	setrlimit(RLIMIT_FSIZE, &none);
	copied = copy_file_range(from, NULL, to, NULL, 10, 0);
	fprintf(stdout, "%s\n", copied < 0 ? strerror(errno) : "nothing to copy");
	unlink("/tmp/from");
	unlink("/tmp/to");
	return 0;
}
