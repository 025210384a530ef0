"""Tiny image sets, and a tiny generator, in the layout and the file formats in which the real ones are distributed."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written for training or test, in the order in which a reader finds it.

    - `images`: uint8 [n, 3, height, width]; of those that are stored as JPEG, one colour each is kept to ±3.
    - `labels`: int64 [n], from 0.
    """

    images: Tensor
    labels: Tensor


def write(
    name: str, root: Path, *, classes: int = 2, train: int = 10, test: int = 3, patches: bool = False
) -> dict[str, Written]:
    """Write set `name` under `root`: `train` and `test` images for each of its first `classes` classes.

    Small images are noise. Photographs have one colour each or, with `patches`, twelve.
    """
    count = {"train": train * classes, "test": test * classes}
    held = name in ("cifar10", "cifar100", "svhn")
    made: dict[str, Written] = {}
    for number, (half, n) in enumerate(count.items()):
        generator = torch.Generator().manual_seed(number)
        shape = (n, 3, 32, 32) if held else (n, 3, 3, 4) if patches else (n, 3, 1, 1)
        images = torch.randint(256, shape, generator=generator).to(torch.uint8)
        labels = torch.arange(n) % classes
        labels = labels.sort().values if name == "imagenet" else labels
        if not held:
            images = images.repeat_interleave(36 // shape[2], 2).repeat_interleave(48 // shape[3], 3)
        made[half] = Written(images=images, labels=labels)
    WRITERS[name](root, made["train"], made["test"])
    return made


def cifar10(root: Path, train: Written, test: Written) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pieces = zip(train.images.tensor_split(5), train.labels.tensor_split(5), strict=True)
    for number, (images, labels) in enumerate(pieces, start=1):
        pickled(folder / f"data_batch_{number}", {"data": rows(images), "labels": labels.tolist()})
    pickled(folder / "test_batch", {"data": rows(test.images), "labels": test.labels.tolist()})
    pickled(folder / "batches.meta", {"label_names": [f"class {c}" for c in range(10)], "num_vis": 3072})


def cifar100(root: Path, train: Written, test: Written) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, part in (("train", train), ("test", test)):
        coarse = [0] * len(part.labels)
        entry = {"data": rows(part.images), "fine_labels": part.labels.tolist(), "coarse_labels": coarse}
        pickled(folder / name, entry)
    pickled(folder / "meta", {"fine_label_names": [f"class {c}" for c in range(100)], "coarse_label_names": ["all"]})


def svhn(root: Path, train: Written, test: Written) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        labels = torch.where(part.labels == 0, 10, part.labels).to(torch.uint8)  # the digit 0 is called 10
        arrays = {"X": part.images.permute(2, 3, 1, 0).numpy(), "y": labels[:, None].numpy()}
        scipy.io.savemat(root / f"{name}_32x32.mat", arrays)


def flowers(root: Path, train: Written, test: Written) -> None:
    folder = root / "flowers-102"
    pictures(train, [folder / "jpg" / f"image_{number:05d}.jpg" for number in numbers(train)])
    pictures(test, [folder / "jpg" / f"image_{number:05d}.jpg" for number in numbers(test, after=train)])
    everything = torch.cat([train.labels, test.labels]) + 1
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": everything.to(torch.uint8)[None].numpy()})
    one, two = (np.array([half], dtype=np.uint16) for half in halves(numbers(train)))
    of_test = np.array([numbers(test, after=train)], dtype=np.uint16)
    scipy.io.savemat(folder / "setid.mat", {"trnid": one, "valid": two, "tstid": of_test})


def pets(root: Path, train: Written, test: Written) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for half, part, before in (("trainval", train, None), ("test", test, train)):
        breeds = ["Abyssinian" if label == 0 else f"breed_{label}" for label in part.labels.tolist()]
        names = [f"{breed}_{number}" for breed, number in zip(breeds, numbers(part, after=before), strict=True)]
        lines = [f"{name} {label + 1} 1 1" for name, label in zip(names, part.labels.tolist(), strict=True)]
        text(folder / "annotations" / f"{half}.txt", lines)
        pictures(part, [folder / "images" / f"{name}.jpg" for name in names])


def aircraft(root: Path, train: Written, test: Written) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    kinds = {"variant": ("variants", 100), "family": ("families", 70), "manufacturer": ("manufacturers", 30)}
    for one, (many, count) in kinds.items():
        text(data / f"{many}.txt", [f"{one} 7{number:02d}/B" for number in range(count)])
    for half, part, before in (("trainval", train, None), ("test", test, train)):
        names = [f"{number:07d}" for number in numbers(part, after=before)]
        pictures(part, [data / "images" / f"{name}.jpg" for name in names])
        for one in kinds:
            lines = [f"{name} {one} 7{label:02d}/B" for name, label in zip(names, part.labels.tolist(), strict=True)]
            text(data / f"images_{one}_{half}.txt", lines)


def cars(root: Path, train: Written, test: Written) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    fields = [*((f"bbox_{edge}", np.uint16) for edge in ("x1", "y1", "x2", "y2")), ("class", np.uint8), ("fname", "O")]
    places = {"train": folder / "devkit" / "cars_train_annos.mat", "test": folder / "cars_test_annos_withlabels.mat"}
    for half, part in (("train", train), ("test", test)):
        names = [f"{number:05d}.jpg" for number in numbers(part)]
        pictures(part, [folder / f"cars_{half}" / name for name in names])
        records = [(1, 1, 48, 36, label + 1, name) for label, name in zip(part.labels.tolist(), names, strict=True)]
        scipy.io.savemat(places[half], {"annotations": np.array([records], dtype=fields)})
    names_of_classes = np.array([[f"Car {number} Coupe 2012" for number in range(196)]], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names_of_classes})


