// Stands in for sm90.cuh (and has its include guard): the same functions on a CPU, no kinder than
// the ISA.
//
// Copies happen late and out of order; products read their operands at any time between issue and
// wait; the copy engine does not see ordinary stores before their fence; memory that nobody wrote
// is NaN. The layouts are those of the PTX ISA, written here a second time and not taken from
// layout.cuh.
#ifndef DPO_FAST_SM90_CUH
#define DPO_FAST_SM90_CUH

#include "cuda.h"

#include "../layout.cuh"

#define DPO_FAST_DEVICE inline

namespace dpo_fast::sm90 {

using emulated::Block;
using emulated::Fiber;
using emulated::machine;

struct Barrier {
  uint32_t id;  // 0xFFFFFFFF before init
  uint32_t unused;
};
static_assert(sizeof(Barrier) == 8);

struct BarrierState {
  int arrivals, pending, bytes = 0, phase = 0;
};
inline std::vector<BarrierState> barriers;

inline Fiber& self() { return *machine.running; }
inline Block& home() { return *self().home; }
inline unsigned char* dynamic_shared() { return home().memory; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - home().memory);
}
inline bool elect_one() { return self().thread % 32 == 0; }
inline void sync_warp() {}
inline int thread_of_warpgroup() { return self().thread % 128; }
template <int>
void lower_registers() {}
template <int>
void raise_registers() {}

inline uint32_t cluster_rank() { return home().rank; }
inline uint32_t cluster_size() { return home().cluster; }
// After what this thread has sent to other blocks, which the release orders before.
inline void cluster_sync() {
  Fiber* fiber = &self();
  machine.wait_until("its messages", [fiber] { return fiber->messages == 0; });
  emulated::meet(*home().together, home().threads * home().cluster, "cluster_sync");
}

// Mbarriers.

inline BarrierState* state(const Barrier* barrier) {
  if (barrier->id < barriers.size()) return &barriers[barrier->id];
  machine.fail("a barrier is used before it is initialised");
  static BarrierState nothing{1, 1};
  return &nothing;
}
inline void init(Barrier* barrier, uint32_t arrivals) {
  barrier->id = barriers.size();
  barriers.push_back({static_cast<int>(arrivals), static_cast<int>(arrivals)});
}
inline void fence_init() {}
inline void settle(BarrierState* barrier) {
  if (barrier->pending < 0) machine.fail("more arrivals at a barrier than it was made for");
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->pending = barrier->arrivals;
    ++barrier->phase;
  }
}
inline void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  BarrierState* known = state(barrier);
  known->bytes += bytes;
  --known->pending;
  settle(known);
}
inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }
inline Barrier* at(Barrier* barrier, uint32_t rank) {
  return reinterpret_cast<Barrier*>(home().peers[rank]->memory + shared_address(barrier));
}
inline void must_live(const Block* block) {
  if (block->alive == 0) machine.fail("a block has ended whose shared memory is still in use");
}
// Arrives late, as a message to another block may.
inline void arrive_at(Barrier* barrier, uint32_t rank) {
  Barrier* remote = at(barrier, rank);
  Block* block = home().peers[rank];
  Fiber* fiber = &self();
  ++fiber->messages;
  machine.events.push_back([=] {
    must_live(block);
    --fiber->messages;
    arrive(remote);
  });
}
inline void wait(Barrier* barrier, uint32_t parity) {
  machine.wait_until("an mbarrier", [barrier, parity] {
    return (state(barrier)->phase & 1) != static_cast<int>(parity);
  });
}

// Bulk tensor copies.

inline uint32_t physical(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
inline void prefetch(const CUtensorMap*) {}

inline void land(Block* block, uint32_t to, const CUtensorMap* map, Barrier* barrier, int x,
                 int y) {
  must_live(block);
  for (int row = 0; row < map->box[1]; ++row) {
    for (int column = 0; column < map->box[0]; ++column) {
      const bool inside = y + row < map->sizes[1] && x + column < map->sizes[0];
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map->data + (y + row) * map->stride + (x + column) * 2, 2);
      const uint32_t address = physical(to + row * map->box[0] * 2 + column * 2);
      std::memcpy(block->memory + address, &value, 2);
    }
  }
  BarrierState* known = state(barrier);
  known->bytes -= map->box[0] * map->box[1] * 2;
  settle(known);
}

inline void load_tile_to_all(void* to, const CUtensorMap* map, Barrier* barrier, int x, int y,
                             uint16_t mask) {
  const uint32_t address = shared_address(to);
  if (address % 1024) machine.fail("a swizzled box does not start at a multiple of 1024");
  for (Block* block : home().peers) {
    if (!(mask >> block->rank & 1)) continue;
    Barrier* counted = at(barrier, block->rank);
    machine.events.push_back([=] { land(block, address, map, counted, x, y); });
  }
}
inline void load_tile(void* to, const CUtensorMap* map, Barrier* barrier, int x, int y) {
  load_tile_to_all(to, map, barrier, x, y, 1 << home().rank);
}

