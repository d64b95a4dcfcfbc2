"""What is asked of a model: facts, prompts, the roles of their tokens, batches of them."""

from ssm_interp.prompts.prompt import Fact, Prompt, PromptError, load_prompts, save_prompts
from ssm_interp.prompts.roles import ROLES, Batch, Encoding, TokenizedPrompt, check_role, encode, pad, tokenize

__all__ = [
    "ROLES",
    "Batch",
    "Encoding",
    "Fact",
    "Prompt",
    "PromptError",
    "TokenizedPrompt",
    "check_role",
    "encode",
    "load_prompts",
    "pad",
    "save_prompts",
    "tokenize",
]
