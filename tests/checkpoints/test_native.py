"""Files: what is saved comes back bit by bit, and what was not saved by us is refused by name."""

import copy
import json
import os
import random
import stat
import struct
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from amed_engine import AMEDPredictor, load_predictor, make_plan, save_predictor
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import atomic_write, load_model, read, save_model, write
from amed_engine.checkpoints.files import MAX_PREDICTOR
from amed_engine.errors import AmedError, ConfigError, FileFormatError

FUZZ_N = int(os.environ.get("AMED_FUZZ_N", "30000"))


@pytest.fixture
def predictor() -> AMEDPredictor:
    predictor = AMEDPredictor(0.02, 0.1, bottleneck=(4, 4), hidden_dim=16)
    generator = torch.Generator().manual_seed(0)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    predictor.plan = make_plan(5, solver="amed", guidance_scale=2.0)
    return predictor.eval()


@pytest.fixture
def file(tmp_path, predictor) -> Path:
    save_predictor(predictor, tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- round trip


@pytest.mark.parametrize("name", ["p.safetensors", "folder", "new/deep/p.safetensors", "v1.5"])
def test_a_predictor_comes_back_bit_by_bit(tmp_path, predictor, name):
    save_predictor(predictor, tmp_path / name)
    again = load_predictor(tmp_path / name)
    assert same_state(predictor, again)
    assert (again.plan, again.config) == (predictor.plan, predictor.config)
    assert not again.training
    features, sigma = torch.randn(3, 5, 4, 4), torch.tensor([80.0, 5.0, 0.1])
    with torch.no_grad():
        ours, theirs = predictor(features, sigma, sigma / 2), again(features, sigma, sigma / 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.01, 0.0), (0.0, 0.2)])
def test_absent_heads_and_an_absent_plan_stay_absent(tmp_path, scales):
    predictor = AMEDPredictor(*scales, bottleneck=(3, 5))
    save_predictor(predictor, tmp_path / "p.safetensors")
    again = load_predictor(str(tmp_path / "p.safetensors"))
    assert same_state(predictor, again)
    assert again.plan is None
    assert again.config == predictor.config


@pytest.mark.parametrize("name", ["m.safetensors", "folder"])
def test_a_model_comes_back_bit_by_bit(tmp_path, tiny_conditional, name):
    save_model(tiny_conditional, tmp_path / name, loss=0.25, seconds=10)
    again = load_model(tmp_path / name)
    assert same_state(tiny_conditional, again)
    assert again.config == tiny_conditional.config
    assert not again.training
    assert read(tmp_path / name)[0]["loss"] == 0.25
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([3, 4])
    with torch.no_grad():
        assert torch.equal(again(x, sigma, labels).x0, tiny_conditional(x, sigma, labels).x0)


