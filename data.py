"""Data sets for MMCPR: the split, the co-interaction graphs, then where data comes from and how features are made.

    python data.py                        make the built-in demo set and its features, print its counts
    python data.py --data vg              download and prepare the paper's Video Games (hours, resumable)
    python data.py --data path/to/folder  check your own data (format: README)

A reader of the method needs only the first two sections.
"""
import argparse
import contextlib
import csv
import ctypes
import difflib
import errno
import gzip
import hashlib
import html
import http.client
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from PIL import Image, ImageDraw
from tqdm import tqdm

TRAIN, VALID, TEST = 0, 1, 2


class InputError(Exception):
    """Input that the user can mend: its text is one line that names the file, the row and the remedy."""


# ------------------------------------------------------------------------------------------------------------------
# 1. The split: per user 1/5 to test, then 10 % of what is left to validation
# ------------------------------------------------------------------------------------------------------------------

def split(users, seed=0, valid=0.1):
    """The part of each interaction, int8 [n]: TRAIN, VALID or TEST.

    users: int [n], the user of each interaction. floor(n_u / 5) of a user's n_u interactions go to test, at random; of
    the rest the fraction `valid`, drawn uniformly over all users, goes to validation, but each user keeps one to train.
    """
    rng = np.random.default_rng(seed)
    count = np.bincount(users)
    order = np.lexsort((rng.random(len(users)), users))  # grouped by user, shuffled within
    start = np.cumsum(count) - count
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users)) - start[users[order]]
    part = np.where(place < count[users] // 5, TEST, TRAIN).astype(np.int8)
    part[hold_out(part, place == count[users] - 1, valid, rng)] = VALID
    return part


def hold_out(part, stays, valid, rng):
    """Indices of the training interactions that become validation; `stays`, bool [n], one of each user's, cannot."""
    free = np.flatnonzero((part == TRAIN) & ~stays)
    return rng.choice(free, min(round(valid * np.sum(part == TRAIN)), len(free)), replace=False)


class Parts(NamedTuple):
    """One data set, split: binary CSR matrices [n_users, n_items], and the training mask over the interactions."""
    train: sp.csr_matrix
    valid: sp.csr_matrix
    test: sp.csr_matrix
    in_train: np.ndarray  # bool [n], in the order of dataset.users / dataset.items
    fingerprint: str      # of the training interactions, ids included


def split_dataset(dataset, seed=0, valid=0.1):
    """Splits a Dataset, or respects its own labels (MMRec), and says what came of it."""
    users, items = dataset.users, dataset.items
    if dataset.labels is None:
        part = split(users, seed, valid)
    else:
        part = dataset.labels.copy()
        if valid == 0:
            part[part == VALID] = TRAIN
        elif not np.any(part == VALID):
            rng = np.random.default_rng(seed)
            train = rng.permutation(np.flatnonzero(part == TRAIN))
            stays = np.isin(np.arange(len(users)), train[np.unique(users[train], return_index=True)[1]])
            part[hold_out(part, stays, valid, rng)] = VALID
    train, held, test = (
        sp.csr_matrix((np.ones(np.sum(part == p), np.float32), (users[part == p], items[part == p])),
                      shape=(dataset.n_users, dataset.n_items)) for p in (TRAIN, VALID, TEST))
    for matrix in (train, held, test):
        matrix.sort_indices()
    if not train.nnz:
        raise InputError(f"{dataset.name}: the split leaves nothing to train on: no row has x_label 0")
    if not test.nnz:
        raise InputError(f"{dataset.name}: the split leaves nothing to test: " + ("no user has 5 interactions or more"
                         if dataset.labels is None else "no row has x_label 2"))
    if valid > 0 and not held.nnz:
        raise InputError(f"{dataset.name}: nothing is left to validate on: pass --valid 0 to train for a fixed number of "
                         "epochs")
    digest = hashlib.sha256()
    for text in ("\n".join(dataset.user_ids), "\n".join(dataset.item_ids)):
        digest.update(text.encode() + b"\0")
    for array in (train.indptr, train.indices):
        digest.update(array.astype("<i8").tobytes())
    print(f"split: {train.nnz:,} training, {held.nnz:,} validation, {test.nnz:,} test interactions; "
          f"{np.sum(np.diff(test.indptr) > 0):,} users are tested", flush=True)
    return Parts(train, held, test, part == TRAIN, digest.hexdigest())


# ------------------------------------------------------------------------------------------------------------------
# 2. The co-interaction graphs G_u and G_i, without writing them out
# ------------------------------------------------------------------------------------------------------------------

class CoInteraction(NamedTuple):
    """The adjacency A of the graph whose edges join rows of R that share a column, a != b (paper, sections 3.3, 3.4).

    Written out, A has up to sum_i deg(i)^2 entries, far more than R. But C = R R^T counts what each two rows share, so
        A = C - E,    E_ab = C_ab - 1 where C_ab >= 2 (a != b),    E_aa = C_aa,
    hence A x = R (R^T x) - E x, with two thin products and an E that holds only the diagonal and the pairs that share two
    or more. Whichever touches fewer entries is kept: `R` and `E`, or `A` where that is smaller (dense data).
    """
    n_neighbours: np.ndarray  # |N_a|, float32 [n]
    R: sp.csr_matrix | None   # float32 [n, m]
    E: sp.csr_matrix | None   # float32 [n, n]
    A: sp.csr_matrix | None   # float32 [n, n]


def co_interaction(R, form="auto", block_entries=1 << 24):
    """Builds CoInteraction from a binary CSR matrix R [n, m]; form: "auto" chooses by count, "A" and "RE" force one.

    R R^T is made in blocks of rows, each of at most about `block_entries` products, and is never whole in memory.
    """
    R = sp.csr_matrix(R, dtype=np.float32)
    Rt = R.T.tocsr()
    n = R.shape[0]
    work = np.concatenate([[0], np.cumsum(R @ np.diff(Rt.indptr))])  # products needed for the rows so far
    bounds = [0]
    while bounds[-1] < n:
        last = np.searchsorted(work, work[bounds[-1]] + block_entries, side="right") - 1
        bounds.append(int(min(n, max(last, bounds[-1] + 1))))

    def blocks(pick):
        """Stacks pick(a, b, C_ab) -> (keep, value) over the blocks of rows, and counts the neighbours of every row."""
        data, columns, sizes, neighbours = [], [], [], []
        for lo, hi in zip(bounds[:-1], bounds[1:]):
            C = R[lo:hi] @ Rt
            a = np.repeat(np.arange(hi - lo), np.diff(C.indptr))
            off = C.indices != a + lo
            keep, value = pick(off, C.data)
            data.append(value[keep])
            columns.append(C.indices[keep])
            sizes.append(np.bincount(a[keep], minlength=hi - lo))
            neighbours.append(np.bincount(a[off], minlength=hi - lo))
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        matrix = sp.csr_matrix((np.concatenate(data), np.concatenate(columns), indptr), shape=(n, n))
        matrix.sort_indices()
        return matrix, np.concatenate(neighbours).astype(np.float32)

    E, neighbours = blocks(lambda off, C: (~off | (C >= 2), np.where(off, C - 1, C)))
    if form == "RE" or (form == "auto" and 2 * R.nnz + E.nnz < neighbours.sum(dtype=np.float64)):
        return CoInteraction(neighbours, R, E, None)
    A, _ = blocks(lambda off, C: (off, np.ones_like(C)))
    return CoInteraction(neighbours, None, None, A)


# ------------------------------------------------------------------------------------------------------------------
# 3. Reading a data set: a folder, an MMRec folder; the rest are turned into folders (section 4)
# ------------------------------------------------------------------------------------------------------------------

@dataclass
class Dataset:
    """Unique interactions with ids, and where each modality's content is. Contents: '' is none; None is no such column."""
    name: str
    folder: Path
    user_ids: np.ndarray              # unicode [n_users]
    item_ids: np.ndarray              # unicode [n_items]
    users: np.ndarray                 # int64 [n], index into user_ids
    items: np.ndarray                 # int64 [n], index into item_ids
    labels: np.ndarray | None = None  # int8 [n], a published split
    texts: list | None = None         # str [n_items], descriptions
    images: list | None = None        # str [n_items], paths inside folder
    reviews: list | None = None       # str [n]
    ready: dict = field(default_factory=dict)   # modality -> (feature file, its rows that belong to ours)

    @property
    def n_users(self):
        return len(self.user_ids)

    @property
    def n_items(self):
        return len(self.item_ids)


def read_csv(path, required, optional=(), delimiter=",", skip=()):
    """Columns of a UTF-8 CSV file with a header: {name: [str]}. `skip` are known columns that are not kept.

    InputError: no such file, not UTF-8, empty, a missing or misspelt column, a row with too few or too many fields.
    """
    csv.field_size_limit(1 << 27)
    known = (*required, *optional)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=delimiter == ",",
                                quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
            start = 1
            header = next(reader, None)
            if not header:
                raise InputError(f"{path}: the file is empty; its first line must be the header {delimiter.join(required)}")
            for name in required:
                if name not in header:
                    near = difflib.get_close_matches(name, header, 1, 0.5)
                    remedy = "separate the columns by commas" if delimiter == "," and re.search("[;\t]", header[0]) else \
                        f"rename '{near[0]}'" if near else f"the columns are {', '.join(header)}"
                    raise InputError(f"{path}, row 1: no column '{name}'; {remedy}")
            if len(set(header)) < len(header):
                raise InputError(f"{path}, row 1: a column name occurs twice in {', '.join(header)}; remove one")
            for name in (name for name in header if name not in known):
                near = difflib.get_close_matches(name, [c for c in known if c not in header], 1, 0.7)
                if near:
                    raise InputError(f"{path}, row 1: unknown column '{name}'; did you mean '{near[0]}'?")
            columns = {name: [] for name in header if name in known and name not in skip}
            take = [(columns[name].append, header.index(name)) for name in columns]
            start = reader.line_num + 1  # of the row: a quote that is not closed is noticed at the end of the file
            for row in reader:
                if len(row) == len(header):
                    for append, at in take:
                        append(row[at])
                elif row:
                    raise InputError(f"{path}, row {start}: {len(row)} fields, the header has {len(header)}; "
                                     "quote a field that contains the separator")
                start = reader.line_num + 1
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}, row {first_bad_line(path)}: not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, row {start}: {error}; mend that row: quotes closed, a quote inside a field doubled") from None
    for name in required:
        if name in columns and "" in columns[name]:
            raise InputError(f"{path}: data row {columns[name].index('') + 1} has no {name}; fill it in or remove the row")
    if not columns[required[0]]:
        raise InputError(f"{path}: the header is there, but no row follows it")
    return columns


