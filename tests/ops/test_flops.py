"""Operation counts of the operator."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nat_dense.ops import flops, na2d, na2d_qkv
from nat_dense.ops.functional import na2d_rows


def attention_by_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention over a map, [B, H, W, heads, head_dim], in products that torch counts."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return torch.bmm(torch.bmm(query, key.mT).softmax(-1), value)


def tensors(shape: tuple[int, ...], device: str = "meta", requires_grad: bool = False) -> list[Tensor]:
    return [torch.zeros(shape, device=device, requires_grad=requires_grad) for _ in range(3)]


def test_forward_has_two_products_of_k_by_k_keys():
    query, key, value = tensors((2, 20, 30, 4, 32))
    rpb = torch.zeros(4, 13, 13, device="meta")
    with FlopCounterMode(display=False) as counter:
        na2d(query, key, value, 7, 2, rpb)
    assert counter.get_total_flops() == 4 * 7 * 7 * 32 * (2 * 20 * 30 * 4) == 30_105_600


def test_window_over_the_whole_map_counts_as_full_attention():
    inputs = tensors((3, 5, 5, 2, 16))
    with FlopCounterMode(display=False) as ours:
        na2d(*inputs, 5)
    with FlopCounterMode(display=False) as full:
        attention_by_matmul(*inputs)
    assert ours.get_total_flops() == full.get_total_flops() > 0


def test_backward_has_the_products_of_full_attention_and_the_recomputed_logits():
    inputs = tensors((1, 3, 3, 2, 8), requires_grad=True)
    with FlopCounterMode(display=False) as ours:
        na2d(*inputs, 3).sum().backward()
    with FlopCounterMode(display=False) as full:
        attention_by_matmul(*inputs).sum().backward()
    recomputed = 2 * flops.product_macs((1, 3, 3, 2, 8), (3, 3))
    assert ours.get_total_flops() == full.get_total_flops() + recomputed


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pairs_dilation_and_completed_maps_count_real_queries_only(device):
    """Padding tokens are attended to and don't attend: a 4 x 6 map has 24 queries whatever its window."""
    query, key, value = tensors((1, 4, 6, 2, 8), device)
    padding = torch.zeros(2, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        na2d(query, key, value, (3, 5), (4, 2), pad_key=padding, pad_value=padding)
    assert counter.get_total_flops() == 4 * (3 * 5) * 8 * (4 * 6 * 2)


def test_bias_additions_are_counted_apart():
    assert flops.bias_additions((2, 20, 30, 4, 32), (7, 7)) == 2 * 20 * 30 * 4 * 49


def test_rows_count_alone():
    maps = torch.randn(3, 2, 20, 30, 4, 32)
    with FlopCounterMode(display=False) as counter:
        na2d_rows(*maps, 7, 1, None, 1.0, (3, 8))
    assert counter.get_total_flops() == 4 * 7 * 7 * 32 * (2 * 5 * 30 * 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_packed_tokens_count_as_their_parts(device):
    qkv = torch.zeros(1, 4, 6, 3, 2, 8, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as packed:
        na2d_qkv(qkv, 3).sum().backward()
    with FlopCounterMode(display=False) as parts:
        na2d(*qkv.unbind(3), 3).sum().backward()
    (counted,) = {name for name in packed.flop_counts["Global"] if str(name).endswith("na2d_qkv")}
    assert packed.flop_counts["Global"][counted] == 4 * (3 * 3) * 8 * (4 * 6 * 2)
    assert packed.get_total_flops() == parts.get_total_flops()
