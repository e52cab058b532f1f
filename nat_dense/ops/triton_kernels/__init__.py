"""The GPU kernels in Triton. `../triton_na2d.py` launches them; import this package only where triton is installed.

A dilation group is a small map of its own: its tokens are `dilation` apart, and a token's *place* is its row and column
inside the group. In places every window is a box of KERNEL consecutive rows and columns, shifted at the group's
borders, so dilation never appears in the arithmetic. A program owns a tile of one group of one head, and each of its
warps a strip of 16 tokens of that. A strip walks, a block at a time, over the box of tokens that *it* has to do with:
taller tiles would compute more pairs of which less is used. Products are batched, one of a batch a warp:

- `forward_kernel` owns queries, walks over the keys of their windows and keeps a running softmax.
- `query_gradient_kernel` owns queries as well and recomputes the weights from the log-sum-exp. It also leaves sums of
  its tile for the gradients of the bias and of the padded token, which `sum_kernel` adds up in a fixed order.
- `key_gradient_kernel` owns keys and walks over the queries that see them.

No two programs write the same memory, so all gradients have the same bits in every run.

A map completed with padded tokens has them at its last places: they take the pad key and pad value in place of a load,
and their gradients are sums over queries.

Conventions: pairs are (rows, columns). M tokens of a strip and N tokens of a block are rectangles of powers of two,
rows first, and tensors [strips, M, N]; DIM channels of a head fill BLOCK_D, a power of two. Logits are in powers of two
inside the kernels (`scale` comes multiplied by log2 e, biases are when they are read); the log-sum-exp that
`forward_kernel` leaves is natural. Offsets into tensors are int64, those from a block's corner int32 where they fit.

A block's rows are walked over first: what depends on columns alone (masks, places in the bias table, addresses) is then
the same in all steps of the inner loop, and the compiler takes it out.

A NaN or infinity in a key, a value or an output's gradient may reach every query or key of the tiles that load it:
products multiply it with weights of zero.
"""

from nat_dense.ops.triton_kernels.backward import key_gradient_kernel, query_gradient_kernel
from nat_dense.ops.triton_kernels.forward import forward_kernel
from nat_dense.ops.triton_kernels.sums import sum_kernel

__all__ = ["forward_kernel", "key_gradient_kernel", "query_gradient_kernel", "sum_kernel"]
