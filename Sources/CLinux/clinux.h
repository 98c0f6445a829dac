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
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// ---- One send, as the kernel reads it: it must not move until its completion came. ----

#define CLINUX_SEND_VECTORS_MAX 22
#define CLINUX_SEND_HEADER_BYTES 208  // 16 of encapsulation or virtio header, 192 of a segment's headers
#define CLINUX_SEND_CONTROL_BYTES 32

struct clinux_send {
  struct msghdr message;
  struct iovec vectors[CLINUX_SEND_VECTORS_MAX];
  // Before the header, whose end only segments use: a plain send's lines stay together.
  _Alignas(8) unsigned char control[CLINUX_SEND_CONTROL_BYTES];
  unsigned char header[CLINUX_SEND_HEADER_BYTES];  // vectors[0]
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

// A message of many parts, as the kernel reads it: a train of datagrams (UDP_SEGMENT), or a super-frame for a port.
#define CLINUX_GATHER_VECTORS_MAX 260  // of 128 datagrams, each header and payload, and some to spare
#define CLINUX_GATHER_CONTROL_BYTES 64
#define CLINUX_UDP_SEGMENT 103  // linux/udp.h since 4.18
#define CLINUX_UDP_GRO 104      // linux/udp.h since 5.0

struct clinux_gather {
  struct msghdr message;
  _Alignas(8) unsigned char control[CLINUX_GATHER_CONTROL_BYTES];
  struct iovec vectors[CLINUX_GATHER_VECTORS_MAX];
};

static inline struct msghdr *clinux_send_message(struct clinux_send *send) { return &send->message; }
static inline struct msghdr *clinux_gather_message(struct clinux_gather *gather) { return &gather->message; }
static inline struct iovec *clinux_gather_vectors(struct clinux_gather *gather) { return gather->vectors; }

// The control messages of a train: the size of each datagram but the last, and the ToS or traffic class if `has_service`.
static inline void clinux_gather_set_train(struct clinux_gather *gather, unsigned short segment, int has_service,
                                           int level, int type, int service) {
  struct cmsghdr *message = (struct cmsghdr *)gather->control;
  message->cmsg_level = IPPROTO_UDP;
  message->cmsg_type = CLINUX_UDP_SEGMENT;
  message->cmsg_len = CMSG_LEN(sizeof segment);
  memcpy(CMSG_DATA(message), &segment, sizeof segment);
  size_t used = CMSG_SPACE(sizeof segment);
  if (has_service) {
    message = (struct cmsghdr *)(gather->control + used);
    message->cmsg_level = level;
    message->cmsg_type = type;
    message->cmsg_len = CMSG_LEN(sizeof service);
    memcpy(CMSG_DATA(message), &service, sizeof service);
    used += CMSG_SPACE(sizeof service);
  }
  gather->message.msg_control = gather->control;
  gather->message.msg_controllen = used;
}

// ---- io_uring: what liburing 2.3 lacks, and what Swift cannot call because it is a macro ----

#define CLINUX_OP_READ_MULTISHOT 49  // linux/io_uring.h since 6.7
#define CLINUX_REGISTER_FILES_UPDATE IORING_REGISTER_FILES_UPDATE

static inline const struct io_uring_cqe *clinux_cqe_at(const struct io_uring *ring, unsigned position) {
  return &ring->cq.cqes[(*ring->cq.khead + position) & *ring->cq.kring_mask];
}
// Whether entering the kernel would bring anything: deferred work is waiting, or completions that did not fit.
static inline bool clinux_work_is_pending(const struct io_uring *ring) {
  return IO_URING_READ_ONCE(*ring->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}
static inline bool clinux_has_overflown(const struct io_uring *ring) {
  return IO_URING_READ_ONCE(*ring->sq.kflags) & IORING_SQ_CQ_OVERFLOW;
}
static inline void clinux_prep_read_multishot(struct io_uring_sqe *sqe, int fd, int group) {
  io_uring_prep_rw(CLINUX_OP_READ_MULTISHOT, sqe, fd, NULL, 0, 0);
  sqe->off = (unsigned long long)-1;  // no position: a stream
  sqe->flags |= IOSQE_BUFFER_SELECT;
  sqe->buf_group = (unsigned short)group;
}
static inline void clinux_prep_recvmsg_multishot(struct io_uring_sqe *sqe, int fd, struct msghdr *message, int group) {
  io_uring_prep_recvmsg_multishot(sqe, fd, message, 0);
  sqe->flags |= IOSQE_BUFFER_SELECT;
  sqe->buf_group = (unsigned short)group;
}
static inline void clinux_sqe_select_buffer(struct io_uring_sqe *sqe, int group) {
  sqe->flags |= IOSQE_BUFFER_SELECT;
  sqe->buf_group = (unsigned short)group;
}
static inline void clinux_sqe_finish(struct io_uring_sqe *sqe, unsigned char flags, unsigned long long user_data) {
  sqe->flags |= flags;
  sqe->user_data = user_data;
}
static inline int clinux_register_buffer_ring(struct io_uring *ring, void *memory, unsigned entries, int group) {
  struct io_uring_buf_reg registration = {
      .ring_addr = (unsigned long long)memory, .ring_entries = entries, .bgid = (unsigned short)group};
  return io_uring_register_buf_ring(ring, &registration, 0);
}
// liburing 2.3 declares functions for these two and leaves them out of what its shared library exports.
static inline int clinux_register_restrictions(
    struct io_uring *ring, struct io_uring_restriction *rules, unsigned count) {
  return io_uring_register((unsigned)ring->ring_fd, IORING_REGISTER_RESTRICTIONS, rules, count);
}
static inline int clinux_enable_rings(struct io_uring *ring) {
  return io_uring_register((unsigned)ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}
static inline void clinux_allow(struct io_uring_restriction *restriction, unsigned short opcode, unsigned char value) {
  restriction->opcode = opcode;
  restriction->register_op = value;  // one byte shared by register_op, sqe_op and sqe_flags
}

// ---- System calls: what glibc declares for _GNU_SOURCE alone, and a packed structure ----

// One message of sendmmsg and recvmmsg: struct mmsghdr of sys/socket.h.
struct clinux_message {
  struct msghdr header;
  unsigned length;  // bytes sent or received
};
// A read that never waits, whatever the file says (RWF_NOWAIT, linux/fs.h).
static inline long clinux_read_at_once(int fd, void *place, size_t bytes) {
  struct iovec vector = {.iov_base = place, .iov_len = bytes};
  return syscall(SYS_preadv2, fd, &vector, 1, -1L, -1L, RWF_NOWAIT);
}
// How many messages were received or sent, or -1 when the first one failed.
static inline long clinux_receive_messages(int fd, struct clinux_message *messages, unsigned count, int flags) {
  return syscall(SYS_recvmmsg, fd, messages, count, flags, NULL);
}
static inline long clinux_send_messages(int fd, struct clinux_message *messages, unsigned count, int flags) {
  return syscall(SYS_sendmmsg, fd, messages, count, flags);
}

static inline int clinux_epoll_watch_readable(int epoll, int fd, unsigned long long key) {
  struct epoll_event event = {.events = EPOLLIN, .data = {.u64 = key}};
  return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}
// Tells once; it is known from then on, and is to be asked for again.
static inline int clinux_epoll_watch_writable_once(int epoll, int fd, unsigned long long key, int is_known) {
  struct epoll_event event = {.events = EPOLLOUT | EPOLLONESHOT, .data = {.u64 = key}};
  return epoll_ctl(epoll, is_known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
}
static inline int clinux_epoll_forget(int epoll, int fd) { return epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL); }
static inline unsigned clinux_epoll_events(const struct epoll_event *events, int place) { return events[place].events; }
static inline unsigned long long clinux_epoll_key(const struct epoll_event *events, int place) {
  return events[place].data.u64;
}
#define CLINUX_SYS_EPOLL_PWAIT2 441  // the same on every architecture; Linux 5.11
// Waits at most so long; ENOSYS before Linux 5.11.
static inline int clinux_epoll_wait_nanoseconds(int epoll, struct epoll_event *events, int room, long nanoseconds) {
  struct timespec limit = {nanoseconds / 1000000000, nanoseconds % 1000000000};
  return (int)syscall(CLINUX_SYS_EPOLL_PWAIT2, epoll, events, room, &limit, NULL, (size_t)0);
}

// ---- Packet sockets: options that older headers lack, and structures that Swift cannot fill ----

#define CLINUX_PACKET_IGNORE_OUTGOING 23  // Linux 4.20
#define CLINUX_PACKET_VNET_HDR_SZ 24      // Linux 6.4
#define CLINUX_PACKET_FANOUT_FLAG_IGNORE_OUTGOING 0x4000
#define CLINUX_PACKET_FANOUT_FLAG_UNIQUEID 0x2000

// Receives every protocol's frames of one device from now on.
static inline int clinux_packet_bind(int fd, unsigned index) {
  struct sockaddr_ll address = {
      .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = (int)index};
  return bind(fd, (struct sockaddr *)&address, sizeof address);
}
// Frames for other addresses than the device's too, until the socket is closed.
static inline int clinux_packet_be_promiscuous(int fd, unsigned index) {
  struct packet_mreq membership = {.mr_ifindex = (int)index, .mr_type = PACKET_MR_PROMISC};
  return setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &membership, sizeof membership);
}
// A filter that lets nothing pass.
static inline int clinux_socket_refuse_all(int fd) {
  struct sock_filter refuse = BPF_STMT(BPF_RET | BPF_K, 0);
  struct sock_fprog program = {.len = 1, .filter = &refuse};
  return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program);
}
static inline int clinux_socket_refuse_nothing(int fd) {
  int unused = 0;
  return setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &unused, sizeof unused);
}
// The flags of a device (IFF_UP, IFF_LOOPBACK…), or -1.
static inline int clinux_device_flags(int fd, const char *name) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  return ioctl(fd, SIOCGIFFLAGS, &request) < 0 ? -1 : (unsigned short)request.ifr_flags;
}

