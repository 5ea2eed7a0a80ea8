"""Damaged shards: refused with a sentence that names the file, or what was written; never other content, nothing run."""

import resource
import shutil

import numpy as np
import pytest
from shards import ABOUT, assert_same, bytes_of, read, samples, shard, write

from amed_engine.datasets.formats import FORMATS
from amed_engine.errors import FileFormatError

MUTATIONS = 500
MOST = 500 << 10  # KiB of memory that reading a damaged shard of a few KiB may add


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Some bits turned, the end cut off, or bytes taken out, put in or copied from elsewhere."""
    at, length = int(random.integers(len(data))), int(random.integers(1, 32))
    kind = random.integers(6)
    if kind < 2:
        changed = bytearray(data)
        for i in random.integers(len(data), size=1 + 3 * int(kind)):
            changed[i] ^= 1 << int(random.integers(8))
        return bytes(changed)
    other = int(random.integers(len(data)))
    return {
        2: data[:at],
        3: data[:at] + data[at + length :],
        4: data[:at] + random.bytes(length) + data[at + (length if length % 2 else 0) :],
        5: data[:at] + data[other : other + length] + data[at + length :],
    }[int(kind)]


@pytest.fixture(params=list(FORMATS))
def format(request):
    if library := FORMATS[request.param].library:
        pytest.importorskip(library)
    return request.param


@pytest.fixture(params=["pictures", "floats"])
def original(request, format, tmp_path):
    """(samples, shard)"""
    if request.param == "floats" and not FORMATS[format].floats:
        pytest.skip("pictures alone")
    kind = (
        {"shape": (2, 3, 4), "dtype": "float32", "labels": "numbers"}
        if request.param == "floats"
        else {"labels": "class"}
    )
    given = samples(sorted([42, 7, 8, 1000000, 11]), **kind)
    return given, write(format, shard(format, tmp_path), given)


def read_or_refusal(format, path):
    try:
        return read(format, path)
    except FileFormatError as error:
        return str(error)


def test_a_damaged_shard_is_refused_or_what_was_written(format, original):
    given, path = original
    whole = bytes_of(path)
    random = np.random.default_rng(0)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for _ in range(MUTATIONS):
        name = list(whole)[random.integers(len(whole))]
        file = path / name if path.is_dir() else path
        file.write_bytes(mutated(whole[name], random))
        said = read_or_refusal(format, path)
        if isinstance(said, str):
            assert str(path) in said
            refused += 1
        else:
            assert_same(said, given)
            assert FORMATS[format].header(path).about == ABOUT
        file.write_bytes(whole[name])
    assert refused > MUTATIONS / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST
    assert_same(read(format, path), given)


def test_a_file_more_or_less_is_refused(format, original):
    _, path = original
    if not path.is_dir():
        pytest.skip("one file")
    whole = bytes_of(path)
    for name in whole:
        (path / name).unlink()
        with pytest.raises(FileFormatError, match=path.name):
            read(format, path)
        (path / name).write_bytes(whole[name])


def test_samples_of_another_shard_are_refused(format, tmp_path):
    """Each of two shards is sound; a file of the one in the place of the other's is not."""
    one, other = samples([1, 2, 3]), samples([1, 2, 4])
    first, second = (write(format, shard(format, tmp_path, name), s) for name, s in (("a", one), ("b", other)))
    if not first.is_dir():
        pytest.skip("one file")
    for name in bytes_of(second):
        copy = shard(format, tmp_path, "copy")
        shutil.copytree(first, copy)
        (copy / name).write_bytes((second / name).read_bytes())
        if (copy / name).read_bytes() != bytes_of(first).get(name):
            with pytest.raises(FileFormatError, match="copy"):
                read(format, copy)
        shutil.rmtree(copy)
