"""Tables of programs on a device, line by line: one line an evaluation, and which line follows it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn.functional import silu

from amed_engine.engine.export.tableau import BASIS, basis_at
from amed_engine.engine.request import sent
from amed_engine.kernels.reference import frequencies
from amed_engine.sampling.denoiser import check_features
from amed_engine.sampling.predictors import AMEDPredictor
from amed_engine.serving.table import MAX_TICKS, Table
from amed_engine.solvers.rules import midpoint_level

IDLE = 0  # the line of a row that nobody has: it stays there, and its state becomes zero


class Bank:
    """Room for `slots` tables of MAX_TICKS lines each; what is used by no row makes room for what is new, oldest first.

    coefficients: (L, 3 (3 + H)) in the precision of the state. sigma: (L,). follows: (L,).
    """

    def __init__(self, slots: int, history: int, device: torch.device, dtype: torch.dtype):
        self.history, self.device, self.dtype = history, device, dtype
        lines = 1 + slots * MAX_TICKS
        self.coefficients = torch.zeros(lines, 3 * (3 + history), device=device, dtype=dtype)
        self.sigma = torch.ones(lines, device=device, dtype=dtype)
        self.follows = torch.zeros(lines, device=device, dtype=torch.int64)
        self.learned: Learned | None = None
        self._slots, self._lines = slots, lines
        self._free = list(reversed(range(slots)))
        self._held: OrderedDict[Table, tuple[int, int]] = OrderedDict()  # slot, and how many rows use it

    def hold(self, table: Table) -> int:
        """The table's first line, for one more row."""
        if table not in self._held:
            self._held[table] = (self._write(table), 0)
        slot, users = self._held[table]
        self._held[table] = (slot, users + 1)
        self._held.move_to_end(table)
        return _first(slot)

    def release(self, table: Table) -> None:
        """One row less uses it."""
        slot, users = self._held[table]
        self._held[table] = (slot, users - 1)

    def _write(self, table: Table) -> int:
        slot = self._free.pop() if self._free else self._evicted()
        lines = slice(_first(slot), _first(slot) + table.ticks)
        ticks = range(lines.start + 1, lines.stop)
        coefficients = table.coefficients if table.predictor is None else table.coefficients[..., 0]
        self.coefficients[lines] = sent(coefficients.flatten(1).to(self.dtype), self.device)
        self.sigma[lines] = sent(table.sigma.to(self.dtype), self.device)
        self.follows[lines] = sent(torch.tensor([*ticks, IDLE], device="cpu"), self.device)
        if table.predictor is not None:
            self.learn(table.predictor)
        if self.learned is not None:
            self.learned.write(slot, lines, table)
        return slot

    def learn(self, like: AMEDPredictor) -> None:
        """Room for predictors like this one, unless there is: from now on every line has weights on the basis."""
        if self.learned is not None:
            return
        self.learned = Learned(self._slots, self._lines, self.history, like, self.device, self.dtype)
        for table, (slot, _) in self._held.items():
            self.learned.write(slot, slice(_first(slot), _first(slot) + table.ticks), table)

    def _evicted(self) -> int:
        table = next(table for table, (_, users) in self._held.items() if not users)
        return self._held.pop(table)[0]


def _first(slot: int) -> int:
    return 1 + slot * MAX_TICKS


