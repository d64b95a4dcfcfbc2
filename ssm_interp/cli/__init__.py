"""The command line: `ssm-interp flow`, `run`, `heatmap`, `edges`, `circuit`, `features`, `attention` and `check`."""

import sys

try:
    from ssm_interp.cli.app import app, main
except KeyboardInterrupt:
    sys.stderr.write("interrupted\n")
    sys.exit(130)

__all__ = ["app", "main"]
