"""Pipelines whose weights are on "meta" between calls: they draw what they draw with their weights in place."""

from types import SimpleNamespace

import pytest
import torch

from amed_engine import Sampler
from amed_engine.adapters import decode_latents, wrap_pipeline

pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
pytest.importorskip("transformers", reason="needs pip install 'amed-engine[diffusers]'")

from tiny_pipelines import make_flux, stable_diffusion, stable_diffusion_3

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CPU = torch.device("cpu")
PIPELINES = {"SD": stable_diffusion, "SD3": stable_diffusion_3, "Flux": make_flux}


def parts(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def by_hand(pipeline):
    """As accelerate's hooks leave it, whether it is installed or not."""
    for part in parts(pipeline).values():
        for module in part.modules():
            if module._parameters and not hasattr(module, "_hf_hook"):
                brought_for_its_calls(module)


def brought_for_its_calls(module):
    kept = dict(module._parameters)
    away = {
        name: None if value is None else torch.nn.Parameter(value.to("meta"), False) for name, value in kept.items()
    }
    module._hf_hook = SimpleNamespace(execution_device=CPU)
    module._parameters.update(away)
    module.register_forward_pre_hook(lambda module, inputs: module._parameters.update(kept))
    module.register_forward_hook(lambda module, inputs, output: module._parameters.update(away))


def sequentially(pipeline):
    """What enable_sequential_cpu_offload does, which asks for an accelerator."""
    accelerate = pytest.importorskip("accelerate")
    for part in {id(part): part for part in parts(pipeline).values()}.values():
        accelerate.cpu_offload(part, CPU)


def model_by_model(pipeline):
    """What enable_model_cpu_offload does, which asks for an accelerator."""
    accelerate, hook = pytest.importorskip("accelerate"), None
    for name in pipeline.model_cpu_offload_seq.split("->"):
        if getattr(pipeline, name, None) is not None:
            _, hook = accelerate.cpu_offload_with_hook(getattr(pipeline, name), CPU, prev_module_hook=hook)


def drawn(pipeline):
    denoiser = wrap_pipeline(pipeline, ["a cat", "dogs"], negative_prompt="bad", shape=(4, 8, 8))
    run = Sampler(denoiser, solver="euler", nfe=3).run([0, 1], class_labels=[0, 1], guidance_scale=3.0)
    return run.images, decode_latents(pipeline.vae, run.images)


@pytest.mark.parametrize("offload", [by_hand, sequentially, model_by_model])
@pytest.mark.parametrize("name", PIPELINES)
def test_offloaded_pipelines_draw_the_same(name, offload):
    expected, pipeline = drawn(PIPELINES[name]()), PIPELINES[name]()
    offload(pipeline)
    if offload is not model_by_model:
        assert {value.device.type for part in parts(pipeline).values() for value in part.parameters()} == {"meta"}
    for got, own in zip(drawn(pipeline), expected, strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(got, own)
