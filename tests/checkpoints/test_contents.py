"""What a file holds is read from what is in it: the index of shards, folders of trainers, and names that say another thing."""

import argparse
import json
import pickle

import numpy
import pytest
import torch
from safetensors.torch import save_file

from amed_engine import ConfigError, FileFormatError, UnsafeFileError, load_predictor, save_predictor
from amed_engine.checkpoints import convert, load_published, read
from amed_engine.networks import OpenAIUNet
from amed_engine.sampling.predictors import AMEDPredictor

UNET = {"image_size": 32, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}
TOLD = {"image_size": 32, "num_head_channels": 32}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return OpenAIUNet(**UNET).state_dict()


def same(path, state: dict) -> bool:
    tensors = read(path)[1]
    return tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)


def write_shards(folder, state: dict, stem: str = "model", kind: str = "safetensors"):
    """Two shards and their index, whose path is returned."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    places = {}
    for k, part in enumerate((names[::2], names[1::2])):
        shard = f"{stem}-{k + 1:05}-of-00002.{kind}"
        write = save_file if kind == "safetensors" else torch.save
        write({name: state[name] for name in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


# ---- names that say another thing


def test_the_content_decides_whatever_the_name(tmp_path, state, publish):
    save_file(state, tmp_path / "really_safetensors.pt")
    torch.save(state, tmp_path / "really_a_zip.safetensors")
    torch.save(state, tmp_path / "older.bin", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "no_suffix")
    for file in list(tmp_path.iterdir()):
        assert same(convert(file, tmp_path / "ours" / "net.safetensors", **TOLD).path, state)
    file = publish.amed(AMEDPredictor(0.01), tmp_path / "p.safetensors", AMED)
    assert load_predictor(convert(file, tmp_path / "ours.safetensors").path).plan is not None


def test_an_archive_is_compared_with_its_checksums_unless_it_was_written_without_any(tmp_path, state):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(convert(tmp_path / "without.pt", tmp_path / "ours.safetensors", **TOLD).path, state)
    torch.save(state, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[len(data) // 2] ^= 1  # of a weight
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(FileFormatError, match="is a damaged archive: Bad CRC-32"):
        convert(tmp_path / "x.pt", tmp_path / "ours.safetensors", **TOLD)


AMED = {"num_steps": 4, "sampler_stu": "amed", "schedule_type": "time_uniform", "schedule_rho": 1.0, "afs": True}
AMED |= {"scale_dir": 0.01, "scale_time": 0.0, "M": 1, "guidance_type": None, "guidance_rate": 0.0}


def test_what_is_no_checkpoint_says_what_it_is(tmp_path, state):
    numpy.savez(tmp_path / "arrays.npz", a=numpy.ones(3))
    numpy.save(tmp_path / "array.npy", numpy.ones(3))
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "scripted.pt")
    save_file(state, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    torch.save(state, tmp_path / "whole.pt")
    archive = (tmp_path / "whole.pt").read_bytes()
    cases = {
        "lfs.safetensors": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "pointer of Git LFS",
        ),
        "page.pt": (b"<!DOCTYPE html><html>not found</html>", "text; it begins with '<!DOCTYPE html>"),
        "words.ckpt": (b"hello world.", "text; it begins with 'hello world.'"),
        "config.pt": (b'{"a": 1}', "holds no index of shards .*it has no weight_map"),
        "keras.pt": (b"\x89HDF\r\n\x1a\n" + bytes(60), "of HDF5"),
        "packed.pt": (b"\x1f\x8b" + bytes(60), "unpack it first"),
        "gguf.safetensors": (b"GGUF" + bytes(60), "of GGUF"),
        "cut.safetensors": (data[: len(data) // 2], "truncated or of another kind"),
        "header.safetensors": (data[:100], "its header claims"),
        "cut.pt": (archive[: len(archive) // 2], "damaged archive"),
        "empty.pt": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
    }
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(content)
    told = {name: said for name, (_, said) in cases.items()}
    told |= {"arrays.npz": "torch.save did not write: a.npy", "array.npy": "array of NumPy"}
    told |= {"scripted.pt": "TorchScript program; pass it to Sampler"}
    for name, said in told.items():
        with pytest.raises(FileFormatError, match=said) as raised:
            convert(tmp_path / name, tmp_path / "ours.safetensors")
        assert "pickle" not in str(raised.value)
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_pickle_named_safetensors_is_still_refused_as_one(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsafeFileError, match=r"'os\.system'; only plain data is read from a pickle"):
        convert(tmp_path / "x.safetensors", tmp_path / "ours.safetensors")
    (tmp_path / "y.bin").write_bytes(pickle.dumps({"model": {"a": numpy.ones(2)}}))
    with pytest.raises(UnsafeFileError, match="numpy"):
        convert(tmp_path / "y.bin")


def test_our_own_files_need_no_conversion(tmp_path, state):
    predictor = AMEDPredictor(0.01)
    save_predictor(predictor, tmp_path / "ours.safetensors")
    save_predictor(predictor, tmp_path / "folder")
    for path in ("ours.safetensors", "folder", "folder/model.safetensors"):
        with pytest.raises(ConfigError, match="this package's format already"):
            convert(tmp_path / path, tmp_path / "x.safetensors")


def test_a_published_safetensors_is_not_taken_for_ours(tmp_path, state):
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(FileFormatError, match=r"has no configuration .*`amed convert .*net\.safetensors"):
        read(tmp_path / "net.safetensors")


def test_networks_of_diffusers_say_that_they_need_none(tmp_path):
    names = {"conv_in.weight": torch.ones(1), "down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}
    save_file(names, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        FileFormatError, match=r"unknown layout: .*diffusers, which needs no conversion.*amed_engine\.wrap"
    ):
        convert(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match="a UNet2DModel of diffusers, which needs no conversion"):
        convert(tmp_path, tmp_path / "x.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="wrap_pipeline"):
        convert(tmp_path, tmp_path / "x.safetensors")


# ---- the index of shards


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "pytorch_model"])
def test_shards_are_put_together(tmp_path, state, stem, kind):
    prefixed = {f"module.{name}": value for name, value in state.items()}
    index = write_shards(tmp_path / "run", prefixed, stem, kind)
    done = convert(index, **TOLD)
    assert done.path == tmp_path / "run" / f"{stem}.safetensors"
    assert same(done.path, state)
    done.path.unlink()
    folder = convert(tmp_path / "run", **TOLD)
    assert folder.path == tmp_path / "run-converted.safetensors"
    assert same(folder.path, state)
    loaded = load_published(tmp_path / "run", **TOLD).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_an_index_and_its_shards_must_agree(tmp_path, state):
    index = write_shards(tmp_path / "run", state)
    said = json.loads(index.read_text())
    places = said["weight_map"]

    def convert_with(places, match):
        index.write_text(json.dumps({**said, "weight_map": places}))
        with pytest.raises(FileFormatError, match=match):
            convert(index, tmp_path / "x.safetensors", **TOLD)

    convert_with(
        {**places, "out.9.weight": "model-00001-of-00002.safetensors"}, "lacks 'out.9.weight', which model.safe"
    )
    convert_with({k: v for k, v in places.items() if k != "out.2.bias"}, "holds 'out.2.bias', of which")
    convert_with(
        {**places, "a": "model-00003-of-00003.safetensors"}, "of which model-00003-of-00003.safetensors are not"
    )
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "run" / "model-00001-of-00002.safetensors").read_bytes())
    for shard in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "a/../../outside.safetensors",
        "",
        3,
    ):
        convert_with({**places, "a": shard}, "the shard of 'a' is .*expected a file beside the index")
    convert_with({}, "it has no weight_map")
    convert_with([], "it has no weight_map")
    index.write_text("{")
    with pytest.raises(FileFormatError, match="holds no index of shards"):
        convert(index)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_shard_that_is_no_state_dict_is_named(tmp_path, state):
    index = write_shards(tmp_path / "run", state, "pytorch_model", "bin")
    shard = tmp_path / "run" / "pytorch_model-00001-of-00002.bin"
    shard.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model-00001-of-00002\.bin is refused: it names 'os.system'"):
        convert(index, **TOLD)
    torch.save({"model": state}, shard)
    with pytest.raises(FileFormatError, match="is no state dict of tensors"):
        convert(index, **TOLD)
    with pytest.raises(ConfigError, match=r"one of 2 shards; pass their index"):
        convert(shard, **TOLD)


# ---- folders


def test_the_folder_of_a_trainer_has_its_weights(tmp_path, state):
    run = tmp_path / "checkpoint-64"
    run.mkdir()
    save_file(state, run / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler.bin"):
        (run / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(FileFormatError, match="image_size=256"):  # 64 is the number of a step
        convert(run, num_head_channels=32)
    assert same(convert(run, **TOLD).path, state)
    with pytest.raises(ConfigError, match="would be replaced"):
        convert(run, run, **TOLD)
    with pytest.raises(ConfigError, match="would be replaced"):
        convert(run / "model.safetensors", **TOLD)
    save_file(state, run / "model_1.safetensors")
    with pytest.raises(ConfigError, match=r"several weights \(model\.safetensors, model_1\.safetensors\)"):
        convert(run, **TOLD)


def test_folders_in_pieces_say_how_to_put_them_together(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no weights \(nothing\)"):
        convert(tmp_path / "empty")
    deep = tmp_path / "deepspeed" / "global_step5"
    deep.mkdir(parents=True)
    (deep / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="DeepSpeed, in pieces; run the zero_to_fp32"):
        convert(tmp_path / "deepspeed")
    (tmp_path / "fsdp").mkdir()
    (tmp_path / "fsdp" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ConfigError, match="dcp_to_torch"):
        convert(tmp_path / "fsdp")


def test_the_command_takes_folders(tmp_path, state, amed):
    write_shards(tmp_path / "run", state)
    code, out, _ = amed("convert", tmp_path / "run", "--set", "image_size=32", "--set", "num_head_channels=32")
    assert code == 0
    assert "run-converted.safetensors" in out


def test_what_is_no_tensor_is_named_with_the_way_out(tmp_path, state):
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "net.pt")
    with pytest.raises(UnsafeFileError, match=r"it names 'argparse\.Namespace'; .*: save its state dict alone"):
        convert(tmp_path / "net.pt", **TOLD)
