// The selective scan on a CPU, forward and backward; see torch_scan.py for the recurrence.
//
// A group of CHANNELS channels, CHUNK positions and one state at a time: everything that is touched in the inner loops
// lies in the first-level cache, lanes are channels, and a state costs the same whatever N is. The forward pass keeps
// the states at the start of each chunk; the backward pass computes the ones in between again. A single position, when
// text is generated, is a pass over the states as they lie in memory: there lanes are states.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCKS = 4;  // what is added up over channels is added up over these first
constexpr int CHANNELS = LANES * BLOCKS;
constexpr int CHUNK = 16;  // as in operators.py
constexpr int ITEMS = 32;  // of work at least, where there are as many channels; never depends on the number of threads
static_assert(CHUNK % LANES == 0);
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

template <int WIDTH>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
  typedef int Integers __attribute__((vector_size(4 * WIDTH), aligned(4)));
};
using Vector = Lanes<LANES>::Floats;
using Integers = Lanes<LANES>::Integers;
struct alignas(64) Group {
  Vector block[BLOCKS];
};
using Tile = Group[CHUNK];  // positions × channels

inline Vector maximum(Vector x, Vector y) { return x > y ? x : y; }

// 2^x to 1e-7, relative.
template <int WIDTH>
inline typename Lanes<WIDTH>::Floats power_of_two(typename Lanes<WIDTH>::Floats x) {
  using V = typename Lanes<WIDTH>::Floats;
  using I = typename Lanes<WIDTH>::Integers;
  constexpr float ROUND = 12582912;  // 1.5 · 2^23: a float of this size is an integer
  x = x < -126 ? V{} - 126 : x;  // NaN stays
  x = x > 126 ? V{} + 126 : x;
  V shifted = x + ROUND, f = x - (shifted - ROUND);
  V p = 0.00132647269f * f + 0.009671512661f;
  p = p * f + 0.05550733744f;
  p = p * f + 0.2402224208f;
  p = p * f + 0.6931469776f;
  p = p * f + 1.0f;
  return (V)((I)p + ((I)shifted << 23));
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

// Entry i: the sum of rows[i].
inline Vector sums(Vector* rows) {
  for (int half = LANES / 2; half; half /= 2) {
    Integers low, high;
    for (int i = 0; i < LANES; ++i) {
      bool second = i & half;
      low[i] = second ? LANES + i - half : i;
      high[i] = second ? LANES + i : i + half;
    }
    for (int i = 0; i < half; ++i)
      rows[i] = __builtin_shuffle(rows[i], rows[i + half], low) + __builtin_shuffle(rows[i], rows[i + half], high);
  }
  return rows[0];
}

// f with the data of a tensor of floating type.
template <typename F>
void with_data(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return f(tensor.data_ptr<at::BFloat16>());
    case at::kHalf: return f(tensor.data_ptr<at::Half>());
    default: return f(tensor.data_ptr<float>());
  }
}

// tile[t][i] = tensor[batch, first_row + i, start + t], zero beyond the rows; a tensor of any strides.
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

// out[n * CHUNK + t] = tensor[batch, n, start + t]
void load_shared(const Tensor& tensor, int64_t batch, int64_t start, int64_t states, int count, float* out) {
  with_data(tensor, [&](auto* data) {
    data += batch * tensor.stride(0) + start * tensor.stride(2);
    const int64_t by_state = tensor.stride(1), by_position = tensor.stride(2);
    for (int t = 0; t < count; ++t)
      for (int64_t n = 0; n < states; ++n) out[n * CHUNK + t] = data[n * by_state + t * by_position];
  });
}

// group[i] = vector[first + i], zero beyond its end.
Group load_vector(const float* vector, int64_t first, int rows) {
  Group group{};
  if (vector) std::memcpy(&group, vector + first, rows * sizeof(float));
  return group;
}

