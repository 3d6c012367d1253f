/* Connects to a port where nobody listens and asks the socket for an error that was told already. */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>

int main(void)
{
	struct sockaddr_vm nobody = {.svm_family = AF_VSOCK, .svm_port = 9999, .svm_cid = 1};
	int error = 0, it = socket(AF_VSOCK, SOCK_STREAM, 0);
	socklen_t size = sizeof(error);

	if (it < 0 || !connect(it, (struct sockaddr *)&nobody, sizeof(nobody)))
		return 1;
	if (getsockopt(it, SOL_SOCKET, SO_ERROR, &error, &size))
		return 1;
	puts(strerror(error));
	return 0;
}
