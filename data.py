"""A data set by its name: its filters, its split, its features, and emb.npz, the hand-over file.

    python data.py                        make the built-in demo set and its features
    python data.py --data vg              the paper's Video Games: downloads for hours, resumable
    python data.py --data path/to/folder  check your own data (format: README)

Each command prints the counts. The only part of the paper's method here is `split` (Section
4.1.1). What the files of a folder look like, and how they are read, is in folders.py.
"""
import argparse
import functools
import hashlib
import json
import os
import shlex
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np
import scipy.sparse as sp

import disk
import encode
import pictures
from folders import TEST, TRAIN, VALID, keep, read_folder
from run import InputError


# --- The split (Section 4.1.1) ----------------------------------------------------------------

DROPPED = -1  # label of an interaction that --keep or --new-items leaves out


def split(users, seed=0, valid=0.1):
    """The part of each interaction, int8 [n]: TRAIN, VALID or TEST.

    users: int [n], the user of each interaction. Of a user's n_u interactions, a random
    floor(0.8 n_u), but at least one, go to train and the others to test (Section 4.1.1). Then a
    fraction `valid` of all training interactions, drawn uniformly, goes to validation, but each
    user keeps one to train on.
    """
    rng = np.random.default_rng(seed)
    count = np.bincount(users)  # n_u
    n_train = np.maximum(1, 4 * count // 5)
    place = random_place(users, rng)
    part = np.where(place < n_train[users], TRAIN, TEST).astype(np.int8)
    held_out = hold_out(part, place == 0, valid, rng)
    part[held_out] = VALID
    return part


def random_place(users, rng):
    """int64 [n]: each interaction's place, 0 to n_u - 1, when its user's are shuffled."""
    # Sort by user, in random order within a user. Then an interaction's place is its distance
    # from where its user starts.
    order = np.lexsort((rng.random(len(users)), users))
    count = np.bincount(users)
    start = np.cumsum(count) - count
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users), dtype=np.int64) - start[users[order]]
    return place


def hold_out(part, must_stay, valid, rng):
    """Indices of the training interactions that become validation.

    must_stay: bool [n], the one training interaction of each user that must not.
    """
    is_train = part == TRAIN
    free = np.flatnonzero(is_train & ~must_stay)
    amount = min(round(valid * np.sum(is_train)), len(free))
    return rng.choice(free, amount, replace=False)


def drop_training(part, users, share, seed):
    """The parts with only `share` of each user's training interactions, but at least one; the
    others are DROPPED. A larger share keeps all that a smaller one keeps."""
    part = part.copy()
    train = np.flatnonzero(part == TRAIN)
    place = random_place(users[train], np.random.default_rng(seed))
    count = np.bincount(users[train])
    n_kept = np.maximum(1, np.floor(share * count + 0.5))
    is_dropped = place >= n_kept[users[train]]
    part[train[is_dropped]] = DROPPED
    return part


class Parts(NamedTuple):
    """A data set after its split; the matrices are binary CSR, float32 [n_users, n_items]."""
    train: sp.csr_matrix
    valid: sp.csr_matrix
    test: sp.csr_matrix
    in_train: np.ndarray  # bool [n], in the order of dataset.users and dataset.items
    fingerprint: str      # of the training interactions, ids included
    new_items: np.ndarray | None = None  # int64: the only ones ranked at test; None: all are

    def known_items(self):
        """The items that training scores, int64; None: all of them."""
        if self.new_items is None:
            return None
        return np.setdiff1d(np.arange(self.train.shape[1], dtype=np.int64), self.new_items)


def hold_out_items(part, dataset, share, seed):
    """(part, new items int64): a share of the items is new; all their interactions go to TEST.

    New items have none left in training or validation. The test interactions of the other items
    are DROPPED, and so are all interactions of users who are left without training.
    """
    users, n_items = dataset.users, dataset.n_items
    new_items = np.random.default_rng(seed).permutation(n_items)[:round(share * n_items)]
    is_new = np.isin(dataset.items, new_items)
    part = np.where(part == TEST, DROPPED, part)
    part[is_new] = TEST
    has_training = np.isin(users, users[part == TRAIN])
    part[~has_training] = DROPPED
    return part, np.sort(new_items)


