"""What is made of MNIST's digits, on digits made by hand."""

import math
from dataclasses import replace

import pytest
import torch

from training import affine, compose, data, multimnist
from training.data import DataError, Dataset, Layout, hold_out


def let_draw(patch: pytest.MonkeyPatch, name: str, *values: object) -> None:
    """Let `torch.rand` or `torch.randn` give these, call by call: one number for each image, or for all."""
    drawn = iter(values)
    patch.setattr(torch, name, lambda count, **_: torch.as_tensor(next(drawn)).float().expand(count))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def digits() -> Dataset:
    """Forty boxes of 20x20 pixels in frames of 28x28, each of its own shade, of four unequal classes."""
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 4:24] = torch.arange(100, 140, dtype=torch.uint8)[:, None, None]
    labels = torch.tensor([0] * 25 + [1] * 10 + [2] * 4 + [3])
    return Dataset("multimnist", tuple("abcd"), images, labels, {}, layout="pairs")


def test_partners_are_of_other_classes_and_equally_likely(digits: Dataset) -> None:
    """A digit's partner is never of its class, and each digit of the others comes up as often."""
    first = torch.full((30_000,), 30)  # of class 1; the other 30 digits are of other classes
    drawn = multimnist.partners(digits.labels, first, generator())
    counts = drawn.bincount(minlength=40)
    assert counts[25:35].sum() == 0
    others = torch.cat([counts[:25], counts[35:]])
    assert others.min() > 850
    assert others.max() < 1150


def test_pairs_are_two_shifted_digits_clipped(digits: Dataset) -> None:
    """An image is the clipped sum of two whole digits of its labels, each moved by up to four pixels."""
    made = multimnist.pairs(digits.images, digits.labels, torch.arange(40), generator())
    assert made.images.shape == (40, 36, 36)
    assert (made.labels[:, 0] == digits.labels).all()
    assert (made.labels[:, 0] != made.labels[:, 1]).all()
    assert (made.digits.bool().flatten(2).sum(dim=2) == 400).all(), "no ink leaves the frame"
    total = made.digits.int().sum(dim=1)
    assert total.max() > 255, "some of them are too light together"
    assert torch.equal(made.images.int(), total.clamp(max=255))
    places = tops(made.digits.flatten(0, 1))
    assert (places.amin(dim=0).tolist(), places.amax(dim=0).tolist()) == ([4, 4], [12, 12])


def tops(boxes: torch.Tensor) -> torch.Tensor:
    """First row and column of each box (B, H, W): (B, 2)."""
    return torch.stack([boxes.any(dim=axis).int().argmax(dim=1) for axis in (2, 1)], dim=1)


def test_one_class_makes_no_pairs(digits: Dataset) -> None:
    """Digits of one class alone are refused."""
    with pytest.raises(ValueError, match="all digits are of one class"):
        multimnist.partners(torch.zeros(5, dtype=torch.int64), torch.arange(5), generator())


def test_overlap_of_boxes(digits: Dataset) -> None:
    """Two 20x20 boxes moved by up to four pixels cover 72.6 % of one another on average.

    By hand: along one axis two of nine positions are 80/27 pixels apart, so (1 - 80/27/20)^2.
    """
    first = torch.arange(40).repeat(250)
    made = multimnist.pairs(digits.images, digits.labels, first, generator())
    apart = (tops(made.digits[:, 0]) - tops(made.digits[:, 1])).abs()
    covered = (20 - apart).double().prod(dim=1).mean() / 20**2
    assert covered == pytest.approx((1 - 80 / 27 / 20) ** 2, abs=0.005)


def test_what_is_measured_on_is_always_the_same(digits: Dataset) -> None:
    """The same seed gives the same images, another seed others; training never sees what was held out."""
    first, again = compose.as_seen(digits, times=2), compose.as_seen(digits, times=2)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, compose.as_seen(digits, seed=1, times=2).images)
    assert len(first) == 80
    assert first.labels.shape == (80, 2)
    assert first.digits is not None
    rest, held = hold_out(digits, 10, seed=0)
    shades = {int(shade) for shade in compose.as_seen(held).digits.flatten(2).amax(dim=2).flatten()}  # type: ignore[union-attr] # pairs have digits
    assert shades == {int(image.max()) for image in held.images} != {int(i.max()) for i in rest.images}
    assert shades.isdisjoint({int(image.max()) for image in rest.images})


