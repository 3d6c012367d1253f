/* Opens a port for foo-over-UDP and does not say which protocol comes through it. */
#include <arpa/inet.h>
#include <linux/fou.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct message {
	struct nlmsghdr head;
	struct genlmsghdr generic;
	char attributes[256];
};

static int netlink;

static void put(struct message *it, int type, const void *value, int size)
{
	struct nlattr *at = (void *)((char *)it + NLMSG_ALIGN(it->head.nlmsg_len));

	at->nla_type = type;
	at->nla_len = NLA_HDRLEN + size;
	memcpy((char *)at + NLA_HDRLEN, value, size);
	it->head.nlmsg_len = NLMSG_ALIGN(it->head.nlmsg_len) + NLA_ALIGN(at->nla_len);
}

static struct message begin(int family, int command, int version)
{
	struct message it = {
		.head = {.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN), .nlmsg_type = family, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
		.generic = {.cmd = command, .version = version},
	};
	return it;
}

/* The error in the answer; what else came is left in `answer`. */
static int ask(struct message *it, char *answer, int size)
{
	int got;

	send(netlink, it, it->head.nlmsg_len, 0);
	for (;;) {
		struct nlmsghdr *head = (void *)answer;

		got = recv(netlink, answer, size, 0);
		if (got <= 0)
			return -1;
		if (head->nlmsg_type == NLMSG_ERROR)
			return ((struct nlmsgerr *)NLMSG_DATA(head))->error;
		return 1;
	}
}

int main(void)
{
	static char answer[8192];
	struct nlmsghdr *head = (void *)answer;
	unsigned char type = FOU_ENCAP_DIRECT, family4 = AF_INET;
	unsigned short port = htons(5555), family = 0;
	struct message it = begin(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1);
	int error, at;

	netlink = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);
	put(&it, CTRL_ATTR_FAMILY_NAME, FOU_GENL_NAME, sizeof(FOU_GENL_NAME));
	if (ask(&it, answer, sizeof(answer)) != 1)
		return 1;
	for (at = NLMSG_LENGTH(GENL_HDRLEN); at < (int)head->nlmsg_len;) {
		struct nlattr *one = (void *)(answer + at);

		if (one->nla_type == CTRL_ATTR_FAMILY_ID)
			memcpy(&family, (char *)one + NLA_HDRLEN, 2);
		at += NLA_ALIGN(one->nla_len);
	}
	recv(netlink, answer, sizeof(answer), 0); /* the acknowledgement */
	it = begin(family, FOU_CMD_ADD, FOU_GENL_VERSION);
	put(&it, FOU_ATTR_PORT, &port, 2);
	put(&it, FOU_ATTR_AF, &family4, 1);
	put(&it, FOU_ATTR_TYPE, &type, 1);
	error = ask(&it, answer, sizeof(answer));
	puts(error ? strerror(-error) : "opened");
	if (!error) {
		it = begin(family, FOU_CMD_DEL, FOU_GENL_VERSION);
		put(&it, FOU_ATTR_PORT, &port, 2);
		put(&it, FOU_ATTR_AF, &family4, 1);
		ask(&it, answer, sizeof(answer));
	}
	return 0;
}