def first_bad_line(path):
    """The number of the first line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number


def index_of(names):
    """(ids in order of first appearance, int64 index of each name)."""
    table = {}
    index = np.fromiter((table.setdefault(name, len(table)) for name in names), np.int64, len(names))
    return np.array(list(table)), index


def read_folder(folder, contents=True):
    """A folder data set: interactions.csv (user,item[,review]), items.csv (item[,text][,image]), ready .npy features."""
    path, catalogue = folder / "interactions.csv", folder / "items.csv"
    columns = read_csv(path, ("user", "item"), ("review",), skip=() if contents else ("review",))
    user_ids, users = index_of(columns["user"])
    rows = np.arange(len(users))
    texts = images = None
    ready = {}
    if catalogue.exists():
        table = read_csv(catalogue, ("item",), ("text", "image"), skip=() if contents else ("text", "image"))
        place = {name: i for i, name in enumerate(table["item"])}
        if len(place) < len(table["item"]):
            seen = set()
            double = next(i for i, name in enumerate(table["item"]) if name in seen or seen.add(name))
            raise InputError(f"{catalogue}: data row {double + 1} lists item '{table['item'][double]}' a second time; "
                             "remove one of them")
        unknown = next((i for i, name in enumerate(columns["item"]) if name not in place), None)
        if unknown is not None:
            raise InputError(f"{path}: data row {unknown + 1} has item '{columns['item'][unknown]}', which is not in "
                             f"{catalogue.name}; add it there or remove the row")
        item_ids = np.array(table["item"])
        items = np.fromiter((place[name] for name in columns["item"]), np.int64, len(rows))
        texts, images = table.get("text"), table.get("image")
        for number, name in enumerate(images or (), 1):
            if name and (os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".."):
                raise InputError(f"{catalogue}: data row {number}: image '{name}' leaves the folder; use a path inside it")
        for modality, file in (("T", "item_text.npy"), ("V", "item_image.npy")):
            if (folder / file).exists():
                ready[modality] = (folder / file, len(item_ids))
    else:
        stray = next((file for file in ("item_text.npy", "item_image.npy") if (folder / file).exists()), None)
        if stray:
            raise InputError(f"{folder / stray}: its rows are those of items.csv, which is not there; add it (column: item)")
        print(f"{folder.name}: no items.csv: no descriptions, no images")
        item_ids, items = index_of(columns["item"])
    if (folder / "review.npy").exists():
        ready["R"] = (folder / "review.npy", len(rows))
    return assemble(Dataset(folder.name, folder, user_ids, item_ids, users, items, None, texts, images,
                            columns.get("review"), ready))


def read_mmrec(path):
    """An MMRec folder: <name>.inter (userID itemID ... x_label, tab-separated), image_feat.npy, text_feat.npy."""
    columns = read_csv(path, ("userID", "itemID", "x_label"), delimiter="\t")
    numbers = {}
    for name, values in columns.items():
        bad = next((i for i, value in enumerate(values) if not re.fullmatch("[0-9]{1,7}", value)), None)
        if bad is not None:
            raise InputError(f"{path}: data row {bad + 1}: {name} '{values[bad]}' is not a whole number from 0 to 9,999,999")
        numbers[name] = np.array(list(map(int, values)))
    labels = numbers["x_label"]
    if labels.max() > TEST:
        bad = int(np.argmax(labels > TEST))
        raise InputError(f"{path}: data row {bad + 1}: x_label {labels[bad]} is none of 0 (train), 1 (valid), 2 (test)")
    user_ids, users = np.unique(numbers["userID"], return_inverse=True)
    n_items = int(numbers["itemID"].max()) + 1  # feature files have one row for each id
    ready = {modality: (path.parent / file, n_items) for modality, file in (("T", "text_feat.npy"), ("V", "image_feat.npy"))
             if (path.parent / file).exists()}
    return assemble(Dataset(path.stem, path.parent, user_ids.astype(str), np.arange(n_items).astype(str), users,
                            numbers["itemID"], labels.astype(np.int8), ready=ready))


def assemble(dataset):
    """Merges duplicate pairs (the earliest stays, with its review) and checks the ready feature files."""
    for path, rows in dataset.ready.values():
        check_features(path, rows)
    key = dataset.users * dataset.n_items + dataset.items
    _, first = np.unique(key, return_index=True)
    first.sort()
    if len(first) < len(key):
        print(f"{dataset.name}: {len(key) - len(first):,} duplicate pairs merged (the earliest kept)")
    dataset.ready = {modality: (path, np.arange(rows)) for modality, (path, rows) in dataset.ready.items()}
    return keep(dataset, first)


def keep(dataset, rows, drop_empty=False):
    """The data set with only these interactions; with drop_empty also without the users and items they leave empty."""
    users, items = dataset.users[rows], dataset.items[rows]
    user_kept = np.unique(users) if drop_empty else np.arange(dataset.n_users)
    item_kept = np.unique(items) if drop_empty else np.arange(dataset.n_items)
    pick = lambda values, index: None if values is None else [values[i] for i in index]
    return Dataset(
        dataset.name, dataset.folder, dataset.user_ids[user_kept], dataset.item_ids[item_kept],
        np.searchsorted(user_kept, users), np.searchsorted(item_kept, items),
        None if dataset.labels is None else dataset.labels[rows],
        pick(dataset.texts, item_kept), pick(dataset.images, item_kept), pick(dataset.reviews, rows),
        {modality: (path, have[rows if modality == "R" else item_kept]) for modality, (path, have) in dataset.ready.items()})


def k_core(users, items, count):
    """Indices of the interactions left when users and items with fewer than `count` are removed until none is left."""
    rows = np.arange(len(users))
    while len(rows):
        enough = (np.bincount(users[rows])[users[rows]] >= count) & (np.bincount(items[rows])[items[rows]] >= count)
        if enough.all():
            break
        rows = rows[enough]
    return rows


def check_features(path, rows):
    """A feature file as a memory map [rows, d]; InputError names what is wrong with its shape, dtype or values."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:90]
        raise InputError(f"{path}: not a readable .npy array ({reason}); save it again with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.shape[1] or \
            array.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: {getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}; a feature "
                         "file is a 2-d array of float16, float32 or float64")
    if len(array) != rows:
        raise InputError(f"{path}: {len(array):,} rows, but {rows:,} are needed, one for each row of the data; make it again")
    for start in range(0, rows, 1 << 14):
        block = np.asarray(array[start:start + (1 << 14)])
        for bad, what in ((np.isinf(block).any(1), "infinities"),
                          (np.isnan(block).any(1) & ~np.isnan(block).all(1), "some NaN, not all")):
            if bad.any():
                raise InputError(f"{path}: data row {start + int(np.argmax(bad)) + 1} has {what}; a row is finite, or NaN "
                                 "throughout where the modality is missing")
    return array


