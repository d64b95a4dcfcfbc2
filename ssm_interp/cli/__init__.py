"""The command line: `ssm-interp flow`, `features`, `edges`, `run`, `heatmap`, `attention` and `check`."""

from ssm_interp.cli import edges, features, flow, look, run  # noqa: F401 - each adds its commands to the app
from ssm_interp.cli.app import app, main

__all__ = ["app", "main"]
