// The backward pass of the scan with scalar decay, from the last chunk to the first.

#pragma once

#include <tuple>

#include "scalar_decay.h"

namespace {

// out[i] = factors · rows[i] of (width, STEPS), each entry.
void scale_columns(int64_t width, const float* factors, const float* rows, float* out) {
  for (int64_t i = 0; i < width * STEPS; i += LANES)
    *(Vector*)(out + i) = *(const Vector*)(factors + i % STEPS) * *(const Vector*)(rows + i);
}

// What the heads of a slice add up for their group, (slices, batch, chunks, G, …).
struct GroupSums {
  Tensor of_B, of_C, of_scores;  // (N, STEPS) twice, (STEPS, STEPS)

  GroupSums(const ScalarDecayScan& scan) {
    auto sums = [&](int64_t rows) {
      return at::zeros({scan.slices, scan.batches, scan.chunks, scan.groups, rows, STEPS}, at::kFloat);
    };
    of_B = sums(padded(scan.states)), of_C = sums(padded(scan.states)), of_scores = sums(STEPS);
  }
};

// of_log[t] += what the sums over rows from t on and columns before t are, of the gradients for logs of decays within
// the chunk (rows and columns), from its start (a column before the others) and to its end (a row after the others).
void add_sums_over(int count, const float* within, const float* from_start, const float* to_end, float whole, float* of_log) {
  alignas(64) float rows[STEPS];
  std::memcpy(rows, to_end, sizeof(rows));
  float before = whole;
  for (int t = count - 1; t >= 0; --t) {
    before += from_start[t];
    for (int s = 0; s <= t; s += LANES) *(Vector*)(rows + s) += *(const Vector*)(within + t * STEPS + s);
    Vector sums{};
    int s = 0;
    for (; s + LANES <= t; s += LANES) sums += *(Vector*)(rows + s);
    float total = before + sum_of(sums);
    for (; s < t; ++s) total += rows[s];
    of_log[t] = total;
  }
}

// dB and dC of all chunks: the sums of all slices, and what goes through the scores.
void store_maps(const ScalarDecayScan& scan, const Maps& maps, const GroupSums& sums, const Tensor& grad_B, const Tensor& grad_C) {
  const int64_t N = scan.states, width = padded(N);
  scan.for_each_chunk([&](int64_t batch, int64_t group, int64_t chunk) {
    Buffer of_B(width * STEPS), of_C(width * STEPS), of_scores(STEPS * STEPS), by_column(STEPS * STEPS), rows(STEPS * width);
    auto add_up = [&](const Tensor& slices, Buffer& out) {
      for (int64_t slice = 0; slice < scan.slices; ++slice) {
        const float* values = scan.at_chunk(slices.select(0, slice), batch, group, chunk);
        for (size_t i = 0; i < out.size(); i += LANES) *(Vector*)&out[i] += *(const Vector*)(values + i);
      }
    };
    add_up(sums.of_B, of_B), add_up(sums.of_C, of_C), add_up(sums.of_scores, of_scores);
    transpose(STEPS, STEPS, of_scores.data(), STEPS, by_column.data(), STEPS);

    const int count = scan.count(chunk);
    auto finish = [&](const Tensor& other, const Buffer& factor, Buffer& out, const Tensor& grad) {
      product(N, STEPS, count, Left{scan.at_chunk(other, batch, group, chunk), STEPS, 1}, Right{factor.data(), STEPS},
              [&](int64_t n, int64_t t, Vector sum) { *(Vector*)&out[n * STEPS + t] += sum; });
      transpose(width, STEPS, out.data(), STEPS, rows.data(), width);
      scan.store(rows.data(), grad, batch, group, chunk);
    };
    finish(maps.C, of_scores, of_B, grad_B), finish(maps.B, by_column, of_C, grad_C);
  });
}

// Gradients for x, Δ, A, B, C, D and the initial state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scalar_decay_backward(
    const Tensor& grad_y, const Tensor& grad_last_state, const Tensor& x, const Tensor& time_step, const Tensor& A,
    const Tensor& B, const Tensor& C, Optional D, const Tensor& kept) {
  const ScalarDecayScan scan(x, time_step, A, B, C, D);
  const int64_t N = scan.states, p = scan.head_dim, width = scan.width, by_state = scan.of_group * p;
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_step = at::empty(time_step.sizes(), A.options());
  Tensor grad_B = at::empty(B.sizes(), B.options()), grad_C = at::empty(C.sizes(), C.options());
  Tensor grad_state = at::empty({scan.batches, scan.heads, p, N}, A.options());
  Tensor grad_A = at::empty({scan.batches, scan.heads}, A.options()), grad_D = at::empty_like(grad_A);
  const Maps maps(scan);
  GroupSums sums(scan);

  at::parallel_for(0, scan.batches * scan.groups * scan.slices, 1, [&](int64_t begin, int64_t end) {
    Buffer matrix(STEPS * STEPS), of_matrix(STEPS * STEPS);
    Buffer x_(STEPS * width), drive(STEPS * width), grad(STEPS * width), of_drive(STEPS * width), scaled(STEPS * width);
    Buffer drive_columns(width * STEPS), grad_columns(width * STEPS), scaled_columns(width * STEPS);
    Buffer of_states(N * width * scan.of_group), of_rates(scan.of_group), of_skips(scan.of_group);
    Decays decays;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slice = item % scan.slices, group = item / scan.slices % scan.groups;
      const int64_t batch = item / scan.slices / scan.groups, first = group * scan.of_group;
      const Tensor slice_B = sums.of_B.select(0, slice), slice_C = sums.of_C.select(0, slice);
      const Tensor slice_scores = sums.of_scores.select(0, slice);
      for (int64_t head = slice; head < scan.of_group; head += scan.slices) {
        of_rates[head] = of_skips[head] = 0;
        const float* given = grad_last_state.data_ptr<float>() + (batch * scan.heads + first + head) * p * N;
        for (int64_t n = 0; n < N; ++n) {
          float* row = &of_states[(head * N + n) * width];
          for (int64_t i = 0; i < p; ++i) row[i] = given[i * N + n];
          std::fill(row + p, row + width, 0.0f);
        }
      }

      for (int64_t chunk = scan.chunks - 1; chunk >= 0; --chunk) {
        const int count = scan.count(chunk);
        const float *B_ = scan.at_chunk(maps.B, batch, group, chunk), *C_ = scan.at_chunk(maps.C, batch, group, chunk);
        const float* scores = scan.at_chunk(maps.scores, batch, group, chunk);
        float* of_B = scan.at_chunk(slice_B, batch, group, chunk);
        float* of_C = scan.at_chunk(slice_C, batch, group, chunk);
        float* of_scores = scan.at_chunk(slice_scores, batch, group, chunk);
        for (int64_t head = slice; head < scan.of_group; head += scan.slices) {
          float* of_state = &of_states[head * N * width];
          const float* state = scan.at_chunk(kept, batch, group, chunk) + head * p;
          scan.load(x, batch, first + head, chunk, x_.data());
          scan.load(grad_y, batch, first + head, chunk, grad.data());
          decays.fill(scan, batch, first + head, chunk);
          decays.weigh(scores, matrix.data());
          scale_rows(count, width, decays.step, x_.data(), drive.data());
          transpose(count, width, drive.data(), width, drive_columns.data(), STEPS);
          transpose(count, width, grad.data(), width, grad_columns.data(), STEPS);

          // through the state before the chunk
          alignas(64) float of_from_start[STEPS] = {}, of_to_end[STEPS] = {}, of_log[STEPS];
          scale_columns(width, decays.from_start, grad_columns.data(), scaled_columns.data());
          product(N, STEPS, p, Left{state, by_state, 1}, Right{scaled_columns.data(), STEPS},
                  [&](int64_t n, int64_t l, Vector sum) {
                    *(Vector*)(of_C + n * STEPS + l) += sum;
                    *(Vector*)(of_from_start + l) += sum * *(Vector*)(C_ + n * STEPS + l);
                  });

          // through the state after it
          scale_columns(width, decays.to_end(), drive_columns.data(), scaled_columns.data());
          product(N, STEPS, p, Left{of_state, width, 1}, Right{scaled_columns.data(), STEPS},
                  [&](int64_t n, int64_t s, Vector sum) {
                    *(Vector*)(of_B + n * STEPS + s) += sum;
                    *(Vector*)(of_to_end + s) += sum * *(Vector*)(B_ + n * STEPS + s);
                  });
          product(count, width, N, Left{B_, 1, STEPS}, Right{of_state, width},
                  [&](int64_t s, int64_t i, Vector sum) { *(Vector*)&of_drive[s * width + i] = decays.to_end()[s] * sum; });
          const float whole = decays.whole();
          float of_whole = 0;
          for (int64_t n = 0; n < N; ++n) {
            float of_row = 0;
            for (int64_t i = 0; i < p; ++i) of_row += of_state[n * width + i] * state[n * by_state + i];
            of_whole += whole * of_row;
          }
          scale_rows(count, width, decays.from_start, grad.data(), scaled.data());
          product(N, width, count, Left{C_, STEPS, 1}, Right{scaled.data(), width},
                  [&](int64_t n, int64_t i, Vector sum) {
                    Vector& value = *(Vector*)(of_state + n * width + i);
                    value = whole * value + sum;
                  });

          // within the chunk
          product(count, width, count, Left{matrix.data(), 1, STEPS}, Right{grad.data(), width},
                  [&](int64_t s, int64_t i, Vector sum) { *(Vector*)&of_drive[s * width + i] += sum; }, Part::FROM_ROW);
          product(count, STEPS, p, Left{grad.data(), width, 1}, Right{drive_columns.data(), STEPS},
                  [&](int64_t l, int64_t s, Vector sum) {
                    const int64_t at = l * STEPS + s;
                    const Vector of_score = sum * *(Vector*)(decays.within + at);
                    *(Vector*)(of_scores + at) += of_score;
                    *(Vector*)&of_matrix[at] = of_score * *(Vector*)(scores + at);
                  },
                  Part::ALL, true);

          add_sums_over(count, of_matrix.data(), of_from_start, of_to_end, of_whole, of_log);
          const float rate = scan.A[first + head], skip = scan.D ? scan.D[first + head] : 0;
          float* of_step = grad_step.data_ptr<float>() + (batch * scan.length + chunk * STEPS) * scan.heads + first + head;
          for (int t = 0; t < count; ++t) {
            Vector of_factor{}, of_skip{};
            for (int64_t i = t * width; i < (t + 1) * width; i += LANES) {
              Vector& of_x = *(Vector*)&of_drive[i];
              const Vector value = *(Vector*)&x_[i], g = *(Vector*)&grad[i];
              of_factor += of_x * value;
              of_skip += g * value;
              of_x = decays.step[t] * of_x + skip * g;
            }
            of_step[t * scan.heads] = of_log[t] * rate + sum_of(of_factor);
            of_rates[head] += of_log[t] * decays.step[t];
            of_skips[head] += sum_of(of_skip);
          }
          scan.store(of_drive.data(), grad_x, batch, first + head, chunk);
        }
      }

      for (int64_t head = slice; head < scan.of_group; head += scan.slices) {
        const int64_t at = batch * scan.heads + first + head;
        grad_A.data_ptr<float>()[at] = of_rates[head];
        grad_D.data_ptr<float>()[at] = of_skips[head];
        float* out = grad_state.data_ptr<float>() + at * p * N;
        for (int64_t i = 0; i < p; ++i)
          for (int64_t n = 0; n < N; ++n) out[i * N + n] = of_states[(head * N + n) * width + i];
      }
    }
  });
  store_maps(scan, maps, sums, grad_B, grad_C);
  return {grad_x, grad_step, grad_A.sum(0), grad_B, grad_C, grad_D.sum(0), grad_state};
}

}  // namespace
