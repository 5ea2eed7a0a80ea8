"""run.py CHECKOUT signatures.py FOLDER: where the stand-in in FOLDER is not called as ComfyUI is, a line each."""

import importlib
import inspect
import sys

sys.path.append(sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy_standin  # noqa: E402

# Where the real ones are; the stand-in's have the same names.
CLASSES = {
    "comfy.model_sampling": {
        "EPS": ("noise_scaling", "inverse_noise_scaling"),
        "CONST": ("noise_scaling", "inverse_noise_scaling"),
    },
    "comfy.samplers": {
        "KSAMPLER": ("__init__", "max_denoise", "sample"),
        "KSamplerX0Inpaint": ("__init__", "__call__"),
        "CFGGuider": ("__init__", "set_cfg", "sample", "__call__", "predict_noise"),
        "SchedulerHandler": ("__new__",),
    },
    "comfy.model_patcher": {
        "ModelPatcher": ("get_model_object", "clone", "set_model_patch", "set_model_output_block_patch")
    },
}
FUNCTIONS = {
    "folder_paths": ("add_model_folder_path", "get_filename_list", "get_full_path"),
    "comfy.model_management": ("throw_exception_if_processing_interrupted",),
}


def positions(function: object) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def differs(real: object, ours: object) -> str | None:
    """What is called with the stand-in's arguments may be called so: real ones beyond those have defaults."""
    own, theirs = positions(ours), positions(real)
    names, rest = [p.name for p in theirs[: len(own)]], theirs[len(own) :]
    if [p.name for p in own] != names:
        return f"has {', '.join(p.name for p in own)}; ComfyUI {', '.join(p.name for p in theirs)}"
    needed = [p.name for p in rest if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return f"lacks {', '.join(needed)}" if needed else None


found, made = [], comfy_standin.modules(None)
for module, classes in CLASSES.items():
    for name, methods in classes.items():
        for method in methods:
            real = getattr(getattr(importlib.import_module(module), name), method)
            if wrong := differs(real, getattr(getattr(comfy_standin, name), method)):
                found.append(f"{name}.{method} {wrong}")
for module, names in FUNCTIONS.items():
    for name in names:
        if wrong := differs(getattr(importlib.import_module(module), name), getattr(made[module], name)):
            found.append(f"{module}.{name} {wrong}")
real = importlib.import_module("comfy.model_sampling").ModelSamplingDiscreteFlow.percent_to_sigma
if wrong := differs(real, comfy_standin.CONST.percent_to_sigma):
    found.append(f"percent_to_sigma {wrong}")
for name in ("KSAMPLER_NAMES", "SAMPLER_NAMES", "SCHEDULER_HANDLERS", "SCHEDULER_NAMES"):
    if type(getattr(importlib.import_module("comfy.samplers"), name)) is not type(
        getattr(made["comfy.samplers"], name)
    ):
        found.append(f"comfy.samplers.{name} is of another type")
print("differs:", *found, sep="\n")
