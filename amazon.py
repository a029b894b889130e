"""The Amazon 2018 release, one category at a time, as a folder that data.py reads.

`prepare` downloads the 5-core reviews and the metadata of a category and turns them into
interactions.csv, items.csv and image_urls.json; `fetch_images` downloads the pictures. Both go on
where they were interrupted. The release: Ni, Li and McAuley, EMNLP 2019.
"""
import gzip
import html
import http.client
import io
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from encode import open_image
from run import InputError, disk_is_full, make_folder, write_csv, write_file

AMAZON_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"


def prepare(category, folder, url=AMAZON_URL):
    """<folder>/<category>, made from the raw files in `folder`, which are downloaded if absent."""
    if not re.fullmatch(r"\w+", category):
        raise InputError(f"amazon:{category}: a category is letters, digits and _, "
                         "for example amazon:Video_Games")
    prepared = folder / category
    reviews = folder / f"{category}_5.json.gz"
    meta = folder / f"meta_{category}.json.gz"
    has_raw_files = reviews.exists() and meta.exists()
    if not has_raw_files and (prepared / "source.json").exists():
        return prepared  # the raw files have been removed since
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in ((reviews, "categoryFilesSmall"), (meta, "metaFiles2")):
        if not path.exists():
            download(f"{url.rstrip('/')}/{part}/{path.name}", path)
    # The folder is made anew when a raw file is another one.
    key = {"version": 1}
    for path in (reviews, meta):
        key[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return make_folder(prepared, key, lambda target: write_amazon(target, reviews, meta))


# --- Raw files to CSV -----------------------------------------------------------------------

def write_amazon(folder, reviews, meta):
    """interactions.csv, items.csv and image_urls.json; items without metadata are dropped."""
    interactions = read_reviews(reviews)
    bought = {item for user, item, review, seconds in interactions}
    catalogue, addresses = read_catalogue(meta, bought)
    # The earliest comes to the front: of a pair's reviews data.py keeps that one.
    interactions.sort(key=lambda row: row[3])
    kept = [row[:3] for row in interactions if row[1] in catalogue]
    if not kept:
        raise InputError(f"{meta}: no item of {reviews.name} is in it; "
                         "are the two files of one category?")
    print(f"{reviews.name}: {len(interactions):,} reviews, {len(bought):,} items, "
          f"of which {len(bought) - len(catalogue):,} without metadata are dropped, "
          f"with {len(interactions) - len(kept):,} reviews")
    write_csv(folder / "interactions.csv", ("user", "item", "review"), kept)
    write_csv(folder / "items.csv", ("item", "text", "image"), catalogue.values())
    (folder / "image_urls.json").write_text(json.dumps(addresses))


def read_reviews(path):
    """[(user, item, review, seconds since 1970)]; a review without text is its summary."""
    interactions = []
    for number, record in read_json_lines(path):
        try:
            user, item = str(record["reviewerID"]), str(record["asin"])
        except KeyError as error:
            raise InputError(f"{path}, row {number}: no field {error}; "
                             "is this a 5-core review file?") from None
        review = clean(record.get("reviewText")) or clean(record.get("summary"))
        interactions.append((user, item, review, record.get("unixReviewTime") or 0))
    return interactions


def read_catalogue(path, bought):
    """({item: (item, text, image path or '')}, {image path: addresses}) of the items bought."""
    catalogue, addresses = {}, {}
    for _, record in read_json_lines(path):
        item = str(record.get("asin", ""))
        if item not in bought or item in catalogue:
            continue  # of an item that is listed twice the entry read earlier counts
        image = f"images/{re.sub('[^A-Za-z0-9]', '_', item)}.jpg"
        urls = image_addresses(record)
        if urls:
            addresses[image] = urls
        catalogue[item] = (item, item_text(record), image if urls else "")
    return catalogue, addresses


def read_json_lines(path):
    """Yields (line number, record) of a .json.gz file, one line in memory at a time."""
    try:
        with (open(path, "rb") as raw, gzip.open(raw) as lines,
              tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar):
            for number, line in enumerate(lines, 1):
                yield number, parse_record(path, number, line)
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
            bar.update(raw.tell() - bar.n)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: cut off or damaged; delete it and run the command again "
                         "to download it") from None


def parse_record(path, number, line):
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError
    except ValueError:  # UnicodeDecodeError and JSONDecodeError among them
        raise InputError(f"{path}, row {number}: not a JSON record; "
                         "delete the file to download it again") from None
    return record


def clean(value):
    """Plain text of a field: HTML removed, entities resolved, spaces folded."""
    if value is None:
        return ""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    # Where a field was cut, a tag may not be closed: then it reaches to the end.
    text = re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)", " ", text)
    text = re.sub(r"<[/!a-zA-Z][^>]*(>|$)", " ", text)
    text = html.unescape(text).replace("\0", " ")
    # Half a surrogate pair cannot be written as UTF-8: it becomes "?".
    text = text.encode("utf-8", "replace").decode()
    return " ".join(text.split())


