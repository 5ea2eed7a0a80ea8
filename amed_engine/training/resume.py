"""Checkpoints of a training run: all of its state, so that a run that was killed ends in the same bits."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed_engine.checkpoints.files import read, write
from amed_engine.checkpoints.native import check_tensors
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.targets import check_folder
from amed_engine.training.trainer import Round, Trainer

KEPT = 3
KIND = "amed_training"
_NAME = re.compile(r"round-(\d{8})\.safetensors")


class Checkpoints:
    """The checkpoints of one run in one folder, `round-00000079.safetensors` after 79 batches, the last three kept.

    folder: None for no checkpoints. seconds: how often at least, looked at after every batch. identity: what the run
    is, JSON-able; another run's checkpoints are refused.
    """

    def __init__(self, folder: str | Path | None, seconds: float, identity: dict[str, Any]):
        if not seconds >= 0:
            raise ConfigError(f"checkpoint_seconds must not be negative, got {seconds!r}")
        self.folder = None if folder is None else Path(folder)
        self.seconds, self.written = seconds, time.monotonic()
        self.identity = json.loads(json.dumps(identity))  # tuples as the lists a file gives back
        if self.folder is not None:
            check_folder(self.folder, *(file.name for file in self.files()))

    def files(self) -> list[Path]:
        """Oldest first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def resume(self, trainer: Trainer, mode: str) -> None:
        """Set the trainer to the newest checkpoint: "auto" if there is one, "never" refuses a folder that has any."""
        if mode not in ("auto", "never"):
            raise ConfigError(f"resume must be 'auto' or 'never', got {mode!r}")
        if not (files := self.files()):
            return
        if mode == "never":
            raise ConfigError(f"{self.folder} holds checkpoints; pass resume='auto', another folder, or delete them")
        config, tensors = read(files[-1])
        self._check(config, files[-1])
        restore(trainer, tensors, config["rounds"], files[-1])

    def _check(self, config: dict, path: Path) -> None:
        if config.get("kind") != KIND or not isinstance(config.get("rounds"), int):
            raise FileFormatError(f"{path} holds {config.get('kind')!r}, expected {KIND!r}")
        theirs = config.get("identity")
        if not isinstance(theirs, dict):
            raise FileFormatError(f"{path} does not say what run it is of")
        different = [n for n in sorted({*theirs, *self.identity}) if theirs.get(n) != self.identity.get(n)]
        if different:
            name = different[0]
            raise ConfigError(
                f"{path} is of another run: {', '.join(different)} differ ({name}: {theirs.get(name)!r} there, "
                f"{self.identity.get(name)!r} here); choose another folder or the same settings"
            )

    def due(self) -> bool:
        return self.folder is not None and time.monotonic() - self.written >= self.seconds

    def write(self, trainer: Trainer) -> None:
        """The trainer's state, whole or not at all; not after a bad step, so that every checkpoint is a good one."""
        if self.folder is None or trainer.bad:
            return
        config = {"kind": KIND, "rounds": trainer.rounds, "identity": self.identity}
        write(self.folder / f"round-{trainer.rounds:08d}.safetensors", snapshot(trainer), config)
        for old in self.files()[:-KEPT]:
            old.unlink(missing_ok=True)
        self.written = time.monotonic()


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """All that changes while it trains, as tensors."""
    names = list(trainer.named)
    moments = trainer.optimizer.state_dict()["state"]
    tensors = {f"weights/{name}": value for name, value in trainer.predictor.state_dict().items()}
    if trainer.levels is not None:
        tensors |= {f"levels/{name}": value for name, value in trainer.levels.state_dict().items()}
    tensors |= {f"adam/{names[k]}/{key}": value for k, state in moments.items() for key, value in state.items()}
    rows = [seen.row() for seen in trainer.history]
    # As bits: a skipped step's loss is no number, which a file of ours may not hold.
    tensors["history"] = torch.tensor(rows, dtype=torch.float64, device="cpu").view(torch.int64)
    tensors["generator"] = trainer.data.generator.get_state()
    return tensors


def restore(trainer: Trainer, tensors: dict[str, Tensor], rounds: int, path: Path) -> None:
    """The reverse of `snapshot`. Raises FileFormatError."""
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "adam": {}, "history": {}, "generator": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    try:
        history = groups["history"][""].view(torch.float64).tolist()
        check_tensors(trainer.predictor, groups["weights"], path)
        trainer.predictor.load_state_dict(groups["weights"])
        if trainer.levels is not None:
            trainer.levels.load_state_dict(groups["levels"])
        _restore_adam(trainer, groups["adam"])
        trainer.data.generator.set_state(groups["generator"][""])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path} is no checkpoint of this run: {error}") from error
    trainer.history = [Round.of(row, trainer.program.intervals) for row in history]
    trainer.rounds, trainer.skipped = rounds, trainer.history[-1].skipped if history else 0
    trainer.data.skip(rounds)


def _restore_adam(trainer: Trainer, moments: dict[str, Tensor]) -> None:
    names = list(trainer.named)
    keys = ("step", "exp_avg", "exp_avg_sq")
    # Before the first good step there is none.
    state = {k: {key: moments[f"{name}/{key}"] for key in keys} for k, name in enumerate(names)} if moments else {}
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state})
