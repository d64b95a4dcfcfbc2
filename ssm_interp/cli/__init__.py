"""The command line: `ssm-interp flow`, `run`, `heatmap`, `attention` and `check`."""

from ssm_interp.cli import flow, look, run  # noqa: F401 - each adds its commands to the app
from ssm_interp.cli.app import app, main

__all__ = ["app", "main"]
