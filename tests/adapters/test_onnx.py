"""ONNX networks as others publish them: inputs by name and dtype, whole-number steps, labels of every kind, conditions."""

import numpy
import pytest
import torch
from onnx_graphs import SHAPE, network, reference

import amed_engine
from amed_engine import Stepper, read_plan
from amed_engine.adapters import Flow, load_onnx, wrap
from amed_engine.adapters.score import IndexedScore, VPScore
from amed_engine.errors import ConfigError

SAMPLE = ("float32", SHAPE)
STEP = ("int64", ("B",))
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 5.0, 20.0])


def opened(tmp_path, inputs, told=None, **file):
    return load_onnx(network(tmp_path / "net.onnx", inputs, **file), **(told or {}))


def like(function, **facts):
    return wrap(function, "epsilon", shape=(3, 8, 8), **facts)


def rounded(x, step, *others):
    return reference(x, step.round(), *others)


@pytest.mark.parametrize(
    "time",
    [
        ("float32", ("B",)),
        ("float64", ("B",)),
        ("float32", ()),
        ("float32", (1,)),
        ("float32", ("B", 1)),
        ("float32", ("steps",)),
    ],
)
def test_a_time_reaches_the_network_in_its_own_dtype_and_shape(tmp_path, time):
    denoiser = wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": time}), "epsilon")
    torch.testing.assert_close(denoiser(X, SIGMA).x0, like(reference)(X, SIGMA).x0)


@pytest.mark.parametrize("time", [STEP, ("int32", ("B",)), ("int64", ()), ("int64", (1,))])
def test_whole_number_steps_are_the_nearest_and_levels_stay_exact(tmp_path, time):
    denoiser = wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": time}), "epsilon")
    torch.testing.assert_close(denoiser(X, SIGMA).x0, like(rounded)(X, SIGMA).x0)
    assert "rounded to the nearest" in denoiser.explain()
    beyond = torch.tensor([1e-4, 1.0, 400.0])  # told the first step and the last, no others
    held = like(lambda x, step: reference(x, step.round().clamp(0, 999)))
    torch.testing.assert_close(denoiser(X, beyond).x0, held(X, beyond).x0)


LEVELS = torch.tensor([50.0, 10.0, 2.0, 0.4])


@pytest.mark.parametrize("prediction", ["flow", "vp", "iddpm", VPScore(steps=999), IndexedScore(LEVELS)])
def test_other_families_that_count_steps_round_them_too(tmp_path, prediction):
    denoiser = wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": STEP}), prediction)
    expected = wrap(rounded, prediction, shape=(3, 8, 8))(X, SIGMA).x0
    torch.testing.assert_close(denoiser(X, SIGMA).x0, expected)


@pytest.mark.parametrize("prediction", ["edm", "ve", "cm", "denoised", Flow(steps=1), VPScore()])
def test_families_without_steps_are_refused_for_whole_numbers(tmp_path, prediction):
    with pytest.raises(ConfigError, match=r"whole numbers \(int64\).*no steps to round to"):
        wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": STEP}), prediction)


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.05), ("float64", 1e-5)])
def test_a_sample_is_handed_in_the_dtype_of_the_file(tmp_path, dtype, atol):
    denoiser = wrap(opened(tmp_path, {"sample": (dtype, SHAPE), "timestep": STEP}), "epsilon")
    got = denoiser(X, SIGMA).x0
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, like(rounded)(X, SIGMA).x0, atol=atol, rtol=1e-3)
    assert dtype in denoiser.explain()
    assert "int64" in denoiser.explain()


def test_a_denoiser_in_float16_is_sampled_as_it_is(tmp_path):
    path = network(tmp_path / "d.onnx", {"x": ("float16", SHAPE), "sigma": ("float16", ("B",))})
    expected = (
        amed_engine.Sampler(lambda x, s: reference(x, s), shape=(3, 8, 8), solver="euler", nfe=4).run([1, 2]).images
    )
    got = amed_engine.Sampler(path, solver="euler", nfe=4).run([1, 2]).images
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.01)


