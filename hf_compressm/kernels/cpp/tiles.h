// The inner loops hold tiles of a tensor, some positions × a group of channels. Tiles are read from tensors of any
// strides and of any floating type, and written back.

#pragma once

#include <ATen/ATen.h>

#include <cstring>

#include "vectors.h"

namespace {

using at::Tensor;

constexpr int BLOCKS = 4;  // what is added up over channels is added up over these first
constexpr int CHANNELS = LANES * BLOCKS;
constexpr int CHUNK = 16;  // operators.py has the same number
static_assert(CHUNK % LANES == 0);

struct alignas(64) Group {
  Vector block[BLOCKS];
};
using Tile = Group[CHUNK];  // positions × channels

// Calls f with the data of a tensor of floating type.
template <typename F>
void with_data(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return f(tensor.data_ptr<at::BFloat16>());
    case at::kHalf: return f(tensor.data_ptr<at::Half>());
    default: return f(tensor.data_ptr<float>());
  }
}

// Sets tile[t][i] = tensor[batch, first_row + i, start + t], zero beyond the rows; the tensor may have any strides.
void load(const Tensor& tensor, int64_t batch, int64_t first_row, int64_t start, int rows, int count, Tile& tile) {
  with_data(tensor, [&](auto* data) {
    data += batch * tensor.stride(0) + first_row * tensor.stride(1) + start * tensor.stride(2);
    const int64_t by_row = tensor.stride(1), by_position = tensor.stride(2);
    if (rows < CHANNELS) std::memset(&tile, 0, sizeof(Tile));
    float* out = (float*)&tile;
    if (by_row == 1)
      for (int t = 0; t < count; ++t)
        for (int i = 0; i < rows; ++i) out[t * CHANNELS + i] = data[t * by_position + i];
    else
      for (int i = 0; i < rows; ++i)
        for (int t = 0; t < count; ++t) out[t * CHANNELS + i] = data[i * by_row + t * by_position];
  });
}

void store(const Tile& tile, const Tensor& tensor, int64_t batch, int64_t first_row, int64_t start, int rows, int count) {
  with_data(tensor, [&](auto* data) {
    data += batch * tensor.stride(0) + first_row * tensor.stride(1) + start * tensor.stride(2);
    const int64_t by_row = tensor.stride(1), by_position = tensor.stride(2);
    const float* in = (const float*)&tile;
    if (by_row == 1)
      for (int t = 0; t < count; ++t)
        for (int i = 0; i < rows; ++i) data[t * by_position + i] = in[t * CHANNELS + i];
    else
      for (int i = 0; i < rows; ++i)
        for (int t = 0; t < count; ++t) data[i * by_row + t * by_position] = in[t * CHANNELS + i];
  });
}

// Sets out[n * CHUNK + t] = tensor[batch, n, start + t].
void load_shared(const Tensor& tensor, int64_t batch, int64_t start, int64_t states, int count, float* out) {
  with_data(tensor, [&](auto* data) {
    data += batch * tensor.stride(0) + start * tensor.stride(2);
    const int64_t by_state = tensor.stride(1), by_position = tensor.stride(2);
    for (int t = 0; t < count; ++t)
      for (int64_t n = 0; n < states; ++n) out[n * CHUNK + t] = data[n * by_state + t * by_position];
  });
}

// Returns group[i] = vector[first + i], zero beyond its end.
Group load_vector(const float* vector, int64_t first, int rows) {
  Group group{};
  if (vector) std::memcpy(&group, vector + first, rows * sizeof(float));
  return group;
}

// Loads columns of a float32 (D, N) matrix for the channels of a group: out[n][i] = scale · matrix[first + i, n].
void load_columns(const float* matrix, int64_t first, int rows, int64_t states, float scale, Group* out) {
  for (int64_t n = 0; n < states; ++n) out[n] = Group{};
  for (int i = 0; i < rows; ++i)
    for (int64_t n = 0; n < states; ++n) ((float*)&out[n])[i] = scale * matrix[(first + i) * states + n];
}

void store_columns(const Group* in, int64_t first, int rows, int64_t states, float* matrix) {
  for (int i = 0; i < rows; ++i)
    for (int64_t n = 0; n < states; ++n) matrix[(first + i) * states + n] = ((const float*)&in[n])[i];
}

}  // namespace
