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