// The kind of a device's addresses (ARPHRD_ETHER…), or -1.
static inline int clinux_device_type(int fd, const char *name) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  return ioctl(fd, SIOCGIFHWADDR, &request) < 0 ? -1 : request.ifr_hwaddr.sa_family;
}

// ---- TUN/TAP and network devices: ioctls whose numbers and unions Swift cannot read ----

#define CLINUX_TAP_FLAGS (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)

static inline int clinux_tap_attach(int fd, const char *name, int is_multi_queue) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  request.ifr_flags = (short)(CLINUX_TAP_FLAGS | (is_multi_queue ? IFF_MULTI_QUEUE : 0));
  return ioctl(fd, TUNSETIFF, &request);
}
// Sets the longest super-frame that the stack makes for a device (IFLA_GSO_MAX_SIZE, linux/if_link.h), by rtnetlink.
static inline int clinux_device_set_super_frame_bytes(const char *name, unsigned bytes) {
  struct {
    struct nlmsghdr header;
    struct ifinfomsg link;
    struct rtattr attribute;
    unsigned value;
  } request = {.header = {.nlmsg_len = sizeof request, .nlmsg_type = RTM_SETLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
               .link = {.ifi_family = AF_UNSPEC, .ifi_index = (int)if_nametoindex(name)},
               .attribute = {.rta_len = RTA_LENGTH(sizeof(unsigned)), .rta_type = IFLA_GSO_MAX_SIZE},
               .value = bytes};
  struct {
    struct nlmsghdr header;
    struct nlmsgerr answer;
    char rest[256];
  } reply;
  int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
  if (fd < 0) return -1;
  ssize_t length = send(fd, &request, sizeof request, 0);
  if (length >= 0) length = recv(fd, &reply, sizeof reply, 0);
  int error = length < 0 ? errno : length < (ssize_t)NLMSG_LENGTH(sizeof reply.answer) ? EBADMSG : -reply.answer.error;
  close(fd);
  errno = error;
  return error == 0 ? 0 : -1;
}

#define CLINUX_TUN_F_USO4 0x20  // linux/if_tun.h since 6.2
#define CLINUX_TUN_F_USO6 0x40
static inline int clinux_tap_set_header_bytes(int fd, int bytes) { return ioctl(fd, TUNSETVNETHDRSZ, &bytes); }
static inline int clinux_tap_set_offloads(int fd, unsigned long offloads) { return ioctl(fd, TUNSETOFFLOAD, offloads); }

static inline int clinux_device_mtu(int fd, const char *name) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  return ioctl(fd, SIOCGIFMTU, &request) < 0 ? -1 : request.ifr_mtu;
}
static inline int clinux_device_set_mtu(int fd, const char *name, int bytes) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  request.ifr_mtu = bytes;
  return ioctl(fd, SIOCSIFMTU, &request);
}
static inline int clinux_device_set_mac(int fd, const char *name, const unsigned char *mac) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
  memcpy(request.ifr_hwaddr.sa_data, mac, 6);
  return ioctl(fd, SIOCSIFHWADDR, &request);
}
static inline int clinux_device_set_up(int fd, const char *name) {
  struct ifreq request = {0};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  if (ioctl(fd, SIOCGIFFLAGS, &request) < 0) return -1;
  request.ifr_flags |= IFF_UP;
  return ioctl(fd, SIOCSIFFLAGS, &request);
}