// `stores` holds one entry for each group; an entry is emptied when its shared memory has been
// read.
inline void store_tile(const CUtensorMap* map, const void* from, int x, int y) {
  Fiber* fiber = &self();
  Block* block = &home();
  const uint32_t address = shared_address(from);
  fiber->stores.push_back({{const_cast<void*>(from), 0}});
  auto* group = &fiber->stores.back();
  machine.events.push_back([=] {
    must_live(block);
    for (int row = 0; row < map->box[1]; ++row) {
      for (int column = 0; column < map->box[0]; ++column) {
        if (y + row >= map->sizes[1] || x + column >= map->sizes[0]) continue;
        const uint32_t source = physical(address + row * map->box[0] * 2 + column * 2);
        unsigned char* target = map->data + (y + row) * map->stride + (x + column) * 2;
        std::memcpy(target, block->memory + source, 2);
      }
    }
    group->clear();
  });
}
inline void commit_stores() {}
template <int kPending>
void wait_stores_read() {
  Fiber* fiber = &self();
  machine.wait_until("bulk stores", [fiber] {
    const int count = static_cast<int>(fiber->stores.size()) - kPending;
    for (int i = 0; i < count; ++i) {
      if (!fiber->stores[i].empty()) return false;
    }
    return true;
  });
}

inline void write_shared(void* to, uint32_t value) {
  self().unfenced.push_back({static_cast<unsigned char*>(to), value});
}
inline void fence_async_proxy() {
  for (auto& [to, value] : self().unfenced) std::memcpy(to, &value, 4);
  self().unfenced.clear();
}
inline void sync_warpgroup(int id) {
  emulated::meet(home().meetings[id], 128, "the warpgroup's barrier");
}

// Wgmma.

inline float element(const Block* block, uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t address = physical(start + row / 8 * stride + row % 8 * 128 + k * 2);
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, block->memory + address, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void execute(Block* block, emulated::Product& product) {
  static float a[64][16], b[kBlockV][16];
  for (uint64_t descriptor : {product.a, product.b}) {
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7) machine.fail("not a 128-byte swizzle");
  }
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 64; ++row) a[row][k] = element(block, product.a, row, k);
    for (int row = 0; row < kBlockV; ++row) b[row][k] = element(block, product.b, row, k);
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kBlockV / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = product.accumulate ? product.accumulators[thread][i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      product.accumulators[thread][i] = sum;
    }
  }
  product.accumulators.clear();
  product.done = true;
}

inline std::vector<emulated::Product>& products() { return home().products[self().thread / 128]; }

// The first `count` products of the warpgroup that are not done; false if threads have yet to issue
// them.
inline bool execute_until(Block* block, std::vector<emulated::Product>& all, int count) {
  for (int i = 0; i < count; ++i) {
    if (all[i].done) continue;
    for (float* accumulators : all[i].accumulators) {
      if (accumulators == nullptr) return false;
    }
    execute(block, all[i]);
  }
  return true;
}

inline void hold(float (&)[kFragment]) {}
inline void fence_products() {}
inline void commit_products() { self().committed.push_back(self().products); }
inline void multiply(float (&d)[kFragment], uint64_t a, uint64_t b, bool accumulate) {
  auto& all = products();
  const int mine = self().products++;
  if (mine == static_cast<int>(all.size())) {
    all.push_back({a, b, accumulate, std::vector<float*>(128, nullptr)});
  }
  if (all[mine].a != a || all[mine].b != b) {
    machine.fail("a warpgroup disagrees about its operands");
  }
  all[mine].accumulators[thread_of_warpgroup()] = d;
  // Now and then as early as can be, else at the wait.
  if (machine.random() % 64 == 0) execute_until(&home(), all, mine + 1);
}
template <int kPending>
void wait_products() {
  const int groups = static_cast<int>(self().committed.size()) - kPending;
  if (groups <= 0) return;
  const int count = self().committed[groups - 1];
  Block* block = &home();
  auto* all = &products();
  machine.wait_until("products", [=] { return execute_until(block, *all, count); });
}

// Arithmetic.

inline float power_of_two(float x) { return std::exp2(x); }
inline float shuffle_xor(float value, int lanes) {
  const int warp = self().thread / 32, lane = self().thread % 32;
  Block& block = home();
  auto& slots = block.lanes[warp][block.warps[warp].generation & 1];
  slots[lane] = value;
  emulated::meet(block.warps[warp], 32, "a shuffle");
  return slots[lane ^ lanes];
}
inline uint32_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}

}  // namespace dpo_fast::sm90

#endif
