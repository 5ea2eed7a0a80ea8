"""What decides the image of a seed, as short texts: they travel in the image's file, and tell another run's images apart."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.engine.identity import buffers_hash, file_hashes, hashed, predictor_hash
from amed_engine.engine.images import difference, read_notes, refuse, seed_path
from amed_engine.engine.request import check_labels
from amed_engine.engine.sampler import Sampler
from amed_engine.solvers.plan import Plan

LONGEST = 1000  # characters of a plan, or a label, that are told in full
DRAWN, GIVEN = "drawn by each seed", "given"
# Of a plan, what says where it and its levels come from and not what it computes.
PROVENANCE = ("model", "dtype", "wrapping", "schedule", "rho")


@dataclass(frozen=True)
class Origin:
    """facts: model (fingerprint, or the SHA-256 of its file), plan, guidance, dtype, classes, and `job`, a SHA-256 over what
    decides images: these but for the words of the plan, the files and buffers of the model, every number of the plan and the
    predictor; none of a model that cannot be told from another. Batch size and device are none: they change the last bits
    alone. given: the label of each seed, where labels were given."""

    facts: Mapping[str, str]
    given: Mapping[int, str]

    @classmethod
    def of(
        cls,
        sampler: Sampler,
        seeds: Sequence[int],
        labels: Any = None,
        guidance_scale: float | None = None,
        **more: str,
    ) -> Origin:
        """Of what `sampler.run(seeds, labels, guidance_scale)` draws. more: further facts. Raises ConfigError."""
        (plan, predictor), model = sampler.running(guidance_scale), sampler.model
        files, known = file_hashes(model.module), fingerprint(model.network)
        told = {
            **more,
            "model": known or " ".join(files) or "without weights that can be read",
            "plan": _short(plan.describe()),
            "guidance": "none" if guidance_scale is None else f"{guidance_scale:g}",
            "dtype": str(sampler.dtype).removeprefix("torch."),
        }
        if model.label_dim:
            told["classes"] = DRAWN if labels is None else GIVEN
        rows = None if labels is None else check_labels(labels, model, len(seeds), look=True)
        given = {} if rows is None else {seed: text for seed, text in zip(seeds, texts_of(rows), strict=True) if text}
        if known or files:
            numbers = [
                buffers_hash(model.module),
                model.precision,
                model.label_kind,
                _plain(plan),
                predictor_hash(predictor),
            ]
            told["job"] = hashed([{**told, "plan": None}, files, *numbers])
        return cls(told, given)

    def notes(self, seeds: Sequence[int], labels: Tensor | None = None) -> list[dict[str, str]]:
        """The texts of each image, its seed and class among them."""
        classes = [{} if text is None else {"class": text} for text in texts_of(labels, len(seeds))]
        return [{"seed": str(seed), **own, **self.facts} for seed, own in zip(seeds, classes, strict=True)]

    def check(self, folder: str | os.PathLike, seeds: Sequence[int], subdirs: bool, overwrite: bool) -> None:
        """Before anything is drawn: raise ConfigError where the file of a seed is of another origin, unless it may be
        overwritten, and where it is no regular file."""
        for seed in seeds:
            path = seed_path(folder, seed, subdirs)
            ours = {"seed": str(seed), **self.facts, **({"class": self.given[seed]} if seed in self.given else {})}
            theirs = read_notes(path)
            if not overwrite and theirs is not None and (found := difference(theirs, ours)) is not None:
                refuse(path, found)


def texts_of(labels: Tensor | None, count: int = 0) -> Iterator[str | None]:
    """Each label as JSON, `count` times None without labels."""
    rows = [None] * count if labels is None else labels.tolist()
    return (None if row is None else _short(json.dumps(row)) for row in rows)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 80]}... sha256 {hashed(text)}"


def _plain(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in plan.to_json().items() if name not in PROVENANCE}
