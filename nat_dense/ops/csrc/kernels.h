// The table of one instruction set. Its file includes this after opening the target, and defines the table.
#pragma once

#include <type_traits>

#include "backward.h"
#include "forward.h"
#include "gelu.h"
#include "linear.h"

namespace nat_dense {
namespace {

template <class V>
constexpr auto gelu_backward_of() -> void (*)(const float*, float*, float*, int64_t) {
  if constexpr (std::is_same<typename V::scalar, float>::value) return &gelu_backward<V>;
  return nullptr;
}

template <class V, class S>
constexpr Kernels kernels_of() {
  return {V::kLanes,
          V::kSlots,
          V::kRows,
          &Forward<V, S>::scratch,
          &Forward<V, S>::run,
          &Backward<V, S>::scratch,
          &Backward<V, S>::run,
          &LinearGradient<V>::scratch,
          &LinearGradient<V>::run,
          gelu_backward_of<V>()};
}

}  // namespace
}  // namespace nat_dense
