// A position of a whole mixer, when text is generated: what lies between its input and its output is one operator, and
// the states in the cache are overwritten. With the norm before a mixer it is a whole layer, residual stream included.
// All tensors are float32 and contiguous.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "inputs.h"
#include "linear.h"
#include "step.h"

namespace {

inline Vector silu(Vector x) { return x * sigmoid(x); }

// Memory for what a step makes on its way, handed out piece by piece.
class Scratch {
  Tensor memory;
  float* next;

 public:
  explicit Scratch(int64_t size) : memory(at::empty({size}, at::kFloat)), next(memory.data_ptr<float>()) {}
  Vectors vectors(int64_t count, int64_t size) {
    Vectors result{next, size};
    next += count * size;
    return result;
  }
};

// state (batch, D, K) ← its last K - 1 positions and x; out = Σ weight state + bias, or silu of that.
void convolution_step(const Tensor& weight, Optional bias, bool silu_, const Tensor& state, Vectors x, Vectors out) {
  const int64_t channels = state.size(1), K = state.size(2);
  const float *weights = weight.data_ptr<float>(), *offsets = pointer(bias);
  for (int64_t batch = 0; batch < state.size(0); ++batch) {
    float* past = state.data_ptr<float>() + batch * channels * K;
    for (int64_t d = 0; d < channels; ++d, past += K) {
      float sum = offsets ? offsets[d] : 0;
      for (int64_t k = 0; k + 1 < K; ++k) sum += weights[d * K + k] * (past[k] = past[k + 1]);
      out[batch][d] = sum + weights[d * K + K - 1] * (past[K - 1] = x[batch][d]);
    }
    if (silu_) map(out[batch], channels, silu);
  }
}

// The same for x (batch, D) alone.
Tensor causal_convolution_step(Tensor state, const Tensor& x, const Tensor& weight, Optional bias, bool silu) {
  TORCH_CHECK(x.sizes() == state.sizes().slice(0, 2) && weight.sizes() == state.sizes().slice(1) &&
                  (!bias || bias->numel() == x.size(1)),
              "the sizes do not fit: state ", state.sizes(), ", x ", x.sizes(), ", weight ", weight.sizes());
  Tensor out = at::empty(x.sizes(), x.options());
  convolution_step(weight, bias, silu, state, {x.data_ptr<float>(), x.size(1)}, {out.data_ptr<float>(), x.size(1)});
  return out;
}

// y ← weight · y / √(mean y² + ε), by groups.
void rms_norm(float* y, const float* weight, int64_t size, int64_t group, float epsilon) {
  for (int64_t first = 0; first < size; first += group) {
    Vector squares{};
    for (int64_t i = first; i < first + group; i += LANES) {
      const Vector value = load_lanes(y + i, first + group - i);
      squares += value * value;
    }
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += squares[i];
    const float scale = 1 / std::sqrt(total / group + epsilon);
    for (int64_t i = first; i < first + group; ++i) y[i] *= scale * weight[i];
  }
}

// y ← y · silu(gate)
void open_gate(float* y, const float* gate, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES)
    store_lanes(load_lanes(y + i, size - i) * silu(load_lanes(gate + i, size - i)), y + i, size - i);
}

constexpr auto MISFIT = "the sizes of the layer do not fit together, or not to its input";

// Whether what both mixers have fits together: `projected` rows of the first layer, and what its last one reads.
void check_sizes(const Tensor& hidden, const Tensor& conv_state, const Tensor& state, Optional norm, const Tensor& in_weight,
                 int64_t projected, const Tensor& conv_weight, int64_t convolved, const Tensor& out_weight, int64_t inner) {
  const int64_t batches = state.size(0), size = hidden.size(2);
  TORCH_CHECK(hidden.size(0) == batches && hidden.size(1) == 1 && in_weight.size(0) == projected &&
                  in_weight.size(1) == size && out_weight.size(0) == size && out_weight.size(1) == inner &&
                  conv_state.size(0) == batches && conv_state.size(1) == convolved &&
                  conv_weight.numel() == convolved * conv_state.size(2) && (!norm || norm->numel() == size),
              MISFIT);
}

