"""ONNX models as denoisers or raw networks, through onnxruntime on the CPU (extra `onnx`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.compiled import Compiled, converted
from amed_engine.adapters.exporting import FACTS, check_no_loop, read_facts
from amed_engine.adapters.loaded import LoadedFile
from amed_engine.adapters.onnx_inputs import ANSWERS, FLOATS, LABELS, RAW, STEPS, TYPES, Roles, describe, roles_of
from amed_engine.adapters.sealed import read_sealed
from amed_engine.adapters.signature import UNBOUNDED, Input, Signature
from amed_engine.errors import ConfigError, FileFormatError, require
from amed_engine.sampling.denoiser import Denoised, ask


class OnnxModel(Compiled):
    """(x, sigma[, labels], **conditions) -> (D[, bottleneck]) by an onnxruntime session.

    Its inputs are matched by name (`load_onnx`). Called directly it takes the file's own dtypes; `wrap` and `Sampler` convert
    what they hand it. For a raw network, sigma is whatever time it is told: put `wrap` round it. label_kind: "rows", "index",
    "float" or "vector", as `wrap` has them; conditions: dtype and shape by name.
    """

    def __init__(
        self, session: OnnxSession, roles: Roles, signature: Signature, facts: Mapping[str, Any] | None = None
    ):
        super().__init__(_Call(session, roles), signature, facts=facts)
        self.session, self.roles = session, roles
        self.conditions = {entry.name: _input(entry) for entry in roles.conditions}
        if roles.labels is not None:
            classes = "can_guide" in self.facts  # of this package's making, which writes out a kind that is none
            self.label_kind = self.facts.get("label_kind", "rows" if classes else _label_kind(roles.labels))
        self.label_dim = 1 if self.label_kind == "float" else signature.label_dim

    @property
    def returns_bottleneck(self) -> bool:
        return len(self.session.outputs) > 1

    @property
    def out_channels(self) -> int | None:
        """Of the prediction, where the file tells them of samples that have channels."""
        shape = _entry(self.session.answers, self.session.outputs[0]).shape or ()
        known = shape if len(shape) == len(self.roles.x.shape) else ()
        return _static(known[1]) if len(known) > 1 else None

    @property
    def can_guide(self) -> bool:
        """Whether zero labels mean "no class": for one-hot rows, where the file does not say otherwise."""
        return self.facts.get("can_guide", self.label_kind == "rows")

    @property
    def whole_times(self) -> bool:
        return self.signature.inputs[1].dtype.startswith("int")

    def convert(self, *inputs: Tensor, **conditions: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        unknown = [name for name in conditions if name not in self.conditions]
        if unknown:
            raise ConfigError(
                f"the model takes {', '.join(self.conditions) or 'no conditions'}, got {', '.join(unknown)}"
            )
        named = {name: converted(name, value, self.conditions[name]) for name, value in conditions.items()}
        return super().convert(*inputs)[0], named

    def describe(self) -> str:
        known = [each for each in (self.roles.x, self.roles.time, self.roles.labels, *self.roles.conditions) if each]
        return ", ".join(f"{each.name} {TYPES[each.type]}" for each in known)

    def forward(self, *inputs: Tensor, **conditions: Tensor) -> Denoised:
        """x (B, ...), time (B,)[, labels], conditions (B, ...) by name. Raises ConfigError for what the file does not take, and
        for what its graph refuses."""
        self._check(*inputs)
        self.signature.check_named(inputs[0], conditions, self.conditions)
        return ask(partial(self.call, **conditions), *inputs)

    def check_ready(self) -> None:
        """Raise ConfigError where this is no denoiser, or takes what a sampler cannot know."""
        if self.conditions:
            raise ConfigError(
                f"the ONNX model takes {', '.join(self.conditions)} beside what a sampler hands it (expected x, sigma and "
                "perhaps labels); bind them: wrap(load_onnx(path), prediction, conditions={...}), rows by class_labels"
            )
        time, answer = self.roles.time, self.session.outputs[0]
        if self.whole_times or time.name.lower() in STEPS or answer.lower() in RAW:
            raise ConfigError(
                f"the ONNX model is told {describe([time])} and returns {answer!r}: a raw network, no denoiser (x, sigma) "
                '-> D; pass wrap(load_onnx(path), prediction), prediction="epsilon", say, or "denoised" where it is one '
                "(--prediction on the command line)"
            )


class OnnxSession:
    """A model on the CPU: tensors in the order of its inputs, or by their names -> the outputs that are asked for.

    inputs: name, type and shape of each. outputs: names, the first two unless said. metadata: the file's custom texts by
    name. threads: of one call, None for onnxruntime's own choice. verify: compare the file with the hash in it, if there is
    one. Raises MissingDependency without onnxruntime, FileFormatError for a file that it does not open.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None, *, verify: bool = True):
        self.loaded = LoadedFile.of(path) if os.path.isfile(path) else None  # else onnxruntime says what is wrong
        runtime = require("onnxruntime", "onnx", "ONNX")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = read_sealed(path, lambda: self._opened(runtime, path, options), verify)
        self.inputs = self._session.get_inputs()
        self.answers = self._session.get_outputs()
        self.outputs = [entry.name for entry in self.answers][:2]
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    @staticmethod
    def _opened(runtime: Any, path: str | os.PathLike, options: Any) -> Any:
        try:
            return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common class of its errors
            reason = str(error).splitlines()[0]
            if "NOT_IMPLEMENTED" in reason:
                raise ConfigError(
                    f"{path}: onnxruntime cannot compute it on the CPU ({reason}); export it in float32 or float16"
                ) from error
            raise FileFormatError(f"{path} cannot be loaded: it is damaged, or no ONNX model: {reason}") from error

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.named({entry.name: tensor for entry, tensor in zip(self.inputs, tensors, strict=True)})

    def named(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        feed = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        return tuple(torch.from_numpy(array) for array in self._session.run(self.outputs, feed))


class _Call:
    """(x, time (B,)[, labels], **conditions) -> outputs. A model that is told one time for all samples is asked once for each
    time among them."""

    def __init__(self, session: OnnxSession, roles: Roles):
        self._session, self._roles = session, roles
        self._one_time = _is_for_all(roles)

    def __call__(self, x: Tensor, time: Tensor, /, *labels: Tensor, **conditions: Tensor) -> tuple[Tensor, ...]:
        given = {entry.name: value for entry, value in self._named(x, labels)} | conditions
        if not self._one_time:
            return self._run(given, time.reshape(-1, *[1] * (len(self._roles.time.shape) - 1)))
        told, which = time.unique(return_inverse=True)
        if len(told) == 1:
            return self._run(given, told.reshape([1] * len(self._roles.time.shape)))
        return self._by_time(given, told, which)

    def _named(self, x: Tensor, labels: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
        return [(self._roles.x, x), *((self._roles.labels, value) for value in labels)]

    def _by_time(self, given: Mapping[str, Tensor], told: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        parts, rows = [], []
        for number, time in enumerate(told):
            rows.append((which == number).nonzero().flatten())
            part = {name: value[rows[-1]] for name, value in given.items()}
            parts.append(self._run(part, time.reshape([1] * len(self._roles.time.shape))))
        order = torch.cat(rows).argsort()
        return tuple(torch.cat(outputs)[order] for outputs in zip(*parts, strict=True))

    def _run(self, given: Mapping[str, Tensor], time: Tensor) -> tuple[Tensor, ...]:
        try:
            return self._session.named({**given, self._roles.time.name: time})
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
            raise ConfigError(f"the ONNX graph does not run on {shapes}: {str(error).splitlines()[0]}") from error


def load_onnx(
    path: str | os.PathLike,
    *,
    threads: int | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    verify: bool = True,
) -> OnnxModel:
    """An ONNX model as a denoiser; its custom metadata sigma_min and sigma_max, if any, are its range of noise levels.

    threads: of one evaluation, None for onnxruntime's own choice. inputs: the names of the sample, the time and, if any, the
    labels; None knows those that exporters give (x, sample, latents, ...; sigma, t, timestep, ...; class_labels, y, ...) and
    takes others by their shapes where these leave one choice. A single further input with a number or a row of them per
    sample is the labels, others are conditions. outputs: the names of the prediction and, if any, the bottleneck (B, C, h, w).
    verify: compare the file, and that of its weights, with the hash that `save_onnx` put in; they are read once more for that.
    Raises ConfigError without onnxruntime or for inputs and outputs that could be several things, naming them,
    FileFormatError for a file that is no ONNX model.
    """
    session = OnnxSession(path, threads, verify=verify)
    check_no_loop(session.metadata, path)
    session.outputs = _answers(session.answers, outputs, path)
    answer = next(entry for entry in session.answers if entry.name == session.outputs[0])
    roles = roles_of(session.inputs, answer, path, inputs)
    signature = _signature(roles, session.metadata, path)
    made = OnnxModel(session, roles, signature, read_facts(session.metadata.get(FACTS), signature, path))
    made.loaded = session.loaded
    return made


def _answers(entries: Sequence[Any], told: Sequence[str] | None, path: str | os.PathLike) -> list[str]:
    """The prediction's name, and the bottleneck's where there is one."""
    known = [entry.name for entry in entries]
    if told is not None:
        if isinstance(told, str) or len(told) not in (1, 2) or not set(told) <= set(known):
            raise ConfigError(
                f"outputs must name the prediction and perhaps the bottleneck of {path}, got {told!r}; it has "
                f"{describe(entries)}"
            )
        names = list(told)
    else:
        named = [name for name in known if name.lower() in ANSWERS]
        if len(known) > 2 and len(named) != 1:
            raise ConfigError(
                f"{path} returns {describe(entries)}; say which is the prediction: load_onnx(path, outputs=(prediction[, "
                "bottleneck]))"
            )
        names = [*named, *(name for name in known if name not in named)] if len(named) == 1 else known
        names = names[: 2 if len(known) == 2 and len(_entry(entries, names[1]).shape or ()) == 4 else 1]
    if (answer := _entry(entries, names[0])).type not in FLOATS:
        raise ConfigError(
            f"{path}: its output {describe([answer])} is no prediction; expected {', '.join(FLOATS.values())}"
        )
    return names


def _entry(entries: Sequence[Any], name: str) -> Any:
    return next(entry for entry in entries if entry.name == name)


def _signature(roles: Roles, metadata: dict[str, str], path: str | os.PathLike) -> Signature:
    inputs = [_input(roles.x), Input(TYPES[roles.time.type], ())]
    if roles.labels is not None:
        inputs.append(_input(roles.labels))
    fixed = _static(roles.x.shape[0])
    batch = (1, UNBOUNDED) if fixed is None else (fixed, fixed)
    rows = _static(roles.time.shape[0]) if roles.time.shape else 1
    if rows not in (None, 1, fixed):
        raise ConfigError(
            f"{path}: {describe([roles.time])} is not one time per sample of {describe([roles.x])}, nor one for all"
        )
    return Signature(
        tuple(inputs), batch, "cpu", _level(metadata, "sigma_min", path), _level(metadata, "sigma_max", path)
    )


def _is_for_all(roles: Roles) -> bool:
    """Whether one time is told for all samples."""
    shape = roles.time.shape
    return not shape or (shape[0] == 1 and roles.x.shape[0] != 1)


def _label_kind(entry: Any) -> str:
    if entry.type not in FLOATS:
        return "index"
    width = _input(entry).shape
    if not width:
        return "float"
    return "rows" if entry.name.lower() in LABELS and width != (1,) else "vector"


def _input(entry: Any) -> Input:
    return Input(TYPES[entry.type], tuple(map(_static, entry.shape[1:])))


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) and size > 0 else None


def _level(metadata: dict[str, str], name: str, path: str | os.PathLike) -> float | None:
    if name not in metadata:
        return None
    try:
        value = float(metadata[name])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise FileFormatError(f"{path}: its metadata say {name}={metadata[name]!r}, expected a positive number")
    return value
