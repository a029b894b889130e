"""A data set: its folder, its split, its features, and emb.npz, the hand-over file.

    python data.py                        make the built-in demo set and its features
    python data.py --data vg              the paper's Video Games: downloads for hours, resumable
    python data.py --data path/to/folder  check your own data (format: README)

Each prints the counts. Of the paper's method only `split` is here (its section 4.1.1).
"""
import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

import run
from encode import extract
from run import InputError

TRAIN, VALID, TEST = 0, 1, 2


@dataclass
class Dataset:
    """Unique interactions with their ids, and where each modality's content is.

    Of a content '' means that there is none, and None that the data has no such column.
    """
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
    ready: dict = field(default_factory=dict)  # {modality: (feature file, its rows that are ours)}

    @property
    def n_users(self):
        return len(self.user_ids)

    @property
    def n_items(self):
        return len(self.item_ids)


# --- Reading: a folder of CSV files, or one of MMRec's ----------------------------------------

def read_folder(folder, contents=True):
    """A folder data set: interactions.csv, items.csv, and ready .npy features.

    interactions.csv: user, item[, review]. items.csv: item[, text][, image]. item_text.npy,
    item_image.npy: one row per row of items.csv; review.npy: one per row of interactions.csv.
    contents=False: texts, image paths and reviews are not kept.
    """
    path = folder / "interactions.csv"
    not_kept = () if contents else ("review", "text", "image")
    columns = read_csv(path, ("user", "item"), ("review",), skip=not_kept)
    user_ids, users = index_of(columns["user"])
    ready = {}
    if (folder / "items.csv").exists():
        catalogue = read_csv(folder / "items.csv", ("item",), ("text", "image"), skip=not_kept)
        item_ids, items = look_up(columns["item"], catalogue["item"], path, folder / "items.csv")
        check_image_paths(catalogue.get("image", ()), folder / "items.csv")
        add_ready(ready, "T", folder / "item_text.npy", len(item_ids))
        add_ready(ready, "V", folder / "item_image.npy", len(item_ids))
    else:
        # Without the catalogue nobody knows which row is which item's.
        for name in ("item_text.npy", "item_image.npy"):
            if (folder / name).exists():
                raise InputError(f"{folder / name}: its rows are those of items.csv, "
                                 "which is not there; add it (column: item)")
        print(f"{folder.name}: no items.csv: no descriptions, no images")
        catalogue = {}
        item_ids, items = index_of(columns["item"])
    add_ready(ready, "R", folder / "review.npy", len(users))
    dataset = Dataset(
        folder.name, folder, user_ids, item_ids, users, items, texts=catalogue.get("text"),
        images=catalogue.get("image"), reviews=columns.get("review"), ready=ready)
    return merge_duplicates(dataset)


def read_mmrec(path):
    """An MMRec folder: <name>.inter (userID itemID ... x_label), text_feat.npy, image_feat.npy."""
    columns = read_csv(path, ("userID", "itemID", "x_label"), delimiter="\t")
    numbers = {}
    for name, values in columns.items():
        for row, value in enumerate(values, 1):
            if not re.fullmatch("[0-9]{1,7}", value):
                raise InputError(f"{path}: data row {row}: {name} '{value}' "
                                 "is not a whole number from 0 to 9,999,999")
        numbers[name] = np.array(list(map(int, values)), np.int64)
    labels = numbers["x_label"]
    if labels.max() > TEST:
        row = int(np.argmax(labels > TEST))
        raise InputError(f"{path}: data row {row + 1}: x_label {labels[row]} "
                         "is none of 0 (train), 1 (valid), 2 (test)")
    user_ids, users = np.unique(numbers["userID"], return_inverse=True)
    # The feature files have a row for each number, also for items that nobody has.
    n_items = int(numbers["itemID"].max()) + 1
    ready = {}
    add_ready(ready, "T", path.parent / "text_feat.npy", n_items)
    add_ready(ready, "V", path.parent / "image_feat.npy", n_items)
    dataset = Dataset(
        path.stem, path.parent, user_ids.astype(str), np.arange(n_items).astype(str),
        users.astype(np.int64), numbers["itemID"], labels.astype(np.int8), ready=ready)
    return merge_duplicates(dataset)


