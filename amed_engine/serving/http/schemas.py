"""What a request may say: every key known, every value of its type, nothing converted."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from amed_engine.serving.http.errors import Refusal

Number = int | float
Labels = Number | list[Number] | list[list[Number]]
Whole = Annotated[int, Field(ge=1)]


def optional(description: str, **more: Any) -> Any:
    return Field(None, description=description, **more)


class Asked(BaseModel):
    """What every request may say of its samples; null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = optional("the name of a model that is served; may be left out where there is one")
    n: Whole | None = optional("how many samples, at least 1; 1 unless there are seeds")
    seeds: list[int] | None = optional("a list of whole numbers from 0 to 2^32 - 1, one sample each")
    class_labels: Labels | None = optional("a class, or one for each sample, or a row of numbers for each")
    nfe: Whole | None = optional("network evaluations per sample, at least 1")
    solver: str | None = optional("the name of a solver")
    guidance_scale: Number | None = optional("the strength of classifier-free guidance, a number")

    @property
    def count(self) -> int:
        """How many samples. Raises Refusal where n and seeds differ."""
        if self.seeds is None:
            return self.n or 1
        if self.n not in (None, len(self.seeds)):
            raise refusal("n", f"n is {self.n}, but seeds are {len(self.seeds)}; leave one of them out")
        return len(self.seeds)

    @property
    def batch(self) -> int | list[int]:
        """As `ContinuousSampler.submit` takes it: the seeds, or how many."""
        return self.count if self.seeds is None else self.seeds

    def options(self) -> dict[str, Any]:
        """Of `ContinuousSampler.submit`, but for the samples."""
        return {"nfe": self.nfe, "solver": self.solver, "guidance_scale": self.guidance_scale}


class Generation(Asked):
    """POST /v1/images/generations, in OpenAI's words and some of ours."""

    prompt: str = Field(
        description='text: the digits of a class, "3"; or "" where seeds draw the class, or there is none'
    )
    size: str | None = optional('the model\'s own, as width x height, "8x8"; or "auto"')
    response_format: Literal["b64_json"] | None = optional('"b64_json"')
    output_format: Literal["png"] | None = optional('"png"')
    user: str | None = optional("any text; it changes nothing")
    seed: int | None = optional("the first sample's seed, a whole number; the others have the next ones")

    @property
    def batch(self) -> int | list[int]:
        if self.seed is None:
            return super().batch
        if self.seeds is not None:
            raise refusal("seed", "seed and seeds exclude each other; leave one of them out")
        return list(range(self.seed, self.seed + self.count))


class Program(BaseModel):
    """A solver of the client's own: one of the two."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    predictor: str | None = optional("a .safetensors file of save_predictor, in base64")
    plan: dict[str, Any] | None = optional("a recipe, the JSON that Plan.save or amed search-schedule writes")


class Draw(Asked):
    """POST /v1/samples: all that the engine takes."""

    solver_options: dict[str, bool | Number | str | None] | None = optional(
        "an object of numbers, true, false or texts"
    )
    schedule: str | list[Number] | None = optional("a name, or a list of noise levels")
    rho: Number | None = optional("a number")
    afs: bool | Literal["mean"] | None = optional('true, false or "mean"')
    predictor: Literal["none"] | None = optional('"none", to draw without the model\'s own')
    program: Program | None = optional("an object with either predictor or plan")
    conditions: str | None = optional("a .safetensors file of tensors (1 or B, ...) by name, in base64")
    latents: str | None = optional('a .safetensors file of one tensor "latents" (B, ...), in base64; in place of seeds')
    deadline: Number | None = optional("seconds from now, a number above 0", gt=0)
    priority: int | None = optional("a whole number; larger ones go first")
    format: Literal["png", "npz", "safetensors"] | None = optional('"png", "npz" or "safetensors"')
    stream: bool | None = optional("true or false")

    def options(self) -> dict[str, Any]:
        names = ("solver_options", "schedule", "rho", "afs", "predictor", "deadline")
        own = {name: getattr(self, name) for name in names}
        return {**super().options(), **own, "priority": self.priority or 0}


A = TypeVar("A", bound=Asked)


def read(cls: type[A], data: Any) -> A:
    """Raises Refusal, 422, for the first thing that is wrong."""
    if not isinstance(data, dict):
        raise Refusal(422, "invalid_value", f"the body must be a JSON object, got {_short(data)}")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _explained(cls, error) from None


def refusal(param: str, message: str) -> Refusal:
    return Refusal(422, "invalid_value", message, param)


def _explained(cls: type[BaseModel], error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    known, name = cls.model_fields, path[0]
    if name == "program" and len(path) > 1:
        known, name = Program.model_fields, path[1]
    param = name if known is cls.model_fields else f"program.{name}"
    if first["type"] == "extra_forbidden":
        return Refusal(422, "unknown_key", f"unknown key {_short(param)}; known are {', '.join(known)}", param[:80])
    return refusal(param, _expected(param, known[name], first))


def _expected(param: str, field: FieldInfo, first: Any) -> str:
    what = f"expected {field.description}"
    return (
        f"{param} is missing; {what}"
        if first["type"] == "missing"
        else f"{param}: {what}, got {_short(first['input'])}"
    )


def _short(value: Any) -> str:
    return reprlib.repr(value)[:80]