def test_canvas(digits: Dataset) -> None:
    """Translated MNIST lies whole on 40x40, moved by up to six pixels."""
    dataset = replace(digits, layout="canvas")
    assert compose.frame(dataset) == (40, 40, 1)
    seen = compose.as_seen(dataset, times=10)
    assert seen.images.shape == (400, 40, 40)
    assert (seen.images.bool().flatten(1).sum(dim=1) == 400).all()
    tops = seen.images.any(dim=2).int().argmax(dim=1)
    assert (int(tops.min()), int(tops.max())) == (4, 16)
    assert compose.frame(digits) == (36, 36, 1)


def test_warp_by_hand() -> None:
    """A quarter turn, a stretch and a shift put a pixel where the matrix says."""
    image = torch.zeros(1, 9, 9, dtype=torch.uint8)
    image[0, 4, 7] = 200  # three pixels right of the centre
    turned = affine.warp(image, affine.rotation(torch.tensor([90.0])), torch.tensor([[0.0, 1.0]]))
    assert turned.nonzero().tolist() == [[0, 8, 4]], "clockwise: down, and one further down"
    assert turned[0, 8, 4] == 200
    large = affine.warp(image, torch.eye(2)[None], torch.zeros(1, 2), (11, 13))
    assert large.nonzero().tolist() == [[0, 5, 9]]
    colour = affine.warp(image[..., None].repeat(1, 1, 1, 3), torch.eye(2)[None], torch.tensor([[-2.0, 0.0]]))
    assert colour.nonzero()[:, :3].unique(dim=0).tolist() == [[0, 4, 5]]


def test_like_affnist_reaches_every_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bright frame, neither turned nor stretched nor sheared, lies whole on black, out to the ends."""
    most = 1 - 1e-4
    rows, columns = torch.tensor([0, 0, most, most]), torch.tensor([0, most, 0, most])
    let_draw(monkeypatch, "rand", 0.5, 0.5, 0.5, 0.5, rows, columns)
    made = affine.like_affnist(torch.full((4, 28, 28), 255, dtype=torch.uint8), generator())
    assert tops(made).tolist() == [[12, 12], [12, 0], [0, 12], [0, 0]]
    assert ((made == 255).flatten(1).sum(dim=1) == 28 * 28).all()
    assert ((made == 0).flatten(1).sum(dim=1) == 40 * 40 - 28 * 28).all()


def test_like_affnist_shears_across(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sheared by 0.2, the foot of a pole moves right of its head by 0.2 for each pixel of height."""
    pole = torch.zeros(1, 28, 28, dtype=torch.uint8)
    pole[:, :, 13:15] = 200
    let_draw(monkeypatch, "rand", 0.5, 1, 0.5, 0.5, 0.5, 0.5)
    made = affine.like_affnist(pole, generator())[0].float()
    inked = made[made.any(dim=1)]
    across = (inked * torch.arange(40)).sum(dim=1) / inked.sum(dim=1)
    assert len(inked) == 28
    assert across[-1] - across[0] == pytest.approx(0.2 * 27, abs=0.1)