def split_dataset(dataset, seed=0, valid=0.1, share=1.0, share_new=0.0):
    """The Parts of a Dataset: its published split where it has one, otherwise ours.

    share: how much of each user's training interactions is kept, to see what less data does.
    share_new: how much of the items becomes new. New items have no interaction in training, and
    the test ranks only them.
    """
    if dataset.labels is None:
        part = split(dataset.users, seed, valid)
    else:
        part = published_split(dataset, seed, valid)
    if share < 1:
        part = drop_training(part, dataset.users, share, seed)
    new_items = None
    if share_new > 0:
        part, new_items = hold_out_items(part, dataset, share_new, seed)
        if not (np.any(part == TRAIN) and np.any(part == TEST)):
            raise InputError(f"{dataset.name}: --new-items {share_new:g} makes {len(new_items):,} "
                             f"of {dataset.n_items:,} items new, which leaves nothing to train on "
                             "or nothing to test; choose another share")
    train = interaction_matrix(dataset, part == TRAIN)
    valid_matrix = interaction_matrix(dataset, part == VALID)
    test = interaction_matrix(dataset, part == TEST)
    if not train.nnz:
        raise InputError(f"{dataset.name}: the split leaves nothing to train on: "
                         "no row is labelled train (0)")
    if not test.nnz:
        reason = "no row is labelled test (2)"
        if dataset.labels is None:
            reason = "no user has two interactions or more"
        raise InputError(f"{dataset.name}: the split leaves nothing to test: {reason}")
    if valid > 0 and not valid_matrix.nnz:
        raise InputError(f"{dataset.name}: nothing is left to validate on: "
                         "pass --valid 0 to train for a fixed number of epochs")
    n_tested = np.sum(np.diff(test.indptr) > 0)
    of_new = "" if new_items is None else f" on {len(new_items):,} new items"
    print(f"split: {train.nnz:,} training, {valid_matrix.nnz:,} validation, {test.nnz:,} test "
          f"interactions; {n_tested:,} users are tested{of_new}", flush=True)
    return Parts(train, valid_matrix, test, part == TRAIN, fingerprint(dataset, train), new_items)


def published_split(dataset, seed, valid):
    """The data's own labels. Where none is VALID, a fraction `valid` of TRAIN becomes VALID; where
    `valid` is 0, VALID becomes TRAIN."""
    part = dataset.labels.copy()
    if valid == 0:
        part[part == VALID] = TRAIN
    elif not np.any(part == VALID):
        rng = np.random.default_rng(seed)
        train = rng.permutation(np.flatnonzero(part == TRAIN))
        # Each user's first interaction in this random order stays in training.
        _, one_each = np.unique(dataset.users[train], return_index=True)
        must_stay = np.zeros(len(part), bool)
        must_stay[train[one_each]] = True
        held_out = hold_out(part, must_stay, valid, rng)
        part[held_out] = VALID
    return part


def interaction_matrix(dataset, chosen):
    """The interactions where `chosen`, bool [n], is True: binary CSR [n_users, n_items]."""
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
    # As 64-bit little-endian numbers, so that SciPy's index type and the machine do not matter.
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
         contents=True, url=None, min_rating=None, may_make=True):
    """The Dataset that --data names; makes or downloads what is not there.

    data: demo, vg, tg, amazon:<Category>, or a folder. modalities: what will be used; images are
    downloaded only for V. min_rating, min_count, sample, seed: the filters --min-rating,
    --min-count and --sample, in this order. contents=False: the interactions alone. url: where
    the Amazon release is.
    """
    dataset = find_dataset(data, data_dir, modalities, contents, url, min_rating, may_make)
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