// Columns of a float32 (D, N) matrix for the channels of a group: out[n][i] = scale · matrix[first + i, n].
void load_columns(const float* matrix, int64_t first, int rows, int64_t states, float scale, Group* out) {
  for (int64_t n = 0; n < states; ++n) out[n] = Group{};
  for (int i = 0; i < rows; ++i)
    for (int64_t n = 0; n < states; ++n) ((float*)&out[n])[i] = scale * matrix[(first + i) * states + n];
}

void store_columns(const Group* in, int64_t first, int rows, int64_t states, float* matrix) {
  for (int i = 0; i < rows; ++i)
    for (int64_t n = 0; n < states; ++n) matrix[(first + i) * states + n] = ((const float*)&in[n])[i];
}

const float* pointer(Optional tensor) { return tensor ? tensor->data_ptr<float>() : nullptr; }

// What both passes are given.
struct Scan {
  const Tensor &u, &time_step, &B, &C;
  const float *A, *D, *bias;
  Optional gate;
  bool softplus_;
  int64_t batches, channels, length, states, groups;

  Scan(const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
       Optional gate, Optional bias, bool softplus_)
      : u(u), time_step(time_step), B(B), C(C), A(A.data_ptr<float>()), D(pointer(D)), bias(pointer(bias)), gate(gate),
        softplus_(softplus_), batches(u.size(0)), channels(u.size(1)), length(u.size(2)), states(A.size(1)),
        groups((channels + CHANNELS - 1) / CHANNELS) {}

  int rows(int64_t group) const { return std::min<int64_t>(CHANNELS, channels - group * CHANNELS); }
  int count(int64_t start) const { return std::min<int64_t>(CHUNK, length - start); }
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }

  // Row n of the states (batch, chunks, N, D) that are kept at the start of a chunk.
  float* kept(const Tensor& tensor, int64_t batch, int64_t start, int64_t n) const {
    return tensor.data_ptr<float>() + ((batch * chunks() + start / CHUNK) * states + n) * channels;
  }

  // Effective Δ; raw: before the softplus.
  void load_step(int64_t batch, int64_t group, int64_t start, Tile& raw, Tile& step) const {
    const int rows = this->rows(group), count = this->count(start);
    load(time_step, batch, group * CHANNELS, start, rows, count, raw);
    const Group offset = load_vector(bias, group * CHANNELS, rows);
    for (int t = 0; t < count; ++t)
      for (int k = 0; k < BLOCKS; ++k) {
        raw[t].block[k] += offset.block[k];
        step[t].block[k] = softplus_ ? softplus(raw[t].block[k]) : raw[t].block[k];
      }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_forward(
    const Tensor& u, const Tensor& time_step, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
    Optional gate, Optional bias, bool softplus_, Optional initial_state, bool keep) {
  const Scan scan(u, time_step, A, B, C, D, gate, bias, softplus_);
  const int64_t N = scan.states, L = scan.length;
  Tensor y = at::empty({scan.batches, L, scan.channels}, u.options()).transpose(1, 2);
  Tensor last_state = at::empty({scan.batches, scan.channels, N}, A.options());
  Tensor ungated = at::empty({0}, A.options()), kept = at::empty({0}, A.options());
  if (keep) kept = at::empty({scan.batches, scan.chunks(), N, scan.channels}, A.options());
  if (keep && gate) ungated = at::empty({scan.batches, L, scan.channels}, A.options()).transpose(1, 2);

  at::parallel_for(0, scan.batches * scan.groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<Group> rates(N), h(N);
    std::vector<float> B_(N * CHUNK), C_(N * CHUNK);
    alignas(64) Tile u_, raw, step, drive, out;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / scan.groups, group = item % scan.groups, first = group * CHANNELS;
      const int rows = scan.rows(group);
      load_columns(scan.A, first, rows, N, LOG2_E, rates.data());
      if (initial_state)
        load_columns(initial_state->data_ptr<float>() + batch * scan.channels * N, first, rows, N, 1, h.data());
      else
        std::fill(h.begin(), h.end(), Group{});
      const Group skip = load_vector(scan.D, first, rows);

      for (int64_t start = 0; start < L; start += CHUNK) {
        const int count = scan.count(start);
        for (int64_t n = 0; keep && n < N; ++n) std::memcpy(scan.kept(kept, batch, start, n) + first, &h[n], 4 * rows);
        load(u, batch, first, start, rows, count, u_);
        scan.load_step(batch, group, start, raw, step);
        load_shared(B, batch, start, N, count, B_.data());
        load_shared(C, batch, start, N, count, C_.data());
        for (int t = 0; t < count; ++t)
          for (int k = 0; k < BLOCKS; ++k) {
            drive[t].block[k] = step[t].block[k] * u_[t].block[k];
            out[t].block[k] = skip.block[k] * u_[t].block[k];
          }
        for (int64_t n = 0; n < N; ++n) {
          const Group rate = rates[n];
          const float *b = &B_[n * CHUNK], *c = &C_[n * CHUNK];
          Group state = h[n];
          for (int t = 0; t < count; ++t)
            for (int k = 0; k < BLOCKS; ++k) {
              state.block[k] = exp2(rate.block[k] * step[t].block[k]) * state.block[k] + drive[t].block[k] * b[t];
              out[t].block[k] += state.block[k] * c[t];
            }
          h[n] = state;
        }
        if (gate) {
          if (keep) store(out, ungated, batch, first, start, rows, count);
          load(*gate, batch, first, start, rows, count, raw);
          for (int t = 0; t < count; ++t)
            for (int k = 0; k < BLOCKS; ++k) out[t].block[k] *= raw[t].block[k] * sigmoid(raw[t].block[k]);
        }
        store(out, y, batch, first, start, rows, count);
      }
      store_columns(h.data(), first, rows, N, last_state.data_ptr<float>() + batch * scan.channels * N);
    }
  });
  return {y, last_state, ungated, kept};
}

