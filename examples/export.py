"""The whole loop in one file, run without this package: python examples/export.py loop.onnx"""

import sys

import numpy as np
import onnxruntime

import amed_engine


# Yours here: a network, "digits", a checkpoint. D of pixels that are ±1/2, as in fit.py.
def model(x, sigma):
    return (x / (2 * sigma.view(-1, 1, 1, 1) ** 2)).tanh() / 2


sampler = amed_engine.Sampler(model, solver="dpmpp", nfe=5, shape=(3, 16, 16))
sampler.export(sys.argv[1], "onnx")  # network, predictor and solver; checked before it is put in place

# Elsewhere: ONNX Runtime, TensorRT, ... Latents of unit variance in, images out, any number at once.
session = onnxruntime.InferenceSession(sys.argv[1])
latents = np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)
(images,) = session.run(["images"], {"latents": latents})

difference = np.abs(images - sampler.run(latents).images.numpy()).max()
print(f"{len(images)} images, largest difference to Sampler.run {difference:.1e}")
