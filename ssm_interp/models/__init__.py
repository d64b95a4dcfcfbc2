"""Loading models by name, and the tiny trained ones that ship with the package."""

from ssm_interp.errors import LoadError
from ssm_interp.models.load import EMBEDDED, INDUCTION, load, load_outline, load_tokenizer

__all__ = ["EMBEDDED", "INDUCTION", "LoadError", "load", "load_outline", "load_tokenizer"]
