// The kernels for processors with AVX2 and FMA. Compiles to nothing elsewhere.
#include "problem.h"

#if NAT_DENSE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "kernels.h"
#include "vec_avx2.h"

namespace nat_dense {

const Kernels kAvx2Kernels[kStorages] = {
    kernels_of<Avx2Vec, float>(),
    kernels_of<Avx2Vec, BFloat16>(),
    kernels_of<GenericVec<double, 4>, double>(),
};

}  // namespace nat_dense

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
