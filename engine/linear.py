"""A frozen linear layer: weights, and on a CPU a second copy of them in oneDNN's blocked layout for few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Linear:
    """``y = x W^T + b`` with W ``[out, in]``. Change the weights through `replace` only: packed copies depend on them.

    With ``prepack`` a bf16 CPU layer keeps, from the first small batch on, a blocked copy that oneDNN multiplies 1.5
    to 2 times faster at up to ``PACKED_ROWS`` rows; larger products are faster from the plain layout. It costs the
    weights' memory once more and applies only where no gradient is wanted.
    """

    PACKED_ROWS = 128

    __slots__ = ("_packed", "bias", "prepack", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, prepack: bool = False) -> None:
        self.prepack = prepack
        self.replace(weight, bias)

    def replace(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Takes new weights in place of the old ones."""
        self.weight, self.bias = weight, bias
        self._packed: torch.Tensor | None = None
        self.prepack = self.prepack and can_prepack(weight)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.prepack and x.shape[0] <= self.PACKED_ROWS and not torch.is_grad_enabled() and x.shape[0] > 0:
            if self._packed is None:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 32)
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed bf16 product exists on this machine for this weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
