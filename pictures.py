"""Reads one picture from a file safely: it may be damaged, huge, 16-bit, transparent or turned.

Faults of the file are told apart from faults of the machine. First the whole file is read: an
error there is the machine's. Then it is decoded from memory: an error there is the file's,
unless memory is short. Only a fault of the file may be remembered.
"""
import contextlib
import io
import mmap
import re
import threading
import warnings

import numpy as np
from PIL import Image

import disk
import run

MAX_PIXELS = 1 << 26  # 67 megapixels; a larger picture is left out
MAX_FILE_BYTES = 1 << 28
PIXELS_AT_A_TIME = 1 << 25  # decoded by all threads together; a pixel takes some 10 bytes

CUT_OFF = "truncated|broken data|not enough|overrun"  # in the messages of Pillow's readers


class BadPicture(Exception):
    """The reason why a file holds no picture that can be used."""


def read_picture(file, size=None, reduce=None):
    """The picture as RGB; with `reduce`, reduce(picture) instead.

    file: a path, or a binary file. size: the caller needs only about this many pixels a side,
    so the picture may be decoded smaller. reduce is called while the picture's pixels still
    count towards PIXELS_AT_A_TIME. BadPicture: there is no such file, or its bytes are no
    picture, cut off, damaged or too large. OSError, MemoryError: the machine's fault; the file
    may be readable another time. InputError: `file` is a folder, pipe or device.
    """
    content = read_bytes(file)
    # Pillow's warning is not needed: check_size says in one line what is too large.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with blame_bytes():
        image = Image.open(io.BytesIO(content))
        check_size(image)
        n_pixels = image.width * image.height
        if size:
            # JPEG only: decodes at a fraction of the size, but never below `size`.
            image.draft("RGB", (size, size))
            if not image.info.get("progressive"):  # these keep all coefficients in memory
                n_pixels = image.width * image.height
    with decoding.pixels(n_pixels):
        with blame_bytes():
            image.load()
            turned = orientation(image)
            image = upright(to_rgb(image), turned)
        if reduce:
            image = reduce(image)
    return image


def read_bytes(file):
    """All bytes of a path or binary file; BadPicture where there are none, or far too many."""
    if hasattr(file, "read"):
        content = file.read()
    else:
        disk.check_is_file(file)
        try:
            with open(file, "rb") as opened:
                content = opened.read(MAX_FILE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise BadPicture("no such file") from None
    if not content:
        raise BadPicture("an empty file")
    if len(content) > MAX_FILE_BYTES:
        raise BadPicture(f"a file of more than {MAX_FILE_BYTES:,} bytes")
    return content


@contextlib.contextmanager
def blame_bytes():
    """Turns what Pillow raises while it decodes bytes in memory into BadPicture.

    On damaged bytes Pillow raises nearly every kind of exception there is.
    """
    try:
        yield
    except (BadPicture, ImportError):  # ImportError: a part of Pillow that could not be loaded
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "memory" in message.lower():
            # A damaged header may ask for any amount. If memory is plenty, the header was wrong.
            if not memory_is_plenty():
                raise MemoryError from None
            message = "asks for absurd amounts of memory"
        elif isinstance(error, Image.UnidentifiedImageError):
            message = "no picture"
        elif isinstance(error, EOFError) or re.search(CUT_OFF, message, re.I):
            message = "truncated"
        raise BadPicture(message[:60] or type(error).__name__) from None


def memory_is_plenty(n_bytes=2 << 30):
    """Whether twice the memory that the largest picture takes is available."""
    try:
        mmap.mmap(-1, n_bytes).close()
    except (OSError, ValueError, MemoryError):
        return False
    return True


def check_size(image):
    """BadPicture for a placeholder of one pixel, and for an absurdly large picture."""
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture(f"{image.width:,} x {image.height:,} pixels are too many")
    if image.size == (1, 1):
        raise BadPicture("a placeholder of one pixel")


class PixelLimit:
    """Lets threads decode pictures side by side, but only `limit` pixels at a time.

    A picture that has more pixels than the limit is decoded alone.
    """

    def __init__(self, limit):
        self.limit = self.free = limit
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def pixels(self, n):
        n = min(n, self.limit)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= n)
            self.free -= n
        try:
            yield
        finally:
            if n == self.limit:
                run.return_freed_memory()
            with self.changed:
                self.free += n
                self.changed.notify_all()


decoding = PixelLimit(PIXELS_AT_A_TIME)


def to_rgb(image):
    """The picture as 8-bit RGB: more bits are scaled down, transparency is put on white."""
    if image.mode.startswith(("I", "F")):
        return grey_to_8_bits(image).convert("RGB")
    key = image.info.get("transparency")  # a colour that stands for "transparent"
    if image.mode in ("P", "LA", "La", "PA", "RGBA", "RGBa") or key is not None:
        if isinstance(key, tuple) and max(key) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in key)  # of 16 bits
        return on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def on_white(image):
    """A transparent picture as RGB on white. In strips, as the steps need four copies."""
    opaque = Image.new("RGB", image.size)
    n_rows = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, n_rows):
        box = (0, top, image.width, min(image.height, top + n_rows))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return opaque


def grey_to_8_bits(image):
    """A grey picture of integers (I, I;16) or floats (F), converted to mode L: white is 255.

    No file says which value is white. It is taken to be 65535, or for floats the first of 1,
    255 and 65535 that no value exceeds. Where a value exceeds 65535, the largest is white.
    """
    pixels = np.nan_to_num(np.asarray(image).astype(np.float32), copy=False)
    largest = float(pixels.max())
    white = 65535.0
    if image.mode == "F" and largest <= 255:
        white = 1.0 if largest <= 1 else 255.0
    white = max(white, largest)
    if isinstance(image.info.get("transparency"), int):
        pixels[pixels == image.info["transparency"]] = white
    pixels *= 255 / white
    return Image.fromarray(pixels.clip(0, 255, out=pixels).round(out=pixels).astype(np.uint8))


TURNS = {  # {EXIF's orientation: what turns the picture upright}
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def orientation(image):
    """EXIF's orientation of a decoded picture, 1 to 8; None where it has none."""
    try:
        return image.getexif().get(274)
    except MemoryError:
        raise
    except Exception:
        return None  # the EXIF block is damaged, the picture is not


def upright(image, turned):
    return image.transpose(TURNS[turned]) if turned in TURNS else image


def why_unreadable(file):
    """The reason why a picture has no features."""
    try:
        read_picture(file)
    except BadPicture as error:
        return str(error)
    return "it has changed since"
