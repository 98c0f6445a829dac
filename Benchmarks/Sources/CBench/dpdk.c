// Calls into the library that tools/bench makes of dpdk/dpdk.c, if it did.
#include "cbench.h"
#include <dlfcn.h>
#include <stdlib.h>

static struct {
  const char *(*version)(void);
  void *(*ring_make)(unsigned, unsigned);
  void (*ring_free)(void *);
  void (*ring_produce)(void *, unsigned, uint64_t, unsigned);
  uint64_t (*ring_consume)(void *, unsigned, uint64_t, unsigned);
  uint16_t (*raw_cksum)(const void *, size_t);
} dpdk;

bool cbench_dpdk_open(const char *path) {
  void *library = dlopen(path, RTLD_NOW);
  if (!library) return false;
  *(void **)&dpdk.version = dlsym(library, "dpdk_version");
  *(void **)&dpdk.ring_make = dlsym(library, "dpdk_ring_make");
  *(void **)&dpdk.ring_free = dlsym(library, "dpdk_ring_free");
  *(void **)&dpdk.ring_produce = dlsym(library, "dpdk_ring_produce");
  *(void **)&dpdk.ring_consume = dlsym(library, "dpdk_ring_consume");
  *(void **)&dpdk.raw_cksum = dlsym(library, "dpdk_raw_cksum");
  return dpdk.version && dpdk.ring_make && dpdk.ring_free && dpdk.ring_produce && dpdk.ring_consume && dpdk.raw_cksum;
}
const char *cbench_dpdk_version(void) { return dpdk.version(); }
void *cbench_rte_ring_make(unsigned item_bytes, unsigned places) { return dpdk.ring_make(item_bytes, places); }
void cbench_rte_ring_free(void *ring) { dpdk.ring_free(ring); }
void cbench_rte_ring_produce(void *ring, unsigned item_bytes, uint64_t items, unsigned batch) {
  dpdk.ring_produce(ring, item_bytes, items, batch);
}
uint64_t cbench_rte_ring_consume(void *ring, unsigned item_bytes, uint64_t items, unsigned batch) {
  return dpdk.ring_consume(ring, item_bytes, items, batch);
}
uint16_t cbench_rte_raw_cksum(const void *bytes, size_t count) { return dpdk.raw_cksum(bytes, count); }
