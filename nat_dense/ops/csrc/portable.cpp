// The kernels for any processor. No intrinsics: what the compiler makes of plain vectors.
#include "kernels.h"

namespace nat_dense {

const Kernels kPortableKernels[kStorages] = {
    kernels_of<GenericVec<float, 4>, float>(),
    kernels_of<GenericVec<float, 4>, BFloat16>(),
    kernels_of<GenericVec<double, 2>, double>(),
};

}  // namespace nat_dense
