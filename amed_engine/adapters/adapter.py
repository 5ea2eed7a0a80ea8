"""The adapter: a raw network of any family as a denoiser that returns the clean data and the bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.adapters import taps
from amed_engine.adapters.answers import prediction_of
from amed_engine.adapters.calling import Calling, calling_of
from amed_engine.adapters.conditions import Conditions, class_index
from amed_engine.adapters.facts import ADDED, NetworkFacts, as_tuple
from amed_engine.adapters.family import Family, spread
from amed_engine.adapters.fingerprint import keep_settings
from amed_engine.adapters.lookups import explain
from amed_engine.adapters.precision import Handed, Precision
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, is_tracing, one_hot
from amed_engine.sampling.modules import never_writes


class Adapter(nn.Module):
    """Denoiser (x, sigma (B,)[, class_labels], **conditions) -> Denoised(D, bottleneck), D = skip·x + out·F(scale·x; time).

    Made by `wrap`, which explains the arguments. The network runs in the dtype that its layers take, the preconditioning in
    x's. It may write to what it is given: nothing of that is the caller's. A prediction of 2C channels holds learned
    variances, which are cut off. Its attributes img_channels, img_resolution, sample_shape, label_dim, sigma_min and
    sigma_max are what `Sampler` reads.
    """

    lends_copies = True

    def __init__(
        self,
        network: Any,
        family: Family,
        facts: NetworkFacts,
        conditions: Conditions,
        bottleneck: str | None = None,
        notes: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.network, self.family, self.conditions = network, family, conditions
        self.facts, self.notes = facts, dict(notes or {})
        self.sample_shape, self.label_dim = facts.shape, conditions.count or facts.label_dim
        self.sigma_min, self.sigma_max = family.sigma_min, family.sigma_max
        self.bottleneck = bottleneck
        self._tap = None if bottleneck is None else taps.attach(network, bottleneck, self)
        self._precision, self._foreign = Precision(network), not never_writes(network)
        self._form = as_tuple(network)
        classes = 0 if conditions.names else facts.label_dim
        self._calling = Calling() if facts.diffusers else calling_of(network, conditions.names, classes)
        self.looked_at, self.beware = False, ""  # whether its answers were, and what was seen in them that is no fault
        own = {"family": type(family).__name__, **family.settings(), "told": getattr(network, "guidance", None)}
        keep_settings(self, **own, bottleneck=bottleneck, labels=facts.labels, null_class=facts.null_class)

    @property
    def img_channels(self) -> int | None:
        return None if self.sample_shape is None else self.sample_shape[0]

    @property
    def img_resolution(self) -> int | None:
        """Height and width of a square sample, None for another shape; see `sample_shape`."""
        shape = self.sample_shape
        return shape[1] if shape is not None and len(shape) == 3 and shape[1] == shape[2] else None

    @property
    def bottleneck_size(self) -> tuple[int, int] | None:
        """(h, w) of the bottleneck that predictors read, where it is known before the network is called."""
        shape, reduction = self.sample_shape, self.facts.reduction
        if reduction is None or shape is None or len(shape) != 3 or shape[1] % reduction or shape[2] % reduction:
            return None
        return shape[1] // reduction, shape[2] // reduction

    @property
    def can_guide(self) -> bool:
        """Whether a zero row of labels means "no class" to this network, as classifier-free guidance needs."""
        if self.conditions.count:
            return self.conditions.has_null
        return bool(self.facts.label_dim) and (self.facts.labels == "rows" or self.facts.null_class is not None)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **conditions: Tensor) -> Denoised:
        """x (B, C, H, W); sigma () or (B,); class_labels integers (B,) or one-hot rows (B, label_dim), a zero row meaning no
        class (or, where conditions are bound, which of them); conditions by name, (B, ...) or (1, ...) each.

        Returns D (B, C, H, W) and the bottleneck (B, C', h, w) or None, in x's dtype. Raises ConfigError before the network
        is called for a wrong shape, or a condition that is missing, unknown or of another batch.
        """
        self._check_state(x)
        sigma = level_rows(sigma, x).to(x.dtype)
        labels = self._labels(class_labels, x, bool(conditions))
        given = self.conditions(labels, conditions, x.shape[0])
        c = self.family(sigma)
        labels = None if self.conditions.names or not self.facts.label_dim else labels
        if labels is not None and self.facts.labels == "index":
            labels = class_index(labels, self.facts.null_class)

        def ask(handed: Handed) -> tuple[Tensor, Tensor | None]:
            state, rest = self._lent(handed.state), self._lent(handed.rest)
            told = {name: state(value) for name, value in given.items()}
            return self._call((spread(c.scale, x) * x).to(handed.state), rest(c.time), rest(labels), told)

        raw, features = self._asked(x.dtype, ask, c.time, labels)
        raw = self._cut(raw, x).to(x.dtype)
        return Denoised(
            spread(c.skip, x) * x + spread(c.out, x) * raw, None if features is None else features.to(x.dtype)
        )

    def _asked(
        self, dtype: torch.dtype, ask: Callable[[Handed], Any], time: Tensor, labels: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """What the network answers, in the dtypes that it takes. Raises ConfigError for what its tables do not take."""
        if torch.compiler.is_compiling() or is_tracing():
            return self._precision.call(self.network, dtype, ask)
        try:
            return self._precision.call(self.network, dtype, ask)
        except (RuntimeError, IndexError, TypeError) as error:
            told = explain(error, time, labels)
            if told is None:
                raise
            raise told from error

    def _lent(self, dtype: torch.dtype) -> Callable[[Tensor | None], Any]:
        """What the network is given beside its state: floating numbers in a dtype, copies where it may write to them."""

        def lend(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.to(dtype if value.is_floating_point() else value.dtype, copy=self._foreign)

        return lend

    def _call(
        self, x: Tensor, t: Tensor, labels: Tensor | None, given: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The network's prediction and bottleneck."""
        if self._tap is not None:
            self._tap.listen()
        try:
            output = self._output(x, t, labels, given)
        finally:
            caught = None if self._tap is None else self._tap.take()
        returned = isinstance(output, (tuple, list))
        raw = prediction_of(output)
        if self._tap is not None:
            return raw, taps.check_features(caught, str(self.bottleneck))
        return raw, output[1] if returned and self.facts.returns_bottleneck else None

    def _output(self, x: Tensor, t: Tensor, labels: Tensor | None, given: dict[str, Tensor]) -> Any:
        if self.facts.diffusers:
            return self.network(x, timestep=t, **keywords(labels, given), **self._form)
        placed, named = self._calling.arguments(x, t, labels)
        return self.network(*placed, **named, **given)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self._tap is not None:
            self._tap = taps.attach(self.network, str(self.bottleneck), self)

    def _labels(self, labels: Tensor | None, x: Tensor, has_conditions: bool) -> Tensor | None:
        if not self.label_dim:
            if labels is not None:
                raise ConfigError("class_labels were given, but this denoiser has no classes and no bound conditions")
            return None
        if labels is not None or has_conditions:
            return chosen_rows(labels, self.label_dim, x, has_conditions)
        if self.conditions.count == 1:
            return x.new_ones(x.shape[0], 1)
        if not self.can_guide:
            raise ConfigError(
                f"class_labels are missing: this denoiser has {self.label_dim} classes; pass (B,) integers"
            )
        return x.new_zeros(x.shape[0], self.label_dim)

    def _check_state(self, x: Tensor) -> None:
        if is_tracing():
            return
        shape = self.sample_shape
        if x.dim() < 2 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
            expected = "(B, C, ...)" if shape is None else f"(B, {', '.join(map(str, shape))})"
            raise ConfigError(f"x must have shape {expected}, got {tuple(x.shape)}")

    def _cut(self, raw: Any, x: Tensor) -> Tensor:
        channels = x.shape[1]
        _check_prediction(raw, x)
        if not is_tracing() and raw.shape[1] not in (channels, 2 * channels):
            raise ConfigError(
                f"the network predicts {raw.shape[1]} channels for samples of {channels}; expected {channels}, or "
                f"{2 * channels} with learned variances"
            )
        return raw[:, :channels]

    def explain(self) -> str:
        """What was inferred and why, a line each."""
        width = max(map(len, self.notes), default=0)
        return "\n".join(f"{name:<{width}}  {note}" for name, note in self.notes.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n" + "\n".join(f"  {line}" for line in self.explain().splitlines()) + "\n)"

    def check_ready(self) -> None:
        """Raise ConfigError where sampling would lack a condition."""
        if self.conditions.names and not self.conditions.count:
            raise ConfigError(
                f"the network needs {', '.join(self.conditions.names)}, which a sampler cannot know; bind them with "
                "wrap(..., conditions={...}), rows being chosen by class_labels"
            )


def _check_prediction(raw: Any, x: Tensor) -> None:
    """Raise ConfigError for what is no tensor, or one that would be spread over samples or pixels."""
    if not isinstance(raw, Tensor) or not raw.is_floating_point():
        got = raw.dtype if isinstance(raw, Tensor) else type(raw).__name__
        raise ConfigError(
            f"the network must return its prediction in floating point, alone or first in a tuple, got {got}; wrap a function "
            "that takes it out of the answer, such as lambda x, t: network(x, t).sample"
        )
    if is_tracing():
        return
    alike = raw.dim() == x.dim() and raw.shape[2:] == x.shape[2:]
    # What is exported has a symbol for its batch, which a question would tie to one size.
    if not alike or (not torch.compiler.is_compiling() and raw.shape[0] != x.shape[0]):
        raise ConfigError(
            f"the network predicts shape {tuple(raw.shape)} for samples {tuple(x.shape)}; expected the same, or twice the "
            "channels with learned variances"
        )


def level_rows(sigma: Tensor, x: Tensor) -> Tensor:
    """Noise levels () or (B,) as (B,). Raises ConfigError for another shape."""
    if not is_tracing() and sigma.dim() > 1:
        raise ConfigError(f"sigma must have shape () or (B,), got {tuple(sigma.shape)}")
    if sigma.dim() == 1:
        _check_rows("sigma", sigma, x)
    return sigma.expand(x.shape[0])


def chosen_rows(class_labels: Tensor | None, count: int, x: Tensor, has_conditions: bool) -> Tensor | None:
    """`label_rows`, None for the conditions of a call in their place. Raises ConfigError for both."""
    if class_labels is None:
        return None
    if has_conditions:
        raise ConfigError("give class_labels, which choose bound conditions, or conditions in the call, not both")
    return label_rows(class_labels, count, x)


def label_rows(class_labels: Tensor, count: int, x: Tensor) -> Tensor:
    """Integers (B,) or one-hot rows (B, count), one for all allowed, as rows (B, count) like x. Raises ConfigError."""
    if not isinstance(class_labels, Tensor):
        raise ConfigError(
            f"class_labels must be a tensor of integers (B,) or rows (B, {count}), got {type(class_labels).__name__}"
        )
    integers = class_labels.dim() == 1 and not class_labels.is_floating_point()
    if not is_tracing() and not integers and tuple(class_labels.shape[1:]) != (count,):
        raise ConfigError(
            f"class_labels must be integers (B,) or rows (B, {count}), got {class_labels.dtype} of shape "
            f"{tuple(class_labels.shape)}"
        )
    _check_rows("class_labels", class_labels, x)
    return one_hot(class_labels, count, x).expand(x.shape[0], count)


def _check_rows(name: str, value: Tensor, x: Tensor) -> None:
    if not is_tracing() and value.shape[0] not in (1, x.shape[0]):
        raise ConfigError(f"{name} has {value.shape[0]} rows for a batch of {x.shape[0]}; pass one per sample")


def keywords(labels: Tensor | None, given: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a diffusers model; some come in a dictionary of their own."""
    added = {name: given[name] for name in ADDED if name in given}
    keywords: dict[str, Any] = {name: value for name, value in given.items() if name not in added}
    if added:
        keywords["added_cond_kwargs"] = added
    if labels is not None:
        keywords["class_labels"] = labels
    return keywords
