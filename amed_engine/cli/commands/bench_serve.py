"""`amed bench-serve`: an open-loop load on a server, or on an engine in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from amed_engine.cli.options import check_writable, default_device, given_beside, show
from amed_engine.errors import AmedError, ConfigError

if TYPE_CHECKING:
    from amed_engine.serving.load import Load, LoadReport, Mix

IN_PROCESS = ("weights", "device", "rows")


class MixType(click.ParamType):
    """Numbers and weights, 3:6,5:3,10:1."""

    name = "mix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mix:
        from amed_engine.serving.load import Mix

        try:
            return value if isinstance(value, Mix) else Mix.parse(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command("bench-serve")
@click.option("--url", help="A server to ask, e.g. http://127.0.0.1:8000.", show_default="an engine in this process")
@click.option("--model", help="Its name or path; with --url, which of the server's.", show_default="digits")
@click.option("--weights", type=click.Path(exists=True), help="File or folder of a published model's weights.")
@click.option("--device", help="Where to run: cpu, cuda, cuda:1 ...", show_default="a GPU if there is one")
@click.option("--rows", type=click.IntRange(min=1), default=64, help="Samples that are computed at once.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Requests a second, at random times.")
@click.option("--saturate", is_flag=True, help="All at once.")
@click.option("--outstanding", type=click.IntRange(min=1), help="So many at any time; the next when one is done.")
@click.option("--requests", type=click.IntRange(min=1), default=200, help="How many in all.")
@click.option("--seed", type=int, default=0, help="Of the times and of the order; the same seed asks the same.")
@click.option("--nfe", type=MixType(), default="5", help="Evaluations a sample and their weights, e.g. 3:6,5:3,10:1.")
@click.option("--samples", type=MixType(), default="1", help="Samples a request and their weights, e.g. 1:8,4:2.")
@click.option("--solver", help="Of all requests.", show_default="the best at hand")
@click.option(
    "--guidance", "guidance_scale", type=float, help="Strength of classifier-free guidance.", show_default="none"
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="Seconds until a request is given up and counts as failed.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def bench_serve(
    url, model, weights, device, rows, rate, saturate, outstanding, solver, guidance_scale, json_file, **asked
) -> None:
    """Offer a load: throughput, latency from the time a request was due, share of useful rows."""
    if (rate is not None) + saturate + (outstanding is not None) != 1:
        raise click.UsageError("a load is paced by one of --rate, --saturate and --outstanding; pass one of them")
    check_writable(None if json_file == "-" else json_file, streams=True)
    from amed_engine.serving.load import Load

    load = Load(rate=rate, outstanding=outstanding, **asked)
    options = {"solver": solver, "guidance_scale": guidance_scale}
    if url is not None:
        report = _of_server(load, url, model, options)
    else:
        report = _of_engine(
            load, {"model": model or "digits", "weights": weights, "device": device, "rows": rows}, options
        )
    show(report, json_file)
    if not report.answered:
        raise AmedError("no request was answered")


def _of_server(load: Load, url: str, model: str | None, options: dict[str, Any]) -> LoadReport:
    taken = set(_names()) - set(IN_PROCESS)
    if given := given_beside(taken):
        raise click.UsageError(f"the server at --url has its own model and rows; leave {', '.join(given)} out")
    import asyncio

    from amed_engine.serving.load import ServerTarget, measure

    async def run() -> LoadReport:
        async with ServerTarget(url, model=model, **options) as target:
            return await measure(load, target)

    return asyncio.run(run())


def _names() -> list[str]:
    return [option.name or "" for option in click.get_current_context().command.params]


def _of_engine(load: Load, engine: dict[str, Any], options: dict[str, Any]) -> LoadReport:
    import asyncio

    from amed_engine import ContinuousSampler
    from amed_engine.serving.load import EngineTarget, measure

    # Nothing of a load that is due at once is refused; one at a rate meets the queue of a server.
    due = sum(len(arrival.seeds) for arrival in load.arrivals()) if load.rate is None else 0
    engine["device"] = engine["device"] or default_device()
    with ContinuousSampler(**engine, queue=max(1024, due)) as sampler:
        sampler.warmup()
        return asyncio.run(measure(load, EngineTarget(sampler, **options)))
