// What the passes of the scan with scalar decay share: see torch_scalar_decay.py for the matrix form of a chunk.
//
// A head of a sequence goes from chunk to chunk. Its state (N, p), its inputs (positions, p) and its decays (positions,
// positions) lie in the caches; products of them are most of the work. Rows are padded to whole vectors. The decays of
// a chunk are products of the decays of its steps, so that there is one exponential for each step, and small decays
// keep their digits. Scores C_l · B_s are made once for each chunk and group of heads.
//
// An item of work is a slice of the heads of a group; what is summed over the heads of a group is added up over those
// of a slice first. How many slices there are never depends on the number of threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "inputs.h"
#include "products.h"

namespace {

constexpr int STEPS = 64;  // of a chunk, as in scalar_decay_operators.py
constexpr int SLICES = 8;  // of all groups and sequences at least, where there are as many heads
constexpr float NEGLIGIBLE = 1e-37f;  // a decay below it is zero: arithmetic with the smallest floats is slow
static_assert(STEPS % LANES == 0);

using Buffer = std::vector<float>;

struct ScalarDecayScan {
  const Tensor &x, &time_step, &B, &C;
  const float *A, *D;
  int64_t batches, length, heads, head_dim, groups, states, chunks, width, of_group, slices;

  ScalarDecayScan(const Tensor& x, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C, Optional D)
      : x(x), time_step(time_step), B(B), C(C), A(A.data_ptr<float>()), D(pointer(D)), batches(x.size(0)),
        length(x.size(1)), heads(x.size(2)), head_dim(x.size(3)), groups(B.size(2)), states(B.size(3)),
        chunks((length + STEPS - 1) / STEPS), width(padded(head_dim)), of_group(heads / groups),
        slices(std::clamp<int64_t>(SLICES / (batches * groups), 1, of_group)) {}

  int count(int64_t chunk) const { return std::min<int64_t>(STEPS, length - chunk * STEPS); }

  // f(batch, group, chunk) for each of them, in parallel.
  template <typename F>
  void for_each_chunk(F f) const {
    at::parallel_for(0, batches * chunks * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) f(item / groups / chunks, item % groups, item / groups % chunks);
    });
  }

  // Where a matrix of a chunk and a group begins in a tensor (batch, chunks, G, rows, columns).
  float* at_chunk(const Tensor& tensor, int64_t batch, int64_t group, int64_t chunk) const {
    return tensor.data_ptr<float>() + ((batch * chunks + chunk) * groups + group) * tensor.size(-2) * tensor.size(-1);
  }

  // out (positions, whole vectors) of x or B or their like, (batch, L, heads or G, size), in any dtype and of any
  // strides; zero beyond the size.
  void load(const Tensor& tensor, int64_t batch, int64_t index, int64_t chunk, float* out) const {
    const int64_t size = tensor.size(3), width = padded(size), steps = count(chunk);
    with_data(tensor, [&](auto* data) {
      data += batch * tensor.stride(0) + chunk * STEPS * tensor.stride(1) + index * tensor.stride(2);
      const int64_t by_position = tensor.stride(1), by_entry = tensor.stride(3);
      for (int64_t t = 0; t < steps; ++t, out += width) {
        if (by_entry == 1)
          for (int64_t i = 0; i < size; ++i) out[i] = data[t * by_position + i];
        else
          for (int64_t i = 0; i < size; ++i) out[i] = data[t * by_position + i * by_entry];
        std::fill(out + size, out + width, 0.0f);
      }
    });
  }

  // Write what `load` gives into a contiguous tensor.
  void store(const float* values, const Tensor& tensor, int64_t batch, int64_t index, int64_t chunk) const {
    const int64_t size = tensor.size(3), width = padded(size), steps = count(chunk), by_position = tensor.stride(1);
    with_data(tensor, [&](auto* data) {
      data += batch * tensor.stride(0) + chunk * STEPS * by_position + index * size;
      for (int64_t t = 0; t < steps; ++t, values += width)
        for (int64_t i = 0; i < size; ++i) data[t * by_position + i] = values[i];
    });
  }
};

