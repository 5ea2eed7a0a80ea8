"""The table of noise levels that diffusers' schedulers take, read strictly. No torch in sight."""

from __future__ import annotations

import os
from typing import Any

from amed_engine.engine.export.strict_json import (
    MAX_EVALUATIONS,
    check_hash,
    entries,
    expect_names,
    flag,
    noise_levels,
    numbers,
    read_file,
    short_text,
    whole,
)
from amed_engine.engine.export.tableau import refuse

FORMAT, VERSION, TIMESTEPS = "amed_schedule", 1, ("log_sigma", "discrete")
ENTRIES = (
    *("format", "version", "description", "timestep_type"),
    *("sigmas", "timesteps", "scale_dir", "scale_time", "afs"),
)


def read_schedule(path: str | os.PathLike) -> dict[str, Any]:
    """The table of a file that `write_schedule` made. Raises FileFormatError, naming the file."""
    return read_file(path, _schedule)


def _schedule(data: Any) -> dict[str, Any]:
    check_hash(data, _check)
    return data


def _check(data: Any) -> None:
    expect_names(data, ENTRIES, "schedule")
    if data["format"] != FORMAT or whole(data["version"], "version", 0) != VERSION:
        refuse("format", f"{data['format']!r} version {data['version']!r}", f"{FORMAT!r} version {VERSION}")
    if data["timestep_type"] not in TIMESTEPS:
        refuse("timestep_type", data["timestep_type"], f"one of {', '.join(TIMESTEPS)}")
    short_text(data["description"], "description")
    sigmas = noise_levels(data["sigmas"], "sigmas", 2, MAX_EVALUATIONS + 1)
    if sigmas[0] <= sigmas[-1]:  # a learned midpoint may lie outside its interval, so no more than that
        refuse("sigmas", f"levels from {sigmas[0]:g} to {sigmas[-1]:g}", "a start above the end")
    numbers(data["timesteps"], "timesteps", len(sigmas), len(sigmas))
    intervals = len(noise_levels(data["scale_dir"], "scale_dir", 1, len(sigmas) - 1))
    noise_levels(data["scale_time"], "scale_time", intervals, intervals)
    for k, free in enumerate(entries(data["afs"], "afs", len(sigmas) - 1, len(sigmas) - 1)):
        if flag(free, f"afs[{k}]") and k:
            refuse(f"afs[{k}]", free, "true for the first evaluation only")
