"""What NAT, DiNAT and DiNAT_s share: stages, outputs, freezing, initial weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nat_dense.models.add_norm import add_norm, norm, takes_kernels
from nat_dense.models.attention import NeighborhoodAttention2D
from nat_dense.models.fields import (
    Dilations,
    architecture,
    check_frozen_stages,
    check_kinds,
    check_out_indices,
    check_rates,
    resolve_dilations,
)
from nat_dense.models.layers import (
    DropPath,
    Mlp,
    are_plain,
    drops,
    in_runs,
    is_plain,
    put_together,
    rows_in_a_band,
    rows_seen,
)
from nat_dense.models.linear import Linear


class Block(nn.Module):
    """Attention and MLP, each behind a norm, with optional layer scale and stochastic depth.

    Source: NAT (arXiv:2204.07143) figure 3; layer scale: CaiT (arXiv:2103.17239) equation 4.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, layer_scale: float | None, drop_path: float, drop: float, attention: dict
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(dim, proj_drop=drop, **attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if self.is_joined(x):
            return self.joined(x)[0]
        if rows := self._rows_in_a_band(x):
            return put_together(self._bands(x, rows), x.shape[:-1])
        return in_runs(self._add_branches, x, self.attn(self.norm1(x)), whole=self._takes_whole_maps)

    def is_joined(self, x: Tensor) -> bool:
        """Whether `joined` may run in place of the modules: on a GPU, where they are plain and without dropout."""
        return (
            takes_kernels(x)
            and self._has_plain_parts()
            and all(norm.bias is not None and norm.weight.dim() == 1 for norm in (self.norm1, self.norm2))
            and not any(map(drops, (self.attn.proj_drop, self.mlp.drop)))
        )

    def _has_plain_parts(self) -> bool:
        """Whether the modules inside are those of the constructor and have no hooks; the projection to query, key and
        value, which is always called as a module, aside."""
        attn, mlp = self.attn, self.mlp
        if not (is_plain(attn, NeighborhoodAttention2D) and is_plain(mlp, Mlp) and is_plain(self.drop_path, DropPath)):
            return False
        return are_plain(
            {
                nn.LayerNorm: (self.norm1, self.norm2),
                Linear: (attn.proj, mlp.fc1, mlp.fc2),
                nn.Dropout: (attn.proj_drop, mlp.drop),
            }
        )

    def _takes_whole_maps(self) -> bool:
        """Whether a part may look at more than a token: what hooks or other modules do is not known."""
        return self.drop_path.training or not (self._has_plain_parts() and is_plain(self.attn.qkv, Linear))

    def _rows_in_a_band(self, x: Tensor) -> int:
        """How many rows of a map to take at once; 0 for all."""
        attn = self.attn
        if not isinstance(attn, NeighborhoodAttention2D):
            return 0
        rows = rows_in_a_band(x, attn.kernel_size * attn.dilation)
        return 0 if rows and self._takes_whole_maps() else rows

    def joined(
        self, x: Tensor, normed: Tensor | None = None, following: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block, with the sum of each branch and the norm after it in one pass over the map.

        Args:
            x: [B, H, W, C].
            normed: `norm1` of it, where the block before has computed that.
            following: `norm1` of the block that follows, where that is to be computed here.

        Returns:
            The map after the block, and its norm or None.
        """
        if normed is None:
            normed = norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        branch = self.attn(normed, add_bias=False)
        x, normed = self._add_norm(x, branch, self.attn.proj.bias, self.gamma1, self.norm2)
        if following is None:
            return self.drop_path(x, self.mlp(normed), self.gamma2), None
        return self._add_norm(x, self.mlp(normed, add_bias=False), self.mlp.fc2.bias, self.gamma2, following)

    def _add_norm(
        self, x: Tensor, branch: Tensor, bias: Tensor | None, layer_scale: Tensor | None, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        factor = self.drop_path.factor(branch, torch.float32)
        return add_norm(x, branch, bias, layer_scale, factor, norm.weight, norm.bias, norm.eps)

    def _bands(self, x: Tensor, rows: int) -> Iterator[Tensor]:
        """All of the block for a band of rows before the next one: what lies between x and the output stays in the
        cache. The rows that the windows of two bands share are projected for both."""
        for image in x.split(1):
            for first in range(0, x.shape[1], rows):
                last = min(first + rows, x.shape[1])
                low, high = rows_seen(first, last, x.shape[1], self.attn.kernel_size, self.attn.dilation)
                attended = self.attn(self.norm1(image[:, low:high]), rows=(first - low, last - low))
                yield self._add_branches(image[:, first:last], attended)

    def _add_branches(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.drop_path(x, attended, self.gamma1)
        return self.drop_path(x, self.mlp(self.norm2(x)), self.gamma2)


class Stage(nn.Module):
    """Blocks of one resolution and, on all stages but the last, a downsampler."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, W, C] -> the map after the blocks, and what the next stage takes."""
        if self.with_cp and self.training:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self._in_turn(x)
        return x, x if self.downsample is None else self.downsample(x)

    def _in_turn(self, x: Tensor) -> Tensor:
        joined = [isinstance(block, Block) and is_plain(block, Block) and block.is_joined(x) for block in self.blocks]
        blocks: Any = self.blocks  # of which those that are joined are Blocks
        normed = None
        for i, block in enumerate(blocks):
            if not joined[i]:
                x = block(x)
            else:
                following = blocks[i + 1].norm1 if any(joined[i + 1 : i + 2]) else None
                x, normed = block.joined(x, normed, following)
        return x


class NeighborhoodBackbone(BaseModule):
    """Hierarchical backbone of neighborhood attention blocks; see its subclasses.

    Args:
        arch: A row of `variants.py` ("tiny", ...), which gives the architecture's fields. Fields that are set win.
        embed_dim: Channels of the first stage; each stage doubles them.
        depths: Blocks a stage.
        num_heads: Heads a stage.
        mlp_ratio: Hidden channels of an MLP over its channels.
        kernel_size: Side of the attention window in tokens; odd, > 1.
        dilations: Per stage a list with a dilation a block; or the name of a preset of `variants.DILATIONS`
            ("detection", "segmentation", ...). None: `arch`'s own, or no dilation where `arch` is None.
        layer_scale: Initial value of the layer scale; None for the architecture's own, 0 for none.
        in_chans: Channels of the image.
        qkv_bias, qk_scale, attn_drop_rate: See `NeighborhoodAttention2D`.
        drop_rate: Dropout on tokens, projections and MLPs.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 at the first.
        out_indices: Stages (from 0) whose maps are returned, ascending.
        frozen_stages: -1 freezes nothing, 0 the tokenizer, i also stages 0 .. i-1 with their downsamplers and output
            norms. What is frozen takes no gradient and stays in eval mode, also through `.train()`.
        with_cp: Recomputes the blocks' activations in the backward pass, to save memory.
        backend: As in `nat_dense.ops.na2d`.
        init_cfg: mmengine's; `dict(type="Pretrained", checkpoint=...)` loads released weights.

    Raises:
        ValueError: A field is missing, out of range or disagrees with another one.
    """

    init_cfg: Any
    family: ClassVar[str]
    stages_name: ClassVar[str]
    tokenizer: ClassVar[type[nn.Module]]
    downsampler: ClassVar[type[nn.Module]]
    default_dilations: ClassVar[Dilations] = None

    def __init__(
        self,
        arch: str | None = None,
        *,
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float | None = None,
        kernel_size: int | None = None,
        dilations: Dilations = None,
        layer_scale: float | None = None,
        in_chans: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str = "auto",
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        given = dict(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            kernel_size=kernel_size,
            layer_scale=layer_scale,
        )
        rates = dict(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        others: dict = dict(in_chans=in_chans, qkv_bias=qkv_bias, qk_scale=qk_scale, with_cp=with_cp)
        others |= dict(out_indices=out_indices, frozen_stages=frozen_stages)
        check_kinds(given | rates | others)
        check_rates(rates)
        fields = architecture(self.family, arch, given)
        embed_dim, depths, num_heads = fields["embed_dim"], tuple(fields["depths"]), tuple(fields["num_heads"])
        if len(depths) != len(num_heads) or not depths or min(depths) < 1:
            raise ValueError(f"depths={depths} and num_heads={num_heads}: expected one number >= 1 a stage in both")
        if dilations is None and arch is not None:
            dilations = self.default_dilations
        dilations = resolve_dilations(self.family, dilations, depths)

        self.arch = arch
        self.in_chans = in_chans
        self.depths = depths
        self.num_features = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.out_indices = check_out_indices(out_indices, len(depths))
        self.frozen_stages = check_frozen_stages(frozen_stages, len(depths))
        self.patch_embed = self.tokenizer(in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)

        paths = (drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            attention = dict(num_heads=num_heads[i], kernel_size=fields["kernel_size"], qkv_bias=qkv_bias)
            attention |= dict(qk_scale=qk_scale, attn_drop=attn_drop_rate, backend=backend)
            blocks = [
                Block(
                    self.num_features[i],
                    fields["mlp_ratio"],
                    fields["layer_scale"],
                    next(paths),
                    drop_rate,
                    attention | dict(dilation=dilations[i][j]),
                )
                for j in range(depth)
            ]
            downsample = self.downsampler(self.num_features[i]) if i < len(depths) - 1 else None
            stages.append(Stage(blocks, downsample, with_cp))
        self.add_module(self.stages_name, stages)
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(self.num_features[i]))
        for module in self._frozen_modules():
            module.requires_grad_(False)

    @property
    def dilations(self) -> tuple[tuple[int, ...], ...]:
        """The dilation of each block of each stage."""
        stages: Any = self.stages
        return tuple(tuple(block.attn.dilation for block in stage.blocks) for stage in stages)

    @property
    def stages(self) -> nn.ModuleList:
        """The stages, whatever the checkpoints call them."""
        return getattr(self, self.stages_name)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One contiguous, layer-normed map per entry of `out_indices`.

        Args:
            x: [B, in_chans, H, W], any H, W >= 1.

        Returns:
            Maps [B, num_features[i], ceil(H / 4 / 2**i), ceil(W / 4 / 2**i)].
        """
        # The range comes first: stages behind the last map are not computed (the downsampler to them is).
        stages = range(max(self.out_indices, default=-1) + 1)
        return tuple(
            getattr(self, f"norm{i}")(tokens).permute(0, 3, 1, 2).contiguous()
            for i, tokens in zip(stages, self.forward_stages(x), strict=False)
            if i in self.out_indices
        )

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """The map [B, H, W, C] of each stage after its blocks, before any output norm."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"input of shape {tuple(x.shape)}: expected [batch, {self.in_chans}, height, width]")
        if not x.is_floating_point():
            raise ValueError(f"input of {x.dtype}: expected an image in floating point, normalized as in training")
        x = self.pos_drop(self.patch_embed(x))
        for stage in self.stages:
            tokens, x = stage(x)
            yield tokens

    def train(self, mode: bool = True) -> NeighborhoodBackbone:
        """Sets the mode of everything that isn't frozen; returns self."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def init_weights(self) -> None:
        """Loads the weights that `init_cfg` names. The constructor has already drawn the others.

        Raises:
            ValueError, FileNotFoundError: As `nat_dense.checkpoints.load`.
        """
        if self.init_cfg:
            from nat_dense.mm.pretrained import through_this_door  # here, since nat_dense.mm imports this module

            self.init_cfg = through_this_door(self.init_cfg)
        super().init_weights()

    def _frozen_modules(self) -> Iterator[nn.Module]:
        if self.frozen_stages < 0:
            return
        yield from (self.patch_embed, self.pos_drop)
        for i in range(self.frozen_stages):
            yield self.stages[i]
            if i in self.out_indices:
                yield getattr(self, f"norm{i}")
