"""A decoder that is a formula: what its dimensions do to a frame is known, and so are their names."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from service.manifest import Dimension
from training.config import ModelConfig
from training.data import Dataset, Split
from training.dimensions import (
    DELTAS,
    LITTLE_EFFECT,
    MOST_NOUNS,
    NO_ONE_EFFECT,
    NOUNS,
    PARTS,
    Look,
    describe,
    distinguish,
    explain,
    look,
    measure_dimensions,
    tangents,
    thirds,
)
from training.model import CapsNet
from training.morphology import MEASURES
from training.predictor import Floats, Images, Labels, TorchPredictor

SIDE = 36
SOFT = 3  # pixels that an edge takes from ink to ground, as in what a decoder draws
DIMENSIONS = ("slant", "thickness", "width", "height", "across", "down", "ink", "nothing", "corner", "either")


def frame(capsule: Floats) -> Floats:
    """A rectangle drawn with a pen, 18 wide and 22 high, whose every quantity follows one dimension."""
    slant, pen, width, height, across, down, ink, _, corner, either, side = capsule
    y, x = np.indices((SIDE, SIDE)) + 0.5
    from_top = y - SIDE / 2 - 8 * down
    lean = 0.8 * slant + 0.8 * either * np.sign(side)
    from_left = x - SIDE / 2 - 8 * across + lean * from_top
    beyond = np.maximum(np.abs(from_left) - (9 + 4 * width), np.abs(from_top) - (11 + 4 * height))
    drawn = np.clip(((5 + 4 * pen) / 2 - np.abs(beyond)) / SOFT + 0.5, 0, 1)
    drawn[10:14, 22:25] += max(0, 4 * corner)  # inside of the frame, where its top right corner is
    drawing: Floats = (drawn * (0.7 + ink)).clip(0, 1).astype(np.float32)
    return drawing


class Frames:
    """Two classes; capsules hold what is in the image's first row."""

    classes = ("frame", "other")
    image_shape = (SIDE, SIDE)
    draws = True

    def __init__(self, draw: Callable[[Floats], Floats] = frame) -> None:
        self.draw = draw

    def encode(self, images: Images) -> tuple[Floats, Floats]:
        capsules = np.zeros((len(images), 2, 11), np.float32)
        capsules[:, 0, 10] = 1 - 2 * images[:, 0, 1].astype(np.float32)  # side: to the right or to the left
        lengths = np.stack([1 - images[:, 0, 0], images[:, 0, 0]], axis=1).astype(np.float32)
        return capsules, lengths

    def decode(self, capsules: Floats, target: Labels) -> Floats:
        return np.stack([self.draw(capsule[k]) for capsule, k in zip(capsules, target, strict=True)])


def images_of_frames(count: int = 6) -> Dataset:
    """All of class `frame`; every other leans the other way with dimension `either`."""
    images = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    images[::2, 0, 1] = 1
    return Dataset("frames", Frames.classes, images, torch.zeros(count, dtype=torch.int64), {})


@pytest.fixture(scope="module")
def found() -> dict[str, Dimension]:
    (dimensions,) = measure_dimensions(Frames(), images_of_frames()).values()
    return dict(zip(DIMENSIONS, dimensions[:10], strict=True))


@pytest.mark.parametrize(
    ("dimension", "name"),
    [
        ("slant", "slant"),
        ("thickness", "stroke thickness"),
        ("width", "width"),
        ("height", "height"),
        ("across", "horizontal position"),
        ("down", "vertical position"),
        ("ink", "amount of ink"),
        ("nothing", "little effect"),
        ("corner", "top right part"),
        ("either", "no one effect"),
    ],
)
def test_a_dimension_is_named_after_what_it_does(
    found: dict[str, Dimension], dimension: str, name: str
) -> None:
    """Each dimension of the formula is found out."""
    assert found[dimension].name == name


def test_effects_are_in_pixels_and_degrees(found: dict[str, Dimension]) -> None:
    """Over the whole range of tweaks, 0.5 wide: what the formula says, less the tails of width and height."""
    change = {name: found[name].effects[name].change for name in ("slant", "thickness", "across", "down")}
    angle = 2 * np.degrees(np.arctan(0.2))
    assert change["slant"] == pytest.approx(angle, rel=0.1)
    assert change["thickness"] == pytest.approx(2, rel=0.15)
    assert change["across"] == pytest.approx(4, rel=0.1)
    assert change["down"] == pytest.approx(4, rel=0.1)
    assert found["width"].effects["width"].change == pytest.approx(4, rel=0.1)
    assert found["height"].effects["height"].change == pytest.approx(4, rel=0.1)
    assert found["ink"].effects["ink"].change == pytest.approx(100 * 0.5 / 0.7, rel=0.1)
    assert found["ink"].moved == pytest.approx((0.5 / 0.7) ** 2, abs=0.01)
    assert all(effect.agreement == 1 for effect in found["slant"].effects.values())