def features(dataset, modalities, encoder="auto", data_dir=Path("data"), clip=("ViT-B-32-quickgelu", "openai")):
    """{modality: float [n_items, d_m], for "R" [n_interactions, d_m]}, NaN rows where an item or a review has none.

    modalities: letters of T (description text), V (image), R (review). encoder: "tiny" or "clip" encodes the contents;
    "auto" takes the ready .npy files where the data set has one, else encodes (demo: tiny, other data: clip).
    """
    made = {}
    for modality, what in (("T", "text"), ("V", "image"), ("R", "review")):
        if modality not in modalities:
            continue
        contents = {"T": dataset.texts, "V": dataset.images, "R": dataset.reviews}[modality]
        if encoder == "auto" and modality in dataset.ready:
            path, rows = dataset.ready[modality]
            made[modality] = np.load(path, mmap_mode="r", allow_pickle=False)[rows]
        elif contents is not None and any(contents):
            chosen = ("tiny" if dataset.name == "demo" else "clip") if encoder == "auto" else encoder
            made[modality] = extract(dataset, what, contents, chosen, clip, data_dir)
        else:
            print(f"{what}: none in this data" + (f" for --encoder {encoder} (ready features need --encoder auto)"
                                                  if modality in dataset.ready else ""), flush=True)
            continue
        kind = "interactions" if modality == "R" else "items"
        missing = np.isnan(made[modality][:, 0])
        unread = f" ({sum(map(bool, contents)) - np.sum(~missing):,} images missing or unreadable)" if contents and \
            modality == "V" and not (encoder == "auto" and "V" in dataset.ready) else ""
        print(f"{what}: {made[modality].shape[1]}-d; {missing.sum():,} of {len(missing):,} {kind} have none{unread}",
              flush=True)
        if missing.all():
            del made[modality]
    return made


