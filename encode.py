"""Texts and pictures to vectors, with frozen encoders (Eq. 3, 9, 10), and their cache.

`ClipEncoder` is what the paper uses (except for one layer, see DECISIONS.md). `TinyEncoder`
needs no weights and no network: it is for the demo, for tests and for a first look. `extract`
runs one of the two over a data set's contents.
"""
import contextlib
import hashlib
import io
import json
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

import disk
from pictures import BadPicture, read_picture
from run import InputError

FEATURES_VERSION = 3  # part of every cache's key: raise it when an encoder's output changes


# --- Encoders -----------------------------------------------------------------------------

def unit_rows(x):
    """The rows of x, scaled to length 1; a row of zeros stays as it is."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class TinyEncoder:
    """Texts as hashed words and word pairs, pictures as thumbnails and colour histograms.

    The vectors are the same on every machine.
    """
    text_width, image_width, image_size = 512, 256, None
    prepared_bytes = 4 * image_width  # of a picture, as prepare leaves it

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
        # The square root lets a word that occurs four times count twice, not four times.
        return unit_rows(np.sign(rows) * np.sqrt(np.abs(rows)))

    def prepare(self, image):
        """PIL image -> float32 [256]: all that is kept of a decoded picture."""
        row = np.empty(self.image_width, np.float32)
        small = image.resize((8, 8), Image.Resampling.BOX)
        thumbnail = np.asarray(small, np.float32) / 255 - 0.5               # [8, 8, 3]
        # Each of 1024 pixels falls into one of 4 x 4 x 4 colours.
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
        colours = (pixels.reshape(-1, 3) // 64) @ (16, 4, 1)                # [1024]
        share = np.bincount(colours, minlength=64) / len(colours)           # [64]
        row[:192] = thumbnail.ravel() / 8
        row[192:] = np.sqrt(share)
        return row

    def image(self, prepared):
        """[prepared picture] -> float32 [n, 256]"""
        return unit_rows(np.stack(prepared))


class ClipEncoder:
    """CLIP's two towers through open_clip: the projected text and image vectors.

    model, weights: open_clip's names; weights may be a file, model may be local-dir:FOLDER. A
    text is cut after 77 tokens. InputError: open_clip cannot load them.
    """

    def __init__(self, model, weights, device="cpu"):
        import open_clip  # here, as it takes seconds and TinyEncoder does not need it
        print(f"loading CLIP {model}, weights {weights} (downloaded once by open_clip)",
              flush=True)
        logging.disable(logging.ERROR)
        try:
            if not weights and ":" not in model:
                # open_clip would draw random weights and say so only in its log.
                raise ValueError("no weights named")
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                model, weights, **file_preprocessing(open_clip, model, weights))
            self.tokenizer = open_clip.get_tokenizer(model)  # for SigLIP a separate download
        except Exception as error:  # what its hub client, torch.load and urllib raise
            reason = " ".join(str(error).split())[:90] or type(error).__name__
            raise InputError(
                f"CLIP {model} with weights '{weights}' cannot be loaded ({reason}): "
                "connect to the internet once or name a weights file with --clip-weights FILE; "
                "or use --encoder tiny, which needs none; or leave out what has no ready "
                "features, by mmcpr.py --modalities") from None
        finally:
            logging.disable(logging.NOTSET)
        self.device, self.half = device, device == "cuda"
        self.model.eval().to(self.device)
        # No attribute gives the towers' common width for every model, so one text is encoded.
        self.text_width = self.image_width = self.text([""]).shape[1]
        height, width = np.broadcast_to(self.model.visual.image_size, 2).tolist()
        self.image_size = 2 * max(height, width)
        self.prepared_bytes = 4 * 3 * height * width

    @torch.inference_mode()
    def encode(self, tower, batch):
        """tower(batch) as float32 [n, d].

        On a GPU the matrix products are in float16, which is several times as fast. A vector's
        cosine to the one from float32 is above .9995.
        """
        batch = batch.to(self.device)
        with torch.autocast(self.device, torch.float16, enabled=self.half):
            rows = tower(batch).float()
        if self.half and not rows.isfinite().all():
            # Some models' numbers are too large for float16: encode again in float32.
            rows = tower(batch).float()
        return rows.cpu().numpy()

    def text(self, texts):
        """[str] -> float32 [n, d]: a review (Eq. 3) or a description (Eq. 9)."""
        return self.encode(self.model.encode_text, self.tokenizer(list(texts)))

    def prepare(self, image):
        """PIL image -> float32 [3, height, width]: resized, cropped, normalised.

        A picture that is a long, narrow strip is cut to its middle first. Scaled up to the
        model's size, the whole strip would take gigabytes.
        """
        limit = 64 * min(image.size)
        left, top = [max(0, length - limit) // 2 for length in image.size]
        if left or top:
            image = image.crop((left, top, image.width - left, image.height - top))
        return self.preprocess(image)

    def image(self, prepared):
        """[prepared picture] -> float32 [n, d] (Eq. 10)."""
        return self.encode(self.model.encode_image, torch.stack(prepared))


PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def file_preprocessing(open_clip, model, weights):
    """Keyword arguments: how to prepare pictures for weights from a file; {}: open_clip knows.

    They come from an open_clip_config.json beside the file. Without one they are a guess, which
    is printed: what all of the model's published weights use, or else CLIP's own values.
    """
    name = model.replace("/", "-")
    is_tag = open_clip.pretrained.get_pretrained_cfg(name, weights)
    if ":" in model or is_tag or not os.path.isfile(weights):
        return {}
    config = Path(weights).with_name("open_clip_config.json")
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))["preprocess_cfg"]
        return {f"image_{key}": settings[key] for key in PREPROCESSING if key in settings}
    guesses = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        settings = open_clip.pretrained.get_pretrained_cfg(name, tag)
        guess = {f"image_{key}": settings[key] for key in PREPROCESSING if key in settings}
        if guess not in guesses:
            guesses.append(guess)
    guess = guesses[0] if len(guesses) == 1 else {
        "image_mean": open_clip.OPENAI_DATASET_MEAN, "image_std": open_clip.OPENAI_DATASET_STD}
    print(f"{weights}: how its pictures are prepared is a guess (mean {guess['image_mean']}, "
          f"std {guess['image_std']}); an {config.name} beside it would tell", flush=True)
    return guess


# --- Features and their cache -------------------------------------------------------------

def load_encoder(encoder, clip, device):
    return TinyEncoder() if encoder == "tiny" else ClipEncoder(*clip, device)


def extract(dataset, what, contents, encoder, clip, data_dir, chunk=256, device="cpu",
            load=load_encoder):
    """Features of `contents` as a float16 memory map [n, d], from the cache or encoded now.

    what: "text", "review", or "image" for paths inside dataset.folder. encoder: "tiny", or
    "clip" with clip = (model, weights). A blank text and an unreadable picture get a NaN row.
    load: the function that makes the encoder; called only where the cache has no such file.
    """
    path = cache_path(dataset, what, contents, encoder, clip, data_dir)
    if not path.exists():
        model = load(encoder, clip, device)
        fill_cache(path, model, dataset.folder, what, contents, encoder, chunk)
    remedy = "cut off or damaged: delete it and run the command again"
    table = disk.open_npy(path, remedy)
    if table.dtype != np.float16 or table.ndim != 2 or len(table) != len(contents):
        raise InputError(f"{path}: {table.dtype} {table.shape}, not float16 with "
                         f"{len(contents):,} rows; {remedy}")
    return table


def cache_path(dataset, what, contents, encoder, clip, data_dir):
    """The path of the cache's file: its name holds a hash of all that the rows depend on."""
    digest = hashlib.sha256(f"{FEATURES_VERSION} {encoder} {what}".encode())
    if encoder == "clip":
        for part in clip_key(*clip):
            digest.update(part.encode() + b"\0")
    stamps = [""] * len(contents)
    if what == "image":
        stamps = picture_hashes(dataset.folder, contents)
    for content, stamp in zip(contents, stamps):
        digest.update(f"{content}\0{stamp}".encode())
    name = re.sub(r"[^\w.-]", "_", dataset.name)[:40]
    return data_dir / "features" / f"{name}-{what}-{encoder}-{digest.hexdigest()[:16]}.npy"


