"""Pickles: what is data is read exactly, and nothing else is done."""

import collections
import importlib.util
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from amed_engine import AmedError, FileFormatError, UnsafeFileError
from amed_engine.checkpoints.pickles import Record, Ref
from amed_engine.checkpoints.policy import read_published

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("hostile", HERE / "hostile.py")
hostile = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hostile)
MEBIBYTE = 1024  # in KiB, as the kernel counts


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """Every hostile file read in one child process: name -> [error, message, growth of memory in KiB]."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, content in hostile.corpus(folder / "canary").items():
        (folder / f"{name}.pkl").write_bytes(content)
    command = [sys.executable, str(HERE / "hostile.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    outcomes["canary"] = (folder / "canary").exists()
    outcomes["written"] = [path.name for path in folder.iterdir() if path.suffix != ".pkl"]
    return outcomes


NAMES = sorted(hostile.corpus(Path("canary")))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_refused(outcomes, name):
    error, message, _ = outcomes[name]
    assert error == "UnsafeFileError", message
    assert f"{name}.pkl" in message


def test_no_hostile_file_ran_or_left_anything(outcomes):
    assert len(NAMES) >= 12
    assert not outcomes["canary"]
    assert outcomes["written"] == []


def test_no_hostile_file_took_much_memory(outcomes):
    assert max(outcomes[name][2] for name in NAMES) < 128 * MEBIBYTE


def test_the_canary_sings_where_a_file_is_run(tmp_path):
    """The corpus would do harm to who unpickles it: the payload that the tests above wait for works."""
    canary = tmp_path / "canary"
    code = f"import pickle; pickle.loads({hostile.corpus(canary)['os_system']!r})"
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert canary.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os_system", "os.system"),
        ("builtins_eval", "builtins.eval"),
        ("functools_partial", "functools.partial"),
        ("numpy_f2py", "numpy.f2py.crackfortran.getlincoef"),
        ("embedded_source", "'Evil'"),
        ("persistent_id", "persistent id 'storage'"),
        ("build_on_a_class", "torch.nn.modules.linear.Linear"),
        ("inst", "INST"),
        ("memo_of_a_gibibyte", "1073741824"),
        ("nested_plain", "os.system"),
        ("storage_again_and_again", "larger than itself"),
        ("deep_tuples", "levels deep"),
        ("archive_of_torch", "system"),
    ],
)
def test_a_refusal_names_its_reason(outcomes, name, said):
    assert said in outcomes[name][1]


def test_the_error_is_one_of_ours():
    assert issubclass(UnsafeFileError, FileFormatError)
    assert issubclass(UnsafeFileError, AmedError)


# ---- what is data


def read(tmp_path, value, protocol=pickle.DEFAULT_PROTOCOL):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(value, protocol))
    return read_published(tmp_path / "data.pkl")


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -1, 255, 65536, 2**70, -(2**70), 0.1, float("inf"), "", "é\n\0", b"\0\xff", [], [1, [2]], ()),
        *(
            (1,),
            (1, 2),
            (1, 2, 3),
            tuple(range(9)),
            {},
            {"a": {1: [None]}},
            collections.OrderedDict(),
            list(range(3000)),
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_plain_data_comes_back_as_python_reads_it(tmp_path, value, protocol):
    again = read(tmp_path, value, protocol)
    assert again == value
    assert type(again) is (dict if isinstance(value, dict) else type(value))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 5)])
def test_tensors_come_back_bit_by_bit(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 5).to(dtype)
    again = read(tmp_path, {"a": tensor, "b": torch.nn.Parameter(tensor, requires_grad=False)})
    for copy in again.values():
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_views_come_back_with_their_strides(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    for view in (base.t(), base[1:, 2:4], base[:, ::2], base[2]):
        assert torch.equal(read(tmp_path, view), view)


def test_two_views_share_what_they_shared(tmp_path):
    base = torch.arange(6.0)
    first, second = read(tmp_path, [base, base])
    assert first is second


def test_numbers_of_numpy_become_pythons(tmp_path):
    values = [np.sqrt(0.5), np.float32(0.1), np.int64(-7), np.bool_(True)]
    again = read(tmp_path, values)
    assert again == [v.item() for v in values]
    assert [type(v) for v in again] == [float, float, int, bool]


def test_classes_and_objects_of_torch_stay_names(tmp_path):
    layer = read(tmp_path, torch.nn.Linear(2, 3))
    assert isinstance(layer, Record)
    assert layer.kind == "torch.nn.modules.linear.Linear"
    assert layer.state["_parameters"]["weight"].shape == (3, 2)
    assert read(tmp_path, torch.float16) == Ref("torch", "float16")


def test_source_in_a_file_is_not_run_and_not_kept(tmp_path, publish, canary):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"model": publish.object("AMED_predictor", {"afs": True})}))
    record = read_published(tmp_path / "p.pkl")["model"]
    assert (record.kind, record.state) == ("AMED_predictor", {"afs": True})
    assert not canary.exists()
    assert publish.source.encode() in (tmp_path / "p.pkl").read_bytes()


def test_a_missing_file_or_a_directory_is_an_error_of_ours(tmp_path):
    for path in (tmp_path / "no.pkl", tmp_path):
        with pytest.raises(UnsafeFileError, match="cannot be read"):
            read_published(path)


def test_a_zip_is_no_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pkl", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(UnsafeFileError, match=r"a\.pkl"):
        read_published(tmp_path / "a.pkl")


def test_bytes_of_the_early_protocols_are_read(tmp_path, publish, monkeypatch):
    """Protocols 0 to 2 write bytes as `_codecs.encode(text, "latin1")`."""
    from amed_engine import AMEDPredictor
    from amed_engine.checkpoints.conversion import module_tensors
    from amed_engine.checkpoints.policy import read_published

    predictor, dumps = AMEDPredictor(bottleneck=(4, 4)), pickle.dumps
    for protocol in (0, 1, 2):
        monkeypatch.setattr(pickle, "dumps", lambda data, protocol=protocol: dumps(data, protocol))
        file = publish.amed(predictor, tmp_path / f"p{protocol}.pkl", {})
        assert b"_codecs" in file.read_bytes()
        tensors = module_tensors(read_published(file)["model"])
        assert tensors.keys() == predictor.state_dict().keys()
        assert all(torch.equal(value, tensors[name]) for name, value in predictor.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        b"(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",  # another codec, which may be code
        b"(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"(X\x01\x00\x00\x00atR.",  # the default is not latin1
        b"(C\x01aX\x06\x00\x00\x00latin1tR.",  # bytes of bytes
        b"(X\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1tR.",  # not in latin1
        b"(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1X\x06\x00\x00\x00ignoretR.",
    ],
)
def test_the_codec_of_early_protocols_is_good_for_nothing_else(tmp_path, arguments):
    from amed_engine.checkpoints.policy import read_published
    from amed_engine.errors import UnsafeFileError

    (tmp_path / "p.pkl").write_bytes(b"\x80\x02c_codecs\nencode\n" + arguments)
    with pytest.raises(UnsafeFileError):
        read_published(tmp_path / "p.pkl")


def test_early_bytes_cannot_outgrow_their_file(tmp_path):
    """One text, remembered, made into bytes again and again: gigabytes from kilobytes."""
    from amed_engine.checkpoints.policy import read_published
    from amed_engine.errors import UnsafeFileError

    text = b"X\x00\x10\x00\x00" + b"a" * 4096 + b"q\x000X\x06\x00\x00\x00latin1q\x010"
    again = b"c_codecs\nencode\n(h\x00h\x01tR"
    (tmp_path / "p.pkl").write_bytes(b"\x80\x02]" + text + b"(" + again * 1000 + b"e.")
    with pytest.raises(UnsafeFileError, match="its bytes are larger than itself"):
        read_published(tmp_path / "p.pkl")