def read_csv(path, required, optional=(), delimiter=",", skip=()):
    """Columns of a UTF-8 CSV file with a header: {name: [str]}; those in `skip` are not kept.

    InputError: no such file, not UTF-8, empty, a column is missing, a row with too few or too
    many fields. Columns that are neither required nor optional are named in a printed line.
    """
    path = Path(path)
    with open_csv(path, delimiter) as reader:
        header = next(reader, None)
        check_header(path, header, required, delimiter)
        # A misspelt optional column would be lost in silence, so what is not read is named.
        read = [name for name in header if name in required or name in optional]
        unread = [name for name in header if name not in read]
        if unread:
            print(f"{path.parent.name}: {path.name} has {', '.join(read)} "
                  f"(not read: {', '.join(unread)})")
        # For each column that is kept: where its values go, and their place in a row.
        columns, take = {}, []
        for name in read:
            if name not in skip:
                columns[name] = []
                take.append((columns[name].append, header.index(name)))
        n_fields = len(header)
        for row in reader:
            if len(row) == n_fields:
                for append, position in take:
                    append(row[position])
            elif row:  # a blank line is no row
                raise InputError(f"{path}, row {bad_row(path, delimiter, n_fields)}: "
                                 f"{len(row)} fields, the header has {n_fields}; "
                                 "quote a field that contains the separator")
    for name in required:
        if "" in columns[name]:
            row = columns[name].index("") + 1
            raise InputError(f"{path}: data row {row} has no {name}; fill it in or remove the row")
    if not columns[required[0]]:
        raise InputError(f"{path}: the header is there, but no row follows it")
    return columns


@contextlib.contextmanager
def open_csv(path, delimiter):
    """The csv.reader of a file, whose errors become InputError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield csv_reader(file, delimiter)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}, row {bad_line(path)}: not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, row {bad_row(path, delimiter)}: {error}; mend that row: "
                         "quotes closed, a quote inside a field doubled") from None


def csv_reader(file, delimiter):
    csv.field_size_limit(1 << 27)  # Python's own limit is 128 KiB, less than some reviews have
    if delimiter == ",":
        return csv.reader(file, strict=True)
    return csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def bad_row(path, delimiter, n_fields=None):
    """The line where the row starts that cannot be read, or has not n_fields fields.

    A quote that is not closed is noticed at the end of the file only: the row's start helps more.
    """
    line = 1
    with (open(path, encoding="utf-8-sig", newline="") as file,
          contextlib.suppress(csv.Error)):
        reader = csv_reader(file, delimiter)
        for row in reader:
            if row and n_fields is not None and len(row) != n_fields:
                break
            line = reader.line_num + 1
    return line


def check_header(path, header, required, delimiter):
    """InputError where the header lacks a required column or has one twice."""
    if not header:
        raise InputError(f"{path}: the file is empty; its first line must be the header "
                         f"{delimiter.join(required)}")
    for name in required:
        if name not in header:
            remedy = f"its columns are {', '.join(header)}"
            if delimiter == "," and re.search("[;\t]", header[0]):
                remedy = "separate the columns by commas"
            raise InputError(f"{path}, row 1: no column '{name}'; {remedy}")
    if len(set(header)) < len(header):
        raise InputError(f"{path}, row 1: a column name occurs twice in {', '.join(header)}; "
                         "remove one")


def bad_line(path):
    """The number of the line nearest the top that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number


def index_of(names):
    """(ids in the order in which they appear, int64 index of each name)."""
    table = {}
    index = (table.setdefault(name, len(table)) for name in names)
    index = np.fromiter(index, np.int64, len(names))
    return np.array(list(table)), index


def look_up(names, catalogue, path, catalogue_path):
    """(ids of the catalogue, int64 index of each name); InputError: unknown or listed twice."""
    row_of = {}
    for row, name in enumerate(catalogue):
        if name in row_of:
            raise InputError(f"{catalogue_path}: data row {row + 1} lists item '{name}' "
                             "a second time; remove one of them")
        row_of[name] = row
    # Checked before the array is made, so that the message can name the row.
    for row, name in enumerate(names, 1):
        if name not in row_of:
            raise InputError(f"{path}: data row {row} has item '{name}', which is not in "
                             f"{catalogue_path.name}; add it there or remove the row")
    index = np.fromiter((row_of[name] for name in names), np.int64, len(names))
    return np.array(catalogue), index


