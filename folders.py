"""A data set read from a folder: our CSV files, or those of MMRec, RecBole or LightGCN.

    interactions.csv     user,item[,review][,split][,rating]; items.csv: item[,text][,image]
    <name>.inter         of MMRec, userID itemID x_label, or RecBole, user_id:token item_id:token
    train.txt, test.txt  of LightGCN, a user and its items on each line; also valid.txt

`read_folder` reads whichever it finds and returns a `Dataset`. A fault in a file raises
InputError, which names the file, the row and the remedy: "row 5" is a file's fifth line, and
"data row 5" is the fifth row after the header.
"""
import contextlib
import csv
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import disk
from run import InputError

TRAIN, VALID, TEST = 0, 1, 2
LABELS = {"0": TRAIN, "train": TRAIN, "1": VALID, "valid": VALID, "2": TEST, "test": TEST}

FORMATS = ("what is read here is a folder with interactions.csv (header: user,item), with one "
           ".inter file of MMRec (userID<tab>itemID<tab>x_label) or RecBole "
           "(user_id:token<tab>item_id:token), or with LightGCN's train.txt and test.txt "
           "(0 12 7: a user and its items)")

MAX_ID_LENGTH = 1000      # characters; arrays of ids are as wide as the longest of them
MAX_ID_BYTES = 1 << 31    # of such an array


@dataclass
class Dataset:
    """Unique interactions with their ids, and where each modality's content is.

    texts, images, reviews: '' where there is none; None where the data has no such column.
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
    encoder: str = "clip"             # what --encoder auto takes for contents

    @property
    def n_users(self):
        return len(self.user_ids)

    @property
    def n_items(self):
        return len(self.item_ids)


# --- Which files a folder holds -----------------------------------------------------------

def read_folder(folder, contents=True, min_rating=None):
    """The Dataset in a folder, of any of the formats above.

    contents=False: texts, image paths and reviews are not kept. min_rating: interactions with a
    lower rating are left out.
    """
    if (folder / "interactions.csv").exists():
        return read_interactions(folder, contents, min_rating)
    inter_files = list(folder.glob("*.inter"))
    if len(inter_files) == 1:
        return read_inter(inter_files[0], min_rating)
    if (folder / "train.txt").exists() and (folder / "test.txt").exists():
        return read_lightgcn(folder, min_rating)
    if not folder.is_dir():
        raise InputError(f"{folder}: {describe(folder)}, where a folder is expected, perhaps "
                         f"{folder.parent}; {FORMATS}")
    seen = [describe(path) for path in sorted(folder.iterdir())[:4]]
    raise InputError(
        f"{folder}: neither interactions.csv nor one .inter file nor train.txt and test.txt is in "
        f"this folder (in it: {', '.join(seen) or 'nothing'}); {FORMATS}")


def describe(path):
    """A file's name and what it looks like, for a message."""
    if not path.is_file():
        return f"{path.name}, {disk.kind_of_file(path)}"
    with open(path, "rb") as file:
        head = file.read(4096)
    line = head.decode("utf-8-sig", "replace").partition("\n")[0].strip()
    for start, what in ((b"PAR1", "parquet"), (b"\x1f\x8b", "gzip"), (b"PK", "zip or xlsx"),
                        (b"\x89HDF", "HDF5"), (b"\x80", "a pickle")):
        if head.startswith(start):
            return f"{path.name}, {what}"
    if b"\0" in head:
        return f"{path.name}, binary"
    if "::" in line:
        return f"{path.name}, fields separated by ::"
    if is_row_of_numbers(re.split("[,;\t ]+", line)):
        return f"{path.name}, no header"
    return f"{path.name}, its first line '{line[:40]}'"


