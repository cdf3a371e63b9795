// What becomes of a tile of products before it leaves the registers: row sums, exponentials,
// gradients.
//
// finish() gets 64 rows of a tile as the fragment of a warpgroup: a thread holds two rows, 8 apart,
// and of each the columns 8 j + fragment_column + {0, 1}. Four neighbouring lanes share a row.
#pragma once

#include "sm90.cuh"

namespace dpo_fast::sm90 {

constexpr float kInfinity = __builtin_huge_valf();

// The columns' part of the index of a register; see layout.cuh.
#define DPO_FAST_EACH_COLUMN(j, c)                        \
  _Pragma("unroll") for (int j = 0; j < kBlockV / 8; ++j) \
  _Pragma("unroll") for (int c = 0; c < 2; ++c)

DPO_FAST_DEVICE float quad_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

DPO_FAST_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Products to logits; columns past the end of the vocabulary to -inf, whose exponential is 0.
DPO_FAST_DEVICE void to_logits(float (&z)[kFragment], float factor, int first_v, int thread,
                               int V) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) z[i] *= factor;
  if (first_v + kBlockV <= V) return;
  const int left = V - first_v - fragment_column(thread);
  DPO_FAST_EACH_COLUMN(j, c) {
    if (8 * j + c >= left) z[4 * j + c] = z[4 * j + 2 + c] = -kInfinity;
  }
}

// Sums of each row over the tile, and its target's logit if the tile has it. With kKeeps the
// registers become the exponentials.
template <bool kKeeps>
struct SumRows {
  static constexpr bool kStores = kKeeps;

  const int64_t* targets;
  const float* offset;  // with kKeeps
  float* partials;      // [2 or 4, tiles_v, T]
  float* target;
  float factor;
  int T, V, tiles_v;
  bool extras;  // weighted and squares too: four planes

  DPO_FAST_DEVICE void finish(float (&z)[kFragment], const Place& place) const {
    to_logits(z, factor, place.first_v, place.thread, V);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = place.row() + 8 * b;
      const bool inside = row < T;
      if (inside) pick_target(z, b, row, place);
      float maximum = -kInfinity;
      DPO_FAST_EACH_COLUMN(j, c) maximum = fmaxf(maximum, z[4 * j + 2 * b + c]);
      maximum = quad_max(maximum);
      // A row that has seen only -inf gets offset 0: exp(-inf - 0) is 0, exp(-inf + inf) is NaN. A
      // given offset waits for the maximum too: fewer values are then in flight, and none spills.
      float m = maximum;
      if constexpr (kKeeps) m = inside ? offset[row] : 0.0f;
      if (maximum == -kInfinity) m = 0.0f;
      float total = 0.0f, weighted = 0.0f, squares = 0.0f;
      DPO_FAST_EACH_COLUMN(j, c) {
        float& value = z[4 * j + 2 * b + c];
        const float shifted = value - m, e = exponential(shifted);
        total += e;
        squares += e * e;
        if (!(e <= 0.0f)) weighted += e * shifted;  // 0 (-inf) is NaN; a NaN stays one
        if constexpr (kKeeps) value = e;
      }
      total = quad_sum(total);
      weighted = quad_sum(weighted);
      squares = quad_sum(squares);
      if (inside && place.thread % 4 == 0) {
        write(row, place.tile_v, maximum, total, weighted, squares);
      }
    }
  }

  DPO_FAST_DEVICE void pick_target(const float (&z)[kFragment], int b, int row,
                                   const Place& place) const {
    const int64_t y = targets[row];
    const int last = V - place.first_v < kBlockV ? V - place.first_v : kBlockV;
    if (y < place.first_v || y >= place.first_v + last) return;
    const int mine = static_cast<int>(y - place.first_v) - fragment_column(place.thread);
    DPO_FAST_EACH_COLUMN(j, c) {
      if (8 * j + c == mine) target[row] = z[4 * j + 2 * b + c];
    }
  }

  DPO_FAST_DEVICE void write(int row, int tile_v, float maximum, float total, float weighted,
                             float squares) const {
    const int64_t plane = static_cast<int64_t>(tiles_v) * T;
    float* out = partials + static_cast<int64_t>(tile_v) * T + row;
    out[0] = maximum;
    out[plane] = total;
    if (extras) {
      out[2 * plane] = weighted;
      out[3 * plane] = squares;
    }
  }
};

// g = hit 1[v = y] - scale exp(z - offset).
struct MakeGradient {
  static constexpr bool kStores = true;

  const int64_t* targets;
  const float* offset;
  const float* hit;
  const float* scale;
  int64_t first_column;
  float factor;
  int T, V;

  DPO_FAST_DEVICE void finish(float (&z)[kFragment], const Place& place) const {
    to_logits(z, factor, place.first_v, place.thread, V);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = place.row() + 8 * b;
      const bool inside = row < T;
      const float m = inside ? offset[row] : 0.0f, s = inside ? scale[row] : 0.0f;
      const float c_t = inside ? hit[row] : 0.0f;
      const int64_t first = first_column + place.first_v + fragment_column(place.thread);
      const int64_t y = inside ? targets[row] - first : -1;
      const int mine = y >= 0 && y < kBlockV ? static_cast<int>(y) : -1;
      DPO_FAST_EACH_COLUMN(j, c) {
        float& value = z[4 * j + 2 * b + c];
        value = -s * exponential(value - m);
        if (8 * j + c == mine) value += c_t;
      }
    }
  }
};

}  // namespace dpo_fast::sm90