def pool_reviews(review, users, n_users, in_train, chunk=1 << 15):
    """Intra-modal aggregation (Eq. 4): the mean of each user's *training* reviews, float32 [n_users, d]; none: a NaN row.

    review [n, d] has one row per interaction (NaN: empty, does not count), users [n], in_train bool [n]. A held-out
    interaction's review is never read.
    """
    total = np.zeros((n_users, review.shape[1]), np.float32)
    count = np.zeros(n_users, np.float32)
    rows = np.flatnonzero(in_train)
    for part in (rows[start:start + chunk] for start in range(0, len(rows), chunk)):
        block = np.asarray(review[part], np.float32)                                    # [c, d]
        there = ~np.isnan(block[:, 0])
        owner = users[part[there]]
        sums = sp.csr_matrix((np.ones(len(owner), np.float32), (owner, np.arange(len(owner)))), (n_users, len(owner)))
        total += sums @ block[there]
        count += np.bincount(owner, minlength=n_users)
    with np.errstate(invalid="ignore"):
        return total / np.where(count > 0, count, np.nan)[:, None]


# ------------------------------------------------------------------------------------------------------------------
# 4. Sources: the built-in demo, Amazon 2018 from its raw files; both become folders as in section 3
# ------------------------------------------------------------------------------------------------------------------

PAPER_TABLE_1 = {"vg": (55_217, 17_389, 472_586), "tg": (208_143, 78_698, 1_754_420)}
CATEGORY = {"vg": "Video_Games", "tg": "Toys_and_Games"}
AMAZON_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"
DEMO_VERSION = 1


def load(data, data_dir=Path("data"), modalities="RTVG", min_count=0, sample=0, seed=0, contents=True, url=AMAZON_URL):
    """The Dataset that --data names: demo, vg, tg, amazon:<Category>, or a folder. Makes or downloads what is not there.

    modalities: which contents will be used (images are fetched only for V); contents=False: the interactions alone.
    """
    if data == "demo":
        dataset = read_folder(make_folder(data_dir / "demo", {"generator": DEMO_VERSION}, write_demo), contents)
    elif data in CATEGORY or data.startswith("amazon:"):
        category = CATEGORY.get(data) or data.partition(":")[2]
        folder = prepare_amazon(category, data_dir / "amazon", url)
        if contents and "V" in modalities:
            fetch_images(folder)
        dataset = read_folder(folder, contents)
    elif data == "sharee":
        raise InputError("sharee: the paper's private data set cannot be downloaded; put data of that kind into a folder "
                         "with interactions.csv (user,item) and items.csv (item,text,image) and pass "
                         "--data FOLDER --min-count 10 --sample 500000, the paper's filter")
    else:
        folder = Path(data)
        inter = sorted(folder.glob("*.inter"))
        if (folder / "interactions.csv").exists():
            dataset = read_folder(folder, contents)
        elif len(inter) == 1:
            dataset = read_mmrec(inter[0])
        elif folder.is_dir():
            raise InputError(f"{folder}: neither interactions.csv nor one .inter file is in this folder")
        else:
            raise InputError(f"--data {data}: no such folder, and not one of demo, vg, tg, sharee, amazon:<Category>")
    dataset.name = data if data in ("demo", *CATEGORY) else dataset.name
    if min_count:
        dataset = keep(dataset, k_core(dataset.users, dataset.items, min_count), drop_empty=True)
    if sample and sample < len(dataset.users):
        rows = np.random.default_rng(seed).choice(len(dataset.users), sample, replace=False)
        dataset = keep(dataset, np.sort(rows), drop_empty=True)
    if not len(dataset.users):
        raise InputError(f"{data}: --min-count {min_count} leaves no interaction; lower it")
    paper = "; the paper's Table 1: {:,} users, {:,} items, {:,} interactions".format(*PAPER_TABLE_1[data]) \
        if data in PAPER_TABLE_1 else ""
    density = len(dataset.users) / dataset.n_users / dataset.n_items
    print(f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, {len(dataset.users):,} interactions, "
          f"{100 * (1 - density):.2f} % sparse{paper}", flush=True)
    return dataset


def make_folder(folder, key, write):
    """`folder`, written by write(temporary folder) unless it is there already with this key.

    It is whole once source.json, which holds the key, is there; pictures fetched for an earlier version stay.
    """
    source = folder / "source.json"
    if source.exists() and source.read_text() == json.dumps(key):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as name:
        temporary = Path(name) / folder.name
        temporary.mkdir()
        write(temporary)
        source.unlink(missing_ok=True)  # what follows is whole once it is back
        shutil.copytree(temporary, folder, copy_function=os.replace, dirs_exist_ok=True)  # fetched pictures stay
        replace_file(source, lambda file: json.dump(key, file), "w")
    return folder


