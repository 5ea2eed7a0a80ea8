"""ONNX networks of a few nodes, with whatever names, dtypes and shapes a test wants."""

import pytest

KINDS = {"float32": 1, "int32": 6, "int64": 7, "float16": 10, "float64": 11, "bfloat16": 16, "bool": 9}
SHAPE = ("B", 3, 8, 8)


def network(path, inputs, *, answer="out", others=(), batch="B", metadata=None):
    """A file of y = x / 2 + (time + the sum of all other numbers of the sample) / 1000, and its path.

    inputs: name -> (dtype, shape), the sample first and the time second, in the order of the file. others: (name, dtype,
    shape) of further outputs, all of them zero.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    (x, (kind, shape)), *rest = inputs.items()
    rank, nodes, terms, constants = len(shape), [], [], []
    constants.append(helper.make_tensor("half", KINDS[kind], [], [0.5]))
    constants.append(helper.make_tensor("milli", KINDS[kind], [], [0.001]))
    constants.append(helper.make_tensor("column", 7, [rank], [-1, *[1] * (rank - 1)]))
    nodes.append(helper.make_node("Mul", [x, "half"], ["halved"]))
    for name, (_, own) in rest:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=KINDS[kind]))
        summed = f"{name}_cast"
        if len(own) > 1:
            constants.append(helper.make_tensor(f"{name}_axes", 7, [len(own) - 1], list(range(1, len(own)))))
            nodes.append(helper.make_node("ReduceSum", [summed, f"{name}_axes"], [f"{name}_sum"], keepdims=0))
            summed = f"{name}_sum"
        nodes.append(helper.make_node("Reshape", [summed, "column"], [f"{name}_column"]))
        terms.append(f"{name}_column")
    nodes.append(helper.make_node("Sum", terms, ["sum"]))
    nodes.append(helper.make_node("Mul", ["sum", "milli"], ["shift"]))
    nodes.append(helper.make_node("Add", ["halved", "shift"], [answer]))
    info = [helper.make_tensor_value_info(name, KINDS[k], list(s)) for name, (k, s) in inputs.items()]
    outputs = [helper.make_tensor_value_info(answer, KINDS[kind], list(shape))]
    for name, k, s in others:
        outputs.append(helper.make_tensor_value_info(name, KINDS[k], list(s)))
        constants.append(helper.make_tensor(f"{name}_zero", KINDS[k], [1] * len(s), [0.0]))
        nodes.append(helper.make_node("Identity", [f"{name}_zero"], [name]))
    made = helper.make_graph(nodes, "g", info, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def reference(x, time, *others):
    """What `network` computes, in torch."""
    shift = time + sum(value.reshape(len(x), -1).sum(1) for value in others)
    return x / 2 + shift.to(x).reshape(-1, *[1] * (x.dim() - 1)) / 1000
