"""Circuits: which groups of edges a behaviour needs, by exact knockouts of all the others."""

from ssm_interp.circuits.search import Circuit, find_circuit
from ssm_interp.circuits.trials import fact_roles

__all__ = ["Circuit", "fact_roles", "find_circuit"]
