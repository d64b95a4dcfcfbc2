"""Pure functions on tensors: the recurrence, the matrix it unrolls to, and edges taken out of it. Knows no model."""

from ssm_interp.errors import TermsError
from ssm_interp.scan.attention import attention, attention_rows, reduced_attention
from ssm_interp.scan.distance import distance_sums
from ssm_interp.scan.edges import edge_products
from ssm_interp.scan.initial import leave, one_step, read_initial
from ssm_interp.scan.knockout import knockout, removed
from ssm_interp.scan.recurrence import read, scan, states, write
from ssm_interp.scan.terms import Terms
from ssm_interp.scan.unified import Convolution, unified_rows

__all__ = [
    "Convolution",
    "Terms",
    "TermsError",
    "attention",
    "attention_rows",
    "distance_sums",
    "edge_products",
    "knockout",
    "leave",
    "one_step",
    "read",
    "read_initial",
    "reduced_attention",
    "removed",
    "scan",
    "states",
    "unified_rows",
    "write",
]