def find_dataset(data, data_dir, modalities, contents, url, min_rating, may_make):
    """The Dataset that --data names, before --min-count and --sample."""
    if data == "demo":
        folder = data_dir / "demo"
        if may_make:
            import demo
            disk.make_folder(folder, {"generator": demo.DEMO_VERSION}, demo.write_demo)
        check_is_made(folder, data)
        dataset = read_folder(folder, contents, min_rating)
        # Set here and not by the name: a user's own folder may be called demo too, and gets CLIP.
        dataset.encoder = "tiny"
        return dataset
    if data in CATEGORY or data.startswith("amazon:"):
        category = CATEGORY.get(data, data.removeprefix("amazon:"))
        folder = data_dir / "amazon" / category
        if may_make:
            import amazon
            import download
            amazon.prepare(category, data_dir / "amazon", url or amazon.AMAZON_URL)
            # Pictures take hours, so they are fetched only for those who use them.
            if contents and "V" in modalities:
                download.fetch_images(folder)
        check_is_made(folder, data)
        return read_folder(folder, contents, min_rating)
    if data == "sharee":
        raise InputError(
            "sharee: the paper's private data set cannot be downloaded; put data of that kind "
            "into a folder with interactions.csv (user,item) and items.csv (item,text,image) and "
            "pass --data FOLDER --min-count 10 --sample 500000, the paper's filter")
    if not os.path.exists(data):
        raise InputError(f"--data {data}: no such folder, and not one of "
                         "demo, vg, tg, amazon:<Category>")
    return read_folder(Path(data), contents, min_rating)


def check_is_made(folder, data):
    """InputError where a data set that would have to be made or downloaded is not there."""
    if not (folder / "source.json").is_file():
        raise InputError(f"{folder}: {data} is not there, and for an emb.npz nothing is made or "
                         f"downloaded; pass --data {data} to make it in ./data, or say by "
                         "--data-dir where it is")


def report_counts(dataset, paper):
    """Prints the data set's size, and the size in the paper if the paper has this data set."""
    n = len(dataset.users)
    sparsity = 1 - n / dataset.n_users / dataset.n_items
    line = (f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
            f"{n:,} interactions, {100 * sparsity:.2f} % sparse")
    if paper:
        n_users, n_items, n_interactions = paper
        line += (f"; the paper's Table 1: {n_users:,} users, {n_items:,} items, "
                 f"{n_interactions:,} interactions")
    print(line, flush=True)


def k_core(users, items, count):
    """Indices of the interactions left when users and items with fewer than `count` are removed.

    Removing some leaves others with fewer, so this repeats until all that are left have enough.
    """
    rows = np.arange(len(users), dtype=np.int64)
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


def features(dataset, modalities, encoder="auto", data_dir=Path("data"), clip=CLIP,
             device="auto"):
    """{modality: float [n_items, d_m], for "R" [n_interactions, d_m]}, NaN rows where missing.

    modalities: any letters of T (description), V (image), R (review). encoder: "tiny" or "clip"
    encodes the contents; "auto" takes the ready .npy files where the data set has them, and
    encodes the rest with CLIP, or with tiny for the built-in demo. device: where CLIP runs.
    """
    ready = {}
    if encoder == "auto":
        ready, encoder = dataset.ready, dataset.encoder
    device = run.device_name(device)
    load_once = functools.cache(encode.load_encoder)
    made = {}
    for modality, what in CONTENT.items():
        if modality not in modalities:
            continue
        if modality in dataset.ready and modality not in ready:
            name = dataset.ready[modality][0].name
            print(f"{what}: {name} is not used with --encoder {encoder}; with --encoder auto "
                  "it would be")
        contents = None
        if modality in ready:
            path, rows = ready[modality]
            table = np.load(path, mmap_mode="r", allow_pickle=False)
            # Indexing copies: where all rows are used, in order, the table stays on disk.
            if not np.array_equal(rows, np.arange(len(table), dtype=np.int64)):
                table = table[rows]
        else:
            contents = contents_of(dataset, modality)
            if contents is None:
                print(f"{what}: none in this data", flush=True)
                continue
            table = encode.extract(dataset, what, contents, encoder, clip, data_dir,
                                   device=device, load=load_once)
        is_missing = missing_rows(table)
        report_features(dataset, modality, table, is_missing, contents)
        if not is_missing.all():
            made[modality] = table
    return made


