"""Sixteen digits in five network evaluations each: python examples/sample.py digits.png"""

import sys

import torch
from PIL import Image

import amed_engine

sampler = amed_engine.Sampler("digits", nfe=5)  # a bundled model and its predictor
result = sampler.run(range(16), class_labels=3)  # a seed per sample: the same image in any batch

# Samples are (B, C, H, W) in -1 .. 1.
pixels = ((result.images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
row = torch.cat(list(pixels[:, 0]), dim=1)  # (8, 16 · 8)
Image.fromarray(row.numpy()).resize((16 * 64, 64), Image.Resampling.NEAREST).save(sys.argv[1])
print(f"NFE {result.nfe}: {result.plan.describe()}")