def write_csv(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


COLOURS = {"red": (200, 50, 45), "orange": (230, 140, 40), "yellow": (225, 210, 70), "green": (70, 160, 70),
           "teal": (50, 160, 165), "blue": (55, 85, 190), "purple": (130, 65, 165), "pink": (230, 130, 175)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "stripe", "hexagon")
NOUNS = ("lamp", "kettle", "puzzle", "guitar", "backpack", "teapot", "clock", "blanket", "racket", "camera", "notebook",
         "vase", "tent", "speaker", "scarf", "drone", "easel", "skillet", "telescope", "hammock", "flute", "globe",
         "basket", "mirror", "kite", "candle", "journal", "wagon", "helmet", "terrarium", "typewriter", "compass")
STYLES = ("rustic", "modern", "vintage", "minimal", "playful", "elegant", "rugged", "cosy", "sleek", "quirky", "classic",
          "bold", "delicate", "sturdy", "whimsical", "sober", "airy", "festive", "compact", "lavish", "plain", "ornate",
          "soft", "bright", "quiet", "portable", "sporty", "scholarly", "coastal", "alpine", "urban", "floral")
FILLER = ("nice", "shipping was quick", "a gift for my sister", "works as described", "bought it on sale", "good value",
          "not what I expected at first", "the box was dented", "would buy again", "my second one")


def write_demo(folder, n_users=2000, n_items=1000, n_tastes=16):
    """A synthetic shop with planted tastes: pictures are drawn, descriptions and reviews written, all from noisy attributes.

    Who buys what depends only on the tastes of user and item and on the item's popularity. A taste makes some colours,
    shapes, nouns and styles likelier; nothing in a picture or a sentence names a taste, a user or a popularity.
    """
    rng = np.random.default_rng(20220627)
    # Items: one main taste and a touch of a second; popularity like Zipf's law, independent of taste.
    main, second = rng.integers(n_tastes, size=(2, n_items))
    item_taste = 0.75 * np.eye(n_tastes)[main] + 0.25 * np.eye(n_tastes)[second]        # [n_items, n_tastes]
    popularity = (30.0 + rng.permutation(n_items)) ** -0.8
    # Users: two or three tastes each; 5 interactions and more, 11 on average.
    user_taste = rng.dirichlet(np.full(n_tastes, 0.12), n_users)                         # [n_users, n_tastes]
    utility = np.log(popularity) + 8.0 * user_taste @ item_taste.T + rng.gumbel(size=(n_users, n_items))
    bought = np.argsort(-utility, axis=1)                                                # Gumbel top-k: without replacement
    amount = 5 + np.minimum(rng.poisson(rng.gamma(2.0, 3.0, n_users)), n_items // 4)

    # A taste's favourite colour, shape, nouns and styles; an item follows its main taste in each only so often.
    colours, shapes = list(COLOURS), list(SHAPES)
    favourite = {"colour": rng.integers(len(colours), size=n_tastes), "shape": rng.integers(len(shapes), size=n_tastes)}
    likes = {"noun": rng.permutation(len(NOUNS)).reshape(n_tastes, -1),
             "style": rng.permutation(len(STYLES)).reshape(n_tastes, -1)}

    def attribute(kind, choices, taste, faith):
        if rng.random() >= faith:
            return int(rng.integers(choices))
        return int(favourite[kind][taste] if kind in favourite else rng.choice(likes[kind][taste]))

    (folder / "images").mkdir()
    rows, described = [], []
    for i in range(n_items):
        colour = colours[attribute("colour", len(colours), main[i], 0.6)]
        shape = shapes[attribute("shape", len(shapes), main[i], 0.6)]
        noun = NOUNS[attribute("noun", len(NOUNS), main[i], 0.7)]
        style = STYLES[attribute("style", len(STYLES), main[i], 0.5)]
        ground = colours[int(rng.integers(len(colours)))]
        seen = colour if rng.random() < 0.85 else colours[int(rng.integers(len(colours)))]  # writers err
        text = rng.choice([f"A {style} {noun} with a {seen} {shape} on a {ground} ground.",
                           f"{seen} {shape} {noun}, {style} look, {ground} background.",
                           f"This {noun} comes in {ground} with {seen} {shape} decoration. {style}!"])
        text = f"{text} {rng.choice(FILLER)}." if rng.random() < 0.3 else str(text)
        picture = draw(rng, COLOURS[colour], shape, COLOURS[ground])
        has_text, has_image = rng.random(2) >= (0.08, 0.12)
        if has_image:
            picture.save(folder / "images" / f"i{i}.png")
        rows.append((f"i{i}", text if has_text else "", f"images/i{i}.png" if has_image else ""))
        described.append((colour, shape, noun, style))
    write_csv(folder / "items.csv", ("item", "text", "image"), rows)

    interactions = []
    for u in range(n_users):
        for i in bought[u, :amount[u]]:
            words = [w for w in described[i] if rng.random() < 0.4]
            words += [rng.choice(FILLER)] if rng.random() < 0.7 else []
            review = "" if rng.random() < 0.2 else ", ".join(words[j] for j in rng.permutation(len(words)))
            interactions.append((f"u{u}", f"i{i}", review))
    order = rng.permutation(len(interactions))
    write_csv(folder / "interactions.csv", ("user", "item", "review"), [interactions[j] for j in order])


def draw(rng, colour, shape, ground, size=48):
    """A picture of two to four jittered shapes on a ground, with pixel noise."""
    jitter = lambda rgb: tuple(int(c) for c in np.clip(np.add(rgb, rng.normal(0, 18, 3)), 0, 255))
    picture = Image.new("RGB", (size, size), jitter(ground))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 5)):
        r = int(rng.integers(6, 12))
        x, y = (int(v) for v in rng.integers(r, size - r, 2))
        ink = jitter(colour)
        turn = lambda angles: [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        elif shape == "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=3)
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=ink)
        elif shape == "stripe":
            pen.rectangle((0, y - r // 3, size, y + r // 3), fill=ink)
        elif shape == "cross":
            pen.rectangle((x - r, y - r // 4, x + r, y + r // 4), fill=ink)
            pen.rectangle((x - r // 4, y - r, x + r // 4, y + r), fill=ink)
        else:
            corners = {"triangle": 3, "diamond": 4, "hexagon": 6}[shape]
            pen.polygon(turn(2 * math.pi * k / corners - math.pi / 2 for k in range(corners)), fill=ink)
    noise = rng.normal(0, 12, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def prepare_amazon(category, folder, url):
    """<folder>/<category>, a data folder made from the raw 5-core reviews and metadata, which are downloaded if absent."""
    if not re.fullmatch(r"\w+", category):
        raise InputError(f"amazon:{category}: a category is letters, digits and _, for example amazon:Video_Games")
    reviews, meta = folder / f"{category}_5.json.gz", folder / f"meta_{category}.json.gz"
    if not (reviews.exists() and meta.exists()) and (folder / category / "source.json").exists():
        return folder / category  # prepared before, the raw files have been removed since
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in ((reviews, "categoryFilesSmall/"), (meta, "metaFiles2/")):
        if not path.exists():
            download(f"{url.rstrip('/')}/{part}{path.name}", path)
    key = {"version": 1, **{path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in (reviews, meta)}}
    return make_folder(folder / category, key, lambda target: write_amazon(target, reviews, meta))


def read_json_lines(path):
    """Yields (line number, record) of a .json.gz file with a progress bar, never holding more than one line."""
    try:
        with open(path, "rb") as raw, tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar, \
                gzip.open(raw) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError
                except ValueError:  # UnicodeDecodeError and JSONDecodeError among them
                    raise InputError(f"{path}, row {number}: not a JSON record; delete the file to download it again") \
                        from None
                yield number, record
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
            bar.update(raw.tell() - bar.n)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: cut off or damaged; delete it and run the command again to download it") from None


def write_amazon(folder, reviews, meta):
    """interactions.csv, items.csv and image_urls.json from the raw files; items without metadata are dropped."""
    interactions, wanted = [], set()
    for number, record in read_json_lines(reviews):
        try:
            user, item = str(record["reviewerID"]), str(record["asin"])
        except KeyError as error:
            raise InputError(f"{reviews}, row {number}: no field {error}; is this a 5-core review file?") from None
        interactions.append((user, item, clean(record.get("reviewText")) or clean(record.get("summary")),
                             record.get("unixReviewTime") or 0))
        wanted.add(item)
    catalogue, addresses = {}, {}
    for _, record in read_json_lines(meta):
        item = str(record.get("asin", ""))
        if item in wanted and item not in catalogue:  # an item listed twice keeps its first entry
            image = f"images/{re.sub(r'[^A-Za-z0-9]', '_', item)}.jpg"
            addresses[image] = image_addresses(record)
            catalogue[item] = (item, item_text(record), image if addresses[image] else "")
    interactions.sort(key=lambda row: row[3])  # so that of a pair's reviews the earliest comes first, and is kept
    kept = [row[:3] for row in interactions if row[1] in catalogue]
    if not kept:
        raise InputError(f"{meta}: no item of {reviews.name} is in it; are the two files of one category?")
    print(f"{reviews.name}: {len(interactions):,} reviews, {len(wanted):,} items, of which {len(wanted) - len(catalogue):,} "
          f"without metadata are dropped, with {len(interactions) - len(kept):,} reviews")
    write_csv(folder / "interactions.csv", ("user", "item", "review"), kept)
    write_csv(folder / "items.csv", ("item", "text", "image"), catalogue.values())
    (folder / "image_urls.json").write_text(json.dumps({k: v for k, v in addresses.items() if v}))


def clean(value):
    """Plain text of a metadata or review field: HTML removed (an unclosed tag too), entities resolved, spaces folded."""
    text = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    text = re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)", " ", text)
    text = html.unescape(re.sub(r"<[/!a-zA-Z][^>]*(>|$)", " ", text))
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())  # half a surrogate pair: "?"


def item_text(record):
    """title + description + feature + brand. Co-purchase fields and the sales rank are interactions: never read."""
    title = clean(record.get("title"))
    title = "" if "getTime" in title else title  # scraped JavaScript instead of a title
    return " ".join(filter(None, [title, *(clean(record.get(name)) for name in ("description", "feature", "brand"))]))


def image_addresses(record):
    """Picture addresses, the one to try first at the front: large before small; older dumps call the field `image`."""
    found = []
    for name in ("imageURLHighRes", "imageURL", "image"):
        value = record.get(name) or []
        found += [value] if isinstance(value, str) else [a for a in value if isinstance(a, str)]
    return list(dict.fromkeys(a for a in found if a.startswith(("http://", "https://"))))[:3]


def disk_full(error):
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def request(url, start=0):
    headers = {"User-Agent": "Mozilla/5.0 (MMCPR data.py)", **({"Range": f"bytes={start}-"} if start else {})}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)


def download(url, path, patience=5):
    """Downloads url to path, through path.part: resumed where it stopped, given up after `patience` tries in vain."""
    part, failures = path.with_name(path.name + ".part"), 0
    print(f"downloading {url}", flush=True)
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            with request(url, have) as answer:
                resumed = answer.status == 206
                length = answer.headers.get("Content-Length")
                total = int(length) + (have if resumed else 0) if length else None
                with open(part, "ab" if resumed else "wb") as file, \
                        tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=path.name) as bar:
                    while block := answer.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            if total is None or part.stat().st_size == total:
                break
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is here is not the beginning of what is there
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                raise InputError(f"{url}: HTTP {error.code} {error.reason}; is the category spelt as on the data set's page? "
                                 f"Or put the file at {path}") from None
            reason = f"HTTP {error.code}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            if disk_full(error):
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        progress = part.exists() and part.stat().st_size > have
        failures = 0 if progress else failures + 1
        if failures == patience:
            raise InputError(f"{url}: {reason}; run the command again to go on, or put the file at {path}") from None
        time.sleep(2 ** failures - 1)
    os.replace(part, path)


def fetch_images(folder, workers=16, unreachable=32):
    """Downloads the pictures of a prepared Amazon folder that are not there yet; whatever fails is counted, never raised.

    Pictures that the server refuses for good are noted in images/refused.txt and not asked for again. After `unreachable`
    failures in a row without any answer the rest is left for another run.
    """
    addresses = json.loads((folder / "image_urls.json").read_text())
    (folder / "images").mkdir(exist_ok=True)
    note = folder / "images" / "refused.txt"
    refused = set(note.read_text().split()) if note.exists() else set()
    todo = [name for name in addresses if name not in refused and not (folder / name).exists()]
    if not todo:
        return
    stop, silent, lock = threading.Event(), [0], threading.Lock()

    def fetch(name):
        if stop.is_set():
            return "left"
        result = fetch_image(addresses[name], folder / name)
        with lock:
            silent[0] = silent[0] + 1 if result == "unreachable" else 0
            if silent[0] >= unreachable:
                stop.set()
            if result == "refused":
                with open(note, "a") as file:
                    file.write(name + "\n")
        return result

    pool = ThreadPoolExecutor(workers)
    try:
        results = list(tqdm(pool.map(fetch, todo), total=len(todo), desc="images", unit="image"))
    except BaseException:  # Ctrl-C: what is here is kept, the next run goes on
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    failed = {kind: results.count(kind) for kind in ("refused", "unreachable", "left")}
    print(f"images: {results.count('ok'):,} fetched, {failed['refused']:,} refused or no picture, "
          f"{failed['unreachable']:,} unreachable" +
          (f"; gave up after {unreachable} in a row, {failed['left']:,} not tried" if stop.is_set() else "") +
          ("; their items go without (run again to retry)" if sum(failed.values()) else ""), flush=True)


def fetch_image(urls, path, cap=20 << 20, tries=2):
    """One picture, from the first address that gives one: "ok", "refused" (no address will), "unreachable" (try later)."""
    result = "refused"
    for url in urls:
        for _ in range(tries):
            try:
                with request(url) as answer:
                    body = answer.read(cap + 1)
                    length = answer.headers.get("Content-Length")
                if length and len(body) < min(int(length), cap + 1):
                    result = "unreachable"  # cut off: the next try may get it whole
                    continue
                if len(body) <= cap and open_image(io.BytesIO(body)) is not None:
                    replace_file(path, lambda file: file.write(body))
                    return "ok"
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    break
                result = "unreachable"
            except (OSError, http.client.HTTPException, ValueError) as error:
                if disk_full(error):
                    raise
                result = "unreachable"
    return result


# ------------------------------------------------------------------------------------------------------------------
# 5. Encoders and their caches
# ------------------------------------------------------------------------------------------------------------------

FEATURES_VERSION = 1  # part of every cache's key: raise it when an encoder's output changes
MAX_PIXELS = 1 << 26  # 67 megapixels; a larger picture is left out


def open_image(file, size=None):
    """The picture as RGB, or None where it is missing, not an image, cut off or absurdly large. size: decode near it."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            if size:
                image.draft("RGB", (size, size))  # JPEG only: decodes at a fraction of the size, never below it
            if image.mode in ("P", "LA", "PA", "RGBA"):
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError, MemoryError, RuntimeError,
            zlib.error):
        return None  # Pillow raises each of these on some damaged file


class TinyEncoder:
    """Hashed words and word pairs; thumbnails and colour histograms. Needs no weights, gives the same on every machine."""
    text_width, image_width, image_size = 512, 256, None

    def text(self, texts):
        rows = np.zeros((len(texts), self.text_width), np.float32)
        for row, text in zip(rows, texts):
            words = re.findall(r"\w+", text.lower())
            for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:])]:
                code = zlib.crc32(gram.encode())
                row[code % self.text_width] += 1 if code >> 31 else -1  # a random sign: collisions cancel on average
        rows = np.sign(rows) * np.sqrt(np.abs(rows))
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def image(self, images):
        rows = np.empty((len(images), self.image_width), np.float32)
        for row, image in zip(rows, images):
            thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32) / 255 - 0.5   # [8, 8, 3]
            cell = np.asarray(image.resize((32, 32), Image.Resampling.BOX)).reshape(-1, 3) // 64
            colours = np.bincount(cell @ (16, 4, 1), minlength=64) / len(cell)                           # [64]
            row[:192], row[192:] = thumbnail.ravel() / 8, np.sqrt(colours)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class ClipEncoder:
    """CLIP's two towers through open_clip (frozen): the projected text and image vectors; 77 tokens of a text."""

    def __init__(self, model, weights):
        import logging

        import open_clip
        import torch
        logging.disable(logging.ERROR)
        print(f"loading CLIP {model}, weights {weights} (downloaded once by open_clip)", flush=True)
        try:
            if not weights:
                raise ValueError("no weights named")  # open_clip would draw them at random
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=weights)
            self.tokenizer = open_clip.get_tokenizer(model)  # SigLIP's is a download of its own
        except Exception as error:  # open_clip raises what its hub client, torch.load or urllib raise
            reason = " ".join(str(error).split())[:90] or type(error).__name__
            raise InputError(f"CLIP {model} with weights '{weights}' cannot be loaded ({reason}): "
                             "connect to the internet once or name a weights file with --clip-weights FILE; or use "
                             "--encoder tiny, which needs none") from None
        finally:
            logging.disable(logging.NOTSET)
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.eval().to(self.device)
        self.text_width = self.image_width = self.text([""]).shape[1]
        self.image_size = 2 * max(np.atleast_1d(self.model.visual.image_size))

    def text(self, texts):
        with self.torch.inference_mode():
            return self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float().cpu().numpy()

    def image(self, images):
        with self.torch.inference_mode():
            batch = self.torch.stack([self.preprocess(image) for image in images])
            return self.model.encode_image(batch.to(self.device)).float().cpu().numpy()


def extract(dataset, what, contents, encoder, clip, data_dir, chunk=256):
    """Features of `contents` as a float16 memory map [n, d], from the cache or encoded now; '' and unreadable: NaN rows.

    The cache is keyed by all that makes it: encoder, weights, contents and FEATURES_VERSION. While it is being made it is
    a .part file, to which whole rows are appended: an interrupted extraction goes on from there.
    """
    digest = hashlib.sha256(f"{FEATURES_VERSION} {encoder} {what}".encode())
    if encoder == "clip":
        weights = Path(clip[1])
        stamp = f"{weights.stat().st_size} {weights.stat().st_mtime_ns}" if weights.is_file() else ""
        digest.update(f"{clip[0]} {clip[1]} {stamp}".encode())
    for content in contents:
        digest.update(content.encode() + b"\0")
        if what == "image" and content and (dataset.folder / content).is_file():
            stat = (dataset.folder / content).stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    path = data_dir / "features" / f"{dataset.name.replace(os.sep, '_')}-{what}-{encoder}-{digest.hexdigest()[:16]}.npy"
    if path.exists():
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            raise InputError(f"{path}: cut off or damaged; delete it and run the command again") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    model = TinyEncoder() if encoder == "tiny" else ClipEncoder(*clip)
    width = model.image_width if what == "image" else model.text_width
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (len(contents), width)})
    head, row = header.getvalue(), 2 * width
    part = path.with_suffix(".part")
    done = max(0, part.stat().st_size - len(head)) // row if part.exists() else 0
    with open(part, "r+b" if part.exists() else "wb") as file, ThreadPoolExecutor(4) as pool, \
            tqdm(total=len(contents), initial=done, desc=f"{encoder} {what}", unit="") as bar:
        file.write(head)
        file.seek(len(head) + done * row)
        for start in range(done, len(contents), chunk):
            batch = contents[start:start + chunk]
            if what == "image":
                batch = list(pool.map(lambda name: open_image(dataset.folder / name, model.image_size) if name else None,
                                      batch))
            there = [i for i, content in enumerate(batch) if content]
            rows = np.full((len(batch), width), np.nan, np.float32)
            if there:
                rows[there] = (model.image if what == "image" else model.text)([batch[i] for i in there])
            file.write(rows.astype("<f2").tobytes())
            file.flush()
            bar.update(len(batch))
    with contextlib.suppress(FileNotFoundError):  # another run that encodes the same may have renamed it already
        os.replace(part, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


# ------------------------------------------------------------------------------------------------------------------
# 6. The hand-over file, and what every script's command line shares
# ------------------------------------------------------------------------------------------------------------------

def replace_file(path, write, mode="wb"):
    """Writes a file through write(file) to a temporary name beside it and renames it: whole or not at all."""
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_outputs(*paths):
    """InputError, before anything is computed, where an output (None: not asked for) could not be written at the end."""
    paths = [path for path in paths if path is not None]
    for path in paths:
        if not path or [os.path.realpath(other) for other in paths].count(os.path.realpath(path)) > 1:
            raise InputError(f"an output path is empty or given twice ('{path}'); choose another output path")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: its folder cannot be made ({error.strerror}); choose another output path") from None
        try:
            if os.path.exists(path) and not os.path.isfile(path):  # a folder; a device, which renaming would replace
                raise OSError
            tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent).close()
        except OSError:
            raise InputError(f"{path}: is no file, or lies in a folder that cannot be written; choose another output path") from None


