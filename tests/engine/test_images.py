"""Pictures: the rounding of EDM, where tiles and files go, and what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from amed_engine.engine.images import grid, magnification, png, save_each, save_grid, seed_path, to_uint8
from amed_engine.errors import ConfigError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_follow_the_rule_of_edm(dtype):
    # By hand: 127.5 x + 128, clipped to 0 .. 255, the fraction dropped.
    values = {-3.0: 0, -1.0: 0, -0.999: 0, -0.99: 1, -0.5: 64, 0.0: 128, 0.5: 191, 0.99: 254, 1.0: 255, 7.0: 255}
    row = torch.tensor(list(values), dtype=dtype).reshape(1, 1, 1, -1)
    assert to_uint8(row).dtype == np.uint8
    assert to_uint8(row).flatten().tolist() == list(values.values())


def test_channels_come_last_and_keep_their_order():
    images = torch.full((2, 3, 4, 5), -1.0)
    images[1, 0, 2, 3] = 1.0
    images[1, 2, 2, 3] = 0.0
    pictures = to_uint8(images)
    assert pictures.shape == (2, 4, 5, 3)
    assert pictures[1, 2, 3].tolist() == [255, 0, 128]
    assert pictures.sum() == 255 + 128


@pytest.mark.parametrize("channels", [2, 4])
def test_latents_are_no_pictures(channels):
    with pytest.raises(ConfigError, match=r"\(1 or 3, H, W\), got .* decode latents"):
        to_uint8(torch.zeros(1, channels, 8, 8))


@pytest.mark.parametrize(("size", "factor"), [(4, 16), (8, 8), (16, 4), (28, 4), (32, 4), (33, 1), (64, 1), (256, 1)])
def test_small_images_are_enlarged(size, factor):
    assert magnification(size, size) == factor


def test_the_grid_is_read_like_a_page():
    levels = np.array([10, 60, 110, 160, 210], dtype=np.uint8)
    pictures = np.broadcast_to(levels[:, None, None, None], (5, 40, 40, 3))
    sheet = grid(pictures, columns=3, gap=2)
    assert sheet.shape == (2 * 42 + 2, 3 * 42 + 2, 3)
    centres = [sheet[2 + 20 + 42 * down, 2 + 20 + 42 * across, 0] for down in range(2) for across in range(3)]
    assert centres == [*levels, 128]
    # Nothing but tiles and grey between them.
    assert np.unique(sheet).tolist() == sorted([*levels.tolist(), 128])
    assert (sheet == 10).sum() == 40 * 40 * 3


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (10, 4, 3), (64, 8, 8)])
def test_the_grid_is_square_unless_told_otherwise(count, columns, rows):
    sheet = grid(np.zeros((count, 64, 64, 1), np.uint8), gap=0)
    assert sheet.shape == (rows * 64, columns * 64, 1)


def test_enlarging_keeps_flat_images_flat():
    assert np.unique(grid(np.full((1, 8, 8, 1), 77, np.uint8), gap=0)).tolist() == [77]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(channels):
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, channels)).astype(np.uint8)
    read = np.asarray(Image.open(io.BytesIO(png(picture)))).reshape(7, 5, channels)
    assert np.array_equal(read, picture)


def test_files_are_named_as_edm_names_them(tmp_path):
    assert seed_path("out", 42, False).as_posix() == "out/000042.png"
    assert seed_path("out", 12345, True).as_posix() == "out/012000/012345.png"
    assert seed_path("out", 4294967295, True).as_posix() == "out/4294967000/4294967295.png"
    pictures = np.stack([np.full((6, 6, 1), level, np.uint8) for level in (5, 250)])
    save_each(tmp_path, pictures, [1000, 7], subdirs=True)
    save_grid(tmp_path / "deep" / "all.png", pictures)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["000000/000007.png", "001000/001000.png", "deep/all.png"]
    assert np.asarray(Image.open(tmp_path / "000000/000007.png")).tolist() == np.full((6, 6), 250).tolist()
