// A single position, when text is generated: a pass over the states as they lie in memory, so that lanes are states.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "inputs.h"

namespace {

// h ← exp(Δ a) h + Δ u b, and Σ c h, for N states of a channel: by WIDTH at a time, the rest by half of that.
template <int WIDTH>
float step_of_channel(int64_t N, float delta, float drive, const float* a, const float* b, const float* c, float* h) {
  using Vector = typename Lanes<WIDTH>::Floats;
  Vector sum{};
  int64_t n = 0;
  for (; n + WIDTH <= N; n += WIDTH) {
    const Vector decay = power_of_two<WIDTH>(LOG2_E * delta * *(const Vector*)(a + n));
    *(Vector*)(h + n) = decay * *(Vector*)(h + n) + drive * *(const Vector*)(b + n);
    sum += *(Vector*)(h + n) * *(const Vector*)(c + n);
  }
  float total = 0;
  for (int i = 0; i < WIDTH; ++i) total += sum[i];
  if constexpr (WIDTH > 1)
    if (n < N) total += step_of_channel<WIDTH / 2>(N - n, delta, drive, a + n, b + n, c + n, h + n);
  return total;
}

// One position: h (batch, D, N) is overwritten, y (batch, D) returned; u, Δ and gate (batch, D), B and C (batch, N).
Tensor step(Tensor state, const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C,
            Optional D, Optional gate, Optional bias, bool softplus_) {
  auto in_float = [](const Tensor& x) { return x.to(at::kFloat).contiguous(); };
  const int64_t channels = state.size(1), N = state.size(2);
  TORCH_CHECK(u.sizes() == state.sizes().slice(0, 2) && A.sizes() == state.sizes().slice(1) && B.size(0) == u.size(0) &&
                  B.size(-1) == N && C.sizes() == B.sizes(),
              "the sizes do not fit: state ", state.sizes(), ", u ", u.sizes(), ", A ", A.sizes(), ", B ", B.sizes(),
              ", C ", C.sizes());
  Tensor u_ = in_float(u), delta = in_float(time_step), A_ = in_float(A), B_ = in_float(B), C_ = in_float(C);
  if (bias) delta = delta + in_float(*bias);
  if (softplus_) delta = at::softplus(delta);
  Tensor y = D ? u_ * in_float(*D) : at::zeros_like(u_);
  const Tensor drive = delta * u_;

  const float *delta_data = delta.data_ptr<float>(), *drive_data = drive.data_ptr<float>(), *A_data = A_.data_ptr<float>(),
              *B_data = B_.data_ptr<float>(), *C_data = C_.data_ptr<float>();
  float *h_data = state.data_ptr<float>(), *y_data = y.data_ptr<float>();

  at::parallel_for(0, u.numel(), 32768 / std::clamp<int64_t>(N, 1, 32768), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      y_data[row] += step_of_channel<LANES>(
          N, delta_data[row], drive_data[row], A_data + row % channels * N, B_data + row / channels * N,
          C_data + row / channels * N, h_data + row * N);
  });
  return (gate ? y * at::silu(in_float(*gate)) : y).to(u.scalar_type());
}

}  // namespace