// What a mixer reads: hidden (batch, 1, H), or, with the weight of a norm, a copy of it that is normalised.
Vectors mixer_input(const Tensor& hidden, Optional norm, float epsilon, Scratch& scratch) {
  const int64_t batches = hidden.size(0), size = hidden.size(2);
  if (!norm) return {hidden.data_ptr<float>(), size};
  const Vectors input = scratch.vectors(batches, size);
  std::copy_n(hidden.data_ptr<float>(), batches * size, input.data);
  for (int64_t batch = 0; batch < batches; ++batch) rms_norm(input[batch], norm->data_ptr<float>(), size, size, epsilon);
  return input;
}

// What a mixer gives back, its last layer's output; with a norm it is added to the residual stream.
Tensor mixer_output(const Tensor& hidden, Optional norm, const Tensor& weight, Optional bias, Vectors y) {
  Tensor out = at::empty(hidden.sizes(), hidden.options());
  linear(weight, bias, hidden.size(0), y, {out.data_ptr<float>(), out.size(2)});
  return norm ? out.add_(hidden) : out;
}

// A step of a mixer of Mamba-1: hidden (batch, 1, H), the states (batch, D, K) and (batch, D, N).
Tensor selective_mixer_step(const Tensor& hidden, Tensor conv_state, Tensor state, Optional norm, double epsilon,
                            const Tensor& in_weight, Optional in_bias, const Tensor& conv_weight, Optional conv_bias,
                            const Tensor& x_weight, const Tensor& step_weight, Optional step_bias, const Tensor& A_log,
                            const Tensor& D, const Tensor& out_weight, Optional out_bias) {
  const int64_t batches = state.size(0), channels = state.size(1), N = state.size(2), rank = step_weight.size(1);
  check_sizes(hidden, conv_state, state, norm, in_weight, 2 * channels, conv_weight, channels, out_weight, channels);
  TORCH_CHECK(x_weight.size(0) == rank + 2 * N && x_weight.size(1) == channels && step_weight.size(0) == channels &&
                  A_log.sizes() == state.sizes().slice(1) && D.numel() == channels,
              MISFIT);
  Scratch scratch(batches * (hidden.size(2) + 5 * channels + rank + 2 * N));
  const Vectors projected = scratch.vectors(batches, 2 * channels), x = scratch.vectors(batches, channels),
                selected = scratch.vectors(batches, rank + 2 * N), step = scratch.vectors(batches, channels),
                y = scratch.vectors(batches, channels);
  linear(in_weight, in_bias, batches, mixer_input(hidden, norm, epsilon, scratch), projected);
  convolution_step(conv_weight, conv_bias, true, conv_state, projected, x);
  linear(x_weight, std::nullopt, batches, x, selected);
  linear(step_weight, step_bias, batches, selected, step);
  map(step.data, batches * channels, softplus);

  const float *logs = A_log.data_ptr<float>(), *skip = D.data_ptr<float>();
  float* states = state.data_ptr<float>();
  const int64_t rows = std::max<int64_t>(1, STATES_PER_THREAD / std::max<int64_t>(1, N * batches));
  at::parallel_for(0, channels, rows, [&](int64_t begin, int64_t end) {
    std::vector<float> rate(N);  // A / log 2
    for (int64_t d = begin; d < end; ++d) {
      std::copy(logs + d * N, logs + (d + 1) * N, rate.begin());
      map(rate.data(), N, [](Vector log) { return -LOG2_E * exp2(LOG2_E * log); });
      for (int64_t batch = 0; batch < batches; ++batch) {
        const float delta = step[batch][d], input = x[batch][d], *B = selected[batch] + rank;
        auto decay = [&]<int WIDTH>(int64_t n) {
          return power_of_two<WIDTH>(delta * *(const typename Lanes<WIDTH>::Floats*)(rate.data() + n));
        };
        float* h = states + (batch * channels + d) * N;
        y[batch][d] = skip[d] * input + step_of_states<LANES>(N, decay, delta * input, B, B + N, h);
      }
    }
  });
  for (int64_t batch = 0; batch < batches; ++batch) open_gate(y[batch], projected[batch] + channels, channels);
  return mixer_output(hidden, norm, out_weight, out_bias, y);
}