def item_text(record):
    """Title, description, features and brand.

    also_buy, also_view, similar_item and rank come from interactions, held-out ones too: they are
    never read.
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
        value = record.get(name) or []
        for url in [value] if isinstance(value, str) else value:
            is_url = isinstance(url, str) and url.startswith(("http://", "https://"))
            if is_url and url not in urls:
                urls.append(url)
    return urls[:3]


# --- Downloads ------------------------------------------------------------------------------

def request(url, start=0):
    """The open connection; start: the number of bytes to leave out."""
    headers = {"User-Agent": "Mozilla/5.0 (MMCPR)"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)


def is_refusal(error):
    """Whether an HTTP error would come again: not the server's fault, nor "too many requests"."""
    return error.code < 500 and error.code != 429


def file_size(path):
    return path.stat().st_size if path.exists() else 0


def download(url, path, patience=5):
    """Downloads url to path, through path.part: it goes on where it stopped.

    InputError after `patience` tries in a row that brought nothing.
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    print(f"downloading {url}", flush=True)
    while True:
        size_before = file_size(part)
        try:
            if receive(url, part, path.name):
                break
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code == 416:
                # Our bytes are more than the server's: they belong to another file.
                part.unlink(missing_ok=True)
            elif is_refusal(error):
                raise InputError(
                    f"{url}: {reason} {error.reason}; is the category spelt as on the data set's "
                    f"page? Or put the file at {path}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if disk_is_full(error):
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        # A connection that is cut again and again, but brings something, is fine.
        failures = 0 if file_size(part) > size_before else failures + 1
        if failures == patience:
            raise InputError(f"{url}: {reason}; run the command again to go on, "
                             f"or put the file at {path}")
        time.sleep(2 ** failures - 1)
    os.replace(part, path)


def receive(url, part, name):
    """One try to get what `part` lacks; whether it is whole now, as far as the server says."""
    start = file_size(part)
    with request(url, start) as answer:
        # A server that knows no ranges answers with the whole file (200, not 206).
        goes_on = answer.status == 206
        total = answer.headers.get("Content-Length")
        if total is not None:
            total = int(total) + (start if goes_on else 0)
        with (open(part, "ab" if goes_on else "wb") as file,
              tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=name) as bar):
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    return total is None or file_size(part) == total


def fetch_images(folder, workers=16, unreachable=32):
    """Downloads the pictures of a prepared folder that are not there yet.

    What fails is counted, never raised. Pictures that the server refuses for good are noted in
    images/refused.txt and not asked for again. After `unreachable` failures in a row without any
    answer the rest is left for another run.
    """
    addresses = json.loads((folder / "image_urls.json").read_text())
    (folder / "images").mkdir(exist_ok=True)
    note = folder / "images" / "refused.txt"
    refused = set(note.read_text().split()) if note.exists() else set()
    todo = []
    for name in addresses:
        if name not in refused and not (folder / name).exists():
            todo.append(name)
    if not todo:
        return
    stop, lock = threading.Event(), threading.Lock()
    n_silent = 0  # failures in a row without any answer

    def fetch(name):
        nonlocal n_silent
        if stop.is_set():
            return "left"
        result = fetch_image(addresses[name], folder / name)
        with lock:
            n_silent = n_silent + 1 if result == "unreachable" else 0
            if n_silent >= unreachable:
                stop.set()
            if result == "refused":
                with open(note, "a") as file:
                    file.write(name + "\n")
        return result

    # Not in a `with`: that would wait at Ctrl-C until all pictures are here.
    pool = ThreadPoolExecutor(workers)
    try:
        bar = tqdm(pool.map(fetch, todo), total=len(todo), desc="images", unit="image")
        results = list(bar)
    except BaseException:
        # Ctrl-C: the pictures that are here stay, and the next run goes on.
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    report_images(results, unreachable if stop.is_set() else None)


def report_images(results, gave_up_after=None):
    """One line with the number of each outcome of fetch_images."""
    line = (f"images: {results.count('ok'):,} fetched, "
            f"{results.count('refused'):,} refused or no picture, "
            f"{results.count('unreachable'):,} unreachable")
    if gave_up_after is not None:
        line += f"; gave up after {gave_up_after} in a row, {results.count('left'):,} not tried"
    if results.count("ok") < len(results):
        line += "; their items go without (run again to retry)"
    print(line, flush=True)


def fetch_image(urls, path, cap=20 << 20, tries=2):
    """One picture, from the address nearest the front that gives one.

    "ok"; "refused": no address will ever give one; "unreachable": another run may get it.
    cap: bytes of the largest file that is taken.
    """
    outcome = "refused"
    for url in urls:
        for _ in range(tries):
            result = try_image(url, path, cap)
            if result == "ok":
                return "ok"
            if result == "refused":
                break
            outcome = "unreachable"
    return outcome


def try_image(url, path, cap):
    """One request for one picture: "ok", "refused" or "unreachable"."""
    try:
        with request(url) as answer:
            body = answer.read(cap + 1)
            length = int(answer.headers.get("Content-Length") or 0)
        if len(body) < min(length, cap + 1):
            return "unreachable"  # cut off: the next try may get it whole
        if len(body) > cap or open_image(io.BytesIO(body)) is None:
            return "refused"
        write_file(path, lambda file: file.write(body))
        return "ok"
    except urllib.error.HTTPError as error:
        return "refused" if is_refusal(error) else "unreachable"
    except (OSError, http.client.HTTPException, ValueError) as error:
        if disk_is_full(error):
            raise
        return "unreachable"
