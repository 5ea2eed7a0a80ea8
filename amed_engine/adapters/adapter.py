"""The adapter: a raw network of any family as a denoiser that returns the clean data and the bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters import taps
from amed_engine.adapters.answers import prediction_of
from amed_engine.adapters.calling import Calling, calling_of
from amed_engine.adapters.compiled import compiled_of
from amed_engine.adapters.conditions import Conditions
from amed_engine.adapters.facts import ADDED, NetworkFacts, as_tuple
from amed_engine.adapters.family import Family, spread
from amed_engine.adapters.fingerprint import keep_settings
from amed_engine.adapters.labels import CONTINUOUS, check_rows, rows_of, told
from amed_engine.adapters.lookups import explained, null_class_hint
from amed_engine.adapters.precision import Handed, Precision
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, answered, is_tracing, unread
from amed_engine.sampling.kept import Telling, keep_facts
from amed_engine.sampling.modules import never_writes


class Adapter(Telling):
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
        *,
        found: bool = False,
    ):
        """found: nobody named the bottleneck, so one that cannot be read matters to predictors alone."""
        super().__init__()
        self.network, self.family, self.conditions = network, family, conditions
        self.facts, self.notes = facts, dict(notes or {})
        self.sample_shape, self.label_dim = facts.shape, conditions.count or facts.label_dim
        self.sigma_min, self.sigma_max = family.sigma_min, family.sigma_max
        self.bottleneck, self._found = bottleneck, found
        self._tap = None if bottleneck is None else taps.attach(network, bottleneck, self)
        self._precision, self._foreign = Precision(network), not never_writes(network)
        self._form = as_tuple(network)
        classes = 0 if conditions.names else facts.label_dim
        self._calling = Calling() if facts.diffusers else calling_of(network, conditions.names, classes)
        self.looked_at, self.beware = False, ""  # whether its answers were, and what was seen in them that is no fault
        own = {"family": type(family).__name__, **family.settings(), "told": getattr(network, "guidance", None)}
        if facts.whole_times and compiled_of(network) is None:
            own["whole"] = True
        keep_settings(self, **own, bottleneck=bottleneck, labels=facts.labels, null_class=facts.null_class)
        keep_facts(self)

    @property
    def img_channels(self) -> int | None:
        return None if self.sample_shape is None else self.sample_shape[self.channel_axis]

    @property
    def channel_axis(self) -> int:
        """Of a sample: 0, or 1 where frames come first."""
        return self.facts.channel_axis

    @property
    def sample_axes(self) -> str | None:
        """What a sample's shape is made of, such as "4, F, H, W"; None where it takes any."""
        return self.facts.rank if self.facts.axes else None

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
    def consistency(self) -> bool:
        """Whether its answer is a sample, as a consistency function's, and not the mean of the data."""
        return self.family.consistency

    @property
    def can_guide(self) -> bool:
        """Whether a zero row of labels means "no class" to this network, as classifier-free guidance needs."""
        if self.conditions.count:
            return self.conditions.has_null
        return bool(self.facts.label_dim) and (self.facts.labels == "rows" or self.facts.null_class is not None)

    @property
    def label_kind(self) -> str | None:
        """What labels are: classes, as "rows" or an "index", or numbers, one "float" per sample or a "vector"."""
        own = self.facts.labels if self.facts.label_dim else None
        return "index" if self.conditions.count else own

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **conditions: Tensor) -> Denoised:
        """x (B, C, ...); sigma () or (B,); class_labels integers (B,) or one-hot rows (B, label_dim), a zero row meaning no
        class (or, where conditions are bound, which of them), or numbers (B,) or (B, label_dim) where labels are continuous;
        conditions by name, (B, ...) or (1, ...) each.

        Returns D (B, C, ...) and the bottleneck (B, C', h, w) or None, in x's dtype. Raises ConfigError before the network
        is called for a wrong shape, or a condition that is missing, unknown or of another batch.
        """
        self._check_state(x)
        sigma = level_rows(sigma, x).to(x.dtype)
        labels = self._labels(class_labels, x, bool(conditions))
        given = self.conditions(labels, conditions, x.shape[0])
        c = self.family(sigma)
        time = self.family.whole(c.time).long() if self.facts.whole_times else c.time
        labels = None if self.conditions.names or not self.facts.label_dim else labels
        if labels is not None:
            labels = told(labels, self.facts.labels, self.facts.null_class)

        def ask(handed: Handed) -> tuple[Tensor, Tensor | None]:
            state, rest = self._lent(handed.state), self._lent(handed.rest)
            named = {name: state(value) for name, value in given.items()}
            return self._call((spread(c.scale, x) * x).to(handed.state), rest(time), rest(labels), named)

        raw, caught = explained(lambda: self._precision.call(self.network, x.dtype, ask), time, labels, self.network)
        features = caught if self._tap is None else self._read(caught, x)
        raw = self._cut(raw, x).to(x.dtype)
        features = None if features is None else features.to(x.dtype)
        return answered(spread(c.skip, x) * x + spread(c.out, x) * raw, features)

    def _lent(self, dtype: torch.dtype) -> Callable[[Tensor | None], Any]:
        """What the network is given beside its state: floating numbers in a dtype, copies where it may write to them."""

        def lend(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.to(dtype if value.is_floating_point() else value.dtype, copy=self._foreign)

        return lend

    def _call(self, x: Tensor, t: Tensor, labels: Tensor | None, given: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The network's prediction, and its bottleneck as it came."""
        if self._tap is not None:
            self._tap.listen()
        try:
            output = self._output(x, t, labels, given)
        finally:
            caught = None if self._tap is None else self._tap.take()
        returned = isinstance(output, (tuple, list))
        raw = prediction_of(output)
        if self._tap is not None:
            return raw, caught
        return raw, output[1] if returned and self.facts.returns_bottleneck else None

    def _read(self, caught: Any, x: Tensor) -> Tensor:
        features = taps.readable(caught, x, self.facts.folds_frames)
        if features is None and not self._found:
            raise taps.refusal(caught, x, str(self.bottleneck))
        return unread(caught, x) if features is None else features

    def _output(self, x: Tensor, t: Tensor, labels: Tensor | None, given: dict[str, Tensor]) -> Any:
        if self.facts.diffusers:
            return self.network(x, timestep=t, **keywords(labels, given), **self._form)
        if (compiled := compiled_of(self.network)) is not None:
            inputs, given = compiled.convert(x, t, *(() if labels is None else (labels,)), **given)
            return self.network(*inputs, **given)
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
            return chosen_rows(labels, self.label_dim, x, has_conditions, str(self.label_kind))
        if self.conditions.count == 1:
            return x.new_ones(x.shape[0], 1)
        if self.label_kind in CONTINUOUS:
            raise ConfigError(f"class_labels are missing: this denoiser is told numbers, {self.label_dim} per sample")
        if not self.can_guide:
            raise ConfigError(
                f"class_labels are missing: this denoiser has {self.label_dim} classes; pass (B,) integers, or to wrap "
                f"{null_class_hint(self.network, self.facts.label_dim)} for none"
            )
        return x.new_zeros(x.shape[0], self.label_dim)

    def _check_state(self, x: Tensor) -> None:
        if is_tracing():
            return
        shape, facts = self.sample_shape, self.facts
        fits = x.dim() > 1 and len(facts.axes) in (0, x.dim() - 1)
        fits = fits and facts.in_channels in (None, x.shape[1 + facts.channel_axis])
        if not fits or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
            expected = facts.rank if shape is None else ", ".join(map(str, shape))
            raise ConfigError(f"x must have shape (B, {expected}), got {tuple(x.shape)}")

    def _cut(self, raw: Any, x: Tensor) -> Tensor:
        axis = 1 + self.channel_axis
        channels = x.shape[axis]
        _check_prediction(raw, x, axis)
        if not is_tracing() and raw.shape[axis] not in (channels, 2 * channels):
            raise ConfigError(
                f"the network predicts {raw.shape[axis]} channels for samples of {channels}; expected {channels}, or "
                f"{2 * channels} with learned variances"
            )
        return raw[(slice(None),) * axis + (slice(channels),)]

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


def _check_prediction(raw: Any, x: Tensor, axis: int) -> None:
    """Raise ConfigError for what is no tensor, or one that would be spread over samples or pixels."""
    if not isinstance(raw, Tensor) or not raw.is_floating_point():
        got = raw.dtype if isinstance(raw, Tensor) else type(raw).__name__
        raise ConfigError(
            f"the network must return its prediction in floating point, alone or first in a tuple, got {got}; wrap a function "
            "that takes it out of the answer, such as lambda x, t: network(x, t).sample"
        )
    if is_tracing():
        return
    alike = raw.dim() == x.dim() and _without(raw, axis) == _without(x, axis)
    # What is exported has a symbol for its batch, which a question would tie to one size.
    if not alike or (not torch.compiler.is_compiling() and raw.shape[0] != x.shape[0]):
        raise ConfigError(
            f"the network predicts shape {tuple(raw.shape)} for samples {tuple(x.shape)}; expected the same, or twice the "
            "channels with learned variances"
        )


def _without(value: Tensor, axis: int) -> tuple[int, ...]:
    """The shape of one sample but for its channels."""
    return (*value.shape[1:axis], *value.shape[axis + 1 :])


def level_rows(sigma: Tensor, x: Tensor) -> Tensor:
    """Noise levels () or (B,) as (B,). Raises ConfigError for another shape."""
    if not is_tracing() and sigma.dim() > 1:
        raise ConfigError(f"sigma must have shape () or (B,), got {tuple(sigma.shape)}")
    if sigma.dim() == 1:
        check_rows("sigma", sigma, x)
    return sigma.expand(x.shape[0])


def chosen_rows(
    class_labels: Tensor | None, count: int, x: Tensor, has_conditions: bool, kind: str = "rows"
) -> Tensor | None:
    """`rows_of`, None for the conditions of a call in their place. Raises ConfigError for both."""
    if class_labels is None:
        return None
    if has_conditions:
        raise ConfigError("give class_labels, which choose bound conditions, or conditions in the call, not both")
    return rows_of(class_labels, kind, count, x)


def keywords(labels: Tensor | None, given: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a diffusers model; some come in a dictionary of their own."""
    added = {name: given[name] for name in ADDED if name in given}
    keywords: dict[str, Any] = {name: value for name, value in given.items() if name not in added}
    if added:
        keywords["added_cond_kwargs"] = added
    if labels is not None:
        keywords["class_labels"] = labels
    return keywords
