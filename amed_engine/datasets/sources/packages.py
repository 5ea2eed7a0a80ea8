"""Samples of an exported loop, as `amed_engine.load_package` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from amed_engine.datasets.sources import labels as rows
from amed_engine.datasets.sources.base import Source, check_options, nothing_global, stored_kind, stored_shape
from amed_engine.engine import identity as identities
from amed_engine.engine.export.package import Package
from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError


@dataclass(frozen=True, eq=False)
class PackageSource(Source):
    """What the file of a sampling loop draws; its guidance is fixed in it."""

    package: Package

    @classmethod
    def open(cls, package: Package, guidance_scale: Any, stored: Any, options: dict[str, Any]) -> PackageSource:
        """Raises ConfigError for another guidance than the file's, or a way to store that its samples do not have."""
        check_options("a package", options, "all but seeds and labels is fixed in the file")
        own, shape = package.facts.plan.guidance_scale, package.facts.shape
        if guidance_scale not in (None, own):
            raise ConfigError(
                f"this package was exported with guidance_scale={own}, got {guidance_scale}; leave it out, or export another"
            )
        kind = stored_kind(stored, shape)
        told = identities.small(_identity(package))
        return cls(stored_shape(kind, shape), kind, told, identities.device_name(package.device), package)

    def _run(self, seeds: list[int], labels: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        with nothing_global("the package", "export a model without noise or dropout of its own", self.package.device):
            result = self.package.run(seeds, rows.told(labels))
        return result.images, rows.kept(result.labels)

    def check_labels(self, labels: Any, count: int) -> np.ndarray | None:
        facts = self.package.facts
        kind, levels = "vector" if facts.continuous else "rows", (facts.plan.sigmas[-1], facts.plan.sigmas[0])
        return rows.model_labels(
            labels, Model(self.package.run, facts.shape, facts.label_dim, *levels, label_kind=kind), count
        )


def _identity(package: Package) -> dict[str, Any]:
    facts = package.facts
    plan = facts.to_json()["plan"]
    return {
        "kind": "package",
        "model": facts.format,
        "file": None if package.loaded is None else package.loaded.sha256(),
        "fingerprint": facts.fingerprint,
        "shape": list(facts.shape),
        "label_dim": facts.label_dim,
        "label_kind": "vector" if facts.continuous else "rows",
        "dtype": facts.dtype,
        "max_batch": facts.max_batch,
        "plan": plan,
        "predictor": None,  # it is in the file
        "guidance_scale": plan["guidance_scale"],
        **identities.arithmetic(package.device),
    }
