"""The operator and the causal convolution before it as one matrix: what targets read from the convolution's inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.errors import TermsError


class Convolution(NamedTuple):
    """A causal convolution, each channel by itself.

    Attributes:
        taps: `[h p k]`; `taps[..., i]` weighs the input i positions before.
        bias: `[h p]`.

    Example:
        >>> Convolution(torch.tensor([[[1.0, 0.5]]]), torch.zeros(1, 1))(torch.ones(1, 3, 1, 1)).flatten().tolist()
        [1.0, 1.5, 1.5]
    """

    taps: Float[Tensor, "h p k"]
    bias: Float[Tensor, "h p"]

    def __call__(self, inputs: Float[Tensor, "b t h p"]) -> Float[Tensor, "b t h p"]:
        """`c_t = bias + sum_i taps_i inputs_{t-i}`; there is nothing before the first position. O(L H P K)."""
        return self.lagged(inputs).mul_(self.taps).sum(-1) + self.bias

    def lagged(self, inputs: Float[Tensor, "b t h p"]) -> Float[Tensor, "b t h p k"]:
        """The input of each tap at each position: `[..., i]` is that of i positions before, 0 where there is none."""
        length, most = inputs.shape[1], self.taps.shape[-1]
        before = pad(inputs, (0, 0, 0, 0, most - 1, 0))  # b k-1+t h p
        return torch.stack([before[:, most - 1 - lag : most - 1 - lag + length] for lag in range(most)], dim=-1)

    def transposed(self, coefficients: Float[Tensor, "*rows s h p"]) -> Float[Tensor, "*rows s h p"]:
        """Coefficients of the outputs as coefficients of the inputs: `sum_i taps_i coefficients_{s+i}`. O(L H P K)."""
        of_inputs = coefficients * self.taps[..., 0]
        for lag in range(1, min(self.taps.shape[-1], coefficients.shape[-3])):
            of_inputs[..., :-lag, :, :] += coefficients[..., lag:, :, :] * self.taps[..., lag]
        return of_inputs


def unified_rows(
    attention: Float[Tensor, "b h r s"],
    convolution: Convolution,
    secant: Float[Tensor, "b s h p"],
    gate: Float[Tensor, "b r h p"],
) -> Float[Tensor, "b r s_and_bias h p"]:
    """Rows of `gate (M + D) Z Conv`: what targets read of the convolution's inputs, channel by channel.

    With c the outputs of the convolution and x = Z c, an SSM layer's features before the output projection are
    `gate_t (M x + D x)_t = sum_s rows[t, s] inputs_s + rows[t, -1] bias`. Z = sigmoid(c) is the slope of the secant of
    SiLU from 0 to c; it, M and the gate are held fixed, and then this is exact, not an approximation.

    Args:
        attention: rows of M + D, D on their own positions, `[b h r s]`.
        convolution: taps and bias.
        secant: Z, `[b s h p]`; 0 where x is blanked (padding).
        gate: what each feature is multiplied by behind the operator, at the rows' positions.

    Returns:
        `[b r s+1 h p]`; the last column belongs to the convolution's bias.

    Raises:
        TermsError: shapes that do not belong together.

    Cost: O(r L H P K) time, O(r L H P) memory.
    Source: Zimerman et al. (arXiv 2405.16504) section 3.2, and a column for the bias, without which it is not exact.

    Example:
        >>> rows = unified_rows(M + torch.diag_embed(D), convolution, secant, gate)         # doctest: +SKIP
        >>> torch.einsum("brshp,bshp->brhp", rows[:, :, :-1], inputs) + rows[:, :, -1] * bias   # doctest: +SKIP
    """
    b, h, r, s = attention.shape
    p = secant.shape[-1]
    wanted = {"secant": ([b, s, h, p], secant), "gate": ([b, r, h, p], gate), "bias": ([h, p], convolution.bias)}
    for name, (shape, tensor) in wanted.items():
        if list(tensor.shape) != shape:
            raise TermsError(f"attention [b h r s] = {[b, h, r, s]} wants {name} {shape}, got {list(tensor.shape)}")
    coefficients = einsum(attention, secant, "b h r s, b s h p -> b r s h p")
    rows = torch.cat([convolution.transposed(coefficients), coefficients.sum(2, keepdim=True)], dim=2)
    return rows * rearrange(gate, "b r h p -> b r 1 h p")
