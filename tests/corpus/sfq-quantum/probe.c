/* Gives the loopback device a queue whose quantum is more than the arithmetic of the scheduler bears. */
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

int main(void)
{
	struct tc_sfq_qopt options = {.quantum = 2 << 20};
	int netlink = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), error;
	struct message it = begin(RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, "sfq");

	put(&it, TCA_OPTIONS, &options, sizeof(options));
	error = ask(netlink, &it);
	puts(error ? strerror(-error) : "taken");
	it = begin(RTM_DELQDISC, NLM_F_ACK, "sfq");
	ask(netlink, &it);
	return 0;
}
