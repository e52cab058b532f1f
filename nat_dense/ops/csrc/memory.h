// Memory of large results, kept for the next ones.
#pragma once

#include <ATen/ATen.h>

namespace nat_dense {

// As at::empty. malloc gives blocks beyond 32 MiB back to the system when they are freed, and Linux clears the next one
// at about 16 GB/s, half as long as computing its contents takes. Blocks of that size, up to 256 MiB in all, are kept
// instead: the last that were freed.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type);

}  // namespace nat_dense
