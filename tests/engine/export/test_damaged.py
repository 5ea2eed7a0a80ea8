"""Damaged exports are refused by their hash before a runtime sees them; none draws other images."""

import io
import json
import random
import warnings
import zipfile

import pytest
import torch
from torch import nn

from amed_engine import FileFormatError, Sampler, load_package, read_plan, read_schedule
from amed_engine.adapters import load_onnx, save_onnx, save_package, save_program, seal
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.adapters.onnx import OnnxSession
from amed_engine.engine.export import package
from amed_engine.errors import AmedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(nn.Module):
    sample_shape, label_dim, sigma_min, sigma_max = (1, 4, 4), 0, 0.01, 20.0

    def __init__(self, kernel: int = 3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Conv2d(1, 1, kernel, padding=kernel // 2)

    def forward(self, x, sigma):
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2) + 0.1 * self.layer(x)


def loop(name, format, kernel=3):
    return lambda folder: Sampler(Net(kernel), solver="euler", nfe=2).export(folder / name, format, max_batch=8).path


def draw(path):
    return load_package(path).run([0, 1]).images.tolist()


def draw_by(path):
    return Sampler(path, solver="euler", nfe=2).run([0, 1]).images.tolist()


WRITERS = {
    "exported": (loop("loop.pt2", "exported"), draw),
    "onnx": (loop("loop.onnx", "onnx"), draw),
    "pt2": (loop("loop.pt2", "pt2"), draw),
    "program": (lambda folder: save_program(Net(), folder / "net.pt2", max_batch=8), draw_by),
    "network": (lambda folder: save_onnx(Net(), folder / "net.onnx", max_batch=8), draw_by),
    "package": (lambda folder: save_package(Net(), folder / "net.pt2", max_batch=8), draw_by),
    "plan": (loop("plan.json", "plan"), read_plan),
    "schedule": (loop("schedule.json", "schedule"), read_schedule),
}
COMPILED = ("pt2", "package")
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind in COMPILED else kind for kind in WRITERS]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """kind -> (path, how it is read, what it gives, its bytes), each written once."""
    made = {}

    def write(kind):
        if kind in ("onnx", "network"):
            pytest.importorskip("onnxscript")
        if kind not in made:
            write, read = WRITERS[kind]
            path = write(tmp_path_factory.mktemp(kind))
            made[kind] = (path, read, read(path), path.read_bytes())
        return made[kind]

    return write


# ---- ways to damage a file: (generator, bytes) -> bytes


def flip(rng, data, count=1, start=0):
    data = bytearray(data)
    for _ in range(count):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def place(rng, data):
    at = rng.randrange(len(data))
    return at, min(len(data), at + rng.randrange(1, 400))


def spliced(rng, data):
    (start, stop), (at, _) = place(rng, data), place(rng, data)
    return data[:at] + data[start:stop] + data[at:]


def without(rng, data):
    start, stop = place(rng, data)
    return data[:start] + data[stop:]


def zeroed(rng, data):
    start, stop = place(rng, data)
    return data[:start] + bytes(stop - start) + data[stop:]


def overwritten(rng, data):
    (start, stop), (at, _) = place(rng, data), place(rng, data)
    return (data[:at] + data[start:stop] + data[at + stop - start :])[: len(data)]


DAMAGE = [
    flip,
    lambda rng, data: flip(rng, data, rng.randrange(2, 60)),
    lambda rng, data: flip(rng, data, rng.choice([1, 2, 5]), max(0, len(data) - 200)),
    lambda rng, data: flip(rng, data[: rng.randrange(1, 300)], 1) + data[300:],
    lambda rng, data: data[: rng.randrange(len(data))],
    lambda rng, data: data[: -rng.randrange(1, min(len(data), 400))],
    lambda rng, data: data + rng.randbytes(rng.randrange(1, 100)),
    *(spliced, without, zeroed, overwritten),
]


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def packed(entries, data=b"", mode="w"):
    """A zip of these entries, by Python: right checksums, and no comment unless it is added to `data`."""
    file = io.BytesIO(data)
    with warnings.catch_warnings(), zipfile.ZipFile(file, mode) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def twice(rng, data):
    name, content = rng.choice(list(members(data).items()))
    return packed({name: content and flip(rng, content)}, data, "a")


def directory(rng, data):
    """The archive's directory damaged: it says what of which member is read, and how."""
    return flip(rng, data, rng.choice([1, 1, 3]), data.find(b"PK\1\2"))