def save_embeddings(path, dataset, parts, user, item, meta):
    """emb.npz: user, item float32 [n, d] (user may be None), user_ids, item_ids, meta (JSON) and the split's fingerprint."""
    arrays = {"item": np.asarray(item, np.float32), "user_ids": dataset.user_ids, "item_ids": dataset.item_ids,
              "meta": np.array(json.dumps(meta)), "fingerprint": np.array(parts.fingerprint)}
    if user is not None:
        arrays["user"] = np.asarray(user, np.float32)
    replace_file(path, lambda file: np.savez(file, **arrays))


def load_embeddings(path):
    """The arrays of an emb.npz as a dict, meta decoded; InputError where the file is cut off, pickled or incomplete."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for name in ("item", "item_ids", "user_ids", "meta", "fingerprint"):
            if name not in arrays:
                raise InputError(f"{path}: no array '{name}'; it is not an emb.npz written by mmcpr.py")
        arrays["meta"], arrays["fingerprint"] = json.loads(str(arrays["meta"])), str(arrays["fingerprint"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with python mmcpr.py --out {path}") from None
    except InputError:
        raise
    except Exception:  # zipfile, zlib, pickle, json and numpy each raise their own on a damaged file
        raise InputError(f"{path}: cut off, pickled or not an .npz file; make it again with python mmcpr.py") from None
    for side in ("item", "user") if "user" in arrays else ("item",):
        table, ids = arrays[side], arrays[f"{side}_ids"]
        if table.dtype.kind != "f" or table.ndim != 2 or table.shape != (len(ids), *arrays["item"].shape[1:]) or \
                not np.isfinite(table).all():
            raise InputError(f"{path}: '{side}' is {table.dtype} {table.shape} for {len(ids)} ids, or not finite; make it again "
                             "with python mmcpr.py")
    return arrays


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with each flag's default, unless its text names it already or there is none."""

    def _get_help_string(self, action):
        return action.help if action.default is None or "default" in (action.help or "") else super()._get_help_string(action)