def check_image_paths(images, path):
    """InputError where a path of an image leads out of the data set's folder."""
    for row, name in enumerate(images, 1):
        if not name:
            continue
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
            raise InputError(f"{path}: data row {row}: image '{name}' leaves the folder; "
                             "use a path inside it")


def add_ready(ready, modality, path, n_rows):
    """Notes a ready feature file, checked, where there is one."""
    if path.exists():
        check_features(path, n_rows)
        ready[modality] = (path, np.arange(n_rows))


def check_features(path, n_rows):
    """InputError that names what is wrong with a feature file's shape, dtype or values."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:90]
        raise InputError(f"{path}: not a readable .npy array ({reason}); "
                         "save it again with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an .npz archive; save one array with numpy.save")
    is_float = array.dtype in (np.float16, np.float32, np.float64)
    if not is_float or array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{path}: {array.dtype} {array.shape}; a feature file is a 2-d array "
                         "of float16, float32 or float64")
    if len(array) != n_rows:
        raise InputError(f"{path}: {len(array):,} rows, but {n_rows:,} are needed, "
                         "one for each row of the data; make it again")
    for start in range(0, n_rows, 1 << 14):
        # In blocks, as a file may be larger than memory.
        block = np.asarray(array[start:start + (1 << 14)])
        is_nan = np.isnan(block)
        infinite = np.isinf(block).any(1)
        partly_nan = is_nan.any(1) & ~is_nan.all(1)
        for bad, what in ((infinite, "infinities"), (partly_nan, "some NaN, not all")):
            if bad.any():
                row = start + int(np.argmax(bad)) + 1
                raise InputError(f"{path}: data row {row} has {what}; a row is finite, "
                                 "or NaN throughout where the modality is missing")


def merge_duplicates(dataset):
    """Each (user, item) pair once: the earliest row stays, with its review."""
    # In 64 bits: users times items are more than 2^31 on the paper's larger sets.
    keys = dataset.users * np.int64(dataset.n_items) + dataset.items
    _, rows = np.unique(keys, return_index=True)
    # np.unique gives the rows in the order of the keys; the file's order stays.
    rows.sort()
    n_merged = len(keys) - len(rows)
    if n_merged:
        print(f"{dataset.name}: {n_merged:,} duplicate pairs merged (the earliest kept)")
    return keep(dataset, rows)


# --- The split: of each user a fifth to test, then a tenth of the rest to validation ----------

def split(users, seed=0, valid=0.1):
    """The part of each interaction, int8 [n]: TRAIN, VALID or TEST.

    users: int [n], the user of each interaction. Of a user's n_u interactions floor(n_u / 5) go
    to test, at random. Of all that is left the fraction `valid`, drawn uniformly, goes to
    validation, but each user keeps one interaction to train on.
    """
    rng = np.random.default_rng(seed)
    count = np.bincount(users)  # n_u
    # Sort by user, in random order within a user. Then an interaction's place, its distance from
    # where its user starts, is a random number from 0 to n_u - 1.
    order = np.lexsort((rng.random(len(users)), users))
    start = np.cumsum(count) - count
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users)) - start[users[order]]
    is_test = place < count[users] // 5
    # The last place is never tested, and so it can be the one that stays.
    is_last = place == count[users] - 1
    part = np.where(is_test, TEST, TRAIN).astype(np.int8)
    part[hold_out(part, is_last, valid, rng)] = VALID
    return part


def hold_out(part, must_stay, valid, rng):
    """Indices of the training interactions that become validation.

    must_stay: bool [n], the one interaction of each user that cannot.
    """
    is_train = part == TRAIN
    free = np.flatnonzero(is_train & ~must_stay)
    amount = min(round(valid * np.sum(is_train)), len(free))
    return rng.choice(free, amount, replace=False)


class Parts(NamedTuple):
    """A data set, split: binary CSR matrices float32 [n_users, n_items], and more of training."""
    train: sp.csr_matrix
    valid: sp.csr_matrix
    test: sp.csr_matrix
    in_train: np.ndarray  # bool [n], in the order of dataset.users and dataset.items
    fingerprint: str      # of the training interactions, ids included


def split_dataset(dataset, seed=0, valid=0.1):
    """The Parts of a Dataset: its published split where it has one, otherwise ours."""
    if dataset.labels is None:
        part = split(dataset.users, seed, valid)
    else:
        part = published_split(dataset, seed, valid)
    train = interaction_matrix(dataset, part == TRAIN)
    held_out = interaction_matrix(dataset, part == VALID)
    test = interaction_matrix(dataset, part == TEST)
    if not train.nnz:
        raise InputError(f"{dataset.name}: the split leaves nothing to train on: "
                         "no row has x_label 0")
    if not test.nnz:
        no_labels = dataset.labels is None
        reason = "no user has 5 interactions or more" if no_labels else "no row has x_label 2"
        raise InputError(f"{dataset.name}: the split leaves nothing to test: {reason}")
    if valid > 0 and not held_out.nnz:
        raise InputError(f"{dataset.name}: nothing is left to validate on: "
                         "pass --valid 0 to train for a fixed number of epochs")
    n_tested = np.sum(np.diff(test.indptr) > 0)
    print(f"split: {train.nnz:,} training, {held_out.nnz:,} validation, {test.nnz:,} test "
          f"interactions; {n_tested:,} users are tested", flush=True)
    return Parts(train, held_out, test, part == TRAIN, fingerprint(dataset, train))


def published_split(dataset, seed, valid):
    """The data's own labels; where none is VALID, `valid` of the training interactions get it."""
    part = dataset.labels.copy()
    if valid == 0:
        part[part == VALID] = TRAIN
    elif not np.any(part == VALID):
        rng = np.random.default_rng(seed)
        train = rng.permutation(np.flatnonzero(part == TRAIN))
        # In this random order the one that each user's row starts with stays.
        _, one_each = np.unique(dataset.users[train], return_index=True)
        must_stay = np.zeros(len(part), bool)
        must_stay[train[one_each]] = True
        part[hold_out(part, must_stay, valid, rng)] = VALID
    return part


