"""What a file costs to read is bounded by its size, and by --max-bytes: nothing is done again and again because it says so."""

import io
import pickle
import struct
import zipfile

import pytest
import torch

from amed_engine import ConfigError, FileFormatError, UnsafeFileError, convert
from amed_engine.checkpoints import load_published
from amed_engine.checkpoints.contents import read_contents
from amed_engine.checkpoints.policy import read_published
from amed_engine.checkpoints.state_dicts import dictionaries
from amed_engine.networks import OpenAIUNet

TOLD = {"image_size": 16, "num_head_channels": 32}


def repeated(levels: int, make):
    """A container of two references to a container of two references ..., 2^levels of the innermost."""
    inner = make(None, None)
    for _ in range(levels):
        inner = make(inner, inner)
    return inner


@pytest.fixture
def state() -> dict:
    torch.manual_seed(0)
    unet = OpenAIUNet(
        16, 3, 32, 3, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2], num_head_channels=32
    )
    return unet.state_dict()


# ---- pickles


@pytest.mark.parametrize(
    "make", [lambda *two: list(two), lambda *two: two, lambda *two: dict(zip("ab", two, strict=True))]
)
def test_what_repeats_itself_is_read_once(tmp_path, make):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": repeated(150, make), "end": 7}))
    assert read_published(tmp_path / "x.pkl")["end"] == 7
    with pytest.raises(FileFormatError, match=r"unknown layout|at more than 16 places"):
        convert(tmp_path / "x.pkl")


def test_a_file_with_something_repeated_beside_its_network_converts(tmp_path, state):
    torch.save({"model": state, "history": repeated(60, lambda *two: list(two))}, tmp_path / "x.pt")
    assert set(load_published(tmp_path / "x.pt", **TOLD).state_dict()) == set(state)


def test_dictionaries_at_many_places_are_refused_and_at_a_few_are_not(tmp_path):
    shared = {"weight": 1}
    assert len(list(dictionaries(dict.fromkeys("abcdefgh", shared)))) == 9
    with pytest.raises(FileFormatError, match="one dict at more than 16 places"):
        list(dictionaries({str(n): shared for n in range(40)}))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("key", {"k" * 2000: 1}, "key of more than 1024 characters"),
        ("number", {1 << 80: 1}, "more than 64 bits for a key"),
        ("nested", {((1, 2), 3): 1}, "for a key"),
        ("integer", [1 << 2000], "integer of 2001 bits"),
    ],
)
def test_keys_and_numbers_that_cost_more_than_their_mention_are_refused(tmp_path, name, value, said):
    (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(UnsafeFileError, match=said):
        read_published(tmp_path / f"{name}.pkl")


def test_keys_of_a_few_plain_parts_are_read(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({(1, "a"): 1, 1 << 62: 2}))
    assert read_published(tmp_path / "x.pkl") == {(1, "a"): 1, 1 << 62: 2}


def test_a_type_of_numpys_is_a_name(tmp_path):
    nested = pickle.dumps([[1], [2]], 2)[2:-1]
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02cnumpy\ndtype\n(" + nested + b"tR.")
    with pytest.raises(UnsafeFileError, match="has no name"):
        read_published(tmp_path / "x.pkl")


class View:
    """Of 64 x 64 numbers, the same ones each time it is pickled."""

    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4096.0).untyped_storage(), dtype=torch.float32, _internal=True
    )

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, (64, 64), (64, 1), False, None)


def test_views_of_one_storage_cannot_outgrow_their_file(tmp_path):
    (tmp_path / "few.pkl").write_bytes(pickle.dumps([View() for _ in range(4)]))
    assert all(torch.equal(value, torch.arange(4096.0).view(64, 64)) for value in read_published(tmp_path / "few.pkl"))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([View() for _ in range(40)]))
    with pytest.raises(UnsafeFileError, match="16 times larger than itself"):
        read_published(tmp_path / "x.pkl")


# ---- what torch.save wrote


def archive(path, pickled: bytes, data: dict | None = None, compression: int = zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        made.writestr("archive/version", "3\n")
        for key, values in (data or {}).items():
            made.writestr(f"archive/data/{key}", values)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(count: int, size: int, stride: int = 1) -> bytes:
    kind = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J" + struct.pack("<i", count)
    )
    shape = b"(J" + struct.pack("<i", size) + b"t(J" + struct.pack("<i", stride) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + kind + b"tQK\0" + shape + b"\x89ccollections\nOrderedDict\n)RtR"


