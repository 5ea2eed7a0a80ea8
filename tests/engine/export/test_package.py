"""Files that `load_package` refuses: those of others, damaged ones, and those whose facts do not hold."""

import contextlib
import io
import json
import os
import zipfile

import pytest
import torch

from amed_engine import ConfigError, FileFormatError, Sampler, load_package
from amed_engine.adapters import seal
from amed_engine.checkpoints import load_program


def zipped(path, entries: dict) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)


GOOD = {
    "kind": "amed_package",
    "format": "exported",
    "shape": [2, 6, 6],
    "label_dim": 0,
    "dtype": "float32",
    "device": "cpu",
    "max_batch": 8,
    "plan": {"solver": "euler", "sigmas": [80.0, 1.0]},
    "versions": {},
}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (None, "holds no facts under 'amed_engine'"),
        ("{", "its facts cannot be read"),
        ("[]", "its facts cannot be read"),
        ("{}", "'kind' is missing"),
        (json.dumps(GOOD | {"kind": "other"}), "its kind is 'other'"),
        (json.dumps(GOOD | {"shape": [2, "6", 6]}), "must be integers"),
        (json.dumps(GOOD | {"shape": []}), "must be integers"),
        (json.dumps(GOOD | {"max_batch": 0}), "must be positive"),
        (json.dumps(GOOD | {"label_dim": True}), "must be integers"),
        (json.dumps(GOOD | {"dtype": "int8"}), "dtype 'int8'"),
        (json.dumps(GOOD | {"versions": []}), "its facts cannot be read"),
        (json.dumps(GOOD | {"plan": {"solver": "none", "sigmas": [80.0, 1.0]}}), "its facts cannot be read"),
        (json.dumps(GOOD | {"plan": {"solver": "euler", "sigmas": [1.0, 80.0]}}), "its facts cannot be read"),
        ("[" * 100_000, "its facts cannot be read"),
        (" " * (1 << 21), "more than"),
        (json.dumps(GOOD), "is not in torch's PT2 format"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path, facts, message):
    entries = {"a/data/version": "1"} | ({} if facts is None else {"a/extra/amed_engine": facts})
    zipped(tmp_path / "a.pt2", entries)
    with pytest.raises(FileFormatError, match=message):
        load_package(tmp_path / "a.pt2")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pt2", b"no archive", " is no package of Sampler.export, neither .onnx nor a .pt2 archive"),
        ("a.pt2", b"", " is no package of Sampler.export, neither .onnx nor a .pt2 archive"),
        ("a.onnx", b"no model", " cannot be loaded"),
        ("a.json", b"{}", " holds no network; read a plan with read_plan"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=name + reason):
        load_package(tmp_path / name)
    with pytest.raises(FileFormatError, match="is not a file"):
        load_package(tmp_path / f"missing {name}")


def test_a_truncated_file_is_refused(tmp_path):
    sampler = Sampler(lambda x, sigma: 0.5 * x, solver="euler", nfe=1, shape=(1, 2, 2))
    sampler.export(tmp_path / "whole.pt2", "exported", verify=False)
    data = (tmp_path / "whole.pt2").read_bytes()
    for size in range(0, len(data), len(data) // 7):
        (tmp_path / "cut.pt2").write_bytes(data[:size])
        with pytest.raises(FileFormatError, match=r"cut\.pt2"):
            load_package(tmp_path / "cut.pt2")


@pytest.mark.parametrize("metadata", [None, "[]", "{", json.dumps({"amed_engine": "{}"})])
def test_native_code_is_only_opened_once_its_facts_are_read(tmp_path, monkeypatch, metadata):
    """A compiled package without sound facts is refused before anything in it runs."""
    folder = "a/data/aotinductor/model"
    entries = {f"{folder}/x.wrapper.so": "\x7fELF"}
    zipped(tmp_path / "a.pt2", entries | ({} if metadata is None else {f"{folder}/x.wrapper_metadata.json": metadata}))
    monkeypatch.setattr(
        "amed_engine.engine.export.package._open_compiled", lambda path: pytest.fail("native code was loaded")
    )
    with pytest.raises(FileFormatError, match=r"facts|metadata"):
        load_package(tmp_path / "a.pt2")


def test_native_code_that_does_not_load_is_a_broken_file(tmp_path):
    folder, facts = "a/data/aotinductor/model", json.dumps({"amed_engine": json.dumps(GOOD)})
    zipped(tmp_path / "a.pt2", {f"{folder}/x.wrapper.so": "\x7fELF", f"{folder}/x.wrapper_metadata.json": facts})
    with pytest.raises(FileFormatError, match="cannot be loaded"):
        load_package(tmp_path / "a.pt2")


def lying(path, facts: dict) -> None:
    """The file with other facts than those it was written with, and the hash of what it is now."""
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(path)
        entry = next(entry for entry in model.metadata_props if entry.key == "amed_engine")
        entry.value = json.dumps(json.loads(entry.value) | facts)
        onnx.save(model, path)
        seal(path)
        return
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("/extra/amed_engine"))
    zipped(path, entries | {name: json.dumps(json.loads(entries[name]) | facts)})


