// A single position, when text is generated: a pass over the states as they lie in memory, so that lanes are states.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "inputs.h"

namespace {

// h ← decay(n) h + drive b, and Σ c h, for N states: by WIDTH at a time, the rest by half of that.
template <int WIDTH, typename Decay>
float step_of_states(int64_t N, Decay decay, float drive, const float* b, const float* c, float* h, int64_t n = 0) {
  using Vector = typename Lanes<WIDTH>::Floats;
  Vector sum{};
  for (; n + WIDTH <= N; n += WIDTH) {
    *(Vector*)(h + n) = decay.template operator()<WIDTH>(n) * *(Vector*)(h + n) + drive * *(const Vector*)(b + n);
    sum += *(Vector*)(h + n) * *(const Vector*)(c + n);
  }
  float total = 0;
  for (int i = 0; i < WIDTH; ++i) total += sum[i];
  if constexpr (WIDTH > 1)
    if (n < N) total += step_of_states<WIDTH / 2>(N, decay, drive, b, c, h, n);
  return total;
}

constexpr int64_t STATES_PER_THREAD = 32768;  // at least
inline Tensor in_float(const Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

// One position: h (batch, D, N) is overwritten, y (batch, D) returned; u, Δ and gate (batch, D), B and C (batch, N).
Tensor step(Tensor state, const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C,
            Optional D, Optional gate, Optional bias, bool softplus_) {
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

  const int64_t rows = STATES_PER_THREAD / std::clamp<int64_t>(N, 1, STATES_PER_THREAD);
  at::parallel_for(0, u.numel(), rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* a = A_data + row % channels * N;
      const float exponent = LOG2_E * delta_data[row];
      auto decay = [=]<int WIDTH>(int64_t n) {
        return power_of_two<WIDTH>(exponent * *(const typename Lanes<WIDTH>::Floats*)(a + n));
      };
      y_data[row] += step_of_states<LANES>(
          N, decay, drive_data[row], B_data + row / channels * N, C_data + row / channels * N, h_data + row * N);
    }
  });
  return (gate ? y * at::silu(in_float(*gate)) : y).to(u.scalar_type());
}

// The same with scalar decay: h (batch, heads, p, N), u and the result (batch, heads, p), Δ (batch, heads), A, D and
// bias (heads), B and C (batch, G, N).
Tensor scalar_decay_step(Tensor state, const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B,
                         const Tensor& C, Optional D, Optional bias, bool softplus_) {
  const int64_t batches = state.size(0), heads = state.size(1), p = state.size(2), N = state.size(3), groups = B.size(1);
  TORCH_CHECK(u.sizes() == state.sizes().slice(0, 3) && time_step.sizes() == state.sizes().slice(0, 2) &&
                  A.numel() == heads && heads % std::max<int64_t>(groups, 1) == 0 && B.size(0) == batches &&
                  B.size(-1) == N && C.sizes() == B.sizes(),
              "the sizes do not fit: state ", state.sizes(), ", x ", u.sizes(), ", time step ", time_step.sizes(), ", A ",
              A.sizes(), ", B ", B.sizes(), ", C ", C.sizes());
  Tensor u_ = in_float(u), delta = in_float(time_step), A_ = in_float(A), B_ = in_float(B), C_ = in_float(C);
  if (bias) delta = delta + in_float(*bias);
  if (softplus_) delta = at::softplus(delta);
  Tensor y = D ? u_ * in_float(*D).unsqueeze(-1) : at::zeros_like(u_);
  const Tensor decays = at::exp(delta * A_);

  const float *delta_data = delta.data_ptr<float>(), *decay_data = decays.data_ptr<float>(), *u_data = u_.data_ptr<float>(),
              *B_data = B_.data_ptr<float>(), *C_data = C_.data_ptr<float>();
  float *h_data = state.data_ptr<float>(), *y_data = y.data_ptr<float>();

  const int64_t rows = STATES_PER_THREAD / std::clamp<int64_t>(N, 1, STATES_PER_THREAD);
  at::parallel_for(0, u.numel(), rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t head = row / p, group = head / heads * groups + head % heads / (heads / groups);
      const float value = decay_data[head];
      auto decay = [=]<int WIDTH>(int64_t) { return value; };
      y_data[row] += step_of_states<LANES>(
          N, decay, delta_data[head] * u_data[row], B_data + group * N, C_data + group * N, h_data + row * N);
    }
  });
  return y.to(u.scalar_type());
}

}  // namespace
