"""The parts around attention. Tokens are [B, H, W, C] throughout.

Parameter names are those of the released checkpoints, which makes them public API.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nat_dense.models.linear import Linear, is_traced
from nat_dense.models.mlp import mlp
from nat_dense.ops.functional import is_transformed

RUN_BYTES = 1 << 20
"""Tokens are taken in runs of about this many bytes, so that what a run makes of them stays in the CPU's cache."""

MIN_RUN = 512
"""Tokens in the shortest run: fewer would cost the matrix products more than the cache gives."""

BAND_BYTES = 8 << 20
"""Rows of a map are taken in bands whose projection to query, key and value has about this many bytes."""

MIN_BANDS = 4
"""Below this many bands the projection may well stay in the last cache as a whole."""


def in_runs(function: Callable[..., Tensor], *maps: Tensor, whole: Callable[[], bool]) -> Tensor:
    """`function(*maps)` for a function that works on each token alone.

    In CPU inference it is called on runs of tokens, [tokens, C], and the results are put together: the intermediate
    values then never leave the cache, which halves the time of a wide MLP. Elsewhere it is called once.

    Args:
        function: Takes as many tensors [..., C_i] as there are maps, returns [..., C].
        maps: [B, H, W, C_i] each.
        whole: Whether it must be called once all the same, asked where it would not be: stochastic depth in training
            looks at whole samples, and so may what has taken the place of a module or hooks into it.
    """
    first = maps[0]
    step = max(MIN_RUN, RUN_BYTES // (first.shape[-1] * first.element_size()))
    if not _may_be_split(first) or first.shape[:-1].numel() <= step or whole():
        return function(*maps)
    runs = zip(*(m.flatten(0, -2).split(step) for m in maps), strict=True)
    return put_together((function(*run) for run in runs), first.shape[:-1])


def put_together(parts: Iterator[Tensor], shape: Sequence[int]) -> Tensor:
    """Consecutive tokens [..., C] as one map [*shape, C], each part copied before the next one is computed."""
    first = next(parts)
    out = first.new_empty(*shape, first.shape[-1])  # only now: under autocast the dtype need not be that of the input
    tokens, done = out.flatten(0, -2), 0
    for part in itertools.chain([first], parts):
        tokens[done : done + part.shape[:-1].numel()] = part.flatten(0, -2)
        done += part.shape[:-1].numel()
    return out


def rows_in_a_band(x: Tensor, window: int) -> int:
    """How many rows of a map a block should take at once in CPU inference; 0 for all.

    Args:
        x: [B, H, W, C].
        window: Side of the dilated window in rows.
    """
    # First: what is asked of a traced map's sides would bind the program to the answer.
    if not _may_be_split(x) or x.shape[0] == 0:
        return 0
    _, height, width, dim = x.shape
    row_bytes = width * 3 * dim * x.element_size()  # of the projection
    rows = max(1, BAND_BYTES // row_bytes)
    return rows if rows >= window and height >= MIN_BANDS * rows and width >= window else 0


def rows_seen(first: int, last: int, height: int, kernel_size: int, dilation: int) -> tuple[int, int]:
    """Rows [low, high) that hold the windows of the queries in rows [first, last), and no border that isn't the map's.

    `low` is a multiple of the dilation, so that in these rows alone the dilated groups are what they are in the map.
    """
    window, reach = kernel_size * dilation, kernel_size // 2 * dilation
    low = max(0, min(first - reach, height - window)) // dilation * dilation
    return low, min(height, max(last + reach, low + window))


def _may_be_split(x: Tensor) -> bool:
    """Whether the order of the work is ours to choose: CPU inference outside tracing and transforms."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced() and not is_transformed()


class DropPath(nn.Module):
    """Adds a residual branch, with stochastic depth: in training drops it for a whole sample, and scales what it keeps.

    Source: Huang et al., arXiv:1603.09382; layer scale: CaiT (arXiv:2103.17239) equation 4.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor, layer_scale: Tensor | None = None) -> Tensor:
        """x + branch [B, ..., C], the branch times its layer scale [C] where there is one."""
        factor = self.factor(branch)
        if factor is None:
            factor = layer_scale
        else:
            factor = factor.view(-1, *[1] * (x.dim() - 1))
            factor = factor if layer_scale is None else factor * layer_scale
        return x + branch if factor is None else torch.addcmul(x, branch, factor)

    def factor(self, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """What samples of a branch are multiplied by: [B], None where nothing is dropped.

        Args:
            branch: [B, ..., C].
            dtype: Of the factors; None for the branch's.
        """
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        return branch.new_empty(branch.shape[0], dtype=dtype).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """Without the bias of the second layer where not `add_bias`, which is for plain layers without dropout."""
        if drops(self.drop) or not (is_plain(self.fc1, Linear) and is_plain(self.fc2, Linear)):
            out = self.fc2(self.drop(F.gelu(self.fc1(x))))
        else:
            out = mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias if add_bias else None)
        return self.drop(out)


def drops(dropout: nn.Dropout) -> bool:
    """Whether it drops anything."""
    return dropout.training and dropout.p > 0


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's parameters are all there is to it: no adapter in its place, no parametrization, no hooks of
    its own or of all modules, no compiled call of its own, no forward put there for it alone, as offloading does."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    is_called = any(own) or nn.modules.module._has_any_global_hook() or module._compiled_call_impl is not None
    return type(module) is kind and "forward" not in module.__dict__ and not is_called


def are_plain(modules: Mapping[type[nn.Module], Iterable[nn.Module]]) -> bool:
    """Whether all of them are plain modules of their kind."""
    return all(is_plain(module, kind) for kind, those in modules.items() for module in those)


def channels_last(image: Tensor) -> Tensor:
    """[B, C, H, W], laid out as [B, H, W, C].

    A convolution keeps the layout of its input, and tokens have this one: the first map, which is the largest of all,
    need not be laid out anew. On a CPU that takes the tokenizer to a third of the time. Transforms of `torch.func` know
    no layouts.
    """
    return image if is_transformed() else image.contiguous(memory_format=torch.channels_last)


class ConvTokenizer(nn.Module):
    """Two strided 3x3 convolutions and a norm: [B, in_chans, H, W] -> [B, ceil(H/4), ceil(W/4), embed_dim].

    Source: NAT (arXiv:2204.07143) section 3.3.
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(channels_last(x)).permute(0, 2, 3, 1))


class PatchTokenizer(nn.Module):
    """One 4x4 convolution of stride 4 and a norm, sides zero-padded to multiples of 4: as `ConvTokenizer`.

    Source: the patch embedding of Swin (arXiv:2103.14030) as used by DiNAT_s (arXiv:2209.15001, section 3.3).
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.proj(channels_last(x)).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """A strided 3x3 convolution, then a norm: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2 C].

    Source: NAT (arXiv:2204.07143) section 3.3.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Stacks 2x2 tokens, norms, then reduces them: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2 C].

    The stack's order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1); odd sides are zero-padded.

    Source: Swin (arXiv:2103.14030) section 3.1, as used by DiNAT_s.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))
