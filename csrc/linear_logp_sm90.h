// What the Hopper kernels are asked, in plain C++: sizes, parameter structs, launches. No torch
// types.
//
// T tokens, D hidden, V vocabulary. z_tv = frame.scale * score_tv in powers of two, where the score is
// h_t . w_v or its negative; y_t the target of token t. Offsets and maxima are in powers of two too.
#pragma once

#include <cstdint>

namespace dpo_fast {

// A tile of logits belongs to one consumer warpgroup: 128 x 192 is two wgmma m64n192k16, 192
// accumulators a thread. The host's planning reads these lines.
constexpr int kBlockT = 128;
constexpr int kBlockV = 192;
constexpr int kBlockD = 64;     // 128 bytes of bf16: one row of the 128-byte swizzle
constexpr int kMaxCluster = 2;  // blocks that share a tile of the weight, one above the other in T
constexpr int kGroupUnits = 8;  // units of tokens that walk over the vocabulary together
constexpr int kThreads = 384;   // a producer warpgroup and two consumers

struct Frame {
  float scale;  // positive
  int negative;
};

struct Operands {
  const void* hidden;  // [T, D] bf16, rows hidden_stride elements apart
  const void* weight;  // [V, D] bf16, rows weight_stride elements apart
  const int64_t* targets;  // [T]; a value outside 0..V-1 (after first_column) is no target here
  int64_t hidden_stride;
  int64_t weight_stride;
  int tokens;
  int vocab;
  int depth;
  Frame frame;
};

struct Launch {
  int cluster;  // 1 or 2
  int blocks;   // of the persistent grid, a multiple of cluster
  int device;
  void* stream;  // of that device
};

// Sums of every row over every tile of the vocabulary, and joined over the tiles. With `kept` they are
// against the offset given, and 2^(z - offset) goes there; without, against an offset just above the
// row's maximum, which is written.
struct RowSums {
  float* offset;          // [T]
  void* kept;             // [T, V] bf16, rows kept_stride elements apart, or null
  int64_t kept_stride;
  const int8_t* repair;   // [1 + units of T] or null: [0] any, [1 + u] whether unit u is done again
  float* partials;        // [2 or 4, tiles of V, T]: maximum, total, and weighted, squares if asked
  float* score;           // [T]: of the target, untouched where these columns do not have it
  float* shift;           // [T]: z at the target less the offset, rounded once
  float* maximum;         // [T]: max z
  float* total;           // [T]: sum 2^(z - m)
  float* weighted;        // [T] or null: sum 2^(z - m) (z - m)
  float* squares;         // [T] or null, as weighted: sum 2^(2 (z - m))
};

// g_tv = hit_t 1[v = y_t] - per_p_t 2^(z_tv - offset_t), rounded once.
struct GradientTile {
  const float* offset;   // [T]
  const float* hit;      // [T]
  const float* per_p;    // [T]
  int64_t first_column;  // of these columns among those that targets count
  void* out;             // [T, V] bf16, rows out_stride elements apart
  int64_t out_stride;
};

// Both return nullptr, or what CUDA says was wrong. They wait for nothing.
const char* launch_rows(const Operands&, const RowSums&, const Launch&);
const char* launch_gradient(const Operands&, const GradientTile&, const Launch&);

}  // namespace dpo_fast
