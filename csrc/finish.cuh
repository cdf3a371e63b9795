// The row sums of all tiles of the vocabulary joined: every tile is a split over V, whatever T is.
//
// A block has 32 tokens and 8 strands: strand s adds up the tiles s, s + 8, ... and the strands are
// added first to last, so that bits repeat and do not depend on the tokens beside a token.
#pragma once

#include <cstdint>

#include "sm90.cuh"

namespace dpo_fast::sm90 {

constexpr int kFinishTokens = 32, kFinishStrands = 8;

struct Finish {
  const int8_t* repair;   // as in RowSums
  const float* partials;  // [2 or 4, tiles_v, T]
  const float* score;
  float* offset;
  float* shift;
  float* maximum;
  float* total;
  float* weighted;  // null: two planes
  float* squares;
  float scale;
  int T, tiles_v;
  bool rebase;  // partial sums are against the tile's own offset, not against the row's
};

__global__ void __launch_bounds__(kFinishTokens* kFinishStrands) finish_kernel(const Finish a) {
  __shared__ float strands[3][kFinishStrands][kFinishTokens];
  const int token = threadIdx.x % kFinishTokens, strand = threadIdx.x / kFinishTokens;
  const int row = blockIdx.x * kFinishTokens + token;
  if (a.repair != nullptr && !a.repair[0]) return;
  const int64_t plane = static_cast<int64_t>(a.tiles_v) * a.T;
  const float* first = a.partials + (row < a.T ? row : a.T - 1);

  float maximum = -__builtin_huge_valf();
  for (int tile = strand; tile < a.tiles_v; tile += kFinishStrands) {
    maximum = fmaxf(maximum, first[static_cast<int64_t>(tile) * a.T]);
  }
  strands[0][strand][token] = maximum;
  __syncthreads();
  for (int s = 0; s < kFinishStrands; ++s) maximum = fmaxf(maximum, strands[0][s][token]);
  __syncthreads();

  const float offset = a.rebase ? offset_of(maximum) : a.offset[row < a.T ? row : a.T - 1];
  float total = 0.0f, weighted = 0.0f, squares = 0.0f;
  for (int tile = strand; tile < a.tiles_v; tile += kFinishStrands) {
    const float* part = first + static_cast<int64_t>(tile) * a.T;
    // A tile of -inf alone has offset 0 and sums of 0, whatever the row's maximum is.
    const float sum = part[plane];
    const float shift = a.rebase && sum > 0.0f ? offset_of(part[0]) - offset : 0.0f;
    const float gain = power_of_two(shift);
    total += gain * sum;
    if (a.weighted != nullptr) {
      // Where gain is 0, shift may be so far that shift * sum is -inf, and 0 times that NaN.
      if (!(gain <= 0.0f)) weighted += gain * (part[2 * plane] + shift * sum);
      squares += gain * gain * part[3 * plane];
    }
  }
  strands[0][strand][token] = total;
  strands[1][strand][token] = weighted;
  strands[2][strand][token] = squares;
  __syncthreads();
  if (strand != 0 || row >= a.T) return;
  for (int s = 1; s < kFinishStrands; ++s) {
    total += strands[0][s][token];
    weighted += strands[1][s][token];
    squares += strands[2][s][token];
  }
  // Beyond 1e8 the largest logit vanishes against the offset just above it: the row is that logit
  // alone. A shard whose columns are all far below the offset keeps its sum of 0.
  if (total == 0.0f && maximum >= offset - fabsf(offset) * 0x1p-20f) total = 1.0f;
  if (a.rebase) a.offset[row] = offset;
  a.shift[row] = fmaf(a.score[row], a.scale, -offset);
  a.maximum[row] = maximum;
  a.total[row] = total;
  if (a.weighted != nullptr) {
    a.weighted[row] = weighted;
    a.squares[row] = squares;
  }
}

}  // namespace dpo_fast::sm90