def test_float64_keeps_its_digits(tmp_path):
    path = network(tmp_path / "d.onnx", {"x": ("float64", SHAPE), "sigma": ("float64", ("B",))})
    options = {"solver": "euler", "nfe": 4, "dtype": torch.float64}
    expected = amed_engine.Sampler(reference, shape=(3, 8, 8), **options)
    latents = X.double()
    got = amed_engine.Sampler(path, **options).run(latents).images
    exact = latents * expected.plan.sigmas[0]
    for here, there in zip(expected.plan.sigmas, expected.plan.sigmas[1:], strict=False):
        level = torch.full((3,), here, dtype=torch.float64)
        exact = exact + (there - here) * (exact - reference(exact, level)) / here
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [("B", 3, 16), ("B", 16), ("B", 3, 2, 4, 4)])
def test_samples_of_any_rank(tmp_path, shape):
    denoiser = wrap(opened(tmp_path, {"sample": ("float32", shape), "timestep": STEP}), "epsilon")
    assert denoiser.sample_shape == shape[1:]
    assert amed_engine.Sampler(denoiser, solver="euler", nfe=2).run(2).images.shape == (2, *shape[1:])


def test_dynamic_sizes_need_a_shape(tmp_path):
    inputs = {"sample": ("float32", ("B", 3, "H", "W")), "timestep": STEP}
    with pytest.raises(ConfigError, match="pass shape="):
        amed_engine.Sampler(wrap(opened(tmp_path, inputs), "epsilon")).run(2)
    denoiser = wrap(opened(tmp_path, inputs), "epsilon", shape=(3, 4, 6))
    assert amed_engine.Sampler(denoiser, solver="euler", nfe=2).run(2).images.shape == (2, 3, 4, 6)


def test_a_shape_of_another_size_than_the_files_is_refused(tmp_path):
    """Before sampling, by `wrap` and by `Sampler`; a size that the file leaves open is the caller's."""
    told = r"the file's samples are \(3, 8, 8\), got shape=\(3, 16, 16\)"
    with pytest.raises(ConfigError, match=told):
        wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": STEP}), "epsilon", shape=(3, 16, 16))
    denoiser = opened(tmp_path, {"x": SAMPLE, "sigma": ("float32", ("B",))})
    with pytest.raises(ConfigError, match=told):
        amed_engine.Sampler(denoiser, shape=(3, 16, 16))
    assert amed_engine.Sampler(denoiser, shape=(3, 8, 8), verify=False).model.shape == (3, 8, 8)


# ---- labels


def test_integer_labels_are_told_as_they_are(tmp_path):
    inputs = {"sample": SAMPLE, "class_labels": STEP, "timestep": ("float32", ("B",))}  # not in the order of a denoiser
    path = network(tmp_path / "net.onnx", {name: inputs[name] for name in ("sample", "class_labels", "timestep")})
    denoiser = wrap(load_onnx(path), "epsilon", label_dim=6)
    labels = torch.tensor([5, 0, 2])
    expected = like(reference, label_dim=6, labels="index")(X, SIGMA, labels).x0
    torch.testing.assert_close(denoiser(X, SIGMA, labels).x0, expected)
    with pytest.raises(ConfigError, match="pass label_dim="):
        wrap(load_onnx(path), "epsilon")
    with pytest.raises(ConfigError, match='knows "no class"'):
        amed_engine.Sampler(denoiser).run(2, guidance_scale=2.0)
    guided = wrap(load_onnx(path), "epsilon", label_dim=6, null_class=5)
    assert amed_engine.Sampler(guided, solver="euler", nfe=2).run(2, guidance_scale=2.0).images.isfinite().all()


