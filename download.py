"""Downloads from hosts that break off, stall, are slow, refuse, or answer with a log-in page.

`fetch_file` gets one large file, `fetch_images` a prepared folder's pictures. Both go on where
they were interrupted. A picture is given up for good only where the server refuses it, or
where its whole file has come and is no picture.
"""
import http.client
import io
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from disk import check_is_file, remove_leftovers, write_file
from pictures import BadPicture, read_picture
from run import InputError, disk_is_full

# A connection is given up after SILENCE seconds without a byte. It is also given up when WINDOW
# seconds have not brought a whole picture or, of a large file, WINDOW_BYTES.
SILENCE = 30
WINDOW = 60
WINDOW_BYTES = 60 << 10
UNREACHABLE = 32  # after so many failed pictures in a row, no more are tried
# What the standard library raises for a bad answer or for none.
NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError, OverflowError)


# --- Connections ------------------------------------------------------------------------------

def is_address(url):
    """Whether this is a well-formed http or https address, which can be requested."""
    if not isinstance(url, str) or not re.fullmatch("https?://[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class CountedReader(io.RawIOBase):
    """A connection's bytes; count(n) is called when n of them have come."""

    def __init__(self, raw, count):
        self.raw, self.count = raw, count

    def readable(self):
        return True

    def readinto(self, buffer):
        n_bytes = self.raw.readinto(buffer)
        self.count(n_bytes)
        return n_bytes

    def close(self):
        self.raw.close()
        super().close()


class PacedHandler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """http and https. TimeoutError where WINDOW seconds bring fewer than n_least bytes.

    The SILENCE limit alone would let a host send one byte every few seconds for ever.
    """

    def __init__(self, n_least):
        super().__init__()
        self.n_least, self.n_bytes, self.start = n_least, 0, time.monotonic()

    def count(self, n_bytes):
        # CountedReader calls this. Redirects and further tries add to the same count.
        self.n_bytes += n_bytes
        if time.monotonic() - self.start > WINDOW:
            if self.n_bytes < self.n_least:
                raise TimeoutError("too slow")
            self.n_bytes, self.start = 0, time.monotonic()

    def do_open(self, connection_class, request, **options):
        # http.client itself reads an answer's head, so the bytes are counted in the file that
        # it reads from.
        def respond(*args, **more):
            response = http.client.HTTPResponse(*args, **more)
            response.fp = io.BufferedReader(CountedReader(response.fp.detach(), self.count))
            return response

        def connect(*args, **more):
            connection = connection_class(*args, **more)
            connection.response_class = respond
            return connection

        return super().do_open(connect, request, **options)


def paced_opener(n_least):
    """An opener that speaks only http and https, also after a redirect."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(PacedHandler(n_least))
    for name in ("ProxyHandler", "UnknownHandler", "HTTPDefaultErrorHandler",
                 "HTTPRedirectHandler", "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, name)())
    return opener


def request(opener, url, start=0):
    """The open connection to url; start: the number of bytes to skip at the front."""
    headers = {"User-Agent": "Mozilla/5.0 (MMCPR)"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return opener.open(urllib.request.Request(url, headers=headers), timeout=SILENCE)


def is_refusal(error):
    """Whether an HTTP error is final; after any other, a new try may succeed."""
    return error.code in (400, 401, 403, 404, 405, 410, 451)


def reason_of(error):
    return str(getattr(error, "reason", error)) or type(error).__name__


def is_text(body):
    """Whether an answer is text or empty instead of a file: a log-in page, an error page.

    Pictures and packed files have a zero byte near their start.
    """
    return b"\0" not in body[:512] and not body.startswith(b"\x1f\x8b")


# --- A file -----------------------------------------------------------------------------------

def file_size(path):
    return path.stat().st_size if path.exists() else 0


def fetch_file(url, path, patience=5):
    """Downloads url to path; path.part keeps what has come, so that a new try goes on there.

    InputError where the server refuses, or `patience` tries in a row bring next to nothing.
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
            if error.headers.get("Content-Range") == f"bytes */{size_before}":
                break  # the file was whole already
            if error.code == 416:
                # We have more bytes than the server: they belong to another file.
                part.unlink(missing_ok=True)
            elif is_refusal(error):
                raise InputError(
                    f"{url}: {reason} {error.reason}; is the category spelt as on the data set's "
                    f"page? Or put the file at {path}") from None
        except NETWORK_ERRORS as error:
            if disk_is_full(error):
                raise
            reason = reason_of(error)
        # A try that is cut off but has brought enough does not count as a failure.
        has_grown = file_size(part) >= size_before + WINDOW_BYTES
        failures = 0 if has_grown else failures + 1
        if failures == patience:
            raise InputError(f"{url}: {reason}; run the command again to go on, "
                             f"or put the file at {path}")
        time.sleep(2 ** failures - 1)
    os.replace(part, path)


def receive(url, part, name):
    """Tries once to get what `part` lacks; True if it is whole, as far as the server says."""
    start = file_size(part)
    with request(paced_opener(WINDOW_BYTES), url, start) as answer:
        # A server that knows no ranges answers with the whole file (200, not 206).
        goes_on = answer.status == 206
        total = answer.headers.get("Content-Length")
        if total is not None:
            total = int(total) + (start if goes_on else 0)
        block = answer.read(512)
        if not goes_on and is_text(block):
            # Checked before `part` is opened, so that such a page does not replace its bytes.
            raise ValueError("the answer is empty or a web page, not the file")
        with (open(part, "ab" if goes_on else "wb") as file,
              tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=name) as bar):
            while block:
                file.write(block)
                bar.update(len(block))
                block = answer.read1(1 << 16)
    return total is None or file_size(part) == total


