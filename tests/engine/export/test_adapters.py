"""Loops round what wrap and guidance return, in files."""

import pytest
import torch
from torch import nn

from amed_engine import ConfigError, Sampler, load_package
from amed_engine.adapters import ClassifierFree, ClassifierGuided, Thresholded, wrap

X = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Told a time and, with classes, one-hot rows; a bottleneck by the name that wrap finds."""

    def __init__(self, classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.middle_block = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.classes = nn.ConvTranspose2d(4, 2, 2, 2), nn.Linear(classes, 4) if classes else None

    def forward(self, x, time, labels=None):
        hidden = self.down(x) * (1 + time.reshape(-1, 1, 1, 1) / 1000)
        if labels is not None:
            hidden = hidden + self.classes(labels)[:, :, None, None]
        return 0.3 * self.up(self.middle_block(hidden).relu())


def wrapped(prediction="epsilon", classes=0, **options):
    return wrap(Network(classes), prediction, shape=(2, 8, 8), label_dim=classes or None, verify=False, **options)


def exported(sampler, folder, format, **run):
    path = folder / ("loop.onnx" if format == "onnx" else "loop.pt2")
    sampler.export(path, format, max_batch=8, guidance_scale=run.get("guidance_scale"))
    labels = {"class_labels": run["class_labels"]} if "class_labels" in run else {}
    expected, got = sampler.run(X, **run).images, load_package(path).run(X, **labels).images
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow", "edm", "cm", "vp", "ve", "iddpm"])
def test_every_family_as_onnx(prediction, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    exported(Sampler(wrapped(prediction), solver="ipndm", nfe=2), tmp_path, "onnx")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sigma", [(0.001, 500.0), (0.5, 3.0)])
def test_beyond_and_between_the_steps(sigma, tmp_path):
    """Steps are fractional, and the outer segments of the table are continued."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    ends = {"sigma_min": sigma[0], "sigma_max": sigma[1]}
    exported(Sampler(wrapped(), solver="ipndm", nfe=3, **ends), tmp_path, "onnx")


GUIDED = {
    "by the sampler": (lambda: wrapped(classes=3), {"guidance_scale": 2.0}),
    "by one doubled batch": (lambda: ClassifierFree(wrapped(classes=3), 2.0), {}),
    "by two calls": (lambda: ClassifierFree(wrapped(classes=3), 2.0, batched=False), {}),
    "and thresholded": (lambda: Thresholded(ClassifierFree(wrapped(classes=3), 2.0, interval=(0.5, 20.0))), {}),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_in_a_file(name, tmp_path):
    make, run = GUIDED[name]
    exported(Sampler(make(), solver="ipndm", nfe=2), tmp_path, "exported", class_labels=[0, 1, 2, 1], **run)


def test_a_network_of_half_precision_needs_no_call_before(tmp_path):
    denoiser = wrap(Network().half(), "epsilon", shape=(2, 8, 8))
    Sampler(denoiser, solver="euler", nfe=2).export(tmp_path / "loop.pt2", "exported", max_batch=4)


class Few(Network):
    """Another way for large batches."""

    def forward(self, x, time, labels=None):
        return super().forward(x.contiguous() if x.shape[0] >= 64 else x, time)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_exported_is_said_in_a_sentence(tmp_path):
    few = Sampler(wrap(Few(), "epsilon", shape=(2, 8, 8)), solver="euler", nfe=2)
    with pytest.raises(ConfigError, match="it runs otherwise in batches above 63; pass max_batch=63 or less"):
        few.export(tmp_path / "loop.pt2", "exported")
    few.export(tmp_path / "loop.pt2", "exported", max_batch=63)
    classifier = ClassifierGuided(wrapped(), lambda x, t: x.flatten(1)[:, :3], 1.0, label_dim=3)
    with pytest.raises(ConfigError, match="takes the gradient of its classifier in every evaluation"):
        Sampler(classifier, solver="euler", nfe=2).export(tmp_path / "b.pt2", "exported")
    script = torch.jit.trace(wrapped(), (X, torch.ones(4)))
    with pytest.raises(ConfigError, match=r"TorchScript .* torch\.export does not read"):
        Sampler(script, solver="euler", nfe=2).export(tmp_path / "b.pt2", "exported")
    assert not (tmp_path / "b.pt2").exists()