def test_like_affnist_shears_then_stretches_then_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pole sheared by 0.2, then 1.2 wide and 0.8 high, leans 0.3; a bar stretched so is turned whole."""
    pole, bar = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    pole[:, 4:24, 13:15] = bar[:, 13:15, 4:24] = 200
    let_draw(monkeypatch, "rand", 0.5, 1, 1, 0, 0.5, 0.5, 1, 0.5, 1, 0, 0.5, 0.5)
    assert slope(affine.like_affnist(pole, generator())[0]) == pytest.approx(0.2 * 1.2 / 0.8, abs=0.02)
    turned = slope(affine.like_affnist(bar, generator())[0].T)
    assert turned == pytest.approx(math.tan(math.radians(20)), abs=0.02)


def slope(image: torch.Tensor) -> float:
    """How far right its ink goes for each row downwards."""
    y, x = image.nonzero().double().T
    weight = image[image > 0].double()
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return float((weight * x * y).sum() / (weight * y * y).sum())


def test_like_affnist_loses_no_ink(digits: Dataset) -> None:
    """Each digit lies whole within 40x40, somewhere else each time, its area scaled by 0.64 to 1.44."""
    made = affine.like_affnist(digits.images.repeat(20, 1, 1), generator())
    assert made.shape == (800, 40, 40)
    share = made.flatten(1).double().sum(dim=1) / digits.images.repeat(20, 1, 1).flatten(1).double().sum(
        dim=1
    )
    assert 0.62 < share.min() < 0.72
    assert 1.34 < share.max() < 1.46
    edges = torch.stack([made[:, 0].any(dim=1), made[:, -1].any(dim=1), made[:, :, 0].any(dim=1)])
    assert edges.any(dim=1).all(), "some reach every edge"


def test_strong_augmentation(digits: Dataset) -> None:
    """Strong augmentation erases 16 pixels at most, keeps the frame, and changes nearly every image."""
    some = digits.images[:8].clone()
    made = affine.strongly(some.repeat(10, 1, 1), generator())
    assert made.shape == (80, 28, 28)
    assert (made != some.repeat(10, 1, 1)).flatten(1).any(dim=1).float().mean() > 0.9
    ink = made.bool().flatten(1).sum(dim=1)
    assert ink.min() > 400 * 0.7 - 16
    assert torch.equal(made, affine.strongly(some.repeat(10, 1, 1), generator()))


def test_strong_augmentation_keeps_ink_in_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither turned nor squeezed, ink moves by its share of the margin on its side, the end included."""
    digit = torch.zeros(1, 28, 28, dtype=torch.uint8)
    digit[:, 3:20, 5:26] = 200  # margins: 3 above, 8 below, 5 to the left, 2 to the right
    across = torch.tensor([-9.0, 9.0, -0.5 / 0.33, 0.0, 0.0])  # far beyond the whole margin, half of it, none
    down = torch.tensor([9.0, -9.0, 0.0, 0.5 / 0.33, -0.5 / 0.33])
    let_draw(monkeypatch, "randn", 0, 0, across, down)
    made = affine.strongly(digit.repeat(5, 1, 1), generator())
    assert tops(made).tolist() == [[11, 0], [0, 7], [3, 3], [7, 5], [2, 5]]
    bottoms = 28 - tops(made.flip(1, 2))
    assert (bottoms - tops(made)).tolist() == [[17, 21]] * 5, "whole but for the patch"


