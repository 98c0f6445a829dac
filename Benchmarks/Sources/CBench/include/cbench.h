// What the microbenchmarks need from C: DPDK's ring and checksum, and a count of allocations.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// ---- Allocations ----

// How often this thread has asked for memory: malloc and its kin, whoever called them.
uint64_t cbench_allocations(void);

// ---- The clock ----

// Rotations that each wait for the last, one a cycle: how fast the core really runs.
static inline void cbench_rotate(uint64_t rotations) {
  uint64_t word = 1;
  for (uint64_t done = 0; done < rotations; done += 8)
    for (int place = 0; place < 8; place++) {
#if defined(__x86_64__)
      __asm__ volatile("rorq $1, %0" : "+r"(word));
#else
      __asm__ volatile("ror %0, %0, #1" : "+r"(word));
#endif
    }
}

// ---- Numbered words, which show whether any was lost, repeated or changed; the same code for either ring ----

static inline void cbench_number(uint64_t *words, size_t count, uint64_t first) {
  for (size_t place = 0; place < count; place++) words[place] = first + place;
}
// 0 when the words count up from `first`.
static inline uint64_t cbench_differences(const uint64_t *words, size_t count, uint64_t first) {
  uint64_t all = 0;
  for (size_t place = 0; place < count; place++) all |= words[place] ^ (first + place);
  return all;
}

// ---- DPDK ----

#define CBENCH_BATCH_MAX 64

// Opens the library that tools/bench makes; false when there is none, and then nothing below may be called.
bool cbench_dpdk_open(const char *path);
const char *cbench_dpdk_version(void);

// A ring of single producer and single consumer. NULL when it cannot be made.
void *cbench_rte_ring_make(unsigned item_bytes, unsigned places);
void cbench_rte_ring_free(void *ring);

// The two ends: carry `items`, a multiple of `batch`, of numbered words. Items are of 8 or 64 bytes.
void cbench_rte_ring_produce(void *ring, unsigned item_bytes, uint64_t items, unsigned batch);
// 0 when all came in order.
uint64_t cbench_rte_ring_consume(void *ring, unsigned item_bytes, uint64_t items, unsigned batch);

// rte_raw_cksum, not inlined: as a caller from another file has it.
uint16_t cbench_rte_raw_cksum(const void *bytes, size_t count);
