// Products of small matrices that lie in the caches. A tile of the result is kept in registers while the depth runs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int TILE_ROWS = 6, TILE_VECTORS = LANES == 16 ? 4 : 2;  // so that 32, or 16, registers suffice

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// The left factor of a product, with strides of any kind.
struct Left {
  const float* data;
  int64_t by_row, by_depth;
};

// The right factor: its rows lie in memory in one piece, padded to whole vectors.
struct Right {
  const float* data;
  int64_t by_depth;
};

// Which part of the depth matters for a row, where the left factor is a triangle.
enum class Part { ALL, UP_TO_ROW, FROM_ROW };

template <int ROWS, int VECTORS, typename Store>
inline void tile_product(int64_t row, int64_t column, int64_t first, int64_t last, Left left, Right right, Store& store) {
  Vector sums[ROWS][VECTORS] = {};
  const float* a = left.data + row * left.by_row + first * left.by_depth;
  const float* b = right.data + first * right.by_depth + column;
  for (int64_t k = first; k < last; ++k, a += left.by_depth, b += right.by_depth) {
    Vector values[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) values[v] = *(const Vector*)(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a[r * left.by_row];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * values[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(row + r, column + v * LANES, sums[r][v]);
}

template <int ROWS, typename Store>
inline void row_of_tiles(int64_t row, int64_t columns, int64_t first, int64_t last, Left left, Right right, Store& store) {
  int64_t column = 0;
  for (; column + TILE_VECTORS * LANES <= columns; column += TILE_VECTORS * LANES)
    tile_product<ROWS, TILE_VECTORS>(row, column, first, last, left, right, store);
  if constexpr (TILE_VECTORS == 4)
    for (; column + 2 * LANES <= columns; column += 2 * LANES)
      tile_product<ROWS, 2>(row, column, first, last, left, right, store);
  for (; column < columns; column += LANES) tile_product<ROWS, 1>(row, column, first, last, left, right, store);
}

// Give `store(row, column, vector)` every vector of left · right. With `lower` only those that touch the lower triangle.
template <typename Store>
inline void product(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, Store store,
                    Part part = Part::ALL, bool lower = false) {
  auto run = [&]<int ROWS>(int64_t row) {
    const int64_t first = part == Part::FROM_ROW ? row : 0;
    const int64_t last = part == Part::UP_TO_ROW ? std::min<int64_t>(depth, row + ROWS) : depth;
    const int64_t touched = lower ? std::min(columns, padded(row + ROWS)) : columns;
    row_of_tiles<ROWS>(row, touched, first, last, left, right, store);
  };
  int64_t row = 0;
  for (; row + TILE_ROWS <= rows; row += TILE_ROWS) run.template operator()<TILE_ROWS>(row);
  for (; row + 2 <= rows; row += 2) run.template operator()<2>(row);
  for (; row < rows; ++row) run.template operator()<1>(row);
}

// out[j][i] = in[i][j], for `rows` rows of whole vectors; out is padded with zeros.
inline void transpose(int64_t rows, int64_t columns, const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) {
      Vector tile[LANES];
      for (int k = 0; k < LANES; ++k) tile[k] = i + k < rows ? *(const Vector*)(in + (i + k) * in_stride + j) : Vector{};
      transpose(tile);
      for (int k = 0; k < LANES; ++k) *(Vector*)(out + (j + k) * out_stride + i) = tile[k];
    }
}

}  // namespace
