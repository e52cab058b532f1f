// The gradients of a linear layer's weight and bias: products that are summed over tokens.
#pragma once

#include "window.h"

namespace nat_dense {
namespace {

// Both operands have channels in the lanes as they come: a token adds the product of its gradient and its input to a
// matrix, V::kKeyRows outputs times V::kVectors vectors of inputs of it in registers. Tokens are copied first, some at a
// time, to where rows that are powers of two apart don't share a place in the cache. A matrix that the cache can't hold
// beside them is taken in blocks, each over all tokens.
template <class V>
class LinearGradient {
  using T = typename V::scalar;
  static constexpr int64_t kTokens = 128;
  static constexpr int64_t kPanel = V::kVectors * V::kLanes;
  static constexpr int64_t kBlock = (512 << 10) / sizeof(T);  // of the matrix; half of a usual second-level cache
  static constexpr int64_t kBlockInputs = 512;

 public:
  LinearGradient(const LinearCall& call, Arena& arena)
      : call_(call),
        block_inputs_(is_written_once(call) ? call.inputs : even_share(call.inputs, kBlockInputs, kPanel)),
        block_outputs_(is_written_once(call) ? call.outputs : even_share(call.outputs, kBlock / block_inputs_, 1)),
        grad_step_(round_up(block_outputs_, V::kLanes) + V::kLanes),
        grad_(arena.take<T>(kTokens * grad_step_)),
        x_(arena.take<T>(kTokens * round_up(block_inputs_, kPanel))),
        bias_(arena.take<T>(grad_step_)) {}

  static int64_t scratch(const LinearCall& call) {
    Arena arena(nullptr);
    LinearGradient measure(call, arena);
    return arena.used();
  }

  static void run(const LinearCall& call, void* memory) {
    Arena arena(memory);
    LinearGradient(call, arena).run();
  }

 private:
  static bool is_written_once(const LinearCall& call) { return call.tokens <= kTokens; }

  // The size of parts of `total` that are as many as parts of `most` would be, and multiples of `unit`.
  static int64_t even_share(int64_t total, int64_t most, int64_t unit) {
    return round_up(ceil_div(total, ceil_div(total, max_of(most, 1))), unit);
  }

  void run() {
    for (int64_t input = 0; input < call_.inputs; input += block_inputs_) {
      for (int64_t output = 0; output < call_.outputs; output += block_outputs_) {
        add_block(input, min_of(block_inputs_, call_.inputs - input), output,
                  min_of(block_outputs_, call_.outputs - output));
      }
    }
  }

  void add_block(int64_t input, int64_t inputs, int64_t output, int64_t outputs) {
    T* weight = static_cast<T*>(call_.weight) + output * call_.weight_step + input;
    for (int64_t first = 0; first < call_.tokens; first += kTokens) {
      const int64_t tokens = min_of(kTokens, call_.tokens - first);
      const bool sums = call_.bias && input == 0;
      copy(input, inputs, output, outputs, first, tokens, sums);
      if (sums) add_to_bias(output, outputs, first == 0);
      for (int64_t i = 0; i < inputs; i += kPanel) {
        split_columns(static_cast<int>(outputs), V::kKeyRows, [&](int o, int count) {
          add<>(count, min_of(kPanel, inputs - i), tokens, grad_ + o, x_ + i * kTokens,
                weight + o * call_.weight_step + i, first == 0);
        });
      }
    }
  }

  void copy(int64_t input, int64_t inputs, int64_t output, int64_t outputs, int64_t first, int64_t tokens, bool sums) {
    for (int64_t o = 0; o < grad_step_; o += V::kLanes) V::zero().store(bias_ + o);
    for (int64_t t = 0; t < tokens; ++t) {
      const T* grad = static_cast<const T*>(call_.grad) + (first + t) * call_.grad_step + output;
      for (int64_t o = 0; o < outputs; o += V::kLanes) {
        const V value = V::load_part(grad + o, outputs - o);
        value.store(grad_ + t * grad_step_ + o);
        if (sums) (V::load(bias_ + o) + value).store(bias_ + o);
      }
      const T* x = static_cast<const T*>(call_.x) + (first + t) * call_.x_step + input;
      for (int64_t i = 0; i < inputs; i += V::kLanes) {
        V::load_part(x + i, inputs - i).store(x_ + (i / kPanel * kTokens + t) * kPanel + i % kPanel);
      }
    }
  }

  void add_to_bias(int64_t output, int64_t outputs, bool is_first) {
    T* bias = static_cast<T*>(call_.bias) + output;
    for (int64_t o = 0; o < outputs; ++o) bias[o] = is_first ? bias_[o] : bias[o] + bias_[o];
  }

  // weight[...][...] += sum over tokens, for up to R outputs and D vectors of inputs.
  template <int R = V::kKeyRows, int D = V::kVectors>
  NAT_DENSE_INLINE void add(int outputs, int64_t inputs, int64_t tokens, const T* grad, const T* x, T* weight,
                            bool is_first) {
    if constexpr (R > 1) {
      if (outputs < R) return add<R - 1, D>(outputs, inputs, tokens, grad, x, weight, is_first);
    }
    if constexpr (D > 1) {
      if (inputs <= (D - 1) * V::kLanes) return add<R, D - 1>(outputs, inputs, tokens, grad, x, weight, is_first);
    }
    add_tile<R, D>(inputs, tokens, grad, x, weight, is_first);
  }

  template <int R, int D>
  NAT_DENSE_NOINLINE void add_tile(int64_t inputs, int64_t tokens, const T* grad, const T* x, T* weight, bool is_first) {
    V sum[R][D];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) sum[r][d] = V::zero();
    }
    const int64_t grad_step = grad_step_;
    for (int64_t t = 0; t < tokens; ++t) {
      V input[D];
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) input[d] = V::held(V::load(x + d * V::kLanes));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V factor = V::held(V::broadcast(grad[r]));
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) sum[r][d] = fma(factor, input[d], sum[r][d]);
      }
      x += kPanel;
      grad += grad_step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        T* out = weight + r * call_.weight_step + d * V::kLanes;
        const int64_t count = inputs - d * V::kLanes;
        if (!is_first) sum[r][d] = sum[r][d] + V::load_part(out, count);
        sum[r][d].store_part(out, count);
      }
    }
  }

  const LinearCall& call_;
  const int64_t block_inputs_, block_outputs_, grad_step_;
  T* const grad_;  // [tokens][grad_step]
  T* const x_;     // [panels][tokens][panel]
  T* const bias_;  // [outputs of a block], of these tokens
};

}  // namespace
}  // namespace nat_dense
