"""The whole loop in one file, run without this package: python examples/export.py digits.onnx"""

import sys

import numpy as np
import onnxruntime

import amed_engine

sampler = amed_engine.Sampler("digits", nfe=5)
sampler.export(sys.argv[1], "onnx")  # network, predictor and solver; checked before it is put in place

# Elsewhere: ONNX Runtime, TensorRT, ... Latents of unit variance and rows of classes in, images out.
session = onnxruntime.InferenceSession(sys.argv[1])
latents = np.random.default_rng(0).standard_normal((4, 1, 8, 8), dtype=np.float32)
classes = [3, 1, 4, 1]
labels = np.eye(10, dtype=np.float32)[classes]
(images,) = session.run(["images"], {"latents": latents, "labels": labels})

difference = np.abs(images - sampler.run(latents, class_labels=classes).images.numpy()).max()
print(f"{images.shape[0]} images, largest difference to Sampler.run {difference:.1e}")
