// The backward pass, from the last chunk to the first. It computes the states within a chunk again from the kept one.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "inputs.h"

namespace {

constexpr int ITEMS = 32;  // of work at least, where there are as many channels; never depends on the number of threads

// Gradients for u, Δ, A, B, C, D, the gate, the bias and the initial state.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients scan_backward(
    const Tensor& grad_y, const Tensor& grad_last_state, const Tensor& u, const Tensor& time_step, const Tensor& A,
    const Tensor& B, const Tensor& C, Optional D, Optional gate, Optional bias, bool softplus_, const Tensor& ungated, const Tensor& kept) {
  const Scan scan(u, time_step, A, B, C, D, gate, bias, softplus_);
  const int64_t N = scan.states, L = scan.length, padded = scan.chunks() * CHUNK;
  const int64_t slices = std::min(scan.groups, std::max<int64_t>(1, ITEMS / std::max<int64_t>(1, scan.batches)));
  Tensor grad_u = at::empty_like(u), grad_step = at::empty_like(time_step);
  Tensor grad_gate = gate ? at::empty_like(*gate) : at::empty({0}, A.options());
  Tensor grad_state = at::empty({scan.batches, scan.channels, N}, A.options());
  Tensor grad_A = at::empty_like(grad_state);
  Tensor grad_D = at::zeros({scan.batches, scan.groups * CHANNELS}, A.options()), grad_bias = at::zeros_like(grad_D);
  Tensor grad_B = at::zeros({scan.batches, slices, N, padded}, A.options()), grad_C = at::zeros_like(grad_B);

  at::parallel_for(0, scan.batches * slices, 1, [&](int64_t begin, int64_t end) {
    std::vector<Group> rates(N), dh(N), dA(N);
    std::vector<float> B_(N * CHUNK), C_(N * CHUNK);
    alignas(64) Tile u_, raw, step, drive, grad, z, d_drive, d_step, decay, before;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / slices;
      for (int64_t group = item % slices; group < scan.groups; group += slices) {
        const int64_t first = group * CHANNELS;
        const int rows = scan.rows(group);
        load_columns(scan.A, first, rows, N, LOG2_E, rates.data());
        load_columns(grad_last_state.data_ptr<float>() + batch * scan.channels * N, first, rows, N, 1, dh.data());
        std::fill(dA.begin(), dA.end(), Group{});
        const Group skip = load_vector(scan.D, first, rows);
        Group d_skip{}, d_bias{};

        for (int64_t chunk = scan.chunks() - 1; chunk >= 0; --chunk) {
          const int64_t start = chunk * CHUNK;
          const int count = scan.count(start);
          load(u, batch, first, start, rows, count, u_);
          load(grad_y, batch, first, start, rows, count, grad);
          load_shared(B, batch, start, N, count, B_.data());
          load_shared(C, batch, start, N, count, C_.data());
          if (gate) {
            load(*gate, batch, first, start, rows, count, z);
            load(ungated, batch, first, start, rows, count, raw);
            for (int t = 0; t < count; ++t)
              for (int k = 0; k < BLOCKS; ++k) {
                const Vector x = z[t].block[k], s = sigmoid(x), g = grad[t].block[k];
                z[t].block[k] = g * raw[t].block[k] * s * (1 + x * (1 - s));
                grad[t].block[k] = g * x * s;
              }
            store(z, grad_gate, batch, first, start, rows, count);
          }
          scan.load_step(batch, group, start, raw, step);
          for (int t = 0; t < count; ++t)
            for (int k = 0; k < BLOCKS; ++k) {
              drive[t].block[k] = step[t].block[k] * u_[t].block[k];
              d_drive[t].block[k] = d_step[t].block[k] = Vector{};
            }

          for (int64_t n = 0; n < N; ++n) {
            const Group rate = rates[n];
            const float *b = &B_[n * CHUNK], *c = &C_[n * CHUNK];
            Group state = load_vector(scan.kept(kept, batch, start, n), first, rows);
            Vector dB[CHUNK] = {}, dC[CHUNK] = {};
            for (int t = 0; t < count; ++t)
              for (int k = 0; k < BLOCKS; ++k) {
                before[t].block[k] = state.block[k];
                decay[t].block[k] = exp2(rate.block[k] * step[t].block[k]);
                state.block[k] = decay[t].block[k] * state.block[k] + drive[t].block[k] * b[t];
                dC[t] += grad[t].block[k] * state.block[k];
              }
            Group d_state = dh[n], d_rate = dA[n];
            for (int t = count - 1; t >= 0; --t)
              for (int k = 0; k < BLOCKS; ++k) {
                Vector d = d_state.block[k] + grad[t].block[k] * c[t];
                dB[t] += drive[t].block[k] * d;
                d_drive[t].block[k] += d * b[t];
                d *= decay[t].block[k];
                d_state.block[k] = d;
                d *= before[t].block[k];  // ∂/∂(Δ A)
                d_step[t].block[k] += d * rate.block[k];
                d_rate.block[k] += d * step[t].block[k];
              }
            dh[n] = d_state;
            dA[n] = d_rate;
            float* to_B = grad_B.data_ptr<float>() + (item * N + n) * padded + start;
            float* to_C = grad_C.data_ptr<float>() + (item * N + n) * padded + start;
            for (int t = 0; t < CHUNK; t += LANES) {
              *(Vector*)(to_B + t) += sums(dB + t);
              *(Vector*)(to_C + t) += sums(dC + t);
            }
          }

          for (int t = 0; t < count; ++t)
            for (int k = 0; k < BLOCKS; ++k) {
              d_skip.block[k] += grad[t].block[k] * u_[t].block[k];
              Vector d = LN_2 * d_step[t].block[k] + d_drive[t].block[k] * u_[t].block[k];
              if (softplus_) d *= sigmoid(raw[t].block[k]);
              d_bias.block[k] += d;
              d_step[t].block[k] = d;
              d_drive[t].block[k] = d_drive[t].block[k] * step[t].block[k] + grad[t].block[k] * skip.block[k];
            }
          store(d_drive, grad_u, batch, first, start, rows, count);
          store(d_step, grad_step, batch, first, start, rows, count);
        }
        store_columns(dA.data(), first, rows, N, grad_A.data_ptr<float>() + batch * scan.channels * N);
        store_columns(dh.data(), first, rows, N, grad_state.data_ptr<float>() + batch * scan.channels * N);
        std::memcpy(grad_D.data_ptr<float>() + (batch * scan.groups + group) * CHANNELS, &d_skip, sizeof(Group));
        std::memcpy(grad_bias.data_ptr<float>() + (batch * scan.groups + group) * CHANNELS, &d_bias, sizeof(Group));
      }
    }
  });
  auto sum_rows = [&](const Tensor& x) { return x.sum(0).narrow(0, 0, scan.channels); };
  auto sum_slices = [&](const Tensor& x, const Tensor& like) {
    return at::empty_like(like).copy_(x.sum(1).narrow(2, 0, L));
  };
  return {grad_u, grad_step, grad_A.sum(0), sum_slices(grad_B, B), sum_slices(grad_C, C), sum_rows(grad_D),
          grad_gate, sum_rows(grad_bias), grad_state};
}

}  // namespace