def repacked(rng, data):
    entries = members(data)
    name = rng.choice([name for name, content in entries.items() if content and "/extra/" not in name])
    return packed(entries | {name: flip(rng, entries[name])})


def damaged(data, count, seed=0):
    ways = [*DAMAGE, *((twice, directory, repacked) if data.startswith(b"PK") else ())]
    for k in range(count):
        yield ways[k % len(ways)](random.Random(f"{seed} {k}"), data)


def outcome(read, path):
    """The sentence that refuses it and None, or None and what was read."""
    try:
        return None, read(path)
    except AmedError as error:
        return str(error), None


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_gives_anything_else(written, kind, tmp_path):
    path, read, truth, data = written(kind)
    copy, refused = tmp_path / path.name, 0
    for content in damaged(data, 504):
        copy.write_bytes(content)
        refusal, got = outcome(read, copy)
        assert got == truth if refusal is None else copy.name in refusal
        refused += content != data and refusal is not None
    assert refused > 480


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_the_hash_turns_it_off(written, kind, tmp_path):
    """Neither of its digits nor of the name that it is found by."""
    path, read, _, data = written(kind)
    copy = tmp_path / path.name
    for at in range(len(data) - 84, len(data) - (2 if path.suffix == ".json" else 0)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 7
        copy.write_bytes(changed)
        with pytest.raises(FileFormatError, match=copy.name):
            read(copy)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("plan", "schedule")])
def test_no_runtime_sees_a_damaged_file(written, kind, tmp_path, monkeypatch):
    path, read, _, data = written(kind)
    copy = tmp_path / path.name
    copy.write_bytes(flip(random.Random(1), data))
    runtimes = ["torch.export.load", "torch._inductor.aoti_load_package"]
    for name in [*runtimes, *(["onnxruntime.InferenceSession"] if path.suffix == ".onnx" else [])]:
        monkeypatch.setattr(name, lambda *given, **named: pytest.fail("a runtime read it"))
    with pytest.raises(FileFormatError, match=rf"{path.name} is not the file that was written: .*seal\(path\)"):
        read(copy)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("plan", "schedule")])
def test_a_renamed_file_is_the_same_file(written, kind, tmp_path):
    path, read, truth, data = written(kind)
    (tmp_path / f"of mine{path.suffix}").write_bytes(data)
    assert read(tmp_path / f"of mine{path.suffix}") == truth


# ---- changed by other programs


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("onnx", "network", "plan", "schedule")])
def test_an_archive_packed_again_is_what_its_members_are(written, kind, tmp_path):
    path, read, truth, data = written(kind)
    copy, entries = tmp_path / path.name, members(data)
    copy.write_bytes(packed(dict(sorted(entries.items(), reverse=True))))
    assert read(copy) == truth
    copy.write_bytes(packed({name.replace("weight_0", "weight_9"): content for name, content in entries.items()}))
    if any("weight_0" in name for name in entries):
        with pytest.raises(FileFormatError, match="is not the file that was written"):
            read(copy)
    copy.write_bytes(packed({name: content for name, content in entries.items() if "amed.sha256" not in name}))
    assert read(copy) == truth, "without a hash it is read as it is"


@pytest.mark.parametrize("kind", ["onnx", "network"])
def test_a_model_that_was_changed_is_refused_until_it_is_sealed_again(written, kind, tmp_path):
    path, read, truth, data = written(kind)
    onnx, copy = pytest.importorskip("onnx"), tmp_path / path.name
    model = onnx.load_from_string(data)
    onnx.save(model, copy)
    assert read(copy) == truth, "written again as it is"
    weight = next(each for each in model.graph.initializer if len(each.raw_data) == 36)
    weight.raw_data = bytes(36)
    onnx.save(model, copy)
    with pytest.raises(FileFormatError, match=r"is not the file that was written: .*or another program changed it"):
        read(copy)
    if kind == "onnx":
        assert load_package(copy, verify=False).run([0, 1]).images.tolist() != truth
    else:
        load_onnx(copy, verify=False)
    seal(copy)
    seal(copy)
    assert read(copy) != truth
    assert copy.read_bytes().count(b"amed.sha256\x12\x40") == 1


def test_an_archive_that_was_changed_is_refused_until_it_is_sealed_again(written, tmp_path):
    path, read, truth, data = written("exported")
    copy, entries = tmp_path / path.name, members(data)
    name = next(name for name in entries if name.endswith("weight_0"))
    copy.write_bytes(packed(entries | {name: bytes(len(entries[name]))}))
    with pytest.raises(FileFormatError, match="or another program changed it"):
        read(copy)
    assert load_package(copy, verify=False).run([0, 1]).images.tolist() != truth
    seal(copy)
    seal(copy)
    assert read(copy) != truth