def interaction_matrix(dataset, chosen):
    """The chosen interactions, bool [n], as a binary CSR matrix [n_users, n_items]."""
    pairs = dataset.users[chosen], dataset.items[chosen]
    ones = np.ones(np.sum(chosen), np.float32)
    matrix = sp.csr_matrix((ones, pairs), shape=(dataset.n_users, dataset.n_items))
    matrix.sort_indices()
    return matrix


def fingerprint(dataset, train):
    """SHA-256 of the ids and the training interactions: same fingerprint, same training data."""
    digest = hashlib.sha256()
    for ids in (dataset.user_ids, dataset.item_ids):
        digest.update("\n".join(ids).encode() + b"\0")
    # As 64-bit little-endian numbers: SciPy's index type and the machine do not matter.
    for array in (train.indptr, train.indices):
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


# --- Loading: any data set by its name, filtered ----------------------------------------------

CATEGORY = {"vg": "Video_Games", "tg": "Toys_and_Games"}
BUILT_IN = ("demo", "sharee", *CATEGORY)
PAPER_TABLE_1 = {  # users, items, interactions
    "vg": (55_217, 17_389, 472_586),
    "tg": (208_143, 78_698, 1_754_420),
}


def load(data, data_dir=Path("data"), modalities="RTVG", min_count=0, sample=0, seed=0,
         contents=True, url=None):
    """The Dataset that --data names; makes or downloads what is not there.

    data: demo, vg, tg, amazon:<Category>, or a folder. modalities: what will be used; images are
    downloaded for V only. min_count, sample, seed: the filters --min-count and --sample.
    contents=False: the interactions alone. url: where the Amazon release is.
    """
    dataset = find_dataset(data, data_dir, modalities, contents, url)
    # The paper's names rather than the folder's: vg, not Video_Games.
    if data in BUILT_IN:
        dataset.name = data
    if min_count:
        rows = k_core(dataset.users, dataset.items, min_count)
        dataset = keep(dataset, rows, drop_empty=True)
    n = len(dataset.users)
    if sample and sample < n:
        rows = np.random.default_rng(seed).choice(n, sample, replace=False)
        dataset = keep(dataset, np.sort(rows), drop_empty=True)
    if not len(dataset.users):
        raise InputError(f"{data}: --min-count {min_count} leaves no interaction; lower it")
    report_counts(dataset, PAPER_TABLE_1.get(data))
    return dataset


