#!/usr/bin/env bash
# Rescaled to zero terminal SNR, the noise levels of linear betas rise before they fall.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: Noise levels of a training schedule fall from the noisiest to the cleanest, rescaled to zero
#   terminal SNR or not.
# Seen: sigmas[:4] of EulerDiscreteScheduler(rescale_betas_zero_snr=True) are 4096.0, 15406.0, 7668.0, 5088.8:
#   the noisiest entry is the fourth largest. The last alphas_cumprod is replaced by 2**-24 = 5.96e-8,
#   although rescaling has left 4.2e-9 and 1.7e-8 in the entries before it. With the scaled-linear betas of
#   Stable Diffusion the levels do fall (4096, 2254, 1125).
# Why it matters: A solver divides by differences of levels, bisects in them, or takes sigma_max for the noise
#   of the first latent; on these betas timestep 998 is nearly four times noisier than timestep 999, and 4096
#   is not the largest level.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
from diffusers import EulerDiscreteScheduler

sigmas = EulerDiscreteScheduler(rescale_betas_zero_snr=True).sigmas
print("first levels", sigmas[:4].tolist())
assert sigmas[0] == 4096.0
assert sigmas[1] > 15000 and sigmas[1] > sigmas[2] > sigmas[3] > sigmas[0]

latent = EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
)
print("scaled linear", latent.sigmas[:4].tolist())
assert (latent.sigmas.diff() < 0).all()
PYTHON
