"""`python -m ssm_interp` is `ssm-interp`."""

from ssm_interp.cli import main

main()
