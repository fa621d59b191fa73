// The forward and the backward pass are both given these inputs.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "tiles.h"

namespace {

using Optional = const std::optional<Tensor>&;

const float* pointer(Optional tensor) { return tensor ? tensor->data_ptr<float>() : nullptr; }

struct Scan {
  const Tensor &u, &time_step, &B, &C;
  const float *A, *D, *bias;
  Optional gate;
  bool softplus_;
  int64_t batches, channels, length, states, groups;

  Scan(const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
       Optional gate, Optional bias, bool softplus_)
      : u(u), time_step(time_step), B(B), C(C), A(A.data_ptr<float>()), D(pointer(D)), bias(pointer(bias)), gate(gate),
        softplus_(softplus_), batches(u.size(0)), channels(u.size(1)), length(u.size(2)), states(A.size(1)),
        groups((channels + CHANNELS - 1) / CHANNELS) {}

  int rows(int64_t group) const { return std::min<int64_t>(CHANNELS, channels - group * CHANNELS); }
  int count(int64_t start) const { return std::min<int64_t>(CHUNK, length - start); }
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }

  // Returns row n of the states (batch, chunks, N, D) that are kept at the start of a chunk.
  float* kept(const Tensor& tensor, int64_t batch, int64_t start, int64_t n) const {
    return tensor.data_ptr<float>() + ((batch * chunks() + start / CHUNK) * states + n) * channels;
  }

  // Loads the effective Δ into step, and into raw what it is before the softplus.
  void load_step(int64_t batch, int64_t group, int64_t start, Tile& raw, Tile& step) const {
    const int rows = this->rows(group), count = this->count(start);
    load(time_step, batch, group * CHANNELS, start, rows, count, raw);
    const Group offset = load_vector(bias, group * CHANNELS, rows);
    for (int t = 0; t < count; ++t)
      for (int k = 0; k < BLOCKS; ++k) {
        raw[t].block[k] += offset.block[k];
        step[t].block[k] = softplus_ ? softplus(raw[t].block[k]) : raw[t].block[k];
      }
  }
};

}  // namespace
