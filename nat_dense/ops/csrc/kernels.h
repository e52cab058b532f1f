// The table of one instruction set. Its file includes this after opening the target, and defines the table.
#pragma once

#include "backward.h"
#include "forward.h"
#include "linear.h"

namespace nat_dense {
namespace {

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
          &LinearGradient<V>::run};
}

}  // namespace
}  // namespace nat_dense
