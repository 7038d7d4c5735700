"""A frozen linear layer: weights, dense or quantised, and on a CPU a second copy of them in blocked order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import cpu_blocks, cpu_linear, cpu_quantized
from ..kernels.activation import swiglu
from ..kernels.quantized_linear import QuantizedWeight, dequantize, quantized_linear


class Linear:
    """``y = x W^T + b`` with W ``[out, in]``. Change the weights through `replace` only: packed copies depend on them.

    Differentiable in x; a quantised weight is dequantised anew for the backward pass, layer by layer.

    With ``prepack`` a bf16 CPU layer keeps, from the first small batch on, a blocked copy: for AMX tiles by our own
    twin, else by oneDNN. Below 256 rows it is 1.3 to 2 times faster than the plain layout, above that slower, so whole
    blocks of 256 rows meet the plain weight and the rest the copy (see `cpu_blocks`). It costs the weights' memory once
    more and applies only where no gradient is wanted. A quantised layer is packed at its first use with bf16
    activations, in place of its plain form, and used so for any number of rows.
    """

    __slots__ = (
        "_gated",
        "_packed",
        "_weight",
        "bias",
        "in_features",
        "num_bytes",
        "out_features",
        "prepack",
        "quantized",
    )

    def __init__(
        self, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None, *, prepack: bool = False
    ) -> None:
        self.prepack = prepack
        self.replace(weight, bias)

    def replace(self, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None) -> None:
        """Takes new weights in place of the old ones."""
        self._weight: torch.Tensor | QuantizedWeight | None = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.quantized = not isinstance(weight, torch.Tensor)
        self.num_bytes = weight.nbytes if isinstance(weight, torch.Tensor) else weight.num_bytes
        self._packed: Any | None = None
        self._gated: Any | None = None
        self.prepack = self.prepack and can_prepack(weight)

    @property
    def weight(self) -> torch.Tensor | QuantizedWeight:
        """W, dense or quantised; a quantised one that is kept in its packed order only is put in the plain one anew."""
        if self._weight is not None:
            return self._weight
        packed = self._packed if self._packed is not None else self._gated
        assert packed is not None
        return packed.unpack()

    def _pack_quantized(self, *, gated: bool) -> cpu_quantized.PackedQuantized:
        weight = self.weight
        assert not isinstance(weight, torch.Tensor)
        packed = cpu_quantized.PackedQuantized(weight, self.bias, gated=gated)
        self._weight = None  # the packed form holds all of it
        return packed

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]: as it is, or dequantised to ``dtype``."""
        return dequantize(self.weight, dtype)

    def _takes_packed(self, x: torch.Tensor) -> bool:
        """Whether a quantised weight meets x in its packed form."""
        return self.prepack and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantized:
            if self._takes_packed(x):
                if self._packed is None:
                    self._packed = self._pack_quantized(gated=False)
                return self._packed(x)
            weight = self.weight
            assert not isinstance(weight, torch.Tensor)
            return quantized_linear(x, weight, self.bias)
        weight = self._weight
        assert isinstance(weight, torch.Tensor)
        if torch.is_grad_enabled():
            return F.linear(x, weight, self.bias)
        return cpu_blocks.linear(x, weight, self.bias, rest=self._packed_rows if self.prepack else None)

    def _packed_rows(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """A few rows against the packed copy of a dense weight."""
        if cpu_linear.available():
            if self._packed is None:
                self._packed = cpu_linear.PackedLinear(self.dense(x.dtype), self.bias)
            self._packed(x, out)
            return
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, 32)
        filled = cpu_blocks.fill(x)
        out.copy_(torch.ops.mkldnn._linear_pointwise(filled, self._packed, self.bias, "none", [], "")[: x.shape[0]])

    def swiglu(self, x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """``silu(gate) * up`` of a layer whose rows are [gate; up]: [T, in] -> [T, out / 2]."""
        if backend is not None:
            return swiglu(self(x), backend=backend)
        if self.quantized:
            if self._takes_packed(x):
                if self._gated is None:
                    self._gated = self._pack_quantized(gated=True)
                return self._gated(x)
        elif self._gates_packed(x):
            return self._packed_swiglu(x)
        return swiglu(self(x), backend=backend)

    def _gates_packed(self, x: torch.Tensor) -> bool:
        """Whether some rows of x meet the packed form of a dense gated layer, which applies the activation, too."""
        return (
            self.prepack
            and x.shape[0] % cpu_blocks.BLOCK != 0
            and not torch.is_grad_enabled()
            and cpu_linear.available()
        )

    def _packed_swiglu(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        whole = num_rows - num_rows % cpu_blocks.BLOCK
        if self._gated is None:
            self._gated = cpu_linear.PackedLinear(self.dense(x.dtype), self.bias, gated=True)
        if not whole:
            return self._gated(x)
        out = x.new_empty(num_rows, self.out_features // 2)
        out[:whole] = swiglu(cpu_blocks.linear(x[:whole], self.dense(x.dtype), self.bias))
        self._gated(x[whole:], out[whole:])
        return out


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
