"""diffusers' own tests, at `TAG`, of its deterministic schedulers of noise levels, with AMEDScheduler in their place.

DIFFUSERS=/path/to/checkout pytest tests/integrations/test_diffusers_own_tests.py
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

TAG = "v0.40.0"
CHECKOUT = os.environ.get("DIFFUSERS")
FILES = ("euler", "heun", "kdpm2_discrete", "lms", "edm_euler")

FIGURES = "asserts the sums that its own solver's full loop ends with"
ORDER = "sets the places of its own evaluations; here they say where intervals of two evaluations begin"
LEVELS = (
    "interpolation_type='log_linear' is of other noise levels than those of the steps that the network is told: refused"
)
CONTINUOUS = "timestep_type='continuous' of noise prediction is not known: refused"
EULER, HEUN, KDPM2, LMS = (
    f"{name}SchedulerTest.test_" for name in ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete")
)
LOOPS = ("full_loop_no_noise", "full_loop_with_noise", "full_loop_device")
FAILING = {
    **{kind + loop: FIGURES for kind in (EULER, HEUN, KDPM2, LMS) for loop in LOOPS},
    **{f"{kind}full_loop_device_karras_sigmas": FIGURES for kind in (EULER, HEUN, LMS)},
    **{f"EDMEulerSchedulerTest.test_{loop}": FIGURES for loop in ("full_loop_no_noise", "full_loop_device")},
    f"{EULER}custom_sigmas": ORDER,
    f"{HEUN}custom_timesteps": ORDER,
    f"{EULER}custom_timesteps": LEVELS,
    f"{EULER}timestep_type": CONTINUOUS,
}


@pytest.mark.skipif(not CHECKOUT, reason=f"needs DIFFUSERS=/path/to/a/checkout of diffusers {TAG}")
def test_exactly_these_fail():
    command = [sys.executable, "-P", Path(__file__).with_name("run_own_tests_of_diffusers.py"), CHECKOUT, *FILES]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    counted = {test: outcome for test, outcome in said.items() if outcome not in ("skipped", "not ours")}
    failed = {test: outcome for test, outcome in counted.items() if outcome != "passed"}
    assert failed.keys() == FAILING.keys(), failed
    assert Counter(outcome == "passed" for outcome in counted.values()) == {True: 78, False: 21}