def print_not_read(folder, read):
    """Prints the names of a folder's tables that are not read: one may be misspelt."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".csv", ".npy", ".inter") and path.name not in read:
            names.append(path.name)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"{folder.name}: not read: {', '.join(names[:5])}{more}")


def is_row_of_numbers(cells):
    """Whether the cells of what should be a header are all numbers."""
    is_number = [re.fullmatch(r"-?\d+(\.\d+)?", cell.strip()) is not None for cell in cells]
    return len(cells) > 1 and all(is_number)


# --- Our CSV files ------------------------------------------------------------------------

def read_interactions(folder, contents, min_rating):
    """interactions.csv, items.csv, and ready .npy features.

    item_text.npy, item_image.npy: one row per row of items.csv; review.npy: one per row of
    interactions.csv.
    """
    path = folder / "interactions.csv"
    print_not_read(folder, ("interactions.csv", "items.csv", "item_text.npy", "item_image.npy",
                            "review.npy"))
    not_kept = () if contents else ("review", "text", "image")
    columns = read_csv(path, ("user", "item"), ("review", "split", "x_label", "rating"),
                       skip=not_kept)
    user_ids, users = index_of(columns["user"], path, "user")
    ready = {}
    if os.path.lexists(folder / "items.csv"):
        catalogue = read_csv(folder / "items.csv", ("item",), ("text", "image"), skip=not_kept)
        item_ids, items = look_up(columns["item"], catalogue["item"], path, folder / "items.csv")
        check_image_paths(catalogue.get("image", ()), folder / "items.csv")
        add_ready(ready, "T", folder / "item_text.npy", len(item_ids))
        add_ready(ready, "V", folder / "item_image.npy", len(item_ids))
    else:
        # Without items.csv nothing says which item a row belongs to.
        for name in ("item_text.npy", "item_image.npy"):
            if (folder / name).exists():
                raise InputError(f"{folder / name}: its rows are those of items.csv, "
                                 "which is not there; add it (column: item)")
        print(f"{folder.name}: no items.csv: no descriptions, no images")
        catalogue = {}
        item_ids, items = index_of(columns["item"], path, "item")
    add_ready(ready, "R", folder / "review.npy", len(users))
    dataset = Dataset(
        folder.name, folder, user_ids, item_ids, users, items, labels=read_labels(path, columns),
        texts=catalogue.get("text"), images=catalogue.get("image"),
        reviews=columns.get("review"), ready=ready)
    dataset = keep_rated(dataset, path, columns.get("rating"), min_rating)
    return merge_duplicates(dataset)


def read_labels(path, columns):
    """int8 [n], the parts that a column `split` or `x_label` names; None without such a column."""
    names = [name for name in ("split", "x_label") if name in columns]
    if not names:
        return None
    if len(names) == 2:
        raise InputError(f"{path}, row 1: both columns split and x_label; remove one")
    name = names[0]
    labels = np.empty(len(columns[name]), np.int8)
    for row, value in enumerate(columns[name]):
        label = LABELS.get(value.strip().lower())
        if label is None:
            raise InputError(f"{path}: data row {row + 1}: {name} '{value[:40]}' is none of "
                             "train, valid, test (or 0, 1, 2)")
        labels[row] = label
    print(f"{path.parent.name}: the split is that of {path.name}'s column {name}")
    return labels


def keep_rated(dataset, path, ratings, min_rating):
    """The data set with only the interactions rated min_rating or more; None keeps all.

    ratings: str [n], or None where the data has no such column.
    """
    if min_rating is None:
        if ratings is not None and len(set(ratings)) > 1:
            print(f"{dataset.name}: all ratings count as positive, as in the paper; "
                  "--min-rating R keeps those of at least R")
        return dataset
    if ratings is None:
        raise InputError(f"{path}: --min-rating needs a column of ratings; leave it out here")
    numbers = np.empty(len(ratings))
    for row, rating in enumerate(ratings):
        try:
            numbers[row] = float(rating)
        except ValueError:
            numbers[row] = np.nan
        if not np.isfinite(numbers[row]):
            raise InputError(f"{path}: data row {row + 1}: rating '{rating[:40]}' "
                             "is not a number; fill it in or remove the row")
    rows = np.flatnonzero(numbers >= min_rating)
    if not len(rows):
        raise InputError(f"{path}: no rating is {min_rating:g} or more; lower --min-rating")
    return keep(dataset, rows, drop_empty=True)


# --- MMRec's, RecBole's and LightGCN's files ----------------------------------------------

def read_inter(path, min_rating):
    """An .inter file: MMRec's with numbers and a published split, or RecBole's atomic file."""
    with open_csv(path, "\t") as reader:
        header = next(reader, None) or []
    # RecBole writes each column's type after its name.
    if any(re.fullmatch(r"\w+:(token|float)(_seq)?", name) for name in header):
        return read_recbole(path, min_rating)
    return read_mmrec(path, min_rating)


def read_mmrec(path, min_rating=None):
    """An MMRec folder: <name>.inter (userID itemID ... x_label), text_feat.npy, image_feat.npy."""
    columns = read_csv(path, ("userID", "itemID", "x_label"), ("rating",), delimiter="\t")
    numbers = {}
    for name in ("userID", "itemID", "x_label"):
        numbers[name] = np.array(whole_numbers(
            columns[name], lambda n: f"{path}: data row {n + 1}: {name}"), np.int64)
    labels = numbers["x_label"]
    if labels.max() > TEST:
        row = int(np.argmax(labels > TEST))
        raise InputError(f"{path}: data row {row + 1}: x_label {labels[row]} "
                         "is none of 0 (train), 1 (valid), 2 (test)")
    dataset = numbered_dataset(path, path.stem, numbers["userID"], numbers["itemID"], labels)
    dataset = keep_rated(dataset, path, columns.get("rating"), min_rating)
    return merge_duplicates(dataset)


def read_recbole(path, min_rating=None):
    """RecBole's atomic file: user_id:token, item_id:token[, rating:float]. It has no split."""
    print_not_read(path.parent, (path.name,))
    columns = read_csv(path, ("user_id:token", "item_id:token"), ("rating:float",), "\t")
    user_ids, users = index_of(columns["user_id:token"], path, "user")
    item_ids, items = index_of(columns["item_id:token"], path, "item")
    dataset = Dataset(path.stem, path.parent, user_ids, item_ids, users, items)
    dataset = keep_rated(dataset, path, columns.get("rating:float"), min_rating)
    return merge_duplicates(dataset)


