"""Train the bundled digit classifier, in seconds.

    python -m amed_engine.metrics.train_classifier --out FILE.safetensors

On four fifths of scikit-learn's 1,797 digits, drawn by the seed; the accuracy it reports is that on the last fifth.
Noise is added to the images in training, so that the features of samples nearly right change little. Needs
scikit-learn. Deterministic for a given seed, thread count and torch version.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from amed_engine.evaluation.metrics.classifier import FILE, DigitClassifier, class_accuracy, save_classifier
from amed_engine.zoo.train_digits import Digits, load_digits


@dataclass(frozen=True)
class Recipe:
    epochs: int = 60
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-2
    noise: float = 0.2
    held_out: float = 0.2
    seed: int = 0


def split(data: Digits, recipe: Recipe) -> tuple[Digits, Digits]:
    """(training, held-out) digits, drawn without replacement by the seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(data.images), generator=generator)
    count = round(recipe.held_out * len(order))
    rest, held_out = order[count:], order[:count]
    return Digits(data.images[rest], data.labels[rest]), Digits(data.images[held_out], data.labels[held_out])


def train(recipe: Recipe, data: Digits) -> DigitClassifier:
    """A classifier fitted to these digits by AdamW under a cosine; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = DigitClassifier()
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
        for rows in torch.randperm(len(data.images), generator=generator).split(recipe.batch):
            noise = recipe.noise * torch.randn(data.images[rows].shape, generator=generator)
            _step(classifier, optimizer, data.images[rows] + noise, data.labels[rows])
    return classifier.eval()


def _step(classifier: DigitClassifier, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    loss = cross_entropy(classifier(images)[0], labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=FILE, help="Default: the bundled file.")
@click.option("--epochs", type=click.IntRange(1), default=Recipe.epochs, show_default=True)
@click.option("--seed", type=int, default=Recipe.seed, show_default=True)
def main(out: Path, epochs: int, seed: int) -> None:
    """Train the digit classifier of `amed_engine.metrics` and write it with its accuracy on held-out digits."""
    torch.set_num_threads(1)
    recipe = Recipe(epochs=epochs, seed=seed)
    training, held_out = split(load_digits(torch.device("cpu")), recipe)
    classifier = train(recipe, training)
    sets = {"held_out": held_out, "training": training}
    accuracy = {f"accuracy_{n}": round(class_accuracy(d.images, d.labels, classifier), 4) for n, d in sets.items()}
    counts = {f"images_{n}": len(d.images) for n, d in sets.items()}
    save_classifier(classifier, out, {**asdict(recipe), **counts, **accuracy})
    click.echo(f"{accuracy['accuracy_held_out']:.4f} of {len(held_out.images)} held-out digits recognised; wrote {out}")


if __name__ == "__main__":
    main()