// B, C and the scores C_l · B_s of all chunks and groups, once for all heads.
struct Maps {
  Tensor B, C;  // (batch, chunks, G, N padded, STEPS), zero beyond the end of the sequence
  Tensor scores;  // (batch, chunks, G, STEPS, STEPS): row l, column s; what lies above the diagonal may be anything finite

  explicit Maps(const ScalarDecayScan& scan) {
    const int64_t N = scan.states, width = padded(N);
    B = at::empty({scan.batches, scan.chunks, scan.groups, width, STEPS}, at::kFloat);
    C = at::empty_like(B), scores = at::zeros({scan.batches, scan.chunks, scan.groups, STEPS, STEPS}, at::kFloat);
    scan.for_each_chunk([&](int64_t batch, int64_t group, int64_t chunk) {
      Buffer rows(STEPS * width);
      const int steps = scan.count(chunk);
      auto fill = [&](const Tensor& map, float* out) {
        scan.load(map, batch, group, chunk, rows.data());
        transpose(steps, width, rows.data(), width, out, STEPS);
        for (int64_t n = 0; n < width; ++n) std::fill(out + n * STEPS + padded(steps), out + (n + 1) * STEPS, 0.0f);
      };
      float *B_ = scan.at_chunk(B, batch, group, chunk), *C_ = scan.at_chunk(C, batch, group, chunk);
      fill(scan.B, B_), fill(scan.C, C_);
      float* out = scan.at_chunk(scores, batch, group, chunk);
      product(steps, STEPS, N, Left{C_, 1, STEPS}, Right{B_, STEPS},
              [&](int64_t l, int64_t s, Vector sum) { *(Vector*)(out + l * STEPS + s) = sum; }, Part::ALL, true);
    });
  }
};

// What is left of a state after some steps of a chunk.
struct Decays {
  float step[STEPS], from_start[STEPS];  // Δ of each step; decay from before the chunk to each position
  float within[STEPS * STEPS] = {};  // from the position of the column to that of the row, zero above the diagonal
  int count = 0;

  const float* to_end() const { return within + (count - 1) * STEPS; }
  float whole() const { return from_start[count - 1]; }

  void fill(const ScalarDecayScan& scan, int64_t batch, int64_t head, int64_t chunk) {
    alignas(64) float of_step[STEPS];
    count = scan.count(chunk);
    const float* steps = scan.time_step.data_ptr<float>() + (batch * scan.length + chunk * STEPS) * scan.heads + head;
    for (int t = 0; t < STEPS; ++t) step[t] = t < count ? steps[t * scan.heads] : 0;
    const float rate = LOG2_E * scan.A[head];
    for (int t = 0; t < STEPS; t += LANES) *(Vector*)(of_step + t) = exp2(rate * *(Vector*)(step + t));
    for (int l = 0; l < count; ++l) {
      float* row = within + l * STEPS;
      for (int s = 0; s < l; s += LANES) {
        const Vector decay = of_step[l] * *(Vector*)(row - STEPS + s);
        *(Vector*)(row + s) = decay < NEGLIGIBLE ? Vector{} : decay;
      }
      row[l] = 1;
      std::fill(row + l + 1, row + padded(l + 1), 0.0f);
      const float decay = of_step[l] * (l ? from_start[l - 1] : 1);
      from_start[l] = decay < NEGLIGIBLE ? 0 : decay;
    }
  }

  // out = scores · decays, each entry; above the diagonal zero, as far as a tile of rows reaches.
  void weigh(const float* scores, float* out) const {
    for (int l = 0; l < count; ++l)
      for (int s = 0; s < std::min(l + TILE_ROWS, STEPS); s += LANES)
        *(Vector*)(out + l * STEPS + s) = *(const Vector*)(scores + l * STEPS + s) * *(const Vector*)(within + l * STEPS + s);
  }
};

// out[t] = factors[t] · rows[t] of (positions, width).
void scale_rows(int count, int64_t width, const float* factors, const float* rows, float* out) {
  for (int t = 0; t < count; ++t)
    for (int64_t i = 0; i < width; i += LANES) *(Vector*)(out + t * width + i) = factors[t] * *(Vector*)(rows + t * width + i);
}

float sum_of(Vector values) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += values[i];
  return total;
}

}  // namespace