def read_lightgcn(folder, min_rating=None):
    """LightGCN's train.txt, test.txt and, where there is one, valid.txt: a published split."""
    users, items, labels = [], [], []
    for name, label in (("train.txt", TRAIN), ("valid.txt", VALID), ("test.txt", TEST)):
        if not (folder / name).exists():
            continue
        n_before = len(items)
        with open_text(folder / name) as file:
            for row, line in enumerate(file, 1):
                where = f"{folder / name}, row {row}:"
                if row == 1 and "::" in line:
                    raise InputError(f"{where} fields separated by ::; {FORMATS}")
                numbers = whole_numbers(line.split(), lambda n: where)
                users += numbers[:1] * (len(numbers) - 1)
                items += numbers[1:]
        labels += [label] * (len(items) - n_before)
    if not items:
        raise InputError(f"{folder / 'train.txt'}: no line has a user and an item")
    dataset = numbered_dataset(
        folder / "train.txt", folder.name, np.array(users, np.int64), np.array(items, np.int64),
        np.array(labels, np.int64))
    dataset = keep_rated(dataset, folder / "train.txt", None, min_rating)
    return merge_duplicates(dataset)


def whole_numbers(texts, where):
    """The texts as a list of numbers; where(n): the start of a message about the n-th."""
    for n, text in enumerate(texts):
        if not re.fullmatch("[0-9]{1,7}", text):
            raise InputError(f"{where(n)} '{text[:40]}' is not a whole number from 0 to 9,999,999")
    return list(map(int, texts))