def test_only_what_a_hash_has_a_place_in_is_sealed(tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"no archive")
    (tmp_path / "a.json").write_text("{}")
    for name, reason in (("a.pt2", "readable .pt2 archive"), ("a.json", ".pt2 or .onnx file"), ("b.onnx", ".pt2 or")):
        with pytest.raises(FileFormatError, match=rf"{name} is no {reason}"):
            seal(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt2"]
    assert (tmp_path / "a.pt2").read_bytes() == b"no archive"


def test_weights_beside_a_model_are_part_of_it(tmp_path, monkeypatch):
    """As torch writes those of a large network."""
    pytest.importorskip("onnxscript")
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda made, path: save(made, path, external_data=True))
    path = loop("loop.onnx", "onnx", kernel=33)(tmp_path)
    network = save_onnx(Net(kernel=33), tmp_path / "net.onnx", max_batch=8)
    for file, read in ((path, draw), (network, draw_by)):
        weights, truth = file.with_name(f"{file.name}.data"), read(file)
        data = weights.read_bytes()
        weights.write_bytes(bytes(len(data)))
        with pytest.raises(FileFormatError, match=rf"{weights.name} is not the file that was written"):
            read(file)
        seal(file)
        assert read(file) != truth, "sealed with the weights as they are"
        weights.unlink()
        with pytest.raises(FileFormatError, match=rf"{file.name} needs '{weights.name}' beside it"):
            read(file)
        weights.write_bytes(data)


def test_a_model_is_never_run_with_another_s_weights(tmp_path, monkeypatch):
    """Each is replaced while it is opened: between check and runtime, and between its two files."""
    pytest.importorskip("onnxscript")
    save, opened = torch.onnx.ONNXProgram.save, OnnxSession._opened
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda made, path: save(made, path, external_data=True))
    here, there = (loop("loop.onnx", "onnx", kernel)(tmp_path / str(kernel)) for kernel in (33, 35))
    new, moves = draw(there), [there.with_name("loop.onnx.data"), there]

    def meanwhile(*given):
        """A writer takes a step whenever the file is opened."""
        if moves:
            moves[0].replace(here.with_name(moves.pop(0).name))
        return opened(*given)

    monkeypatch.setattr(OnnxSession, "_opened", staticmethod(meanwhile))
    old = here.read_bytes()
    with pytest.raises(FileFormatError, match=r"loop\.onnx\.data is not the file that was written"):
        draw(here)
    assert here.read_bytes() == old, "the writer was killed half way"
    moves.pop().replace(here)
    assert draw(here) == new


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(written, tmp_path, monkeypatch):
    """Its facts and its graph are of one file."""
    (_, _, _, old), copy, look = written("exported"), tmp_path / "loop.pt2", package._look_into
    new = loop("new.pt2", "exported", kernel=1)(tmp_path)
    truth = draw(new)
    copy.write_bytes(old)

    def then_replaced(path):
        looked = look(path)
        if new.exists():
            new.replace(copy)
        return looked

    monkeypatch.setattr(package, "_look_into", then_replaced)
    loaded = load_package(copy)
    assert loaded.run([0, 1]).images.tolist() == truth
    assert loaded.facts.fingerprint == fingerprint(Net(kernel=1))


# ---- tables


@pytest.mark.parametrize("kind", ["plan", "schedule"])
def test_a_table_may_be_set_otherwise_but_not_say_anything_else(written, kind, tmp_path):
    path, read, truth, data = written(kind)
    table, copy = json.loads(data), tmp_path / path.name
    assert list(table)[-1] == "sha256"
    for layout in ({"indent": 4}, {"separators": (",", ":")}):
        copy.write_text(json.dumps(table, **layout))
        assert read(copy) == truth
    changed = {**table, "sigmas": [*table["sigmas"][:-1], 0.5 * table["sigmas"][-1]]}
    for said in (changed, {**table, "sha256": None}, {**table, "sha256": table["sha256"].upper()}):
        copy.write_text(json.dumps(said))
        with pytest.raises(FileFormatError, match=r"sha256: got .*, expected .*, that of the other entries"):
            read(copy)
    del changed["sha256"]
    copy.write_text(json.dumps(changed))
    assert read(copy) != truth
