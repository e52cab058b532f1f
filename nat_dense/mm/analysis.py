"""The operator under MMEngine's analysis (`mmengine.analysis`: `FlopAnalyzer`, `get_model_complexity_info`).

MMEngine traces a model and counts what it finds in the trace. It counts one multiply-add as one, unlike torch's
`FlopCounterMode`. Importing this module adds the operator to the operations that it knows.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape

from nat_dense.ops.flops import FORWARD_PRODUCTS, bias_additions, product_macs


def count_na2d(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """What one call of the operator does: multiply-adds as "na2d", additions of the bias as "na2d_bias".

    Args:
        inputs, outputs: The values (`torch._C.Value`) of a traced `nat_dense::na2d` node.
    """
    query, rpb, kernel_size = get_shape(inputs[0]), get_shape(inputs[3]), _int_list(inputs[6])
    counts = Counter(na2d=FORWARD_PRODUCTS * product_macs(query, kernel_size))
    if rpb is not None:
        counts["na2d_bias"] = bias_additions(query, kernel_size)
    return counts


def _int_list(value: Any) -> list[int]:
    return [element.toIValue() for element in value.node().inputs()]


# MMEngine has no public way to add an operation to all analyses; `set_op_handle` serves one analysis at a time.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS["nat_dense::na2d"] = count_na2d
