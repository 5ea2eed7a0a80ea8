"""save_pretrained and from_pretrained: directories, and a Hub that is a fake."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

import amed_engine
from amed_engine import (
    AMEDPredictor,
    ConfigError,
    FileFormatError,
    Sampler,
    from_pretrained,
    make_plan,
    save_pretrained,
)
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import read, write

SHAS = {None: "a" * 40, "main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def predictor(tiny_model) -> AMEDPredictor:
    predictor = AMEDPredictor(0.02, 0.1, bottleneck=(4, 4), hidden_dim=16)
    predictor.plan = make_plan(5, solver="amed")
    return predictor.eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_predictor_and_a_network_come_back_from_directories(tmp_path, predictor, tiny_conditional):
    save_pretrained(predictor, tmp_path / "predictor")
    save_pretrained(tiny_conditional, tmp_path / "network")
    for folder in ("predictor", "network"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["config.json", "model.safetensors"]
    again = from_pretrained(tmp_path / "predictor")
    assert same(predictor, again)
    assert again.plan == predictor.plan
    network = from_pretrained(str(tmp_path / "network"), local_files_only=True)
    assert fingerprint(network) == fingerprint(tiny_conditional)


def test_a_predictor_of_another_denoiser_is_refused(tmp_path, tiny_model, tiny_conditional):
    predictor = amed_engine.distill(tiny_model, nfe=3, total_kimg=0.001, batch=1)
    save_pretrained(predictor, tmp_path / "p")
    Sampler(tiny_model, from_pretrained(tmp_path / "p")).run([0])
    with pytest.raises(ConfigError, match="trained for"):
        Sampler(tiny_conditional, from_pretrained(tmp_path / "p"))


@pytest.mark.parametrize(
    ("item", "name", "said"), [(3, "d", "a predictor or an EDMPrecond, got int"), (None, "d", "NoneType")]
)
def test_what_cannot_be_saved_is_named(tmp_path, item, name, said):
    with pytest.raises(ConfigError, match=said):
        save_pretrained(item, tmp_path / name)


def test_a_file_is_no_directory(tmp_path, predictor):
    with pytest.raises(ConfigError, match="directory"):
        save_pretrained(predictor, tmp_path / "p.safetensors")


@pytest.mark.parametrize("kept", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_half_a_directory_is_refused(tmp_path, predictor, kept):
    save_pretrained(predictor, tmp_path / "p")
    (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for file in (tmp_path / "p").iterdir():
        if file.name != kept:
            file.unlink()
    with pytest.raises(
        FileFormatError, match=r"config\.json" if kept == "model.safetensors" else r"model\.safetensors"
    ):
        from_pretrained(tmp_path / "p")


@pytest.mark.parametrize("kind", ["pickle", None, ["amed_predictor"], {"a": 1}])
def test_a_configuration_of_another_kind_is_refused(tmp_path, predictor, kind):
    save_pretrained(predictor, tmp_path / "p")
    config, tensors = read(tmp_path / "p")
    write(tmp_path / "p", tensors, {**config, "kind": kind})
    with pytest.raises(FileFormatError, match="holds"):
        from_pretrained(tmp_path / "p")


@pytest.mark.parametrize(
    "source", ["no/such/folder", "name", "../x", "/no/where", "owner/", "owner/na me", "https://x.y/z"]
)
def test_what_is_neither_a_directory_nor_a_repository_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever lies beside the checkout
    with pytest.raises(ConfigError, match="owner/name"):
        from_pretrained(source)


def test_a_directory_has_no_revision(tmp_path, predictor):
    save_pretrained(predictor, tmp_path / "p")
    with pytest.raises(ConfigError, match="revision"):
        from_pretrained(tmp_path / "p", revision="main")


# ---- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch, predictor) -> list:
    """A huggingface_hub of one repository with two commits, which notes what it was asked."""
    asked = []
    for sha in set(SHAS.values()):
        save_pretrained(predictor, tmp_path / "hub" / sha)
        (tmp_path / "hub" / sha / "pytorch_model.bin").write_bytes(b"not for us")

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def model_info(self, repo, revision=None):
            asked.append(("info", repo, revision, self.token))
            if revision not in SHAS or repo != "owner/amed":
                raise LookupError(f"404: no {repo} at {revision}\nRequest ID: 7")
            return types.SimpleNamespace(sha=SHAS[revision])

    def snapshot_download(repo, *, revision, allow_patterns, local_files_only, cache_dir, token):
        asked.append(("files", repo, revision, local_files_only, sorted(allow_patterns)))
        folder = tmp_path / "hub" / SHAS.get(revision, revision or "")
        if not folder.is_dir():
            raise FileNotFoundError(f"{revision} is not in the cache")
        return str(folder)

    fake = types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return asked


FILES = ["config.json", "model.safetensors", "network/*.json", "network/*.safetensors", "wrap.safetensors"]


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_a_revision_is_resolved_once_and_the_files_are_of_that_commit(hub, predictor, revision):
    again = from_pretrained("owner/amed", revision=revision, token="t")
    assert same(predictor, again)
    assert hub == [("info", "owner/amed", revision, "t"), ("files", "owner/amed", SHAS[revision], False, FILES)]


def test_a_commit_needs_no_resolving(hub):
    from_pretrained("owner/amed", revision="b" * 40)
    assert hub == [("files", "owner/amed", "b" * 40, False, FILES)]


def test_offline_nothing_is_asked_of_the_network(hub):
    from_pretrained("owner/amed", revision="v1", local_files_only=True)
    assert hub == [("files", "owner/amed", "v1", True, FILES)]


def test_what_the_hub_does_not_have_is_an_error_of_ours(hub):
    with pytest.raises(ConfigError, match=r"owner/other at revision main cannot be had from the Hub: 404") as raised:
        from_pretrained("owner/other")
    assert "Request ID" not in str(raised.value)
    with pytest.raises(ConfigError, match="from the cache"):
        from_pretrained("owner/amed", revision="v9", local_files_only=True)


def test_without_the_hub_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'amed-engine\[hub\]'"):
        from_pretrained("owner/amed")


def test_the_real_client_finds_its_cache_offline(tmp_path, predictor):
    """A cache as huggingface_hub lays it out, read by it without a network."""
    pytest.importorskip("huggingface_hub")
    root = tmp_path / "models--owner--amed"
    save_pretrained(predictor, root / "snapshots" / ("c" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c" * 40)
    assert same(predictor, from_pretrained("owner/amed", local_files_only=True, cache_dir=tmp_path))
    with pytest.raises(ConfigError, match="from the cache"):
        from_pretrained("owner/none", local_files_only=True, cache_dir=tmp_path)


def test_a_local_directory_goes_before_a_repository_of_its_name(tmp_path, predictor, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    save_pretrained(predictor, Path("owner") / "amed")
    assert os.path.isdir("owner/amed")
    from_pretrained("owner/amed")
    assert hub == []
