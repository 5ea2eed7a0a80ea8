"""What a solver says, as data, and how it becomes one small matrix per network evaluation.

After an evaluation D = denoiser(y; sigma) a solver states a `Stage`: where the anchor x of the step goes and where to
evaluate next, each a linear combination of x and of directions (a `Row`). `fold` writes that stage as the matrix C of

    [d, x, y] <- C [x, y, D, d_1, d_2, ...]

so that one pass over the tensors applies it. Coefficients are float64 tensors on the host where nothing is learned, or
(B,) tensors on the device where a predictor gave them; the literal 0.0 marks entries that are zero by structure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Coefficient = Tensor | float


class Row(NamedTuple):
    """a·x + Σ_j b_j·d_j, with x the anchor of the step and d_0 the newest direction. Coefficients () or (B,)."""

    a: Coefficient
    b: tuple[Coefficient, ...]

    def scaled(self, c: Coefficient) -> Row:
        """The directions' coefficients times c."""
        return Row(self.a, tuple(c * b for b in self.b))

    def after(self, first: Row) -> Row:
        """This row read from the point that `first` leads to: a·(first) + Σ b_j·d_j."""
        size = max(len(self.b), len(first.b))
        mine, theirs = ((*row.b, *[0.0] * (size - len(row.b))) for row in (self, first))
        return Row(self.a * first.a, tuple(m + self.a * t for m, t in zip(mine, theirs, strict=True)))


class Stage(NamedTuple):
    """What follows one evaluation.

    y: next evaluation point; several rows are independent points, evaluated in one batched call.
    x: new anchor, None keeps it. x_is_y: the anchor goes to the evaluation point, and x is None.
    sigma: noise level of y, () or (B,), a tuple of them for several points; None ends the step (y is then at sigma_next).
    sigma_net: noise level told to the network; None means sigma.
    """

    y: tuple[Row, ...]
    x: Row | None = None
    x_is_y: bool = False
    sigma: Tensor | tuple[Tensor, ...] | None = None
    sigma_net: Tensor | tuple[Tensor, ...] | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """What one update writes besides directions: the anchor if it goes elsewhere than y, then the evaluation points."""
        return self.y if self.x is None else (self.x, *self.y)


class Midpoint(NamedTuple):
    """Where and how far to go inside one interval: m = sigma_next^r · sigma^(1-r).

    Each field is () or (B,); with a leading dimension K for K parallel points.
    """

    r: Tensor | float
    scale_dir: Tensor | float = 1.0
    scale_time: Tensor | float = 1.0


Choice = Midpoint | Row  # what a predictor says of one interval


def map_choice(function: Callable[[Coefficient], Coefficient], choice: Choice) -> Choice:
    """The choice with the function applied to each of its coefficients."""
    if isinstance(choice, Row):
        return Row(function(choice.a), tuple(function(b) for b in choice.b))
    return Midpoint(*(function(field) for field in choice))


class Update(NamedTuple):
    """One `combine` call: the matrix, the tensors it reads and the meaning of what it writes.

    columns index [x, y_1 .. y_K unless y is x, D_1 .. D_K, d_1, d_2, ...]; the outputs are the `new_directions`
    first, then the anchor if `moves_x` and it is not y, then the evaluation points. `keep` directions stay afterwards.
    sigma, sigma_net: noise levels of each new evaluation point; None where the step ends.
    """

    coeffs: Tensor  # (M, J, 1 or B)
    columns: tuple[int, ...]
    new_directions: int
    keep: int
    moves_x: bool
    x_is_y: bool
    sigma: tuple[Tensor, ...] | None
    sigma_net: tuple[Tensor, ...] | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Update:
        def move(levels: tuple[Tensor, ...] | None):
            return None if levels is None else tuple(level.to(device, dtype) for level in levels)

        return self._replace(
            coeffs=self.coeffs.to(device, dtype), sigma=move(self.sigma), sigma_net=move(self.sigma_net)
        )