class Learned:
    """What AMED predictors add to the lines: weights on `BASIS`, the intervals they choose from, and each table's predictor.

    Rows without a predictor have weight on the 1 of the basis alone.
    """

    def __init__(
        self,
        slots: int,
        lines: int,
        history: int,
        like: AMEDPredictor,
        device: torch.device,
        dtype: torch.dtype,
    ):
        # In float64: the products with the basis cancel.
        shape = (lines, 3 * (3 + history), len(BASIS))
        self.weights = torch.zeros(shape, device=device, dtype=torch.float64)
        self.interval = torch.ones(lines, 2, device=device, dtype=dtype)
        self.chooses = torch.zeros(lines, device=device, dtype=torch.bool)
        self.slot = torch.zeros(lines, device=device, dtype=torch.int64)
        self.bottleneck = like.bottleneck
        self.frequencies = frequencies(like.embedding_dim, device).to(dtype)
        self.parameters = {
            name: torch.zeros(slots, *shape, device=device, dtype=dtype) for name, shape in _shapes(like)
        }
        self.widths = torch.zeros(slots, 2, device=device, dtype=dtype)

    def write(self, slot: int, lines: slice, table: Table) -> None:
        if table.predictor is None:
            self.weights[lines] = 0
            self.weights[lines, :, 0] = sent(table.coefficients.flatten(1), self.weights.device)
            self.chooses[lines] = False
            return
        device, predictor = self.weights.device, table.predictor
        self.weights[lines] = sent(table.coefficients.flatten(1, 2), device)
        chooses = table.interval[:, 0] > 0
        self.chooses[lines] = sent(chooses, device)
        self.interval[lines] = sent(table.interval.where(chooses[:, None], torch.ones_like(table.interval)), device).to(
            self.interval.dtype
        )
        self.slot[lines] = slot
        state = predictor.state_dict()
        for name, room in self.parameters.items():
            room[slot] = state[name].to(room) if name in state else 0
        widths = torch.tensor([predictor.scale_dir, predictor.scale_time], dtype=self.widths.dtype, device="cpu")
        self.widths[slot] = sent(widths, device)

    def choose(self, line: Tensor, features: Tensor | None, mid: Tensor) -> Tensor:
        """m, scale_dir, r and the noise level to tell (S, 4) of each row: chosen from these features where its line says so,
        else what they were."""
        slot, interval = self.slot[line], self.interval[line].to(self.widths.dtype)
        if features is not None:
            check_features(features, self.bottleneck, line.shape[0])
            seen = features.mean(1).flatten(1).to(self.widths.dtype)
        else:
            seen = interval.new_zeros(line.shape[0], self.bottleneck[0] * self.bottleneck[1])
        r, c, time = self._say(slot, seen, *interval.unbind(1))
        sigma, sigma_next = interval.double().unbind(1)
        r, c, time = r.double(), c.double(), time.double()
        m = midpoint_level(sigma, sigma_next, r)
        return torch.where(self.chooses[line][:, None], torch.stack([m, c, r, time * m], 1), mid)

    def coefficients(self, line: Tensor, mid: Tensor) -> Tensor:
        """(S, 3 (3 + H)) in float64."""
        m, c, r, _ = mid.unbind(1)
        basis = torch.stack(basis_at(torch.ones_like(m), m, r, c), 1)
        return (self.weights[line] @ basis[:, :, None]).squeeze(2)

    def _say(self, slot: Tensor, seen: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`AMEDPredictor.forward` with a predictor of its own for each row."""

        def layer(name: str, x: Tensor) -> Tensor:
            weight, bias = (self.parameters[f"{name}.{kind}"][slot] for kind in ("weight", "bias"))
            return (weight @ x[:, :, None]).squeeze(2) + bias

        def embedded(level: Tensor) -> Tensor:
            angle = level[:, None] * self.frequencies
            return silu(layer("map_layer0", torch.cat([angle.sin(), angle.cos()], 1)))

        encoded = layer("enc_layer1", silu(layer("enc_layer0", seen)))
        z = torch.cat([encoded, embedded(sigma), embedded(sigma_next)], 1)
        r, direction, time = (layer(head, z).sigmoid().squeeze(1) for head in ("fc_r", "fc_scale_dir", "fc_scale_time"))
        widths = self.widths[slot]
        return r, 1 + widths[:, 0] * (2 * direction - 1), 1 + widths[:, 1] * (2 * time - 1)


def _shapes(like: AMEDPredictor) -> list[tuple[str, tuple[int, ...]]]:
    """The parameters of a predictor with both scale heads."""
    pixels, inputs = like.bottleneck[0] * like.bottleneck[1], like.bottleneck_dim + 2 * like.embedding_dim
    layers = {
        "map_layer0": (like.embedding_dim, like.embedding_dim),
        "enc_layer0": (like.hidden_dim, pixels),
        "enc_layer1": (like.bottleneck_dim, like.hidden_dim),
        **dict.fromkeys(("fc_r", "fc_scale_dir", "fc_scale_time"), (1, inputs)),
    }
    return [
        (f"{name}.{kind}", shape if kind == "weight" else shape[:1])
        for name, shape in layers.items()
        for kind in ("weight", "bias")
    ]
