// C shims for Datapath: liburing's inline calls, kernel numbers that its packaged version lacks,
// and the ioctl, packet and virtio structures that Swift's importer cannot read. No logic lives here.
#pragma once
#include <features.h>
#include <liburing.h>
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <string.h>
#include <sys/mman.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

// ---- One send, as the kernel reads it: it must not move until its completion came. ----

#define CLINUX_SEND_VECTORS_MAX 18
#define CLINUX_SEND_HEADER_BYTES 32
#define CLINUX_SEND_CONTROL_BYTES 32

struct clinux_send {
  struct msghdr message;
  struct iovec vectors[CLINUX_SEND_VECTORS_MAX];
  unsigned char header[CLINUX_SEND_HEADER_BYTES];  // encapsulation or virtio header, vectors[0]
  _Alignas(8) unsigned char control[CLINUX_SEND_CONTROL_BYTES];
};

static inline struct iovec *clinux_send_vectors(struct clinux_send *send) { return send->vectors; }
static inline unsigned char *clinux_send_header(struct clinux_send *send) { return send->header; }

// One control message with an int: the ToS (IPv4) or traffic class (IPv6) of this send.
static inline void clinux_send_set_service(struct clinux_send *send, int level, int type, int value) {
  struct cmsghdr *message = (struct cmsghdr *)send->control;
  message->cmsg_level = level;
  message->cmsg_type = type;
  message->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(message), &value, sizeof(int));
  send->message.msg_control = send->control;
  send->message.msg_controllen = CMSG_SPACE(sizeof(int));
}