def shuffled(features, seed):
    """A control: contents are permuted among items, and reviews among interactions.

    An item's text and image move together, so that CIMA still has its pairs. Reviews of held-out
    interactions move too, but to random users, so they say nothing of who wrote them.
    """
    permuted = {}
    for modality, table in features.items():
        # The same seed for each table: the tables with a row per item are permuted alike.
        order = np.random.default_rng(seed).permutation(len(table))
        permuted[modality] = table[order]
    return permuted


def contents_of(dataset, modality):
    """What an encoder reads: list of str, '' where one is missing; None if all are missing."""
    contents = {"T": dataset.texts, "V": dataset.images, "R": dataset.reviews}[modality]
    return contents if contents is not None and any(contents) else None


def missing_rows(table):
    """bool [n]: whether a row is all NaN, or all 0, which has no direction."""
    is_missing = np.empty(len(table), bool)
    block_rows = 1 << 14  # a table on disk may be larger than memory
    for start in range(0, len(table), block_rows):
        block = table[start:start + block_rows]
        # A row is either all NaN or has no NaN, so one column is enough to see it.
        is_missing[start:start + block_rows] = np.isnan(block[:, 0]) | ~block.any(1)
    return is_missing


def report_features(dataset, modality, table, is_missing, contents):
    """Prints how wide a modality's features are, how many rows lack it, and why."""
    rows = "interactions" if modality == "R" else "items"
    line = (f"{CONTENT[modality]}: {table.shape[1]}-d; "
            f"{np.sum(is_missing):,} of {len(is_missing):,} {rows} have none")
    if modality == "V" and contents is not None:
        unread = [name for name, value in zip(contents, table[:, 0]) if name and np.isnan(value)]
        if unread:
            reason = pictures.why_unreadable(dataset.folder / unread[0])
            line += f" ({len(unread):,} unreadable, the first {unread[0]}: {reason})"
    print(line, flush=True)


# --- emb.npz: what pre-training hands over ----------------------------------------------------

def save_embeddings(path, dataset, parts, user, item, meta):
    """Writes emb.npz: user and item float32 [n, d], user_ids, item_ids, meta, fingerprint.

    user may be None. meta: a dict, stored as JSON. The fingerprint is of the training
    interactions: finetune.py refuses others, so that no table is tested on what it was trained on.
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
    disk.write_file(path, lambda file: np.savez(file, **arrays))


REQUIRED = ("item", "item_ids", "user_ids", "meta", "fingerprint")  # a method may have no "user"


def load_embeddings(path):
    """The arrays of an emb.npz as a dict, meta decoded; InputError where it cannot be used."""
    disk.check_is_file(path)
    try:
        check_unpacked_size(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*REQUIRED, "user") if name in file.files}
        for name in REQUIRED:
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
    except MemoryError:
        raise InputError(f"{path}: not enough memory for its tables") from None
    except Exception as error:  # zipfile, zlib, pickle, json and numpy each raise their own
        if run.is_machine_fault(error):
            raise
        raise InputError(f"{path}: cut off, pickled or not an .npz file; "
                         "make it again with python mmcpr.py") from None
    check_meta(path, arrays["meta"])
    for side in ("item", "user"):
        if side in arrays:
            check_table(path, arrays, side)
    return arrays


def check_unpacked_size(path):
    """InputError for an archive that would unpack to far more than its own size."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        n_bytes = sum(member.file_size for member in members)
        # mmcpr.py itself writes its archives without compression.
        if n_bytes > max(1 << 28, 20 * os.path.getsize(path)):
            raise InputError(f"{path}: {os.path.getsize(path) / 1e6:.0f} MB that unpack to "
                             f"{n_bytes / 1e9:.1f} GB; make it again with python mmcpr.py")
        for member in members:
            with archive.open(member) as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            # NumPy would set memory aside for whatever the header says.
            if np.prod(shape, dtype=float) * dtype.itemsize > member.file_size:
                raise ValueError("the header tells of more than there is")


