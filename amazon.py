"""The Amazon 2018 release, one category at a time, as a folder that data.py reads.

`prepare` downloads the 5-core reviews and the metadata of a category and turns them into
interactions.csv, items.csv and image_urls.json, from which download.py fetches the pictures. The
release: Ni, Li and McAuley, EMNLP 2019.
"""
import gzip
import hashlib
import html
import json
import math
import re
import zlib

from tqdm import tqdm

from disk import check_is_file, make_folder, saved_key, write_csv
from download import fetch_file, is_address, is_text
from run import InputError

AMAZON_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"
FILES = ("interactions.csv", "items.csv", "image_urls.json")


def prepare(category, folder, url=AMAZON_URL):
    """<folder>/<category>, made from the raw files in `folder`, which are downloaded if absent."""
    if not re.fullmatch(r"\w+", category, re.ASCII):
        raise InputError(f"amazon:{category}: a category is letters, digits and _, "
                         "for example amazon:Video_Games")
    prepared = folder / category
    reviews = folder / f"{category}_5.json.gz"
    meta = folder / f"meta_{category}.json.gz"
    key = {"version": 1, reviews.name: None, meta.name: None}
    # Checked before anything is downloaded: InputError where the folder is the user's own.
    is_made = saved_key(prepared, key, FILES) is not None
    has_raw_files = reviews.exists() and meta.exists()
    if is_made and not has_raw_files:
        return prepared  # the raw files have been removed since it was made
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in ((reviews, "categoryFilesSmall"), (meta, "metaFiles2")):
        unpacked = path.with_suffix("")
        if not path.exists() and unpacked.exists():
            raise InputError(f"{unpacked}: {path.name} is read here; run gzip on it")
        if not path.exists():
            fetch_file(f"{url.rstrip('/')}/{part}/{path.name}", path)
    # Size and time are in the key: when a raw file changes, the folder is made anew.
    for path in (reviews, meta):
        key[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return make_folder(prepared, key, lambda target: write_amazon(target, reviews, meta), FILES)


# --- Raw files to CSV -----------------------------------------------------------------------

def write_amazon(folder, reviews, meta):
    """interactions.csv, items.csv and image_urls.json; items without metadata are dropped."""
    interactions, n_bad_reviews = read_reviews(reviews)
    bought = {row[1] for row in interactions}
    catalogue, addresses, n_bad_items = read_catalogue(meta, bought)
    # The earliest reviews come first: of a pair's reviews folders.py keeps the first.
    interactions.sort(key=lambda row: row[3])
    kept = [row[:3] for row in interactions if row[1] in catalogue]
    if not kept:
        raise InputError(f"{meta}: no item of {reviews.name} is in it; "
                         "are the two files of one category?")
    print(f"{reviews.name}: {len(interactions):,} reviews, {len(bought):,} items, "
          f"of which {len(bought) - len(catalogue):,} without metadata are dropped, "
          f"with {len(interactions) - len(kept):,} reviews")
    if n_bad_reviews or n_bad_items:
        print(f"skipped: {n_bad_reviews:,} reviews and {n_bad_items:,} items "
              "whose user or item id is empty or damaged")
    write_csv(folder / "interactions.csv", ("user", "item", "review"), kept)
    write_csv(folder / "items.csv", ("item", "text", "image"), catalogue.values())
    (folder / "image_urls.json").write_text(json.dumps(addresses))


def read_reviews(path):
    """([(user, item, review, seconds since 1970)], number of reviews without usable ids).

    Where a review has no text, its summary is used.
    """
    interactions, n_bad = [], 0
    for record in read_records(path, ("reviewerID", "asin")):
        user, item = clean_id(record["reviewerID"]), clean_id(record["asin"])
        if not user or not item:
            n_bad += 1
            continue
        review = clean(record.get("reviewText")) or clean(record.get("summary"))
        interactions.append((user, item, review, seconds(record.get("unixReviewTime"))))
    return interactions, n_bad


def read_catalogue(path, bought):
    """What the metadata say about the items in `bought`.

    ({item: (item, text, image path or '')}, {image path: addresses}, number without usable id)
    """
    catalogue, addresses, n_bad = {}, {}, 0
    for record in read_records(path, ("asin",)):
        item = clean_id(record["asin"])
        n_bad += not item
        if item not in bought or item in catalogue:
            continue  # where an item is listed twice, its first entry counts
        urls = image_addresses(record)
        image = image_path(item) if urls else ""
        if urls:
            addresses[image] = urls
        catalogue[item] = (item, item_text(record), image)
    return catalogue, addresses, n_bad


def image_path(item):
    """The path of an item's picture. No two share a file, even on a disk that ignores case."""
    name = item
    if not re.fullmatch("[A-Z0-9]{1,20}", item):
        name = hashlib.sha256(item.encode()).hexdigest()[:32]
    return f"images/{name}.jpg"


# --- Raw files of this release, and of others -------------------------------------------------

RELEASE = ("what is read here is the 2018 release: its 5-core reviews and its metadata, packed by "
           "gzip, one JSON record a line")
# How a line of some other file begins, and what the message then adds.
OTHER_ROWS = (
    (b"\x1f\x8b", "; the file is packed twice: run gunzip on it once and keep its name"),
    (b"{'", "; looks like the 2014 release (Python literals)"),
    (b"user_id,", "; looks like the 2023 release (a CSV of user_id, parent_asin)"),
    (b"[", "; looks like one JSON list of all records"),
    (b"<", "; looks like a web page"),
)
LONGEST_ROW = 1 << 24  # bytes, so that a file without line ends does not fill the memory


def read_records(path, fields):
    """Yields the records of a .json.gz file, one in memory at a time; each has all `fields`.

    InputError for a file of another release or shape: it says which one, where it can tell.
    """
    check_is_file(path)
    row = 0
    try:
        with (open(path, "rb") as raw, gzip.open(raw) as lines,
              tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar):
            while line := lines.readline(LONGEST_ROW):
                row += 1
                if not line.isspace():
                    yield parse_record(path, row, line, fields)
                if row % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
            bar.update(raw.tell() - bar.n)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: {not_gzip(path)}") from None
    if row == 0:
        raise InputError(f"{path}: empty; delete it and run the command again to download it")


def not_gzip(path):
    """Why gzip cannot unpack a file, and the remedy."""
    with open(path, "rb") as file:
        head = file.read(512)
    download_again = "delete it and run the command again to download it"
    if head.lstrip().startswith(b"<"):
        return f"a web page instead of the data; {download_again}"
    if is_text(head):
        return f"plain text; name it {path.stem} and run gzip on it; {RELEASE}"
    if head.startswith(b"\x1f\x8b"):
        return f"cut off or damaged; {download_again}"
    return f"not packed by gzip; {RELEASE}"


def parse_record(path, row, line, fields):
    """The record of one line; InputError where it is none, or from another kind of file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also for 5,000-digit numbers and deep nesting
        record = None
    if not isinstance(record, dict):
        looks = [words for start, words in OTHER_ROWS if line.startswith(start)]
        raise InputError(f"{path}, row {row}: not a JSON record{''.join(looks)}; {RELEASE}")
    missing = [name for name in fields if name not in record]
    is_review = "reviewerID" in record
    if not missing and is_review == ("reviewerID" in fields):
        return record
    looks = "metadata"
    if "user_id" in record or "parent_asin" in record:
        looks = "the 2023 release (fields user_id, parent_asin)"
    elif is_review:
        looks = "a file of reviews"
    fault = f"no field '{missing[0]}'" if missing else "has a field 'reviewerID'"
    raise InputError(f"{path}, row {row}: {fault}; looks like {looks}; {RELEASE}")


# --- Fields ---------------------------------------------------------------------------------

def clean_id(value):
    """An id as text; '' for anything else: null, a list, control characters, half a surrogate."""
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str):
        return ""
    return value if re.fullmatch(r"[^\0-\x1f\ud800-\udfff]{1,100}", value) else ""


def seconds(value):
    """A time as a number, whatever the record has; 0 where it has none."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return value if math.isfinite(value) else 0.0


def clean(value):
    """Plain text of a field: HTML removed, entities resolved, spaces folded.

    '' for what is neither text, a number nor a list of texts.
    """
    if isinstance(value, list):
        value = " ".join(part for part in value if isinstance(part, str))
    if type(value) not in (str, int):
        return ""
    text = str(value)
    # In a field that was cut short, a tag may not be closed: then it reaches to the end.
    text = re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)", " ", text)
    text = re.sub(r"<[/!a-zA-Z][^>]*(>|$)", " ", text)
    # html.unescape fails on numbers of so many digits.
    text = re.sub(r"&#[0-9]{1000,};?", " ", text)
    text = html.unescape(text).replace("\0", " ")
    # Half a surrogate pair cannot be written as UTF-8: it becomes "?".
    text = text.encode("utf-8", "replace").decode()
    return " ".join(text.split())


def item_text(record):
    """Title, description, features and brand.

    The fields also_buy, also_view, similar_item and rank are never read, because they come from
    interactions, including held-out ones.
    """
    title = clean(record.get("title"))
    if "getTime" in title:
        title = ""  # a piece of the page's JavaScript instead of a title
    parts = [title]
    for name in ("description", "feature", "brand"):
        parts.append(clean(record.get(name)))
    return " ".join(part for part in parts if part)


def image_addresses(record):
    """At most three addresses of an item's pictures, large ones before small ones."""
    urls = []
    for name in ("imageURLHighRes", "imageURL", "image"):  # `image` in older dumps
        value = record.get(name)
        for url in value if isinstance(value, list) else [value]:
            if is_address(url) and url not in urls:
                urls.append(url)
    return urls[:3]
