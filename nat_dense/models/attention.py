"""The attention module: projections around the operator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nat_dense.models.linear import Linear, linear
from nat_dense.ops import na2d, na2d_qkv, reference
from nat_dense.ops.backends import check_name
from nat_dense.ops.functional import is_exported, na2d_rows
from nat_dense.ops.problem import completed_size


class NeighborhoodAttention2D(nn.Module):
    """Multi-head neighborhood attention over a map of tokens.

    Args:
        dim: Channels.
        num_heads: Heads; divides `dim`.
        kernel_size: Side of the window in tokens; odd, > 1.
        dilation: Distance of neighbouring window tokens.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Multiplies the query; (dim / num_heads) ** -0.5 when None.
        attn_drop: Probability of dropping an attention weight in training. Above 0, training runs the reference.
        proj_drop: Probability of dropping an output of the projection in training.
        rpb: Whether a learned relative position bias is added to the logits.
        backend: As in `nat_dense.ops.na2d`.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or a field is out of range.

    Source: NAT (arXiv:2204.07143) section 3.2, DiNAT (arXiv:2209.15001) section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rpb: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number >= 3")
        if dilation < 1:
            raise ValueError(f"dilation={dilation}: expected a number >= 1")
        check_name(backend)
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        bias = torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
        self.rpb = nn.Parameter(nn.init.trunc_normal_(bias, std=0.02)) if rpb else None
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, rows: tuple[int, int] | None = None, add_bias: bool = True) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim], or the rows [first, last) of that, without gradients, for `rows`.

        Without the bias of the output projection where not `add_bias`: whoever calls adds it. That is for a plain
        projection, whose module is not called.

        A map smaller than the dilated window counts as zero-padded on the right and bottom before the projection, as
        in the released models: its padding is attended to and has the projection's biases as key and value.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, H, W, 3, heads, head_dim]
        if rows is not None:
            query, key, value = qkv.unbind(3)
            window = self.kernel_size, self.dilation
            out = na2d_rows(query, key, value, *window, self.rpb, self.scale, rows, backend=self.backend)
        else:
            out = attend(
                qkv,
                self.kernel_size,
                self.dilation,
                self.rpb,
                self.scale,
                projections=(self.qkv,),
                dropout=self.attn_drop if self.training else 0.0,
                backend=self.backend,
            )
        out = out.flatten(-2)
        return self.proj_drop(self.proj(out) if add_bias else linear(out, self.proj.weight, None))

    def extra_repr(self) -> str:
        names = ("num_heads", "kernel_size", "dilation", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def attend(
    qkv: Tensor | Sequence[Tensor],
    kernel_size: int,
    dilation: int,
    rpb: Tensor | None,
    scale: float,
    *,
    projections: Sequence[nn.Module],
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The operator on a map's projections, for maps of any size.

    A map smaller than the dilated window counts as zero-padded before the projections: see
    `NeighborhoodAttention2D.forward`.

    Args:
        qkv: [B, H, W, 3, heads, head_dim] of one projection; or query, key and value, each [B, H, W, heads, head_dim],
            of three.
        kernel_size, dilation, rpb, scale, backend: As in `nat_dense.ops.na2d`.
        projections: The layers that gave `qkv`, one or three; padded tokens get what these make of zeros (without
            their hooks).
        dropout: Probability of dropping an attention weight. Above 0 the reference runs.

    Returns:
        [B, H, W, heads, head_dim].
    """
    first = qkv if isinstance(qkv, Tensor) else qkv[0]
    window = (kernel_size,) * 2, (dilation,) * 2
    size, head = (first.shape[1], first.shape[2]), first.shape[-2:]
    pad_key = pad_value = None
    # An exported program serves sizes that are not known yet; the operator needs the padding for the small ones.
    if is_exported() or completed_size(size, *window) != size:
        _, pad_key, pad_value = (p.view(head) for p in _of_padding(projections, first.new_zeros(head.numel())))
    if dropout > 0:
        _warn_attention_dropout()
        query, key, value = qkv.unbind(3) if isinstance(qkv, Tensor) else qkv
        return reference.forward(query, key, value, rpb, pad_key, pad_value, *window, scale, dropout=dropout)[0]
    settings: dict = dict(pad_key=pad_key, pad_value=pad_value, backend=backend)
    if isinstance(qkv, Tensor):
        return na2d_qkv(qkv, *window, rpb, scale, **settings)
    query, key, value = qkv
    return na2d(query, key, value, *window, rpb, scale, **settings)


def _of_padding(projections: Sequence[nn.Module], zeros: Tensor) -> list[Tensor]:
    """Query, key and value of a padded token, which is `zeros` [C] before the projections: their biases."""
    made = []
    for projection in projections:
        if type(projection) is not Linear:  # an adapter in its place may make anything of them
            made.append(projection(zeros.view(1, 1, 1, -1)).flatten())
        elif projection.bias is None:
            made.append(zeros.new_zeros(projection.out_features))
        else:
            made.append(projection.bias)
    return made if len(made) == 3 else list(made[0].chunk(3))


_warned = False


def _warn_attention_dropout() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "attention dropout > 0: training runs the slow reference operator, the fused ones have no dropout. "
            "The published models train with 0; use drop_path_rate to regularise",
            stacklevel=4,
        )
