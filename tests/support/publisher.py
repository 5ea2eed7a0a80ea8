"""Checkpoints in the published forms, written by our own helpers: source code with a side effect included."""

from __future__ import annotations

import collections
import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amed_engine import AMEDPredictor
from amed_engine.networks import EDMPrecond
from amed_engine.zoo.catalogue import CATALOGUE


class Publisher:
    """Writes pickles as `torch_utils.persistence` and `dnnlib` make them, without those packages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, canary: Path):
        self.source = f"open({str(canary)!r}, 'w').write('the source of a file was run')"

        def _reconstruct_persistent_obj(meta):
            raise AssertionError("only its name is for the file")

        def amed_sampler():
            raise AssertionError("only its name is for the file")

        class EasyDict(dict):
            pass

        self.easy_dict, self.reconstruct, self.sampler = EasyDict, _reconstruct_persistent_obj, amed_sampler
        homes = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
        for home, member in {**homes, "solvers_amed": amed_sampler}.items():
            module: Any = types.ModuleType(home)
            member.__module__, member.__qualname__ = home, member.__name__
            setattr(module, member.__name__, member)
            monkeypatch.setitem(sys.modules, home, module)
            if "." in home:
                monkeypatch.setitem(sys.modules, home.partition(".")[0], types.ModuleType(home.partition(".")[0]))

    def object(self, class_name: str, state: dict, **changes: Any) -> Any:
        """What pickles like a persistent object of this class."""
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": class_name, "state": state}
        return _Reduced(self.reconstruct, ({**meta, **changes},))

    def module(self, module: torch.nn.Module, class_name: str, **attributes: Any) -> Any:
        """A module with all that is in it; layers of ours become persistent objects, containers of torch stay."""
        children = {name: self._child(child) for name, child in module._modules.items()}
        state = {
            "training": False,
            "_parameters": collections.OrderedDict(module._parameters),
            "_buffers": collections.OrderedDict(module._buffers),
            "_non_persistent_buffers_set": set(module._non_persistent_buffers_set),
            "_backward_hooks": collections.OrderedDict(),
            "_is_full_backward_hook": None,
            "_modules": collections.OrderedDict(children),
        }
        return self.object(class_name, {**state, **attributes})

    def _child(self, child: torch.nn.Module | None) -> Any:
        if isinstance(child, torch.nn.ModuleDict):
            container = torch.nn.ModuleDict()
            container.__dict__["_modules"] = {name: self._child(inner) for name, inner in child.items()}
            return container
        kind = type(child).__name__
        known = ("SongUNet", "DhariwalUNet", "UNetBlock", "Linear", "GroupNorm", "FourierEmbedding")
        skip = {"skip_scale": np.sqrt(0.5)} if kind == "UNetBlock" else {}
        return None if child is None else self.module(child, kind if kind in known else "Conv2d", **skip)

    def edm(self, model: EDMPrecond, file: Path, class_name: str = "EDMPrecond", positional: tuple = ()) -> Path:
        """positional: arguments that were given without their names, which stand in the published order."""
        names = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
        rest = [name for name in model.config if name not in (*names, "model_type")[: len(positional)]]
        config = self.easy_dict({name: model.config[name] for name in rest})
        network = self.module(model, class_name, _init_args=positional, _init_kwargs=config, sigma_max=float("inf"))
        loss = self.object("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
        data = {"ema": network, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": self.easy_dict(path="x.zip")}
        file.write_bytes(pickle.dumps(data))
        return file

    def amed(self, predictor: AMEDPredictor, file: Path, settings: dict, loss: dict | None = None) -> Path:
        loss_state = {
            "solver_stu": self.sampler,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "buffer_model": [],
            **(loss or {}),
        }
        model = self.module(predictor, "AMED_predictor", **settings)
        file.write_bytes(pickle.dumps({"model": model, "loss_fn": self.object("AMED_loss", loss_state)}))
        return file


class _Reduced:
    def __init__(self, function: Any, arguments: tuple):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.fixture
def canary(tmp_path) -> Path:
    """Exists only if the code in a file was run."""
    return tmp_path / "canary"


@pytest.fixture
def publish(monkeypatch, canary) -> Publisher:
    return Publisher(monkeypatch, canary)


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_model) -> EDMPrecond:
    """A published name that stands for a small network; AMED_WEIGHTS names an empty folder."""
    name = "edm-cifar10-32x32-uncond-vp"
    facts = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 1]}
    monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], arguments=facts, shape=(1, 8, 8)))
    monkeypatch.setenv("AMED_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tiny_model
