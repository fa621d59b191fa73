// The forward pass of the scan with scalar decay. It keeps the states at the start of each chunk for the backward pass.

#pragma once

#include <tuple>

#include "scalar_decay.h"

namespace {

std::tuple<Tensor, Tensor, Tensor> scalar_decay_forward(
    const Tensor& x, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
    Optional initial_state, bool keep) {
  const ScalarDecayScan scan(x, time_step, A, B, C, D);
  const int64_t N = scan.states, p = scan.head_dim, width = scan.width, by_state = scan.of_group * p;
  Tensor y = at::empty(x.sizes(), A.options()), last_state = at::empty({scan.batches, scan.heads, p, N}, A.options());
  Tensor kept = at::empty({0}, A.options());
  if (keep) kept = at::empty({scan.batches, scan.chunks, scan.groups, N, by_state}, A.options());
  const Maps maps(scan);

  at::parallel_for(0, scan.batches * scan.groups * scan.slices, 1, [&](int64_t begin, int64_t end) {
    Buffer matrix(STEPS * STEPS), x_(STEPS * width), drive(STEPS * width), out(STEPS * width);
    Buffer states(N * width * scan.of_group);
    Decays decays;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slice = item % scan.slices, group = item / scan.slices % scan.groups;
      const int64_t batch = item / scan.slices / scan.groups, first = group * scan.of_group;
      for (int64_t head = slice; head < scan.of_group; head += scan.slices) {
        float* state = &states[head * N * width];
        std::fill(state, state + N * width, 0.0f);
        if (!initial_state) continue;
        const float* given = initial_state->data_ptr<float>() + (batch * scan.heads + first + head) * p * N;
        for (int64_t i = 0; i < p; ++i)
          for (int64_t n = 0; n < N; ++n) state[n * width + i] = given[i * N + n];
      }

      for (int64_t chunk = 0; chunk < scan.chunks; ++chunk) {
        const int count = scan.count(chunk);
        const float *B_ = scan.at_chunk(maps.B, batch, group, chunk), *C_ = scan.at_chunk(maps.C, batch, group, chunk);
        const float* scores = scan.at_chunk(maps.scores, batch, group, chunk);
        for (int64_t head = slice; head < scan.of_group; head += scan.slices) {
          float* state = &states[head * N * width];
          if (keep)
            for (int64_t n = 0; n < N; ++n)
              std::memcpy(scan.at_chunk(kept, batch, group, chunk) + n * by_state + head * p, state + n * width, 4 * p);
          scan.load(x, batch, first + head, chunk, x_.data());
          decays.fill(scan, batch, first + head, chunk);
          scale_rows(count, width, decays.step, x_.data(), drive.data());
          decays.weigh(scores, matrix.data());
          const float skip = scan.D ? scan.D[first + head] : 0;
          product(count, width, N, Left{C_, 1, STEPS}, Right{state, width}, [&](int64_t l, int64_t i, Vector sum) {
            *(Vector*)&out[l * width + i] = decays.from_start[l] * sum + skip * *(Vector*)&x_[l * width + i];
          });
          product(count, width, count, Left{matrix.data(), STEPS, 1}, Right{drive.data(), width},
                  [&](int64_t l, int64_t i, Vector sum) { *(Vector*)&out[l * width + i] += sum; }, Part::UP_TO_ROW);
          scan.store(out.data(), y, batch, first + head, chunk);

          scale_rows(count, width, decays.to_end(), drive.data(), drive.data());
          const float whole = decays.whole();
          product(N, width, count, Left{B_, STEPS, 1}, Right{drive.data(), width},
                  [&](int64_t n, int64_t i, Vector sum) {
                    Vector& value = *(Vector*)(state + n * width + i);
                    value = whole * value + sum;
                  });
        }
      }

      for (int64_t head = slice; head < scan.of_group; head += scan.slices) {
        float* last = last_state.data_ptr<float>() + (batch * scan.heads + first + head) * p * N;
        for (int64_t i = 0; i < p; ++i)
          for (int64_t n = 0; n < N; ++n) last[i * N + n] = states[(head * N + n) * width + i];
      }
    }
  });
  return {y, last_state, kept};
}

}  // namespace