def test_a_denoiser_of_integer_classes_is_told_its_number(tmp_path):
    path = network(tmp_path / "net.onnx", {"x": SAMPLE, "sigma": ("float32", ("B",)), "y": STEP}, answer="denoised")
    with pytest.raises(ConfigError, match="pass label_dim="):
        amed_engine.Sampler(path)
    sampler = amed_engine.Sampler(path, label_dim=6, solver="euler", nfe=3)
    known = amed_engine.Sampler(
        wrap(reference, "denoised", label_dim=6, labels="index", shape=(3, 8, 8)), solver="euler", nfe=3
    )
    torch.testing.assert_close(sampler.run([1, 2], [5, 0]).images, known.run([1, 2], [5, 0]).images)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "labels"),
    [
        ("class_labels", ("B", 4), "rows", torch.tensor([3, 0, 1])),
        ("class_labels", ("B",), "float", torch.tensor([0.1, 0.9, 3.0])),
        ("difficulty", ("B",), "float", torch.tensor([0.1, 0.9, 3.0])),
        ("strength", ("B", 1), "vector", torch.tensor([0.1, 0.9, 3.0])),
        ("parameters", ("B", 2), "vector", torch.tensor([[0.1, 0.9], [3.0, 4.0], [0.0, 1.0]])),
    ],
)
def test_floating_labels_by_name_and_shape(tmp_path, name, shape, kind, labels):
    model = opened(tmp_path, {"sample": SAMPLE, "timestep": ("float32", ("B",)), name: ("float32", shape)})
    denoiser = wrap(model, "epsilon")
    assert (denoiser.label_kind, denoiser.label_dim) == (kind, 1 if len(shape) == 1 else shape[1])
    rows = torch.eye(4)[labels] if kind == "rows" else labels
    expected = like(lambda x, t: reference(x, t, rows))(X, SIGMA).x0
    torch.testing.assert_close(denoiser(X, SIGMA, labels).x0, expected)
    torch.testing.assert_close(amed_engine.Sampler(denoiser, nfe=3).run([1, 2, 3], labels).labels, labels)


def test_labels_of_any_width_need_their_number(tmp_path):
    path = network(tmp_path / "net.onnx", {"sample": SAMPLE, "timestep": STEP, "parameters": ("float32", ("B", "K"))})
    with pytest.raises(ConfigError, match="pass label_dim="):
        wrap(load_onnx(path), "epsilon")
    denoiser = wrap(load_onnx(path), "epsilon", label_dim=2)
    assert amed_engine.Sampler(denoiser, solver="euler", nfe=2).run(2, [[0.1, 0.2], [0.3, 0.4]]).images.isfinite().all()


# ---- conditions


PUBLISHED = {
    "sample": ("float16", SHAPE),
    "timestep": ("int64", ()),
    "encoder_hidden_states": ("float16", ("B", "L", 16)),
    "text_embeds": ("float32", ("B", 32)),
    "time_ids": ("int64", ("B", 6)),
    "class_labels": STEP,
}
TABLES = {
    "encoder_hidden_states": torch.full((2, 7, 16), 0.5),
    "text_embeds": torch.ones(2, 32),
    "time_ids": torch.tensor([[1] * 6, [2] * 6]),
    "class_labels": torch.tensor([3, 40]),
}


def test_conditions_reach_the_inputs_of_their_names(tmp_path):
    denoiser = wrap(opened(tmp_path, PUBLISHED, answer="noise_pred"), "epsilon", conditions=TABLES)
    rows = [table[[1, 0, 1]] for table in TABLES.values()]
    expected = like(lambda x, t: reference(x, t.round(), *rows))(X, SIGMA).x0
    got = denoiser(X, SIGMA, torch.tensor([1, 0, 1])).x0
    torch.testing.assert_close(got, expected, atol=0.05, rtol=1e-2)
    null = {name: table[:1] * 0 for name, table in TABLES.items()}
    guided = wrap(opened(tmp_path, PUBLISHED), "epsilon", conditions=TABLES, null_conditions=null)
    images = amed_engine.Sampler(guided, solver="euler", nfe=2).run(2, [0, 1], guidance_scale=2.0).images
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_labels": None}, "lack class_labels"),
        ({"class_labels": torch.tensor([0.5, 1.0])}, r"class_labels must be whole numbers.*int64 \(B\)"),
        ({"text_embeds": torch.ones(2, 31)}, "width 31, the network takes 32"),
        ({"encoder_hidden_states": torch.ones(2, 16)}, r"must be float16 \(B, any, 16\)"),
        ({"other": torch.ones(2, 3)}, "the model takes .*, got other"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(tmp_path, changed, message):
    tables = {name: table for name, table in (TABLES | changed).items() if table is not None}
    with pytest.raises(ConfigError, match=message):
        wrap(opened(tmp_path, PUBLISHED), "epsilon", conditions=tables)(X, SIGMA, torch.tensor([1, 0, 1]))


def test_conditions_are_bound_before_sampling(tmp_path):
    path = network(tmp_path / "net.onnx", PUBLISHED)
    with pytest.raises(ConfigError, match=r"takes encoder_hidden_states, text_embeds.*wrap\(load_onnx\(path\)"):
        amed_engine.Sampler(path)
    with pytest.raises(ConfigError, match=r"bind them with\s+wrap"):
        amed_engine.Sampler(wrap(load_onnx(path), "epsilon"))


def test_one_time_for_all_is_asked_once_for_each(tmp_path):
    """Samples at several levels at once, as per-sample predictors and parallel points have them."""
    tables = {"context": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))}
    inputs = {"sample": SAMPLE, "timestep": ("float32", ()), "context": ("float32", ("B", 4, 5))}
    denoiser = wrap(opened(tmp_path, inputs), "epsilon", conditions=tables)
    sigma = torch.tensor([7.0, 0.5, 7.0])
    expected = like(lambda x, t: reference(x, t, tables["context"]))(X, sigma).x0
    torch.testing.assert_close(denoiser(X, sigma, torch.tensor([0, 1, 2])).x0, expected)