// ---- Socket addresses: one room for both families ----

static inline socklen_t clinux_address4(struct sockaddr_storage *room, unsigned int address, unsigned short port) {
  struct sockaddr_in *value = (struct sockaddr_in *)room;
  memset(room, 0, sizeof *room);
  value->sin_family = AF_INET;
  value->sin_addr.s_addr = address;  // both in network order
  value->sin_port = port;
  return sizeof *value;
}
static inline socklen_t clinux_address6(struct sockaddr_storage *room, const void *address, unsigned short port) {
  struct sockaddr_in6 *value = (struct sockaddr_in6 *)room;
  memset(room, 0, sizeof *room);
  value->sin6_family = AF_INET6;
  memcpy(&value->sin6_addr, address, 16);
  value->sin6_port = port;
  return sizeof *value;
}

// ---- Instructions that Swift has no word for ----

// Copies bytes that do not overlap; small frames without a call, in whole registers that may meet in the middle.
static inline void clinux_copy(void *to, const void *from, size_t bytes) {
  char *target = (char *)to;
  const char *source = (const char *)from;
  if (bytes >= 64 && bytes <= 128) {
    __builtin_memcpy(target, source, 64);
    __builtin_memcpy(target + bytes - 64, source + bytes - 64, 64);
  } else if (bytes >= 32 && bytes < 64) {
    __builtin_memcpy(target, source, 32);
    __builtin_memcpy(target + bytes - 32, source + bytes - 32, 32);
  } else {
    memcpy(target, source, bytes);
  }
}

