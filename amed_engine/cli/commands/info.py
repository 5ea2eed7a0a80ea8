"""`amed info`: what a report of a problem should say."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--measure", metavar="MODEL", help="Measure this model's mean answer, of which a first step is made.")
def info(as_json: bool, measure: str | None) -> None:
    """Versions, devices, active kernels and bundled models."""
    from amed_engine.cli.environment import facts as gather
    from amed_engine.cli.environment import mean_facts

    facts = gather() if measure is None else mean_facts(measure)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for section, entries in facts.items():
        click.echo(section)
        for name, value in entries.items():
            click.echo(f"  {name:<12} {value if isinstance(value, str) else ', '.join(map(str, value))}")
