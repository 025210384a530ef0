"""The operations of automatic augmentation: what they make of an image, against torchvision, and their derivatives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlo
from problems.blocks.augmentation import OPERATIONS, apply
from problems.blocks.torchvision_door import torchvision

DOCS = Path(__file__).parents[2] / "docs" / "augmentation.md"
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCING = ("color", "contrast", "brightness", "sharpness")
WITHOUT_MAGNITUDE = ("invert", "autocontrast", "equalize")
STEPWISE_IN_MAGNITUDE = ("solarize", "posterize")
STEPWISE_IN_IMAGE = ("posterize", "equalize")

shapes = [(1, 8, 8), (3, 8, 8), (1, 32, 32), (3, 32, 32), (3, 17, 20)]
operations = pytest.mark.parametrize("name", OPERATIONS)
shaped = pytest.mark.parametrize("shape", shapes, ids=str)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def images_of(shape: tuple[int, ...], *, count: int = 6, seed: int = 0) -> Tensor:
    """Images on the 256 levels that torchvision needs for some operations; the first is black, the second white."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, *shape), generator=generator) / 255
    images[0], images[1] = 0, 1
    return images


def smooth_images(shape: tuple[int, ...], *, count: int = 2) -> Tensor:
    """Images in (0.2, 0.8) without two equal pixels: no extreme is attained twice and only a strong change clips."""
    return 0.2 + 0.6 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def alternating(count: int) -> Tensor:
    return 1 - 2.0 * (torch.arange(count) % 2)


# the operations are those of the paper


def test_the_operations_are_the_papers_in_its_order():
    paper = (
        "ShearX, ShearY, TranslateX, TranslateY, Rotate, Invert, AutoContrast, Equalize, Solarize, Color, Posterize, "
        "Contrast, Brightness, Sharpness"
    )
    ours = ["".join(part.capitalize() for part in name.split("_")) for name in OPERATIONS]
    assert [name.lower() for name in ours] == [name.lower() for name in paper.split(", ")]


def test_the_documented_table_lists_exactly_the_operations():
    rows = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert tuple(rows) == OPERATIONS


# magnitude 0 is the identity, 1 the strongest


@operations
@shaped
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_magnitude_zero_is_the_identity_bit_for_bit(name, shape, dtype):
    on_levels = images_of(shape).to(dtype)
    between = smooth_images(shape).to(dtype)
    for images in (on_levels, between):
        count = len(images)
        assert torch.equal(apply(name, images, torch.zeros(count), alternating(count)), images)


@operations
def test_images_keep_their_range_shape_and_dtype(name):
    for shape in shapes:
        for dtype in (torch.float32, torch.float64):
            images = images_of(shape, count=40).to(dtype)
            out = apply(name, images, torch.linspace(0, 1, 40), alternating(40))
            assert (out.shape, out.dtype) == (images.shape, dtype)
            assert out.min() >= 0
            assert out.max() <= 1


@pytest.mark.parametrize("name", [*GEOMETRIC, *ENHANCING, *STEPWISE_IN_MAGNITUDE])
def test_a_larger_magnitude_changes_more(name):
    """The mean distance from a smooth picture grows with m, so that 1 is the strongest."""
    y, x = torch.meshgrid(torch.arange(32) / 31, torch.arange(32) / 31, indexing="ij")
    bump = torch.exp(-12 * ((x - 0.4) ** 2 + (y - 0.55) ** 2))
    image = torch.stack([0.2 + 0.6 * bump, 0.1 + 0.5 * x * bump, 0.3 * y])[None]
    magnitudes = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for sign in (-1.0, 1.0):
        out = apply(name, image.expand(5, -1, -1, -1), magnitudes, torch.full((5,), sign))
        distances = (out - image).abs().mean((1, 2, 3))
        assert (distances.diff() > 0).all()


@pytest.mark.parametrize("name", WITHOUT_MAGNITUDE)
def test_operations_without_magnitude_are_in_force_at_any_above_zero(name):
    images = smooth_images((3, 32, 32))
    strongest = apply(name, images, torch.ones(2), torch.ones(2))
    assert not torch.equal(strongest, images)
    for magnitude in (1e-300, 0.01, 0.5):
        assert torch.equal(apply(name, images, torch.full((2,), magnitude), -torch.ones(2)), strongest)


