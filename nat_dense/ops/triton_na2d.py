"""The Triton back end: which problems it takes, its choice of tiles, and the launches of `triton_kernels/`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nat_dense.ops.problem import Pair, Problem, completed_size
from nat_dense.ops.triton_launch import DTYPES, add_up, cdiv, kernels, power_of_two, product_precision, why_no_kernels

LARGEST_KERNEL = 13
LARGEST_HEAD_DIM = 128

TILES: dict[str, tuple[Pair, Pair]] = {"4x8": ((4, 8), (2, 8)), "8x4": ((8, 4), (4, 4))}
"""Tokens (rows, columns) that one program may own and those of its warps, by the name of the variant."""

VARIANTS = tuple(TILES)

REACH = 64
"""Rows and columns within which all tokens lie that a program takes, counted from any of them: a tile, a kernel on both
sides and a block are fewer."""

KERNELS = ("forward", "query_gradient", "key_gradient")

TUNED_TOKEN = 64
TUNED: dict[str, tuple[Pair, int, int | None]] = {
    "forward": ((2, 16), 2, 128),
    "query_gradient": ((2, 16), 2, 128),
    "key_gradient": ((1, 16), 2, None),
}
"""Block, stages and registers that were fastest on an H200 for tokens of 32 channels in two bytes each."""

WIDE_TOKEN = 128
"""Bytes of a head's channels from which on blocks get smaller, lest a warp run out of registers."""


# --- what runs --------------------------------------------------------------------------------------------------------


def why_not(problem: Problem, variant: str) -> str | None:
    """Why the kernels can't run a problem, or None where they can. `variant` is one of `VARIANTS` or empty."""
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} is none of {', '.join(map(str, DTYPES))}"
    if problem.head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {problem.head_dim} is larger than {LARGEST_HEAD_DIM}"
    if max(problem.kernel_size) > LARGEST_KERNEL:
        return f"kernel_size {problem.kernel_size} is larger than {LARGEST_KERNEL}"
    return why_no_kernels(problem.device)


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a program works; pairs are (rows, columns).

    Attributes:
        owned: Tokens that it computes.
        strip: Those of one warp of 32 threads.
        block: Tokens of the other side that a warp takes at a time.
        stages: Blocks that are on their way at a time.
        registers: Most that a thread may have, or None: fewer let more programs run side by side.
    """

    owned: Pair
    strip: Pair
    block: Pair
    stages: int = 1
    registers: int | None = None

    @classmethod
    def of(cls, kernel: str, variant: str, token_bytes: int, itemsize: int) -> Tile:
        """The block is as large as registers allow; in float32 products take each operand in two halves.

        Args:
            kernel: One of `KERNELS`.
            variant: A name of `TILES`.
            token_bytes: Of a head's channels, filled up to a power of two.
            itemsize: Bytes of a number.
        """
        owned, strip = TILES[variant]
        if itemsize == 2 and token_bytes <= TUNED_TOKEN:
            return cls(owned, strip, *TUNED[kernel])
        return cls(owned, strip, (2, 16) if itemsize == 2 and token_bytes <= WIDE_TOKEN else (2, 8))

    @property
    def warps(self) -> int:
        return math.prod(self.owned) // math.prod(self.strip)

    def cost(self, members: Pair, kernel_size: Pair) -> int:
        """Of all queries of a dilation group of `members` tokens, in pairs of a query and a key."""
        tiles = math.prod(cdiv(*axis) for axis in zip(members, self.owned, strict=True))
        axes = zip(kernel_size, self.strip, self.block, strict=True)
        keys = math.prod(cdiv(k + tokens - 1, block) * block for k, tokens, block in axes)
        return tiles * math.prod(self.owned) * keys


def choose_tile(kernel: str, members: Pair, kernel_size: Pair, token_bytes: int, itemsize: int) -> Tile:
    """The cheapest of `TILES` for dilation groups of `members` tokens; the other arguments are those of `Tile.of`."""
    tiles = [Tile.of(kernel, variant, token_bytes, itemsize) for variant in TILES]
    return min(tiles, key=lambda tile: tile.cost(members, kernel_size))


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What a kernel is called with besides tensors.

    Attributes:
        grid: Programs.
        programs_per_head: A head's share of them.
        idle: Whether some programs have no tokens, because groups differ in size.
        is_padded: Whether the map is completed to hold a window.
        arguments: By name; not to be changed, since calls share them.
    """

    grid: tuple[int]
    programs_per_head: int
    idle: bool
    is_padded: bool
    arguments: dict

    @classmethod
    def of(cls, kernel: str, query: Tensor, kernel_size: Pair, dilation: Pair, scale: float, variant: str) -> Launch:
        precision = product_precision(query.dtype)
        return _launch(kernel, query.shape, query.element_size(), precision, kernel_size, dilation, scale, variant)

    def pads(self, query: Tensor, *pads: Tensor | None) -> list[Tensor | None]:
        """The padded tokens in the dtype of the others; None where the map holds a window."""
        return [None if t is None or not self.is_padded else t.to(query.dtype).contiguous() for t in pads]