def check_meta(path, meta):
    """InputError where a value that finetune.py takes from meta is not as we would write it."""
    remedy = "make it again with python mmcpr.py"
    if not isinstance(meta, dict):
        raise InputError(f"{path}: its meta is no JSON object; {remedy}")
    for name in ("data", "report"):
        if not isinstance(meta.get(name, {}), dict):
            raise InputError(f"{path}: '{name}' in its meta is no JSON object; {remedy}")
    for name, value in meta.get("data", {}).items():
        if name in DATA_DEFAULTS and value is not None and not is_data_option(name, value):
            raise InputError(f"{path}: {name} is {str(value)[:40]!r} in its meta; {remedy}")


def check_table(path, arrays, side):
    """InputError unless a table is finite floats, has a row for each id and the items' width."""
    table, ids = arrays[side], arrays[f"{side}_ids"]
    if ids.dtype.kind != "U" or ids.ndim != 1:
        raise InputError(f"{path}: '{side}_ids' is {ids.dtype} {ids.shape}, not a list of texts; "
                         "make it again with python mmcpr.py")
    shape = (len(ids), *arrays["item"].shape[1:])
    is_table = table.dtype.kind == "f" and table.ndim == 2 and table.shape == shape
    if not is_table or not np.isfinite(table).all():
        raise InputError(
            f"{path}: '{side}' is {table.dtype} {table.shape} for {len(ids)} ids, "
            "or not finite; make it again with python mmcpr.py")


# --- The command line -------------------------------------------------------------------------

DATA_DEFAULTS = {
    "data": "demo", "data_dir": "data", "min_rating": None, "min_count": 0, "sample": 0,
    "valid": 0.1, "keep": 1.0, "new_items": 0.0, "split_seed": 0,
}


def number(text):
    """argparse type: a finite number."""
    value = float(text)
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError("must be finite")
    return value


