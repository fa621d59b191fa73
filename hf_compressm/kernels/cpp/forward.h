// The forward pass goes over a whole sequence and keeps the states at the start of each chunk for the backward pass.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "inputs.h"

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_forward(
    const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
    Optional gate, Optional bias, bool softplus_, Optional initial_state, bool keep) {
  const Scan scan(u, time_step, A, B, C, D, gate, bias, softplus_);
  const int64_t N = scan.states, L = scan.length;
  Tensor y = at::empty({scan.batches, L, scan.channels}, u.options()).transpose(1, 2);
  Tensor last_state = at::empty({scan.batches, scan.channels, N}, A.options());
  Tensor ungated = at::empty({0}, A.options()), kept = at::empty({0}, A.options());
  if (keep) kept = at::empty({scan.batches, scan.chunks(), N, scan.channels}, A.options());
  if (keep && gate) ungated = at::empty({scan.batches, L, scan.channels}, A.options()).transpose(1, 2);

  at::parallel_for(0, scan.batches * scan.groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<Group> rates(N), h(N);
    std::vector<float> B_(N * CHUNK), C_(N * CHUNK);
    alignas(64) Tile u_, raw, step, drive, out;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / scan.groups, group = item % scan.groups, first = group * CHANNELS;
      const int rows = scan.rows(group);
      load_columns(scan.A, first, rows, N, LOG2_E, rates.data());
      if (initial_state)
        load_columns(initial_state->data_ptr<float>() + batch * scan.channels * N, first, rows, N, 1, h.data());
      else
        std::fill(h.begin(), h.end(), Group{});
      const Group skip = load_vector(scan.D, first, rows);

      for (int64_t start = 0; start < L; start += CHUNK) {
        const int count = scan.count(start);
        for (int64_t n = 0; keep && n < N; ++n) std::memcpy(scan.kept(kept, batch, start, n) + first, &h[n], 4 * rows);
        load(u, batch, first, start, rows, count, u_);
        scan.load_step(batch, group, start, raw, step);
        load_shared(B, batch, start, N, count, B_.data());
        load_shared(C, batch, start, N, count, C_.data());
        for (int t = 0; t < count; ++t)
          for (int k = 0; k < BLOCKS; ++k) {
            drive[t].block[k] = step[t].block[k] * u_[t].block[k];
            out[t].block[k] = skip.block[k] * u_[t].block[k];
          }
        for (int64_t n = 0; n < N; ++n) {
          const Group rate = rates[n];
          const float *b = &B_[n * CHUNK], *c = &C_[n * CHUNK];
          Group state = h[n];
          for (int t = 0; t < count; ++t)
            for (int k = 0; k < BLOCKS; ++k) {
              state.block[k] = exp2(rate.block[k] * step[t].block[k]) * state.block[k] + drive[t].block[k] * b[t];
              out[t].block[k] += state.block[k] * c[t];
            }
          h[n] = state;
        }
        if (gate) {
          if (keep) store(out, ungated, batch, first, start, rows, count);
          load(*gate, batch, first, start, rows, count, raw);
          for (int t = 0; t < count; ++t)
            for (int k = 0; k < BLOCKS; ++k) out[t].block[k] *= raw[t].block[k] * sigmoid(raw[t].block[k]);
        }
        store(out, y, batch, first, start, rows, count);
      }
      store_columns(h.data(), first, rows, N, last_state.data_ptr<float>() + batch * scan.channels * N);
    }
  });
  return {y, last_state, ungated, kept};
}

}  // namespace
