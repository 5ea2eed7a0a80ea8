"""The noisy classifiers of guided-diffusion: their state dicts tell the architecture, and the command line finds weights."""

import pytest
import torch

from amed_engine import convert
from amed_engine.checkpoints import load_model, load_published
from amed_engine.errors import FileFormatError
from amed_engine.networks import OpenAIClassifier


def classifier(**changes) -> OpenAIClassifier:
    options = {
        "image_size": 64, "in_channels": 3, "model_channels": 64, "out_channels": 10, "num_res_blocks": 1,
        "attention_resolutions": [4, 8], "channel_mult": [1, 1, 2, 2], "num_head_channels": 64,
        "use_scale_shift_norm": True, "resblock_updown": True, "pool": "attention",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = OpenAIClassifier(**{**options, **changes})
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"resblock_updown": False}, {"num_res_blocks": 3}, {"channel_mult": [1, 2], "attention_resolutions": [2]}],
    ids=["published", "convolutions", "deeper", "two levels"],
)
def test_a_classifier_answers_as_the_one_it_was_made_from(tmp_path, changes):
    network = classifier(**changes)
    torch.save(network.state_dict(), tmp_path / "64x64_classifier.pt")
    done = convert(tmp_path / "64x64_classifier.pt")
    assert done.description == "classifier of guided-diffusion for 3x64x64, 10 classes"
    x, t = torch.randn(2, 3, 64, 64), torch.tensor([10.0, 500.0])
    for again in (load_model(done.path), load_published(tmp_path / "64x64_classifier.pt")):
        assert torch.equal(again(x, t), network(x, t))


def test_a_classifier_for_other_images_says_so(tmp_path):
    torch.save(classifier().state_dict(), tmp_path / "classifier.pt")
    with pytest.raises(FileFormatError, match=r"pools 8x8 positions after 8 blocks.*--set image_size"):
        convert(tmp_path / "classifier.pt")
    assert convert(tmp_path / "classifier.pt", image_size=64).path.is_file()
    with pytest.raises(FileFormatError, match="does not fit images of 48"):
        convert(tmp_path / "classifier.pt", image_size=48)
