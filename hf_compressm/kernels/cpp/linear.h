// Products of a matrix of weights with a few vectors, as generation takes them: each weight is read once for all.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "inputs.h"

namespace {

constexpr int64_t PRODUCTS_PER_THREAD = 131072;  // at least
constexpr int64_t FEW = 16;                      // vectors; more of them go to torch

// Up to LANES floats; beyond them are zeros.
inline Vector load_lanes(const float* data, int64_t count) {
  if (count >= LANES) return *(const Vector*)data;
  Vector values{};
  std::memcpy(&values, data, count * sizeof(float));
  return values;
}

inline void store_lanes(Vector values, float* data, int64_t count) {
  if (count >= LANES)
    *(Vector*)data = values;
  else
    std::memcpy(data, &values, count * sizeof(float));
}

// data[i] = f(data[i]), by vectors.
template <typename F>
void map(float* data, int64_t size, F f) {
  for (int64_t i = 0; i < size; i += LANES) store_lanes(f(load_lanes(data + i, size - i)), data + i, size - i);
}

// Vectors that lie `stride` apart.
struct Vectors {
  float* data;
  int64_t stride;

  float* operator[](int64_t i) const { return data + i * stride; }
};

// Some rows of `weight` times COUNT vectors: as many rows as there are sums in a vector of LANES.
template <int COUNT>
void few_products(const float* weight, int64_t depth, int64_t rows, const float* bias, Vectors x, Vectors out) {
  constexpr int ROWS = LANES / COUNT;
  const float* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weight + std::min<int64_t>(r, rows - 1) * depth;
  Vector totals[LANES] = {};
  auto add = [&](int64_t k, auto load) {
    Vector inputs[COUNT];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) inputs[i] = load(x[i] + k);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vector weights = load(row[r] + k);
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; ++i) totals[i * ROWS + r] += weights * inputs[i];
    }
  };
  const int64_t whole = depth / LANES * LANES;
  for (int64_t k = 0; k < whole; k += LANES) add(k, [](const float* data) { return *(const Vector*)data; });
  if (whole < depth) add(whole, [&](const float* data) { return load_lanes(data, depth - whole); });
  const Vector values = sums(totals);
  for (int i = 0; i < COUNT; ++i)
    for (int r = 0; r < std::min<int64_t>(ROWS, rows); ++r) out[i][r] = values[i * ROWS + r] + (bias ? bias[r] : 0);
}

template <int COUNT>
void products(const float* weight, int64_t depth, int64_t begin, int64_t end, const float* bias, int64_t count, Vectors x,
              Vectors out) {
  constexpr int ROWS = LANES / COUNT;
  for (int64_t row = begin; row < end; row += ROWS)
    for (int64_t i = 0; i + COUNT <= count; i += COUNT)
      few_products<COUNT>(weight + row * depth, depth, std::min<int64_t>(ROWS, end - row), bias ? bias + row : nullptr,
                          {x[i], x.stride}, {out[i] + row, out.stride});
  if constexpr (COUNT > 1) {
    const int64_t done = count / COUNT * COUNT;
    if (done < count)
      products<COUNT / 2>(weight, depth, begin, end, bias, count - done, {x[done], x.stride}, {out[done], out.stride});
  }
}

// out[i] = weight x[i] + bias; the weights (rows, depth) are contiguous.
void linear(const float* weight, int64_t rows, int64_t depth, const float* bias, int64_t count, Vectors x, Vectors out) {
  if (count > FEW) {
    Tensor result = at::from_blob(out.data, {count, rows}, {out.stride, 1}, at::kFloat);
    at::mm_out(result, at::from_blob(x.data, {count, depth}, {x.stride, 1}, at::kFloat),
               at::from_blob((float*)weight, {rows, depth}, at::kFloat).t());
    if (bias) result.add_(at::from_blob((float*)bias, {rows}, at::kFloat));
    return;
  }
  const int64_t blocks = (rows + LANES - 1) / LANES;
  const int64_t grain = std::max<int64_t>(1, PRODUCTS_PER_THREAD / std::max<int64_t>(1, LANES * depth * count));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    products<8>(weight, depth, begin * LANES, std::min(end * LANES, rows), bias, count, x, out);
  });
}

inline void linear(const Tensor& weight, Optional bias, int64_t count, Vectors x, Vectors out) {
  linear(weight.data_ptr<float>(), weight.size(0), weight.size(1), pointer(bias), count, x, out);
}

}  // namespace