def numbered_dataset(path, name, users, items, labels):
    """A Dataset from numbers (users, items, labels: int64 [n]) and the folder's feature files."""
    print_not_read(path.parent, (path.name, "text_feat.npy", "image_feat.npy"))
    user_ids, users = np.unique(users, return_inverse=True)
    # An item's number is its row in the feature files. So every number up to the largest is an
    # item, also one that has no interactions.
    n_items = int(items.max()) + 1
    if n_items > 10 * len(items) + 1000:
        raise InputError(f"{path}: item {n_items - 1:,} for {len(items):,} interactions; items "
                         "are rows of a table, so number them from 0 without large gaps")
    ready = {}
    add_ready(ready, "T", path.parent / "text_feat.npy", n_items, surplus=True)
    add_ready(ready, "V", path.parent / "image_feat.npy", n_items, surplus=True)
    return Dataset(name, path.parent, user_ids.astype(str),
                   np.arange(n_items, dtype=np.int64).astype(str), users.astype(np.int64), items,
                   labels.astype(np.int8), ready=ready)


# --- Reading one file of text -------------------------------------------------------------

def read_csv(path, required, optional=(), delimiter=",", skip=()):
    """Columns of a UTF-8 CSV file with a header: {name: [str]}; those in `skip` are not kept.

    InputError: there is no such file, or it is empty or not UTF-8; a column is missing; a row
    has too few or too many fields; a required field cannot be an id. A printed line names the
    columns that are neither required nor optional.
    """
    path = Path(path)
    with open_csv(path, delimiter) as reader:
        header = [name.strip() for name in next(reader, [])]
        check_header(path, header, required, delimiter)
        # A misspelt optional column would be lost in silence, so unread columns are named.
        read = [name for name in header if name in required or name in optional]
        unread = [name or "one without a name" for name in header if name not in read]
        if unread:
            print(f"{path.parent.name}: {path.name} has {', '.join(read)} "
                  f"(not read: {', '.join(unread)})")
        # For each column that is kept: its list's append method, and its position in a row.
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
                raise InputError(f"{path}, row {bad_row(path, delimiter, n_fields)}: the header "
                                 f"has {n_fields} fields, this row {len(row)}; "
                                 "quote a field that contains the separator")
    if not columns[required[0]]:
        raise InputError(f"{path}: the header is there, but no row follows it")
    for name in required:
        check_ids(path, name, columns[name])
    return columns


def check_ids(path, name, values):
    """InputError that names the data row where an id is empty, absurdly long or has a NUL.

    Prints how many ids begin or end with a space: they count as other ids than those without.
    """
    for row, value in enumerate(values, 1):
        if not value:
            raise InputError(f"{path}: data row {row} has no {name}; fill it in or remove the row")
        if len(value) > MAX_ID_LENGTH:
            raise InputError(f"{path}: data row {row}: {name} is {len(value):,} characters long; "
                             "are the columns swapped?")
        # NumPy drops a NUL at the end of a text, so two ids could become one.
        if "\0" in value:
            raise InputError(f"{path}: data row {row}: {name} {value[:40]!r} has a NUL character; "
                             "remove it")
    with_space = [value for value in values if value != value.strip()]
    if with_space:
        print(f"{path.parent.name}: {path.name}: {len(with_space):,} rows have a {name} with a "
              f"space at an end, as {with_space[0][:40]!r}: not the same as without it")


@contextlib.contextmanager
def open_text(path):
    """A UTF-8 file opened for reading, whose errors become InputError."""
    disk.check_is_file(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}, row {bad_line(path)}: not UTF-8; save the file as UTF-8") from None


@contextlib.contextmanager
def open_csv(path, delimiter):
    """The csv.reader of a file, whose errors become InputError."""
    try:
        with open_text(path) as file:
            yield csv_reader(file, delimiter)
    except csv.Error as error:
        row = bad_row(path, delimiter)
        remedy = "mend that row: quotes closed, a quote inside a field doubled"
        if row == 1:
            remedy = f"separate the columns by commas; or {remedy}"
        raise InputError(f"{path}, row {row}: {error}; {remedy}") from None