def test_loading_leaves_the_global_generator_alone(tmp_path, file, tiny_model):
    save_model(tiny_model, tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    load_predictor(file)
    load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_the_same_thing_twice_gives_the_same_bytes(tmp_path, predictor):
    save_predictor(predictor, tmp_path / "a.safetensors")
    save_predictor(predictor, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_saved_file_outlives_its_tensors_in_memory(file):
    """Loaded weights are copies: the file may be replaced, and changing them does not change the file."""
    before = file.read_bytes()
    loaded = load_predictor(file)
    with torch.no_grad():
        loaded.fc_r.weight.fill_(7)
    assert file.read_bytes() == before


# ---- whole or not at all, with the mode of the umask


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_the_mode_is_what_the_umask_says(tmp_path, predictor, umask, mode):
    before = os.umask(umask)
    try:
        save_predictor(predictor, tmp_path / "p.safetensors")
        save_predictor(predictor, tmp_path / "folder")
        assert os.umask(umask) == umask  # the process keeps its own
    finally:
        os.umask(before)
    for path in ("p.safetensors", "folder/model.safetensors", "folder/config.json"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    target = tmp_path / "p.bin"
    target.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left on device"):
        atomic_write(target, b"new" * 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["p.bin"]
    assert target.read_bytes() == b"old"


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "p.bin", b"new")
    assert list(tmp_path.iterdir()) == []


def test_readers_only_ever_see_whole_files(tmp_path):
    """One writer, one reader: every read is one of the two contents."""
    target, contents = tmp_path / "p.bin", (b"a" * 300_000, b"b" * 300_000)
    atomic_write(target, contents[0])

    def keep_writing():
        for k in range(60):
            atomic_write(target, contents[k % 2])

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(keep_writing)
        while not writer.done():
            seen.add(target.read_bytes())
    writer.result()
    assert seen
    assert seen <= set(contents)


def test_a_folder_that_cannot_be_written_is_an_oserror_with_its_name(tmp_path, predictor):
    (tmp_path / "regular").write_text("a file, not a folder")
    for path in ("regular/p.safetensors", "regular/folder", "regular/a/b/p.safetensors"):
        with pytest.raises(OSError, match="regular"):
            save_predictor(predictor, tmp_path / path)
    assert (tmp_path / "regular").read_text() == "a file, not a folder"


# ---- fingerprints


def forms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    args = torch.zeros(2, 1, 8, 8), torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, args)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, args, dynamic_shapes=[{0: batch}, {0: batch}])
    return {"compiled": torch.compile(model), "traced": traced, "exported": exported.module()}


def test_every_form_of_a_model_has_its_fingerprint(tiny_model):
    expected = fingerprint(tiny_model)
    assert len(expected) == 64
    assert {name: fingerprint(form) for name, form in forms(tiny_model).items()} == dict.fromkeys(
        ("compiled", "traced", "exported"), expected
    )


def test_the_fingerprint_survives_a_file(tmp_path, tiny_model):
    save_model(tiny_model, tmp_path / "m")
    assert fingerprint(load_model(tmp_path / "m")) == fingerprint(tiny_model)


def test_the_fingerprint_does_not_depend_on_mode_or_gradients(tiny_model):
    expected = fingerprint(tiny_model)
    assert fingerprint(tiny_model.train().requires_grad_(False)) == expected
    assert fingerprint(tiny_model.to(memory_format=torch.channels_last)) == expected


def test_any_changed_weight_changes_the_fingerprint(tiny_model):
    seen = {fingerprint(tiny_model)}
    for parameter in list(tiny_model.parameters())[::7]:
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6 + parameter.view(-1)[-1].abs() * 1e-6
        seen.add(fingerprint(tiny_model))
    assert len(seen) == 1 + len(list(tiny_model.parameters())[::7])


def test_names_shapes_and_dtypes_count():
    def module(**parameters):
        made = torch.nn.Module()
        for name, value in parameters.items():
            made.register_parameter(name, torch.nn.Parameter(value))
        return fingerprint(made)

    zeros = torch.zeros(2, 3)
    variants = [module(a=zeros), module(b=zeros), module(a=zeros.T.contiguous()), module(a=zeros.double())]
    assert len(set(variants)) == 4
    assert module(a=zeros, b=zeros) == module(b=zeros, a=zeros)


def test_what_has_no_parameters_has_no_fingerprint():
    assert fingerprint(lambda x, sigma: x) is None
    assert fingerprint(torch.nn.Identity()) is None


# ---- strictness


def tampered(file: Path, change) -> Path:
    """The file with its (config, tensors) changed, everything else as it was."""
    config, tensors = read(file)
    change(config, tensors)
    write(file, tensors, config)
    return file


def drop(config, tensors):
    del tensors["fc_r.bias"]


def add(config, tensors):
    tensors["fc_extra.weight"] = torch.zeros(1)


def misshape(config, tensors):
    tensors["enc_layer1.weight"] = tensors["enc_layer1.weight"].T


def to_integer(config, tensors):
    tensors["fc_r.weight"] = tensors["fc_r.weight"].long()


def to_complex(config, tensors):
    tensors["fc_r.weight"] = tensors["fc_r.weight"].to(torch.complex64)


def to_float8(config, tensors):
    tensors["fc_r.weight"] = tensors["fc_r.weight"].to(torch.float8_e4m3fn)


def with_nan(config, tensors):
    tensors["map_layer0.bias"][3] = float("nan")


def with_infinity(config, tensors):
    tensors["fc_scale_dir.weight"][0, 0] = -float("inf")


def without_head(config, tensors):
    config["predictor"]["scale_dir"] = 0.0


def other_kind(config, tensors):
    config["kind"] = "edm_precond"


def no_kind(config, tensors):
    del config["kind"]


def set_argument(**arguments):
    return lambda config, tensors: config["predictor"].update(arguments)


def set_plan(**entries):
    return lambda config, tensors: config["plan"].update(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"p\.safetensors lacks tensor 'fc_r\.bias' \(1 missing\)"),
        (add, r"p\.safetensors has unexpected tensor 'fc_extra\.weight' \(1 unexpected\)"),
        (misshape, r"tensor 'enc_layer1\.weight' has shape \(16, 4\), expected \(4, 16\)"),
        (to_integer, r"tensor 'fc_r\.weight' has dtype torch\.int64, expected torch\.float32"),
        (to_complex, r"tensor 'fc_r\.weight' has dtype torch\.complex64, expected torch\.float32"),
        (to_float8, r"tensor 'fc_r\.weight' has dtype torch\.float8_e4m3fn"),
        (with_nan, r"tensor 'map_layer0\.bias' holds NaN or infinite values"),
        (with_infinity, r"tensor 'fc_scale_dir\.weight' holds NaN or infinite values"),
        (without_head, r"has unexpected tensor 'fc_scale_dir\.(bias|weight)' \(2 unexpected\)"),
        (other_kind, r"p\.safetensors holds 'edm_precond', expected a predictor: amed_predictor"),
        (no_kind, r"holds None, expected a predictor: amed_predictor"),
        (set_argument(colour="red"), r"configuration does not build.*colour"),
        (set_argument(scale_dir=2.0), r"configuration does not build.*scale_dir must be in \[0, 1\), got 2\.0"),
        (set_argument(scale_dir="wide"), r"configuration does not build"),
        (set_argument(bottleneck=8), r"configuration does not build"),
        (set_argument(bottleneck=[8, 8]), r"tensor 'enc_layer0\.weight' has shape \(16, 16\), expected \(16, 64\)"),
        (
            set_argument(hidden_dim=10**12),
            r"has shape \(16,\), expected \(1000000000000,\)",
        ),  # before any memory is taken
        (set_argument(hidden_dim=10**400), r"does not build"),
        (set_argument(hidden_dim=-1), r"does not build"),
        (set_argument(embedding_dim=5), r"embedding_dim must be even and at least 4"),
        (lambda config, tensors: config.update(predictor=None), r"names no constructor arguments"),
        (lambda config, tensors: config.update(plan="amed"), r"a plan must be a JSON object, got str"),
        (set_plan(colour="red"), r"plan has unknown entries colour"),
        (set_plan(sigmas=[1, 2]), r"sigmas must decrease"),
        (set_plan(sigmas=[10**400, 1]), r"p\.safetensors: "),
        (set_plan(solver="rk4"), r"unknown solver 'rk4'; valid names"),
        (set_plan(solver="dpm", options={"r": "half"}), r"p\.safetensors: .*r must be in"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:30],
)
def test_a_predictor_file_is_read_strictly(file, change, message):
    with pytest.raises(FileFormatError, match=message):
        load_predictor(tampered(file, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "UNet"}, "model_type must be one of"),
        ({"model_type": ["SongUNet"]}, "does not build"),
        ({"channel_mult": []}, "does not build"),
        ({"channel_mult": 5}, "does not build"),
        ({"channel_mult": [0]}, "does not build"),
        ({"channel_mult": ["1"]}, "does not build"),
        ({"img_resolution": "8"}, "does not build"),
        ({"resample_filter": []}, "does not build|lacks|shape"),
        ({"attn_resolutions": None}, "does not build"),
        ({"sigma_data": "half"}, "does not build"),
        ({"label_dim": -3}, "does not build|unexpected|lacks"),
        ({"label_dim": 3}, "lacks tensor 'model.map_label"),
        ({"self": 1}, "does not build"),
        ({"": 1}, "does not build"),
    ],
    ids=str,
)
def test_a_model_configuration_never_escapes_as_another_error(tmp_path, tiny_model, change, message):
    save_model(tiny_model, tmp_path / "m")
    config, tensors = read(tmp_path / "m")
    config["model"].update(change)
    write(tmp_path / "m", tensors, config)
    with pytest.raises(FileFormatError, match=message):
        load_model(tmp_path / "m")


