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

// Products to scores: a logit in powers of two is frame.scale times its score. Columns past the end
// of the vocabulary to -inf, whose exponential is 0.
DPO_FAST_DEVICE void to_scores(float (&z)[kFragment], Frame frame, int first_v, int thread, int V) {
  if (frame.negative) {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) z[i] = -z[i];
  }
  if (first_v + kBlockV <= V) return;
  const int left = V - first_v - fragment_column(thread);
  DPO_FAST_EACH_COLUMN(j, c) {
    if (8 * j + c >= left) z[4 * j + c] = z[4 * j + 2 + c] = -kInfinity;
  }
}

// Sums of each row over the tile, and its target's score if the tile has it. With kKeeps the
// registers become the exponentials; with kExtras there are weighted sums and squares too.
template <bool kKeeps, bool kExtras>
struct SumRows {
  static constexpr bool kStores = kKeeps;

  const int64_t* targets;
  const float* offset;  // with kKeeps
  float* partials;      // [2 or, with kExtras, 4, tiles_v, T]
  float* score;
  Frame frame;
  int T, V, tiles_v;

  DPO_FAST_DEVICE void finish(float (&z)[kFragment], const Place& place) const {
    to_scores(z, frame, place.first_v, place.thread, V);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = place.row() + 8 * b;
      const bool inside = row < T;
      if (inside) pick_target(z, b, row, place);
      float maximum = -kInfinity;
      DPO_FAST_EACH_COLUMN(j, c) maximum = fmaxf(maximum, z[4 * j + 2 * b + c]);
      maximum = quad_max(maximum) * frame.scale;
      // A given offset waits for the maximum too: fewer values are then in flight, and none spills.
      float m = offset_of(maximum);
      if constexpr (kKeeps) m = inside && maximum != -kInfinity ? offset[row] : 0.0f;
      float total = 0.0f, weighted = 0.0f, squares = 0.0f;
      DPO_FAST_EACH_COLUMN(j, c) {
        float& value = z[4 * j + 2 * b + c];
        const float shifted = fmaf(value, frame.scale, -m), e = power_of_two(shifted);
        total += e;
        if constexpr (kExtras) {
          squares += e * e;
          weighted += e * fmaxf(shifted, -1e4f);  // 0 (-inf) would be NaN; e is 0 long before
        }
        if constexpr (kKeeps && !kExtras) value = e;
      }
      // Exponentials and what the sums of the extras hold do not fit the registers together: they are
      // computed again, from the neighbour's copy of the offset, lest the compiler keep them.
      if constexpr (kKeeps && kExtras) {
        m = shuffle_xor(m, 1);
        DPO_FAST_EACH_COLUMN(j, c) {
          float& value = z[4 * j + 2 * b + c];
          value = power_of_two(fmaf(value, frame.scale, -m));
        }
      }
      total = quad_sum(total);
      if constexpr (kExtras) {
        weighted = quad_sum(weighted);
        squares = quad_sum(squares);
      }
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
      if (8 * j + c == mine) score[row] = z[4 * j + 2 * b + c];
    }
  }

  DPO_FAST_DEVICE void write(int row, int tile_v, float maximum, float total, float weighted,
                             float squares) const {
    const int64_t plane = static_cast<int64_t>(tiles_v) * T;
    float* out = partials + static_cast<int64_t>(tile_v) * T + row;
    out[0] = maximum;
    out[plane] = total;
    if constexpr (kExtras) {
      out[2 * plane] = weighted;
      out[3 * plane] = squares;
    }
  }
};

// g = hit 1[v = y] - per_p 2^(z - offset).
struct MakeGradient {
  static constexpr bool kStores = true;

  const int64_t* targets;
  const float* offset;
  const float* hit;
  const float* per_p;
  int64_t first_column;
  Frame frame;
  int T, V;

  DPO_FAST_DEVICE void finish(float (&z)[kFragment], const Place& place) const {
    to_scores(z, frame, place.first_v, place.thread, V);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = place.row() + 8 * b;
      const bool inside = row < T;
      const float m = inside ? offset[row] : 0.0f, s = inside ? per_p[row] : 0.0f;
      const float c_t = inside ? hit[row] : 0.0f;
      const int64_t first = first_column + place.first_v + fragment_column(place.thread);
      const int64_t y = inside ? targets[row] - first : -1;
      const int mine = y >= 0 && y < kBlockV ? static_cast<int>(y) : -1;
      DPO_FAST_EACH_COLUMN(j, c) {
        float& value = z[4 * j + 2 * b + c];
        value = -s * power_of_two(fmaf(value, frame.scale, -m));
        if (8 * j + c == mine) value += c_t;
      }
    }
  }
};

}  // namespace dpo_fast::sm90
