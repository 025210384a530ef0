"""A set by its name, split into training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import final

import torch
from torch import Tensor

import mlo
from problems.blocks.image_sets._images import AbstractImages
from problems.blocks.image_sets._read import Found, Half
from problems.blocks.image_sets._registry import SETS, ImageSet
from problems.blocks.image_sets._split import Share, stratified
from problems.blocks.torchvision_door import torchvision


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some images of a set, known by their numbers; they are decoded when they are drawn.

    - `index`: int64 [n], numbers in `images`.
    - `labels`: int64 [n].
    - `augmented`: whether streams augment them in the set's standard way.
    """

    images: AbstractImages
    index: Tensor
    labels: Tensor
    augmented: bool

    def __len__(self) -> int:
        """n."""
        return len(self.index)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSets:
    """A set's parts, which share no image, and what networks must know of it.

    - `rest`: training images that `fraction` leaves out, not augmented.
    - `foundation`: training images that are taken away before all else, not augmented: what a foundation model may see.
    - `classes`, `channels`, `size`: labels are below `classes`; images are [channels, size, size].
    - `mean`, `deviation`: by channel, of images in [0, 1].
    """

    name: str
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    train: Part
    validation: Part
    test: Part
    rest: Part
    foundation: Part


def image_sets(
    name: str,
    *,
    root: str | Path | None = None,
    seed: int,
    validation: Share = 0.1,
    fraction: Share = 1.0,
    foundation: Share = 0.0,
    size: int | None = None,
    complete: bool = True,
    workers: int = 0,
) -> ImageSets:
    """Read set `name` and split its training images at random, every class in proportion (`stratified`).

    Of the training images the share `foundation` is taken away, of what remains a `fraction` is used, and of this the share
    `validation` is set aside. The test images are the official ones. Nothing is downloaded, and nothing but labels and paths
    is read of sets of photographs.

    - `name`: one of `SETS`.
    - `root`: the folder that holds the set's files, as `docs/data.md` lists them. Digits need none.
    - `seed`: decides the split.
    - `size`: pixels of each side of what is cut from photographs; None is 224. Small images have one size.
    - `complete`: whether the set must have its published number of images.
    - `workers`: threads that decode photographs; the images are the same for any number.

    Raises ValueError, beginning with the setting to change, for a number out of range, and where files are missing or
    broken, with their path and the layout that is expected.
    """
    known = _known(name)
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; it must be at least 0 and below 1")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
    if not 0 <= foundation < 1:
        raise ValueError(f"foundation is {foundation}; it must be at least 0 and below 1")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0")
    pixels = _size(name, known, size)
    place = _root(name, known, root)
    found = {half: _read(name, known, place, half, seed) for half in ("train", "test")}
    for half, published in zip(("train", "test"), known.counts, strict=True):
        have = len(found[half][1])
        if complete and have != published:
            raise ValueError(
                f"root is '{root}': {name} has {published} images for {half} as it is published, and here are {have}; "
                "say `complete: false` to use a part of it"
            )
    images = {half: known.images(what, size=pixels, workers=workers) for half, (what, _) in found.items()}
    labels = {half: each for half, (_, each) in found.items()}
    taken, open_to_all = stratified(labels["train"], foundation, generator=_generator(seed, "foundation"))
    used, rest = (
        open_to_all[chosen]
        for chosen in stratified(labels["train"][open_to_all], fraction, generator=_generator(seed, "fraction"))
    )
    if len(used) == 0:
        raise ValueError(f"fraction is {fraction}; of {len(rest)} images it leaves none")
    held_out, kept = stratified(labels["train"][used], validation, generator=_generator(seed, "validation"))

    def part(half: Half, index: Tensor, *, augmented: bool = False) -> Part:
        return Part(images=images[half], index=index, labels=labels[half][index], augmented=augmented)

    return ImageSets(
        name=name,
        classes=known.classes,
        channels=known.channels,
        size=pixels,
        mean=known.mean,
        deviation=known.deviation,
        train=part("train", used[kept], augmented=True),
        validation=part("train", used[held_out]),
        test=part("test", torch.arange(len(labels["test"]))),
        rest=part("train", rest),
        foundation=part("train", taken),
    )


def _known(name: str) -> ImageSet:
    if name in SETS:
        return SETS[name]
    near = get_close_matches(name, SETS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"source is '{name}', which is no known set of images.{hint} Known: {', '.join(sorted(SETS))}.")


def _size(name: str, known: ImageSet, size: int | None) -> int:
    if size is None or size == known.size:
        return known.size
    if known.size != 224:
        raise ValueError(f"size is {size}; images of {name} are {known.size} pixels wide and are not resized")
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    return size


def _root(name: str, known: ImageSet, root: str | Path | None) -> Path:
    if not known.needs:
        return Path()
    if root is None:
        raise ValueError(f"root is not given; {name} is read from a folder that holds {known.layout}")
    place = Path(root).expanduser()
    missing = [each for each in known.needs if not (place / each).exists()]
    if missing:
        raise ValueError(
            f"root is '{root}': {name} is not there: '{place / missing[0]}' is missing; expected under the root: "
            f"{known.layout}. Nothing is downloaded"
        )
    return place


def _read(name: str, known: ImageSet, place: Path, half: Half, seed: int) -> Found:
    if known.needs:
        torchvision("datasets")  # where it is not installed, that is no fault of the files
    try:
        found, labels = known.read(place, half, seed)
    except mlo.MloError:
        raise
    except (
        Exception
    ) as error:  # what readers of pickles, of MATLAB's files and of lists say of a broken one is anything
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"root is '{place}': {name} cannot be read ({what}); expected under the root: {known.layout}"
        ) from error
    wrong = labels[(labels < 0) | (labels >= known.classes)]
    if len(wrong) or len(labels) == 0:
        stated = f"label {int(wrong[0])}" if len(wrong) else f"no image for {half}"
        raise ValueError(f"root is '{place}': {name} has {known.classes} classes, and here is {stated}")
    if not isinstance(found, Tensor):
        absent = [path for path in found if not Path(path).is_file()] if name != "imagenet" else []
        if absent:
            raise ValueError(f"root is '{place}': {name} lists '{absent[0]}', which is missing ({len(absent)} in all)")
    return found, labels


def _generator(seed: int, what: str) -> torch.Generator:
    return mlo.stream.Draw(seed, f"image_sets.{what}", 0).generator()
