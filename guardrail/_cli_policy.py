"""`guardrail policy`: look at policies, check them, compare them, replay what was decided."""

from __future__ import annotations

from typing import Annotated

import typer

from guardrail.policy import Policy

__all__ = ["policy_app"]

policy_app = typer.Typer(help="Look at policies, check and compare them.")


@policy_app.command("show")
def policy_show(
    policy: Annotated[str, typer.Argument(metavar="[NAME|FILE]")] = "balanced",
    every: Annotated[bool, typer.Option("--all", help="All 19 categories, differing or not.")] = (
        False
    ),
) -> None:
    """Print a policy's grid: direction x category x severity -> action."""
    loaded = Policy.load(policy)

    from guardrail._render import console, grid

    console().print(grid(loaded, every=every))


@policy_app.command("validate")
def policy_validate(policy: Annotated[str, typer.Argument(metavar="FILE")]) -> None:
    """Check a policy file; says `ok`, or what is wrong and where."""
    print(f"ok: {Policy.load(policy).id}")