def test_a_model_is_no_predictor_and_the_other_way_round(tmp_path, file, tiny_model):
    save_model(tiny_model, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match="holds 'edm_precond', expected a predictor: amed_predictor"):
        load_predictor(tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match="holds 'amed_predictor', expected 'edm_precond'"):
        load_model(file)


# ---- damaged files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"1234567", "truncated: 7 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated: its header claims 100 bytes of 10"),
        (struct.pack("<Q", 2**63) + b"{}", "its header claims 9223372036854775808 bytes, more than 8388608"),
        (struct.pack("<Q", 2**23 + 1) + b" " * (2**23 + 9), "its header claims 8388609 bytes, more than 8388608"),
        (b"PK\x03\x04" + b"\0" * 100, "is not a readable safetensors|header claims"),
        (b"\x80\x04\x95" + b"." * 100, "header claims|not a readable safetensors"),
        (struct.pack("<Q", 2) + b"{}", r"no configuration \(config.json beside it or 'amed_config'"),
        (struct.pack("<Q", 8) + b"not json", "is not a readable safetensors file"),
    ],
    ids=["empty", "7 bytes", "short", "huge header", "large header", "zip", "pickle", "no config", "no JSON"],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=rf"p\.safetensors.*({message})|{message}"):
        load_predictor(path)


