"""A denoiser in a file keeps its range, classes and fingerprint, whatever form it was saved in."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import Sampler
from amed_engine.adapters import ClassifierFree, Thresholded, load_onnx, save_onnx, save_program, seal, wrap
from amed_engine.adapters.fingerprint import can_tell, fingerprint, is_model
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.sampling.modules import said

X, SIGMA = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 5.0, 20.0])
TOLD = ("can_guide", "bottleneck_size")


class Prompted(nn.Module):
    """A network told a prompt."""

    def __init__(self):
        super().__init__()
        self.first, self.prompt = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(5, 4)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, step, prompt):
        hidden = self.first(x) * (1 + step.reshape(-1, 1, 1, 1) / 1000)
        return self.last(hidden + self.prompt(prompt).mean(1)[:, :, None, None])


def traced(denoiser, folder):
    labels = (torch.eye(denoiser.label_dim)[[0, 1, 0]],) if denoiser.label_dim else ()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(denoiser, (X, SIGMA, *labels)).save(str(folder / "a.pt"))
    return folder / "a.pt"


def exported(denoiser, folder):
    """By torch alone, classes as integers."""
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    labels = (torch.tensor([0, 1, 0]),) if denoiser.label_dim else ()
    with torch.no_grad():
        program = torch.export.export(denoiser, (X, SIGMA, *labels), dynamic_shapes=(batch,) * (2 + len(labels)))
    torch.export.save(program, folder / "b.pt2")
    return folder / "b.pt2"


def program(denoiser, folder):
    return save_program(denoiser, folder / "c.pt2", max_batch=8)


def onnx(denoiser, folder):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save_onnx(denoiser, folder / "d.onnx", max_batch=8)


@pytest.fixture
def denoisers(make_unet):
    prompts = {"prompt": torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))}
    nothing = {"prompt": torch.zeros(1, 3, 5)}
    torch.manual_seed(0)
    return {
        "plain": wrap(make_unet(), "epsilon"),
        "without a bottleneck": wrap(make_unet(), "v", bottleneck=None, verify=False),
        "classes": wrap(make_unet(num_classes=4), "epsilon"),
        "a class that is none": wrap(make_unet(num_classes=4), "x0", betas="cosine", null_class=3),
        "prompts": wrap(Prompted(), "epsilon", shape=(1, 8, 8), conditions=prompts, null_conditions=nothing),
        "one prompt": wrap(Prompted(), "epsilon", shape=(1, 8, 8), conditions={"prompt": prompts["prompt"][:1]}),
        "guided": ClassifierFree(wrap(make_unet(num_classes=4), "epsilon", null_class=3), 2.0),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(("plain", "without a bottleneck", "a class that is none", "prompts"), (traced, exported)),
        *itertools.product(("classes", "guided"), (program,)),
        *itertools.product(("a class that is none", "guided", "one prompt"), (onnx,)),
    ],
)
def test_a_file_is_sampled_as_what_it_was_made_from(denoisers, name, form, tmp_path):
    denoiser = denoisers[name]
    path = form(denoiser, tmp_path)
    own, opened = resolve(denoiser), resolve(path)
    for fact in ("shape", "label_dim", "sigma_min", "sigma_max"):
        assert getattr(opened, fact) == getattr(own, fact), fact
    assert [said(opened.network, fact) for fact in TOLD] == [said(denoiser, fact) for fact in TOLD]
    assert fingerprint(opened.network) == fingerprint(denoiser)
    asked = {"class_labels": [0, 1]} if own.label_dim > 1 else {}
    asked |= {"guidance_scale": 2.0} if own.label_dim and said(denoiser, "can_guide") else {}
    got, expected = (Sampler(model, solver="ipndm", nfe=3).run([1, 2], **asked).images for model in (path, denoiser))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [exported, onnx])
def test_a_plan_of_the_network_is_for_its_file_and_for_no_other(make_unet, form, tmp_path):
    torch.manual_seed(0)
    denoiser, other = wrap(make_unet(), "epsilon"), wrap(make_unet(), "epsilon", betas="cosine")
    plan = replace(Sampler(denoiser, solver="ipndm", nfe=3).plan, model=fingerprint(denoiser))
    Sampler(path := form(denoiser, tmp_path), plan=plan)
    assert can_tell(resolve(path).network)
    assert is_model(resolve(path).network, plan.model)
    with pytest.raises(ConfigError, match="made for another model"):
        Sampler(form(other, tmp_path), plan=plan)


@pytest.mark.filterwarnings("ignore")
def test_what_goes_round_a_file_is_another_model(make_unet, tmp_path):
    opened, denoiser = load_onnx(onnx(wrap(make_unet(), "flow"), tmp_path)), wrap(make_unet(), "flow")
    assert len({fingerprint(opened), fingerprint(Thresholded(opened)), fingerprint(Thresholded(opened, 0.9))}) == 3
    assert fingerprint(denoiser) == fingerprint(opened)  # made anew with the same weights


def test_a_range_that_is_set_later_is_kept(make_unet, tmp_path):
    denoiser = wrap(make_unet(), "epsilon")
    denoiser.sigma_max = 20.0
    assert resolve(program(denoiser, tmp_path)).sigma_max == 20.0


def test_a_program_told_integers_is_asked_with_them(make_unet):
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 1)

        def forward(self, x, sigma, labels):
            return x / (1 + sigma[:, None, None, None] ** 2) + self.table(labels)[:, :, None, None]

    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    made = torch.export.export(Told(), (X, SIGMA, torch.tensor([0, 1, 2])), dynamic_shapes=(batch,) * 3)
    sampler = Sampler(made, label_dim=4, solver="euler", nfe=2)
    rows = sampler.run(X, class_labels=torch.eye(4)[:3]).images
    torch.testing.assert_close(sampler.run(X, class_labels=[0, 1, 2]).images, rows)
    with pytest.raises(ConfigError, match='knows "no class"'):
        sampler.run(X, class_labels=[0, 1, 2], guidance_scale=2.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("format", "classes"), [("exported", 0), ("onnx", 4)])
def test_a_loop_is_no_denoiser_and_says_its_models_fingerprint(make_unet, format, classes, tmp_path):
    denoiser = wrap(make_unet(num_classes=classes or None), "epsilon")
    path = tmp_path / ("loop.onnx" if format == "onnx" else "loop.pt2")
    Sampler(denoiser, solver="euler", nfe=2).export(path, format, max_batch=8, verify=False)
    assert amed_engine.load_package(path).facts.fingerprint == fingerprint(denoiser)
    with pytest.raises(ConfigError, match=r"whole sampling loop.*load_package"):
        Sampler(path)


@pytest.mark.filterwarnings("ignore")
def test_facts_that_are_not_those_of_the_graph_are_refused(make_unet, tmp_path):
    model = pytest.importorskip("onnx")
    path = onnx(wrap(make_unet(num_classes=4), "epsilon"), tmp_path)
    for facts, message in (
        ('{"label_dim": 5}', "say other label_dim"),
        ('{"sigma_min": -1}', "damaged"),
        ("[]", "damaged"),
        ('{"anything": 1}', "damaged"),
    ):
        opened = model.load(path)
        model.helper.set_model_props(opened, {"amed.facts": facts})
        model.save(opened, tmp_path / "bad.onnx")
        seal(tmp_path / "bad.onnx")
        with pytest.raises(FileFormatError, match=message):
            load_onnx(tmp_path / "bad.onnx")


def test_denoisers_without_a_shape_or_a_prompt_are_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="tells its sample shape"):
        save_program(wrap(Prompted(), "epsilon", conditions=["prompt"]), tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match="needs prompt, which a sampler cannot know"):
        save_program(wrap(Prompted(), "epsilon", conditions=["prompt"], shape=(1, 8, 8)), tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match=r"saved as \.pt2, got 'a.onnx'"):
        save_program(wrap(Prompted(), "epsilon", conditions=["prompt"], shape=(1, 8, 8)), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
