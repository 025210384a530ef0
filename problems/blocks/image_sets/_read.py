"""Each set's files, in the layout in which it is distributed, read by torchvision where it knows the set.

torchvision verifies some files by their checksum and calls all others "not found". Here a set is held against its
published number of images instead (`image_sets`), so that a part of it can be used on purpose; a file that is broken says
so when it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

import mlo
from problems.blocks.digits import STRONGEST, all_digits
from problems.blocks.image_sets._split import stratified
from problems.blocks.torchvision_door import torchvision

Half: TypeAlias = Literal["train", "test"]

Found: TypeAlias = tuple[Tensor | list[str], Tensor]
"""Pixels, uint8 [n, channels, height, width], or paths of n files; and labels, int64 [n], counted from 0."""


def digits(root: Path, half: Half, seed: int) -> Found:
    """scikit-learn's handwritten digits, 500 of which are for the test: drawn by `seed`, every class in proportion."""
    everything = all_digits()
    generator = mlo.stream.Draw(seed, "image_sets.test", 0).generator()
    parts = stratified(everything.labels, 500 / len(everything), generator=generator)
    chosen = parts[0 if half == "test" else 1]
    pixels = ((everything.images[chosen] + 1) * (STRONGEST / 2)).round().to(torch.uint8)
    return pixels, everything.labels[chosen]


def cifar10(root: Path, half: Half, seed: int) -> Found:
    """CIFAR-10 (Krizhevsky 2009)."""
    return _cifar("CIFAR10", root, half)


def cifar100(root: Path, half: Half, seed: int) -> Found:
    """CIFAR-100 (Krizhevsky 2009), the fine labels."""
    return _cifar("CIFAR100", root, half)


def svhn(root: Path, half: Half, seed: int) -> Found:
    """Street view house numbers (Netzer et al. 2011); the extra images are not read."""
    known = torchvision("datasets").SVHN
    files = {name: (*rest, None) for name, (*rest, _) in known.split_list.items()}
    found = _unverified(known, split_list=files)(root, split=half)
    return torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels)  # the file has images last


def flowers(root: Path, half: Half, seed: int) -> Found:
    """Oxford 102 Flowers (Nilsback and Zisserman 2008); the official training and validation images are for training."""
    known = torchvision("datasets").Flowers102
    files = {name: (file, None) for name, (file, _) in known._file_dict.items()}
    reader = _unverified(known, _file_dict=files)
    return _joined([reader(root, split=part) for part in (("train", "val") if half == "train" else ("test",))])


def pets(root: Path, half: Half, seed: int) -> Found:
    """Oxford-IIIT Pets (Parkhi et al. 2012), the 37 breeds."""
    found = torchvision("datasets").OxfordIIITPet(root, split="trainval" if half == "train" else "test")
    return [str(path) for path in found._images], torch.tensor(found._labels)


def aircraft(level: Literal["variant", "family"]) -> Callable[[Path, Half, int], Found]:
    """FGVC Aircraft (Maji et al. 2013): 100 variants or 70 families; training is the official `trainval`."""

    def read(root: Path, half: Half, seed: int) -> Found:
        split = "trainval" if half == "train" else "test"
        return _joined([torchvision("datasets").FGVCAircraft(root, split=split, annotation_level=level)])

    return read


def cars(root: Path, half: Half, seed: int) -> Found:
    """Stanford Cars (Krause et al. 2013)."""
    samples = torchvision("datasets").StanfordCars(root, split=half)._samples
    return [str(path) for path, _ in samples], torch.tensor([int(label) for _, label in samples])


def birds(root: Path, half: Half, seed: int) -> Found:
    """Caltech-UCSD Birds 200, the version of 2011 (Wah et al.), which torchvision does not know."""
    folder = root / "CUB_200_2011"
    files, classes, training = (
        dict(line.split(maxsplit=1) for line in (folder / f"{name}.txt").read_text().splitlines() if line.strip())
        for name in ("images", "image_class_labels", "train_test_split")
    )
    chosen = [number for number in files if (training[number].strip() == "1") == (half == "train")]
    paths = [str(folder / "images" / files[number].strip()) for number in chosen]
    return paths, torch.tensor([int(classes[number]) - 1 for number in chosen])


def dtd(root: Path, half: Half, seed: int) -> Found:
    """Describable Textures (Cimpoi et al. 2014), the first partition; its training and validation are for training."""
    reader = torchvision("datasets").DTD
    return _joined([reader(root, split=part) for part in (("train", "val") if half == "train" else ("test",))])


def imagenet(root: Path, half: Half, seed: int) -> Found:
    """ILSVRC 2012 (Russakovsky et al. 2015): classes are numbered in the order of their folders' names."""
    found = torchvision("datasets").ImageFolder(root / ("train" if half == "train" else "val"))
    folders = {name: {each.name for each in (root / name).iterdir() if each.is_dir()} for name in ("train", "val")}
    for one, other in (("train", "val"), ("val", "train")):
        if alone := sorted(folders[one] - folders[other]):
            raise ValueError(f"class '{alone[0]}' is in {one}/ and not in {other}/")
    return [path for path, _ in found.samples], torch.tensor(found.targets)


def _cifar(name: str, root: Path, half: Half) -> Found:
    known = getattr(torchvision("datasets"), name)
    lists = {part: [(file, None) for file, _ in getattr(known, part)] for part in ("train_list", "test_list")}
    found = _unverified(known, **lists, meta={**known.meta, "md5": None})(root, train=half == "train")
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def _joined(parts: list[Any]) -> Found:
    return [str(path) for part in parts for path in part._image_files], torch.tensor(
        [label for part in parts for label in part._labels]
    )


def _unverified(known: Any, **attributes: object) -> Any:
    """torchvision's reader with lists of files that hold no checksums."""
    return type(known.__name__, (known,), attributes)