def clip_key(model, weights):
    """[str]: the names of a CLIP model and its weights; for those that are files, hashes.

    One of the files is the configuration, which says how pictures are prepared.
    """
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        paths = sorted(path for path in folder.glob("*") if not path.is_dir())
        return ["local-dir", *(f"{path.name} {file_hash(path)}" for path in paths)]
    if not os.path.isfile(weights):
        return [model, weights]
    config = Path(weights).with_name("open_clip_config.json")
    return [model, file_hash(weights), file_hash(config)]


def picture_hashes(folder, names):
    """[str]: the hash of each picture's file, '' where there is none."""
    def hash_of(name):
        return file_hash(folder / name) if name else ""

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(hash_of, names))


def file_hash(path):
    """The hash of a file's contents; '' where there is none."""
    disk.check_is_file(path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return digest.hexdigest()


def fill_cache(path, model, folder, what, contents, encoder, chunk):
    """Encodes the contents into the .npy file `path`, `chunk` at a time.

    Rows are appended to a .part file, which is renamed once it is whole. So after an
    interruption the next run goes on after the last whole row.
    """
    width = model.image_width if what == "image" else model.text_width
    if what == "image":
        # The prepared pictures of one chunk stay below 256 MB.
        chunk = max(1, min(chunk, (1 << 28) // model.prepared_bytes))
        Image.init()  # loads all of Pillow's readers before many threads open files
    header = npy_header((len(contents), width))
    row_bytes = 2 * width
    part = path.with_suffix(".part")
    disk.check_is_file(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    n_done = 0
    if part.exists():
        n_done = max(0, part.stat().st_size - len(header)) // row_bytes
    with (open(part, "r+b" if part.exists() else "wb") as file,
          ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as pool,
          tqdm(total=len(contents), initial=n_done, desc=f"{encoder} {what}", unit="") as bar):
        file.write(header)
        file.seek(len(header) + n_done * row_bytes)
        for start in range(n_done, len(contents), chunk):
            batch = contents[start:start + chunk]
            rows = encode_batch(model, folder, what, batch, width, pool)
            file.write(rows.astype("<f2").tobytes())
            file.flush()
            bar.update(len(batch))
    # Another run that encodes the same contents may have renamed the file already.
    with contextlib.suppress(FileNotFoundError):
        os.replace(part, path)


def encode_batch(model, folder, what, batch, width, pool):
    """Float32 [len(batch), width]; NaN rows where there is nothing to encode."""
    def prepare(name):
        if not name:
            return None
        try:
            return read_picture(folder / name, model.image_size, model.prepare)
        except BadPicture:
            return None
        except MemoryError:
            raise InputError(f"{folder / name}: not enough memory to decode it; close other "
                             "programs and run the command again") from None

    if what == "image":
        # Pillow decodes outside of Python's lock, so threads read several pictures at once.
        encode, batch = model.image, list(pool.map(prepare, batch))
    else:
        encode, batch = model.text, [text if text.strip() else None for text in batch]
    rows = np.full((len(batch), width), np.nan, np.float32)
    present = [n for n, content in enumerate(batch) if content is not None]
    if present:
        rows[present] = encode([batch[n] for n in present])
    return rows


def npy_header(shape):
    """The bytes before the rows of a .npy file of little-endian float16."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()
