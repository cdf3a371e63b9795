// h W^T of one tile after the other in registers: a producer, two consumers in ping-pong, a ring of
// stages.
//
// The producer brings [128, 64] of the hidden states and [192, 64] of the weight to each stage of
// the ring. A consumer warpgroup owns a tile of its own: while one multiplies, the other is in its
// epilogue, so that the tensor cores do not wait for exponentials. In a cluster of two, both blocks
// need the same tile of the weight: each brings half of it, to both.
//
// Barriers, each with a phase per use:
//   full[s]   the stage's bytes are there. One arrival, the producer's, and the bytes it announces.
//   empty[s]  no block of the cluster reads the stage any more, since a producer writes to all of
//             them. One arrival of every warp of the warpgroup that read it, in every block.
//   turn[w]   the other consumer has issued the products of its tile. This keeps the tensor cores
//             on one tile, and keeps a consumer from waiting for a stage more than one phase ahead,
//             which parity could not tell. 128 arrivals.
#pragma once

#include "sm90.cuh"

namespace dpo_fast::sm90 {

constexpr int kStages = 5;
constexpr int kHiddenBytes = kBlockT * kSwizzleRow;
constexpr int kWeightBytes = kBlockV * kSwizzleRow;
constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
constexpr int kStagedRows = 64, kStagedColumns = 64;  // of a tile on its way to global memory
constexpr int kStagedBytes = kStagedRows * kSwizzleRow;

// 168 registers a thread at entry are all that a block of 384 threads can have; the consumers take
// theirs from the producer's. Asking for more than there are would wait for ever.
constexpr int kEntryRegisters = 65536 / kThreads / 8 * 8;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * kEntryRegisters);

struct Shared {
  alignas(kSwizzleAtom) unsigned char hidden[kStages][kHiddenBytes];
  alignas(kSwizzleAtom) unsigned char weight[kStages][kWeightBytes];
  alignas(kSwizzleAtom) unsigned char staged[2][kStagedBytes];  // one for each consumer
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier turn[2];
};
static_assert(kBlockV % (kMaxCluster * 8) == 0, "a share of the weight is whole swizzle atoms");
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block on sm_90");

// The units of a launch. Every role of every block walks over the same ones in the same order.
struct Schedule {
  int units_t, tiles_v;
  int blocks_d;          // steps along D
  const int8_t* repair;  // as in RowSums

  DPO_FAST_DEVICE int units() const {
    return repair != nullptr && !repair[0] ? 0 : units_t * tiles_v;
  }
  DPO_FAST_DEVICE bool wanted(Unit unit) const { return repair == nullptr || repair[1 + unit.t]; }
};

// A place in the ring and the parity of its present use.
struct Ring {
  uint32_t stage = 0, parity = 0;

  DPO_FAST_DEVICE void advance(uint32_t steps) {
    const uint32_t next = stage + steps;
    parity ^= next / kStages & 1;
    stage = next % kStages;
  }
};

DPO_FAST_DEVICE void produce(Shared& shared, const CUtensorMap& hidden, const CUtensorMap& weight,
                             Schedule schedule) {
  const int rank = cluster_rank(), size = cluster_size();
  const int share = kBlockV / size;
  const uint16_t everyone = (1 << size) - 1;
  Ring ring;
#pragma unroll 1  // the producer has few registers
  for (int index = blockIdx.x / size; index < schedule.units(); index += gridDim.x / size) {
    const Unit unit = unit_of(index, schedule.units_t, schedule.tiles_v);
    if (!schedule.wanted(unit)) continue;
    const int first_t = (unit.t * size + rank) * kBlockT;
    const int first_v = unit.v * kBlockV + rank * share;
#pragma unroll 1
    for (int step = 0; step < schedule.blocks_d; ++step) {
      Barrier* full = &shared.full[ring.stage];
      wait(&shared.empty[ring.stage], ring.parity ^ 1);
      arrive_expecting(full, kStageBytes);
      load_tile(shared.hidden[ring.stage], &hidden, full, step * kBlockD, first_t);
      load_tile_to_all(shared.weight[ring.stage] + rank * share * kSwizzleRow, &weight, full,
                       step * kBlockD, first_v, everyone);
      ring.advance(1);
    }
  }
}

// Tells every block of the cluster that this warp has done with a stage.
DPO_FAST_DEVICE void release(Shared& shared, uint32_t stage, int thread, uint32_t cluster) {
  const uint32_t lane = thread % 32;
  if (lane < cluster) arrive_at(&shared.empty[stage], lane);
}