def test_the_strongest_magnitudes_are_the_documented_ones():
    image = torch.zeros(1, 1, 41, 41)
    image[0, 0, 20, 20] = 1  # the centre
    image[0, 0, 10, 20] = 0.5  # ten pixels above it
    one = torch.ones(1)
    right = apply("translate_x", image, one, one)
    assert right[0, 0, 20, 38:40].tolist() == pytest.approx([0.55, 0.45])  # 0.45 · 41 = 18.45 to the right
    assert apply("translate_y", image, one, -one)[0, 0, 1:3, 20].tolist() == pytest.approx([0.45, 0.55])
    # in(y, x + 0.3 y): what stands at y = −10, x = 0 goes to x = 3
    assert apply("shear_x", image, one, one)[0, 0, 10, 23] == pytest.approx(0.5)
    assert apply("shear_x", image, one, one)[0, 0, 20, 20] == 1
    # 30° against the clock: what stands above goes to the upper left, 10 (sin 30°, cos 30°) = (5, 8.66) away
    turned = apply("rotate", image, one, one)[0, 0]
    assert turned[11, 15] > 0.2
    assert turned[11, 25] == 0
    ramp = torch.arange(256).view(1, 1, 16, 16) / 255
    assert torch.equal(apply("solarize", ramp, one, one), 1 - ramp)
    assert len(apply("posterize", ramp, one, one).unique()) == 2**4
    assert apply("brightness", ramp, one, -one).max() == pytest.approx(0.1)
    assert apply("contrast", ramp, one, -one).std() == pytest.approx(0.1 * ramp.std())


# torchvision


def by_torchvision(name: str, images: Tensor, m: float, sign: float) -> Tensor:
    """The same operation by torchvision, at the same strength, one magnitude for all images."""
    functional = torchvision("transforms.functional")
    height, width = images.shape[-2:]
    bilinear = functional.InterpolationMode.BILINEAR
    amount = sign * m
    shear = math.degrees(math.atan(0.3 * amount))
    eight_bits = (255 * images).round().to(torch.uint8)

    def affine(*, shift: tuple[float, float] = (0.0, 0.0), shears: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        return functional.affine(images, 0.0, list(shift), 1.0, list(shears), interpolation=bilinear)

    match name:
        case "shear_x":
            return affine(shears=(shear, 0.0))
        case "shear_y":
            return affine(shears=(0.0, shear))
        case "translate_x":
            return affine(shift=(0.45 * width * amount, 0.0))
        case "translate_y":
            return affine(shift=(0.0, 0.45 * height * amount))
        case "rotate":
            return functional.rotate(images, 30 * amount, interpolation=bilinear)
        case "invert":
            return functional.invert(images)
        case "autocontrast":
            return functional.autocontrast(images)
        case "equalize":
            return functional.equalize(eight_bits) / 255
        case "solarize":
            return functional.solarize(images, 256 / 255 * (1 - m))
        case "posterize":
            return functional.posterize(eight_bits, 8 - round(4 * m)) / 255
        case "color":
            return functional.adjust_saturation(images, 1 + 0.9 * amount)
        case "contrast":
            return functional.adjust_contrast(images, 1 + 0.9 * amount)
        case "brightness":
            return functional.adjust_brightness(images, 1 + 0.9 * amount)
        case "sharpness":
            return functional.adjust_sharpness(images, 1 + 0.9 * amount)
        case _:
            raise AssertionError(name)


TOLERANCES = {
    **dict.fromkeys(GEOMETRIC, 1e-12),
    **dict.fromkeys(("invert", "solarize", "posterize", "equalize"), 0),
    **dict.fromkeys(("autocontrast", "brightness", "sharpness"), 1e-13),
    **dict.fromkeys(("color", "contrast"), 1e-4),  # torchvision's red counts 0.2989, and here 0.299
}
"""Largest difference of a pixel, as docs/augmentation.md has it."""


@operations
@shaped
def test_agrees_with_torchvision(name, shape):
    images = images_of(shape)
    for m in (0.3, 0.77, 1.0):
        for sign in (-1.0, 1.0):
            out = apply(name, images, torch.full((6,), m), torch.full((6,), sign))
            assert (out - by_torchvision(name, images, m, sign)).abs().max() <= TOLERANCES[name]


@operations
def test_agrees_with_torchvision_at_224(name):
    images = images_of((3, 224, 224), count=3)
    out = apply(name, images, torch.full((3,), 0.6), torch.ones(3))
    assert (out - by_torchvision(name, images, 0.6, 1.0)).abs().max() <= TOLERANCES[name]


def test_equalize_leaves_small_images_alone_as_torchvision_does():
    images = images_of((1, 8, 8))
    assert torch.equal(apply("equalize", images, torch.ones(6), torch.ones(6)), images)
    assert torch.equal(by_torchvision("equalize", images, 1.0, 1.0), images)


# each image by itself


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_equals_its_images_one_by_one(name, dtype):
    for shape in ((1, 8, 8), (3, 32, 32)):
        images = torch.cat([images_of(shape), smooth_images(shape)]).to(dtype)
        magnitudes, signs = torch.linspace(0, 1, 8), alternating(8)
        together = apply(name, images, magnitudes, signs)
        for k in range(8):
            alone = apply(name, images[k : k + 1], magnitudes[k : k + 1], signs[k : k + 1])
            assert torch.equal(together[k : k + 1], alone)


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_geometric_operations_and_enhancements_use_the_sign(name):
    images = smooth_images((3, 32, 32), count=1)
    up, down = (apply(name, images, torch.tensor([0.5]), torch.tensor([sign])) for sign in (1.0, -1.0))
    assert torch.equal(up, down) == (name not in GEOMETRIC + ENHANCING)


def test_color_does_nothing_on_grey_images():
    grey = images_of((1, 8, 8))
    assert torch.equal(apply("color", grey, torch.ones(6), torch.ones(6)), grey)


# derivatives


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*GEOMETRIC, *ENHANCING])
def test_gradients_are_those_of_central_differences(name, channels):
    """In magnitudes and images, and the second derivatives as well."""
    images = smooth_images((channels, 5, 4)).requires_grad_()
    magnitudes = torch.tensor([0.31, 0.74], requires_grad=True)

    def operation(images: Tensor, magnitudes: Tensor) -> Tensor:
        return apply(name, images, magnitudes, torch.tensor([1.0, -1.0]))

    assert gradcheck(operation, (images, magnitudes))
    assert gradgradcheck(operation, (images, magnitudes))
    (slope,) = torch.autograd.grad(operation(images, magnitudes).square().sum(), magnitudes, materialize_grads=True)
    assert (slope != 0).all() or (name, channels) == ("color", 1)