def non_negative(text):
    """argparse type: a whole number from 0 up."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError("must be 0 or more, and below 2^63")
    return value


def positive(text):
    """argparse type: a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def fraction(text):
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


DATA_DEFAULTS = {"data": "demo", "data_dir": "data", "min_count": 0, "sample": 0, "valid": 0.1, "split_seed": 0}


def add_data_arguments(parser):
    """The flags that say which data and which split; all default to None, so that an emb.npz can fill them in."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="demo, vg, tg, amazon:<Category>, or a folder (default: demo)")
    group.add_argument("--data-dir", help="where data is made, downloaded and cached (default: data)")
    group.add_argument("--min-count", type=non_negative, help="keep users and items with this many interactions, to the "
                       "fixpoint (default: all)")
    group.add_argument("--sample", type=non_negative, help="then draw this many interactions (default: all)")
    group.add_argument("--valid", type=fraction, help="part of the training interactions held out to choose the epoch "
                       "(default: 0.1; 0: none, the last epoch is taken)")
    group.add_argument("--split-seed", type=non_negative, help="(default: 0)")
    group.add_argument("--amazon-url", default=AMAZON_URL, help="where the Amazon 2018 release is (default: %(default)s)")


def add_feature_arguments(parser):
    group = parser.add_argument_group("features")
    group.add_argument("--encoder", choices=("auto", "clip", "tiny"), default="auto",
                       help="auto: ready .npy features if the data has them, else clip (demo: tiny)")
    group.add_argument("--clip-model", default="ViT-B-32-quickgelu", help="an open_clip model (default: %(default)s)")
    group.add_argument("--clip-weights", default="openai", help="its open_clip tag, or a file (default: %(default)s)")


def run_options(args, *without):
    """A command line's options but for the data's, which have a place of their own, and `without`."""
    return {name: value for name, value in vars(args).items() if name not in DATA_DEFAULTS and name not in without}


def open_data(args, known=None, modalities="RTVG", contents=True):
    """(Dataset, Parts, options) of a command line; `known`: an emb.npz's data options, used where no flag is given."""
    options = {name: next(value for value in (getattr(args, name), (known or {}).get(name), default) if value is not None)
               for name, default in DATA_DEFAULTS.items()}
    options["data_dir"] = os.path.abspath(options["data_dir"])
    if options["data"] not in ("demo", "sharee", *CATEGORY) and os.path.isdir(options["data"]):
        options["data"] = os.path.abspath(options["data"])  # so that an emb.npz can be used from anywhere
    dataset = load(options["data"], Path(options["data_dir"]), modalities, options["min_count"], options["sample"],
                   options["split_seed"], contents, args.amazon_url)
    return dataset, split_dataset(dataset, options["split_seed"], options["valid"]), options


