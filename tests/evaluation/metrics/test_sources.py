"""Image sources: a folder, an .npz, a tensor and a sampler hold the same images and give the same distance."""

import numpy as np
import pytest
import torch
from PIL import Image

import amed_engine
from amed_engine.engine.images import save_each, to_uint8
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.evaluation.metrics import (
    Statistics,
    batches,
    frechet,
    frechet_distance,
    gather,
    generate,
    read_features,
)

SEEDS = range(40, 60)


@pytest.fixture
def sampler(gaussian_denoiser):
    return amed_engine.Sampler(gaussian_denoiser, solver="euler", nfe=3, shape=(3, 4, 4))


def folder_of(images, path):
    save_each(path, list(to_uint8(images)), range(len(images)), subdirs=False)
    return path


def test_a_sampler_streams_what_it_draws_at_once(sampler):
    whole = sampler.run(list(SEEDS)).images
    parts = list(generate(sampler, SEEDS, batch=7))
    assert [len(part) for part in parts] == [7, 7, 6]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_labels_and_guidance_go_with_their_seeds(tiny_conditional):
    sampler = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3)
    labels = [seed % 10 for seed in range(5)]
    got = torch.cat(list(generate(sampler, range(5), labels, guidance_scale=2.0, batch=2)))
    torch.testing.assert_close(got, sampler.run(range(5), labels, 2.0).images, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="one per seed"):
        next(generate(sampler, range(5), [1, 2]))


def test_all_sources_give_the_same_distance(sampler, tmp_path):
    images = torch.cat(list(generate(sampler, SEEDS)))
    pictures = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
    other = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    folder = folder_of(images, tmp_path / "images")
    gather(folder, "pixels").save(tmp_path / "images.npz")
    expected = frechet_distance(
        Statistics().update(pictures.flatten(1).float() / 127.5 - 1), Statistics().update(other.flatten(1))
    )
    for source in (folder, str(folder), tmp_path / "images.npz", pictures, iter(pictures.split(3))):
        assert frechet(source, other, features="pixels") == pytest.approx(expected, rel=1e-6)
    # Not quantised, the streamed ones are half a level of 255 away.
    assert frechet(generate(sampler, SEEDS), other, features="pixels") == pytest.approx(expected, rel=0.02)
    assert frechet(generate(sampler, SEEDS), images, features="pixels") == pytest.approx(0, abs=1e-9)


def test_nothing_is_kept_of_a_stream():
    """More images than the batches alive at once: each is gone before the next but one is made."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for _ in range(10):
            batch = torch.randn(4, 1, 2, 2)
            alive.add(batch)
            most = max(most, len(alive))
            yield batch
            del batch

    assert gather(stream(), "pixels").count == 40
    assert most <= 2


def test_folders_are_read_in_the_order_of_names_and_searched(tmp_path):
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 3, 3)
    save_each(tmp_path, list(to_uint8(images)), [2000, 1, 999, 1000, 0], subdirs=True)
    (tmp_path / "000000" / ".amed-tmp.1-2.000003.png").write_bytes(b"half a picture")
    got = torch.cat(list(batches(tmp_path, batch=2)))
    assert got.dtype == torch.uint8
    assert got[:, 0, 0, 0].tolist() == [to_uint8(images)[i].item(0) for i in (4, 1, 2, 3, 0)]


def test_features_are_kept_where_they_are_compared_one_by_one():
    images = torch.randn(130, 1, 2, 2)
    assert torch.equal(read_features(images, "pixels"), images.flatten(1))


def write(path, array):
    Image.fromarray(array).save(path)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileFormatError, match="is not a folder"):
        next(batches(tmp_path / "none"))
    with pytest.raises(FileFormatError, match="has no PNG files"):
        next(batches(tmp_path))
    write(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write(tmp_path / "b.png", np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(FileFormatError, match=r"b\.png has shape \(5, 4, 3\)"):
        next(batches(tmp_path))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    with pytest.raises(FileFormatError, match=r"b\.png is not a readable PNG"):
        next(batches(tmp_path))
    write(tmp_path / "b.png", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(FileFormatError, match=r"b\.png has mode RGBA"):
        next(batches(tmp_path))


def test_bad_sources_are_named():
    with pytest.raises(ConfigError, match=r"generate\(sampler, seeds\)"):
        gather(3, "pixels")
    with pytest.raises(ConfigError, match=r"\(B, C, H, W\), got \(2, 2\)"):
        gather(torch.zeros(2, 2), "pixels")
    with pytest.raises(ConfigError, match=r"uint8 .* got torch\.int64"):
        gather([torch.zeros(2, 1, 2, 2, dtype=torch.int64)], "pixels")
    with pytest.raises(ConfigError, match="at least 2 images"):
        frechet([], torch.zeros(2, 1, 2, 2), features="pixels")
    with pytest.raises(ConfigError, match="no images"):
        read_features([], "pixels")
