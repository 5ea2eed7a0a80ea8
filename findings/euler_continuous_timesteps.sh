#!/usr/bin/env bash
# Continuous timesteps are ignored unless the network predicts v.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: EulerDiscreteScheduler(timestep_type="continuous") tells the network a continuous function of
#   sigma, ln(sigma) / 4 as EDM does, for every prediction type that it takes.
# Seen: Only with prediction_type="v_prediction": 1.26, 0.56, 0.10, -1.15 in four steps. With the default,
#   "epsilon", and with "sample" the setting is stored and nothing happens: the timesteps are 999, 666, 333,
#   0.
# Why it matters: A noise predictor trained on ln(sigma) / 4 is handed 999, far outside of anything it has
#   seen. An unknown timestep_type is not refused either; it does the same.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
from diffusers import EulerDiscreteScheduler


def timesteps(**settings):
    scheduler = EulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(4)
    return scheduler.timesteps.tolist(), scheduler.sigmas[:-1]


told, sigmas = timesteps(timestep_type="continuous", prediction_type="v_prediction")
print("v_prediction", told)
assert all(abs(t - float(sigma.log()) / 4) < 1e-5 for t, sigma in zip(told, sigmas))
for prediction_type in ("epsilon", "sample"):
    told, _ = timesteps(timestep_type="continuous", prediction_type=prediction_type)
    print(prediction_type, told)
    assert told == [999.0, 666.0, 333.0, 0.0]
assert timesteps(timestep_type="no such type")[0] == [999.0, 666.0, 333.0, 0.0]
PYTHON
