"""`amed info`: what a report of a problem should say."""

from __future__ import annotations

import json
from typing import Any

import click

from amed_engine.cli.network import facts_options, no_verify, opened


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--measure", metavar="MODEL", help="Measure this model's mean answer, of which a first step is made.")
@facts_options
@click.option("--sigma-max", type=float, help="Noise level to measure at.", show_default="the model's")
@no_verify
def info(as_json: bool, measure: str | None, sigma_max: float | None, verify: bool, **told: Any) -> None:
    """Versions, devices, active kernels and bundled models."""
    from amed_engine.cli.environment import facts as gather
    from amed_engine.cli.environment import mean_facts

    if measure is None and not (verify and all(value is None for value in (sigma_max, *told.values()))):
        raise click.UsageError("what is told of a model is for --measure MODEL; leave it out, or name one")
    model = None if measure is None else opened(measure, None, verify=verify, **told)[0]
    facts = gather() if measure is None else mean_facts(measure, model, sigma_max)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for section, entries in facts.items():
        click.echo(section)
        for name, value in entries.items():
            click.echo(f"  {name:<12} {value if isinstance(value, str) else ', '.join(map(str, value))}")
