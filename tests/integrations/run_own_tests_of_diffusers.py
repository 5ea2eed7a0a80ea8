"""diffusers' own scheduler tests with AMEDScheduler in the place of the scheduler that they are of.

    python -P run_own_tests_of_diffusers.py CHECKOUT FILE...

Prints {"Class.test": "passed", "skipped", "not ours", or what went wrong} as JSON. Wherever a file asks for its own class by
name, AMEDScheduler is meant. A test that makes none is not ours.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import unittest
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

from amed_engine.integrations.diffusers import AMEDScheduler
from amed_engine.integrations.diffusers.parameterization import Parameterization


def outcomes(name: str) -> dict[str, str]:
    """Of every test in tests/schedulers/test_scheduler_NAME.py."""
    module = import_module(f"tests.schedulers.test_scheduler_{name}")
    found = {}
    for kind in [
        kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__
    ]:
        (theirs,) = kind.scheduler_classes
        for place in (module, import_module("tests.schedulers.test_schedulers")):
            replace(place, theirs)
        kind.scheduler_classes = (AMEDScheduler,)
        for test in unittest.defaultTestLoader.getTestCaseNames(kind):
            found[f"{kind.__name__}.{test}"] = outcome(kind(test))
    return found


def replace(module: ModuleType, theirs: type) -> None:
    for name in [name for name, value in vars(module).items() if value is theirs]:
        setattr(module, name, AMEDScheduler)


def outcome(test: Any) -> str:
    result = unittest.TestResult()
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    # What every AMEDScheduler does while it is made.
    with quiet[0], quiet[1], mock.patch.object(Parameterization, "of", wraps=Parameterization.of) as made:
        test.run(result)
    if result.skipped:
        return "skipped"
    failed = [*result.errors, *result.failures]
    if failed:
        return failed[0][1].strip().splitlines()[-1]
    return "passed" if made.called else "not ours"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, sys.argv[1])
    json.dump({test: said for name in sys.argv[2:] for test, said in outcomes(name).items()}, sys.stdout)
