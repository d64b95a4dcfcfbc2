"""Loading models by name, and the tiny trained ones that ship with the package."""

from ssm_interp.errors import LoadError
from ssm_interp.models.load import EMBEDDED, INDUCTION, SHIPPED, load, load_outline, load_tokenizer
from ssm_interp.models.weights import weights_hash

__all__ = ["EMBEDDED", "INDUCTION", "SHIPPED", "LoadError", "load", "load_outline", "load_tokenizer", "weights_hash"]
