/* Gives the loopback device a queue with a quantum of one byte and asks which it has. */
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct message {
	struct nlmsghdr head;
	struct tcmsg tc;
	char attributes[512];
};

static char answer[65536];

static void put(struct message *it, int type, const void *value, int size)
{
	struct rtattr *at = (void *)((char *)it + NLMSG_ALIGN(it->head.nlmsg_len));

	at->rta_type = type;
	at->rta_len = RTA_LENGTH(size);
	memcpy(RTA_DATA(at), value, size);
	it->head.nlmsg_len = NLMSG_ALIGN(it->head.nlmsg_len) + RTA_ALIGN(at->rta_len);
}

static struct message begin(int type, int flags, const char *kind)
{
	struct message it = {
		.head = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct tcmsg)), .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags},
		.tc = {.tcm_ifindex = if_nametoindex("lo"), .tcm_handle = 0x10000, .tcm_parent = TC_H_ROOT},
	};
	put(&it, TCA_KIND, kind, strlen(kind) + 1);
	return it;
}

/* The error in the answer, or 1 where it is something else. */
static int ask(int netlink, struct message *it)
{
	struct nlmsghdr *head = (void *)answer;

	send(netlink, it, it->head.nlmsg_len, 0);
	if (recv(netlink, answer, sizeof(answer), 0) <= 0)
		return -1;
	return head->nlmsg_type == NLMSG_ERROR ? ((struct nlmsgerr *)NLMSG_DATA(head))->error : 1;
}

/* The quantum in the description of a queue. */
static unsigned quantum(void)
{
	struct nlmsghdr *head = (void *)answer;
	struct rtattr *at = (void *)(answer + NLMSG_LENGTH(sizeof(struct tcmsg)));
	int left = head->nlmsg_len - NLMSG_LENGTH(sizeof(struct tcmsg));

	for (; RTA_OK(at, left); at = RTA_NEXT(at, left)) {
		struct rtattr *option = RTA_DATA(at);
		int inner = RTA_PAYLOAD(at);

		if ((at->rta_type & NLA_TYPE_MASK) != TCA_OPTIONS)
			continue;
		for (; RTA_OK(option, inner); option = RTA_NEXT(option, inner))
			if (option->rta_type == TCA_HHF_QUANTUM)
				return *(unsigned *)RTA_DATA(option);
	}
	return 0;
}

int main(void)
{
	struct { struct rtattr head; unsigned value; } one = {{8, TCA_HHF_QUANTUM}, 1};
	int netlink = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	struct message it = begin(RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, "hhf");

	put(&it, TCA_OPTIONS, &one, sizeof(one));
	if (ask(netlink, &it))
		return 1;
	it = begin(RTM_GETQDISC, 0, "hhf");
	if (ask(netlink, &it) != 1)
		return 1;
	printf("%u\n", quantum());
	it = begin(RTM_DELQDISC, NLM_F_ACK, "hhf");
	ask(netlink, &it);
	return 0;
}
