"""Makes the pictures in this folder and what Pillow makes of them; see README.md."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
FILTERS = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # by Pillow's number
SIZE = 16
RNG = np.random.default_rng(7)


def chw(image):
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def kinds():
    """Small pictures of every pixel kind: (file name, save options, image)."""
    grey = RNG.integers(0, 256, (13, 21), dtype=np.uint8)
    color = RNG.integers(0, 256, (13, 21, 3), dtype=np.uint8)
    alpha = RNG.integers(0, 256, (13, 21), dtype=np.uint8)
    yield "grey.png", {}, Image.fromarray(grey)
    yield "grey_alpha.png", {}, Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    yield "grey_1bit.png", {}, Image.fromarray(grey).convert("1")
    yield "grey_16bit.png", {}, Image.fromarray(RNG.integers(0, 600, (13, 21), dtype=np.uint16))
    yield "rgb.png", {}, Image.fromarray(color)
    rgba = Image.fromarray(color)
    rgba.putalpha(Image.fromarray(alpha))
    yield "rgba.png", {}, rgba
    palette = Image.fromarray(color).quantize(11)
    yield "palette.png", {}, palette
    yield "palette_transparent.png", {"transparency": 3}, palette
    yield "lossless.webp", {"lossless": True}, Image.fromarray(color)
    yield "lossless_alpha.webp", {"lossless": True, "exact": True}, rgba
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    smooth = np.stack([x * 15, y * 12, 255 - x * 8 - y * 5], axis=-1).astype(np.uint8)
    yield "color.jpg", {"quality": 95, "subsampling": 0}, Image.fromarray(smooth)
    yield "grey.jpg", {"quality": 95}, Image.fromarray(smooth[..., 0].copy())
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "turned.png", {"exif": turned}, Image.fromarray(color)


def write_kinds():
    out = HERE / "kinds"
    out.mkdir(exist_ok=True)
    expected = {}
    for name, options, image in kinds():
        image.save(out / name, **options)
        image = ImageOps.exif_transpose(Image.open(out / name)).convert("RGB")
        expected[name] = chw(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    save_file(expected, HERE / "kinds.safetensors")


def write_filters():
    image = Image.open(HERE.parent / "models" / "paligemma-odd" / "image_100x60.png").convert("RGB")
    expected = {
        f"{name}.{size}": chw(image.resize((size, size), number))
        for number, name in enumerate(FILTERS)
        for size in [1, 7, 33, 71]
    }
    save_file(expected, HERE / "filters.safetensors")


def write_orders():
    """Tall and wide pictures around the point where Pillow 13 turns the order of the two passes."""
    expected = {}
    for width, height in [(10, 17), (10, 60), (17, 18), (17, 19), (24, 32), (24, 33), (40, 64), (40, 70), (60, 10)]:
        color = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(color)
        expected[f"{width}x{height}.in"] = color
        expected[f"{width}x{height}.out"] = chw(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    save_file(expected, HERE / "orders.safetensors")


write_kinds()
write_filters()
write_orders()
