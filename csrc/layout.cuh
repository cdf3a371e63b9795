// Where things lie: order of the tiles, the 128-byte swizzle, wgmma's descriptor and its fragments.
//
// Index arithmetic alone, for host and device, so that tests run it on a laptop.
#pragma once

#include <cmath>
#include <cstdint>

#include "linear_logp_sm90.h"

#ifdef __CUDACC__
#define DPO_FAST_BOTH __host__ __device__ __forceinline__
#else
#define DPO_FAST_BOTH inline
#endif

namespace dpo_fast {

// A unit is what a cluster computes at a time: one tile of the weight, and as many tiles of tokens,
// one above the other, as the cluster has blocks.
struct Unit {
  int t;  // in units of kBlockT * cluster tokens
  int v;  // in tiles of kBlockV columns
};

// Units of T vary fastest within a group, so that units in flight share hidden states and weight in
// L2.
DPO_FAST_BOTH Unit unit_of(int index, int units_t, int tiles_v) {
  const int in_group = kGroupUnits * tiles_v;
  const int first = index / in_group * kGroupUnits;
  const int size = units_t - first < kGroupUnits ? units_t - first : kGroupUnits;
  const int inside = index % in_group;
  return {first + inside % size, inside / size};
}

// Rows of 128 bytes; the 16-byte chunk c of row r lies at chunk c ^ (r % 8). So TMA's SWIZZLE_128B,
// for memory whose address is a multiple of 1024.
constexpr int kSwizzleRow = 128;
constexpr int kSwizzleAtom = 8 * kSwizzleRow;

DPO_FAST_BOTH int swizzled(int row, int byte) {
  return row * kSwizzleRow + (byte ^ (row % 8 * 16));
}

// wgmma's description of a K-major operand in that layout (PTX ISA, "matrix descriptor"): address /
// 16 in bits 0-13, leading offset / 16 in 16-29 (1: unused with a swizzle), stride between groups
// of 8 rows / 16 in 32-45, 1 = 128-byte swizzle in 62-63. The swizzle is a function of the address,
// so that the next 16 elements along K are 32 bytes further, within the atom.
DPO_FAST_BOTH uint64_t operand_descriptor(uint32_t shared_address) {
  return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(kSwizzleAtom >> 4) << 32 | uint64_t{1} << 62;
}

constexpr uint64_t kDescriptorK16 = 32 >> 4;                       // 16 elements along K
constexpr uint64_t kDescriptorRows64 = 64 * kSwizzleRow >> 4;      // 64 rows further down

// The accumulator of m64nNk16 (PTX ISA, "wgmma D fragment"): register 4 j + 2 b + c of a
// warpgroup's thread is row fragment_row(thread) + 8 b, column 8 j + fragment_column(thread) + c.
constexpr int kFragment = 64 * kBlockV / 128;

DPO_FAST_BOTH int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
DPO_FAST_BOTH int fragment_column(int thread) { return thread % 4 * 2; }

// An offset for sums up to this maximum: above it by 2^-22 of its size, because the distance of the
// largest logit, which is rounded once, may exceed that of its rounded value. A row that has seen only
// -inf gets offset 0: 2^(-inf - 0) is 0, 2^(-inf + inf) is NaN.
DPO_FAST_BOTH float offset_of(float maximum) {
  if (maximum == -__builtin_huge_valf()) return 0.0f;
  return fmaf(fabsf(maximum), 0x1p-22f, maximum);
}

// Where the 64 rows lie that a consumer's threads hold as fragments.
struct Place {
  int first_t;
  int first_v;
  int tile_v;
  int thread;  // of the warpgroup

  DPO_FAST_BOTH int row() const { return first_t + fragment_row(thread); }  // and 8 further down
};

}  // namespace dpo_fast