@pytest.mark.parametrize("name", ["invert", "autocontrast", "solarize"])
def test_gradients_in_the_image_are_those_of_central_differences(name):
    images = smooth_images((3, 5, 4)).requires_grad_()

    def operation(images: Tensor) -> Tensor:
        return apply(name, images, torch.tensor([0.31, 0.74]), torch.ones(2))

    assert gradcheck(operation, images)
    assert gradgradcheck(operation, images)


@pytest.mark.parametrize("name", STEPWISE_IN_MAGNITUDE)
def test_magnitudes_pass_straight_through_steps(name):
    """∂out/∂m = 1 for every pixel, at any magnitude, and no second derivative."""
    images, weights = images_of((3, 32, 32)), torch.randn(6, 3, 32, 32)
    magnitudes = torch.linspace(0, 1, 6).requires_grad_()
    out = apply(name, images, magnitudes, torch.ones(6))
    (slope,) = torch.autograd.grad((weights * out.square()).sum(), magnitudes, create_graph=True)
    assert torch.allclose(slope, (2 * weights * out).sum((1, 2, 3)))
    (curvature,) = torch.autograd.grad(slope.sum(), magnitudes)
    assert torch.allclose(curvature, 2 * weights.sum((1, 2, 3)))  # of the square alone


@pytest.mark.parametrize("name", STEPWISE_IN_IMAGE)
def test_images_pass_straight_through_steps(name):
    images, weights = images_of((3, 32, 32)).requires_grad_(), torch.randn(6, 3, 32, 32)
    out = apply(name, images, torch.linspace(0, 1, 6), torch.ones(6))
    (slope,) = torch.autograd.grad((weights * out).sum(), images)
    assert torch.equal(slope, weights)


@pytest.mark.parametrize("name", WITHOUT_MAGNITUDE)
def test_operations_without_magnitude_have_no_gradient_in_it(name):
    magnitudes = torch.tensor([0.0, 0.5], requires_grad=True)
    out = apply(name, smooth_images((3, 32, 32)).requires_grad_(), magnitudes, torch.ones(2))
    (slope,) = torch.autograd.grad(out.sum(), magnitudes, materialize_grads=True)
    assert slope.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in `jvp`
@operations
def test_forward_mode_agrees_with_reverse_mode(name):
    images, magnitudes, signs = smooth_images((3, 16, 16)), torch.tensor([0.31, 0.74]), torch.tensor([1.0, -1.0])
    tangents = torch.randn_like(images), torch.randn_like(magnitudes)
    cotangent = torch.randn_like(images)

    def operation(images: Tensor, magnitudes: Tensor) -> Tensor:
        return apply(name, images, magnitudes, signs)

    _, forward = torch.func.jvp(operation, (images, magnitudes), tangents)
    _, pullback = torch.func.vjp(operation, images, magnitudes)
    reverse = sum((u * v).sum() for u, v in zip(pullback(cotangent), tangents, strict=True))
    assert torch.allclose((forward * cotangent).sum(), torch.as_tensor(reverse))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "equalize"])  # kornia's has no batching rule
def test_operations_can_be_mapped(name):
    images, magnitudes, signs = smooth_images((3, 16, 16)), torch.tensor([0.31, 0.74]), torch.tensor([1.0, -1.0])
    mapped = torch.vmap(lambda x, m, s: apply(name, x[None], m[None], s[None])[0])(images, magnitudes, signs)
    assert torch.equal(mapped, apply(name, images, magnitudes, signs))


# mistakes


def test_an_unknown_operation_is_refused_with_the_known_ones():
    with pytest.raises(mlo.UserError, match=r"no operation named 'colour'.*shear_x.*sharpness"):
        apply("colour", torch.rand(1, 1, 8, 8), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (3, 8, 8)], ids=str)
def test_other_channels_are_refused(shape):
    with pytest.raises(mlo.UserError, match="1 or 3 channels"):
        apply("color", torch.rand(shape), torch.ones(2), torch.ones(2))
