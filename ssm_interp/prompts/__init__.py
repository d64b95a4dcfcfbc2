"""What is asked of a model: facts, prompts, the roles of their tokens, batches of them."""

from ssm_interp.errors import PromptError, SharedTokenWarning
from ssm_interp.prompts.answers import shared_first_tokens, warn_shared
from ssm_interp.prompts.counterfact import hub_row, original_idx
from ssm_interp.prompts.facts_file import load_prompts, save_prompts
from ssm_interp.prompts.induction import INDUCTION_SYMBOLS, induction_prompts, induction_roles
from ssm_interp.prompts.prompt import Fact, Prompt, with_ids
from ssm_interp.prompts.roles import Batch, Encoding, TokenizedPrompt, check_role, encode, pad, tokenize
from ssm_interp.words import ROLES

__all__ = [
    "INDUCTION_SYMBOLS",
    "ROLES",
    "Batch",
    "Encoding",
    "Fact",
    "Prompt",
    "PromptError",
    "SharedTokenWarning",
    "TokenizedPrompt",
    "check_role",
    "encode",
    "hub_row",
    "induction_prompts",
    "induction_roles",
    "load_prompts",
    "original_idx",
    "pad",
    "save_prompts",
    "shared_first_tokens",
    "tokenize",
    "warn_shared",
    "with_ids",
]