@functools.lru_cache(maxsize=4096)
def _launch(
    kernel: str,
    shape: tuple[int, ...],
    itemsize: int,
    precision: str,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    variant: str,
) -> Launch:
    """Kept, since a training step has a launch for each layer and the GPU should not wait for this."""
    batch, height, width, heads, dim = shape
    block_d = max(16, power_of_two(dim))
    token = block_d * itemsize, itemsize
    size, groups = (height, width), tuple(min(n, d) for n, d in zip((height, width), dilation, strict=True))
    members = (cdiv(height, dilation[0]), cdiv(width, dilation[1]))
    tile = Tile.of(kernel, variant, *token) if variant else choose_tile(kernel, members, kernel_size, *token)
    tiles = tuple(cdiv(n, owned) for n, owned in zip(members, tile.owned, strict=True))
    fewest = tuple(cdiv(n // g, owned) for n, g, owned in zip(size, groups, tile.owned, strict=True))
    programs_per_head = batch * math.prod(groups) * math.prod(tiles)
    arguments = {
        "height": height,
        "width": width,
        "heads": heads,
        "dilation": dilation,
        "tiles_h": tiles[0],
        "tiles_w": tiles[1],
        "scale": scale * math.log2(math.e),
        "KERNEL": kernel_size,
        "TILE": tile.owned,
        "STRIP": tile.strip,
        "BLOCK": tile.block,
        "BINS": tuple(max(16, power_of_two(2 * k - 1)) for k in kernel_size),
        "DIM": dim,
        "BLOCK_D": block_d,
        "PRECISION": precision,
        "DILATED": dilation != (1, 1),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
        "enable_fp_fusion": True,  # Triton 3.10 multiplies and adds in two steps unless told
    }
    is_padded = completed_size(size, kernel_size, dilation) != size
    return Launch((programs_per_head * heads,), programs_per_head, fewest != tiles, is_padded, arguments)


def _strides(dilation: Pair, **tensors: Tensor) -> dict:
    """Arguments that say where tokens are. Calls on views of one projection spare registers: see `forward_kernel`."""
    import triton.language as tl

    strides: dict = {f"{name}_strides": tensor.stride()[:4] for name, tensor in tensors.items()}
    _, _, width, heads, dim = tensors["query"].shape
    steps = [stride[1:3] for stride in strides.values()] + [(width * heads * dim, heads * dim)]  # of what is written
    farthest = REACH * max(sum(n * d for n, d in zip(step, dilation, strict=True)) for step in steps)
    if strides["value_strides"] == strides["key_strides"]:
        strides["value_strides"] = None
    return strides | {"OFFSET": tl.int32 if farthest < 2**31 else tl.int64}


def _bias(rpb: Tensor | None) -> Tensor | None:
    return None if rpb is None else rpb.float().contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    variant: str = "",
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`, with the tile of `variant`."""
    launch = Launch.of("forward", query, kernel_size, dilation, scale, variant)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    pads = launch.pads(query, pad_key, pad_value)
    with torch.cuda.device_of(query):
        kernels().forward_kernel[launch.grid](
            query,
            key,
            value,
            _bias(rpb),
            *pads,
            out,
            lse,
            **_strides(dilation, query=query, key=key, value=value),
            **launch.arguments,
        )
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    variant: str = "",
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`, with the tile of `variant`; the same bits in every run."""
    launch, key_launch = (
        Launch.of(kernel, query, kernel_size, dilation, scale, variant) for kernel in ("query_gradient", "key_gradient")
    )
    bias, out, lse = _bias(rpb), out.contiguous(), lse.contiguous()
    pads = launch.pads(query, pad_key, pad_value)
    batch, height, width, heads, dim = query.shape
    grad_qkv = torch.empty(batch, height, width, 3, heads, dim, dtype=query.dtype, device=query.device)
    gradients = grad_qkv.unbind(3)
    stats = torch.empty(*lse.shape, 2, dtype=torch.float32, device=query.device)
    entries = [2 * k - 1 for k in kernel_size]

    def sums(*shape: int) -> Tensor:
        """Parts of programs; idle ones write none."""
        make = torch.zeros if launch.idle else torch.empty
        return make(launch.programs_per_head, heads, *shape, dtype=torch.float32, device=query.device)

    bias_sums = None if bias is None else sums(*entries)
    pad_sums = sums(2, dim) if launch.is_padded else None
    strides = _strides(dilation, grad_out=grad_out, query=query, key=key, value=value, grad=gradients[0])
    with torch.cuda.device_of(query):
        kernels().query_gradient_kernel[launch.grid](
            grad_out,
            query,
            key,
            value,
            bias,
            *pads,
            out,
            lse,
            gradients[0],
            stats,
            bias_sums,
            pad_sums,
            **strides,
            **launch.arguments,
            grad_scale=scale,
        )
        kernels().key_gradient_kernel[key_launch.grid](
            grad_out,
            query,
            key,
            value,
            bias,
            stats,
            *gradients[1:],
            **strides,
            **key_launch.arguments,
            grad_scale=scale,
        )
    grad_rpb = None if rpb is None or bias_sums is None else add_up(bias_sums).to(rpb.dtype)
    if pad_sums is None:
        return grad_qkv, grad_rpb, *(None if pad is None else torch.zeros_like(pad) for pad in (pad_key, pad_value))
    totals = zip(add_up(pad_sums).unbind(1), (pad_key, pad_value), strict=True)
    # Copied always: outputs of an operator may not share memory, and torch.compile takes them to be contiguous.
    copied: dict = dict(copy=True, memory_format=torch.contiguous_format)
    return grad_qkv, grad_rpb, *(None if pad is None else total.to(pad.dtype, **copied) for total, pad in totals)