// Brings the cache line of an address nearer; never faults.
static inline void clinux_prefetch(const void *address) { __builtin_prefetch(address); }

// Brings the line at an address near, to be written: no other cache has it then.
static inline void clinux_prefetch_to_write(void *address) {
#if defined(__x86_64__)
  // The compiler's own makes a plain prefetch of it, unless told that the processor has this one. All of the last ten
  // years have; on older ones it does nothing.
  __asm__ volatile("prefetchw %0" : : "m"(*(char *)address));
#else
  __builtin_prefetch(address, 1);
#endif
}

// Whether this processor has what clinux_sum_blocks uses.
static inline bool clinux_can_sum_blocks(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

#define CLINUX_SUM_BLOCK_BYTES 32
#define CLINUX_SUM_BLOCKS_MAX (1 << 15)  // 2^13 a lane and accumulator; 2^15 would overflow one

#if defined(__x86_64__)
// One instruction multiplies sixteen words by one and adds them in pairs, but takes them as signed: so each word is
// lowered by 2^15 first, which its sign bit does. A lane of 32 bits changes by 2^16 at most.
__attribute__((target("avx2"), always_inline))
static inline __m256i clinux_add_block(__m256i sum, const __m256i *block) {
  const __m256i words = _mm256_xor_si256(_mm256_loadu_si256(block), _mm256_set1_epi16(-32768));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
__attribute__((target("avx2"), always_inline))
static inline __m256i clinux_widen(__m256i sum) {
  return _mm256_add_epi64(
      _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sum)), _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sum, 1)));
}
// The sum of 16-bit words in this machine's order: at most CLINUX_SUM_BLOCKS_MAX blocks, from any alignment.
__attribute__((target("avx2")))
static inline unsigned long long clinux_sum_blocks(const void *bytes, size_t blocks) {
  const __m256i *block = (const __m256i *)bytes, *const end = block + blocks;
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (; end - block >= 4; block += 4) {
    a = clinux_add_block(a, block);
    b = clinux_add_block(b, block + 1);
    c = clinux_add_block(c, block + 2);
    d = clinux_add_block(d, block + 3);
  }
  // A quarter of the steps at most went into each, so that two fit one.
  a = _mm256_add_epi32(a, b);
  for (; block < end; block++) c = clinux_add_block(c, block);
  const __m256i wide = _mm256_add_epi64(clinux_widen(a), clinux_widen(_mm256_add_epi32(c, d)));
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const long long low = _mm_cvtsi128_si64(half), high = _mm_extract_epi64(half, 1);
  return (unsigned long long)(low + high) + blocks * 16 * 32768;
}
#else
static inline unsigned long long clinux_sum_blocks(const void *bytes, size_t blocks) {
  (void)bytes, (void)blocks;
  return 0;  // not to be called
}
#endif

// ---- Threads, CPUs, signals, privileges ----

#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>