def find_dataset(data, data_dir, modalities, contents, url):
    """The Dataset that --data names, before any filter."""
    if data == "demo":
        import demo
        key = {"generator": demo.DEMO_VERSION}
        folder = run.make_folder(data_dir / "demo", key, demo.write_demo)
        return read_folder(folder, contents)
    if data in CATEGORY or data.startswith("amazon:"):
        import amazon
        category = CATEGORY.get(data, data.removeprefix("amazon:"))
        folder = amazon.prepare(category, data_dir / "amazon", url or amazon.AMAZON_URL)
        # Pictures take hours, so they are fetched only for those who use them.
        if contents and "V" in modalities:
            amazon.fetch_images(folder)
        return read_folder(folder, contents)
    if data == "sharee":
        raise InputError(
            "sharee: the paper's private data set cannot be downloaded; put data of that kind "
            "into a folder with interactions.csv (user,item) and items.csv (item,text,image) and "
            "pass --data FOLDER --min-count 10 --sample 500000, the paper's filter")
    folder = Path(data)
    if (folder / "interactions.csv").exists():
        return read_folder(folder, contents)
    mmrec_files = list(folder.glob("*.inter"))
    if len(mmrec_files) == 1:
        return read_mmrec(mmrec_files[0])
    if folder.is_dir():
        raise InputError(
            f"{folder}: neither interactions.csv nor one .inter file is in this folder")
    raise InputError(f"--data {data}: no such folder, and not one of "
                     "demo, vg, tg, sharee, amazon:<Category>")


def report_counts(dataset, paper):
    """One line with the data set's size, beside the paper's where it has this set."""
    n = len(dataset.users)
    sparsity = 1 - n / dataset.n_users / dataset.n_items
    line = (f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
            f"{n:,} interactions, {100 * sparsity:.2f} % sparse")
    if paper:
        n_users, n_items, n_interactions = paper
        line += (f"; the paper's Table 1: {n_users:,} users, {n_items:,} items, "
                 f"{n_interactions:,} interactions")
    print(line, flush=True)


def keep(dataset, rows, drop_empty=False):
    """The data set with these interactions only.

    drop_empty: also without the users and items that are left with none.
    """
    users, items = dataset.users[rows], dataset.items[rows]
    kept_users = np.arange(dataset.n_users)
    kept_items = np.arange(dataset.n_items)
    if drop_empty:
        # Sorted, so that searchsorted below gives each old index its new one.
        kept_users, kept_items = np.unique(users), np.unique(items)
    ready = {}
    for modality, (path, file_rows) in dataset.ready.items():
        ready[modality] = (path, file_rows[rows if modality == "R" else kept_items])
    return Dataset(
        dataset.name, dataset.folder,
        user_ids=dataset.user_ids[kept_users],
        item_ids=dataset.item_ids[kept_items],
        users=np.searchsorted(kept_users, users),
        items=np.searchsorted(kept_items, items),
        labels=None if dataset.labels is None else dataset.labels[rows],
        texts=take_rows(dataset.texts, kept_items),
        images=take_rows(dataset.images, kept_items),
        reviews=take_rows(dataset.reviews, rows),
        ready=ready)


def take_rows(values, rows):
    """The values of a list at these rows; None stays None."""
    return None if values is None else [values[row] for row in rows]


def k_core(users, items, count):
    """Indices of the interactions left when users and items with fewer than `count` are removed.

    Removing some leaves others with fewer, so it goes on until all that are left have enough.
    """
    rows = np.arange(len(users))
    while len(rows):
        user_count = np.bincount(users[rows])[users[rows]]
        item_count = np.bincount(items[rows])[items[rows]]
        enough = (user_count >= count) & (item_count >= count)
        if enough.all():
            break
        rows = rows[enough]
    return rows


