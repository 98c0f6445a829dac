// What the microbenchmarks call of DPDK: inline functions of its headers. tools/bench makes a library of it as DPDK's
// own build would, with GCC (Clang's code for rte_raw_cksum takes four times as long) and pkg-config's flags.
#include "../Sources/CBench/include/cbench.h"
#include <rte_config.h>
#include <rte_ip.h>
#include <rte_ring.h>
#include <rte_ring_elem.h>
#include <rte_version.h>
#include <stdlib.h>

const char *dpdk_version(void) { return rte_version(); }

// In memory of our own: no EAL is started, no huge page or file is made.
void *dpdk_ring_make(unsigned item_bytes, unsigned places) {
  const ssize_t size = rte_ring_get_memsize_elem(item_bytes, places);
  if (size < 0) return NULL;
  struct rte_ring *ring = aligned_alloc(128, ((size_t)size + 127) & ~(size_t)127);
  if (ring && rte_ring_init(ring, "bench", places, RING_F_SP_ENQ | RING_F_SC_DEQ) == 0) return ring;
  free(ring);
  return NULL;
}
void dpdk_ring_free(void *ring) { free(ring); }

// The size of an item is a constant where it is used, as in DPDK's own callers.
static inline __attribute__((always_inline)) void produce(
    struct rte_ring *ring, unsigned words, uint64_t items, unsigned batch) {
  uint64_t room[CBENCH_BATCH_MAX * 8] __attribute__((aligned(64)));
  for (uint64_t next = 0; next < items; next += batch) {
    cbench_number(room, batch * words, next * words);
    for (unsigned done = 0; done < batch;)
      done += rte_ring_sp_enqueue_burst_elem(ring, room + done * words, words * 8, batch - done, NULL);
  }
}
static inline __attribute__((always_inline)) uint64_t consume(
    struct rte_ring *ring, unsigned words, uint64_t items, unsigned batch) {
  uint64_t room[CBENCH_BATCH_MAX * 8] __attribute__((aligned(64)));
  uint64_t wrong = 0;
  for (uint64_t next = 0; next < items;) {
    const unsigned count = rte_ring_sc_dequeue_burst_elem(ring, room, words * 8, batch, NULL);
    wrong |= cbench_differences(room, count * words, next * words);
    next += count;
  }
  return wrong;
}
void dpdk_ring_produce(void *ring, unsigned item_bytes, uint64_t items, unsigned batch) {
  item_bytes == 8 ? produce(ring, 1, items, batch) : produce(ring, 8, items, batch);
}
uint64_t dpdk_ring_consume(void *ring, unsigned item_bytes, uint64_t items, unsigned batch) {
  return item_bytes == 8 ? consume(ring, 1, items, batch) : consume(ring, 8, items, batch);
}

uint16_t dpdk_raw_cksum(const void *bytes, size_t count) { return rte_raw_cksum(bytes, count); }
