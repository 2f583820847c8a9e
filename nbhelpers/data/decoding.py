"""Decode image files of every kind that published sets use to (H, W, 3) uint8 RGB."""

from __future__ import annotations

import io
import logging
import warnings
import zlib

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

from nbhelpers.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # besides TIFF; Pillow starts no other decoder
MAX_PIXELS = 50_000_000  # of one image (150 MB decoded)
DARK = 4096  # values of 16 bits below it decode to nearly black
LIT_SHARE = 0.1  # of the pixels that must reach it
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BANDS = {
    PHOTOMETRIC.MINISWHITE: (1, 2),
    PHOTOMETRIC.MINISBLACK: (1, 2, 3, 4),
    PHOTOMETRIC.RGB: (3, 4),
    PHOTOMETRIC.PALETTE: (1, 2),
    PHOTOMETRIC.SEPARATED: (4,),
    PHOTOMETRIC.YCBCR: (3,),
}
DEFLATE = (COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE)
ORIENTATION, INK_SET, REFERENCE_BLACK_WHITE, PHOTOMETRIC_TAG = 274, 332, 532, 262  # TIFF tags
CMYK_INKS = 1
FULL_RANGE = (0, 255, 128, 255, 128, 255)  # of Y, Cb and Cr, as in JPEG
for _logger in ("tifffile", "PIL.TiffImagePlugin"):  # their errors become UserErrors
    logging.getLogger(_logger).addHandler(logging.NullHandler())


def decode(data: bytes, name: str) -> np.ndarray:
    """Decode a file to (H, W, 3) uint8 RGB. Its content decides, never its extension.

    | file                             | result                                                   |
    |----------------------------------|----------------------------------------------------------|
    | RGB, CMYK, YCbCr, 8 bit          | Pillow's convert("RGB"); colour profiles are ignored     |
    | bilevel, grey, grey + alpha      | the grey band three times; inverted where 0 means white  |
    | palette                          | the palette's colours; transparency is dropped           |
    | RGBA, RGB + near infrared        | the first three bands                                    |
    | TIFF with premultiplied alpha    | the bands divided by the alpha; black where it is 0      |
    | 16 bit (PNG, TIFF, GeoTIFF)      | the high byte; refused if that is nearly black (below)  |
    | bands one after the other, tiles | as the rows above                                        |
    | GeoTIFF                          | as the rows above; its geography is ignored              |
    | more than four bands, CIELAB     | refused                                                  |
    | 32 bit, floating point, signed   | refused                                                  |
    | CMYK JPEG without Adobe's marker | refused: nothing says whether it is inverted             |
    | several frames or pages          | the first                                                |

    An image of 16 bits is refused unless a tenth of its pixels reach 4096 in a band. Below that, 11
    or 12 bits were meant. Pixels with the image's highest value in every band do not count, since
    that value may mean "no data". The orientation in a TIFF is applied; that of EXIF is not (as in
    the papers' `convert("RGB")`). `name` is for messages only.
    UserError on anything refused, truncated, not an image, or above MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd metadata, which nobody reads here
            if data[:4] in TIFF_MAGIC:
                return _decode_tiff(data, name)
            return _decode_usual(data, name)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} is not an image file ({', '.join(FORMATS)} or TIFF); replace it "
            "or remove it from the list."
        ) from None
    except Exception as error:  # a broken file makes the decoders raise almost anything
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise UserError(
            f"{name} is damaged, truncated or of an unsupported kind ({reason}); "
            "fetch it again or convert it to PNG."
        ) from error


def _decode_usual(data: bytes, name: str) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.width, image.height, name)
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        raise UserError(
            f"{name} has four bands and no Adobe marker, so nothing says whether they "
            "are inverted; convert it to RGB."
        )
    return _by_pillow(image, name)


def _by_pillow(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return _thrice(_high_byte(np.asarray(image)[..., None], name))
    kept_the_high_byte = any(";16" in str(part) for part in getattr(image, "tile", ()))
    pixels = np.asarray(image.convert("RGB"))
    return _high_byte(pixels.astype(np.uint16) << 8, name) if kept_the_high_byte else pixels


def _thrice(band: np.ndarray) -> np.ndarray:
    """(H, W, 1) -> (H, W, 3)."""
    return np.repeat(band, 3, axis=-1)


def _high_byte(stored: np.ndarray, name: str) -> np.ndarray:
    """(H, W, bands) uint16 -> uint8. UserError unless the values use the range of 16 bits."""
    lit = np.any(stored >= DARK, axis=-1)
    counted = np.any(stored != stored.max(), axis=-1)
    if not stored[counted].any():  # two-coloured, or one colour alone
        counted[:] = True
    if lit[counted].mean() < LIT_SHARE:
        raise UserError(
            f"{name} has 16 bits per band, but less than a tenth of its pixels reach "
            f"{DARK}, so its range is unknown; stretch it to 8 bits first (for example "
            "gdal_translate -ot Byte -scale)."
        )
    return (stored >> 8).astype(np.uint8)


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(name)


def _too_large(name: str) -> UserError:
    return UserError(
        f"{name} has more than {MAX_PIXELS // 10**6} million pixels; cut it into tiles first."
    )


def _decode_tiff(data: bytes, name: str) -> np.ndarray:
    """Decode an uncompressed TIFF with tifffile, a compressed one with Pillow where it can."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        _refuse_tiff(page, name)
        whole_bytes = page.bitspersample in (1, 8, 16)
        if page.compression == COMPRESSION.NONE and whole_bytes:
            return _upright(_tiff_colours(page, _stored(page), name), page)
        if _pillow_is_right(page):
            return _tiff_by_pillow(page, data, name)
        if page.compression in DEFLATE and whole_bytes:
            _refuse_bomb(page, name)
            return _upright(_tiff_colours(page, _stored(page), name), page)
        raise _unread(page, name)