// Gradients for u, Δ, A, B, C, D, the gate, the bias and the initial state.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients scan_backward(
    const Tensor& grad_y, const Tensor& grad_last_state, const Tensor& u, const Tensor& time_step, const Tensor& A,
    const Tensor& B, const Tensor& C, Optional D, Optional gate, Optional bias, bool softplus_, const Tensor& ungated, const Tensor& kept) {
  const Scan scan(u, time_step, A, B, C, D, gate, bias, softplus_);
  const int64_t N = scan.states, L = scan.length, padded = scan.chunks() * CHUNK;
  const int64_t slices = std::min(scan.groups, std::max<int64_t>(1, ITEMS / scan.batches));
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
  Tensor u_ = in_float(u), delta = in_float(time_step), A_ = in_float(A), B_ = in_float(B), C_ = in_float(C);
  if (bias) delta = delta + in_float(*bias);
  if (softplus_) delta = at::softplus(delta);
  Tensor y = D ? u_ * in_float(*D) : at::zeros_like(u_);
  const Tensor drive = delta * u_;

  const float *delta_data = delta.data_ptr<float>(), *drive_data = drive.data_ptr<float>(), *A_data = A_.data_ptr<float>(),
              *B_data = B_.data_ptr<float>(), *C_data = C_.data_ptr<float>();
  float *h_data = state.data_ptr<float>(), *y_data = y.data_ptr<float>();

  at::parallel_for(0, u.numel(), std::max<int64_t>(1, 32768 / N), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      y_data[row] += step_of_channel<LANES>(
          N, delta_data[row], drive_data[row], A_data + row % channels * N, B_data + row / channels * N,
          C_data + row / channels * N, h_data + row * N);
  });
  return (gate ? y * at::silu(in_float(*gate)) : y).to(u.scalar_type());
}

}  // namespace

TORCH_LIBRARY(hf_compressm_kernel, library) {
  library.def("forward", &scan_forward);
  library.def("backward", &scan_backward);
  library.def(
      "step(Tensor(a!) state, Tensor u, Tensor time_step, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, "
      "Tensor? bias, bool softplus) -> Tensor");
}

TORCH_LIBRARY_IMPL(hf_compressm_kernel, CPU, library) { library.impl("step", &step); }