def csv_reader(file, delimiter):
    csv.field_size_limit(1 << 27)  # Python's own limit is 128 KiB, less than some reviews have
    if delimiter == ",":
        return csv.reader(file, strict=True)
    return csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def bad_row(path, delimiter, n_fields=None):
    """The line where the first row starts that cannot be read or does not have n_fields fields.

    An unclosed quote is noticed only at the end of the file, so the row's start helps more.
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
    expected = delimiter.join(required).replace("\t", "<tab>")
    if not header:
        raise InputError(f"{path}: the file is empty; its first line must be the header "
                         f"{expected}")
    for name in required:
        if name not in header:
            remedy = f"its columns are {', '.join(header)[:200]}"
            if "::" in "".join(header):
                remedy = f"fields are separated by :: there; the header here is {expected}"
            elif is_row_of_numbers(header):
                remedy = f"no header, it seems: write {expected} as the first line"
            elif delimiter == "," and re.search("[;\t|]", header[0]):
                remedy = "separate the columns by commas"
            elif path.suffix == ".inter":
                remedy += f"; {FORMATS}"
            raise InputError(f"{path}, row 1: no column '{name}'; {remedy}")
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise InputError(f"{path}, row 1: a column name occurs twice in {', '.join(header)}; "
                         "remove one")


def bad_line(path):
    """The number of the first line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number


# --- Ids, paths and feature files ---------------------------------------------------------

def index_of(names, path, what):
    """(ids in the order of their first appearance, int64 index of each name)."""
    table = {}
    index = (table.setdefault(name, len(table)) for name in names)
    index = np.fromiter(index, np.int64, len(names))
    return id_array(list(table), path, what), index


def look_up(names, catalogue, path, catalogue_path):
    """(ids of the catalogue, int64 index of each name); InputError: unknown or listed twice."""
    row_of = {}
    for row, name in enumerate(catalogue):
        if name in row_of:
            raise InputError(f"{catalogue_path}: data row {row + 1} lists item '{name}' "
                             "a second time; remove one of them")
        row_of[name] = row
    # Checked before the array is made, so that the message can name the row.
    unknown = [row for row, name in enumerate(names) if name not in row_of]
    if unknown:
        more = f" ({len(unknown):,} such rows)" if len(unknown) > 1 else ""
        raise InputError(f"{path}: data row {unknown[0] + 1} has item '{names[unknown[0]]}', which "
                         f"is not in {catalogue_path.name}; add it there or remove the row{more}")
    index = np.fromiter((row_of[name] for name in names), np.int64, len(names))
    return id_array(catalogue, catalogue_path, "item"), index


def id_array(ids, path, what):
    """The ids as a unicode array [n]; each takes as much memory as the longest of them."""
    longest = max(ids, key=len)
    n_bytes = 4 * len(longest) * len(ids)
    if n_bytes > MAX_ID_BYTES:
        raise InputError(
            f"{path}: {len(ids):,} {what} ids, one of them {len(longest):,} characters long "
            f"('{longest[:20]}...'): {n_bytes / 1e9:.0f} GB; shorten the long ones")
    return np.array(ids)


def check_image_paths(images, path):
    """InputError where an image's path leads out of the data set's folder or cannot exist."""
    for row, name in enumerate(images, 1):
        if not name:
            continue
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
            raise InputError(f"{path}: data row {row}: image '{name}' leaves the folder; "
                             "use a path inside it")
        if "\0" in name:
            raise InputError(f"{path}: data row {row}: image {name[:40]!r} has a NUL character; "
                             "remove it")


def add_ready(ready, modality, path, n_rows, surplus=False):
    """Checks a ready feature file, if there is one, and notes it; a broken link is an error."""
    if os.path.lexists(path):
        check_features(path, n_rows, surplus)
        ready[modality] = (path, np.arange(n_rows, dtype=np.int64))