def test_every_truncation_is_noticed(tmp_path, file):
    content = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, len(content), 97), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(FileFormatError, match=r"cut\.safetensors"):
            load_predictor(cut)


def test_a_file_too_large_for_a_predictor_is_refused_unread(tmp_path, file):
    with open(file, "r+b") as opened:
        opened.truncate(64 * 2**20 + 1)  # sparse
    with pytest.raises(FileFormatError, match="has 67108865 bytes, more than the 67108864"):
        load_predictor(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "configuration is not valid JSON"),
        ("", "configuration is not valid JSON"),
        ("[]", "configuration must be a JSON object, got list"),
        ('{"kind": NaN}', "NaN is not a number"),
        ('{"kind": -Infinity}', "-Infinity is not a number"),
        ("[" * 100_000, "configuration is not valid JSON"),
        ('{"a":' * 100_000, "configuration is not valid JSON"),
        ('{"kind": ' + "9" * 5000 + "}", "configuration is not valid JSON"),
    ],
    ids=["open", "empty", "list", "NaN", "infinity", "deep list", "deep object", "long number"],
)
def test_bad_json_is_refused(tmp_path, predictor, text, message):
    save_predictor(predictor, tmp_path / "p")
    (tmp_path / "p/config.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        load_predictor(tmp_path / "p")


def test_a_configuration_that_is_not_text_is_refused(tmp_path, predictor):
    save_predictor(predictor, tmp_path / "p")
    (tmp_path / "p/config.json").write_bytes(b'{"kind": "\xff\xfe"}')
    with pytest.raises(FileFormatError, match="configuration is not"):
        load_predictor(tmp_path / "p")


def test_an_enormous_configuration_is_refused_unread(tmp_path, predictor):
    save_predictor(predictor, tmp_path / "p")
    with open(tmp_path / "p/config.json", "r+b") as opened:
        opened.truncate(2**40)  # sparse
    with pytest.raises(FileFormatError, match=r"config\.json has 1099511627776 bytes, more than"):
        load_predictor(tmp_path / "p")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileFormatError, match=r"nothing\.safetensors does not exist"):
        load_predictor(tmp_path / "nothing.safetensors")
    with pytest.raises(FileFormatError, match=r"model\.safetensors does not exist.*or a directory holding model"):
        load_predictor(tmp_path)


