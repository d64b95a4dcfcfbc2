"""Pure functions on tensors: the recurrence, the matrix it unrolls to, and edges taken out of it. Knows no model."""

from ssm_interp.scan.attention import attention, attention_rows, reduced_attention
from ssm_interp.scan.initial import leave, one_step, read_initial
from ssm_interp.scan.knockout import knockout, removed
from ssm_interp.scan.recurrence import read, scan, states, write
from ssm_interp.scan.terms import Terms, TermsError

__all__ = [
    "Terms",
    "TermsError",
    "attention",
    "attention_rows",
    "knockout",
    "leave",
    "one_step",
    "read",
    "read_initial",
    "reduced_attention",
    "removed",
    "scan",
    "states",
    "write",
]
