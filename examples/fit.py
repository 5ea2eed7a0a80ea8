"""A predictor fitted to a model, and what it gains: python examples/fit.py predictor.safetensors"""

import sys

import amed_engine


# Yours here: D, the estimate of the clean data (B, C, H, W), from x with noise of level sigma (B,). This one is exact for
# pixels that are ±1/2.
def model(x, sigma):
    return (x / (2 * sigma.view(-1, 1, 1, 1) ** 2)).tanh() / 2


shape = (1, 8, 8)
predictor = amed_engine.fit(model, nfe=4, shape=shape, samples=64, progress=False)  # 512 for a real one
amed_engine.save_predictor(predictor, sys.argv[1])  # with the plan it was fitted for

seeds = range(100, 164)  # none of those it has seen
truth = amed_engine.Sampler(model, solver="heun", nfe=128, schedule="polynomial", afs=False, shape=shape).run(seeds)
for name, sampler in {
    "ipndm": amed_engine.Sampler(model, solver="ipndm", nfe=4, shape=shape),
    "fitted": amed_engine.Sampler(model, sys.argv[1], shape=shape),
}.items():
    error = (sampler.run(seeds).images - truth.images).square().mean().sqrt()
    print(f"{name}: RMSE {error:.4f} to the exact solution")
