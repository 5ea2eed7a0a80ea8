"""Files that name the SHA-256 of their content: what was changed is refused, older files load."""

import json
import random
import struct

import pytest
from safetensors.torch import save_file
from saved import KINDS, content, network, predictor

from amed_engine import AmedError, FileFormatError, from_pretrained, load_predictor, save_predictor
from amed_engine import save_pretrained as save
from amed_engine.adapters.fingerprint import digest
from amed_engine.checkpoints import files, hashes, load_model, read, save_model

HEX = r"[0-9a-f]{64}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Folders that nobody is writing are mixed for good."""
    monkeypatch.setattr(hashes, "SECONDS", 0.05)


# ---- what is named


def test_the_same_content_has_the_same_hashes_in_a_file_and_in_a_folder(tmp_path):
    model = network(0)
    save_model(model, tmp_path / "m.safetensors", loss=0.5)
    save_model(model, tmp_path / "m", loss=0.5)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()
    assert config["amed_sha256"]["tensors"] == digest(model.state_dict())
    assert config["amed_sha256"]["configuration"] == hashes.of_config(config)
    assert "amed_sha256" not in read(tmp_path / "m")[0]


def test_a_configuration_is_known_by_what_it_says(tmp_path):
    """Not by how it is indented, nor by the order of its entries."""
    save(predictor(0), tmp_path / "p")
    config = json.loads((tmp_path / "p/config.json").read_text())
    (tmp_path / "p/config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert content(load_predictor(tmp_path / "p")) == content(predictor(0))


def older(config: dict) -> dict:
    """What a file said before there were hashes."""
    return {name: config[name] for name in config.keys() - {"amed_sha256", "tables", "network_configuration"}}


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_hashes_load(tmp_path, kind, off_checkout):
    item = KINDS[kind](0)
    save(item, tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        metadata, tensors = files.read_tensors(file)
        told = json.loads(metadata.get("amed_config", "{}"))
        save_file(tensors, file, {"format": "pt", "amed_config": json.dumps(older(told))})
    (tmp_path / "config.json").write_text(json.dumps(older(json.loads((tmp_path / "config.json").read_text()))))
    assert content(from_pretrained(tmp_path)) == content(item)


# ---- changed since


def test_a_changed_weight_is_refused_with_both_hashes(tmp_path):
    save_predictor(predictor(0), path := tmp_path / "p.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=rf"p\.safetensors: its tensors .*{HEX}, saved was {HEX}.*save it again"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0.02", b"0.03"),  # an argument
        (b"80.0", b"81.0"),  # a noise level of the plan
        (b"amed_sha256", b"amed_sha257"),  # as if there were none
        (b'configuration\\": \\"', b'confiquration\\": \\"'),
        (b'tensors\\": \\"', b'tensor5\\": \\"'),
        (b"fc_r.weight", b"fc_s.weight"),
    ],
)
def test_a_changed_header_is_refused(tmp_path, old, new):
    save_predictor(predictor(0), path := tmp_path / "p.safetensors")
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(FileFormatError, match=r"p\.safetensors"):
        load_predictor(path)


def test_two_tensors_that_changed_places_are_refused(tmp_path):
    """Names and offsets parse: of two tensors of one shape each has the other's numbers."""
    save_predictor(predictor(0), path := tmp_path / "p.safetensors")
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    alike = [n for n in header if n != "__metadata__" and header[n]["shape"] == header["fc_r.bias"]["shape"]]
    first, second = alike[:2]
    header[first], header[second] = header[second], header[first]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(data[:8] + text.ljust(size) + data[8 + size :])
    assert len(text) <= size
    with pytest.raises(FileFormatError, match="its tensors were changed"):
        load_predictor(path)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to eight flips, digits, cuts, insertions and moves, most of them in the first part, where headers are."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(len(made), 3000) if rng.random() < 0.7 else len(made))
        kind = rng.randrange(6)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.choice(b"0123456789")
        elif kind == 2:
            digits = [k for k, byte in enumerate(made[:3000]) if byte in b"0123456789"]
            made[rng.choice(digits)] = rng.choice(b"0123456789")
        elif kind == 3:
            del made[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            made[at:at] = rng.randbytes(rng.randrange(1, 8))
        else:
            made[at : at + 4] = data[-8:-4]
    return bytes(made)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders_are_refused_or_what_they_were(tmp_path, kind, off_checkout):
    item = KINDS[kind](0)
    save(item, tmp_path)
    rng, known, outcomes = random.Random(0), content(item), {"loaded": 0, "refused": 0}
    for _ in range(100):
        file = rng.choice(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
        kept = file.read_bytes()
        file.write_bytes(damaged(kept, rng))
        try:
            assert content(from_pretrained(tmp_path)) == known
            outcomes["loaded"] += 1
        except AmedError:
            outcomes["refused"] += 1
        file.write_bytes(kept)
    assert outcomes["refused"] > 80


@pytest.mark.parametrize("kind", ["predictor", "network"])
def test_damaged_files_are_refused_or_what_they_were(tmp_path, kind):
    item, path = KINDS[kind](0), tmp_path / "f.safetensors"
    write_it, read_it = {"predictor": (save_predictor, load_predictor), "network": (save_model, load_model)}[kind]
    write_it(item, path)
    rng, kept, known, refused = random.Random(1), path.read_bytes(), content(item), 0
    for _ in range(100):
        path.write_bytes(damaged(kept, rng))
        try:
            assert content(read_it(path)) == known
        except AmedError:
            refused += 1
    assert refused > 80


@pytest.mark.parametrize("entry", [None, 1, [], {}, {"tensors": "0" * 64}, {"tensors": "0", "configuration": "0"}])
def test_hashes_that_are_none_are_refused(tmp_path, entry):
    save(predictor(0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"amed_sha256": entry}))
    with pytest.raises(FileFormatError, match=r"'amed_sha256'.* is damaged; fetch or save it again"):
        load_predictor(tmp_path)


def test_hashes_cannot_be_left_out_of_a_configuration_alone(tmp_path):
    save(predictor(0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["amed_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=r"config\.json names no SHA-256"):
        load_predictor(tmp_path)