@pytest.mark.parametrize("format", ["exported", "onnx"])
def test_facts_that_are_not_the_graph_s_are_refused(tmp_path, format):
    """When the file is opened, and not by an error of another library when it runs."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    sampler = Sampler(lambda x, sigma: 0.5 * x, solver="euler", nfe=1, shape=(1, 2, 2))
    sampler.export(path, format, verify=False)
    whole = path.read_bytes()
    for facts in ({"shape": [1, 2, 3]}, {"shape": [1, 4]}, {"label_dim": 2}, {"dtype": "float64"}):
        path.write_bytes(whole)
        lying(path, facts)
        with pytest.raises(FileFormatError, match=r"its graph takes .* its facts say"):
            load_package(path)


# ---- no pickle inside


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def armed(tmp_path):
    """Rewrites an exported loop: (name of an entry -> its new content) -> path."""

    def arm(change):
        sampler = Sampler(lambda x, sigma: 0.5 * x, solver="euler", nfe=1, shape=(1, 2, 2))
        sampler.export(tmp_path / "whole.pt2", "exported", verify=False)
        with zipfile.ZipFile(tmp_path / "whole.pt2") as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        zipped(tmp_path / "armed.pt2", change(entries))
        return tmp_path / "armed.pt2"

    return arm


def bomb(tmp_path) -> bytes:
    file = io.BytesIO()
    torch.save((Bomb(tmp_path / "exploded"), {}), file)
    return file.getvalue()


def constant(entries, **changes):
    name = next(name for name in entries if name.endswith("model_constants_config.json"))
    config = json.loads(entries[name])
    next(iter(config["config"].values())).update(changes)
    return {**entries, name: json.dumps(config)}


ATTACKS = {
    "inputs": lambda e, data: e | {next(n for n in e if "sample_inputs" in n): data},
    "constant": lambda e, data: constant(
        {n: data if "constants/tensor" in n else t for n, t in e.items()}, use_pickle=True
    ),
    "object": lambda e, data: constant(e | {"whole/data/constants/opaque_obj_0": data}, path_name="opaque_obj_0"),
    "twice": lambda e, data: e | {next(n for n in e if "sample_inputs" in n).upper().replace("WHOLE", "whole"): data},
    "legacy": lambda e, data: {n: t for n, t in e.items() if "archive_format" not in n},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_exported_loop_with_a_pickle_inside_is_refused(armed, tmp_path, attack):
    path = armed(lambda entries: ATTACKS[attack](entries, bomb(tmp_path)))
    for read in (load_package, load_program):
        with pytest.raises(FileFormatError, match=r"armed\.pt2"):
            read(path)
    with pytest.raises(ConfigError, match=r"armed\.pt2 holds a whole sampling loop"):
        Sampler(path)
    assert not (tmp_path / "exploded").exists()


def test_a_program_with_native_code_inside_is_refused(armed):
    path = armed(lambda entries: entries | {"whole/data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(FileFormatError, match="holds native code"):
        load_program(path)


def test_the_attack_is_real(armed, tmp_path):
    """Torch's own reader runs it: otherwise the test above proves nothing."""
    path = armed(lambda entries: ATTACKS["inputs"](entries, bomb(tmp_path)))
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert (tmp_path / "exploded").exists()


def test_an_untouched_archive_is_read(armed):
    assert load_package(armed(lambda entries: entries)).run(2).images.shape == (2, 1, 2, 2)
