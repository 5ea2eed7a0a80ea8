"""Samples of an `amed_engine.Sampler`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.datasets.sources import labels as rows
from amed_engine.datasets.sources.base import Source, check_options, nothing_global, stored_kind, stored_shape
from amed_engine.engine import identity as identities
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import ConfigError


@dataclass(frozen=True, eq=False)
class SamplerSource(Source):
    """What a Sampler draws under one guidance."""

    sampler: Sampler
    guidance_scale: float | None

    @classmethod
    def open(cls, sampler: Sampler, guidance_scale: Any, stored: Any, options: dict[str, Any]) -> SamplerSource:
        """Raises ConfigError for guidance, or a way to store, that this model does not have."""
        check_options("a Sampler", options, "model, plan and solver are its own, classes are labels")
        shape = sampler.model.shape
        if shape is None:
            raise ConfigError(
                f"the model does not say what shape its samples have; pass {sampler.model.shape_asked} to the Sampler"
            )
        kind, told = stored_kind(stored, shape), _identity(sampler, guidance_scale)
        return cls(
            stored_shape(kind, shape), kind, told, identities.device_name(sampler.device), sampler, guidance_scale
        )

    def _run(self, seeds: list[int], labels: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        with nothing_global("the model", "use one without noise or dropout of its own", self.sampler.device):
            result = self.sampler.run(seeds, rows.told(labels), self.guidance_scale)
        if result.chunks > 1:
            raise ConfigError(
                f"a batch of {len(seeds)} does not fit into memory: it was drawn in {result.chunks} chunks, and the last bits "
                f"of a sample depend on the size of its batch; pass a smaller batch, {max(1, len(seeds) // 4)} say"
            )
        return result.images, rows.kept(result.labels)

    def check_labels(self, labels: Any, count: int) -> np.ndarray | None:
        return rows.model_labels(labels, self.sampler.model, count)


def _identity(sampler: Sampler, guidance_scale: Any) -> dict[str, Any]:
    model = sampler.model
    plan, predictor = sampler.running(guidance_scale)
    network = model.name or getattr(model.network, "__name__", type(model.network).__name__)
    told = {
        "kind": "sampler",
        "model": network,
        "fingerprint": fingerprint(model.network),
        "files": identities.file_hashes(model.module),
        "buffers": identities.buffers_hash(model.module),
        "shape": list(model.shape or ()),
        "label_dim": model.label_dim,
        "label_kind": model.label_kind,
        "precision": model.precision,
        "nfe": plan.nfe,
        "plan": plan.to_json(),
        "predictor": identities.predictor_hash(predictor),
        "guidance_scale": None if guidance_scale is None else float(guidance_scale),
        **sampler.settings,
        **identities.arithmetic(sampler.device),
    }
    return identities.small(told)
