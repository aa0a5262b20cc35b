"""Makes the pictures in this folder and what Pillow makes of them; see README.md."""

import io
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


def segments(data):
    """A JPEG as [marker, bytes of its segment], up to the start of the scan, whose last part holds the rest."""
    at, found = 2, []
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append([data[at + 1], data[at:end]])
        at = end
    return found + [[0xDA, data[at:]]]


def jpegs():
    """JPEGs whose markers and component names leave the meaning of their samples to rules: (file name, bytes)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    colors = np.stack([x * 15, y * 12, 255 - x * 8 - y * 5, 255 - x * 3 - y * 2], axis=-1).astype(np.uint8)

    def saved(mode, **options):
        out = io.BytesIO()
        image = Image.fromarray(colors[..., : len(mode)] if mode != "L" else colors[..., 0].copy(), mode)
        image.save(out, "JPEG", quality=95, subsampling=0, **options)
        return segments(out.getvalue())

    def made(parts, markers=(), names=None):
        """Without the markers that Pillow wrote, with others and other component names."""
        kept = [list(part) for part in parts if part[0] not in (0xE0, 0xEE)]
        for part in kept:
            for at, name in enumerate(names or ()):
                if part[0] in (0xC0, 0xC2):
                    part[1] = part[1][: 10 + 3 * at] + bytes([name]) + part[1][11 + 3 * at :]
                if part[0] == 0xDA:
                    part[1] = part[1][: 5 + 2 * at] + bytes([name]) + part[1][6 + 2 * at :]
        known = {"jfif": b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"}
        adobe = {f"adobe{n}": b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([n]) for n in range(3)}
        return b"\xff\xd8" + b"".join(({**known, **adobe})[name] for name in markers) + b"".join(part[1] for part in kept)

    three, four, grey = saved("RGB"), saved("CMYK"), saved("L")
    yield "plain.jpg", made(three)
    yield "jfif.jpg", made(three, ["jfif"])
    yield "jfif_adobe0.jpg", made(three, ["jfif", "adobe0"])
    yield "adobe0_jfif.jpg", made(three, ["adobe0", "jfif"])
    for n in range(3):
        yield f"adobe{n}.jpg", made(three, [f"adobe{n}"])
    yield "named_rgb.jpg", made(three, names=b"RGB")
    yield "named_rgb_jfif.jpg", made(three, ["jfif"], b"RGB")
    yield "named_rgb_adobe1.jpg", made(three, ["adobe1"], b"RGB")
    yield "named_012.jpg", made(three, names=b"\0\1\2")
    yield "progressive_adobe0.jpg", made(saved("RGB", progressive=True), ["adobe0"])
    yield "grey_adobe1.jpg", made(grey, ["adobe1"])
    yield "four.jpg", made(four)
    yield "four_jfif.jpg", made(four, ["jfif"])
    for n in range(3):
        yield f"four_adobe{n}.jpg", made(four, [f"adobe{n}"])
    turned = Image.Exif()
    turned[0x0112] = 8
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    yield "exif_turned.jpg", b"\xff\xd8" + b"".join(part for _, part in saved("RGB", exif=turned))
    yield "xmp_turned.jpg", b"\xff\xd8" + b"".join(part for _, part in saved("RGB", xmp=xmp))
    yield "exif_before_xmp.jpg", b"\xff\xd8" + b"".join(part for _, part in saved("RGB", exif=turned, xmp=xmp))


def write_jpegs():
    out = HERE / "jpegs"
    out.mkdir(exist_ok=True)
    expected = {}
    for name, data in jpegs():
        (out / name).write_bytes(data)
        expected[name] = chw(ImageOps.exif_transpose(Image.open(out / name)))
    save_file(expected, HERE / "jpegs.safetensors")


write_kinds()
write_filters()
write_orders()
write_jpegs()