def flags(options, default):
    """The options that are not the default, as a command line gives them."""
    words = lambda value: " ".join(shlex.quote(str(word)) for word in (value if isinstance(value, list) else [value]))
    return "".join(f" --{name.replace('_', '-')} {words(value)}" for name, value in options.items() if value != default[name])


def data_flags(options):
    """The same of the options of open_data."""
    return flags(options, {**DATA_DEFAULTS, "data_dir": os.path.abspath(DATA_DEFAULTS["data_dir"])})


def keep_freed_memory():
    """Tells glibc to keep what is freed: by default tables of this size go back to the system, which clears every page again
    at the next use, in every step. With another C library nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back
        libc.mallopt(-4, 0)   # M_MMAP_MAX: large blocks come from the heap too


def cli(main, argv=None):
    """Runs a script's main(argv); what the user can mend becomes one line on stderr and exit code 2. Returns the code."""
    keep_freed_memory()
    try:
        main(argv)
        sys.stdout.flush()
        return 0
    except InputError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output, `| head`, has gone: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        message = "interrupted; what was cached or written stays; run the same command again"
    except OSError as error:
        if disk_full(error):
            message = f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
        elif error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        message = "not enough memory; lower --batch or --dim"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare a data set: download, features, counts.")
    add_data_arguments(parser)
    add_feature_arguments(parser)
    args = parser.parse_args(argv)
    dataset, parts, options = open_data(args)
    features(dataset, "TVR", args.encoder, Path(options["data_dir"]), (args.clip_model, args.clip_weights))
    made = {name: getattr(args, name) for name in ("encoder", "clip_model", "clip_weights")}
    print(f"next: python mmcpr.py{data_flags(options)}{flags(made, vars(parser.parse_args([])))}")


if __name__ == "__main__":
    sys.exit(cli(main))
