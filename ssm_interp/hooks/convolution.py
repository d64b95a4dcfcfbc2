"""The one-position update of the mixers' convolution, for rows that share what came before."""

from __future__ import annotations

from torch import Tensor
from transformers.activations import ACT2FN

CONV_UPDATE = "causal_conv1d_update"


def shared_update(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """What the host's `causal_conv1d_update` gives for rows that start from the same inputs; no state is updated.

    Args:
        hidden_states: the newest inputs, `[blocks n, d, 1]`.
        conv_state: the inputs before them, `[n, d, k]`, shared by all blocks of n rows.
        weight, bias, activation: `[d, k]`, `[d]`, and the name of an activation, as the host has them.

    Cost: one multiplication per row and channel, in place of a convolution over a copy of every row's inputs.
    """
    taps = weight.shape[-1]
    before = (conv_state[..., conv_state.shape[-1] - (taps - 1) :] * weight[:, :-1]).sum(-1)  # n d
    before = before if bias is None else before + bias
    rows = hidden_states.reshape(-1, *before.shape)  # blocks n d
    found = (before + rows * weight[:, -1]).reshape(hidden_states.shape)
    found = found if activation is None else ACT2FN[activation](found)
    return found.to(hidden_states.dtype)