def is_data_option(name, value):
    """Whether an emb.npz's value is one that the flag would take."""
    if name in ("data", "data_dir"):
        return isinstance(value, str)
    parse = {"min_rating": number, "valid": run.fraction, "keep": run.fraction,
             "new_items": run.fraction}.get(name, run.non_negative)
    try:
        parse(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return True


def add_data_arguments(parser):
    """Adds the flags for the data and its split. One not given is None: emb.npz may say it."""
    group = parser.add_argument_group(
        "data", "finetune.py --init FILE takes what is not given from FILE; else the defaults hold")
    group.add_argument("--data", help="demo, vg, tg, amazon:<Category>, or a folder "
                       "(default: demo)")
    group.add_argument("--data-dir", help="where data is made, downloaded and cached "
                       "(default: data)")
    group.add_argument("--min-rating", type=number, metavar="R",
                       help="keep interactions rated R or more, with the users and items that have "
                       "any (default: all)")
    group.add_argument("--min-count", type=run.non_negative, help="keep users and items with this "
                       "many interactions, again and again until all have (default: all)")
    group.add_argument("--sample", type=run.non_negative, help="then draw this many interactions "
                       "(default: all)")
    group.add_argument("--valid", type=run.fraction, help="part of the training interactions held "
                       "out to choose the epoch (default: 0.1; 0: none, the last epoch is taken)")
    group.add_argument("--keep", type=run.fraction, metavar="SHARE", help="train on this share of "
                       "each user's training interactions, at least one (default: all)")
    group.add_argument("--new-items", type=run.fraction, metavar="SHARE", help="test on this share "
                       "of the items, without any interaction in training (default: none)")
    group.add_argument("--split-seed", type=run.non_negative, help="seed of the split, and of "
                       "--sample, --keep and --new-items (default: 0)")
    group.add_argument("--amazon-url", help="where the Amazon 2018 release is "
                       "(default: AMAZON_URL in amazon.py)")


ENCODING = ("encoder", "clip_model", "clip_weights")  # the options of add_feature_arguments


def add_feature_arguments(parser):
    """Adds the flags for the encoders."""
    group = parser.add_argument_group("features")
    group.add_argument("--encoder", choices=("auto", "clip", "tiny"), default="auto",
                       help="auto: ready .npy features if the data has them, else clip "
                       "(demo: tiny)")
    group.add_argument("--clip-model", default=CLIP[0],
                       help="an open_clip model (default: %(default)s)")
    group.add_argument("--clip-weights", default=CLIP[1],
                       help="its open_clip tag, or a file (default: %(default)s)")


# Options that do not change what is trained: where files go, what else is written, resuming.
BESIDE = ("out", "metrics", "per_user", "recommend", "top", "all_seen", "resume",
          "checkpoint_every")


def training_options(args, *without):
    """A command line's options, except the data's (kept apart), BESIDE and `without`."""
    options = {}
    for name, value in vars(args).items():
        if name not in (*DATA_DEFAULTS, "amazon_url", *BESIDE, *without):
            options[name] = value
    return options


def open_data(args, data_options=None, modalities="RTVG", contents=True):
    """(Dataset, Parts, data options) of a command line.

    data_options: those in an emb.npz's meta, which hold where a flag is not given.
    """
    stored = data_options or {}
    data_options = dict(DATA_DEFAULTS)
    for name in DATA_DEFAULTS:
        # A flag that is given comes first, then what emb.npz was made with, then the default.
        if stored.get(name) is not None:
            data_options[name] = stored[name]
        if getattr(args, name) is not None:
            data_options[name] = getattr(args, name)
    # An emb.npz may come from a stranger. It may say what is read, but nothing is downloaded or
    # written at its word: data that is not there is made only for a --data on the command line.
    may_make = args.data is not None or not stored
    # A --data given here is looked for in ./data, not in the folder that emb.npz names.
    if args.data is not None and args.data_dir is None:
        data_options["data_dir"] = DATA_DEFAULTS["data_dir"]
    # Whole paths, so that an emb.npz can be used from any working directory.
    data_options["data_dir"] = os.path.abspath(data_options["data_dir"])
    if data_options["data"] not in BUILT_IN and os.path.isdir(data_options["data"]):
        data_options["data"] = os.path.abspath(data_options["data"])
    try:
        dataset = load(
            data_options["data"], Path(data_options["data_dir"]), modalities,
            min_count=data_options["min_count"], sample=data_options["sample"],
            seed=data_options["split_seed"], contents=contents, url=args.amazon_url,
            min_rating=data_options["min_rating"], may_make=may_make)
    except MemoryError:
        raise InputError(f"{data_options['data']}: not enough memory to read it") from None
    parts = split_dataset(dataset, data_options["split_seed"], data_options["valid"],
                          data_options["keep"], data_options["new_items"])
    return dataset, parts, data_options


def data_flags(data_options):
    """The flags that name the same data and split on a command line."""
    defaults = DATA_DEFAULTS | {"data_dir": os.path.abspath(DATA_DEFAULTS["data_dir"])}
    del defaults["data"]  # it is always named
    return f" --data {shlex.quote(data_options['data'])}" + changed_flags(data_options, defaults)


def changed_flags(options, defaults):
    """The options that differ from `defaults`, as flags of a command line."""
    flags = ""
    for name, default in defaults.items():
        if options[name] != default:
            flags += f" --{name.replace('_', '-')} {shlex.quote(str(options[name]))}"
    return flags


def main(argv=None):
    parser = run.parser("Prepare a data set: download, features, counts.")
    add_data_arguments(parser)
    add_feature_arguments(parser)
    parser.add_argument("--device", type=run.device_name, default="auto", help="CLIP's")
    args = parser.parse_args(argv)
    dataset, parts, data_options = open_data(args)
    features(dataset, "TVR", args.encoder, Path(data_options["data_dir"]),
             (args.clip_model, args.clip_weights), args.device)
    encoding = {name: parser.get_default(name) for name in ENCODING}
    flags = data_flags(data_options) + changed_flags(vars(args), encoding)
    print(f"next: python mmcpr.py{flags}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