def birds(root: Path, train: Written, test: Written) -> None:
    folder = root / "CUB_200_2011"
    files: list[str] = []
    for part, before in ((train, None), (test, train)):
        each = zip(part.labels.tolist(), numbers(part, after=before), strict=True)
        names = [f"{label + 1:03d}.A_Bird/A_Bird_{number:04d}.jpg" for label, number in each]
        pictures(part, [folder / "images" / name for name in names])
        files += names
    labels = [*train.labels.tolist(), *test.labels.tolist()]
    training = [*(1 for _ in train.labels), *(0 for _ in test.labels)]
    for name, column in (
        ("images", files),
        ("image_class_labels", [label + 1 for label in labels]),
        ("train_test_split", training),
    ):
        text(folder / f"{name}.txt", [f"{number} {value}" for number, value in enumerate(column, start=1)])


def dtd(root: Path, train: Written, test: Written) -> None:
    folder = root / "dtd" / "dtd"
    for part, before, splits in ((train, None, ("train", "val")), (test, train, ("test",))):
        each = zip(part.labels.tolist(), numbers(part, after=before), strict=True)
        names = [f"texture{label:02d}/texture{label:02d}_{number:04d}.jpg" for label, number in each]
        pictures(part, [folder / "images" / name for name in names])
        for split, lines in zip(splits, halves(names) if len(splits) == 2 else (names,), strict=True):
            text(folder / "labels" / f"{split}1.txt", lines)


def imagenet(root: Path, train: Written, test: Written) -> None:
    for half, part in (("train", train), ("val", test)):
        each = zip(part.labels.tolist(), numbers(part), strict=True)
        pictures(
            part, [root / half / f"n{label + 1440764:08d}" / f"{half}_{number:08d}.JPEG" for label, number in each]
        )


class SmallBigGAN(nn.Module):
    """Takes and gives what BigGAN for 256 pixels does: z and weights of 1,000 labels to colour images in [−1, 1]."""

    def __init__(self, latent: int, labels: int = 1000) -> None:
        super().__init__()
        self.latents, self.labels = nn.Linear(latent, 48), nn.Linear(labels, 48, bias=False)

    def forward(self, latents: Tensor, weights: Tensor) -> Tensor:
        small = (self.latents(latents) + 20 * self.labels(weights)).unflatten(1, (3, 4, 4))
        return interpolate(small, size=(256, 256), mode="bilinear").tanh()


def biggan(path: Path, *, latent: int) -> None:
    """Write such a generator, as `torch.jit.save` does."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        module = SmallBigGAN(latent)
        torch.jit.save(torch.jit.trace(module, (torch.randn(2, latent), torch.eye(1000)[:2])), str(path))


WRITERS: dict[str, Callable[[Path, Written, Written], None]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "flowers": flowers,
    "pets": pets,
    "aircraft": aircraft,
    "aircraft_families": aircraft,
    "cars": cars,
    "birds": birds,
    "dtd": dtd,
    "imagenet": imagenet,
}


def numbers(part: Written, *, after: Written | None = None) -> list[int]:
    """From 1, or on from another part's last number."""
    first = 1 if after is None else len(after.labels) + 1
    return list(range(first, first + len(part.labels)))


def halves(items: list) -> tuple[list, list]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def rows(images: Tensor) -> np.ndarray:
    """As CIFAR has them: a row for each image, red before green before blue."""
    return images.flatten(1).numpy()


def pickled(path: Path, entry: object) -> None:
    path.write_bytes(pickle.dumps(entry, protocol=2))


def text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def pictures(part: Written, paths: list[Path]) -> None:
    for pixels, path in zip(part.images, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, format="JPEG", quality=95)
