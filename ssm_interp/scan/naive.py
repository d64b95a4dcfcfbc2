"""The definition, as loops over Python floats (float64) that anyone can read. Slow: the oracle of the tests.

Source: Mamba (arXiv 2312.00752) eq. 2 with B discretised as dt B, and Ali et al. (arXiv 2403.01590) for its unrolling.
"""

from __future__ import annotations

from math import exp
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ssm_interp.scan.terms import Terms


def naive_attention(terms: Terms) -> Float64[Tensor, "b h t s"]:
    """`M[t,s] = sum_n C_t[n] prod_{r=s+1..t} exp(dt_r A[n]) dt_s B_s[n]` for s <= t, else 0.

    Cost: O(B H L^2 N) steps of Python. Raises nothing of its own.

    Example:
        >>> naive_attention(terms)[0, 1, 4, 2]           # what position 4 reads from position 2 in head 1
    """
    dt, A, B, C = _lists(terms)
    batch, length, heads, n_states = terms.batch, terms.length, terms.heads, terms.state_size
    M = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // terms.groups)
            for t in range(length):
                row = [0.0] * length
                for n in range(n_states):
                    decay = 1.0  # prod_{r=s+1..t} exp(dt_r A[n])
                    for s in range(t, -1, -1):
                        row[s] += C[b][t][group][n] * decay * dt[b][s][h] * B[b][s][group][n]
                        decay *= exp(dt[b][s][h] * A[h][n])
                M[b, h, t] = torch.tensor(row, dtype=torch.float64)
    return M


def naive_scan(terms: Terms) -> tuple[Float64[Tensor, "b t h p"], Float64[Tensor, "b t h p n"]]:
    """`state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t`, `y_t = C_t state_t` from a state of zeros: y and all states.

    Cost: O(B L H P N) steps of Python. Raises nothing of its own.

    Example:
        >>> y, states = naive_scan(terms)
    """
    dt, A, B, C = _lists(terms)
    x = terms.x.double().tolist()
    y = torch.zeros(terms.x.shape, dtype=torch.float64)
    states = torch.zeros(*terms.x.shape, terms.state_size, dtype=torch.float64)
    for b in range(terms.batch):
        for h in range(terms.heads):
            group = h // (terms.heads // terms.groups)
            for p in range(terms.head_dim):
                state = [0.0] * terms.state_size
                for t in range(terms.length):
                    for n in range(terms.state_size):
                        written = dt[b][t][h] * B[b][t][group][n] * x[b][t][h][p]
                        state[n] = exp(dt[b][t][h] * A[h][n]) * state[n] + written
                    states[b, t, h, p] = torch.tensor(state, dtype=torch.float64)
                    y[b, t, h, p] = sum(c * value for c, value in zip(C[b][t][group], state, strict=True))
    return y, states


def _lists(terms: Terms) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """dt, A (a scalar decay written out for every state dimension), B and C as nested lists."""
    A = terms.A.expand(-1, terms.state_size)
    return terms.dt.double().tolist(), A.double().tolist(), terms.B.double().tolist(), terms.C.double().tolist()