# --- Features ---------------------------------------------------------------------------------

CLIP = ("ViT-B-32-quickgelu", "openai")  # a model of open_clip and its weights
CONTENT = {"T": "text", "V": "image", "R": "review"}


def features(dataset, modalities, encoder="auto", data_dir=Path("data"), clip=CLIP):
    """{modality: float [n_items, d_m], for "R" [n_interactions, d_m]}; a NaN row: it has none.

    modalities: letters of T (description), V (image), R (review). encoder: "tiny" or "clip"
    encodes the contents; "auto" takes the ready .npy files where the data set has them, and
    encodes the rest with CLIP (of demo: with tiny).
    """
    ready = {}
    if encoder == "auto":
        ready = dataset.ready
        encoder = "tiny" if dataset.name == "demo" else "clip"
    made = {}
    for modality, what in CONTENT.items():
        if modality not in modalities:
            continue
        contents = contents_of(dataset, modality)
        if modality in ready:
            path, rows = ready[modality]
            table = np.load(path, mmap_mode="r", allow_pickle=False)[rows]
            contents = None
        elif contents is not None:
            table = extract(dataset, what, contents, encoder, clip, data_dir)
        else:
            remark = ""
            if modality in dataset.ready:
                remark = f" for --encoder {encoder} (ready features need --encoder auto)"
            print(f"{what}: none in this data{remark}", flush=True)
            continue
        # A row is NaN throughout or not at all, so one column tells.
        is_missing = np.isnan(table[:, 0])
        report_features(modality, table.shape[1], is_missing, contents)
        if not is_missing.all():
            made[modality] = table
    return made


def contents_of(dataset, modality):
    """What an encoder reads: list of str, '' for none; None where there is nothing at all."""
    contents = {"T": dataset.texts, "V": dataset.images, "R": dataset.reviews}[modality]
    return contents if contents is not None and any(contents) else None


def report_features(modality, width, is_missing, contents):
    """One line: how wide a modality's features are, and how many have none."""
    rows = "interactions" if modality == "R" else "items"
    line = (f"{CONTENT[modality]}: {width}-d; "
            f"{np.sum(is_missing):,} of {len(is_missing):,} {rows} have none")
    if modality == "V" and contents is not None:
        n_named = len([name for name in contents if name])
        n_unread = n_named - np.sum(~is_missing)
        line += f" ({n_unread:,} images missing or unreadable)"
    print(line, flush=True)


# --- emb.npz: what pre-training hands over ----------------------------------------------------

def save_embeddings(path, dataset, parts, user, item, meta):
    """Writes emb.npz: user and item float32 [n, d], user_ids, item_ids, meta, fingerprint.

    user may be None. meta: a dict, stored as JSON. The fingerprint is that of the split's
    training interactions, so that the tables are not tested on what they were trained on.
    """
    arrays = {
        "item": np.asarray(item, np.float32),
        "user_ids": dataset.user_ids,
        "item_ids": dataset.item_ids,
        "meta": np.array(json.dumps(meta)),
        "fingerprint": np.array(parts.fingerprint),
    }
    if user is not None:
        arrays["user"] = np.asarray(user, np.float32)
    run.write_file(path, lambda file: np.savez(file, **arrays))


def load_embeddings(path):
    """The arrays of an emb.npz as a dict, meta decoded; InputError where it cannot be used."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for name in ("item", "item_ids", "user_ids", "meta", "fingerprint"):
            if name not in arrays:
                raise InputError(
                    f"{path}: no array '{name}'; it is not an emb.npz written by mmcpr.py")
        arrays["meta"] = json.loads(str(arrays["meta"]))
        arrays["fingerprint"] = str(arrays["fingerprint"])
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; make it with python mmcpr.py --out {path}") from None
    except InputError:
        raise
    except Exception:  # zipfile, zlib, pickle, json and numpy each raise their own
        raise InputError(f"{path}: cut off, pickled or not an .npz file; "
                         "make it again with python mmcpr.py") from None
    for side in ("item", "user"):
        if side in arrays:
            check_table(path, arrays, side)
    return arrays


def check_table(path, arrays, side):
    """InputError where a table is not finite floats, a row for each id, as wide as the items'."""
    table, ids = arrays[side], arrays[f"{side}_ids"]
    shape = (len(ids), *arrays["item"].shape[1:])
    is_table = table.dtype.kind == "f" and table.ndim == 2 and table.shape == shape
    if not is_table or not np.isfinite(table).all():
        raise InputError(
            f"{path}: '{side}' is {table.dtype} {table.shape} for {len(ids)} ids, "
            "or not finite; make it again with python mmcpr.py")


