// The causal convolution before a scan: every channel by itself, over the last K positions, with silu or without.
//
// Tensors are (batch, L, D) with channels side by side. A tile of positions goes through a strip of channels at a time,
// row by row: the last K rows of what is needed lie in the first-level cache, as floats. What the tiles give for the
// weights is added up afterwards, in one order, whatever the number of threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "inputs.h"

namespace {

constexpr int64_t POSITIONS = 128;  // of a tile
constexpr int STRIP = 256;          // channels
constexpr int STRIP_VECTORS = STRIP / LANES;

struct alignas(64) Row {
  Vector vector[STRIP_VECTORS];

  template <typename T>
  void load(const T* data, int count) {
    float* values = (float*)vector;
    if constexpr (std::is_same_v<T, float>)
      std::memcpy(values, data, count * sizeof(float));
    else
      for (int i = 0; i < count; ++i) values[i] = data[i];
  }

  template <typename T>
  void store(T* data, int count) const {
    const float* values = (const float*)vector;
    if constexpr (std::is_same_v<T, float>)
      std::memcpy(data, values, count * sizeof(float));
    else
      for (int i = 0; i < count; ++i) data[i] = values[i];
  }
};

// The last K rows, the newest behind.
template <int K>
struct Window {
  Row rows[K] = {};
  Row* order[K];

  Window() {
    for (int k = 0; k < K; ++k) order[k] = &rows[k];
  }
  Row& push_back() { return std::rotate(order, order + 1, order + K), *order[K - 1]; }
};

// The weights (D, K) and the bias of a strip, newest position last.
template <int K>
struct Taps {
  Row weight[K] = {}, bias = {};

  Taps(const Tensor& weights, Optional bias_, int64_t first, int count) {
    if (bias_) bias.load(bias_->data_ptr<float>() + first, count);
    const float* data = weights.data_ptr<float>() + first * K;
    for (int k = 0; k < K; ++k)
      for (int i = 0; i < count; ++i) ((float*)&weight[k])[i] = data[i * K + k];
  }

  Vector operator()(const Window<K>& window, int v) const {
    Vector sum = bias.vector[v];
    for (int k = 0; k < K; ++k) sum += weight[k].vector[v] * window.order[k]->vector[v];
    return sum;
  }
};

// A strip of a tile: the positions from `start` to `stop` of some channels of a sequence.
struct Strip {
  int64_t batch, start, stop, first;
  int count;

  int vectors() const { return (count + LANES - 1) / LANES; }

  template <typename T>
  T* row(const Tensor& tensor, int64_t t) const {
    return tensor.data_ptr<T>() + batch * tensor.stride(0) + t * tensor.stride(1) + first;
  }
};

// f(strip, tile) for all of them; tiles run in parallel.
template <typename F>
void for_strips(const Tensor& x, F f) {
  const int64_t length = x.size(1), channels = x.size(2), tiles = (length + POSITIONS - 1) / POSITIONS;
  at::parallel_for(0, x.size(0) * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t first = 0; first < channels; first += STRIP) {
        const int64_t start = tile % tiles * POSITIONS;
        f(Strip{tile / tiles, start, std::min(start + POSITIONS, length), first,
                (int)std::min<int64_t>(STRIP, channels - first)},
          tile);
      }
  });
}

template <int K, typename T>
void convolve(const Tensor& x, const Tensor& weight, Optional bias, bool silu, Tensor& y) {
  for_strips(x, [&](const Strip& strip, int64_t) {
    const Taps<K> taps(weight, bias, strip.first, strip.count);
    Window<K> inputs;
    Row out;
    for (int64_t t = std::max<int64_t>(strip.start - K + 1, 0); t < strip.stop; ++t) {
      inputs.push_back().load(strip.row<T>(x, t), strip.count);
      if (t < strip.start) continue;
      for (int v = 0; v < strip.vectors(); ++v) {
        const Vector sum = taps(inputs, v);
        out.vector[v] = silu ? sum * sigmoid(sum) : sum;
      }
      out.store(strip.row<T>(y, t), strip.count);
    }
  });
}

