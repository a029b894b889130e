"""Texts and pictures to vectors, with frozen encoders (Eq. 3, 9, 10), and their cache.

`ClipEncoder` is what the paper uses. `TinyEncoder` needs no weights and no network: it is for the
demo, for tests and for a first look. `extract` runs one of them over a data set's contents.
"""
import contextlib
import hashlib
import io
import logging
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from run import InputError

FEATURES_VERSION = 1  # part of every cache's key: raise it when an encoder's output changes
MAX_PIXELS = 1 << 26  # 67 megapixels; a larger picture is left out


def open_image(file, size=None):
    """The picture as RGB; None where it is missing, not an image, cut off or absurdly large.

    size: the caller will shrink it to about so many pixels, so it may be decoded smaller.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            if size:
                # JPEG only: decodes at a fraction of the size, but never below `size`.
                image.draft("RGB", (size, size))
            if image.mode in ("P", "LA", "PA", "RGBA"):
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError,
            MemoryError, RuntimeError, zlib.error):
        return None  # Pillow raises each of these on some damaged file


def unit_rows(x):
    """Rows of length 1; a row of zeros stays one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class TinyEncoder:
    """Hashed words and word pairs; thumbnails and colour histograms. The same on every machine."""
    text_width, image_width, image_size = 512, 256, None

    def text(self, texts):
        """[str] -> float32 [n, 512]"""
        rows = np.zeros((len(texts), self.text_width), np.float32)
        for row, text in zip(rows, texts):
            words = re.findall(r"\w+", text.lower())
            pairs = [f"{a} {b}" for a, b in zip(words, words[1:])]
            for gram in words + pairs:
                code = zlib.crc32(gram.encode())
                # The sign is random, so that grams which share a place cancel on average.
                row[code % self.text_width] += 1 if code >> 31 else -1
        # A word that occurs four times counts twice.
        return unit_rows(np.sign(rows) * np.sqrt(np.abs(rows)))

    def image(self, images):
        """[PIL image] -> float32 [n, 256]"""
        rows = np.empty((len(images), self.image_width), np.float32)
        for row, image in zip(rows, images):
            small = image.resize((8, 8), Image.Resampling.BOX)
            thumbnail = np.asarray(small, np.float32) / 255 - 0.5           # [8, 8, 3]
            # Each of 1024 pixels falls into one of 4 x 4 x 4 colours.
            pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
            colours = (pixels.reshape(-1, 3) // 64) @ (16, 4, 1)            # [1024]
            share = np.bincount(colours, minlength=64) / len(colours)       # [64]
            row[:192] = thumbnail.ravel() / 8
            row[192:] = np.sqrt(share)
        return unit_rows(rows)


class ClipEncoder:
    """CLIP's two towers through open_clip: the projected text and image vectors.

    model, weights: open_clip's names; weights may be a file. A text is cut after 77 tokens.
    InputError: open_clip cannot load them.
    """

    def __init__(self, model, weights):
        import open_clip  # here, as it takes seconds and TinyEncoder does without
        print(f"loading CLIP {model}, weights {weights} (downloaded once by open_clip)",
              flush=True)
        logging.disable(logging.ERROR)
        try:
            if not weights:
                # open_clip would draw them at random and say so only in its log.
                raise ValueError("no weights named")
            self.model, _, self.preprocess = \
                open_clip.create_model_and_transforms(model, pretrained=weights)
            self.tokenizer = open_clip.get_tokenizer(model)  # for SigLIP a download of its own
        except Exception as error:  # what its hub client, torch.load and urllib raise
            reason = " ".join(str(error).split())[:90] or type(error).__name__
            raise InputError(
                f"CLIP {model} with weights '{weights}' cannot be loaded ({reason}): "
                "connect to the internet once or name a weights file with --clip-weights FILE; "
                "or use --encoder tiny, which needs none") from None
        finally:
            logging.disable(logging.NOTSET)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.eval().to(self.device)
        # The towers' common width stands in no attribute that all models have.
        self.text_width = self.image_width = self.text([""]).shape[1]
        self.image_size = 2 * max(np.atleast_1d(self.model.visual.image_size))

    @torch.inference_mode()
    def text(self, texts):
        """[str] -> float32 [n, d]: a review (Eq. 3) or a description (Eq. 9)."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return self.model.encode_text(tokens).float().cpu().numpy()

    @torch.inference_mode()
    def image(self, images):
        """[PIL image] -> float32 [n, d] (Eq. 10)."""
        batch = torch.stack([self.preprocess(image) for image in images])
        return self.model.encode_image(batch.to(self.device)).float().cpu().numpy()


def extract(dataset, what, contents, encoder, clip, data_dir, chunk=256):
    """Features of `contents` as a float16 memory map [n, d], from the cache or encoded now.

    what: "text", or "image" for paths inside dataset.folder. encoder: "tiny", or "clip" with
    clip = (model, weights). '' and unreadable pictures give NaN rows.
    """
    path = cache_path(dataset, what, contents, encoder, clip, data_dir)
    if not path.exists():
        model = TinyEncoder() if encoder == "tiny" else ClipEncoder(*clip)
        fill_cache(path, model, dataset.folder, what, contents, encoder, chunk)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise InputError(
            f"{path}: cut off or damaged; delete it and run the command again") from None


def cache_path(dataset, what, contents, encoder, clip, data_dir):
    """The cache's file, named after all that its rows depend on."""
    digest = hashlib.sha256(f"{FEATURES_VERSION} {encoder} {what}".encode())
    if encoder == "clip":
        model, weights = clip
        digest.update(f"{model} {weights} {file_stamp(Path(weights))}".encode())
    for content in contents:
        digest.update(content.encode() + b"\0")
        if what == "image" and content:
            digest.update(file_stamp(dataset.folder / content).encode())
    name = dataset.name.replace(os.sep, "_")
    return data_dir / "features" / f"{name}-{what}-{encoder}-{digest.hexdigest()[:16]}.npy"


def file_stamp(path):
    """Size and time of a file, which change when it is replaced; '' where there is none."""
    if not path.is_file():
        return ""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def fill_cache(path, model, folder, what, contents, encoder, chunk):
    """Encodes the contents into the .npy file `path`, `chunk` at a time.

    Until it is whole it is a .part file to which rows are appended, so that a run that was
    interrupted goes on after the last whole row.
    """
    width = model.image_width if what == "image" else model.text_width
    header = npy_header((len(contents), width))
    row_bytes = 2 * width
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    n_done = 0
    if part.exists():
        n_done = max(0, part.stat().st_size - len(header)) // row_bytes
    with (open(part, "r+b" if part.exists() else "wb") as file,
          ThreadPoolExecutor(4) as pool,
          tqdm(total=len(contents), initial=n_done, desc=f"{encoder} {what}", unit="") as bar):
        file.write(header)
        file.seek(len(header) + n_done * row_bytes)
        for start in range(n_done, len(contents), chunk):
            batch = contents[start:start + chunk]
            rows = encode_batch(model, folder, what, batch, width, pool)
            file.write(rows.astype("<f2").tobytes())
            file.flush()
            bar.update(len(batch))
    # Another run that encodes the same may have renamed it already.
    with contextlib.suppress(FileNotFoundError):
        os.replace(part, path)


def encode_batch(model, folder, what, batch, width, pool):
    """Float32 [len(batch), width]; NaN rows where there is nothing to encode."""
    def read_picture(name):
        return open_image(folder / name, model.image_size) if name else None

    encode = model.text
    if what == "image":
        encode = model.image
        # Pillow decodes outside of Python's lock, so threads read several pictures at once.
        batch = list(pool.map(read_picture, batch))
    rows = np.full((len(batch), width), np.nan, np.float32)
    present = [n for n, content in enumerate(batch) if content]
    if present:
        rows[present] = encode([batch[n] for n in present])
    return rows


def npy_header(shape):
    """The bytes before the rows of a .npy file of little-endian float16."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()
