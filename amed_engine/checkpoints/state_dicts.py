"""Where in a trainer's file a network's tensors are: under prefixes, in dictionaries, with averages of them beside.

A network is known by the names of its own parts, so that what wraps them needs no list: `module.`, `_orig_mod.`, `model.`,
{"model": ...}, {"state_dict": ...} and any of these inside another are all what comes before such a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from amed_engine.checkpoints import latent, openai_state
from amed_engine.checkpoints.plain_data import Visits
from amed_engine.errors import ConfigError, FileFormatError

PART = re.compile(r"(?:^|(?<=\.))(?:(?:time_embed|label_emb|input_blocks|middle_block|output_blocks)\.|out\.[\d_])")
# Inside names, of torch's wrappers round single parts.
WRAPPERS = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The prefix of latent diffusion with these in it, at the end of another.
LATENT = re.compile(rf"(?:^|(?<=\.))model\.(?:{WRAPPERS.pattern})*diffusion_model\.(?:{WRAPPERS.pattern})*$")
AVERAGED = re.compile(r"(?:^|[_-])(?:ema|averaged?|avg|shadow|swa|polyak)(?:[_-]|$)", re.IGNORECASE)
TRAINED = re.compile(r"online", re.IGNORECASE)
OPTIMIZER = re.compile(
    r"opt|optim\w*|exp_avg(_sq)?|max_exp_avg_sq|momentum\w*|grads?", re.IGNORECASE
)  # has the same names
SHADOW = "shadow_params"  # a list of averages in the order of the parameters
MAX_DEPTH = 4  # of dictionaries in dictionaries
MAX_NETWORKS = 64  # in one dictionary


class Network(NamedTuple):
    """A network's tensors under its own names. label: where they were. beside: what a latent-diffusion file has with it, None
    in others."""

    label: str
    tensors: dict[str, Tensor]
    averaged: bool
    beside: Mapping[str, Any] | None

    def state(self) -> dict[str, Any]:
        """As the layouts of `convert` have it: tensors alone, or {"state_dict": ...} of latent diffusion."""
        if self.beside is None and not latent.has_context(self.tensors):
            return dict(self.tensors)
        named = {latent.PREFIX + name: value for name, value in self.tensors.items()}
        return {"state_dict": {**named, **(self.beside or {})}}


class _Unread(NamedTuple):
    """Averages that cannot be given to the network's parts."""

    label: str
    why: str


def find_network(data: Any, path: Path, weights: str | None) -> tuple[Network, str] | None:
    """The network of a file, and a word on those it was chosen from; None where none has guided-diffusion's names.

    weights: "ema", "model", the label of one, or None: the averaged one, where there is one. Raises ConfigError where that
    leaves a choice, FileFormatError where not all of the chosen one's tensors are in one place.
    """
    networks: list[Network] = []
    unread: list[_Unread] = []
    for label, own in dictionaries(data):
        found = list(_networks(own, label, path, weights))
        networks += found
        unread += _lost(own, label) if not found else []
    networks, unread = _named(networks, unread, data)
    if not networks:
        return None
    chosen = _choose(networks, unread, path, weights)
    others = ", ".join(repr(each.label) for each in networks if each is not chosen)
    return chosen, f"; of the file's {chosen.label!r}, not of {others} (--weights)" if others else ""