// An input has a part in its own output and in the K - 1 after it: its gradient is there K - 1 positions later.
template <int K, typename T>
void convolve_back(const Tensor& grad_y, const Tensor& x, const Tensor& weight, Optional bias, bool silu, Tensor& of_x,
                   Tensor& of_taps) {
  for_strips(x, [&](const Strip& strip, int64_t tile) {
    const Taps<K> taps(weight, bias, strip.first, strip.count);
    Window<K> inputs, of_sums;  // of_sums: the gradients before silu
    Row totals[K + 1] = {}, out;
    for (int64_t t = std::max<int64_t>(strip.start - K + 1, 0); t < strip.start; ++t)
      inputs.push_back().load(strip.row<T>(x, t), strip.count);
    for (int64_t t = strip.start; t < strip.stop + K - 1; ++t) {
      Row& of_sum = of_sums.push_back();
      if (t < x.size(1)) {
        inputs.push_back().load(strip.row<T>(x, t), strip.count);
        of_sum.load(strip.row<T>(grad_y, t), strip.count);
      } else
        of_sum = Row{};
      for (int v = 0; v < strip.vectors(); ++v) {
        if (silu) {
          const Vector sum = taps(inputs, v), open = sigmoid(sum);
          of_sum.vector[v] *= open * (1 + sum * (1 - open));
        }
        if (t < strip.stop) {
          for (int k = 0; k < K; ++k) totals[k].vector[v] += of_sum.vector[v] * inputs.order[k]->vector[v];
          totals[K].vector[v] += of_sum.vector[v];
        }
        out.vector[v] = Vector{};
        for (int k = 0; k < K; ++k) out.vector[v] += taps.weight[K - 1 - k].vector[v] * of_sums.order[k]->vector[v];
      }
      const int64_t position = t - K + 1;
      if (position >= strip.start) out.store(strip.row<T>(of_x, position), strip.count);
    }
    float* data = of_taps.data_ptr<float>() + tile * (K + 1) * x.size(2) + strip.first;
    for (int k = 0; k <= K; ++k) totals[k].store(data + k * x.size(2), strip.count);
  });
}

// f(integral constant K) for a width that there is.
template <typename F>
void with_width(int64_t width, F f) {
  switch (width) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: TORCH_CHECK(false, "the convolution is ", width, " positions wide; allowed: 2, 3, 4");
  }
}

inline Tensor with_channels_together(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

Tensor convolution_forward(const Tensor& x_, const Tensor& weight, Optional bias, bool silu) {
  TORCH_CHECK(weight.size(0) == x_.size(2) && (!bias || bias->numel() == x_.size(2)), "the sizes do not fit: x ",
              x_.sizes(), ", weight ", weight.sizes());
  const Tensor x = with_channels_together(x_);
  Tensor y = at::empty(x.sizes(), x.options());
  with_width(weight.size(1), [&](auto width) {
    with_data(x, [&]<typename T>(T*) { convolve<decltype(width)::value, T>(x, weight, bias, silu, y); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_y, const Tensor& x_, const Tensor& weight,
                                                        Optional bias, bool silu) {
  const Tensor x = with_channels_together(x_), grad = with_channels_together(grad_y.to(x_.scalar_type()));
  Tensor of_x = at::empty(x.sizes(), x.options());
  const int64_t tiles = x.size(0) * ((x.size(1) + POSITIONS - 1) / POSITIONS), width = weight.size(1);
  Tensor of_taps = at::empty({tiles, width + 1, x.size(2)}, weight.options());
  with_width(width, [&](auto width) {
    with_data(x, [&]<typename T>(T*) {
      convolve_back<decltype(width)::value, T>(grad, x, weight, bias, silu, of_x, of_taps);
    });
  });
  of_taps = of_taps.sum(0).t();
  return {of_x, of_taps.slice(1, 0, width).contiguous(), of_taps.select(1, width).contiguous()};
}

}  // namespace
