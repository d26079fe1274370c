# SPDX-License-Identifier: Apache-2.0
"""Convolutions as layers with Kronecker factors; patches are never formed where a kernel serves."""

from typing import cast

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature.layers import KroneckerLayer


class ConvolutionLayer(KroneckerLayer):
    """``nn.Conv2d`` and ``nn.Conv1d``, with one block for each group of channels.

    The input-side factor is that of the patches, in the order of ``weight.flatten(1)``. A one-dimensional
    convolution is one of images of height one.
    """

    # By exploratory runs of a small ResNet, which are not kept, *expand* learns faster.
    pools = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def blocks(self) -> int:  # type: ignore[override]
        """The number of groups."""
        return self._conv.groups

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.module)

    @property
    def _flat(self) -> bool:
        return isinstance(self.module, nn.Conv1d)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Return ``[C_out, C_in/groups·K1·K2]``."""
        return weight.flatten(1)

    def examples(self, layer_input: Tensor) -> int:
        """Return the number of images; an input without a batch dimension is one."""
        return self._images(layer_input).shape[0]

    def positions(self, layer_input: Tensor) -> int:
        """Return the number of positions of the output, or 1 where there is one anyway."""
        x, conv = self._images(layer_input), self._geometry()
        places = 1
        for n, k, s, p, d in zip(
            x.shape[2:], conv["kernel_size"], conv["stride"], conv["padding"], conv["dilation"],
            strict=True,
        ):  # fmt: skip
            places *= (n + 2 * p - d * (k - 1) - 1) // s + 1
        return places

    def update_input_factor(
        self,
        factor: Tensor,
        layer_input: Tensor,
        *,
        decay: float | Tensor,
        scale: float | Tensor,
        reduce: bool,
    ) -> Tensor:
        """See the base class; the rows are patches."""
        return kernels.kron_factor_conv2d_update_(
            factor,
            self._images(layer_input.detach()),
            **self._geometry(),
            groups=self.blocks,
            decay=decay,
            scale=scale,
            bias=self.bias is not None,
            sharing="reduce" if reduce else "expand",
        )

    def update_output_factor(
        self,
        factor: Tensor,
        output_grad: Tensor,
        *,
        decay: float | Tensor,
        scale: float | Tensor,
        reduce: bool,
    ) -> Tensor:
        """See the base class."""
        grad = self._images(output_grad.detach())
        if reduce:
            grad = grad.sum((2, 3), keepdim=True)
        return kernels.kron_factor_conv2d_update_(
            factor, grad, kernel_size=1, groups=self.blocks, decay=decay, scale=scale
        )

    def scores(self, layer_input: Tensor, output_grad: Tensor, step: list[Tensor]) -> Tensor:
        """See the base class."""
        wide = torch.promote_types(layer_input.dtype, torch.float32)
        images, grad = self._images(layer_input.to(wide)), self._images(output_grad.to(wide))
        weight, bias = step[0].to(wide), step[1].to(wide) if len(step) > 1 else None
        geometry = self._geometry()
        output = torch.nn.functional.conv2d(
            images,
            weight.unsqueeze(2) if self._flat else weight,
            bias,
            geometry["stride"],
            geometry["padding"],
            geometry["dilation"],
            self.blocks,
        )
        return (output * grad).flatten(1).sum(1)

    def _images(self, x: Tensor) -> Tensor:
        whole = 3 if self._flat else 4
        if x.dim() < whole:
            x = x.unsqueeze(0)
        return x.unsqueeze(2) if self._flat else x

    def _geometry(self) -> dict[str, tuple[int, int]]:
        conv = self._conv
        values = {k: tuple(getattr(conv, k)) for k in ("kernel_size", "stride", "dilation")}
        values["padding"] = self._padding(conv)
        still = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0}
        if self._flat:
            values = {k: (still[k], *v) for k, v in values.items()}
        return cast(dict[str, tuple[int, int]], values)

    @staticmethod
    def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
        if conv.padding == "valid":
            return (0,) * len(conv.kernel_size)
        if conv.padding == "same":
            reach = zip(conv.dilation, conv.kernel_size, strict=True)
            return tuple(d * (k - 1) // 2 for d, k in reach)
        return tuple(cast(tuple[int, ...], conv.padding))


def why_not(conv: nn.Module) -> str | None:
    """Return why a convolution has no factors here, or None."""
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported"
    if conv.padding == "same":
        reach = zip(conv.dilation, conv.kernel_size, strict=True)
        if any(d * (k - 1) % 2 for d, k in reach):
            return "its padding is not symmetric"
    return None


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution this file knows (not a transposed or lazy one)."""
    return type(module) in (nn.Conv1d, nn.Conv2d) and not isinstance(
        module.weight, torch.nn.parameter.UninitializedParameter
    )
