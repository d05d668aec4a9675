"""Images that are not of any class, to measure how often reconstruction error gives them away.

Frosst, Sabour and Hinton, "DARCCC: Detecting Adversaries by Reconstruction from Class Conditional
Capsules" (2018), flag an image whose reconstruction is worse than that of most images known to be real.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Images = NDArray[np.uint8]

# Capitals without those that are digits by another name: B, I, O, S, Z.
LETTERS = "ACDEFGHJKLMNPQRTUVWXY"

# Outlines of garments on a grid of 20 x 20, drawn here in the likeness of Fashion-MNIST's classes.
GARMENTS = (
    (
        (6, 1),
        (9, 3),
        (11, 3),
        (14, 1),
        (20, 6),
        (17, 9),
        (15, 7),
        (15, 19),
        (5, 19),
        (5, 7),
        (3, 9),
        (0, 6),
    ),  # shirt
    ((5, 0), (15, 0), (17, 20), (11, 20), (10, 6), (9, 20), (3, 20)),  # trousers
    ((7, 0), (8, 3), (12, 3), (13, 0), (14, 6), (13, 9), (18, 20), (2, 20), (7, 9), (6, 6)),  # dress
    ((0, 8), (3, 8), (5, 2), (15, 2), (17, 8), (20, 8), (20, 19), (0, 19)),  # bag
    ((0, 9), (5, 8), (10, 13), (18, 14), (20, 17), (20, 19), (0, 19)),  # shoe
    ((2, 0), (9, 0), (9, 11), (19, 13), (20, 19), (2, 19)),  # boot
)


def outliers(shape: tuple[int, ...], count: int, seed: int = 0) -> dict[str, Images]:
    """`count` images of each kind, as light ink on dark ground, (count, H, W[, 3]) uint8, by kind."""
    draw: dict[str, Callable[[np.random.Generator, int, int], Images]] = {
        "noise": _noise,
        "blank pages": _blank,
        "letters": _letter,
        "garments": _garment,
    }
    random = np.random.default_rng(seed)
    height, width = shape[:2]
    kinds = {}
    for kind, one in draw.items():
        images = np.stack([one(random, height, width) for _ in range(count)])
        kinds[kind] = images if len(shape) == 2 else np.repeat(images[..., None], 3, axis=-1)
    return kinds


def _noise(random: np.random.Generator, height: int, width: int) -> Images:
    """Every pixel by chance."""
    return random.integers(0, 256, (height, width), dtype=np.uint8)


def _blank(random: np.random.Generator, height: int, width: int) -> Images:
    """One shade all over, with the unevenness of a camera."""
    shade = random.uniform(0, 255)
    return np.clip(random.normal(shade, 3, (height, width)), 0, 255).astype(np.uint8)


def _letter(random: np.random.Generator, height: int, width: int) -> Images:
    """A capital from Pillow's own font, of varied size, slant and place."""
    side = min(height, width)
    font = ImageFont.load_default(size=round(side * random.uniform(0.6, 0.8)))
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text(
        (width / 2 + random.uniform(-1, 1), height / 2 + random.uniform(-1, 1)),
        str(random.choice(list(LETTERS))),
        fill=int(random.integers(200, 256)),
        font=font,
        anchor="mm",
    )
    return np.asarray(image.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR))


def _garment(random: np.random.Generator, height: int, width: int) -> Images:
    """A filled outline with a woven texture, as large as Fashion-MNIST's."""
    outline = GARMENTS[random.integers(len(GARMENTS))]
    stretch = random.uniform(0.8, 1.0)
    points = [(x / 20 * stretch * (width - 4) + 2, y / 20 * (height - 4) + 2) for x, y in outline]
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).polygon(points, fill=1)
    weave = random.normal(random.uniform(110, 230), 25, (height, width)).clip(0, 255).astype(np.uint8)
    woven: Images = np.asarray(image) * weave
    return woven
