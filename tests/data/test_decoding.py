"""Image files of every kind: exactly their pixels, or a refusal in one sentence that helps."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import EpsImagePlugin, Image

from nbhelpers.data import decoding
from nbhelpers.data.decoding import decode
from nbhelpers.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
HIGH = (WIDE >> 8).astype(np.uint8)
FOUR, WIDE_FOUR = np.dstack([RGB, RGB[..., :1]]), np.dstack([WIDE, WIDE[..., :1]])
GEO = [
    (33550, "d", 3, (0.5, 0.5, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 4e5, 5e6, 0.0), True),
    (34735, "H", 4, (1, 1, 0, 0), True),
]  # pixel scale, tie point and key directory of a GeoTIFF


def file_of(pixels, format="PNG", mode="RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, format, **options)
    return out.getvalue()


def tiff(pixels, photometric="rgb", **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, photometric=photometric, **options)
    return out.getvalue()


def planes(pixels):
    return np.moveaxis(pixels, -1, 0)


def thrice(band):
    return np.stack([band] * 3, axis=-1)


def by_way_of(mode):
    return np.asarray(Image.fromarray(RGB).convert(mode).convert("RGB"))


EXACT = {
    "png": (file_of(RGB), RGB),
    "tiff": (tiff(RGB), RGB),
    "bmp": (file_of(RGB, "BMP"), RGB),
    "webp": (file_of(RGB, "WEBP", lossless=True), RGB),
    "alpha dropped, not blended": (file_of(np.dstack([RGB, RGB[..., 0] // 2]), mode="RGBA"), RGB),
    "grey": (file_of(RGB, mode="L"), by_way_of("L")),
    "grey with alpha": (file_of(RGB, mode="LA"), by_way_of("L")),
    "bilevel": (file_of(RGB, mode="1"), by_way_of("1")),
    "palette": (file_of(RGB, mode="P"), by_way_of("P")),
    "palette with transparency": (
        file_of(RGB, mode="P", transparency=bytes(range(256))),
        by_way_of("P"),
    ),
    "cmyk": (file_of(RGB, "TIFF", "CMYK"), by_way_of("CMYK")),
    "png 16 bit": (cv2.imencode(".png", WIDE[..., ::-1])[1].tobytes(), HIGH),
    "png 16 bit grey": (cv2.imencode(".png", WIDE[..., 0])[1].tobytes(), thrice(HIGH[..., 0])),
    "tiff 16 bit, lzw": (cv2.imencode(".tif", WIDE[..., ::-1])[1].tobytes(), HIGH),
    "geotiff": (tiff(RGB, extratags=GEO), RGB),
    "geotiff 16 bit, four bands, tiles": (
        tiff(WIDE_FOUR, "minisblack", planarconfig="contig", tile=(16, 16), extratags=GEO),
        HIGH,
    ),
    "first of several pages": (tiff(np.stack([RGB, 255 - RGB])), RGB),
    "bigtiff": (tiff(RGB, bigtiff=True), RGB),
    "fax": (file_of(RGB, "TIFF", "1", compression="group4"), by_way_of("1")),
}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.filterwarnings("error")
def test_decode_gives_exactly_the_stated_pixels(kind):
    data, expected = EXACT[kind]
    found = decode(data, "x.png")
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


# ---- every kind of TIFF
def premultiplied(pixels):
    """(H, W, 4), the first three bands multiplied by the fourth, and the colours that come back."""
    white = np.iinfo(pixels.dtype).max
    wide = pixels.astype(np.uint64)
    alpha = wide[..., 3:]
    alpha[0, 0] = 0
    dimmed = wide[..., :3] * alpha // white
    colours = np.minimum(dimmed * white // np.maximum(alpha, 1), white)
    stored = np.concatenate([dimmed, alpha], axis=-1)
    return stored.astype(pixels.dtype), colours.astype(pixels.dtype)


def through_pillow(mode, stored):
    return np.asarray(Image.frombytes(mode, stored.shape[1::-1], stored.tobytes()).convert("RGB"))


def tiffs(bits):
    """name -> pixels (H, W, bands) as stored, photometric, options, and their meaning in RGB."""
    dtype, white = {8: (np.uint8, 255), 16: (np.uint16, 65535)}[bits]
    stored = RNG.integers(0, white + 1, (20, 30, 4)).astype(dtype)
    byte = (stored >> bits - 8).astype(np.uint8)
    dimmed, colours = premultiplied(stored)
    colours = (colours >> bits - 8).astype(np.uint8)
    palette = RNG.integers(0, 65536, (3, white + 1), dtype=np.uint16)
    grey, rgb = thrice(byte[..., 0]), byte[..., :3]
    painted = (palette.T >> 8)[stored[..., 0]]
    return {
        "0 is black": (stored[..., :1], "minisblack", {}, grey),
        "0 is white": (stored[..., :1], "miniswhite", {}, 255 - grey),
        "0 is white, alpha": (stored[..., :2], "miniswhite", {"extrasamples": [2]}, 255 - grey),
        "rgb": (stored[..., :3], "rgb", {}, rgb),
        "rgb and near infrared": (stored, "rgb", {"extrasamples": [0]}, rgb),
        "rgb and alpha": (stored, "rgb", {"extrasamples": [2]}, rgb),
        "rgb premultiplied": (dimmed, "rgb", {"extrasamples": [1]}, colours),
        "grey and another": (stored[..., :2], "minisblack", {"extrasamples": [0]}, grey),
        "grey and alpha": (stored[..., :2], "minisblack", {"extrasamples": [2]}, grey),
        "grey premultiplied": (
            dimmed[..., [0, 3]],
            "minisblack",
            {"extrasamples": [1]},
            thrice(colours[..., 0]),
        ),
        "three bands": (stored[..., :3], "minisblack", {}, rgb),
        "four bands": (stored, "minisblack", {}, rgb),
        "cmyk": (stored, "separated", {}, through_pillow("CMYK", byte)),
        "ycbcr": (stored[..., :3], "ycbcr", {"subsampling": (1, 1)}, through_pillow("YCbCr", rgb)),
        "palette": (stored[..., :1], "palette", {"colormap": palette}, painted),
        "palette of bytes": (stored[..., :1], "palette", {"colormap": palette >> 8}, painted),
    }


TIFFS = {f"{bits} bit, {name}": case for bits in (8, 16) for name, case in tiffs(bits).items()}
WAYS = {
    "plain": {},
    "big-endian": {"byteorder": ">"},
    "strips": {"rowsperstrip": 7},
    "planes": {"planarconfig": "separate"},
    "tiles": {"tile": (16, 16)},
    "planes in tiles": {"planarconfig": "separate", "tile": (16, 32)},
    "deflate": {"compression": "zlib"},
    "deflate, planes": {"compression": "zlib", "planarconfig": "separate"},
    "deflate, big-endian": {"compression": "zlib", "byteorder": ">"},
    "deflate, differences": {"compression": "zlib", "predictor": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TIFFS)
def test_tiffs_mean_the_same_however_they_are_stored(kind, way):
    stored, photometric, options, expected = TIFFS[kind]
    options = {"planarconfig": "contig"} | options | WAYS[way]
    if stored.shape[-1] == 1:
        stored = stored[..., 0]
        del options["planarconfig"]
    elif options["planarconfig"] == "separate":
        stored = planes(stored)
    data = tiff(stored, photometric, metadata=None, **options)
    np.testing.assert_array_equal(decode(data, "x"), expected)


@pytest.mark.parametrize("photometric, white", [("minisblack", 1), ("miniswhite", 0)])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_one_bit_is_black_or_white(photometric, white, compression):
    bits = RNG.integers(0, 2, (20, 30)).astype(bool)
    expected = thrice(np.where(bits == white, 255, 0))
    data = tiff(bits, photometric, compression=compression)
    np.testing.assert_array_equal(decode(data, "x"), expected)


TYPES = {"H": (3, 2), "I": (4, 4)}  # number and bytes


def handmade(tags: dict[int, tuple[str, list[int]]], data: bytes) -> bytes:
    """A TIFF of one strip with these tags and no others but where the strip lies."""
    tags = tags | {273: ("I", [8]), 279: ("I", [len(data)])}
    directory = 8 + len(data) + len(data) % 2
    free, entries, beyond = directory + 6 + 12 * len(tags), b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        if len(packed) > 4:
            beyond, packed = beyond + packed, struct.pack("<I", free + len(beyond))
        entries += struct.pack("<HHI4s", tag, TYPES[kind][0], len(values), packed)
    parts = [
        struct.pack("<4sI", b"II*\0", directory),
        data,
        bytes(len(data) % 2),
        struct.pack("<H", len(tags)),
        entries,
        bytes(4),
        beyond,
    ]
    return b"".join(parts)


def tags_of(width, height, bits, photometric, bands=1, tags=None):
    plain = {256: width, 257: height, 259: 1, 262: photometric, 277: bands, 278: height}
    every = {tag: ("H", [value]) for tag, value in plain.items()}
    return every | {258: ("H", [bits] * bands)} | (tags or {})


def squeezed(values, bits):
    """(H, W) of few bits each -> bytes, W a multiple of what a byte holds."""
    each = np.unpackbits(values[..., None], axis=-1)[..., -bits:]
    return np.packbits(each.reshape(len(values), -1), axis=-1).tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_spread_over_the_whole_range(bits):
    values = RNG.integers(0, 2**bits, (20, 32)).astype(np.uint8)
    palette = RNG.integers(0, 65536, (3, 2**bits), dtype=np.uint16)
    grey, colours = values * (255 // (2**bits - 1)), ("H", palette.ravel().tolist())
    for photometric, tags, expected in (
        (1, {}, thrice(grey)),
        (0, {}, thrice(255 - grey)),
        (3, {320: colours}, (palette.T >> 8)[values]),
    ):
        data = handmade(tags_of(32, 20, bits, photometric, 1, tags), squeezed(values, bits))
        np.testing.assert_array_equal(decode(data, "x"), expected)


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_of_a_tiff_is_applied_by_both_readers(turn):
    moved = np.rot90(RGB, {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(turn, 0))
    if turn in (2, 4, 5, 7):
        moved = moved[:, ::-1]
    for compression in (None, "tiff_lzw"):
        data = file_of(RGB, "TIFF", compression=compression, tiffinfo={274: turn})
        np.testing.assert_array_equal(decode(data, "x"), moved)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpeg_in_a_tiff_has_the_right_colours(mode):
    smooth = cv2.resize(RGB[:4, :4], (64, 64), interpolation=cv2.INTER_CUBIC)
    found = decode(file_of(smooth, "TIFF", mode, compression="jpeg", quality=98), "x")
    expected = np.asarray(Image.fromarray(smooth).convert(mode).convert("RGB"))
    assert abs(found.astype(int) - expected).max() < 12


# ---- JPEG of four bands
def without_marker(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    length = int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return jpeg[:start] + jpeg[start + 2 + length :]


INKS = file_of(np.full((16, 16, 3), (250, 20, 60), np.uint8), "JPEG", "CMYK", quality=98)


def test_adobes_cmyk_jpeg_is_not_taken_for_its_negative():
    assert abs(decode(INKS, "x").astype(int) - (250, 20, 60)).max() < 5


# ---- 16 bits of unknown range
TWELVE = RNG.integers(400, 3000, (20, 30, 3), dtype=np.uint16)


def with_share(value, share, bands=slice(None)):
    """TWELVE with a share of its pixels set, in rows from the top."""
    pixels = TWELVE.copy()
    pixels.reshape(-1, 3)[: max(1, int(share * 600)), bands] = value
    return pixels


SHADES = np.where(TWELVE[..., :1] > 1500, 65535, [0] * 3).astype(np.uint16)
RED = np.where(np.indices(TWELVE.shape)[2] == 0, np.uint16(65535), TWELVE)
RANGES = {  # pixels, and whether they are read
    "12 bits": (TWELVE, False),
    "one bright pixel": (with_share(30_000, 0), False),
    "one pixel of no data": (with_share(65535, 0), False),
    "a twentieth bright": (with_share(5000, 0.05), False),
    "a third without data": (with_share(65535, 0.33), False),
    "nearly all without data": (with_share(20_000, 0.95), False),
    "a fifth bright in one band": (with_share(5000, 0.2, 0), True),
    "16 bits": (WIDE, True),
    "black": (TWELVE * 0, False),
    "white": (TWELVE * 0 + 65535, True),
    "one dark colour": (TWELVE * 0 + 900, False),
    "black and white": (SHADES, True),
    "a red square": (RED, True),
}
WRITERS = {
    "png": lambda pixels: cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(),
    "lzw": lambda pixels: cv2.imencode(".tif", pixels[..., ::-1])[1].tobytes(),
    "tiff": tiff,
    "planes": lambda pixels: tiff(planes(pixels), planarconfig="separate"),
    "four bands": lambda pixels: tiff(np.dstack([pixels, WIDE[..., 0]]), extrasamples=[0]),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", RANGES)
def test_every_reader_refuses_the_same_ranges_of_16_bits(kind, writer):
    pixels, good = RANGES[kind]
    data = WRITERS[writer](pixels)
    if good:
        np.testing.assert_array_equal(decode(data, "x"), pixels >> 8)
    else:
        with pytest.raises(UserError, match="less than a tenth of its pixels reach 4096"):
            decode(data, "x")


# ---- refusals, and where their advice leads
STRETCHED, PNG = tiff((TWELVE >> 4).astype(np.uint8)), file_of(RGB)
GREY, WIDE_GREY = RGB[..., 0], WIDE[..., 0]
UNTOLD = {tag: value for tag, value in tags_of(30, 20, 8, 1).items() if tag != 262}
LEVELS = {532: ("I", [0, 1, 200, 1, 128, 1, 255, 1, 128, 1, 255, 1]), 530: ("H", [1, 1])}
REFUSED = {  # data, what the message says, and the file that its advice makes
    "twelve bands": (
        tiff(np.dstack([WIDE] * 4), "minisblack", planarconfig="contig"),
        "12 bands",
        PNG,
    ),
    "grey among others": (
        tiff(RGB, "minisblack", planarconfig="contig", extrasamples=[0, 2]),
        "3 bands and",
        PNG,
    ),
    "twelve bits": (tiff(TWELVE), "reach 4096, so its range is unknown; stretch", STRETCHED),
    "twelve bits, 0 is white": (tiff(TWELVE[..., 0], "miniswhite"), "reach 4096", STRETCHED),
    "twelve bits, cmyk": (
        tiff(np.dstack([TWELVE, TWELVE[..., 0]]), "separated"),
        "reach 4096",
        STRETCHED,
    ),
    "float grey": (
        tiff(GREY.astype(np.float32), "minisblack"),
        "float32 values; convert",
        tiff(GREY, "minisblack"),
    ),
    "float": (tiff(RGB.astype(np.float32)), "float32 values", PNG),
    "signed": (tiff(WIDE.astype(np.int16)), "int16 values", PNG),
    "signed bytes": (tiff(GREY.astype(np.int8), "minisblack"), "int8 values", PNG),
    "cielab": (tiff(RGB, "cielab"), "stores its colours as CIELAB .*; convert it to RGB", PNG),
    "colours not told": (handmade(UNTOLD, GREY.tobytes()), "or does not say how", PNG),
    "other inks": (
        handmade(tags_of(30, 20, 8, 5, 4, {332: ("H", [2])}), FOUR.tobytes()),
        "SEPARATED",
        PNG,
    ),
    "another white": (
        handmade(tags_of(30, 20, 8, 6, 3, LEVELS), RGB.tobytes()),
        "reference black and white",
        PNG,
    ),
    "volume": (tiff(np.stack([RGB] * 16), tile=(16, 16, 16), volumetric=True), "16 layers", PNG),
    "lzw, 0 is white, 16 bit": (
        handmade(tags_of(30, 20, 16, 0, 1, {259: ("H", [5])}), b"\x80"),
        "with LZW compression, .* write it again without",
        tiff(WIDE_GREY, "miniswhite"),
    ),
    "cmyk jpeg without marker": (
        without_marker(INKS),
        "nothing says whether they are inverted; convert it to RGB",
        PNG,
    ),
    "truncated jpeg": (
        file_of(RGB, "JPEG")[:-200],
        "truncated .*; fetch it again",
        file_of(RGB, "JPEG"),
    ),
    "truncated png": (file_of(RGB)[:-300], "truncated", PNG),
    "truncated tiff": (tiff(WIDE)[:500], "truncated", tiff(WIDE)),
    "truncated tiff 8 bit": (tiff(RGB)[:500], "truncated", tiff(RGB)),
    "tiff header only": (b"II*\0" + b"a" * 20, "damaged", PNG),
    "text": (b"<html>Not found</html>", "not an image file .*; replace it", PNG),
    "empty": (b"", "not an image file", PNG),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("error")
def test_decode_refuses_in_one_sentence_with_the_name_and_advice_that_works(kind):
    data, reason, mended = REFUSED[kind]
    with pytest.raises(UserError, match=reason) as raised:
        decode(data, "some/file.tif")
    message = str(raised.value)
    assert message.startswith("some/file.tif ") and "\n" not in message and message.endswith(".")
    assert decode(mended, "x").shape == (20, 30, 3)


def test_decode_refuses_a_picture_of_too_many_pixels_before_unpacking_it(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 599)
    four = tiff(FOUR, "minisblack", planarconfig="contig")
    for data in (file_of(RGB), four, tiff(RGB[:4, :4], tile=(32, 32))):
        with pytest.raises(UserError, match="x has more than .* million pixels"):
            decode(data, "x")
    bomb = bytearray(file_of(RGB))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height, above Pillow's own limit too
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match="x has more than .* million pixels"):
        decode(bytes(bomb), "x")


def test_a_strip_that_unpacks_to_more_than_the_picture_is_refused(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 2000)
    good = zlib.compress(WIDE[..., 0].tobytes())
    for data, sense in ((good, True), (zlib.compress(bytes(100_000)), False)):
        file = handmade(tags_of(30, 20, 16, 0, 1, {259: ("H", [8])}), data)
        if sense:
            np.testing.assert_array_equal(decode(file, "x"), thrice(255 - HIGH[..., 0]))
        else:
            with pytest.raises(UserError, match="x has more than"):
                decode(file, "x")


def test_no_file_starts_another_program(monkeypatch):
    def started(*arguments, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    formats = "JPEG, PNG, BMP, GIF, WEBP or TIFF"
    with pytest.raises(UserError, match=rf"^a.png is not an image file \({formats}\); replace"):
        decode(eps, "a.png")
    with pytest.raises(AssertionError, match="was started"):  # Pillow alone starts it
        Image.open(io.BytesIO(eps)).load()