# --- The command line -------------------------------------------------------------------------

DATA_DEFAULTS = {
    "data": "demo", "data_dir": "data", "min_count": 0, "sample": 0, "valid": 0.1, "split_seed": 0,
}


def add_data_arguments(parser):
    """The flags for the data and its split; None where not given, so that emb.npz can say."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="demo, vg, tg, amazon:<Category>, or a folder "
                       "(default: demo)")
    group.add_argument("--data-dir", help="where data is made, downloaded and cached "
                       "(default: data)")
    group.add_argument("--min-count", type=run.non_negative, help="keep users and items with this "
                       "many interactions, to the fixpoint (default: all)")
    group.add_argument("--sample", type=run.non_negative, help="then draw this many interactions "
                       "(default: all)")
    group.add_argument("--valid", type=run.fraction, help="part of the training interactions held "
                       "out to choose the epoch (default: 0.1; 0: none, the last epoch is taken)")
    group.add_argument("--split-seed", type=run.non_negative, help="(default: 0)")
    group.add_argument("--amazon-url", help="where the Amazon 2018 release is "
                       "(default: AMAZON_URL in amazon.py)")


def add_feature_arguments(parser):
    """The flags for the encoders."""
    group = parser.add_argument_group("features")
    group.add_argument("--encoder", choices=("auto", "clip", "tiny"), default="auto",
                       help="auto: ready .npy features if the data has them, else clip "
                       "(demo: tiny)")
    group.add_argument("--clip-model", default=CLIP[0],
                       help="an open_clip model (default: %(default)s)")
    group.add_argument("--clip-weights", default=CLIP[1],
                       help="its open_clip tag, or a file (default: %(default)s)")


def training_options(args, *without):
    """A command line's options but for the data's, which are kept apart, and `without`."""
    options = {}
    for name, value in vars(args).items():
        if name not in DATA_DEFAULTS and name not in without:
            options[name] = value
    return options


def open_data(args, data_options=None, modalities="RTVG", contents=True):
    """(Dataset, Parts, data options) of a command line.

    data_options: those in an emb.npz's meta, which hold where a flag is not given.
    """
    stored = data_options or {}
    data_options = dict(DATA_DEFAULTS)
    for name in DATA_DEFAULTS:
        # A flag that is given counts, then what emb.npz was made with, then the default.
        if stored.get(name) is not None:
            data_options[name] = stored[name]
        if getattr(args, name) is not None:
            data_options[name] = getattr(args, name)
    # Whole paths, so that an emb.npz can be used from any working directory.
    data_options["data_dir"] = os.path.abspath(data_options["data_dir"])
    if data_options["data"] not in BUILT_IN and os.path.isdir(data_options["data"]):
        data_options["data"] = os.path.abspath(data_options["data"])
    dataset = load(
        data_options["data"], Path(data_options["data_dir"]), modalities,
        data_options["min_count"], data_options["sample"], data_options["split_seed"],
        contents, args.amazon_url)
    parts = split_dataset(dataset, data_options["split_seed"], data_options["valid"])
    return dataset, parts, data_options


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Prepare a data set: download, features, counts.", formatter_class=run.Help)
    add_data_arguments(parser)
    add_feature_arguments(parser)
    args = parser.parse_args(argv)
    dataset, parts, data_options = open_data(args)
    features(dataset, "TVR", args.encoder, Path(data_options["data_dir"]),
             (args.clip_model, args.clip_weights))
    name = DATA_DEFAULTS["data"] if args.data is None else args.data
    print(f"next: python mmcpr.py --data {shlex.quote(name)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