@pytest.mark.parametrize(
    ("pickled", "data", "said"),
    [
        (tensor(2, 2), {"0": bytes(16)}, "claims 8 bytes, its entry has 16"),
        (tensor(4, 4), {}, "claims 16 bytes, its entry has none"),
        (tensor(4, 5, 0), {"0": bytes(16)}, "beyond its storage of 4"),
        (b"}" + b"(K\1K\2t" + b"K\3\x86" + b"Ns", {}, "a tuple for a key"),
        (b"cbuiltins\nbytearray\n(K\5tR", {}, "made of a int"),
        (b"ctorch\nFloatTensor\n(K\2K\2tR", {}, "of a size without numbers"),
        (b"ctorch\nFloatTensor\n)R(NK\0tb", {}, "gives a state"),
        (
            b"]" + tensor(1024, 1024) + b"a" + (tensor(1024, 1024) + b"a") * 40,
            {"0": bytes(4096)},
            "times larger than itself",
        ),
    ],
)
def test_an_archive_that_claims_more_than_it_holds_never_reaches_torch(tmp_path, monkeypatch, pickled, data, said):
    path = archive(tmp_path / "x.pt", pickled, data)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch was asked"))
    with pytest.raises(UnsafeFileError, match=said):
        convert(path)


def test_what_the_look_passes_torch_reads(tmp_path, state):
    found = {
        "model": state,
        "opt": {"lr": 0.1, "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 2).T}}},
    }
    found |= {"rng": torch.get_rng_state(), "names": {"a", "b"}, "raw": bytearray(b"abc"), "dtype": torch.bfloat16}
    found |= {
        "half": torch.ones(3, dtype=torch.float16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "size": torch.Size((2, 3)),
    }
    found |= {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "byte": torch.tensor([1], dtype=torch.uint8),
        "u": torch.ones(2).to(torch.uint16),
    }
    found |= {
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "empty": torch.empty(0),
    }
    for legacy in (False, True):
        if legacy:  # torch itself does not read these from it
            found = {name: value for name, value in found.items() if name not in ("u", "eight")}
        torch.save(found, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        expected = torch.load(tmp_path / "x.pt", weights_only=True)
        read = read_contents(tmp_path / "x.pt").data
        assert list(read) == list(expected)
        assert all(torch.equal(read["model"][name], value) for name, value in state.items())
        assert read["opt"]["state"][0]["exp_avg"].stride() == expected["opt"]["state"][0]["exp_avg"].stride()


def test_the_older_format_claims_no_more_than_its_file(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    assert torch.equal(read_contents(tmp_path / "x.pt").data["a"], torch.zeros(4))
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    claims = b"\x80\x02" + tensor(1 << 30, 1).replace(b"tQ", b"NtQ") + b"."
    (tmp_path / "x.pt").write_bytes(head + claims + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16))
    with pytest.raises(UnsafeFileError, match="larger than itself"):
        convert(tmp_path / "x.pt")


def test_an_archive_of_two_entries_of_one_name_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"}")
    with zipfile.ZipFile(path, "a") as made, pytest.warns(UserWarning, match="Duplicate"):
        made.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(FileFormatError, match="two entries of one name"):
        convert(path)


# ---- --max-bytes


def test_contents_larger_than_the_bound_are_refused_with_size_bound_and_option(tmp_path, state, amed):
    torch.save(state, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        size = sum(info.file_size for info in archive.infolist())
    with pytest.raises(FileFormatError, match=r"x\.pt has \d+ bytes, more than the 1000 .*--max-bytes .*max_bytes="):
        convert(tmp_path / "x.pt", max_bytes=1000, **TOLD)
    code, _, told = amed("convert", tmp_path / "x.pt", "--max-bytes", "1000")
    assert code == 1
    assert "--max-bytes" in told
    done = convert(tmp_path / "x.pt", tmp_path / "x.safetensors", max_bytes=2 * size, **TOLD)
    assert done.path.is_file()


def test_what_unpacks_to_more_than_the_bound_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.pt", tensor(1 << 20, 4), {"0": bytes(4 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match=r"unpacks to 4194\d\d\d bytes, more than the 1000000"):
        convert(path, max_bytes=1_000_000)
    monkeypatch.setattr("amed_engine.checkpoints.archives.UNPACKED", 1 << 20)
    with pytest.raises(FileFormatError, match=r"unpacks to 4194\d\d\d bytes, more than the 1048576"):
        convert(path)
    assert read_contents(path, 8 << 20).data.shape == (4,)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pkl"])
def test_the_bound_holds_for_every_kind_of_file(tmp_path, state, publish, tiny_model, name):
    from safetensors.torch import save_file

    save_file(state, tmp_path / "x.safetensors")
    publish.edm(tiny_model, tmp_path / "x.pkl") if name == "x.pkl" else None
    with pytest.raises(FileFormatError, match="more than the 500 that it may have"):
        convert(tmp_path / name, max_bytes=500)


@pytest.mark.parametrize("bound", [0, -1, True, 1.5, "1"])
def test_a_bound_is_a_number_of_bytes(tmp_path, state, bound):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="max_bytes must be a positive integer"):
        convert(tmp_path / "x.pt", max_bytes=bound)