# ---- which input and output is which


FLOAT = ("float32", ("B",))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": SAMPLE, "b": FLOAT, "c": FLOAT}, "step may be b float32 .*, c float32 .*inputs="),
        ({"a": SAMPLE, "b": SAMPLE, "t": FLOAT}, "sample may be a float32 .*, b float32"),
        ({"sample": SAMPLE, "latents": SAMPLE, "t": FLOAT}, "sample may be sample .*, latents"),
        ({"x": SAMPLE, "t": FLOAT, "sigma": FLOAT}, r"step may be t float32 \(B\), sigma float32"),
        ({"x": SAMPLE, "t": FLOAT, "text_ids": ("float32", (77, 3))}, "text_ids .* has no row for each sample"),
        ({"x": SAMPLE, "t": ("float32", (2,))}, "not one time per sample"),
        ({"x": SAMPLE, "t": FLOAT, "mask": ("bool", ("B",))}, "mask bool .* must be one of float32"),
        ({"x": SAMPLE, "t": ("bfloat16", ("B",))}, "t bfloat16 .* must be one of float32"),
        ({"x": ("bfloat16", SHAPE), "t": FLOAT}, "onnxruntime cannot compute it on the CPU"),
    ],
)
def test_inputs_that_are_not_clear_are_refused_by_name(tmp_path, inputs, message):
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, inputs)


def test_inputs_of_other_names_are_known_by_shape_or_told(tmp_path):
    model = opened(tmp_path, {"input.1": SAMPLE, "onnx::Cast_1": FLOAT})
    torch.testing.assert_close(wrap(model, "epsilon")(X, SIGMA).x0, like(reference)(X, SIGMA).x0)
    path = network(tmp_path / "net.onnx", {"a": SAMPLE, "b": FLOAT, "c": FLOAT})
    told = wrap(load_onnx(path, inputs=("a", "c", "b")), "epsilon")
    weight = torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close(told(X, SIGMA, weight).x0, like(lambda x, t: reference(x, t, weight))(X, SIGMA).x0)
    with pytest.raises(ConfigError, match=r"inputs must name .* it has a float32"):
        load_onnx(path, inputs=("a", "d"))


def test_outputs_by_name_or_told(tmp_path):
    others = [("mid", "float32", ("B", 4, 2, 2)), ("mask", "float32", ("B", 4))]
    inputs = {"sample": SAMPLE, "timestep": FLOAT}
    with pytest.raises(ConfigError, match=r"returns out float32 .*outputs=\(prediction"):
        opened(tmp_path, inputs, others=others)
    assert opened(tmp_path, inputs, others=others, answer="out_sample").session.outputs == ["out_sample"]
    told = opened(tmp_path, inputs, {"outputs": ("out", "mid")}, others=others)
    assert told.returns_bottleneck
    assert wrap(told, "epsilon")(X[:1], SIGMA[:1]).features.shape == (1, 1, 1, 1)
    assert not opened(tmp_path, inputs, others=others[1:]).returns_bottleneck
    with pytest.raises(ConfigError, match="outputs must name"):
        opened(tmp_path, inputs, {"outputs": ("none",)})