// glibc's cpu_set_t macros are hidden from Swift; the kernel takes any array of words, one bit a CPU.
#define CLINUX_CPU_WORDS 16
static inline long clinux_set_affinity(const unsigned long *words) {
  return syscall(SYS_sched_setaffinity, 0, CLINUX_CPU_WORDS * sizeof(unsigned long), words);
}
// Bytes written to `words`, or -1.
static inline long clinux_get_affinity(unsigned long *words) {
  return syscall(SYS_sched_getaffinity, 0, CLINUX_CPU_WORDS * sizeof(unsigned long), words);
}
static inline int clinux_set_thread_name(const char *name) { return prctl(PR_SET_NAME, name, 0, 0, 0); }
static inline int clinux_forbid_new_privileges(void) { return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); }

// The capabilities of this thread, and of those that it makes from now on; two words of bits each.
static inline long clinux_get_capabilities(unsigned *effective, unsigned *permitted) {
  struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct data[2];
  long result = syscall(SYS_capget, &header, data);
  effective[0] = data[0].effective, effective[1] = data[1].effective;
  permitted[0] = data[0].permitted, permitted[1] = data[1].permitted;
  return result;
}
static inline long clinux_set_capabilities(const unsigned *words) {
  struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct data[2] = {{words[0], words[0], 0}, {words[1], words[1], 0}};
  return syscall(SYS_capset, &header, data);
}

// ---- vhost-user: what glibc hides from Swift behind _GNU_SOURCE ----

#include <linux/magic.h>
#include <linux/memfd.h>
#include <sys/vfs.h>

#define CLINUX_POLLRDHUP 0x2000     // asm-generic/poll.h
#define CLINUX_F_ADD_SEALS 1033     // linux/fcntl.h, which fcntl.h shuts out
#define CLINUX_F_SEALS_OF_LENGTH 7  // F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW

// A memory file; `name` is only seen in /proc.
static inline int clinux_make_memory_file(const char *name) {
  return (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
}
// Nobody can change its length any more.
static inline int clinux_seal_length(int descriptor) {
  return fcntl(descriptor, CLINUX_F_ADD_SEALS, CLINUX_F_SEALS_OF_LENGTH);
}
// The kind of file system that a descriptor's file is in (linux/magic.h), or -1.
static inline long clinux_file_system(int descriptor) {
  struct statfs status;
  return fstatfs(descriptor, &status) == 0 ? (long)status.f_type : -1;
}
static inline int clinux_make_nonblocking(int descriptor) {
  int flags = fcntl(descriptor, F_GETFL);
  return flags < 0 ? -1 : fcntl(descriptor, F_SETFL, flags | O_NONBLOCK);
}
static inline int clinux_accept(int descriptor) {
  return (int)syscall(SYS_accept4, descriptor, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
}

// ---- A memory file that is cut short while it is mapped: SIGBUS. All of these may be called by its handler. ----

static inline int clinux_catch_bus_error(void (*handler)(int, siginfo_t *, void *), struct sigaction *before) {
  struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
  return sigaction(SIGBUS, &action, before);
}
static inline int clinux_restore_bus_error(const struct sigaction *before) { return sigaction(SIGBUS, before, NULL); }
static inline void clinux_raise_bus_error(void) { raise(SIGBUS); }
// Whether an access made it, not another process.
static inline int clinux_is_fault(const siginfo_t *information) { return information->si_code > 0; }
static inline void *clinux_fault_address(const siginfo_t *information) { return information->si_addr; }
// Puts memory of zeroes, which takes none as long as nobody writes, in the place of a mapping; 0, or -1. It keeps
// errno, as the next call does: what they interrupt may be about to look at it.
static inline int clinux_map_zeroes(void *start, size_t bytes) {
  int before = errno;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  long mapped = syscall(SYS_mmap, start, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  errno = before;
  return mapped == (long)start ? 0 : -1;
}
static inline void clinux_add_to_event(int descriptor) {
  int before = errno;
  unsigned long long one = 1;
  long written = syscall(SYS_write, descriptor, &one, sizeof one);
  (void)written;  // An event that is full is readable as well.
  errno = before;
}

// ---- doctor: what the machine offers ----

static inline int clinux_doctor_tun_features(int descriptor, unsigned int *features) {
  return ioctl(descriptor, TUNGETFEATURES, features);
}

// Makes a device of a name that the kernel chooses; it goes away with the descriptor.
static inline int clinux_doctor_tun_make(int descriptor, short flags) {
  struct ifreq request = {.ifr_name = "vnetr-doctor%d"};
  request.ifr_flags = flags;
  return ioctl(descriptor, TUNSETIFF, &request);
}
