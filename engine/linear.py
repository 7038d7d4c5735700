"""A frozen linear layer: weights, dense or quantised, and on a CPU a second copy of them in blocked order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import cpu_linear, cpu_quantized
from ..kernels.activation import swiglu
from ..kernels.quantized_linear import QuantizedWeight, dequantize, quantized_linear


class Linear:
    """``y = x W^T + b`` with W ``[out, in]``. Change the weights through `replace` only: packed copies depend on them.

    Differentiable in x; a quantised weight is dequantised anew for the backward pass, layer by layer.

    With ``prepack`` a bf16 CPU layer keeps, from the first small batch on, a blocked copy: for AMX tiles by our own
    twin, else by oneDNN. Up to ``PACKED_ROWS`` rows it is 1.3 to 2 times faster than the plain layout, above that
    slower. It costs the weights' memory once more and applies only where no gradient is wanted. A quantised layer is
    packed likewise and then used for any number of rows, with bf16 activations.
    """

    PACKED_ROWS = 256

    __slots__ = ("_gated", "_packed", "bias", "prepack", "weight")

    def __init__(
        self, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None, *, prepack: bool = False
    ) -> None:
        self.prepack = prepack
        self.replace(weight, bias)

    def replace(self, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None) -> None:
        """Takes new weights in place of the old ones."""
        self.weight, self.bias = weight, bias
        self._packed: Any | None = None
        self._gated: Any | None = None
        self.prepack = self.prepack and can_prepack(weight)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]: as it is, or dequantised to ``dtype``."""
        return dequantize(self.weight, dtype)

    def _is_small(self, x: torch.Tensor) -> bool:
        return self.prepack and 0 < x.shape[0] <= self.PACKED_ROWS and not torch.is_grad_enabled()

    def _takes_packed(self, x: torch.Tensor) -> bool:
        """Whether a quantised weight meets x in its packed form."""
        return self.prepack and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.weight, torch.Tensor):
            if not self._takes_packed(x):
                return quantized_linear(x, self.weight, self.bias)
            if self._packed is None:
                self._packed = cpu_quantized.PackedQuantized(self.weight, self.bias)
            return self._packed(x)
        if not self._is_small(x):
            return F.linear(x, self.weight, self.bias)
        if cpu_linear.available():
            if self._packed is None:
                self._packed = cpu_linear.PackedLinear(self.weight, self.bias)
            return self._packed(x)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 32)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def swiglu(self, x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """``silu(gate) * up`` of a layer whose rows are [gate; up]: [T, in] -> [T, out / 2]."""
        if backend is not None:
            return swiglu(self(x), backend=backend)
        if not isinstance(self.weight, torch.Tensor):
            if self._takes_packed(x):
                if self._gated is None:
                    self._gated = cpu_quantized.PackedQuantized(self.weight, self.bias, gated=True)
                return self._gated(x)
        elif self._is_small(x) and cpu_linear.available():
            if self._gated is None:
                self._gated = cpu_linear.PackedLinear(self.weight, self.bias, gated=True)
            return self._gated(x)
        return swiglu(self(x), backend=backend)


def can_prepack(weight: torch.Tensor | QuantizedWeight) -> bool:
    """Whether a packed bf16 product exists on this machine for this weight."""
    if not isinstance(weight, torch.Tensor):
        return weight.device.type == "cpu" and cpu_quantized.available()
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