@pytest.mark.parametrize(
    ("inputs", "answer"),
    [
        ({"sample": SAMPLE, "timestep": FLOAT}, "out"),
        ({"x": SAMPLE, "t": FLOAT}, "noise_pred"),
        ({"x": SAMPLE, "sigma": STEP}, "out"),
    ],
)
def test_a_raw_network_is_no_denoiser(tmp_path, inputs, answer):
    path = network(tmp_path / "net.onnx", inputs, answer=answer)
    with pytest.raises(ConfigError, match=r"a raw network, no denoiser.*wrap\(load_onnx"):
        amed_engine.Sampler(path)


# ---- the loop round it


def test_settings_that_have_no_say_in_a_graph_are_refused(tmp_path):
    denoiser = wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": STEP}), "epsilon")
    with pytest.raises(ConfigError, match=r"autocast=.*whose arithmetic is in the file"):
        amed_engine.Sampler(denoiser, autocast=torch.bfloat16)
    with pytest.raises(ConfigError, match="compiled already"):
        amed_engine.Sampler(denoiser, compile="default")


@pytest.mark.parametrize("format", ["pt2", "exported", "onnx"])
def test_a_loop_round_it_is_exported_as_a_plan(tmp_path, format):
    sampler = amed_engine.Sampler(wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": STEP}), "epsilon"), nfe=4)
    with pytest.raises(ConfigError, match="export format='plan'"):
        sampler.export(tmp_path / ("loop.onnx" if format == "onnx" else "loop.pt2"), format)


def test_a_plan_of_it_draws_its_images(tmp_path):
    denoiser = wrap(opened(tmp_path, {"sample": SAMPLE, "timestep": STEP}), "epsilon")
    sampler = amed_engine.Sampler(denoiser, solver="ipndm", nfe=4)
    plan = read_plan(sampler.export(tmp_path / "plan.json", "plan").path)
    stepper = Stepper(plan, (X * plan.sigmas[0]).numpy())
    while not stepper.done:
        points, sigma = torch.from_numpy(stepper.points), torch.from_numpy(numpy.asarray(stepper.sigma))
        stepper.advance(denoiser(points, sigma).x0.numpy())
    torch.testing.assert_close(torch.from_numpy(stepper.result), sampler.run(X).images, rtol=1e-4, atol=1e-4)


def test_a_whole_loop_is_no_network(tmp_path):
    path = network(tmp_path / "net.onnx", {"x": SAMPLE, "sigma": FLOAT}, metadata={"amed_engine": "{}"})
    with pytest.raises(ConfigError, match=r"amed_engine\.load_package"):
        load_onnx(path)


def test_what_the_graph_refuses_is_told_with_its_inputs(tmp_path):
    """A class beyond its table of four, which the file does not tell."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, {"x": (1, SHAPE), "sigma": (1, ("B",)), "y": (7, ("B",)), "D": (1, SHAPE)}
    *inputs, output = (helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in kinds.items())
    table = [helper.make_tensor("table", 1, [4, 1, 1, 1], [0.0, 1.0, 2.0, 3.0])]
    nodes = [helper.make_node("Gather", ["table", "y"], ["rows"]), helper.make_node("Add", ["x", "rows"], ["D"])]
    graph = helper.make_graph(nodes, "g", inputs, [output], table)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "net.onnx"
    )
    with pytest.raises(ConfigError, match="indices element out of data bounds"):
        wrap(load_onnx(tmp_path / "net.onnx"), "denoised", label_dim=9)
    denoiser = wrap(load_onnx(tmp_path / "net.onnx"), "denoised", label_dim=9, verify=False)
    torch.testing.assert_close(denoiser(X, SIGMA, torch.tensor([3, 0, 1])).x0[0], X[0] + 3)
    with pytest.raises(ConfigError, match=r"does not run on x \(3, 3, 8, 8\), y \(3,\): .*out of data bounds"):
        denoiser(X, SIGMA, torch.tensor([3, 8, 1]))
