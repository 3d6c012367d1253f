/* Reads no byte from a socket whose only byte is out of band. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(void)
{
	char byte;
	int pair[2];
	ssize_t got;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || send(pair[0], "x", 1, MSG_OOB) != 1)
		return 1;
	got = recv(pair[1], &byte, 0, MSG_DONTWAIT);
	printf("%s\n", got < 0 ? strerror(errno) : "at once");
	return 0;
}
