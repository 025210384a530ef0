"""Image sets: what is read from each one's files, how it is split, and what streams draw from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import WRITERS, Written, write
from PIL import Image
from torch import Tensor

import mlo
from problems.blocks.digits import all_digits
from problems.blocks.image_sets import SETS, ImageSets, Part, image_sets, in_order, stratified, stream
from problems.blocks.image_sets._images import TRIES, FileImages, HeldImages, random_part
from problems.blocks.torchvision_door import torchvision

CPU = torch.device("cpu")
Open = Callable[..., ImageSets]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Written]]]:
    """Every set that is read from disk, written once."""
    places = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    return {name: (place, write(name, place)) for name, place in places.items()}


@pytest.fixture
def opened(folders: dict[str, tuple[Path, dict[str, Written]]]) -> Open:
    def open_set(name: str, **settings: object) -> ImageSets:
        return image_sets(name, **{"root": folders[name][0], "seed": 0, "complete": False, "size": None, **settings})

    return open_set


def whole(part: Part, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([batch["images"] for batch in in_order(part, size=7, device=CPU, dtype=dtype)])


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# reading


def test_every_set_on_disk_can_be_written():
    assert set(WRITERS) == set(SETS) - {"digits"}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_labels_and_pixels(name: str, folders: dict[str, tuple[Path, dict[str, Written]]], opened: Open):
    written = folders[name][1]
    known = SETS[name]
    size = known.size if known.size == 32 else 16
    found = opened(name, validation=0.0, size=size)
    for part, what in ((found.train, written["train"]), (found.test, written["test"])):
        assert part.labels.tolist() == what.labels.tolist()
        images = whole(part) * 255
        assert images.shape == (len(what.labels), 3, size, size)
        if size == 32:
            assert torch.equal(images.round().to(torch.uint8), what.images)
        else:  # one colour each, up to what JPEG does to it
            assert (images - what.images[:, :, :1, :1]).abs().max() <= 3
    assert (found.classes, found.channels) == (known.classes, 3)
    assert len(found.mean) == len(found.deviation) == 3


def test_digits_are_those_of_scikit_learn_in_unit_range():
    found = image_sets("digits", seed=0, validation=0.0)
    assert (len(found.train), len(found.test)) == SETS["digits"].counts
    everything = all_digits()
    table = {image.numpy().tobytes(): label for image, label in zip(everything.images, everything.labels, strict=True)}
    for part in (found.train, found.test):
        images = whole(part, torch.float32)
        assert [table[(2 * image - 1).numpy().tobytes()] for image in images] == part.labels.tolist()


def test_digits_have_the_mean_and_deviation_stated():
    images = (all_digits().images + 1).double() / 2
    assert images.mean().item() == pytest.approx(SETS["digits"].mean[0], abs=5e-5)
    assert images.std().item() == pytest.approx(SETS["digits"].deviation[0], abs=5e-5)


# splitting


def test_parts_share_no_image_and_keep_classes_in_proportion():
    found = image_sets("digits", seed=1, fraction=0.25, validation=0.1)
    parts = [set(part.index.tolist()) for part in (found.train, found.validation, found.rest)]
    assert not any(a & b for a, b in combinations(parts, 2))
    assert [len(part) for part in parts] == [292, 32, 973]  # a quarter of 1,297 is 324.25, a tenth of 324 is 32.4
    assert set(torch.bincount(found.validation.labels, minlength=10).tolist()) <= {3, 4}


def test_the_split_follows_the_seed():
    first, again, other = (image_sets("digits", seed=seed) for seed in (0, 0, 1))
    for part in ("train", "validation", "test"):
        assert torch.equal(whole(getattr(first, part)), whole(getattr(again, part)))
    assert not torch.equal(whole(first.test), whole(other.test))


def test_official_test_images_do_not_follow_the_seed(opened: Open):
    assert torch.equal(whole(opened("cifar10", seed=0).test), whole(opened("cifar10", seed=1).test))


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor),
    share=st.floats(0, 1, exclude_max=True),
)
def test_stratified_shares(labels: Tensor, share: float):
    drawn, others = stratified(labels, share, generator=torch.Generator().manual_seed(0))
    assert torch.cat([drawn, others]).sort().values.tolist() == list(range(len(labels)))
    counts = torch.bincount(labels)
    taken = torch.bincount(labels[drawn], minlength=len(counts))
    assert ((taken - share * counts).abs() < 1 + 1e-6).all()
    assert len(drawn) <= int(share * len(labels) + 0.5)
    assert (taken[counts > 0] < counts[counts > 0]).all()  # a share below 1 leaves every class something


def test_a_share_of_equal_classes_is_exact():
    labels = torch.arange(10).repeat(50)
    drawn, _ = stratified(labels, 0.1, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(labels[drawn]).tolist() == [5] * 10


def test_a_smaller_share_is_part_of_a_larger_one():
    labels = torch.arange(4).repeat(50)
    few, more = (stratified(labels, share, generator=torch.Generator().manual_seed(3))[0] for share in (0.1, 0.3))
    assert len(few) == 20
    assert set(few.tolist()) < set(more.tolist())


# drawing


def test_a_draw_depends_on_its_key_alone(opened: Open):
    part = opened("cifar10").train
    one, two = (stream(part, size=4, device=CPU, dtype=torch.float64) for _ in range(2))
    keys = [mlo.stream.Draw(0, "train", iteration) for iteration in (1, 2, 3)]
    forward, backward = [one.draw(key) for key in keys], [two.draw(key) for key in reversed(keys)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(a["labels"], b["labels"])
    other = one.draw(mlo.stream.Draw(1, "train", 1))
    assert not torch.equal(other["images"], forward[0]["images"])
    assert one.draws_per_epoch() == len(part) / 4


def test_a_pass_draws_every_image_once():
    found = image_sets("digits", seed=0)
    batches = stream(found.validation, size=10, device=CPU, dtype=torch.float64)
    drawn = torch.cat([batches.draw(mlo.stream.Draw(0, "validation", t))["images"] for t in range(1, 14)])
    assert len(found.validation) == 130
    rows = sorted(image.flatten().tolist() for image in drawn)
    assert rows == sorted(image.flatten().tolist() for image in whole(found.validation))
    assert all(a != b for a, b in pairwise(rows))


@pytest.mark.parametrize("name", ["cifar10", "svhn", "flowers"])
def test_training_images_are_augmented_and_no_others(name: str, tmp_path: Path):
    write(name, tmp_path, patches=True)
    size = None if name != "flowers" else 16
    found = image_sets(name, root=tmp_path, seed=0, complete=False, size=size, fraction=0.8)
    for part, plain in ((found.train, False), (found.validation, True), (found.test, True), (found.rest, True)):
        if len(part) == 0:
            continue
        assert part.augmented is not plain
        batches = stream(part, size=len(part), device=CPU, dtype=torch.float64)
        drawn = {image.numpy().tobytes() for image in batches.draw(mlo.stream.Draw(0, "any", 1))["images"]}
        assert (drawn == {image.numpy().tobytes() for image in whole(part)}) is plain


def test_held_images_are_shifted_and_mirrored_as_their_draws_say():
    pixels = (256 * uniform(40, 3, 6, 5)).to(torch.uint8)
    images = HeldImages(pixels=pixels, padding=2, flip=True)
    draws = uniform(40, images.draws, seed=1)
    functional = torchvision("transforms.functional")
    out = images.take(torch.arange(40), draws)
    offsets = set()
    for image, result, (down, right, mirrored) in zip(pixels, out, draws.tolist(), strict=True):
        top, left = int(5 * down), int(5 * right)
        offsets.add((top, left, mirrored < 0.5))
        expected = functional.crop(functional.pad(image, [2, 2, 2, 2]), top, left, 6, 5)
        assert torch.equal(result, functional.hflip(expected) if mirrored < 0.5 else expected)
    assert len(offsets) > 20
    assert torch.equal(images.take(torch.arange(40), None), pixels)


@pytest.fixture
def photographs(tmp_path: Path) -> FileImages:
    """Six pictures of coloured noise, upright and lying."""
    paths: list[str] = []
    for number in range(6):
        shape = (40, 61, 3) if number % 2 else (70, 33, 3)
        pixels = (256 * uniform(*shape, seed=number)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    return FileImages(paths=paths, size=28)


def test_photographs_are_cut_as_torchvision_cuts_them(photographs: FileImages):
    transforms, functional = torchvision("transforms"), torchvision("transforms.functional")
    middle = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.PILToTensor()])
    draws = uniform(6, photographs.draws)
    plain, augmented = photographs.take(torch.arange(6), None), photographs.take(torch.arange(6), draws)
    for path, one, two, row in zip(photographs.paths, plain, augmented, draws.tolist(), strict=True):
        image = Image.open(path).convert("RGB")
        assert torch.equal(one, middle(image))
        left, upper, right, lower = random_part(*image.size, row)
        part = functional.resized_crop(image, upper, left, lower - upper, right - left, [28, 28])
        expected = functional.pil_to_tensor(part)
        assert torch.equal(two, expected.flip(-1) if row[-1] < 0.5 else expected)


def test_threads_change_nothing(photographs: FileImages):
    threaded = FileImages(paths=photographs.paths, size=28, workers=3)
    index, draws = torch.tensor([5, 0, 3, 3]), uniform(4, photographs.draws)
    assert torch.equal(photographs.take(index, draws), threaded.take(index, draws))


@given(
    width=st.integers(30, 300),
    height=st.integers(30, 300),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=2 * TRIES + 2, max_size=2 * TRIES + 2),
)
def test_random_parts_lie_inside_with_allowed_area_and_ratio(width: int, height: int, draws: list[float]):
    left, upper, right, lower = random_part(width, height, draws)
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    wide, high = right - left, lower - upper
    assert 3 / 4 - 2 / high <= wide / high <= 4 / 3 + 2 / high  # up to rounding
    assert wide * high >= 0.08 * width * height - wide - high or max(width / height, height / width) > 4 / 3


def test_a_part_of_a_strip_is_its_middle():
    assert random_part(1000, 30, [0.99] * (2 * TRIES + 2)) == (480, 0, 520, 30)


# what cannot be read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 1.0}, r"validation is 1.0; it must be at least 0 and below 1"),
        ({"fraction": 0.0}, r"fraction is 0.0; it must be above 0 and at most 1"),
        ({"size": 32}, r"size is 32; images of digits are 8 pixels wide"),
        ({"fraction": 1e-4}, r"fraction is 0.0001; of 1297 images it leaves none"),
        ({"workers": -1}, r"workers is -1; it must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        image_sets("digits", seed=0, **settings)


def test_an_unknown_set_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"source is 'cifar_10'.* Did you mean 'cifar10'\? Known: aircraft, .*, svhn"):
        image_sets("cifar_10", root="/data", seed=0)


def test_a_root_is_asked_for():
    with pytest.raises(ValueError, match=r"root is not given; svhn is read from a folder that holds train_32x32.mat"):
        image_sets("svhn", seed=0)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_missing_is_named_with_the_layout(
    name: str, folders: dict[str, tuple[Path, dict[str, Written]]], tmp_path: Path
):
    root = tmp_path / "copy"
    shutil.copytree(folders[name][0], root)
    lost = root / SETS[name].needs[-1]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(ValueError, match="Nothing is downloaded") as caught:
        image_sets(name, root=root, seed=0, complete=False)
    assert f"'{lost}' is missing" in str(caught.value)
    assert SETS[name].layout in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_part_of_a_set_must_be_asked_for(name: str, opened: Open):
    with pytest.raises(ValueError, match=r"images for train as it is published, and here are 20; .*complete: false"):
        opened(name, complete=True)


def test_a_broken_file_is_named_as_such(opened: Open, tmp_path: Path):
    write("cifar10", tmp_path)
    whole_file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    whole_file.write_bytes(whole_file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cifar10 cannot be read \(.*expected under the root"):
        image_sets("cifar10", root=tmp_path, seed=0, complete=False)


BROKEN = [
    ("svhn", "train_32x32.mat", b""),
    ("svhn", "train_32x32.mat", b"<html><body>404 not found</body></html>\n"),
    ("flowers", "flowers-102/imagelabels.mat", b""),
    ("cars", "stanford_cars/devkit/cars_train_annos.mat", b""),
    ("cifar10", "cifar-10-batches-py/data_batch_1", b"cnumby\narray\n."),
    ("cifar10", "cifar-10-batches-py/data_batch_1", b"cnumpy\nno_such_array\n."),
    ("cifar10", "cifar-10-batches-py/test_batch", b"."),
]


@pytest.mark.parametrize(("name", "file", "content"), BROKEN)
def test_whatever_is_in_a_broken_file_the_answer_is_the_layout(name: str, file: str, content: bytes, tmp_path: Path):
    write(name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"root is '{tmp_path}': {name} cannot be read \(.*expected under the root"):
        image_sets(name, root=tmp_path, seed=0, complete=False)


def test_a_listed_image_that_is_missing_is_named_before_any_is_drawn(tmp_path: Path):
    write("pets", tmp_path)
    lost = tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg"
    lost.unlink()
    with pytest.raises(ValueError, match=rf"lists '{lost}', which is missing \(1 in all\)"):
        image_sets("pets", root=tmp_path, seed=0, complete=False)


def test_a_broken_image_is_named_when_it_is_drawn(tmp_path: Path):
    write("pets", tmp_path)
    broken = tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg"
    broken.write_bytes(b"no image")
    found = image_sets("pets", root=tmp_path, seed=0, complete=False, size=16)
    everything = [found.train, found.validation]
    with pytest.raises(mlo.UserError, match=f"'{broken}' cannot be read as an image"):
        [whole(part) for part in everything]


def test_labels_beyond_the_classes_are_refused(tmp_path: Path):
    write("cifar10", tmp_path, classes=11)
    with pytest.raises(ValueError, match=r"cifar10 has 10 classes, and here is label 10"):
        image_sets("cifar10", root=tmp_path, seed=0, complete=False)


def test_classes_of_imagenet_must_agree(tmp_path: Path):
    write("imagenet", tmp_path)
    (tmp_path / "val" / "n09999999").mkdir()
    shutil.copy(next((tmp_path / "train").rglob("*.JPEG")), tmp_path / "val" / "n09999999")
    with pytest.raises(ValueError, match=r"class 'n09999999' is in val/ and not in train/"):
        image_sets("imagenet", root=tmp_path, seed=0, complete=False)