def test_what_goes_either_way_is_no_effect(found: dict[str, Dimension]) -> None:
    """Half of the frames lean right and half lean left: much moves, and no slant is told."""
    assert found["either"].moved == pytest.approx(found["slant"].moved, rel=1e-6)
    assert "slant" not in found["either"].effects
    assert found["either"].shares == {}


def test_shares_say_what_the_change_is_made_of(found: dict[str, Dimension]) -> None:
    """A pure change accounts for nearly all, and what changes in one place falls there."""
    assert found["slant"].shares["slant"] > 0.8
    assert found["corner"].shares["top right part"] > 0.8
    assert (found["nothing"].moved, found["nothing"].shares, found["nothing"].effects) == (0, {}, {})


def test_what_is_too_little_to_tell() -> None:
    """Two per cent of the light must change, and of that five; a share against the measure is none."""
    changes, kinds, parts = np.zeros((4, 7)), np.zeros((4, 7)), np.zeros((4, 3, 3))
    parts[:3, 0, 0] = (0.5, 0.06, 0.04)
    slant = MEASURES.index("slant")
    changes[3, slant], kinds[3, slant] = 5, -0.5
    found = describe([Look(changes, np.array([0.019, 0.021, 0.021, 0.021]), kinds, parts)])
    names = [dimension.name for dimension in found]
    assert names == [LITTLE_EFFECT, "top left part", NO_ONE_EFFECT, NO_ONE_EFFECT]
    assert found[1].shares == {"top left part": 0.06}


def test_what_changes_at_once_is_no_steady_change() -> None:
    """Of ink that comes in the last of four steps, growth at one rate explains a quarter at most."""
    drawings = np.stack([frame(np.zeros(11, np.float32))] * len(DELTAS))[None]
    drawings[0, -1] *= 1.2
    alone, _ = explain(drawings)
    assert 0.1 < alone.max() <= 0.25


