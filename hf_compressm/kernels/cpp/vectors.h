// Vectors of floats, a lane for each channel (or, in step.h, each state), and the functions that the scan takes of them.

#pragma once

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

template <int WIDTH>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
  typedef int Integers __attribute__((vector_size(4 * WIDTH), aligned(4)));
};
using Vector = Lanes<LANES>::Floats;
using Integers = Lanes<LANES>::Integers;

inline Vector maximum(Vector x, Vector y) { return x > y ? x : y; }

// 2^f to 1e-7, relative, for -1/2 ≤ f ≤ 1/2.
template <typename V>
inline V power_of_fraction(V f) {
  V p = 0.00132647269f * f + 0.009671512661f;
  p = p * f + 0.05550733744f;
  p = p * f + 0.2402224208f;
  p = p * f + 0.6931469776f;
  return p * f + 1.0f;
}

// 2^x to 1e-7, relative; 0 where x < -126.5, huge where x > 126, and NaN where x is that.
template <int WIDTH>
inline typename Lanes<WIDTH>::Floats power_of_two(typename Lanes<WIDTH>::Floats x) {
  using V = typename Lanes<WIDTH>::Floats;
  using I = typename Lanes<WIDTH>::Integers;
#ifdef __AVX512DQ__
  if constexpr (WIDTH == 16) {  // two instructions take the exponent off and put it back
    const V f = (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 left = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.5f), _CMP_NLT_UQ);  // or NaN
    return (V)_mm512_maskz_scalef_ps(left, (__m512)power_of_fraction(f), (__m512)(x - f));
  }
#endif
  constexpr float BIAS = 127, ROUND = 12582912 + BIAS;  // 1.5 · 2^23: a float of this size is an integer
  x = x < -BIAS ? V{} - BIAS : x;  // NaN stays
  x = x > 126 ? V{} + 126 : x;
  const V shifted = x + ROUND, f = x - (shifted - ROUND);
  // a product, not a sum of exponents, which would make numbers of some NaN
  return power_of_fraction(f) * (V)((I)shifted << 23);
}
inline Vector exp2(Vector x) { return power_of_two<LANES>(x); }

// log(1 + x) for 0 ≤ x ≤ 1, to 3e-8, relative.
inline Vector log1p(Vector x) {
  Vector p = 0.005232687911f * x - 0.02950521332f;
  p = p * x + 0.07822591042f;
  p = p * x - 0.1366324228f;
  p = p * x + 0.1910600511f;
  p = p * x - 0.2484298179f;
  p = p * x + 0.3331909675f;
  p = p * x - 0.4999949314f;
  return (p * x + 0.9999999699f) * x;
}

inline Vector sigmoid(Vector x) { return 1 / (1 + exp2(-LOG2_E * x)); }
inline Vector softplus(Vector x) { return maximum(x, Vector{}) + log1p(exp2(-LOG2_E * maximum(x, -x))); }

// Lanes of two vectors, in exchange: those whose index has the bit `half` clear, and the others.
struct Exchange {
  Integers low, high;
  explicit Exchange(int half) {
    for (int i = 0; i < LANES; ++i) {
      bool second = i & half;
      low[i] = second ? LANES + i - half : i;
      high[i] = second ? LANES + i : i + half;
    }
  }
};

// Entry i: the sum of rows[i].
inline Vector sums(Vector* rows) {
#pragma GCC unroll 8
  for (int half = LANES / 2; half; half /= 2) {
    const Exchange lanes(half);
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      rows[i] = __builtin_shuffle(rows[i], rows[i + half], lanes.low) + __builtin_shuffle(rows[i], rows[i + half], lanes.high);
  }
  return rows[0];
}

// Entry i of rows[j] becomes entry j of rows[i], for LANES rows.
inline void transpose(Vector* rows) {
#pragma GCC unroll 8
  for (int half = LANES / 2; half; half /= 2) {
    const Exchange lanes(half);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & half) continue;
      const Vector first = rows[i], second = rows[i + half];
      rows[i] = __builtin_shuffle(first, second, lanes.low);
      rows[i + half] = __builtin_shuffle(first, second, lanes.high);
    }
  }
}

}  // namespace
