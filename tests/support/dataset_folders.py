"""What the folder of a dataset holds."""

from amed_engine.datasets.formats import FORMATS
from amed_engine.datasets.job import load_manifest
from amed_engine.datasets.ledger import Ledger


def contents(folder) -> dict[int, tuple[bytes, int]]:
    """Bytes and label of every seed that a dataset holds, each once; no file but those that belong there."""
    job, _ = load_manifest(folder)
    entries = Ledger(folder).refresh()
    names = {"manifest.json", "ledger.jsonl", *(entry.name for entry in entries.values())}
    assert {path.name for path in folder.iterdir()} == names
    found = {}
    for entry in entries.values():
        for samples in FORMATS[job.format].read(folder / entry.name, 64):
            for seed, array, label in zip(samples.seeds, samples.arrays, samples.labels.tolist(), strict=True):
                assert seed not in found
                found[seed] = array.tobytes(), label
    return found