def test_parts_of_an_oblong_drawing() -> None:
    """What fades at the middle of the height and the left of the width is the left part."""
    drawings = np.zeros((1, len(DELTAS), 28, 20), np.float32)
    drawings[..., 4:24, 8:14] = 1
    for step in range(len(DELTAS)):
        drawings[0, step, 13:15, 8:10] -= 0.2 * step
    parts = look(drawings).parts[0]
    assert PARTS[parts.argmax() // 3][parts.argmax() % 3] == "left part"


def test_more_ink_is_not_a_thicker_stroke() -> None:
    """The one is what is left of brightness without the other."""
    drawing = frame(np.zeros(11, np.float32)).astype(np.float64)
    thickness, ink = (tangents(drawing)[MEASURES.index(name)] for name in ("thickness", "ink"))
    assert abs((thickness * ink).sum()) < 1e-9 * (drawing**2).sum()


def test_only_images_that_are_recognised_count() -> None:
    """Of 6 images 4 are taken for the other class: the two that are left both lean the same way."""
    dataset = images_of_frames()
    dataset.images[2:, 0, 0] = 1
    dataset.images[:2, 0, 1] = 1
    (dimensions,) = measure_dimensions(Frames(), dataset).values()
    assert dimensions[DIMENSIONS.index("either")].effects["slant"].change < 0


def test_more_images_are_looked_through_than_are_measured() -> None:
    """Where the first images are taken for the other class, the next ones are measured in their stead."""
    dataset = images_of_frames(4)
    dataset.images[:2, 0, 0] = 1
    assert "frame" in measure_dimensions(Frames(), dataset, images=2)


def test_no_more_images_are_measured_than_are_asked_for() -> None:
    """Of four images the first two are, which both lean the same way."""
    dataset = images_of_frames(4)
    dataset.images[:, 0, 1] = torch.tensor([1, 1, 0, 0])
    (dimensions,) = measure_dimensions(Frames(), dataset, images=2).values()
    assert "slant" in dimensions[DIMENSIONS.index("either")].effects


def test_images_are_seen_as_the_network_does() -> None:
    """Digits that it learned on a larger canvas are laid on it."""
    seen: list[tuple[int, ...]] = []

    class Watching(Frames):
        def encode(self, images: Images) -> tuple[Floats, Floats]:
            seen.append(images.shape)
            return super().encode(images)

    digits = torch.zeros(2, 28, 28, dtype=torch.uint8)
    dataset = replace(images_of_frames(2), images=digits, layout="canvas")
    measure_dimensions(Watching(), dataset, say=lambda _: None)
    assert seen == [(2, 40, 40)]


def test_a_class_without_recognised_images_is_left_out() -> None:
    """A class that no image was taken for, or that has none, is not described, and a line says so."""
    dataset = images_of_frames()
    dataset.images[:, 0, 0] = 1
    said: list[str] = []
    assert measure_dimensions(Frames(), dataset, say=said.append) == {}
    why = "dimensions not measured: none of the training images tried was recognised"
    assert said == [f"class frame: {why}", f"class other: {why}"]


def test_images_of_two_digits_are_not_measured() -> None:
    """A capsule's dimensions say nothing of an image of two digits."""
    dataset = images_of_frames()
    assert measure_dimensions(Frames(), replace(dataset, layout="pairs")) == {}
    assert measure_dimensions(Frames(), replace(dataset, labels=torch.zeros(6, 2))) == {}


def test_dark_ink_in_colour() -> None:
    """Drawings of dark ink, in colour, are measured as those of light ink in grey."""

    def dark(capsule: Floats) -> Floats:
        return np.repeat(1 - frame(capsule)[..., np.newaxis], 3, axis=-1)

    (light,) = measure_dimensions(Frames(), images_of_frames(2)).values()
    (found,) = measure_dimensions(Frames(dark), images_of_frames(2), light_on_dark=False).values()
    assert [dimension.name for dimension in found] == [dimension.name for dimension in light]


@pytest.mark.parametrize("level", [0, 0.5, 1])
def test_a_decoder_that_draws_nothing(level: float) -> None:
    """One shade all over is no effect, and no error."""
    drawn = measure_dimensions(
        Frames(lambda _: np.full((SIDE, SIDE), level, np.float32)), images_of_frames(2)
    )
    assert {dimension.name for dimension in drawn["frame"]} == {"little effect"}


def test_a_network_in_pytorch(model_config: ModelConfig, load_split: Callable[[Split], Dataset]) -> None:
    """Any predictor will do: a network that was never trained has its dimensions described as well."""
    torch.manual_seed(0)
    predictor = TorchPredictor(CapsNet(model_config).eval())
    for dimensions in measure_dimensions(predictor, load_split("train"), images=3).values():
        assert len(dimensions) == 6


def test_effects_must_agree_in_four_of_five_images() -> None:
    """Of five images one may go the other way; of four, none."""
    right, left = (look(Frames().decode(_swept(side), np.zeros(5, np.int64))[np.newaxis]) for side in (1, -1))
    (most,) = describe([right] * 4 + [left])
    assert most.effects["slant"].agreement == 0.8
    (fewer,) = describe([right] * 3 + [left])
    assert "slant" not in fewer.effects


def test_a_drawing_without_ink_has_no_say() -> None:
    """Where one image's drawings are black, the others' effect stays."""
    drawings = Frames().decode(_swept(1), np.zeros(5, np.int64))[np.newaxis]
    right, nothing = look(drawings), look(np.zeros_like(drawings))
    (alone,), (beside,) = describe([right] * 2), describe([right, nothing, right])
    assert beside.effects == alone.effects
    assert "slant" in beside.effects


def _swept(side: float) -> Floats:
    """Capsules along the tweaks of dimension `either`."""
    capsules = np.zeros((len(DELTAS), 2, 11), np.float32)
    capsules[:, 0, 9] = DELTAS
    capsules[:, 0, 10] = side
    return capsules


def test_names_are_set_apart_by_the_next_thing() -> None:
    """A name takes as many nouns as it needs to differ, and no more than there are."""
    nouns = [["a"], ["b", "a"], ["b", "c", "d"], ["b", "c", "e"], ["f", "g"], ["h"], ["h"]]
    names = ["a", "b and a", "b, c and d", "b, c and e", "f", "h", "h"]
    assert distinguish(nouns, [False] * 7) == names
    assert distinguish([["a", "b", "c", "d"], ["a", "b", "c", "e"]], [False] * 2) == [
        "a, b, c and d",
        "a, b, c and e",
    ]
    assert distinguish(nouns, [True] * 6 + [False]) == [*names[:5], "h, reversed", "h"]


def test_no_effect_is_not_reversed() -> None:
    """Dimensions with little effect, or no one effect, keep that name, whatever falls."""
    nouns = [[LITTLE_EFFECT], [NO_ONE_EFFECT]] * 2
    assert distinguish(nouns, [False, False, True, True]) == [LITTLE_EFFECT, NO_ONE_EFFECT] * 2


def test_the_longest_name_can_be_exported() -> None:
    """A manifest takes the longest nouns that a name can have, and that it is reversed."""
    parts = max((part for row in PARTS for part in row), key=len)
    nouns = sorted([*NOUNS.values(), parts], key=len)[-MOST_NOUNS:]
    for name in distinguish([nouns, nouns], [False, True]):
        assert Dimension(name=name, moved=1, effects={}, shares={}).name == name


def test_two_dimensions_that_do_the_same_the_other_way_round() -> None:
    """Of two dimensions with nothing else to tell them apart, the one that leans left is called reversed."""

    def leaning(capsule: Floats) -> Floats:
        return frame(np.concatenate([[capsule[0] - capsule[1]], np.zeros(9), [1]]))

    (dimensions,) = measure_dimensions(Frames(leaning), images_of_frames(2)).values()
    assert [dimension.name for dimension in dimensions[:2]] == ["slant", "slant, reversed"]


def test_thirds_are_those_of_the_ink() -> None:
    """The bounding box is cut in three each way; what lies outside belongs to the nearest part."""
    drawing = np.zeros((28, 28))
    drawing[5:20, 8:14] = 1
    assert thirds(drawing) == ([0, 10, 15], [0, 10, 12])
    speck = np.zeros((28, 28))
    speck[0, 27] = 1
    assert thirds(speck) == ([0, 1, 2], [0, 26, 27])
