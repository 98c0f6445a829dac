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

// ---- A guest's driver, polling, as one ring of its network device sees it ----

// Buffers of 2 KiB that go round in order. A transmitted one has the virtio header of 12 bytes and a frame whose first
// word is its number; of a received one that number is checked.
enum { CBENCH_GUEST_BUFFER_BYTES = 2048, CBENCH_GUEST_HEADER_BYTES = 12 };
struct cbench_guest {
  uint8_t *descriptor, *driver, *device, *buffers;
  uint64_t buffers_address;
  uint32_t size, frame_bytes;
  _Bool is_packed, is_receiver;
  uint16_t place;  // the next to come back, and to be offered again; counts up for ever
  _Bool wrap;
  uint64_t frames;  // that came back
  uint64_t wrong;
};

static inline void cbench_guest_offer(struct cbench_guest *guest) {
  uint32_t place = guest->is_packed ? guest->place : guest->place & (guest->size - 1);
  uint8_t *descriptor = guest->descriptor + 16 * place;
  uint8_t *buffer = guest->buffers + (size_t)CBENCH_GUEST_BUFFER_BYTES * place;
  uint16_t flags = guest->is_receiver ? 2 : 0;
  if (!guest->is_receiver) __builtin_memcpy(buffer + CBENCH_GUEST_HEADER_BYTES, &guest->frames, 8);
  *(uint64_t *)descriptor = guest->buffers_address + (uint64_t)CBENCH_GUEST_BUFFER_BYTES * place;
  *(uint32_t *)(descriptor + 8) =
      guest->is_receiver ? CBENCH_GUEST_BUFFER_BYTES : CBENCH_GUEST_HEADER_BYTES + guest->frame_bytes;
  if (guest->is_packed) {
    *(uint16_t *)(descriptor + 12) = (uint16_t)place;
    flags |= guest->wrap ? 1 << 7 : 1 << 15;
    __atomic_store_n((uint16_t *)(descriptor + 14), flags, __ATOMIC_RELEASE);
    if (++guest->place == guest->size) {
      guest->place = 0;
      guest->wrap = !guest->wrap;
    }
  } else {
    *(uint32_t *)(descriptor + 12) = flags;
    *(uint16_t *)(guest->driver + 4 + 2 * place) = (uint16_t)place;
    guest->place++;
  }
  guest->frames++;
}
static inline void cbench_guest_show(struct cbench_guest *guest) {
  if (!guest->is_packed) __atomic_store_n((uint16_t *)(guest->driver + 2), guest->place, __ATOMIC_RELEASE);
}
// Offers all buffers of the ring; `wrap` begins as true.
static inline void cbench_guest_begin(struct cbench_guest *guest) {
  for (uint32_t count = 0; count < guest->size; count++) cbench_guest_offer(guest);
  cbench_guest_show(guest);
}
// Takes back what the device gave back, `most` buffers of it, and offers them again; how many these were.
static inline uint32_t cbench_guest_turn(struct cbench_guest *guest, uint32_t most) {
  uint32_t count = 0;
  // All places but those of the device are offered: the next to come back is the next to be offered.
  uint16_t used = guest->is_packed ? 0 : __atomic_load_n((uint16_t *)(guest->device + 2), __ATOMIC_ACQUIRE);
  for (; count < most; count++) {
    uint32_t place = guest->is_packed ? guest->place : guest->place & (guest->size - 1);
    uint32_t identifier, bytes;
    if (guest->is_packed) {
      uint8_t *descriptor = guest->descriptor + 16 * place;
      uint16_t flags = __atomic_load_n((uint16_t *)(descriptor + 14), __ATOMIC_ACQUIRE);
      // Of the round before, which had the other wrap counter.
      if ((flags & 0x8080) != (guest->wrap ? 0 : 0x8080)) break;
      identifier = *(uint16_t *)(descriptor + 12);
      bytes = *(uint32_t *)(descriptor + 8);
    } else {
      if ((uint16_t)(guest->place - guest->size) == used) break;
      identifier = *(uint32_t *)(guest->device + 4 + 8 * place);
      bytes = *(uint32_t *)(guest->device + 8 + 8 * place);
    }
    guest->wrong |= identifier ^ place;
    if (guest->is_receiver) {
      uint64_t number;
      __builtin_memcpy(&number, guest->buffers + (size_t)CBENCH_GUEST_BUFFER_BYTES * place + CBENCH_GUEST_HEADER_BYTES, 8);
      guest->wrong |= (number ^ (guest->frames - guest->size)) |
                      (bytes ^ (CBENCH_GUEST_HEADER_BYTES + guest->frame_bytes));
    }
    cbench_guest_offer(guest);
  }
  if (count) cbench_guest_show(guest);
  return count;
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