def _unread(page, name: str) -> UserError:
    bands = f"{page.samplesperpixel} {page.photometric.name} bands of {page.bitspersample} bits"
    return UserError(
        f"{name} is a TIFF of {bands} with {_called(page.compression)} compression, "
        "which is not read; write it again without compression."
    )


def _called(value) -> str:
    return getattr(value, "name", f"number {value}")


def _refuse_tiff(page, name: str) -> None:
    """UserError for what is no picture of 1 to 4 bands of up to 16 bits with known colours."""
    _check_size(page.imagewidth, page.imagelength, name)
    _check_size(page.tilewidth, page.tilelength, name)
    bands, kind = page.samplesperpixel, page.photometric
    if page.dtype not in (np.bool_, np.uint8, np.uint16):
        raise UserError(f"{name} holds {page.dtype} values; convert it to 8 bits per band.")
    if bands > 4:
        raise _unknown_bands(name, bands)
    if page.bitspersample not in (1, 2, 4, 8, 16) or page.imagedepth != 1:
        raise UserError(
            f"{name} has {page.bitspersample} bits per band and {page.imagedepth} "
            "layers; convert it to one layer of 8 bits per band."
        )
    other_inks = page.tags.valueof(INK_SET, CMYK_INKS) != CMYK_INKS
    if kind not in BANDS or PHOTOMETRIC_TAG not in page.tags or other_inks:
        raise UserError(
            f"{name} stores its colours as {_called(kind)} or does not say how; convert it to RGB."
        )
    if bands not in BANDS[kind]:
        raise _unknown_bands(name, bands)
    if kind == PHOTOMETRIC.YCBCR and not _full_range(page):
        raise UserError(f"{name} has a reference black and white of its own; convert it to RGB.")


def _unknown_bands(name: str, bands: int) -> UserError:
    return UserError(
        f"{name} has {bands} bands and nothing says which are red, green and blue; "
        "write these three to an 8-bit file."
    )


def _full_range(page) -> bool:
    levels = page.tags.valueof(REFERENCE_BLACK_WHITE)
    return levels is None or tuple(np.divide(levels[::2], levels[1::2])) == FULL_RANGE