// A step of a mixer of Mamba-2: hidden (batch, 1, H), the states (batch, channels, K) and (batch, heads, p, N). With
// projections (G, r, N) of B and C the state is (batch, heads, p, r).
Tensor scalar_decay_mixer_step(const Tensor& hidden, Tensor conv_state, Tensor state, Optional norm, double epsilon,
                               const Tensor& in_weight, Optional in_bias, const Tensor& conv_weight, Optional conv_bias,
                               const Tensor& step_bias, const Tensor& A_log, const Tensor& D, int64_t groups,
                               Optional B_projection, Optional C_projection, const Tensor& gated_norm,
                               double gated_epsilon, int64_t gated_channels, const Tensor& out_weight, Optional out_bias) {
  const int64_t batches = state.size(0), heads = state.size(1), p = state.size(2), N = state.size(3), inner = heads * p,
                convolved = conv_state.size(1), features = (convolved - inner) / 2 / groups;
  check_sizes(hidden, conv_state, state, norm, in_weight, inner + convolved + heads, conv_weight, convolved, out_weight, inner);
  TORCH_CHECK(heads % groups == 0 && step_bias.numel() == heads && A_log.numel() == heads && D.numel() == heads &&
                  gated_norm.numel() == inner && inner % gated_channels == 0,
              MISFIT);
  for (Optional map : {B_projection, C_projection})
    TORCH_CHECK(map ? map->size(0) == groups && map->size(1) == N && map->size(2) == features : features == N, MISFIT);
  Scratch scratch(batches * (hidden.size(2) + 3 * inner + 2 * convolved + heads + 2 * groups * N));
  const Vectors projected = scratch.vectors(batches, inner + convolved + heads), x = scratch.vectors(batches, convolved),
                y = scratch.vectors(batches, inner), reduced = scratch.vectors(batches, 2 * groups * N);
  linear(in_weight, in_bias, batches, mixer_input(hidden, norm, epsilon, scratch), projected);
  convolution_step(conv_weight, conv_bias, true, conv_state, {projected.data + inner, projected.stride}, x);
  Vectors B{x.data + inner, x.stride}, C{x.data + inner + groups * features, x.stride};
  if (B_projection) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t of_group = g * N * features;
      linear(B_projection->data_ptr<float>() + of_group, N, features, nullptr, batches, {B.data + g * features, B.stride},
             {reduced.data + g * N, reduced.stride});
      linear(C_projection->data_ptr<float>() + of_group, N, features, nullptr, batches, {C.data + g * features, C.stride},
             {reduced.data + (groups + g) * N, reduced.stride});
    }
    B = reduced, C = {reduced.data + groups * N, reduced.stride};
  }

  const float *offsets = step_bias.data_ptr<float>(), *logs = A_log.data_ptr<float>(), *skip = D.data_ptr<float>();
  float* states = state.data_ptr<float>();
  for (int64_t batch = 0; batch < batches; ++batch) {
    float* step = projected[batch] + inner + convolved;
    for (int64_t head = 0; head < heads; ++head) step[head] += offsets[head];
    map(step, heads, softplus);
  }
  const int64_t rows = std::max<int64_t>(1, STATES_PER_THREAD / std::max<int64_t>(1, N * p));
  at::parallel_for(0, batches * heads, rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / heads, head = i % heads, group = head / (heads / groups);
      const float delta = projected[batch][inner + convolved + head], left = std::exp(-delta * std::exp(logs[head]));
      auto decay = [=]<int WIDTH>(int64_t) { return left; };
      for (int64_t row = head * p; row < (head + 1) * p; ++row) {
        const float input = x[batch][row];
        y[batch][row] = skip[head] * input + step_of_states<LANES>(N, decay, delta * input, B[batch] + group * N,
                                                                   C[batch] + group * N, states + (batch * inner + row) * N);
      }
    }
  });
  for (int64_t batch = 0; batch < batches; ++batch) {
    open_gate(y[batch], projected[batch], inner);
    rms_norm(y[batch], gated_norm.data_ptr<float>(), inner, gated_channels, gated_epsilon);
  }
  return mixer_output(hidden, norm, out_weight, out_bias, y);
}

}  // namespace
