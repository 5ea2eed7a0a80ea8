"""The ledger: whole lines count, what a kill cut short does not, and nothing leads out of the folder."""

import contextlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from amed_engine.datasets.ledger import Entry, Ledger
from amed_engine.errors import FileFormatError

ENTRY = Entry(0, "shard-000000.npz", 5, "0" * 64, "1" * 64, 3, "cpu: some")


def test_what_is_added_is_read(tmp_path):
    ledger, other = Ledger(tmp_path), Ledger(tmp_path)
    assert other.refresh() == {}
    ledger.append(ENTRY)
    assert other.refresh() == {0: ENTRY}
    newer = replace(ENTRY, sha256="2" * 64)
    folder = replace(ENTRY, shard=1, name="shard-000001", files={"a.png": 1, "images/c/0": 2})
    ledger.append(newer)
    ledger.append(folder)
    assert other.refresh() == {0: newer, 1: folder} == Ledger(tmp_path).refresh()


def test_a_line_cut_short_is_none_and_costs_the_next_nothing(tmp_path):
    Ledger(tmp_path).append(replace(ENTRY, shard=1, name="shard-000001", files={"a.png": 1}))
    first = replace(ENTRY, shard=0)
    cut_short = (tmp_path / "ledger.jsonl").read_bytes()
    for cut in range(1, len(cut_short)):
        ledger, other = Ledger(tmp_path), Ledger(tmp_path)
        ledger.path.unlink()
        ledger.append(first)
        with ledger.path.open("ab") as file:
            file.write(cut_short[:-cut])
        assert other.refresh() == {0: first}
        second = replace(ENTRY, shard=2, name="shard-000002.npz")
        ledger.append(second)
        found = Ledger(tmp_path).refresh()
        assert other.refresh() == found
        assert {0: first, 2: second}.items() <= found.items()
        assert len(found) == (3 if cut == 1 else 2)  # the end of the line alone is missing


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "../shard-000000.npz"},
        {"name": "/etc/passwd"},
        {"name": "shard-000001.npz"},
        {"name": "manifest.json"},
        {"files": {"../../x": 1}},
        {"files": {"/x": 1}},
        {"files": {"a/../x": 1}},
        {"files": {"a/..": 1}},
        {"files": {"a//b": 1}},
        {"files": {"a": -1}},
        {"files": [1]},
        {"size": -1},
        {"size": True},
        {"samples": "5"},
        {"sha256": "x"},
        {"sum": None},
        {"more": 1},
    ],
)
def test_a_line_that_is_no_shard_is_refused(tmp_path, changed):
    ledger = Ledger(tmp_path)
    fields = {**asdict(ENTRY), **changed}
    ledger.path.write_text(
        json.dumps({**fields, "crc32": zlib.crc32(json.dumps(fields, sort_keys=True).encode())}) + "\n"
    )
    with pytest.raises(FileFormatError, match=r"ledger\.jsonl holds a line that is no shard"):
        ledger.refresh()


@pytest.mark.parametrize("place", range(0, 300, 13))
def test_a_flipped_bit_is_seen(tmp_path, place):
    """Refused, or, where it cuts the line short, no line: that shard is drawn again."""
    ledger = Ledger(tmp_path)
    ledger.append(ENTRY)
    data = bytearray(ledger.path.read_bytes())
    data[place % len(data)] ^= 4
    ledger.path.write_bytes(data)
    with contextlib.suppress(FileFormatError):
        assert ledger.refresh() == {}


def test_a_shard_is_there_by_its_size(tmp_path):
    assert not ENTRY.is_there(tmp_path)
    file = tmp_path / ENTRY.name
    file.write_bytes(b"12")
    assert not ENTRY.is_there(tmp_path)
    file.write_bytes(b"123")
    assert ENTRY.is_there(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("elsewhere")
    assert not ENTRY.is_there(tmp_path)


def test_a_folder_is_there_by_the_sizes_of_its_files(tmp_path):
    entry = replace(ENTRY, name="shard-000000", files={"a": 1, "b": 2})
    (tmp_path / "shard-000000").mkdir()
    (tmp_path / "shard-000000" / "a").write_bytes(b"1")
    assert not entry.is_there(tmp_path)
    (tmp_path / "shard-000000" / "b").write_bytes(b"12")
    assert entry.is_there(tmp_path)


def test_four_writers_at_once_lose_nothing(tmp_path):
    def add(first):
        for shard in range(first, 400, 4):
            Ledger(tmp_path).append(replace(ENTRY, shard=shard, name=f"shard-{shard:06d}.npz"))

    with ThreadPoolExecutor(4) as pool:  # each opens and locks the file for itself, as processes do
        list(pool.map(add, range(4)))
    assert sorted(Ledger(tmp_path).refresh()) == list(range(400))
