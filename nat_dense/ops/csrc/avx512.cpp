// The kernels for processors with AVX-512 F, BW, DQ and VL. Compiles to nothing elsewhere.
#include "problem.h"

#if NAT_DENSE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "kernels.h"
#include "vec_avx512.h"

namespace nat_dense {

const Kernels kAvx512Kernels[kStorages] = {
    kernels_of<Avx512Vec, float>(),
    kernels_of<Avx512Vec, BFloat16>(),
    kernels_of<GenericVec<double, 8>, double>(),
};

}  // namespace nat_dense

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