# --- Pictures ---------------------------------------------------------------------------------

def fetch_images(folder, workers=16):
    """Downloads the pictures of a prepared folder that are not there yet.

    Pictures that cannot be fetched are only counted; a file that cannot be written is an error.
    A picture that the server refuses for good, or whose whole file is no picture, is noted in
    images/refused.txt and not requested again. After UNREACHABLE failures in a row the rest is
    left for another run.
    """
    addresses = read_addresses(folder / "image_urls.json")
    (folder / "images").mkdir(exist_ok=True)
    note = folder / "images" / "refused.txt"
    check_is_file(note)
    remove_leftovers(folder / "images")
    refused = set(note.read_text(errors="replace").split()) if note.exists() else set()
    todo = []
    for name in addresses:
        if name not in refused and not (folder / name).exists():
            todo.append(name)
    if not todo:
        return
    for path in (folder / "images", note, *(folder / name for name in todo)):
        if path.is_symlink():
            raise InputError(f"{path}: a link, which may lead out of the folder; remove it "
                             f"(to keep pictures elsewhere, make {folder} the link)")
    # Pillow loads its readers now. Later it might lack the file descriptors to load one, and
    # then good pictures would count as unknown files.
    Image.init()
    stop, lock = threading.Event(), threading.Lock()
    n_failed = 0  # in a row

    def fetch(name):
        """(name, outcome, reason)"""
        nonlocal n_failed
        if stop.is_set():
            return name, "left", ""
        outcome, body, reason = fetch_image(addresses[name])
        with lock:
            if stop.is_set():
                return name, "left", ""
            if outcome == "ok":
                write_file(folder / name, lambda file: file.write(body))
            elif outcome == "refused":
                with open(note, "a") as file:
                    file.write(name + "\n")
            n_failed = n_failed + 1 if outcome == "unreachable" else 0
            if n_failed >= UNREACHABLE:
                stop.set()
        return name, outcome, reason

    # The threads of a ThreadPool are daemons: Ctrl-C does not wait for the slowest host.
    pool = ThreadPool(workers)
    try:
        bar = tqdm(pool.imap(fetch, todo), total=len(todo), desc="images", unit="image")
        results = list(bar)
        gave_up = stop.is_set()
    finally:
        stop.set()
        with lock:  # so that no picture is left half written
            pool.terminate()
    report_images(results, UNREACHABLE if gave_up else None)


def read_addresses(path):
    """{image path: addresses} of image_urls.json; InputError where it is damaged or changed."""
    try:
        usable = {}
        for name, urls in json.loads(path.read_bytes()).items():
            # A name that we did not make might lead out of the folder.
            is_name = re.fullmatch(r"images/\w*\.jpg", name, re.ASCII)
            if not is_name or not isinstance(urls, list):
                raise ValueError
            usable[name] = [url for url in urls if is_address(url)]
        return usable
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: damaged or changed; delete it and run the command again: "
                         "it is made from the raw files, and no picture is lost") from None


def report_images(results, gave_up_after=None):
    """Prints how many pictures had each outcome of fetch_images, and the first that failed."""
    outcomes = [outcome for name, outcome, reason in results]
    line = (f"images: {outcomes.count('ok'):,} fetched, "
            f"{outcomes.count('refused'):,} refused or no picture, "
            f"{outcomes.count('unreachable'):,} unreachable")
    if gave_up_after is not None:
        line += f"; gave up after {gave_up_after} in a row, {outcomes.count('left'):,} not tried"
    failed = [result for result in results if result[1] in ("refused", "unreachable")]
    if failed:
        name, _, reason = failed[0]
        line += ("; their items go without (run again to retry)"
                 f"; the first is {name}: {reason}")
    print(line, flush=True)


def fetch_image(urls, cap=20 << 20, tries=2):
    """One picture, from the first address that gives one: (outcome, body, reason).

    outcome: "ok"; "refused": no address will ever give one; "unreachable": another run may get
    it. cap: the size in bytes of the largest file that is accepted.
    """
    outcome, why = "refused", "no usable address"
    for url in urls:
        opener = paced_opener(math.inf)
        for _ in range(tries):
            result, body, reason = try_image(opener, url, cap)
            if result == "ok":
                return "ok", body, ""
            if result == "unreachable" or outcome == "refused":
                why = reason
            if result == "refused":
                break
            outcome = "unreachable"
    return outcome, None, why


def try_image(opener, url, cap):
    """One request for one picture. A fault of the network or this machine is "unreachable"."""
    try:
        with request(opener, url) as answer:
            body = answer.read(cap + 1)
            length = int(answer.headers.get("Content-Length") or 0)
            is_page = answer.headers.get("Content-Type", "").startswith("text/")
        if len(body) > cap:
            return "refused", None, f"more than {cap:,} bytes"
        if len(body) < length:
            return "unreachable", None, "cut off"
        read_picture(io.BytesIO(body))
        return "ok", body, ""
    except BadPicture as error:
        if is_page or is_text(body):
            return "unreachable", None, "an empty answer or a web page"
        # Without a length it is unknown whether the file is whole.
        return "refused" if length else "unreachable", None, str(error)
    except urllib.error.HTTPError as error:
        return "refused" if is_refusal(error) else "unreachable", None, f"HTTP {error.code}"
    except (*NETWORK_ERRORS, MemoryError, ImportError) as error:
        return "unreachable", None, reason_of(error)
