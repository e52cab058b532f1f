// The gradients of a linear layer's weight and bias: products that are summed over tokens.
#pragma once

#include "window.h"

namespace nat_dense {
namespace {

// Both operands have channels in the lanes as they come: a token adds the product of its gradient and its input to a
// matrix, V::kKeyRows outputs times V::kVectors vectors of inputs of it in registers. Tokens are copied first, some at a
// time, to where rows that are powers of two apart don't share a place in the cache. A matrix that the cache can't hold
// is taken in slices of outputs, each over all tokens.
template <class V>
class LinearGradient {
  using T = typename V::scalar;
  static constexpr int64_t kTokens = 128;
  static constexpr int64_t kPanel = V::kVectors * V::kLanes;
  static constexpr int64_t kCache = 512 << 10;

 public:
  LinearGradient(const LinearCall& call, Arena& arena)
      : call_(call),
        slices_(slices(call)),
        grad_step_(round_up(ceil_div(call.outputs, slices_), V::kLanes) + V::kLanes),
        grad_(arena.take<T>(kTokens * grad_step_)),
        x_(arena.take<T>(kTokens * round_up(call.inputs, kPanel))),
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
  static int64_t slices(const LinearCall& call) {
    if (call.tokens <= kTokens) return 1;  // the matrix is written once
    return min_of(call.outputs, ceil_div(call.outputs * call.inputs * static_cast<int64_t>(sizeof(T)), kCache));
  }

  void run() {
    for (int64_t i = 0; i < slices_; ++i) {
      const int64_t begin = call_.outputs * i / slices_, end = call_.outputs * (i + 1) / slices_;
      for (int64_t first = 0; first < call_.tokens; first += kTokens) {
        add_tokens(begin, end - begin, first, min_of(kTokens, call_.tokens - first));
      }
    }
  }

  void add_tokens(int64_t begin, int64_t outputs, int64_t first, int64_t tokens) {
    copy(begin, outputs, first, tokens);
    if (call_.bias) add_to_bias(begin, outputs, first == 0);
    for (int64_t input = 0; input < call_.inputs; input += kPanel) {
      const int64_t inputs = min_of(kPanel, call_.inputs - input);
      split_columns(static_cast<int>(outputs), V::kKeyRows, [&](int output, int count) {
        T* weight = static_cast<T*>(call_.weight) + (begin + output) * call_.weight_step + input;
        add<>(output, count, input, inputs, tokens, weight, first == 0);
      });
    }
  }

  void copy(int64_t begin, int64_t outputs, int64_t first, int64_t tokens) {
    for (int64_t o = 0; o < grad_step_; o += V::kLanes) V::zero().store(bias_ + o);
    for (int64_t t = 0; t < tokens; ++t) {
      const T* grad = static_cast<const T*>(call_.grad) + (first + t) * call_.grad_step + begin;
      for (int64_t o = 0; o < outputs; o += V::kLanes) {
        const V value = V::load_part(grad + o, outputs - o);
        value.store(grad_ + t * grad_step_ + o);
        (V::load(bias_ + o) + value).store(bias_ + o);
      }
      const T* x = static_cast<const T*>(call_.x) + (first + t) * call_.x_step;
      for (int64_t i = 0; i < call_.inputs; i += V::kLanes) {
        T* panel = x_ + (i / kPanel * kTokens + t) * kPanel;
        V::load_part(x + i, call_.inputs - i).store(panel + i % kPanel);
      }
    }
  }

  void add_to_bias(int64_t begin, int64_t outputs, bool is_first) {
    T* bias = static_cast<T*>(call_.bias) + begin;
    for (int64_t o = 0; o < outputs; ++o) bias[o] = is_first ? bias_[o] : bias[o] + bias_[o];
  }

  // weight[...][...] += sum over tokens, for R outputs and D vectors of inputs.
  template <int R = V::kKeyRows, int D = V::kVectors>
  NAT_DENSE_INLINE void add(int output, int outputs, int64_t input, int64_t inputs, int64_t tokens, T* weight, bool is_first) {
    if constexpr (R > 1) {
      if (outputs < R) return add<R - 1, D>(output, outputs, input, inputs, tokens, weight, is_first);
    }
    if constexpr (D > 1) {
      if (inputs <= (D - 1) * V::kLanes) return add<R, D - 1>(output, outputs, input, inputs, tokens, weight, is_first);
    }
    add_block<R, D>(grad_ + output, x_ + input * kTokens, tokens, weight, inputs, is_first);
  }

  template <int R, int D>
  NAT_DENSE_NOINLINE void add_block(const T* grad, const T* x, int64_t tokens, T* weight, int64_t inputs, bool is_first) {
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
  const int64_t slices_, grad_step_;
  T* const grad_;  // [tokens][grad_step]
  T* const x_;     // [panels][tokens][panel]
  T* const bias_;  // [outputs of a slice], of these tokens
};

}  // namespace
}  // namespace nat_dense
