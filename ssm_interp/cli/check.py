"""`ssm-interp check`: whether the hooks tell the truth about a model."""

from __future__ import annotations

from rich.table import Table

from ssm_interp.cli.ask import loaded
from ssm_interp.cli.output import console
from ssm_interp.experiments import Check
from ssm_interp.hooks.check import check as check_model


def run(check: Check) -> int:
    """The exit code: 1 where a check fails."""
    name = check.model.model
    rows = check_model(loaded(name, check.model, check.computed)[0])
    table = Table(title=name)
    for header in ("check", "measured", "", "detail"):
        table.add_column(header)
    for row in rows:
        verdict = "passed" if row.passed else "[bold red]FAILED[/bold red]"
        table.add_row(row.name, f"{row.value:.3g}", verdict, row.detail)
    console().print(table)
    return 0 if all(row.passed for row in rows) else 1