def test_strong_augmentation_turns_half_and_squeezes_the_width(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the digits are turned, by 30 degrees at most; each is squeezed to three quarters at least."""
    some = digits.images.repeat(5, 1, 1)
    still = torch.zeros(200, 2)
    whole = affine.warp(some, affine.rotation(torch.full((200,), 30.0)), still)
    let_draw(monkeypatch, "randn", 9, 0, 0, 0)
    made = affine.strongly(some, generator())
    kept, turned = ((made != given).flatten(1).sum(dim=1) <= 16 for given in (some, whole))
    assert (kept != turned).all()
    assert 70 < turned.sum() < 130
    let_draw(monkeypatch, "randn", 0, -9, 0, 0)
    squeezed = affine.strongly(some, generator()) > 50
    assert (squeezed.any(dim=2).sum(dim=1) == 20).all()
    assert (squeezed.any(dim=1).sum(dim=1) - 15).abs().max() <= 1


def test_strong_augmentation_in_colour(digits: Dataset) -> None:
    """A digit in three equal channels is augmented as it is in one."""
    some = digits.images[:20]
    made = affine.strongly(some.unsqueeze(-1).repeat(1, 1, 1, 3), generator())
    assert torch.equal(made, affine.strongly(some, generator()).unsqueeze(-1).expand_as(made))


def test_strong_augmentation_turns_then_squeezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pole that is turned by 30 degrees comes nearer to the upright when it is squeezed."""
    pole = torch.zeros(20, 28, 28, dtype=torch.uint8)
    pole[:, 4:24, 13:15] = 200
    monkeypatch.setattr(torch, "randint", lambda low, _, size, **__: torch.full(size, low))
    let_draw(monkeypatch, "randn", 9, -9, 0, 0)
    slopes = {round(slope(image), 2) for image in affine.strongly(pole, generator())}
    assert sorted(slopes) == pytest.approx([-0.75 * math.tan(math.radians(30)), 0], abs=0.02)


def test_the_erased_patch_reaches_each_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four by four pixels, at the first row and column or at the last."""
    white = torch.full((1, 28, 30), 255, dtype=torch.uint8)
    for corner, end in ((slice(0, 4), 0), (slice(-4, None), 1)):
        monkeypatch.setattr(
            torch, "randint", lambda low, high, size, *, end=end, **_: torch.full(size, (low, high - 1)[end])
        )
        let_draw(monkeypatch, "randn", 0, 0, 0, 0)
        (erased,) = affine.strongly(white, generator()) == 0
        assert erased[corner, corner].all()
        assert erased.sum() == 16


def test_strong_augmentation_on_light_ground(digits: Dataset) -> None:
    """Dark ink on light ground is treated as light ink on dark: nothing black comes in."""
    plain = replace(digits, layout="plain")
    light = replace(plain, images=255 - plain.images)
    some = torch.arange(40)
    dark_ink = compose.composer(light, 0, strong=True)(some, generator()).images
    assert torch.equal(dark_ink, 255 - compose.composer(plain, 0, strong=True)(some, generator()).images)
    assert dark_ink.min() >= 255 - 140


@pytest.mark.parametrize("layout", ["canvas", "pairs"])
def test_strong_augmentation_of_what_is_composed(digits: Dataset, layout: Layout) -> None:
    """It is refused: nothing says what it would do to a canvas or to two digits."""
    with pytest.raises(DataError, match="multimnist: strong augmentation is for single digits"):
        compose.composer(replace(digits, layout=layout), 0, strong=True)


@pytest.mark.parametrize(("layout", "place"), [("plain", 4), ("canvas", 10)])
def test_moved_images_are_what_is_to_be_drawn(digits: Dataset, layout: Layout, place: int) -> None:
    """The decoder's targets are the images that the encoder sees, moved as they are."""
    batch = compose.composer(replace(digits, layout=layout), 2)(torch.arange(40), generator())
    assert torch.equal(batch.targets, batch.images)
    places = tops(batch.images) - place
    assert (places.amin(dim=0).tolist(), places.amax(dim=0).tolist()) == ([-2, -2], [2, 2])


def test_pairs_move_no_further_than_is_asked_for(digits: Dataset) -> None:
    """Pairs that are not to be moved lie in the middle of their frame."""
    batch = compose.composer(digits, 0)(torch.arange(40), generator())
    assert (tops(batch.targets.flatten(0, 1)) == 8).all()


def test_first_images_of_the_files(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many images as are asked for are loaded, or all that there are."""
    monkeypatch.setattr(data, "load", lambda *_: digits)
    assert torch.equal(compose.load("mnist", "train", count=7).images, digits.images[:7])
    assert len(compose.load("mnist", "train", count=41)) == 40


def test_test_images_of_pairs(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """MultiMNIST is tested on five pairs of each test digit, translated MNIST on each digit once."""
    monkeypatch.setattr(data, "load", lambda *_: digits)
    pairs, moved = (compose.load(name, "test") for name in ("multimnist", "translated-mnist"))
    assert pairs.labels[:, 0].tolist() == 5 * digits.labels.tolist()
    assert moved.labels.tolist() == digits.labels.tolist()


def test_affnist_is_never_trained_on() -> None:
    """Asking for affNIST to train on is answered with what to train on."""
    with pytest.raises(DataError, match="only tested on; train on translated-mnist"):
        compose.load("affnist", "train")
