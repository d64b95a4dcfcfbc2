"""Recipes: an experiment as data, in a TOML file; `ssm-interp run` runs it."""

from ssm_interp.errors import RecipeError
from ssm_interp.recipes.lines import key_lines
from ssm_interp.recipes.read import read_recipe, recipe_file, shipped
from ssm_interp.recipes.run import Findings, run_recipe
from ssm_interp.recipes.schema import Recipe

__all__ = ["Findings", "Recipe", "RecipeError", "key_lines", "read_recipe", "recipe_file", "run_recipe", "shipped"]