class Layout(NamedTuple):
    """Which tensors exist when a stage is applied: K points evaluated at `sigma`, `past` older directions."""

    sigma: tuple[Tensor, ...]
    y_is_x: bool
    past: int
    data_prediction: bool

    @property
    def points(self) -> int:
        return len(self.sigma)

    @property
    def size(self) -> int:
        return 1 + self.points * (1 if self.y_is_x else 2) + self.past

    def denoised_column(self, k: int) -> int:
        return k + (1 if self.y_is_x else 1 + self.points)

    def direction(self, k: int) -> list[Coefficient]:
        """The k-th newest direction over the columns: (y - D) / sigma, or D for data prediction, or an older one."""
        row: list[Coefficient] = [0.0] * self.size
        if k >= self.points:
            row[self.size - self.past + k - self.points] = 1.0
        elif self.data_prediction:
            row[self.denoised_column(k)] = 1.0
        else:
            row[0 if self.y_is_x else 1 + k] = 1 / self.sigma[k]
            row[self.denoised_column(k)] = -1 / self.sigma[k]
        return row

    def expand(self, row: Row) -> list[Coefficient]:
        """The row over the columns instead of over anchor and directions."""
        total: list[Coefficient] = [row.a, *[0.0] * (self.size - 1)]
        for k, b in enumerate(row.b):
            for column, d in enumerate(self.direction(k)):
                if not (isinstance(d, float) and d == 0.0):
                    total[column] = total[column] + b * d
        return total


def levels(sigma: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return sigma if isinstance(sigma, tuple) else (sigma,)


def stack(matrix: list[list[Coefficient]], like: Tensor) -> Tensor:
    """(M, J, 1 or B) from nested coefficients, each () or (B,)."""
    # new_full, not new_tensor: a copy from the host cannot be captured.
    flat = [c if isinstance(c, Tensor) else like.new_full((), c) for row in matrix for c in row]
    flat = torch.broadcast_tensors(*(c.reshape(-1) for c in flat))
    return torch.stack(flat).unflatten(0, (len(matrix), -1))


def fold(stage: Stage, layout: Layout, keep: int, stack: Callable[..., Any] = stack) -> Update:
    """The stage as one matrix over the tensors of `layout`, retaining the newest `keep` directions. stack: makes `coeffs`."""
    new = 0 if layout.data_prediction else min(keep, layout.points)
    matrix = [layout.direction(k) for k in range(new)] + [layout.expand(row) for row in stage.rows]
    # A matrix of zeros reads the anchor, for its shape.
    columns = tuple(j for j in range(layout.size) if any(not is_zero(row[j]) for row in matrix)) or (0,)
    sigma = None if stage.sigma is None else levels(stage.sigma)
    return Update(
        coeffs=stack([[row[j] for j in columns] for row in matrix], like=layout.sigma[0]),
        columns=columns,
        new_directions=new,
        keep=min(keep, layout.points + layout.past),
        moves_x=stage.x_is_y or stage.x is not None,
        x_is_y=stage.x_is_y,
        sigma=sigma,
        sigma_net=sigma if stage.sigma_net is None else levels(stage.sigma_net),
    )


def is_zero(c: Coefficient) -> bool:
    """Whether a coefficient is zero whatever a predictor says. Only host constants are looked at: reading a device tensor
    would synchronize, and a learned zero is not structural."""
    if not isinstance(c, Tensor):
        return c == 0
    constant = c.dim() == 0 and c.device.type == "cpu" and not c.requires_grad and not torch.compiler.is_compiling()
    return constant and bool(c == 0)


def retained(stages: list[Stage], index: int, memory: int) -> int:
    """How many directions anything after stages[index] may read: `memory` across steps, or what a later stage names."""
    counts = [memory]
    points = len(stages[index].y)
    for stage in stages[index + 1 :]:
        counts.append(max(len(row.b) for row in stage.rows) - points)
        points = len(stage.y)
    return max(counts)


def trimmed(stage: Stage) -> Stage:
    """Without trailing coefficients that are exactly zero (DPM-Solver-2 at r = 1/2 does not read its first direction)."""

    def trim(row: Row) -> Row:
        b = list(row.b)
        while len(b) > 1 and is_zero(b[-1]):
            b.pop()
        return Row(row.a, tuple(b))

    return stage._replace(y=tuple(trim(row) for row in stage.y), x=None if stage.x is None else trim(stage.x))