// The products of a tile, issued; those of its last stage may still be under way.
DPO_FAST_DEVICE void multiply_tile(float (&halves)[2][kFragment], Shared& shared, Ring& ring,
                                   int blocks_d, int thread, uint32_t cluster) {
  uint32_t last = 0;
  for (int step = 0; step < blocks_d; ++step) {
    wait(&shared.full[ring.stage], ring.parity);
    const uint64_t a = operand_descriptor(shared_address(shared.hidden[ring.stage]));
    const uint64_t b = operand_descriptor(shared_address(shared.weight[ring.stage]));
    fence_products();
#pragma unroll
    for (int k = 0; k < kBlockD / 16; ++k) {
      const bool accumulate = k > 0 || step > 0;
      multiply(halves[0], a + k * kDescriptorK16, b + k * kDescriptorK16, accumulate);
      multiply(halves[1], a + k * kDescriptorK16 + kDescriptorRows64, b + k * kDescriptorK16,
               accumulate);
    }
    commit_products();
    if (step > 0) {
      wait_products<1>();
      release(shared, last, thread, cluster);
    }
    last = ring.stage;
    ring.advance(1);
  }
}

// Half a tile to global memory, 64 columns at a time through the consumer's staging buffer.
DPO_FAST_DEVICE void store_half(const float (&fragment)[kFragment], unsigned char* staged,
                                const CUtensorMap& stored, Place place, int consumer) {
  const int row = fragment_row(place.thread), column = fragment_column(place.thread);
#pragma unroll
  for (int first = 0; first < kBlockV; first += kStagedColumns) {
    if (place.thread == 0) wait_stores_read<0>();
    sync_warpgroup(1 + consumer);
#pragma unroll
    for (int j = 0; j < kStagedColumns / 8; ++j) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int i = (first / 8 + j) * 4 + 2 * b;
        write_shared(staged + swizzled(row + 8 * b, (8 * j + column) * 2),
                     pack_bf16(fragment[i], fragment[i + 1]));
      }
    }
    fence_async_proxy();
    sync_warpgroup(1 + consumer);
    if (place.thread == 0) {
      store_tile(&stored, staged, place.first_v + first, place.first_t);
      commit_stores();
    }
  }
}

template <class Epilogue>
DPO_FAST_DEVICE void consume(Shared& shared, const CUtensorMap& stored, Schedule schedule,
                             const Epilogue& epilogue, int consumer) {
  const int thread = thread_of_warpgroup();
  const int rank = cluster_rank(), size = cluster_size();
  uint32_t turn = consumer ^ 1;  // the first consumer begins
  bool mine = consumer == 0;
  Ring ring;
  for (int index = blockIdx.x / size; index < schedule.units(); index += gridDim.x / size) {
    const Unit unit = unit_of(index, schedule.units_t, schedule.tiles_v);
    if (!schedule.wanted(unit)) continue;
    if (mine) {
      float halves[2][kFragment];
      wait(&shared.turn[consumer], turn);
      multiply_tile(halves, shared, ring, schedule.blocks_d, thread, size);
      arrive(&shared.turn[consumer ^ 1]);
      wait_products<0>();
      release(shared, (ring.stage + kStages - 1) % kStages, thread, size);
      turn ^= 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first_t = (unit.t * size + rank) * kBlockT + 64 * half;
        const Place place{first_t, unit.v * kBlockV, unit.v, thread_of_warpgroup()};
        hold(halves[half]);
        epilogue.finish(halves[half], place);
        if constexpr (Epilogue::kStores) {
          store_half(halves[half], shared.staged[consumer], stored, place, consumer);
        }
      }
    } else {
      ring.advance(schedule.blocks_d);
    }
    mine = !mine;
  }
  if (Epilogue::kStores && thread == 0) wait_stores_read<0>();
}

template <class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap hidden,
                   const __grid_constant__ CUtensorMap weight,
                   const __grid_constant__ CUtensorMap stored, const Schedule schedule,
                   const Epilogue epilogue) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  if (threadIdx.x == 0) {
    prefetch(&hidden);
    prefetch(&weight);
    if (Epilogue::kStores) prefetch(&stored);
    for (int stage = 0; stage < kStages; ++stage) {
      init(&shared.full[stage], 1);
      init(&shared.empty[stage], 4 * cluster_size());
    }
    for (Barrier& turn : shared.turn) init(&turn, 128);
    fence_init();
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (elect_one()) produce(shared, hidden, weight, schedule);
      sync_warp();
    }
  } else {
    raise_registers<kConsumerRegisters>();
    consume(shared, stored, schedule, epilogue, threadIdx.x / 128 - 1);
  }
  cluster_sync();  // a block that ends takes its shared memory from those that still use it
}

}  // namespace dpo_fast::sm90
