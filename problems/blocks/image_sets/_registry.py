"""The sets that are known: a row for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, final

from torch import Tensor

from problems.blocks.image_sets import _read
from problems.blocks.image_sets._images import AbstractImages, FileImages, HeldImages

Read: TypeAlias = Callable[[Path, _read.Half, int], _read.Found]
"""From a root, one half of a set; a seed decides where the files do not say what is for the test."""


@final
@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One row.

    - `classes`, `channels`: how many there are.
    - `size`: pixels of each side; of photographs, of what is cut from them by default.
    - `mean`, `deviation`: by channel, in units of the largest intensity.
    - `counts`: the published numbers of training and test images.
    - `read`: see `Read`.
    - `layout`: what lies where under the root, in words.
    - `needs`: files and folders that must lie under the root.
    - `padding`, `flip`: the standard augmentation of sets of small images (`HeldImages`).
    """

    classes: int
    channels: int = 3
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    counts: tuple[int, int]
    read: Read
    layout: str
    needs: tuple[str, ...]
    padding: int = 0
    flip: bool = False
    strongest: int = 255

    def images(self, found: Tensor | list[str], *, size: int, workers: int) -> AbstractImages:
        """What `read` has found, ready to be drawn."""
        if isinstance(found, Tensor):
            return HeldImages(pixels=found, strongest=self.strongest, padding=self.padding, flip=self.flip)
        return FileImages(paths=found, size=size, workers=workers)


MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images; the other sets of photographs use the same."""


def _photographs(*, classes: int, counts: tuple[int, int], read: Read, layout: str, needs: tuple[str, ...]) -> ImageSet:
    return ImageSet(
        classes=classes,
        size=224,
        mean=MEAN,
        deviation=DEVIATION,
        counts=counts,
        read=read,
        layout=layout,
        needs=needs,
    )


def _aircraft_needs(many: str, one: str) -> tuple[str, ...]:
    data = "fgvc-aircraft-2013b/data"
    return f"{data}/images", f"{data}/{many}.txt", f"{data}/images_{one}_trainval.txt", f"{data}/images_{one}_test.txt"


SETS: dict[str, ImageSet] = {
    "digits": ImageSet(
        classes=10,
        channels=1,
        size=8,
        mean=(0.3053,),
        deviation=(0.3761,),
        counts=(1297, 500),
        read=_read.digits,
        layout="nothing: they ship with scikit-learn",
        needs=(),
        strongest=16,
    ),
    "cifar10": ImageSet(
        classes=10,
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        deviation=(0.2470, 0.2435, 0.2616),
        counts=(50_000, 10_000),
        read=_read.cifar10,
        layout="cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta (the Python version)",
        needs=(
            *(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
            "cifar-10-batches-py/test_batch",
            "cifar-10-batches-py/batches.meta",
        ),
        padding=4,
        flip=True,
    ),
    "cifar100": ImageSet(
        classes=100,
        size=32,
        mean=(0.5071, 0.4865, 0.4409),
        deviation=(0.2673, 0.2564, 0.2762),
        counts=(50_000, 10_000),
        read=_read.cifar100,
        layout="cifar-100-python/ with train, test and meta (the Python version)",
        needs=("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
        padding=4,
        flip=True,
    ),
    "svhn": ImageSet(
        classes=10,
        size=32,
        mean=(0.4377, 0.4438, 0.4728),
        deviation=(0.1980, 0.2010, 0.1970),
        counts=(73_257, 26_032),
        read=_read.svhn,
        layout="train_32x32.mat and test_32x32.mat (cropped digits, format 2)",
        needs=("train_32x32.mat", "test_32x32.mat"),
        padding=4,
    ),
    "flowers": _photographs(
        classes=102,
        counts=(2_040, 6_149),
        read=_read.flowers,
        layout="flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        needs=("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
    ),
    "pets": _photographs(
        classes=37,
        counts=(3_680, 3_669),
        read=_read.pets,
        layout="oxford-iiit-pet/ with images/ and annotations/",
        needs=(
            "oxford-iiit-pet/images",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
        ),
    ),
    "aircraft": _photographs(
        classes=100,
        counts=(6_667, 3_333),
        read=_read.aircraft("variant"),
        layout="fgvc-aircraft-2013b/data/ with images/, variants.txt and images_variant_trainval.txt and …_test.txt",
        needs=_aircraft_needs("variants", "variant"),
    ),
    "aircraft_families": _photographs(
        classes=70,
        counts=(6_667, 3_333),
        read=_read.aircraft("family"),
        layout="fgvc-aircraft-2013b/data/ with images/, families.txt and images_family_trainval.txt and …_test.txt",
        needs=_aircraft_needs("families", "family"),
    ),
    "cars": _photographs(
        classes=196,
        counts=(8_144, 8_041),
        read=_read.cars,
        layout=(
            "stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat, devkit/cars_meta.mat and "
            "devkit/cars_train_annos.mat"
        ),
        needs=(
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
        ),
    ),
    "birds": _photographs(
        classes=200,
        counts=(5_994, 5_794),
        read=_read.birds,
        layout=(
            "CUB_200_2011/ with images/, images.txt, image_class_labels.txt and train_test_split.txt (the 2011 version)"
        ),
        needs=(
            "CUB_200_2011/images",
            "CUB_200_2011/images.txt",
            "CUB_200_2011/image_class_labels.txt",
            "CUB_200_2011/train_test_split.txt",
        ),
    ),
    "dtd": _photographs(
        classes=47,
        counts=(3_760, 1_880),
        read=_read.dtd,
        layout="dtd/dtd/ with images/ and labels/train1.txt, labels/val1.txt and labels/test1.txt",
        needs=("dtd/dtd/images", *(f"dtd/dtd/labels/{part}1.txt" for part in ("train", "val", "test"))),
    ),
    "imagenet": _photographs(
        classes=1000,
        counts=(1_281_167, 50_000),
        read=_read.imagenet,
        layout="train/ and val/ with a folder for each class (n01440764/…), the same in both",
        needs=("train", "val"),
    ),
}
