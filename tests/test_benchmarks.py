"""What the benchmarks compare with computes what it stands for."""

from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from swin_windows import SwinWindows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("size", [(14, 21), (10, 16)], ids=["whole windows", "padded"])
def test_swin_windows_are_swins(size, shift, fused):
    """Without the projections, which are here an identity and none."""
    with redirect_stdout(StringIO()):
        from mmdet.models.backbones.swin import ShiftWindowMSA
    heads, dim, window = 2, 8, 7
    channels = heads * dim
    module = ShiftWindowMSA(channels, heads, window_size=window, shift_size=shift, qkv_bias=False).eval()
    projection = torch.randn(3 * channels, channels, generator=torch.Generator().manual_seed(0)) * channels**-0.5
    table = torch.randn((2 * window - 1) ** 2, heads, generator=torch.Generator().manual_seed(1))
    module.w_msa.load_state_dict(
        {
            "relative_position_bias_table": table,
            "relative_position_index": module.w_msa.relative_position_index,
            "qkv.weight": projection,
            "proj.weight": torch.eye(channels),
            "proj.bias": torch.zeros(channels),
        }
    )
    tokens = torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = module(tokens.flatten(1, 2), size).unflatten(1, size)
        qkv = (tokens @ projection.T).unflatten(-1, (3, heads, dim))
        found = SwinWindows(size, window, shift, fused)(qkv, table.T.unflatten(1, (2 * window - 1,) * 2)).flatten(-2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
