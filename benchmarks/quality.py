"""What bench_quality.py measures: solvers on one network from the same latents, against one fine solution."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from amed_engine import zoo
from amed_engine.engine.model import Model
from amed_engine.engine.resolve import resolve
from amed_engine.engine.sampler import Sampler
from amed_engine.engine.seeds import draw
from amed_engine.errors import ConfigError
from amed_engine.evaluation.comparison import REFERENCE, TRAINING_FREE, Setting, learned_name
from amed_engine.evaluation.metrics import Distances, class_accuracy, extractor, frechet_distance, per_image_rmse
from amed_engine.evaluation.metrics.features import Extractor
from amed_engine.evaluation.quality import Known, bundled_digits, closeness, know
from amed_engine.networks import EDMPrecond

ROOT = Path(__file__).resolve().parents[1]
REFERENCE_DIGITS = ROOT.parent / "shared" / "goldens" / "reference_digits" / "reference_digits.safetensors"
SCHEDULES = ("time_uniform", "polynomial", "logsnr")
FEATURES = ("pixels", "digits")


class Absent(Exception):
    """A network that is not here."""


@dataclass(frozen=True)
class Yardstick:
    """A network of digits, what to start from (seeds, or latents), the fine solution of it, and what both are known by."""

    name: str
    model: Model
    start: list[int] | Tensor
    labels: Tensor | None
    truth: Tensor
    reference: str
    setting: Setting
    known: dict[str, tuple[Extractor, Known, Known]]  # features -> extractor, of the truth, of the data

    def header(self) -> dict[str, Any]:
        """What makes rows comparable."""
        start = f"0-{len(self.start) - 1}"
        kind = "latents" if isinstance(self.start, Tensor) else "seeds"
        return {"network": self.name, "samples": len(self.start), kind: start, "reference": self.reference}


def yardstick(name: str, samples: int, setting: Setting, bar: tqdm) -> Yardstick:
    """digits, or reference_digits where it is beside the checkout. Raises Absent."""
    if name == "reference_digits":
        model, latents, truth = reference_digits(samples)
        start: list[int] | Tensor = latents.to(setting.device or "cpu", setting.dtype)
        plan, labels = "heun, polynomial rho=7, 40 intervals, NFE 80 (recorded)", None
    else:
        model, start = resolve(name), list(range(samples))
        fine = setting.sampler(model, **REFERENCE)
        bar.reset(len(start) * fine.nfe)
        truth, plan = setting.images(fine, start, bar), fine.plan.describe()
        labels = draw(start, model.shape or (), model.label_dim)[1]
    data, known = bundled_digits(), {}
    for features in FEATURES:
        extract = extractor(features)
        known[features] = extract, know(truth, extract), know(data, extract)
    return Yardstick(name, model, start, labels, truth, plan, setting, known)


def reference_digits(samples: int) -> tuple[Model, Tensor, Tensor]:
    if not REFERENCE_DIGITS.is_file():
        raise Absent(f"reference_digits is not at {REFERENCE_DIGITS}")
    with safe_open(REFERENCE_DIGITS, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    network = EDMPrecond(**config)
    prefix = "weights/"
    network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    if samples > len(tensors["latents"]):
        raise ConfigError(f"reference_digits has {len(tensors['latents'])} latents, got samples={samples}")
    return resolve(network), tensors["latents"][:samples], tensors["fine_reference"][:samples]


def samplers(
    yard: Yardstick, nfes: Sequence[int], schedules: Sequence[str], only: Sequence[str], predictors: Sequence[str]
) -> Iterator[tuple[str, Sampler]]:
    """(name, sampler): predictors, given as [NAME=]PATH, or else the bundled ones; then every training-free solver on every
    schedule with and without an analytic first step, wherever these spend that number of evaluations."""
    learned = [(None, zoo.bundled_predictor(yard.model.name, nfe)) for nfe in nfes] if yard.model.name else []
    named = [given.rpartition("=")[::2] for given in predictors]
    for name, predictor in named or learned:
        if predictor is not None:
            sampler = yard.setting.sampler(yard.model, predictor)
            label = name or learned_name(sampler)
            if sampler.nfe in nfes and (not only or label in only):
                yield label, sampler
    for name, (solver, options) in TRAINING_FREE.items():
        if only and name not in only:
            continue
        for nfe, schedule, afs in ((n, s, a) for n in nfes for s in schedules for a in (True, False, "mean")):
            wish = {"solver": solver, "solver_options": options, "nfe": nfe, "schedule": schedule, "afs": afs}
            try:
                yield name, yard.setting.sampler(yard.model, **wish)
            except ConfigError as error:
                if "not a whole number of intervals" not in str(error):
                    raise


def measure(yard: Yardstick, name: str, sampler: Sampler, bar: tqdm) -> dict[str, Any]:
    """One row: the plan, and how far its samples are from the fine solution, from the data, and from their classes."""
    bar.reset(len(yard.start) * sampler.nfe)
    bar.set_description(f"{name} {sampler.nfe}")
    images, plan = yard.setting.images(sampler, yard.start, bar), sampler.plan
    distance = Distances.of(per_image_rmse(images, yard.truth))
    row = {
        "solver": name,
        "nfe": sampler.nfe,
        "schedule": plan.schedule,
        "afs": plan.afs,
        "learned": name not in TRAINING_FREE,
    }
    row |= {"plan": plan.describe(), "rmse": distance.rmse, "median": distance.median, "psnr": distance.psnr}
    for features, (extract, truth, data) in yard.known.items():
        own = Known.of(extract(images))
        real = closeness(own, data)
        row[f"fd_reference_{features}"] = frechet_distance(own.statistics, truth.statistics)
        row |= {f"fd_data_{features}": real.frechet, f"precision_{features}": real.precision}
        row[f"recall_{features}"] = real.recall
    if yard.labels is not None:
        row["class_accuracy"] = class_accuracy(images, yard.labels)
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