def _stored(page) -> np.ndarray:
    """(H, W, bands) as they are in the file, bands one after the other moved to the end."""
    planes = page.asarray(squeeze=False)[:, 0]
    return np.moveaxis(planes, 0, -1).reshape(page.imagelength, page.imagewidth, -1)


def _tiff_colours(page, stored: np.ndarray, name: str) -> np.ndarray:
    """(H, W, bands) as in the file -> (H, W, 3) uint8 RGB."""
    kind, bands = page.photometric, stored.shape[-1]
    if kind == PHOTOMETRIC.PALETTE:
        return _in_palette(stored[..., 0], page.colormap)
    colours = stored[..., :1] if bands < 3 else stored[..., :3]
    if kind == PHOTOMETRIC.SEPARATED:
        colours = stored
    for band, use in enumerate(page.extrasamples, bands - len(page.extrasamples)):
        if band < colours.shape[-1] and use != EXTRASAMPLE.UNSPECIFIED:
            raise _unknown_bands(name, bands)
        if use == EXTRASAMPLE.ASSOCALPHA:
            colours = _divided(colours, stored[..., band : band + 1])
    if page.bitspersample == 1:
        colours = colours.astype(np.uint8) * 255
    if page.bitspersample == 16:
        colours = _high_byte(colours, name)
    if kind == PHOTOMETRIC.MINISWHITE:
        colours = 255 - colours
    if kind in (PHOTOMETRIC.SEPARATED, PHOTOMETRIC.YCBCR):
        mode = "YCbCr" if kind == PHOTOMETRIC.YCBCR else "CMYK"
        size = (page.imagewidth, page.imagelength)
        return np.asarray(Image.frombytes(mode, size, colours.tobytes()).convert("RGB"))
    return np.ascontiguousarray(colours) if colours.shape[-1] == 3 else _thrice(colours)


def _in_palette(indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Palette (3, 2 ** bits) uint16; some writers put values of 8 bits there."""
    palette = palette.T >> 8 if palette.max() > 255 else palette.T
    return palette.astype(np.uint8)[indices.astype(np.int64)]


def _divided(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Premultiplied colours over their alpha, rounded down, at most white; black where it is 0."""
    white = np.iinfo(colours.dtype).max
    divided = np.zeros(colours.shape, np.uint32)
    np.floor_divide(colours.astype(np.uint32) * white, alpha, out=divided, where=alpha > 0)
    return np.minimum(divided, white).astype(colours.dtype)


def _upright(pixels: np.ndarray, page) -> np.ndarray:
    """Rows and columns in the order of the tag Orientation, as Pillow puts them."""
    turn = page.tags.valueof(ORIENTATION, 1)
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _pillow_is_right(page) -> bool:
    """Whether Pillow reads the colours of such a compressed file as they are meant."""
    bits, bands = page.bitspersample, page.samplesperpixel
    premultiplied = EXTRASAMPLE.ASSOCALPHA in page.extrasamples
    if page.photometric in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.PALETTE):
        return bands == 1 and bits <= 8
    if page.photometric == PHOTOMETRIC.MINISBLACK:
        return bands == 1 or bands == 2 and bits == 8 and not premultiplied
    if page.photometric == PHOTOMETRIC.YCBCR:
        return page.compression in (COMPRESSION.JPEG, COMPRESSION.OJPEG)
    return bits == 8 or page.photometric == PHOTOMETRIC.RGB and bits == 16 and not premultiplied


def _tiff_by_pillow(page, data: bytes, name: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=["TIFF"])
    except UnidentifiedImageError:
        raise _unread(page, name) from None
    if page.photometric == PHOTOMETRIC.PALETTE:
        return _in_palette(np.asarray(image), page.colormap)
    return _by_pillow(image, name)


def _refuse_bomb(page, name: str) -> None:
    """Zlib would unpack whatever the file holds, so its length is tried first."""
    samples = page.imagewidth * page.imagelength * page.samplesperpixel
    most = samples * page.bitspersample // 8 + MAX_PIXELS
    file = page.parent.filehandle
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(start)
        if len(zlib.decompressobj().decompress(file.read(size), most + 1)) > most:
            raise _too_large(name)