def check_features(path, n_rows, surplus=False):
    """InputError that names what is wrong with a feature file's shape, dtype or values.

    surplus: whether the file may have more than n_rows rows; the rest is ignored.
    """
    array = disk.open_npy(path, "save it again with numpy.save")
    is_float = array.dtype in (np.float16, np.float32, np.float64)
    if not is_float or array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{path}: {array.dtype} {array.shape}; a feature file is a 2-d array "
                         "of float16, float32 or float64")
    if len(array) < n_rows or (len(array) > n_rows and not surplus):
        raise InputError(f"{path}: {len(array):,} rows, but {n_rows:,} are needed, "
                         "one for each row of the data; make it again")
    # In blocks, as a file may be larger than memory.
    block_rows = max(1, (1 << 23) // array.shape[1])
    for start in range(0, n_rows, block_rows):
        check_values(path, np.asarray(array[start:min(n_rows, start + block_rows)]), start)


def check_values(path, block, start):
    """InputError that names a row: infinite, NaN in part, or too long or short to be scaled."""
    is_nan = np.isnan(block)
    partly_nan = is_nan.any(1) & ~is_nan.all(1)
    with np.errstate(over="ignore"):
        norm = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))
    # Training scales rows to length 1 in float32: beyond these a square overflows or is 0.
    no_length = (norm > 1e15) | ((norm < 1e-9) & block.any(1))
    for bad, what in (
            (np.isinf(block).any(1), "has infinities; a row is finite, or NaN throughout where "
                                     "the modality is missing"),
            (partly_nan, "has some NaN, not all; a row is finite, or NaN throughout where the "
                         "modality is missing"),
            (no_length, "is of a length outside of 1e-9 to 1e15, which float32 cannot square; "
                        "multiply the file by a constant")):
        if bad.any():
            row = start + int(np.argmax(bad)) + 1
            raise InputError(f"{path}: data row {row} {what}")


# --- Parts of a data set ------------------------------------------------------------------

def merge_duplicates(dataset):
    """The data set with each (user, item) pair once: its first row, with review and label."""
    # In 64 bits: users times items are more than 2^31 on the paper's larger sets.
    keys = dataset.users * np.int64(dataset.n_items) + dataset.items
    _, rows = np.unique(keys, return_index=True)
    # np.unique gives the rows in the order of the keys; this restores the file's order.
    rows.sort()
    n_merged = len(keys) - len(rows)
    if not n_merged:
        return dataset
    print(f"{dataset.name}: {n_merged:,} duplicate pairs merged (the first row kept)")
    return keep(dataset, rows)


def keep(dataset, rows, drop_empty=False):
    """The data set with these interactions only.

    drop_empty: users and items that have no interaction left are dropped too.
    """
    users, items = dataset.users[rows], dataset.items[rows]
    kept_users = np.arange(dataset.n_users, dtype=np.int64)
    kept_items = np.arange(dataset.n_items, dtype=np.int64)
    if drop_empty:
        # Sorted, so that searchsorted below gives each old index its new one.
        kept_users, kept_items = np.unique(users), np.unique(items)
    ready = {}
    for modality, (path, file_rows) in dataset.ready.items():
        ready[modality] = (path, file_rows[rows if modality == "R" else kept_items])
    return replace(
        dataset,
        user_ids=dataset.user_ids[kept_users],
        item_ids=dataset.item_ids[kept_items],
        users=np.searchsorted(kept_users, users).astype(np.int64),
        items=np.searchsorted(kept_items, items).astype(np.int64),
        labels=None if dataset.labels is None else dataset.labels[rows],
        texts=take_rows(dataset.texts, kept_items),
        images=take_rows(dataset.images, kept_items),
        reviews=take_rows(dataset.reviews, rows),
        ready=ready)


def take_rows(values, rows):
    """The values of a list at these rows; None stays None."""
    return None if values is None else [values[row] for row in rows]
