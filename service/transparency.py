"""What is seen where an image is transparent: of those to be classified, and of those to be learned from."""

from PIL import Image


def flatten(image: Image.Image) -> Image.Image:
    """Put an RGBA image on the background that its visible part stands out from: white under dark ink."""
    visible = image.getchannel("A")
    histogram = image.convert("L").histogram(mask=visible.point(lambda alpha: 255 * (alpha > 127)))
    dark, light = sum(histogram[:128]), sum(histogram[128:])
    background = Image.new("RGBA", image.size, "white" if dark >= light else "black")
    return Image.alpha_composite(background, image)