def dictionaries(data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary inside a file's, with its place; none of an optimizer. Raises FileFormatError for one at many places."""
    yield from _inside(data, "", 0, Visits())


def _inside(data: Any, label: str, depth: int, visits: Visits) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(data, Mapping) or depth > MAX_DEPTH:
        return
    visits.count(data, label)
    yield label, {str(name): value for name, value in data.items()}
    for name, value in data.items():
        if not OPTIMIZER.fullmatch(str(name)):
            yield from _inside(value, _at(label, str(name)), depth + 1, visits)


def _at(label: str, name: str) -> str:
    return f"{label}.{name}".strip(".")


def _networks(own: Mapping[str, Any], label: str, path: Path, weights: str | None) -> Iterator[Network]:
    """Those in one dictionary, each under a prefix of its own."""
    names = [name for name, value in own.items() if isinstance(value, Tensor)]
    prefixes = {name[: part.start()]: None for name in names if (part := PART.search(name))}
    groups = {prefix: _group(names, prefix, path) for prefix, names in _by_prefix(own, prefixes).items()}
    every = {name: value for group in groups.values() for name, value in group.items()}
    if not _is_network(every):
        return
    if sum(map(_is_network, groups.values())) > MAX_NETWORKS:
        raise FileFormatError(f"{path} has more than {MAX_NETWORKS} networks in one dictionary, {label or 'its own'!r}")
    if weights not in [_at(label, prefix) for prefix, group in groups.items() if _is_network(group)]:
        _check_whole(groups, path)
    for prefix, tensors in groups.items():
        if not _is_network(tensors):
            continue
        place = _at(label, prefix)
        inside = LATENT.search(prefix)
        outer = None if inside is None else prefix[: inside.start()]
        beside = None if outer is None else latent.beside(own, outer)
        yield Network(place, tensors, _is_averaged(place), beside)
        if outer is not None and (average := latent.averaged(own, outer, tensors, path, weights == "model")):
            yield Network(_at(label, f"{outer}model_ema"), average, True, beside)


def _is_network(tensors: Mapping[str, Any]) -> bool:
    return openai_state.is_unet(tensors) or openai_state.is_classifier(tensors)


def _is_averaged(label: str) -> bool:
    """By the last word of a label that says so, or the opposite."""
    words = [word for word in label.split(".") if AVERAGED.search(word) or TRAINED.search(word)]
    return bool(words) and not TRAINED.search(words[-1])


def _by_prefix(own: Mapping[str, Any], prefixes: Mapping[str, None]) -> dict[str, dict[str, Any]]:
    """Every entry under the longest of the prefixes that its name begins with; a prefix ends with a dot, or is empty."""
    groups: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for name, value in own.items():
        prefix = name
        while prefix and prefix not in groups:
            prefix = prefix[: prefix.rfind(".", 0, len(prefix) - 1) + 1]
        if prefix in groups:
            groups[prefix][name] = value
    return groups


def _group(own: Mapping[str, Any], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors under a prefix, by their names behind it."""
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        inner = WRAPPERS.sub("", name[len(prefix) :])
        if isinstance(value, Tensor) and value.dim():  # single numbers count steps
            if inner in found:
                raise FileFormatError(f"{path} has {inner!r} twice, with wrappers in its name and without")
            found[inner] = value
        elif PART.match(inner):
            raise FileFormatError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor of its network")
    return found


def _check_whole(groups: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Of networks under several prefixes each must have all the parts that another has."""
    parts = {prefix: {name for name in group if PART.match(name)} for prefix, group in groups.items()}
    if len(set(map(frozenset, parts.values()))) > 1:
        some = list(parts.items())[:8]
        told = [f"{len(names)} {f'with {p!r}' if p else 'without'} ({p}{min(names)} ...)" for p, names in some]
        raise FileFormatError(
            f"{path}: its network's tensors have no prefix in common: {', '.join(told)}; give all of them the same, or take "
            "the network of one: --weights PREFIX"
        )


def _lost(own: Mapping[str, Any], label: str) -> list[_Unread]:
    """Averages in a dictionary that is called so, and has no whole network."""
    count = sum(isinstance(value, Tensor) and value.dim() > 0 for value in own.values())
    lost = _is_averaged(label) and count
    return [_Unread(label, f"of its {count} tensors no whole network is made")] if lost else []


def _named(networks: list[Network], unread: list[_Unread], data: Any) -> tuple[list[Network], list[_Unread]]:
    """With lists of averages, each under the names of the one trained network that it has the shapes of."""
    for place, values in _lists(data):
        shapes = [value.shape for value in values]
        like = [n for n in networks if not n.averaged and shapes == [tensor.shape for tensor in n.tensors.values()]]
        if len(like) == 1:
            averages = dict(zip(like[0].tensors, values, strict=True))
            networks = [*networks, Network(place, averages, True, like[0].beside)]
        else:
            unread = [*unread, _Unread(place, f"its {len(values)} tensors have no names, and not its network's shapes")]
    return networks, unread


def _lists(data: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """Lists of tensors that are called averages."""
    visits = Visits()
    for label, own in dictionaries(data):
        for name, values in own.items():
            if not (isinstance(values, (list, tuple)) and (name == SHADOW or _is_averaged(_at(label, name)))):
                continue
            visits.count(values, _at(label, name))
            if values and all(isinstance(value, Tensor) for value in values):
                yield _at(label, name), list(values)


def _choose(networks: list[Network], unread: list[_Unread], path: Path, weights: str | None) -> Network:
    kinds = {"ema": [n for n in networks if n.averaged], "model": [n for n in networks if not n.averaged]}
    fitting = [each for each in networks if each.label == weights]
    if unread and not fitting and weights in (None, "ema"):
        raise FileFormatError(
            f"{path} has averaged weights at {unread[0].label!r}, but {unread[0].why}; "
            "--weights model converts the trained ones"
        )
    usual = "ema" if kinds["ema"] else "model"
    fitting = fitting or kinds.get(usual if weights is None else weights, [])
    if len(fitting) == 1:
        return fitting[0]
    have = ", ".join(
        f"{each.label or 'model'!r} ({'averaged' if each.averaged else 'trained'})" for each in networks[:16]
    )
    problem = f"has {len(fitting)} networks" if fitting else f"has no {weights!r} weights"
    raise ConfigError(f"{path} {problem}; there {'are' if len(networks) > 1 else 'is'} {have}: pass --weights NAME")