def test_numbers_that_are_not_json_are_refused_when_saving(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match=r"configuration is not JSON: .*nan"):
        save_model(tiny_model, tmp_path / "m.safetensors", loss=float("nan"))
    assert list(tmp_path.iterdir()) == []


# ---- fuzzing: whatever happens to the bytes, the answer is a predictor or one of our errors


def mutated(content: bytes, rng: random.Random) -> bytes:
    header = 8 + struct.unpack("<Q", content[:8])[0]
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(header if rng.random() < 0.7 else len(data)) % max(len(data), 1)
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at] = rng.choice(b'0123456789-.eE"[]{},:tfn')
        elif kind == 3:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 5:
            data[:8] = struct.pack("<Q", rng.choice([header - 8, header - 9, header - 7, 0, 1, 2**20, 2**64 - 1]))
        else:
            del data[rng.randrange(len(data)) :]
        if len(data) < 9:
            break
    return bytes(data)


VALUES = [None, True, -1, 0, 1, 3, 10**9, 10**400, 1e308, 0.5, "", "x", [], [1], {}, {"a": 1}, [[]]]


def misconfigured(content: bytes, rng: random.Random) -> bytes:
    """A well-formed file in whose configuration one value, key or item is another."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    node = config = json.loads(header["__metadata__"]["amed_config"])
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    if rng.random() < 0.8:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif rng.random() < 0.5:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(["x", "points", "r", "max_order", "self"])] = rng.choice(VALUES)
    header["__metadata__"]["amed_config"] = json.dumps(config)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: the tests below write tens of thousands of files."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("mutate", "count"), [(mutated, FUZZ_N), (misconfigured, FUZZ_N // 60)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_mutated_predictor_files_load_or_raise_our_errors(memory, file, mutate, count):
    """Every file is read and checked; a predictor is built of each configuration with each set of shapes."""
    content, rng, target = file.read_bytes(), random.Random(0), memory / "fuzz.safetensors"
    outcomes, built = {"loaded": 0, "refused": 0}, set()
    escaped = {}
    for k in range(count):
        target.write_bytes(mutate(content, rng))
        try:
            config, tensors = read(target, MAX_PREDICTOR)
            assert all(t.isfinite().all() for t in tensors.values())
            made_of = json.dumps(config), *((name, t.shape, t.dtype) for name, t in tensors.items())
            if made_of not in built:
                load_predictor(target)
                built.add(made_of)
            outcomes["loaded"] += 1
        except AmedError:
            outcomes["refused"] += 1
        except Exception as error:
            escaped.setdefault(f"{type(error).__name__}: {str(error)[:60]}", k)
    assert escaped == {}, f"other errors, each with the number of its first file: {escaped}"
    assert outcomes["refused"] > count / 4
    assert outcomes["loaded"] > 0  # not everything is refused for a reason that the mutation did not make


def test_the_unmutated_file_loads(file, predictor):
    assert same_state(load_predictor(file), predictor)
    tensors = safetensors.torch.load_file(file)  # any reader of the format can read it
    assert set(tensors) == set(predictor.state_dict())
