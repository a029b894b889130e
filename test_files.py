"""The tests of users' files and users' days: data, folders, encoders, downloads, errors.

Every documented error once, by the command that shows it. See test_mmcpr.py for the method.
"""
import contextlib
import csv
import errno
import gzip
import inspect
import io
import json
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from PIL import Image, ImageOps

import amazon
import checkpoints
import data
import demo
import disk
import download
import encode
import finetune
import folders
import metrics
import mmcpr
import ops
import pictures
import run
from conftest import HERE, ON_THE_CPU, QUICK, call, write_shop
from run import InputError

# --- data.py, encode.py, amazon.py, demo.py: helpers ------------------------------------

def csv_text(header, rows):
    """The text of a CSV file; a row is a tuple of what needs no quotes."""
    lines = [header]
    for row in rows:
        lines.append(",".join(map(str, row)))
    return "\n".join(lines) + "\n"


GOOD_PAIRS = [(u, i) for u in range(2) for i in range(6)]
GOOD = {
    "interactions.csv": csv_text(
        "user,item,review", [(f"u{u}", f"i{i}", f"word{i}") for u, i in GOOD_PAIRS]),
    "items.csv": csv_text(
        "item,text,image", [(f"i{i}", f"text {i}", "") for i in range(6)]),
}
# An MMRec file of users 0 to 2 and items 0 to 4; the items' labels are 0, 1, 2, 0, 1.
INTER_ROWS = [f"{n % 3}\t{n % 5}\t1.0\t{n % 5 % 3}" for n in range(15)]
INTER = "\n".join(["userID\titemID\trating\tx_label", *INTER_ROWS]) + "\n"


def put(folder, files):
    """Writes {name: text, bytes or array} below folder, which it returns; None: no such file."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_bytes(content.encode())
    return folder


def prepare(data_name, *more, data_dir=None):
    """python data.py on a folder or a named data set, in this process; returns the exit code."""
    data_dir = data_dir or data_name.parent / "cache"
    argv = ("--data", data_name, "--data-dir", data_dir, "--encoder", "tiny", *more)
    return call(data.main, *argv)


def only_error(capsys):
    """The one `error: ` line, the last of stderr (progress bars come before it)."""
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    lines = [line for line in lines if line.strip()]
    errors = [line for line in lines if "error:" in line or "Traceback" in line]
    assert errors == lines[-1:]
    assert lines[-1].startswith("error: ")
    return lines[-1]


def png(mode="RGB", size=(12, 9), colour=0, format="PNG"):
    """The bytes of a picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format)
    return file.getvalue()


def open_image(file):
    """The picture as RGB; None where the file holds none that can be used."""
    try:
        return pictures.read_picture(file)
    except pictures.BadPicture:
        return None


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoder_calls(monkeypatch, fail_at=None):
    """A list that gets the texts of each call of the tiny encoder; call fail_at is interrupted."""
    calls, real = [], encode.TinyEncoder.text

    def text(self, texts):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(list(texts))
        return real(self, texts)

    monkeypatch.setattr(encode.TinyEncoder, "text", text)
    return calls


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- Folders that cannot be read ------------------------------------------------------------

TOO_FEW = csv_text("user,item", [(f"u{u}", f"i{u}") for u in range(3)])  # one each


@pytest.mark.parametrize("name, content, words", [
    ("interactions.csv", "user,text\nu,i\n",
     "interactions.csv, row 1: no column 'item'"),
    ("interactions.csv", "user,itme\nu,i\n",
     "row 1: no column 'item'; its columns are user, itme"),
    ("items.csv", "itme,text\ni0,x\n",
     "items.csv, row 1: no column 'item'; its columns are itme, text"),
    ("interactions.csv", "user,item,item\nu,i0,i0\n",
     "row 1: a column name occurs twice"),
    ("interactions.csv", "",
     "interactions.csv: the file is empty"),
    ("interactions.csv", "user,item\n",
     "interactions.csv: the header is there, but no row follows"),
    ("interactions.csv", "user,item\nu,i0\nu,i1,more\n",
     "interactions.csv, row 3: the header has 2 fields, this row 3; quote"),
    ("interactions.csv", "user,item\nu,i0\nu\n",
     "interactions.csv, row 3: the header has 2 fields, this row 1; quote"),
    ("interactions.csv", b"user,item\nu,i0\nu,caf\xe9\nu,i1\n",
     "interactions.csv, row 3: not UTF-8; save"),
    ("interactions.csv", "user;item\nu;i0\n",
     "row 1: no column 'user'; separate the columns by commas"),
    ("interactions.csv", '"user";"item"\n"u";"i0"\n',
     "interactions.csv, row 1: ',' expected after '\"'; separate the columns by commas"),
    ("interactions.csv", 'user,item\nu,i0\nu,"i1" x\n',
     "interactions.csv, row 3: "),
    ("interactions.csv", 'user,item\n"a\nb",i0\nu,"i1\nu,i2\nu,i3\n',
     "interactions.csv, row 4: unexpected end of data; mend that row"),
    ("interactions.csv", '"user,item\nu,i0\n',
     "interactions.csv, row 1: unexpected end of data"),
    ("interactions.csv", "user,item\nu,i0\n,i1\n",
     "interactions.csv: data row 2 has no user; fill it in or remove"),
    ("interactions.csv", "user,item\nu,i0\nu,\n",
     "interactions.csv: data row 2 has no item"),
    ("items.csv", "item,text\ni0,x\n,y\n",
     "items.csv: data row 2 has no item"),
    ("interactions.csv", "user,item\nu,i0\nu,i9\n",
     "interactions.csv: data row 2 has item 'i9', which is not in items.csv; add it there or "),
    ("interactions.csv", "user,item\nu,i9\nu,i0\nu,i8\n",
     "data row 1 has item 'i9', which is not in items.csv; add it there or remove the row (2 such"),
    ("items.csv", GOOD["items.csv"] + "i2,again,\n",
     "items.csv: data row 7 lists item 'i2' a second time; remove"),
    ("items.csv", GOOD["items.csv"] + "j,x,a/../../x.png\n",
     "items.csv: data row 7: image 'a/../../x.png' leaves"),
    ("items.csv", GOOD["items.csv"] + "j,x,/x.png\n",
     "items.csv: data row 7: image '/x.png' leaves the folder; use"),
    ("interactions.csv", TOO_FEW,
     "leaves nothing to test"),
    ("interactions.csv", None,
     "neither interactions.csv nor one .inter file"),
])
def test_folder_that_cannot_be_read(tmp_path, capsys, name, content, words):
    """Exit code 2, and one line that names the file, the row and the remedy."""
    assert prepare(put(tmp_path / "shop", GOOD | {name: content})) == 2
    assert words in only_error(capsys)


@pytest.mark.parametrize("edit, words", [
    (lambda x: x[:5], "5 rows, but 6 are needed"),
    (lambda x: x.astype(int), "int64 (6, 3)"),
    (lambda x: x[:, 0], "float32 (6,)"),
    (lambda x: x[:, :0], "float32 (6, 0)"),
    (lambda x: np.where(x == 7, -np.inf, x), "data row 3 has infinities"),
    (lambda x: np.where(x == 7, np.nan, x), "data row 3 has some NaN"),
    (lambda x: x.astype(object), "not a readable .npy array"),
    (lambda x: npy(x)[:-1], "not a readable .npy array"),
    (lambda x: b"", "not a readable .npy array"),
])
@pytest.mark.parametrize("file", ["item_text.npy", "item_image.npy", "review.npy"])
def test_feature_file_that_cannot_be_used(tmp_path, capsys, file, edit, words):
    """A ready feature file with the wrong shape, dtype or values is refused by name."""
    table = np.arange(18, dtype=np.float32).reshape(6, 3)
    interactions = csv_text("user,item", [("u", f"i{i}") for i in range(6)])
    files = GOOD | {"interactions.csv": interactions, file: edit(table)}
    assert prepare(put(tmp_path / "shop", files)) == 2
    message = only_error(capsys)
    assert file in message
    assert words in message


@pytest.mark.parametrize("old, new, words", [
    ("x_label", "label", "x.inter, row 1: no column 'x_label'"),
    ("1.0\t2", "1.0\t3", "data row 3: x_label 3 is none of 0 (train), 1 (valid), 2 (test)"),
    ("1.0\t2", "1.0\t-1", "data row 3: x_label '-1' is not a whole number"),
    ("\n2\t2", "\n2\tB002", "data row 3: itemID 'B002' is not a whole number"),
    ("\n2\t2", "\n2.0\t2", "data row 3: userID '2.0' is not a whole number"),
    ("\n2\t2", f"\n{10 ** 20}\t2", f"data row 3: userID '{10 ** 20}'"),
    ("1.0\t2", "1.0", "x.inter, row 4: the header has 4 fields, this row 3"),
])
def test_mmrec_folder_that_cannot_be_read(tmp_path, capsys, old, new, words):
    """An MMRec folder's defect is named by row."""
    assert prepare(put(tmp_path / "x", {"x.inter": INTER.replace(old, new, 1)})) == 2
    assert words in only_error(capsys)


def test_mmrec_id_too_large_for_a_table(tmp_path, capsys):
    """A stray id stands for as many rows: named, not allocated (2e9 ids as text are 80 GB)."""
    inter = INTER.replace("\n2\t2", "\n2\t2000000000", 1)
    assert prepare(put(tmp_path / "x", {"x.inter": inter})) == 2
    message = only_error(capsys)
    assert "data row 3" in message
    assert "2000000000" in message


def test_mmrec_folder_without_training_rows(tmp_path, capsys):
    inter = re.sub(r"0$", "2", INTER, flags=re.M)
    assert prepare(put(tmp_path / "x", {"x.inter": inter})) == 2
    assert "nothing to train on: no row is labelled train (0)" in only_error(capsys)


def test_mmrec_labels_without_a_test_are_told_as_such(tmp_path, capsys):
    """No 2 among the published labels: the number of a user's interactions is not the reason."""
    inter = INTER.replace("1.0\t2", "1.0\t1")
    assert prepare(put(tmp_path / "x", {"x.inter": inter})) == 2
    message = only_error(capsys)
    assert "nothing to test" in message
    assert "5 interactions" not in message


@pytest.mark.parametrize("name, words", [
    ("nowhere", "--data nowhere: no such folder, and not one of "
                "demo, vg, tg, amazon:<Category>"),
    ("sharee", "private data set cannot be downloaded"),
    ("amazon:", "a category is letters, digits and _"),
    ("amazon:../x", "amazon:../x: a category is letters, digits and _"),
])
def test_unknown_data(tmp_path, capsys, name, words):
    assert prepare(name, data_dir=tmp_path) == 2
    assert words in only_error(capsys)


# --- Folders that can -----------------------------------------------------------------------

def test_duplicates_are_merged_and_the_earliest_review_stays(tmp_path, capsys):
    rows = ["user,item,review", "u,b,earliest", "v,b,other", "u,b,second", "u,a,", "u,a,late"]
    shop = data.load(str(put(tmp_path, {"interactions.csv": "\n".join(rows) + "\n"})))
    users, items = shop.user_ids[shop.users], shop.item_ids[shop.items]
    assert list(zip(users, items)) == [("u", "b"), ("v", "b"), ("u", "a")]
    assert shop.reviews == ["earliest", "other", ""]
    assert "2 duplicate pairs merged" in capsys.readouterr().out


def test_csv_dialect(tmp_path):
    """A byte order mark, CRLF, quoted commas, quotes and line breaks, blank lines, other columns,
    items nobody bought."""
    interactions = ('\ufeffuser,when,item,review\r\n'
                    'u,1,"a,b","one ""two""\nthree"\r\n'
                    '\r\n'
                    'u,2,ü,\r\n')
    items = 'text,item\n"x, y",ü\n,"a,b"\nz,unsold\n'
    put(tmp_path, {"interactions.csv": interactions, "items.csv": items})
    shop = data.load(str(tmp_path))
    assert list(shop.item_ids) == ["ü", "a,b", "unsold"]
    assert shop.texts == ["x, y", "", "z"] and shop.images is None
    assert list(shop.item_ids[shop.items]) == ["a,b", "ü"]
    assert shop.reviews == ['one "two"\nthree', ""]


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    """A misspelt name of an optional column is not silently ignored; without one, no line."""
    put(tmp_path / "shop", GOOD)
    data.load(str(tmp_path / "shop"))
    assert "not read" not in capsys.readouterr().out
    put(tmp_path / "shop", {
        "interactions.csv": "user,item,reveiw,rating\nu,i0,x,1\n",
        "items.csv": "item,txt,image\ni0,x,\n",
    })
    for contents in (True, False):
        data.load(str(tmp_path / "shop"), contents=contents)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            "shop: interactions.csv has user, item, rating (not read: reveiw)",
            "shop: items.csv has item, image (not read: txt)",
        ]


def test_names_with_spaces_and_columns_without_a_name(tmp_path, capsys):
    """Of a header spaces do not count; of an id they do, and that is told."""
    put(tmp_path / "shop", {
        "interactions.csv": "user, item ,,\nu,i0,,\nu ,i0,,\nu,i1,,\n",
        "items.csv": "item,text,,\ni0,x,,\ni1,y,,\n"})
    dataset = data.load(str(tmp_path / "shop"))
    assert dataset.user_ids.tolist() == ["u", "u "] and dataset.item_ids.tolist() == ["i0", "i1"]
    out = capsys.readouterr().out
    assert "(not read: one without a name, one without a name)" in out
    assert "interactions.csv: 1 rows have a user with a space at an end, as 'u '" in out


@pytest.mark.parametrize("files, names", [
    (GOOD | {"items_text.npy": np.ones((6, 2))}, "items_text.npy"),
    (GOOD | {"x.inter": INTER, "item.csv": "item\n"}, "item.csv, x.inter"),
    ({"x.inter": INTER, "item_text.npy": np.ones((5, 2))}, "item_text.npy"),
    ({"train.txt": "0 1 2\n", "test.txt": "0 3\n", "image.npy": np.ones((4, 2))}, "image.npy")])
def test_tables_that_are_not_read_are_named(tmp_path, capsys, files, names):
    """Whatever the folder's format."""
    data.load(str(put(tmp_path / "shop", files)))
    assert f"shop: not read: {names}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["items.csv", "item_text.npy"])
def test_link_to_nowhere_is_not_taken_as_absent(tmp_path, capsys, name):
    put(tmp_path / "shop", GOOD | {name: None})
    (tmp_path / "shop" / name).symlink_to(tmp_path / "unmounted")
    assert prepare(tmp_path / "shop") == 2
    assert f"{name}: no such file" in only_error(capsys).lower()


def test_user_with_one_interaction_trains_and_is_not_tested(tmp_path):
    interactions = GOOD["interactions.csv"] + "single,i0,\n"
    shop = data.load(str(put(tmp_path, GOOD | {"interactions.csv": interactions})))
    parts = data.split_dataset(shop)
    assert shop.user_ids[2] == "single"
    assert [part[[2]].nnz for part in (parts.train, parts.valid, parts.test)] == [1, 0, 0]


def test_interactions_alone_are_a_data_set(tmp_path, capsys):
    interactions = GOOD["interactions.csv"].replace(",review", ",note")
    assert prepare(put(tmp_path / "shop", {"interactions.csv": interactions})) == 0
    assert "2 users, 6 items, 12 interactions" in capsys.readouterr().out


def test_folder_may_be_called_like_a_built_in_set(tmp_path, capsys, monkeypatch):
    """--data demo is the built-in set, also beside a folder of that name."""
    put(tmp_path / "demo", GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.write_demo, "__defaults__", (40, 30, 16))
    assert prepare("demo", data_dir=tmp_path / "made") == 0
    assert "demo: 40 users, 30 items" in capsys.readouterr().out


def test_item_features_need_their_catalogue(tmp_path, capsys):
    features = {"items.csv": None, "item_text.npy": np.ones((6, 2), np.float32)}
    assert prepare(put(tmp_path / "shop", GOOD | features)) == 2
    assert "item_text.npy: its rows are those of items.csv" in only_error(capsys)


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main, data.main])
def test_help_names_each_default_once(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text
    assert not re.search(r"default: [^)]*\) \(default", text)


def test_next_command_names_the_data_as_it_was_given(tmp_path, capsys, monkeypatch):
    """Also where it needs quotes; what names the split, and the encoder; else the demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.write_demo, "__defaults__", (40, 30, 16))
    put(tmp_path / "my shop", GOOD)
    name = f"'{tmp_path / 'my shop'}'"
    flags = ("--min-count", 2, "--valid", 0.2, "--split-seed", 3)
    for argv, want in ((("--encoder", "tiny"), f"{name} --encoder tiny"),
                       (flags, f"{name} --min-count 2 --valid 0.2 --split-seed 3"),
                       (("--clip-weights", "w file"),
                        f"{name} --encoder tiny --clip-weights 'w file'\n")):
        assert call(data.main, "--data", "my shop", "--encoder", "tiny", *argv) == 0
        assert f"next: python mmcpr.py --data {want}" in capsys.readouterr().out
    assert call(data.main) == 0
    assert capsys.readouterr().out.endswith("next: python mmcpr.py --data demo\n")


# --- Images ---------------------------------------------------------------------------------

def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb():
    """A few bytes that claim to be 100,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b""))


def test_unreadable_images_are_nan_rows_and_counted(tmp_path, capsys):
    """Exactly the missing, cut-off, fake and absurdly large pictures are left out."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    noise = {}
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        noise[kind] = file.getvalue()
    fine = {
        "rgb.png": noise["PNG"],
        "rgb.jpg": noise["JPEG"],
        "rgba.png": png("RGBA", colour=(9, 9, 9, 99)),
        "palette.png": png("P"),
        "grey.png": png("L"),
        "grey_alpha.png": png("LA"),
        "bit.png": png("1"),
        "grey16.png": png("I;16"),
        "cmyk.jpg": png("CMYK", format="JPEG"),
        "still.gif": png("P", format="GIF"),
    }
    bad = {
        "missing.png": None,
        "cut.png": noise["PNG"][:3000],
        "cut.jpg": noise["JPEG"][:1000],
        "text.png": "hello",
        "empty.jpg": b"",
        "bomb.png": png_bomb(),
    }
    pictures = fine | bad
    items = csv_text("item,image", [*enumerate(pictures), ("none", "")])
    files = {"items.csv": items, "interactions.csv": "user,item\nu,none\n"}
    shop = data.load(str(put(tmp_path, pictures | files)))
    rows = data.features(shop, "V", "tiny", tmp_path)["V"]
    for name, row in zip(pictures, rows):
        assert np.isfinite(row).all() == (name in fine), name
        assert np.isnan(row).all() == (name in bad), name
    assert np.isnan(rows[-1]).all()
    line = ("image: 256-d; 7 of 17 items have none "
            "(6 unreadable, the first missing.png: no such file)")
    assert line in capsys.readouterr().out


def test_open_image_composes_transparency_and_caps_pixels(monkeypatch):
    clear = io.BytesIO(png("RGBA", (16, 16), (200, 0, 0, 0)))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 256)
    assert np.all(np.asarray(open_image(clear)) == 255)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 255)
    clear.seek(0)
    assert open_image(clear) is None


def test_damaged_avif_is_left_out():
    """Pillow's AVIF reader raises RuntimeError."""
    file = io.BytesIO()
    try:
        Image.new("RGB", (32, 32), "red").save(file, "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    whole = file.getvalue()
    assert open_image(io.BytesIO(whole)) is not None
    for length in range(60, len(whole), 7):
        cut_off = whole[:length]
        overwritten = cut_off + b"\xff\xff\xff" + whole[length + 3:]
        for damaged in (cut_off, overwritten):
            open_image(io.BytesIO(damaged))  # None or a picture, but no exception


# --- The split ------------------------------------------------------------------------------

@pytest.mark.parametrize("valid", [0, 0.1, 0.5, 1])
def test_split_counts(valid):
    """max(1, floor(0.8 n_u)) to training, the rest to test; of the training interactions
    round(valid * training) to validation, and each user keeps one."""
    users = np.repeat(np.arange(40), 1 + np.arange(40) % 13)
    users = np.random.default_rng(3).permutation(users)
    part, n = data.split(users, 1, valid), np.bincount(users)
    n_train = np.maximum(1, np.floor(0.8 * n)).astype(int)
    assert np.array_equal(np.bincount(users[part == data.TEST], minlength=40), n - n_train)
    assert np.bincount(users[part == data.TRAIN], minlength=40).min() >= 1
    n_rest = np.sum(n_train)
    assert np.sum(part == data.VALID) == min(round(valid * n_rest), n_rest - 40)


def test_split_seeds_are_reproducible_and_differ():
    users = np.repeat(np.arange(30), 10)
    part, other = data.split(users, 5), data.split(users, 6)
    assert np.array_equal(part, data.split(users, 5))
    for label in (data.VALID, data.TEST):
        assert np.any((part == label) != (other == label))


def test_split_is_uniform_over_a_users_interactions():
    """Over many seeds each of ten interactions is tested in 1/5 of the splits (6 sigma)."""
    users = np.zeros(10, int)
    tested = np.mean([data.split(users, seed) == data.TEST for seed in range(1000)], axis=0)
    assert np.all(np.abs(tested - 0.2) < 6 * np.sqrt(0.2 * 0.8 / 1000))


def test_kept_training_is_nested_and_leaves_the_rest_alone():
    """round(share * n_u), at least one, of each user's training interactions; what a share keeps
    a larger one keeps; validation and test stay; another seed keeps others."""
    users = np.random.default_rng(4).permutation(np.repeat(np.arange(30), 1 + np.arange(30)))
    part = data.split(users)
    n_train = np.bincount(users[part == data.TRAIN], minlength=30)
    before = np.zeros(len(users), bool)
    for share in (0.1, 0.2, 0.4, 0.7, 1):
        kept = data.drop_training(part, users, share, 0)
        is_kept = kept == data.TRAIN
        want = np.maximum(1, np.floor(share * n_train + 0.5))
        assert np.array_equal(np.bincount(users[is_kept], minlength=30), want)
        assert np.all(before <= is_kept)
        before = is_kept
        is_other = part != data.TRAIN
        assert np.array_equal(kept[is_other], part[is_other])
    other = data.drop_training(part, users, 0.4, 1)
    assert np.any(other != data.drop_training(part, users, 0.4, 0))


def test_new_items_are_tested_and_nothing_else(tmp_path, capsys):
    """A tenth of the items: all their interactions are test, the others' test is dropped. Who is
    left without training is not tested."""
    write_shop(tmp_path / "shop")
    dataset = data.load(str(tmp_path / "shop"))
    usual = data.split_dataset(dataset)
    parts = data.split_dataset(dataset, share_new=0.1)
    assert len(parts.new_items) == 3 and "on 3 new items" in capsys.readouterr().out
    is_new = np.isin(np.arange(30), parts.new_items)
    whole = (usual.train + usual.valid + usual.test).toarray() > 0
    has_training = (parts.train.toarray() > 0).any(1)
    assert np.array_equal(parts.test.toarray() > 0, whole & is_new & has_training[:, None])
    assert np.array_equal(parts.known_items(), np.flatnonzero(~is_new))
    for name in ("train", "valid"):
        want = (getattr(usual, name).toarray() > 0) & ~is_new
        assert np.array_equal(getattr(parts, name).toarray() > 0, want)


def test_users_without_training_take_no_part_beside_new_items():
    """All of a user whose training items become new is dropped, validation and test."""
    users, items = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 2, 1, 3, 0])
    dataset = SimpleNamespace(users=users, items=items, n_items=4)
    part = np.array([data.TRAIN, data.VALID, data.TEST, data.TRAIN, data.VALID, data.TRAIN])
    drawn = set()
    for seed in range(20):
        got, new_items = data.hold_out_items(part, dataset, 0.25, seed)
        drawn.update(new_items.tolist())
        for user in range(3):
            labels = got[users == user]
            if data.TRAIN in labels:
                is_new = np.isin(items[users == user], new_items)
                assert np.array_equal(labels == data.TEST, is_new)
            else:
                assert np.all(labels == data.DROPPED)
    assert 0 in drawn  # then all training of two users is gone


def test_new_items_are_a_share_of_the_whole_catalogue(tmp_path):
    """Those that nobody has bought are drawn like the others, wherever they stand."""
    write_shop(tmp_path / "shop")
    for path in tmp_path.glob("shop/*.npy"):
        path.unlink()
    disk.write_csv(tmp_path / "shop/items.csv", ("item",), [(f"i{i}",) for i in range(300)])
    parts = data.split_dataset(data.load(str(tmp_path / "shop")), share_new=0.1)
    assert len(parts.new_items) == 30 and parts.new_items.max() >= 30


@pytest.mark.parametrize("share", [0.001, 1])
def test_new_items_that_leave_nothing(tmp_path, capsys, share):
    write_shop(tmp_path / "shop")
    assert prepare(tmp_path / "shop", "--new-items", share) == 2
    assert f"--new-items {share:g} makes" in only_error(capsys)


def test_published_labels_are_respected(tmp_path):
    """MMRec's x_label is the split; --valid 0 trains on its validation too.

    Ids have gaps, and the feature rows follow them.
    """
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    inter = INTER + "9\t5\t1.0\t0\n"
    put(tmp_path / "x", {
        "x.inter": inter, "text_feat.npy": features, "image_feat.npy": features + 1})
    shop = data.load(str(tmp_path / "x"))
    parts = data.split_dataset(shop, 0, 0.1)
    rows = [line.split() for line in inter.splitlines()[1:]]
    for label, matrix in enumerate((parts.train, parts.valid, parts.test)):
        users, items = matrix.nonzero()
        got = set(zip(shop.user_ids[users], shop.item_ids[items]))
        assert got == {(u, i) for u, i, _, x in rows if x == str(label)}
    merged = data.split_dataset(shop, 0, 0)
    assert (merged.train != parts.train + parts.valid).nnz == 0
    assert merged.valid.nnz == 0
    assert list(shop.user_ids) == ["0", "1", "2", "9"]
    made = data.features(shop, "TV")
    assert np.array_equal(made["T"], features)
    assert np.array_equal(made["V"], features + 1)


@pytest.mark.parametrize("valid", [0.3, 1])
def test_labels_without_validation_get_one_from_training(tmp_path, valid):
    """`valid` of the published training is drawn; each user keeps one to train on."""
    inter = INTER.replace("1.0\t1\n", "1.0\t0\n")
    shop = data.load(str(put(tmp_path / "x", {"x.inter": inter})))
    parts = data.split_dataset(shop, 0, valid)
    n_train = np.sum(shop.labels == data.TRAIN)
    assert parts.valid.nnz == min(round(valid * n_train), n_train - shop.n_users)
    assert parts.train.nnz == n_train - parts.valid.nnz
    assert np.diff(parts.train.indptr).min() >= 1
    assert parts.test.nnz == np.sum(shop.labels == data.TEST)


def labelled_parts(items, labels):
    """The Parts of two users with three interactions each and published labels."""
    ids = np.array(list("abcdef"))
    users = np.array([0, 0, 0, 1, 1, 1])
    labels = np.array(labels, np.int8)
    return data.split_dataset(
        folders.Dataset("x", Path(), ids[:2], ids, users, np.array(items), labels))


def test_fingerprint_and_graph_see_training_interactions_only():
    parts = labelled_parts([0, 1, 2, 0, 1, 3], [0, 0, 2, 0, 1, 2])
    other_held_out = labelled_parts([0, 1, 5, 0, 4, 2], [0, 0, 1, 0, 2, 2])
    other_training = labelled_parts([0, 3, 2, 0, 1, 3], [0, 0, 2, 0, 1, 2])
    assert parts.fingerprint == other_held_out.fingerprint
    assert parts.fingerprint != other_training.fingerprint

    def graph(parts):
        return ops.co_interaction_plain(parts.train.T.tocsr())
    assert (graph(parts) != graph(other_held_out)).nnz == 0
    assert (graph(parts) != graph(other_training)).nnz > 0


# --- Filters --------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_k_core_is_the_fixpoint(count):
    rng = np.random.default_rng(count)
    pairs = np.stack([rng.integers(25, size=90), rng.integers(20, size=90)], axis=1)
    users, items = np.unique(pairs, axis=0).T
    rows = list(range(len(users)))
    while True:
        user_list, item_list = list(users[rows]), list(items[rows])
        kept = []
        for row in rows:
            n_user, n_item = user_list.count(users[row]), item_list.count(items[row])
            if n_user >= count and n_item >= count:
                kept.append(row)
        if kept == rows:
            break
        rows = kept
    assert list(data.k_core(users, items, count)) == rows


def test_filters_keep_contents_and_features_with_their_ids(tmp_path):
    """After merging, --min-count and --sample a review and a feature row still belong to their id.

    An item's text and feature are its number, an interaction's review and feature its row's.
    """
    rng = np.random.default_rng(0)
    pairs = [(u, i) for u, i in rng.integers(14, size=(160, 2)).tolist()]
    items = range(14, -1, -1)
    put(tmp_path, {
        "interactions.csv": csv_text(
            "user,item,review", [(u, i, n) for n, (u, i) in enumerate(pairs)]),
        "items.csv": csv_text("item,text", [(i, f"text {i}") for i in items]),
        "item_text.npy": np.array(items, np.float32)[:, None],
        "review.npy": np.arange(160, dtype=np.float32)[:, None],
    })
    for min_count, sample in ((0, 0), (5, 0), (5, 40)):
        shop = data.load(str(tmp_path), min_count=min_count, sample=sample, seed=1)
        made = data.features(shop, "TR")
        numbers = [int(i) for i in shop.item_ids]
        assert list(made["T"][:, 0]) == numbers
        assert shop.texts == [f"text {i}" for i in numbers]
        rows = [int(n) for n in shop.reviews]
        assert rows == sorted(rows)
        assert list(made["R"][:, 0]) == rows
        for n, u, i in zip(rows, shop.user_ids[shop.users], shop.item_ids[shop.items]):
            assert pairs[n] == (int(u), int(i))
            assert pairs.index(pairs[n]) == n
        if sample:
            assert len(rows) == sample
        least = 1 if sample else min_count
        assert np.bincount(shop.users).min() >= least
    with pytest.raises(InputError, match="--min-count 99 leaves no interaction"):
        data.load(str(tmp_path), min_count=99)


# --- The demo and the tiny encoder ----------------------------------------------------------

def demo_digest(folder):
    """The number of the demo's files, their digest, and that of their tiny features."""
    import hashlib
    import demo
    import encode
    from pictures import read_picture
    demo.write_demo(folder, 60, 50)
    paths = sorted(folder.rglob("*.*"))
    files = hashlib.sha256()
    for path in paths:
        files.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    tiny = encode.TinyEncoder()
    texts = tiny.text((folder / "items.csv").read_text().splitlines())
    prepared = []
    for path in sorted(folder.glob("images/*")):
        prepared.append(tiny.prepare(read_picture(path)))
    rows = hashlib.sha256(texts.tobytes() + tiny.image(prepared).tobytes())
    return f"{len(paths)} {files.hexdigest()} {rows.hexdigest()}"


def test_demo_and_tiny_encoder_are_the_same_in_every_process(tmp_path):
    """In this one and in another, in which Python hashes and orders sets in another way."""
    folders = [tmp_path / "this", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    script = (f"from pathlib import Path\n{inspect.getsource(demo_digest)}\n"
              f"print(demo_digest(Path({str(folders[1])!r})))")
    environment = os.environ | {"PYTHONHASHSEED": "20220627"}
    process = subprocess.run([sys.executable, "-c", script], cwd=HERE, env=environment,
                             capture_output=True, text=True, check=True)
    digest = demo_digest(folders[0])
    assert process.stdout.strip() == digest
    assert int(digest.split()[0]) > 40


def test_tiny_encoder_tells_contents_apart():
    """Unit rows; the same content gives the same row, a shared word a closer one, no word none."""
    tiny = encode.TinyEncoder()
    text = tiny.text(["a red lamp", "A red, lamp!", "a red kettle", "zzz", "..."])
    cosine = text @ text.T
    assert cosine[0, 1] == pytest.approx(1)
    assert 0.2 < cosine[0, 2] < 0.9
    assert abs(cosine[0, 3]) < 0.2
    assert not text[4].any()
    pictures = [Image.new("RGB", (9, 5), colour) for colour in ("red", "red", "blue")]
    image = tiny.image([tiny.prepare(picture) for picture in pictures])
    cosine = image @ image.T
    assert np.diag(cosine) == pytest.approx(1)
    assert cosine[0, 1] == pytest.approx(1)
    assert cosine[0, 2] < 0.5


# --- The feature cache ----------------------------------------------------------------------

TEXTS = [f"word{n} word{n % 3}" if n % 5 else "" for n in range(11)]


def bare_dataset(folder):
    """A data set that is a name and a folder."""
    ids, index = np.array(["x"]), np.zeros(1, int)
    return folders.Dataset("shop", folder, ids, ids, index, index)


def extract(folder, texts, encoder="tiny"):
    """The features of texts, encoded four at a time."""
    rows = encode.extract(
        bare_dataset(folder), "text", texts, encoder, ("m", "w"), folder, chunk=4)
    return np.array(rows)


@pytest.mark.parametrize("encoder", ["tiny", "clip"])
def test_text_of_spaces_is_none(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(encode, "ClipEncoder", lambda *clip: encode.TinyEncoder())
    rows = extract(tmp_path, ["a lamp", "  ", "\n\t", "\u00a0", ""], encoder)
    assert np.isnan(rows).all(1).tolist() == [False, True, True, True, True]


def test_encoder_is_loaded_once(tmp_path, monkeypatch, capsys):
    """For texts and reviews; the next command loads its own."""
    loaded = []

    def load(*clip):
        loaded.append(clip)
        return encode.TinyEncoder()
    monkeypatch.setattr(encode, "ClipEncoder", load)
    dataset = data.load(str(put(tmp_path / "shop", GOOD)))
    made = data.features(dataset, "TR", "clip", tmp_path / "cache", ("m", "w"), "cpu")
    assert set(made) == {"T", "R"} and loaded == [("m", "w", "cpu")]
    data.features(dataset, "TR", "clip", tmp_path / "other", ("m", "w"), "cpu")
    assert len(loaded) == 2


def test_large_picture_is_told_in_one_line(tmp_path, monkeypatch):
    """By us, not by a warning of Pillow's: while it is encoded, and when it is asked for again."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    path = put(tmp_path, {"a.png": png(size=(12, 9))}) / "a.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.read_picture(path).size == (12, 9)


def test_ready_features_that_are_not_used_are_named(tmp_path, capsys):
    files = GOOD | {"item_text.npy": np.ones((6, 2), np.float32)}
    assert prepare(put(tmp_path / "shop", files)) == 0
    assert "text: item_text.npy is not used with --encoder tiny" in capsys.readouterr().out


def test_ready_table_stays_on_disk_where_all_its_rows_are_used(tmp_path):
    table = np.array([[1], [2], [3]], np.float32)
    for pairs, on_disk in (((("u", "i"), ("u", "j"), ("v", "i")), True),
                           ((("u", "i"), ("u", "i"), ("v", "i")), False)):  # a row counts once
        put(tmp_path, {"interactions.csv": csv_text("user,item", pairs), "review.npy": table})
        made = data.features(data.load(str(tmp_path)), "R")["R"]
        assert isinstance(made, np.memmap) == on_disk
        assert made[:, 0].tolist() == ([1, 2, 3] if on_disk else [1, 3])


def test_cached_features_are_not_made_again(tmp_path, monkeypatch):
    rows = extract(tmp_path, TEXTS)
    assert list(np.isnan(rows).all(1)) == [not text for text in TEXTS]
    assert list(np.isfinite(rows).all(1)) == [bool(text) for text in TEXTS]
    files = set(tmp_path.rglob("*.npy"))
    calls = encoder_calls(monkeypatch, fail_at=0)
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), rows)
    assert set(tmp_path.rglob("*.*")) == files
    assert calls == []


@pytest.mark.parametrize("change", ["text", "order", "version", "encoder"])
def test_other_contents_or_encoder_other_cache(tmp_path, monkeypatch, change):
    """A text, the order, the version or the encoder changes the cache's name; both stay."""
    before = extract(tmp_path, TEXTS)
    texts, encoder = TEXTS, "tiny"
    if change == "text":
        texts = TEXTS[:-1] + ["changed"]
    elif change == "order":
        texts = TEXTS[::-1]
    elif change == "version":
        monkeypatch.setattr(encode, "FEATURES_VERSION", 99)
    else:
        encoder = "clip"
        monkeypatch.setattr(encode, "ClipEncoder", lambda *clip: encode.TinyEncoder())
    after = extract(tmp_path, texts, encoder)
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    assert list(np.isnan(after).any(1)) == [not text for text in texts]
    monkeypatch.undo()
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), before)


@pytest.mark.parametrize("cut, n_done", [(0, 4), (7, 3), (100_000, 0)])
def test_interrupted_extraction_goes_on(tmp_path, monkeypatch, cut, n_done):
    """Ctrl-C after four rows, then `cut` bytes lost: the rest alone is encoded."""
    whole = extract(tmp_path / "whole", TEXTS)
    encoder_calls(monkeypatch, fail_at=1)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, TEXTS)
    part, = tmp_path.glob("features/*.part")
    os.truncate(part, max(0, part.stat().st_size - cut))
    monkeypatch.undo()
    calls = encoder_calls(monkeypatch)
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), whole)
    assert sum(calls, []) == [text for text in TEXTS[n_done:] if text]
    assert not part.exists()


def test_two_that_encode_the_same_at_once(tmp_path, monkeypatch):
    """The second starts in the middle of the other and is done before it: both get the whole."""
    whole = extract(tmp_path / "whole", TEXTS)
    real, calls, second = encode.TinyEncoder.text, [], []

    def text(self, texts):
        calls.append(texts)
        if len(calls) == 2:
            second.append(extract(tmp_path, TEXTS))
        return real(self, texts)

    monkeypatch.setattr(encode.TinyEncoder, "text", text)
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), whole)
    np.testing.assert_array_equal(second[0], whole)
    assert [path.suffix for path in tmp_path.glob("features/*")] == [".npy"]


def test_interrupted_command_says_so_and_the_next_one_goes_on(tmp_path, capsys, monkeypatch):
    encoder_calls(monkeypatch, fail_at=1)
    assert prepare(put(tmp_path / "shop", GOOD)) == 2
    assert "interrupted" in only_error(capsys)
    monkeypatch.undo()
    # The descriptions were done, the reviews are left.
    calls = encoder_calls(monkeypatch)
    assert prepare(tmp_path / "shop") == 0
    assert calls == [[f"word{i}" for u, i in GOOD_PAIRS]]


def test_full_disk_while_encoding(tmp_path, capsys, monkeypatch):
    """One line, code 2; the .part stays, and the next run makes what an undisturbed one does."""
    whole = extract(tmp_path / "whole", TEXTS)
    put(tmp_path / "shop", GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(encode.tqdm, "update", no_space)  # called when a chunk has been written
        assert prepare(tmp_path / "shop") == 2
        assert "the disk is full" in only_error(capsys)
        with pytest.raises(OSError):
            extract(tmp_path, TEXTS)
    assert not list(tmp_path.glob("features/*.npy"))
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), whole)
    assert prepare(tmp_path / "shop") == 0


def test_damaged_cache_is_named(tmp_path, capsys):
    """A feature cache that a copy cut off: its name and the remedy, no traceback."""
    assert prepare(put(tmp_path / "shop", GOOD)) == 0
    cache, = tmp_path.glob("cache/features/*-text-*.npy")
    os.truncate(cache, 200)
    assert prepare(tmp_path / "shop") == 2
    message = only_error(capsys)
    assert cache.name in message
    assert "delete" in message


# --- Files that are whole or not there ------------------------------------------------------

@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_earlier_file(tmp_path, capsys, monkeypatch, step):
    """Wherever writing fails, the earlier file is intact and no temporary one stays."""
    path = tmp_path / "a.csv"
    disk.write_file(path, lambda file: file.write("earlier"), "w")
    if step != "write":
        monkeypatch.setattr(os, step, no_space)

    def fill(file):
        file.write("half")
        if step == "write":
            no_space()

    assert run.cli(lambda argv: disk.write_file(path, fill, "w")) == 2
    assert "the disk is full" in only_error(capsys)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "earlier"


def test_pictures_survive_an_interrupted_renewal(tmp_path, monkeypatch):
    """Ctrl-C at any step of replacing a prepared folder by a newer one loses no picture."""
    def write_old(target):
        put(target, {"images/a.jpg": png(), "items.csv": "old"})

    def write_new(target):
        put(target, {"items.csv": "new"})

    def interrupted(real):
        def wrapper(*args, **kwargs):
            nonlocal steps_left
            steps_left -= 1
            if steps_left == 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        return wrapper

    for step in range(1, 20):
        folder, steps_left = tmp_path / str(step) / "Tiny", step
        disk.make_folder(folder, {"version": 1}, write_old)
        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (disk.shutil, "rmtree")):
                patch.setattr(module, name, interrupted(getattr(module, name)))
            with contextlib.suppress(KeyboardInterrupt):
                disk.make_folder(folder, {"version": 2}, write_new)
        disk.make_folder(folder, {"version": 2}, write_new)
        assert (folder / "images" / "a.jpg").exists()
        assert (folder / "items.csv").read_text() == "new"
        if steps_left > 0:
            break  # no step was left to interrupt
    assert 2 < step < 19


def embeddings(folder, with_user=True):
    """Random tables of a data set with unicode ids: (path, dataset, parts, user, item)."""
    interactions = GOOD["interactions.csv"].replace("u1", "ü1").replace("i3", "項3")
    shop = data.load(str(put(folder, {"interactions.csv": interactions})))
    parts = data.split_dataset(shop)
    rng = np.random.default_rng(0)
    user = rng.normal(size=(shop.n_users, 4)).astype(np.float32)
    item = rng.normal(size=(shop.n_items, 4)).astype(np.float32)
    path, meta = folder / "emb.npz", {"data": {"data": str(folder)}}
    data.save_embeddings(path, shop, parts, user if with_user else None, item, meta)
    return path, shop, parts, user, item


@pytest.mark.parametrize("with_user", [True, False])
def test_embeddings_round_trip(tmp_path, with_user):
    path, shop, parts, user, item = embeddings(tmp_path, with_user)
    arrays = data.load_embeddings(path)
    assert arrays["item"].dtype == np.float32
    assert np.array_equal(arrays["item"], item)
    assert ("user" in arrays) == with_user
    if with_user:
        assert np.array_equal(arrays["user"], user)
    assert list(arrays["user_ids"]) == ["u0", "ü1"]
    assert list(arrays["item_ids"]) == list(shop.item_ids)
    assert "項3" in arrays["item_ids"]
    assert arrays["meta"] == {"data": {"data": str(tmp_path)}}
    assert arrays["fingerprint"] == parts.fingerprint


@pytest.mark.parametrize("name, edit, words", [
    ("item", None, "no array 'item'"),
    ("item_ids", None, "no array 'item_ids'"),
    ("user_ids", None, "no array 'user_ids'"),
    ("meta", None, "no array 'meta'"),
    ("fingerprint", None, "no array 'fingerprint'"),
    ("item_ids", lambda x: x.astype(object), "pickled"),
    ("meta", lambda x: np.array("{"), "make it again"),
    ("user", lambda x: x[:, :3], "(2, 3)"),
    ("item", lambda x: x[:5], "(5, 4) for 6 ids"),
    ("item", lambda x: x[0], "(4,) for 6 ids"),
    ("item", lambda x: x[0, 0], "make it again"),
    ("item", lambda x: x.astype(str), "make it again"),
    ("user", lambda x: x * np.nan, "not finite"),
    ("item", lambda x: x / 0, "not finite"),
])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_embeddings_that_cannot_be_used(tmp_path, capsys, name, edit, words):
    """finetune.py refuses an array that is missing, pickled, misshapen or not finite."""
    path = embeddings(tmp_path)[0]
    arrays = dict(np.load(path))
    if edit is None:
        del arrays[name]
    else:
        arrays[name] = edit(arrays[name])
    np.savez(path, **arrays)
    assert call(finetune.main, "--init", path) == 2
    message = only_error(capsys)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("damage", [
    lambda content: content[:-30],
    lambda content: content[:200],
    lambda content: b"",
    lambda content: b"text",
    lambda content: npy(np.ones((6, 4))),
    lambda content: None,
])
def test_damaged_embeddings_file(tmp_path, capsys, damage):
    """Cut off, empty, not an .npz, or not there."""
    path = embeddings(tmp_path)[0]
    content = path.read_bytes()
    path.unlink()
    put(tmp_path, {"emb.npz": damage(content)})
    assert call(finetune.main, "--init", path) == 2
    message = only_error(capsys)
    assert f"error: {path}: " in message
    assert "make it" in message


# --- Amazon: the raw files ------------------------------------------------------------------

def review(user, item, text, seconds):
    return {"reviewerID": user, "asin": item, "reviewText": text, "unixReviewTime": seconds}


REVIEWS = [review(f"U{u}", f"B{i}", f"text {u} {i}", 100 * u + i) for u, i in GOOD_PAIRS]
META = [{"asin": f"B{i}", "title": f"Thing {i}", "description": [], "imageURL": []}
        for i in range(6)]


def packed(records):
    """The bytes of a .json.gz file of these records; a str is a line as it is."""
    lines = []
    for record in records:
        line = record if isinstance(record, str) else json.dumps(record)
        lines.append(line + "\n")
    return gzip.compress("".join(lines).encode(), mtime=0)  # no test is named after the clock


def raw(folder, reviews=REVIEWS, meta=META):
    """Puts the raw files of amazon:Tiny where they are downloaded to; returns folder."""
    put(folder / "amazon", {"Tiny_5.json.gz": packed(reviews), "meta_Tiny.json.gz": packed(meta)})
    return folder


def csv_records(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def warty_reviews():
    """Reviews of U0 for B0 to B3, one of them twice, and of items without metadata."""
    return [
        review("U0", "B0", "later", 9),
        review("U0", "B0", "earlier <br /> one", 2),
        {"reviewerID": "U0", "asin": "B1", "summary": "only a summary", "unixReviewTime": 1},
        review("U0", "B2", None, 3),
        review("U0", "B3", "&#34;quoted&#34;, with a comma", 4),
        review("U1", "gone", "its item has no metadata", 0),
        review("U2", "gone", "this one too", 5),
        review("U2", "B0", "at no known time", None),
    ]


def warty_meta(pictures):
    """Metadata with each known defect once, and co-purchases and ranks named leak."""
    leaks = {
        "also_buy": ["leak1"], "also_view": ["leak2"], "similar_item": "leak3",
        "rank": "leak4 in Toys", "also_bought": ["leak5"], "main_cat": "leak6",
        "category": ["leak7"], "salesRank": {"leak8": 1},
    }
    return [
        {"asin": "B0", "title": "A <b>bold</b> &amp; <i>new<span class='x",
         "description": ["One<br>two", "three"], "feature": ["soft"], "brand": "Acme",
         "imageURL": pictures[:1], "imageURLHighRes": pictures[1:2], **leaks},
        {"asin": "B0", "title": "listed twice", "description": ["two"], **leaks},
        {"asin": "B1", "title": "var aPageStart = (new Date()).getTime();", "description": "",
         "image": pictures[2:3]},
        {"asin": "B2", "title": None, "description": "a <script>leak9()</script>plain string",
         "image": pictures[3]},
        {"asin": "B3", "title": "Half a pair \ud83d", "description": [""], "feature": None,
         "imageURL": ["data:x"]},
        {"asin": "unsold", "title": "nobody wrote about it"},
    ]


def test_amazon_warts(tmp_path, capsys):
    """The raw files' defects. Co-purchases and ranks are interactions: they reach no text."""
    pictures = [f"http://127.0.0.1/{n}.jpg" for n in range(5)]
    raw(tmp_path, warty_reviews(), warty_meta(pictures))
    shop = data.load("amazon:Tiny", tmp_path, modalities="RTG")
    texts = dict(zip(shop.item_ids, shop.texts))
    assert list(texts) == ["B0", "B1", "B2", "B3"]
    assert texts["B0"] == "A bold & new One two three soft Acme"
    assert texts["B1"] == ""
    assert texts["B2"] == "a plain string"
    assert texts["B3"].startswith("Half a pair")
    pairs = zip(shop.user_ids[shop.users], shop.item_ids[shop.items])
    assert dict(zip(pairs, shop.reviews)) == {
        ("U0", "B0"): "earlier one",
        ("U0", "B1"): "only a summary",
        ("U0", "B2"): "",
        ("U0", "B3"): '"quoted", with a comma',
        ("U2", "B0"): "at no known time",
    }
    # U1 is gone, and the oldest review, at no known time, comes to the front.
    assert list(shop.user_ids) == ["U2", "U0"]
    folder = tmp_path / "amazon" / "Tiny"
    assert "leak" not in (folder / "items.csv").read_text()
    assert json.loads((folder / "image_urls.json").read_text()) == {
        "images/B0.jpg": [pictures[1], pictures[0]],
        "images/B1.jpg": [pictures[2]],
        "images/B2.jpg": [pictures[3]],
    }
    has_image = [bool(row["image"]) for row in csv_records(folder / "items.csv")]
    assert has_image == [True, True, True, False]
    out = capsys.readouterr().out
    assert ("8 reviews, 5 items, of which 1 without metadata are dropped, "
            "with 2 reviews") in out
    assert "1 duplicate pairs merged" in out


def test_amazon_is_prepared_once_and_again_when_a_raw_file_changes(tmp_path, monkeypatch):
    real, writes = amazon.write_amazon, []

    def write_amazon(*args):
        writes.append(args)
        real(*args)

    monkeypatch.setattr(amazon, "write_amazon", write_amazon)
    raw(tmp_path)
    for _ in range(2):
        assert data.load("amazon:Tiny", tmp_path).n_items == 6
        assert len(writes) == 1
    raw(tmp_path, meta=META[:5])
    assert data.load("amazon:Tiny", tmp_path).n_items == 5
    assert len(writes) == 2
    for path in (tmp_path / "amazon").glob("*.gz"):
        path.unlink()
    assert data.load("amazon:Tiny", tmp_path).n_items == 5
    assert len(writes) == 2
    assert [path.name for path in (tmp_path / "amazon").iterdir()] == ["Tiny"]


@pytest.mark.parametrize("name, damage, words", [
    ("Tiny_5.json.gz", lambda content: content[:-20],
     "Tiny_5.json.gz: cut off or damaged; delete it"),
    ("meta_Tiny.json.gz", lambda content: content[:40] + b"xxxx" + content[44:],
     "meta_Tiny.json.gz: cut off or damaged; delete it"),
    ("meta_Tiny.json.gz", lambda content: b"<html>moved</html>",
     "meta_Tiny.json.gz: a web page instead of the data; delete it"),
    ("meta_Tiny.json.gz", lambda content: packed([*META, "{'a': 1}"]),
     "meta_Tiny.json.gz, row 7: not a JSON record"),
    ("Tiny_5.json.gz", lambda content: packed([REVIEWS[0], "[1]"]),
     "Tiny_5.json.gz, row 2: not a JSON record"),
    ("Tiny_5.json.gz", lambda content: packed([REVIEWS[0], {"asin": "B1"}]),
     "Tiny_5.json.gz, row 2: no field 'reviewerID'"),
    ("meta_Tiny.json.gz", lambda content: packed([{"asin": "other"}]),
     "no item of Tiny_5.json.gz is in it"),
])
def test_damaged_raw_file(tmp_path, capsys, name, damage, words):
    """A raw file's defect is one line, and no half-made folder stays."""
    path = raw(tmp_path) / "amazon" / name
    path.write_bytes(damage(path.read_bytes()))
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 2
    assert words in only_error(capsys)
    names = {path.name for path in (tmp_path / "amazon").iterdir()}
    assert names == {"Tiny_5.json.gz", "meta_Tiny.json.gz"}


# --- Amazon: the downloads, from a server on this machine -----------------------------------

@contextlib.contextmanager
def server(routes):
    """Serves {path: bytes, or a function of the handler}; other paths are 404.

    Yields (address, log of (path, Range header)).
    """
    log = []

    class Handler(BaseHTTPRequestHandler):
        def handle(self):
            # A client may be gone even before it asks: that would be printed in a later test.
            with contextlib.suppress(ConnectionError):
                super().handle()

        def do_GET(self):
            log.append((self.path, self.headers["Range"]))
            route = routes.get(self.path)
            if route is None:
                answer(self, b"no such file", 404)
            elif callable(route):
                route(self)
            else:
                answer(self, route)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/", log
        finally:
            httpd.shutdown()


def answer(handler, body, status=200, sent=None, **headers):
    """One answer; sent: only so many bytes of what Content-Length promises."""
    handler.send_response(status)
    headers = {"Content-Length": len(body), **headers}
    for name, value in headers.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body[:sent])


def cut_once(body, length, ranges):
    """A route that closes the connection after `length` bytes, once.

    After that it goes on from where it is asked to or, without ranges, starts anew.
    """
    starts = []

    def route(handler):
        start, asked = 0, handler.headers["Range"]
        if ranges and asked:
            start = int(re.match(r"bytes=(\d+)-$", asked)[1])
        starts.append(start)
        sent = length if len(starts) == 1 else None
        answer(handler, body[start:], 206 if start else 200, sent)

    return route


def no_sleep(monkeypatch):
    """Downloads try again at once; returns the seconds they would have waited."""
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("ranges", [True, False])
def test_amazon_from_nothing(tmp_path, capsys, monkeypatch, ranges):
    """Raw files through a redirect and a cut connection, pictures of every kind.

    The second run asks for nothing again but what may have been the network's word.
    """
    no_sleep(monkeypatch)
    # A picture may have 5,000 bytes and is asked for twice.
    monkeypatch.setattr(download.fetch_image, "__defaults__", (5000, 2))
    good = png(colour="red", format="JPEG")
    pause = threading.Event()  # never set; time.sleep is patched

    def redirect(location):
        return lambda handler: answer(handler, b"", 302, Location=location)

    def slow(handler):
        pause.wait(0.2)
        answer(handler, good)

    routes = {
        "/good": good,
        "/slow": slow,
        "/page": b"<html>captcha</html>",
        "/big": good + bytes(5000),  # but for its size a fine picture
        "/moved": redirect("/good"),
        "/cut": cut_once(good, 300, False),
        "/empty": lambda handler: answer(handler, b""),
    }
    item_pictures = [["good"], ["slow"], ["page"], ["big"], ["gone"], ["gone", "good"],
                     ["moved"], ["cut"], ["empty"]]
    reviews = []
    for n in range(27):
        reviews.append({"reviewerID": f"U{n % 3}", "asin": f"B{n // 3}", "reviewText": "x"})
    reviews = packed(reviews)
    with server(routes) as (url, log):
        meta = []
        for i, names in enumerate(item_pictures):
            urls = [url + name for name in names]
            meta.append({"asin": f"B{i}", "title": f"Thing {i}", "imageURLHighRes": urls})
        meta = packed(meta)
        routes["/old/categoryFilesSmall/Tiny_5.json.gz"] = redirect("/new")
        routes["/new"] = reviews
        routes["/old/metaFiles2/meta_Tiny.json.gz"] = cut_once(meta, 50, ranges)
        argv = ("amazon:Tiny", "--amazon-url", url + "old")  # no slash after old
        assert prepare(*argv, data_dir=tmp_path) == 0
        n_asked, out = len(log), capsys.readouterr().out
        assert prepare(*argv, data_dir=tmp_path) == 0
        assert {path for path, _ in log[n_asked:]} == {"/page", "/empty"}
    assert [asked for path, asked in log if "meta" in path] == [None, "bytes=50-"]
    folder = tmp_path / "amazon"
    assert (folder / "meta_Tiny.json.gz").read_bytes() == meta
    assert (folder / "Tiny_5.json.gz").read_bytes() == reviews
    assert not list(tmp_path.rglob("*.part"))
    fetched = {}
    for path in (folder / "Tiny" / "images").glob("*.jpg"):
        fetched[path.name] = path.read_bytes()
    assert fetched == {f"B{i}.jpg": good for i in (0, 1, 5, 6, 7)}
    assert ("images: 5 fetched, 2 refused or no picture, 2 unreachable; "
            "their items go without") in out
    assert "image: 256-d; 4 of 9 items have none (4 unreadable, the first " in out


def test_raw_file_that_is_not_there(tmp_path, capsys):
    with server({}) as (url, log):
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    message = only_error(capsys)
    assert f"{url}categoryFilesSmall/Tiny_5.json.gz: HTTP 404" in message
    assert f"put the file at {tmp_path / 'amazon' / 'Tiny_5.json.gz'}" in message
    assert len(log) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:1/", "http://127.0.0.1:1/", "http://[/"])
def test_server_that_is_not_there(tmp_path, capsys, monkeypatch, url):
    """A malformed address or a port where nobody listens: a few tries, then one line."""
    waits = no_sleep(monkeypatch)
    assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert "put the file at" in only_error(capsys)
    assert waits == sorted(waits)
    assert len(waits) < 10


def test_server_that_never_gets_further_is_given_up(tmp_path, capsys, monkeypatch):
    """Every answer cut at the same place: no endless loop."""
    no_sleep(monkeypatch)

    def cut(handler):
        answer(handler, bytes(1000), sent=100)

    with server({"/categoryFilesSmall/Tiny_5.json.gz": cut}) as (url, log):
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert "the connection was cut; run the command again" in only_error(capsys)
    assert 2 < len(log) < 20


def test_part_file_that_is_already_whole_or_foreign(tmp_path, monkeypatch):
    """HTTP 416: what lies here does not fit the server's file, which is fetched anew."""
    no_sleep(monkeypatch)

    def whole_only(handler):
        if handler.headers["Range"]:
            answer(handler, b"", 416)
        else:
            answer(handler, b"\0new")

    put(tmp_path, {"a.gz.part": "something longer"})
    with server({"/a.gz": whole_only}) as (url, log):
        download.fetch_file(url + "a.gz", tmp_path / "a.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"]
    assert (tmp_path / "a.gz").read_bytes() == b"\0new"


def test_dead_picture_server_stops_the_asking(tmp_path, capsys):
    """After 32 failures in a row the rest is left for another run, and none counts as refused."""
    urls = {f"images/{n}.jpg": [f"http://127.0.0.1:1/{n}.jpg"] for n in range(200)}
    put(tmp_path, {"image_urls.json": json.dumps(urls)})
    download.fetch_images(tmp_path)
    line = capsys.readouterr().out
    counts = re.search(r"0 fetched, 0 refused or no picture, (\d+) unreachable; "
                       r"gave up after 32 in a row, (\d+) not tried", line)
    n_unreachable, n_left = map(int, counts.groups())
    assert 32 <= n_unreachable < 64
    assert n_unreachable + n_left == 200
    assert not list((tmp_path / "images").iterdir())


def test_unreachable_pictures_are_asked_for_again(tmp_path, capsys, monkeypatch):
    """A server error or a time-out is no refusal: the next run tries again, and only that."""
    monkeypatch.setattr(download, "SILENCE", 0.2)
    busy, done = True, threading.Event()

    def hangs(handler):
        if busy:
            done.wait(10)
        else:
            answer(handler, png())

    def fails(handler):
        if busy:
            answer(handler, b"", 503)
        else:
            answer(handler, png())

    with server({"/hangs": hangs, "/fails": fails, "/fine": png()}) as (url, log):
        names = ("hangs", "fails", "fine", "gone")
        urls = {f"images/{name}.jpg": [url + name] for name in names}
        put(tmp_path, {"image_urls.json": json.dumps(urls)})
        download.fetch_images(tmp_path)
        line = capsys.readouterr().out
        assert "1 fetched, 1 refused or no picture, 2 unreachable" in line
        n_asked = len(log)
        busy = False
        done.set()
        download.fetch_images(tmp_path)
    assert sorted(path for path, _ in log[n_asked:]) == ["/fails", "/hangs"]
    line = capsys.readouterr().out
    assert "2 fetched, 0 refused or no picture, 0 unreachable" in line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("what", ["raw", "picture"])
def test_full_disk_while_downloading(tmp_path, capsys, monkeypatch, what, code):
    """A full disk is told at once, not taken for a broken connection; no half picture stays."""
    real = os.replace

    def full(*args, **kwargs):
        raise OSError(code, "full")

    def full_for_pictures(old, new):
        if Path(new).suffix == ".jpg":
            full()
        real(old, new)

    monkeypatch.setattr(download.time, "sleep", full)
    routes = {"/categoryFilesSmall/Tiny_5.json.gz": bytes(9), "/a.png": png()}
    with server(routes) as (url, log):
        with_picture = META[0] | {"imageURL": [url + "a.png"]}
        raw(tmp_path, meta=[with_picture, *META[1:]])
        if what == "raw":
            (tmp_path / "amazon" / "Tiny_5.json.gz").unlink()
            monkeypatch.setattr(download.tqdm, "update", full)
        else:
            monkeypatch.setattr(os, "replace", full_for_pictures)
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert "the disk is full" in only_error(capsys)
    assert len(log) == 1
    assert not list(tmp_path.glob("amazon/Tiny/images/*"))


# --- CLIP -----------------------------------------------------------------------------------

def tiny_clip(folder, custom_text=False):
    """(name, weights file, model): a one-layer CLIP with random weights, known to open_clip."""
    open_clip = pytest.importorskip("open_clip")
    import torch
    name = "tiny-custom-test" if custom_text else "tiny-test"
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                       "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }
    if custom_text:
        config["custom_text"] = True
    put(folder, {f"configs/{name}.json": json.dumps(config)})
    open_clip.add_model_config(folder / "configs")
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    weights = folder / f"{name}.pt"
    torch.save(model.state_dict(), weights)
    return name, weights, model


def text_by_hand(name, model, texts):
    """CLIP's text vectors from the model's own parts, [n, 24]."""
    import open_clip
    import torch
    tokens = open_clip.get_tokenizer(name)(texts)                       # [n, 77]
    x = model.token_embedding(tokens) + model.positional_embedding      # [n, 77, 32]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    end = tokens.argmax(1)                                              # of the text, [EOS]
    return x[torch.arange(len(texts)), end] @ model.text_projection


def images_by_hand(model, paths):
    """CLIP's image vectors of these files, [n, 24]."""
    import open_clip
    import torch
    transform = open_clip.image_transform(
        32, is_train=False, mean=model.visual.image_mean, std=model.visual.image_std)
    pictures = [transform(Image.open(path)) for path in paths]
    return model.encode_image(torch.stack(pictures))


def test_clip_features_are_the_towers_projections(tmp_path):
    """Against the model's own parts; a cache that was broken off is gone on with."""
    name, weights, model = tiny_clip(tmp_path)
    import torch
    texts = ["a red lamp", "", "word " * 200, "blue"]
    pictures = ["red.png", "", "blue.png", "green.png"]
    folder = put(tmp_path / "shop", {
        "items.csv": csv_text("item,text,image", zip(range(4), texts, pictures)),
        "interactions.csv": csv_text("user,item", [("u", n) for n in range(4)]),
    })
    for colour in ("red", "blue", "green"):
        put(folder, {f"{colour}.png": png(size=(50, 40), colour=colour)})
    shop, clip = data.load(str(folder)), (name, str(weights))
    made = data.features(shop, "TV", "clip", tmp_path, clip)
    assert made["T"].shape == made["V"].shape == (4, 24)
    present = [0, 2, 3]
    with torch.no_grad():
        text = text_by_hand(name, model, [texts[n] for n in present])
        image = images_by_hand(model, [folder / pictures[n] for n in present])
    for modality, truth in (("T", text), ("V", image)):
        np.testing.assert_allclose(made[modality][present], truth, rtol=1e-2, atol=2e-3)
        assert np.isnan(made[modality][1]).all()
    path, = tmp_path.glob("features/*-text-clip-*.npy")
    # The last row is lost, 48 bytes, and two bytes of the one before.
    os.truncate(path, path.stat().st_size - 50)
    path.rename(path.with_suffix(".part"))
    again = data.features(shop, "T", "clip", tmp_path, clip)
    np.testing.assert_allclose(again["T"], made["T"], atol=1e-3)
    # The same weights elsewhere have the same cache, others another one.
    copy = tmp_path / "copy.pt"
    copy.write_bytes(weights.read_bytes())
    data.features(shop, "T", "clip", tmp_path, (name, str(copy)))
    assert len(list(tmp_path.glob("features/*-text-clip-*.npy"))) == 1
    torch.save({key: 2 * x for key, x in model.state_dict().items()}, weights)
    data.features(shop, "T", "clip", tmp_path, clip)
    assert len(list(tmp_path.glob("features/*-text-clip-*.npy"))) == 2


def test_clip_model_with_its_own_text_tower(tmp_path):
    """open_clip keeps a custom text tower's projection elsewhere (SigLIP and others)."""
    name, weights, model = tiny_clip(tmp_path, custom_text=True)
    encoder = encode.ClipEncoder(name, str(weights))
    assert encoder.text_width == 24
    assert encoder.text(["a"]).shape == (1, 24)


def raises(error):
    """A function that takes anything and raises this error."""
    def function(*args, **kwargs):
        raise error
    return function


@pytest.mark.parametrize("weights", ["no-such-tag", "nowhere.pt", "empty.pt", "text.pt", None])
def test_clip_weights_that_cannot_be_had(tmp_path, capsys, monkeypatch, weights):
    """One line with both remedies, whatever open_clip raises.

    None: an error without a message.
    """
    pytest.importorskip("open_clip")
    monkeypatch.chdir(put(tmp_path, {"empty.pt": b"", "text.pt": "no weights"}))
    if weights is None:
        monkeypatch.setattr("open_clip.create_model_from_pretrained", raises(TimeoutError()))
    put(tmp_path / "shop", GOOD)
    argv = ("--data", "shop", "--data-dir", "cache", "--encoder", "clip",
            "--clip-weights", weights or "openai")
    assert call(mmcpr.main, *argv) == 2
    message = only_error(capsys)
    assert "--clip-weights FILE" in message
    assert "--encoder tiny" in message
    assert "connect" in message


def test_clip_tokenizer_that_cannot_be_had(tmp_path, capsys, monkeypatch):
    """Some models' tokenizer is a download of its own (SigLIP): the same line."""
    name, weights, _ = tiny_clip(tmp_path)
    monkeypatch.setattr("open_clip.get_tokenizer", raises(OSError("no connection")))
    argv = ("--encoder", "clip", "--clip-model", name, "--clip-weights", weights)
    assert prepare(put(tmp_path / "shop", GOOD), *argv) == 2
    assert "--encoder tiny" in only_error(capsys)


def test_clip_without_weights_is_refused(tmp_path, capsys):
    """open_clip would give random towers and say so only in its log."""
    name, _, _ = tiny_clip(tmp_path)
    argv = ("--encoder", "clip", "--clip-model", name, "--clip-weights", "")
    assert prepare(put(tmp_path / "shop", GOOD), *argv) == 2
    assert "--clip-weights FILE" in only_error(capsys)


# --- disk.py: what is the user's, and what was computed, is not lost -----------------------

@pytest.mark.parametrize("main, flag", [
    (mmcpr.main, "--out"), (finetune.main, "--out"), (finetune.main, "--metrics"),
    (finetune.main, "--recommend")])
@pytest.mark.parametrize("name", ["interactions.csv", "items.csv", "item_text.npy", "1.png"])
@pytest.mark.parametrize("through", ["path", "link", "hard link"])
def test_output_over_a_file_of_the_data(tmp_path, monkeypatch, capsys, main, flag, name, through):
    """By its own path or another one of the same file: refused, and the file is as it was."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    target = tmp_path / "shop" / name
    if name == "1.png":
        target.write_bytes(b"a picture")
    before, path = target.read_bytes(), target
    if through != "path":
        path = tmp_path / "other"
        path.symlink_to(target) if through == "link" else os.link(target, path)
    assert call(main, "--data", "shop", "--epochs", 1, flag, path) == 2
    assert "which is read here; choose another output path" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize("name", ["items.csv", "text_feat.npy", "x.inter"])
def test_output_that_would_be_read_as_data(tmp_path, monkeypatch, capsys, name):
    """A file of the data that is not there yet."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "shop", GOOD | {"items.csv": None})
    assert call(finetune.main, "--data", "shop", "--epochs", 0, "--recommend",
                tmp_path / "shop" / name) == 2
    assert f"{name}: would be read as a part of the data" in only_error(capsys)
    assert not (tmp_path / "shop" / name).exists()


def test_output_beside_the_data_may_be_renewed(tmp_path, monkeypatch):
    """What a run has written into the data's folder is no file of the data set."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    for _ in range(2):
        assert call(finetune.main, "--data", "shop", "--epochs", 0, "--metrics", "shop/m.json",
                    "--recommend", "shop/recs.csv", "--out", "shop/emb.npz") == 0


@pytest.mark.parametrize("main, out", [(mmcpr.main, "e.npz"), (finetune.main, "f.npz")])
def test_full_disk_at_the_last_write(trained, capsys, monkeypatch, main, out):
    """The numbers are printed, the run is kept, and --resume writes what was not written."""
    real = disk.write_file

    def full(path, write, mode="wb"):
        if Path(path).name == out:
            raise OSError(28, "No space left on device", str(path))
        real(path, write, mode)
    flags = ("--data", "shop", "--epochs", 2, "--eval-every", 1, "--out", out)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_file", full)
        assert call(main, *flags) == 2
    printed, err = capsys.readouterr()
    assert ("validation Recall@20" if main is mmcpr.main else "seed 0, epoch") in printed
    assert f"{out}: not written (No space left on device); the same command with --resume" in err
    assert call(main, *flags, "--resume") == 0
    assert "goes on after epoch 2" in capsys.readouterr().out
    resumed = data.load_embeddings(out)
    assert call(main, *flags) == 0
    assert (resumed["item"] == data.load_embeddings(out)["item"]).all()


def test_file_that_another_program_has_open(tmp_path, monkeypatch):
    """Windows refuses to replace it: what was to be written is kept under a name that is told."""
    path, real = tmp_path / "emb.npz", os.replace
    path.write_bytes(b"earlier")

    def locked(source, target):
        if Path(target) == path:
            raise PermissionError(13, "Access is denied", str(source), None, str(target))
        real(source, target)
    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(run.InputError, match="another program may have it open.*emb.npz.new"):
        disk.write_file(path, lambda file: file.write(b"computed"))
    assert path.read_bytes() == b"earlier"
    assert (tmp_path / "emb.npz.new").read_bytes() == b"computed"
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_of_killed_runs_are_swept(tmp_path):
    """Of the same output, and not those that another run may be writing now."""
    names = (".e.npz.1.tmp", ".e.npz.2.tmp", ".other.npz.1.tmp")
    for name in names:
        (tmp_path / name).touch()
    for name in names[1:]:
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    disk.check_outputs([tmp_path / "e.npz"])
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2]}


# --- run.py: what must not end in a traceback ----------------------------------------------

def test_output_that_cannot_be_printed(tmp_path):
    """`>&-`, and a terminal that cannot show ±: what can be written is written."""
    write_shop(tmp_path / "shop")
    started = {}
    for name, options in (
            ("closed", {"env": ON_THE_CPU, "preexec_fn": lambda: os.close(1)}),
            ("ascii", {"env": ON_THE_CPU | {"PYTHONIOENCODING": "ascii"},
                       "stdout": subprocess.PIPE})):
        folder = tmp_path / name  # of the checkpoint
        folder.mkdir()
        command = [sys.executable, HERE / "finetune.py", "--data", tmp_path / "shop", "--epochs",
                   "0", "--seeds", "0", "1", "--metrics", "m.json"]
        started[name] = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, **options)
    for name, process in started.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and b"Traceback" not in err, err
        assert len(json.loads((tmp_path / name / "m.json").read_text())["runs"]) == 2
        assert name == "closed" or b"? std" in out


@pytest.mark.parametrize("number", ["10" * 20, "-1", "0", "1.5", "x"])
@pytest.mark.parametrize("flag", ["--candidates", "--batch", "--dim", "--top"])
def test_absurd_integers(number, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main([flag, number])
    assert stop.value.code == 2 and flag in capsys.readouterr().err


@pytest.mark.parametrize("world_size", ["x", "", "-1", "2"])
def test_broken_world_size(tmp_path, monkeypatch, capsys, world_size):
    """What another launcher has left in the environment, without any other process."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert call(finetune.main, "--data", "shop", "--epochs", 0) == 2
    assert "unset them, or start with torchrun" in capsys.readouterr().err


def test_ctrl_c_while_the_libraries_are_imported(tmp_path):
    """Python has not come to main yet: one line all the same."""
    slow = tmp_path / "numpy.py"
    slow.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    for script in ("mmcpr.py", "finetune.py", "data.py"):
        done = subprocess.run([sys.executable, HERE / script], capture_output=True, timeout=60,
                              env=ON_THE_CPU | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 2 and done.stderr == b"error: interrupted\n", done.stderr


# --- finetune.py: recommendations for use --------------------------------------------------

def test_recommendations_for_use(trained, capsys):
    """--top items each; --all-seen leaves out what is held out, too; users without training
    interactions are counted."""
    dataset = data.load("shop", contents=False)
    parts = data.split_dataset(dataset)
    flags = ("--init", "emb.npz", "--epochs", 0, "--recommend", "r.csv", "--top", 3)
    for more, seen in (((), parts.train + parts.valid),
                       (("--all-seen",), parts.train + parts.valid + parts.test)):
        assert call(finetune.main, *flags, *more) == 0
        columns = folders.read_csv("r.csv", ("user", "rank", "item", "score"))
        assert columns["user"].count("u0") == 3 and set(columns["rank"]) == {"1", "2", "3"}
        row_of = {name: row for row, name in enumerate(dataset.user_ids)}
        col_of = {name: col for col, name in enumerate(dataset.item_ids)}
        for user, item in zip(columns["user"], columns["item"]):
            assert not seen[row_of[user], col_of[item]]
    assert "no training interaction" not in capsys.readouterr().out

    lines = [f"{u}\t{i}\t{0 if u else 2}" for u in range(3) for i in range(6)]
    (trained / "x").mkdir()
    (trained / "x" / "x.inter").write_text("\n".join(["userID\titemID\tx_label", *lines]))
    assert call(finetune.main, "--data", "x", "--valid", 0, "--epochs", 0,
                "--recommend", "r.csv") == 0
    assert "r.csv: 1 users have no training interaction" in capsys.readouterr().out


def peak_memory():
    """The most memory that this process has had, in KB."""
    resource = pytest.importorskip("resource")  # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- Formats ------------------------------------------------------------------------------

LIGHTGCN = {
    "train.txt": "0 3 1 2\n1 0 \n4 1 5\n",
    "test.txt": "0 0\n1\n4 3 0\n",
}


def parts_of(folder, **options):
    """(dataset, Parts, {label: set of (user, item)}) of a folder."""
    dataset = data.load(str(folder), **options)
    parts = data.split_dataset(dataset)
    pairs = {}
    for label, matrix in enumerate((parts.train, parts.valid, parts.test)):
        users, items = matrix.nonzero()
        pairs[label] = set(zip(dataset.user_ids[users], dataset.item_ids[items]))
    return dataset, parts, pairs


def test_lightgcn_folder(tmp_path):
    """Its lines are the published split, its item numbers the rows of the feature files."""
    features = np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    files = LIGHTGCN | {"valid.txt": "0 4\n", "text_feat.npy": features}
    dataset, _, pairs = parts_of(put(tmp_path, files))
    assert pairs[data.TRAIN] == {("0", "3"), ("0", "1"), ("0", "2"), ("1", "0"), ("4", "1"),
                                 ("4", "5")}
    assert pairs[data.VALID] == {("0", "4")}
    assert pairs[data.TEST] == {("0", "0"), ("4", "3"), ("4", "0")}
    assert list(dataset.user_ids) == ["0", "1", "4"]
    assert list(dataset.item_ids) == list("012345")
    assert np.array_equal(data.features(dataset, "T")["T"], features)


def test_lightgcn_folder_trains(tmp_path, monkeypatch):
    """Without valid.txt a tenth of the training interactions validates; both scripts run."""
    rng = np.random.default_rng(0)
    lines = {"train.txt": "", "test.txt": ""}
    for user in range(20):
        items = rng.permutation(15)[:8]
        lines["train.txt"] += f"{user} {' '.join(map(str, items[:6]))}\n"
        lines["test.txt"] += f"{user} {' '.join(map(str, items[6:]))}\n"
    monkeypatch.chdir(put(tmp_path, {f"gowalla/{name}": text for name, text in lines.items()}))
    assert call(mmcpr.main, "--data", "gowalla", "--modalities", "G", "--epochs", 2) == 0
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 1) == 0


RECBOLE = "\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float",
                     *(f"u{n // 6}\tB00{n % 7}\t{n % 5 + 1}.0\t9" for n in range(24))]) + "\n"


def test_recbole_file(tmp_path, capsys):
    """Ids are texts; there is no split, so it is ours."""
    dataset, parts, pairs = parts_of(put(tmp_path, {"ml.inter": RECBOLE}))
    assert dataset.labels is None
    assert list(dataset.user_ids) == ["u0", "u1", "u2", "u3"]
    assert set(dataset.item_ids) == {f"B00{k}" for k in range(7)}
    rows = [line.split("\t") for line in RECBOLE.splitlines()[1:]]
    assert set.union(*pairs.values()) == {(user, item) for user, item, _, _ in rows}
    assert parts.test.nnz == 8  # of seven interactions each, two
    out = capsys.readouterr().out
    assert "(not read: timestamp:float)" in out
    assert "all ratings count as positive" in out


@pytest.mark.parametrize("files, words", [
    ({"ratings.dat": "1::1193::5::978300760\n"}, "ratings.dat, fields separated by ::"),
    ({"ratings.csv": "1,1193,5\n2,3,4\n"}, "ratings.csv, no header"),
    ({"ratings.csv": "userId,movieId\n1,2\n"}, "ratings.csv, its first line 'userId,movieId'"),
    ({"inter.parquet": b"PAR1\x15\x04"}, "inter.parquet, parquet"),
    ({"r.json.gz": b"\x1f\x8b\x08"}, "r.json.gz, gzip"),
    ({"a.xlsx": b"PK\x03\x04"}, "a.xlsx, zip or xlsx"),
    ({"a.pkl": b"\x80\x04\x95"}, "a.pkl, a pickle"),
    ({"a.bin": b"a\0b"}, "a.bin, binary"),
    ({"sub/interactions.csv": "user,item\n"}, "sub, a folder"),
    ({"train.txt": "0 1\n"}, "train.txt, no header"),
    ({}, "in it: nothing"),
])
def test_folder_of_another_format(tmp_path, capsys, files, words):
    """What was seen is named, and what is read with its first lines."""
    (tmp_path / "x").mkdir()
    assert prepare(put(tmp_path / "x", files)) == 2
    message = only_error(capsys)
    assert words in message
    for line in ("user,item", "userID<tab>itemID<tab>x_label", "user_id:token<tab>item_id:token",
                 "0 12 7"):
        assert line in message


@pytest.mark.parametrize("files, words", [
    ({"interactions.csv": "1::1193::5\n"}, "fields are separated by :: there; the header here is"),
    ({"interactions.csv": "1,1193\n2,3\n"}, "no header, it seems: write user,item as the first"),
    ({"interactions.csv": "user|item\n2|3\n"}, "separate the columns by commas"),
    ({"x.inter": "user:token\titem:token\na\tb\n"}, "no column 'user_id:token'; its columns are"),
    ({"x.inter": "0\t1\t2\n"}, "write userID<tab>itemID<tab>x_label as the first line"),
    ({"x.inter": "uid\tiid\na\tb\n"}, "user_id:token<tab>item_id:token"),
    ({"train.txt": "0 1\n", "test.txt": "0,1\n"}, "test.txt, row 1: '0,1' is not a whole number"),
    ({"train.txt": "0 1\n1 x\n", "test.txt": ""}, "train.txt, row 2: 'x' is not a whole number"),
    ({"train.txt": b"0 1\n\xff 2\n", "test.txt": ""}, "train.txt, row 2: not UTF-8"),
    ({"train.txt": "0\n", "test.txt": "1\n"}, "no line has a user and an item"),
    ({"train.txt": "0 1\n", "test.txt": "\n"}, "nothing to test: no row is labelled test (2)"),
])
def test_file_of_another_shape(tmp_path, capsys, files, words):
    assert prepare(put(tmp_path / "x", files)) == 2
    assert words in only_error(capsys)


def test_file_instead_of_its_folder(tmp_path, capsys):
    put(tmp_path, {"ratings.csv": "user,item\na,b\n"})
    assert prepare(tmp_path / "ratings.csv") == 2
    message = only_error(capsys)
    assert "ratings.csv, its first line 'user,item', where a folder is expected" in message
    assert "what is read here is a folder" in message


def test_mmrec_feature_files_may_have_more_rows(tmp_path, capsys):
    """Row = itemID; what comes after the largest is of items that nobody has."""
    features = np.arange(16, dtype=np.float32).reshape(8, 2) + 1
    features[7] = np.inf  # nobody reads it
    put(tmp_path / "x", {"x.inter": INTER, "text_feat.npy": features})
    dataset = data.load(str(tmp_path / "x"))
    assert np.array_equal(data.features(dataset, "T")["T"], features[:5])
    put(tmp_path / "x", {"text_feat.npy": features[:4]})
    assert prepare(tmp_path / "x") == 2
    assert "4 rows, but 5 are needed" in only_error(capsys)


def test_demo_is_the_built_in_set_not_a_name(tmp_path, monkeypatch, capsys):
    """A folder called demo gets CLIP like any other; the built-in set gets the tiny encoder."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.write_demo, "__defaults__", (40, 30, 16))
    monkeypatch.setattr(encode, "ClipEncoder", lambda *clip: asked.append(clip)
                        or encode.TinyEncoder())
    put(tmp_path / "demo", GOOD)
    for name in ("./demo", str(tmp_path / "demo")):
        assert call(data.main, "--data", name, "--device", "cpu") == 0
        assert asked and {device for _, _, device in asked} == {"cpu"}
        for path in tmp_path.glob("data/features/*"):
            path.unlink()
        asked.clear()
    assert call(data.main) == 0
    assert not asked
    assert data.load("demo", min_count=1).encoder == "tiny"


# --- The split and the ratings of interactions.csv ---------------------------------------

PARTS = {"train": data.TRAIN, "valid": data.VALID, "test": data.TEST}


@pytest.mark.parametrize("column, names", [
    ("split", ("train", "valid", "test")), ("split", ("0", "1", "2")),
    ("x_label", ("0", "1", "2")), ("x_label", (" Train", "VALID", "Test")),
])
def test_split_column_is_the_split(tmp_path, capsys, column, names):
    rows = [(f"u{n % 3}", f"i{n}", names[n % 7 % 3]) for n in range(21)]
    files = {"interactions.csv": csv_text(f"user,item,{column}", rows)}
    _, _, pairs = parts_of(put(tmp_path / "shop", files))
    for label, name in enumerate(names):
        assert pairs[label] == {(user, item) for user, item, part in rows if part == name}
    line = f"shop: the split is that of interactions.csv's column {column}\n"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("header, value, words", [
    ("user,item,split", "dev", "data row 2: split 'dev' is none of train, valid, test (or 0, 1"),
    ("user,item,split", "", "data row 2: split '' is none"),
    ("user,item,x_label", "3", "data row 2: x_label '3' is none"),
    ("user,item,x_label", "1.0", "data row 2: x_label '1.0' is none"),
    ("user,split,item,x_label", "0,0", "both columns split and x_label; remove one"),
])
def test_split_column_with_other_values(tmp_path, capsys, header, value, words):
    first = ",".join(["0"] * header.count(",")) + ",0"
    second = "1," * (header.count(",") - value.count(",")) + value
    files = {"interactions.csv": f"{header}\n{first}\n{second}\n"}
    assert prepare(put(tmp_path / "shop", files)) == 2
    assert words in only_error(capsys)


RATED = [(f"u{n % 3}", f"i{n}", n % 5 + 0.5) for n in range(30)]


@pytest.mark.parametrize("name, text", [
    ("interactions.csv", csv_text("user,item,rating", RATED)),
    ("r.inter", csv_text("user_id:token,item_id:token,rating:float", RATED).replace(",", "\t")),
    ("m.inter", "userID\titemID\trating\tx_label\n" + "".join(
        f"{n % 3}\t{n}\t{rating}\t{n % 3}\n" for n, (_, _, rating) in enumerate(RATED))),
])
def test_min_rating(tmp_path, capsys, name, text):
    """Those rated at least R are kept, with the users and items that they have."""
    put(tmp_path, {name: text})
    line = ("all ratings count as positive, as in the paper; "
            "--min-rating R keeps those of at least R")
    assert len(data.load(str(tmp_path)).users) == 30
    assert line in capsys.readouterr().out
    kept = data.load(str(tmp_path), min_rating=3.5)
    assert line not in capsys.readouterr().out
    assert [int(re.sub("[ui]", "", item)) for item in kept.item_ids[kept.items]] == [
        n for n, (_, _, rating) in enumerate(RATED) if rating >= 3.5]
    assert kept.n_items == len(kept.items)
    assert data.load(str(tmp_path), min_rating=-1).n_items == 30


def test_min_rating_comes_before_duplicates_are_merged(tmp_path):
    """A pair that was rated low and later high is there, with its later review."""
    rows = ["user,item,review,rating", "u,a,early,1", "u,a,late,5", "v,a,other,4", "w,b,low,2"]
    dataset = data.load(str(put(tmp_path, {"interactions.csv": "\n".join(rows)})), min_rating=3)
    assert dataset.reviews == ["late", "other"]
    assert list(dataset.user_ids) == ["u", "v"]


@pytest.mark.parametrize("header, value, flag, words", [
    ("user,item,rating", "good", 1, "data row 1: rating 'good' is not a number"),
    ("user,item,rating", "", 1, "data row 1: rating '' is not a number"),
    ("user,item,rating", "nan", 1, "data row 1: rating 'nan' is not a number"),
    ("user,item,rating", "3", 4, "no rating is 4 or more; lower --min-rating"),
    ("user,item,review", "3", 4, "--min-rating needs a column of ratings"),
])
def test_min_rating_that_cannot_be_kept(tmp_path, capsys, header, value, flag, words):
    put(tmp_path / "shop", {"interactions.csv": f"{header}\nu,i,{value}\n"})
    assert prepare(tmp_path / "shop", "--min-rating", flag) == 2
    assert words in only_error(capsys)


def test_min_rating_is_remembered(tmp_path, monkeypatch, capsys):
    """emb.npz has it, so that fine-tuning sees the same data; one without it is of all ratings."""
    rows = [(f"u{n // 9}", f"i{n % 9}", n % 4) for n in range(90)]
    monkeypatch.chdir(put(tmp_path, {"shop/interactions.csv": csv_text("user,item,rating", rows)}))
    flags = ("--data", "shop", "--modalities", "G", "--epochs", 1)
    assert call(mmcpr.main, *flags, "--min-rating", 1) == 0
    assert data.load_embeddings("emb.npz")["meta"]["data"]["min_rating"] == 1
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 0) == 0
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 0, "--min-rating", 2) == 2
    assert "made from other training interactions" in only_error(capsys)
    assert call(mmcpr.main, *flags) == 0
    arrays = dict(np.load("emb.npz"))
    meta = json.loads(str(arrays["meta"]))
    del meta["data"]["min_rating"]
    np.savez("emb.npz", **arrays | {"meta": json.dumps(meta)})
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 0) == 0


# --- Ids and numbers of absurd size -------------------------------------------------------

@pytest.mark.parametrize("name, text, words", [
    ("interactions.csv", "user,item\nu,i0\nu," + "x" * 8000 + "\n",
     "interactions.csv: data row 2: item is 8,000 characters long; are the columns swapped?"),
    ("interactions.csv", "user,item\n" + "x" * 1001 + ",i0\n", "data row 1: user is 1,001"),
    ("items.csv", "item\n" + "x" * 1001 + "\n", "items.csv: data row 1: item is 1,001"),
    ("interactions.csv", "user,item\nu,i0\nv\0,i1\n", "data row 2: user 'v\\x00' has a NUL"),
    ("interactions.csv", "user,item\nu,i\0j\n", "data row 1: item 'i\\x00j' has a NUL"),
    ("items.csv", GOOD["items.csv"] + "j,x,a\0.png\n", "row 7: image 'a\\x00.png' has a NUL"),
    ("x.inter", RECBOLE + "u\0\tb\t1\t9\n", "data row 25: user_id:token 'u\\x00' has a NUL"),
])
def test_ids_that_can_be_none(tmp_path, capsys, name, text, words):
    files = {name: text} if name == "x.inter" else GOOD | {name: text}
    assert prepare(put(tmp_path / "shop", files)) == 2
    message = only_error(capsys)
    # Before Python 3.11 the csv module itself refuses a NUL, by row.
    assert words in message or ("NUL" in words and "NUL" in message and "row" in message)
    assert len(message) < 400


def test_one_long_id_among_many(tmp_path, capsys, monkeypatch):
    """Ids are as wide as the longest: the product is bounded before it is allocated."""
    monkeypatch.setattr(folders, "MAX_ID_BYTES", 100_000)
    rows = [(f"u{n}", f"i{n % 5}") for n in range(100)] + [("x" * 300, "i0")]
    put(tmp_path / "shop", {"interactions.csv": csv_text("user,item", rows)})
    assert prepare(tmp_path / "shop") == 2
    assert "101 user ids, one of them 300 characters long" in only_error(capsys)


@pytest.mark.parametrize("files", [
    {"x.inter": INTER.replace("\n2\t2", "\n2\t9999999", 1)},
    {"train.txt": "0 1 9999999\n", "test.txt": "0 2\n"},
])
def test_item_number_with_a_large_gap(tmp_path, capsys, files):
    """Ten million rows for a few interactions are refused by the item's number."""
    assert prepare(put(tmp_path / "x", files)) == 2
    message = only_error(capsys)
    assert "item 9,999,999 for" in message
    assert "number them from 0" in message


def pack(path, arrays, compression=zipfile.ZIP_DEFLATED):
    """An .npz of {name: the bytes of a .npy file}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)


def reads_at_most(n_bytes):
    """zipfile's read, which fails the test where more is unpacked in all."""
    real, total = zipfile.ZipExtFile.read, []

    def read(self, n=-1):
        content = real(self, n)
        total.append(len(content))
        assert sum(total) <= n_bytes, "it is unpacked"
        return content
    return read


def test_archive_that_unpacks_to_gigabytes(tmp_path, capsys, monkeypatch):
    """Its size is read in the directory, before anything is unpacked."""
    path = embeddings(tmp_path)[0]
    arrays = {name: npy(array) for name, array in np.load(path).items()}
    pack(path, arrays | {"item": bytes(300 << 20)})
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "read", reads_at_most(1 << 20))
        assert call(finetune.main, "--init", path) == 2
    assert "that unpack to 0.3 GB" in only_error(capsys)
    # One that is packed, as numpy.savez_compressed does, is fine.
    pack(path, arrays)
    assert set(data.load_embeddings(path)) == set(arrays)


def test_array_whose_header_tells_of_gigabytes(tmp_path, capsys):
    path = embeddings(tmp_path)[0]
    arrays = {name: npy(array) for name, array in np.load(path).items()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)})
    pack(path, arrays | {"item": header.getvalue() + bytes(64)})
    assert call(finetune.main, "--init", path) == 2
    assert "make it again" in only_error(capsys)


def test_lack_of_memory_is_told_as_such(tmp_path, capsys, monkeypatch):
    """Neither "cut off" for tables nor "lower --batch" for data."""
    path = embeddings(tmp_path / "shop")[0]

    def no_memory(*args, **kwargs):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", no_memory)
        assert call(finetune.main, "--init", path) == 2
    assert f"{path}: not enough memory for its tables" in only_error(capsys)
    monkeypatch.setattr(data, "load", no_memory)
    assert call(finetune.main, "--data", tmp_path / "shop") == 2
    assert "shop: not enough memory to read it" in only_error(capsys)


@pytest.mark.parametrize("meta, words", [
    ([], "its meta is no JSON object"), (3, "its meta is no"), (None, "its meta is no"),
    ({"data": []}, "'data' in its meta"), ({"data": None}, "'data' in its meta"),
    ({"report": [1]}, "'report' in its meta"),
    ({"data": {"data": 5}}, "data is '5' in its meta"),
    ({"data": {"data_dir": ["x"]}}, "data_dir is"),
    ({"data": {"min_count": "x"}}, "min_count is 'x'"),
    ({"data": {"min_count": -1}}, "min_count is '-1'"),
    ({"data": {"sample": 1 << 70}}, "sample is"),
    ({"data": {"valid": 2}}, "valid is '2'"), ({"data": {"valid": {}}}, "valid is '{}'"),
    ({"data": {"split_seed": 0.5}}, "split_seed is '0.5'"),
    ({"data": {"min_rating": float("nan")}}, "min_rating is 'nan'"),
])
def test_meta_of_another_shape(tmp_path, capsys, meta, words):
    path = embeddings(tmp_path)[0]
    np.savez(path, **dict(np.load(path)) | {"meta": json.dumps(meta)})
    assert call(finetune.main, "--init", path) == 2
    message = only_error(capsys)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("name", ["user_ids", "item_ids"])
@pytest.mark.parametrize("edit", [
    lambda x: np.arange(len(x)), lambda x: x[0], lambda x: x[:, None]])
def test_ids_of_another_shape(tmp_path, capsys, name, edit):
    path = embeddings(tmp_path)[0]
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {name: edit(arrays[name])})
    assert call(finetune.main, "--init", path) == 2
    assert f"'{name}' is" in only_error(capsys)


# --- Feature files ------------------------------------------------------------------------

@pytest.mark.parametrize("factor", [1e20, 1e30, 1e300, 1e-25, 1e-300])
def test_features_that_float32_cannot_scale(tmp_path, capsys, factor):
    """Their squares overflow or vanish in training: refused by row, not dropped."""
    table = np.arange(1, 19, dtype=np.float64).reshape(6, 3)
    table[3] *= factor
    assert prepare(put(tmp_path / "shop", GOOD | {"item_text.npy": table})) == 2
    assert "item_text.npy: data row 4 is of a length outside" in only_error(capsys)


@pytest.mark.parametrize("factor", [1e12, 1e-7])
def test_large_and_small_features_mean_the_same(factor):
    """Within the bounds only the direction counts."""
    table = np.random.default_rng(0).normal(size=(6, 3))
    expected, present = mmcpr.normalise(table)
    scaled, present_too = mmcpr.normalise(factor * table)
    assert present.all() and present_too.all()
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-6)


def test_zero_rows_are_counted_as_missing(tmp_path, capsys):
    """As they are in training; also what the tiny encoder makes of a text without a word."""
    table = np.ones((6, 3), np.float32)
    table[1], table[4] = 0, np.nan
    dataset = data.load(str(put(tmp_path, GOOD | {"item_text.npy": table})))
    made = data.features(dataset, "T")
    assert "text: 3-d; 2 of 6 items have none" in capsys.readouterr().out
    assert mmcpr.normalise(made["T"])[1].sum() == 4
    put(tmp_path, {"items.csv": GOOD["items.csv"].replace("text 2", "...")})
    data.features(data.load(str(tmp_path)), "T", "tiny", tmp_path)
    assert "text: 512-d; 1 of 6 items have none" in capsys.readouterr().out


def make_other(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no named pipes")
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["interactions.csv", "items.csv", "item_text.npy", "review.npy",
                                  "a.png", "x/x.inter", "x/train.txt", "emb.npz"])
def test_what_is_no_file_is_refused_at_once(tmp_path, capsys, name, kind):
    """A pipe would be waited for, a device read for ever."""
    put(tmp_path / "shop", GOOD | {
        "items.csv": GOOD["items.csv"].replace("text 3,", "text 3,a.png"),
        "x/test.txt": "0 1\n"})
    path = tmp_path / "shop" / name
    make_other(path, kind)
    folder = path.parent if name.startswith("x/") else tmp_path / "shop"
    if name == "emb.npz":
        assert call(finetune.main, "--init", path) == 2
    else:
        assert prepare(folder, data_dir=tmp_path / "cache") == 2
    assert f"{path}: a {kind}, where a file is expected" in only_error(capsys)


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoint_that_is_no_file(tmp_path, resume):
    make_other(tmp_path / "a.ckpt", "pipe")
    with pytest.raises(InputError, match="a.ckpt: a pipe, where a file is expected"):
        checkpoints.Checkpoint(tmp_path / "a.ckpt", resume)


def test_checkpoint_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Said before the work, not at the first checkpoint; root may write anywhere."""
    def refuse(**options):
        raise PermissionError
    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot be written; it is this run's checkpoint"):
        checkpoints.Checkpoint(tmp_path / "a.ckpt")


def test_cached_features_of_another_shape(tmp_path, capsys):
    """A file that was copied over the cache is named, not used."""
    put(tmp_path / "shop", GOOD)
    assert prepare(tmp_path / "shop") == 0
    cache, = tmp_path.glob("cache/features/*-text-*.npy")
    good = np.load(cache)
    for array in (good[:5], good[:, 0], good.astype(np.float32), good.astype(np.int64)):
        np.save(cache, array)
        assert prepare(tmp_path / "shop") == 2
        message = only_error(capsys)
        assert str(cache) in message
        assert "delete it" in message
    make_other(cache, "pipe")
    assert prepare(tmp_path / "shop") == 2
    assert "a pipe, where a file is expected" in only_error(capsys)


# --- Pictures -----------------------------------------------------------------------------

def encoded(image, format, **options):
    """A picture's file, as a BytesIO."""
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def pixels(file):
    return np.asarray(open_image(file)).astype(int)


RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)


@pytest.mark.parametrize("image, format", [
    (Image.fromarray((RAMP * 257).astype(np.uint16)), "PNG"),
    (Image.fromarray((RAMP * 257).astype(np.uint16)), "TIFF"),
    (Image.fromarray((RAMP * 257).astype(np.int32)), "TIFF"),
    (Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    (Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    (Image.fromarray((RAMP * 1e6).astype(np.float32)), "TIFF"),
    (Image.fromarray(RAMP.astype(np.uint8)), "PNG"),
])
def test_grey_of_more_bits_is_scaled(image, format):
    """Neither saturated nor cut: the picture of 8 bits that it is."""
    got = pixels(encoded(image, format))
    assert got.shape == (16, 16, 3)
    assert np.abs(got - RAMP[:, :, None]).max() == 0


def test_grey_with_negative_and_missing_values():
    values = np.array([[-5, 0, np.nan, 0.5, 1, np.inf]], np.float32).repeat(2, 0)
    got = pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0]
    assert list(got[:3]) == [0, 0, 0] and got[5] == 255


@pytest.mark.parametrize("mode, background, key", [
    ("RGB", (200, 0, 0), (200, 0, 0)), ("L", 100, 100), ("1", 0, 0), ("P", 0, 0),
    ("I;16", 3000, 3000),
])
def test_transparent_colour_is_white(mode, background, key):
    """tRNS in every mode that has it: what is of that colour is composed on white."""
    image = Image.new(mode, (4, 4), background)
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 0, 200])
    other = {"RGB": (0, 0, 200), "L": 30, "1": 1, "P": 1, "I;16": 60000}[mode]
    image.putpixel((1, 2), other)
    file = encoded(image, "PNG", transparency=key)
    if mode == "I;16" and b"tRNS" not in file.getvalue():
        # Pillow reads it in 16 bits, but does not write it.
        content = file.getvalue()
        place = content.index(b"IDAT") - 4
        file = io.BytesIO(content[:place] + png_chunk(b"tRNS", struct.pack(">H", key))
                          + content[place:])
    got = pixels(file)
    visible = got[2, 1].copy()
    got[2, 1] = 255
    assert (got == 255).all()
    assert mode == "1" or not (visible == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(format, orientation):
    """EXIF's orientation, against Pillow's own."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    file = encoded(image, format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    file.seek(0)
    assert np.array_equal(pixels(file), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_the_picture():
    image = Image.new("RGB", (20, 12), "red")
    for exif in (b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x09"):
        file = encoded(image, "JPEG", exif=b"Exif\0\0" + exif)
        assert pixels(file).shape == (12, 20, 3)


def picture_shop(folder, pictures):
    """A folder of items with these pictures, {name: bytes; None: no such file}."""
    files = {"items.csv": csv_text("item,image", enumerate(pictures)),
             "interactions.csv": csv_text("user,item", [("u", n) for n in range(len(pictures))])}
    return put(folder, pictures | files)


def image_rows(folder):
    return data.features(data.load(str(folder)), "V", "tiny", folder / "cache")["V"]


def spider():
    """A few bytes that Pillow takes for a SPIDER picture, and raises TypeError or worse at."""
    header = [0.0] * 28
    fields = ((1, 1), (2, 4), (5, 1), (12, 4), (13, 1), (22, 1024), (23, 1024), (27, 3))
    for place, value in fields:
        header[place] = value
    return struct.pack("<27f", *header[1:]) + bytes(2000)


@pytest.mark.parametrize("content, reason", [
    (None, "no such file"), (b"", "an empty file"), (b"<html>Please log in</html>", "no picture"),
    (png(size=(40, 40))[:-40], "truncated"), (png(size=(1, 1)), "a placeholder of one pixel"),
    (png("P", size=(1, 1), format="GIF"), "a placeholder of one pixel"), (spider(), ""),
    (png(size=(9000, 9000), mode="1"), "9,000 x 9,000 pixels are too many"),
])
def test_the_first_unreadable_picture_and_its_reason_are_told(tmp_path, capsys, content, reason):
    """Also where the features come from the cache."""
    picture_shop(tmp_path, {"fine.png": png(), "images/7.png": content, "b.png": b"x"})
    for _ in range(2):
        rows = image_rows(tmp_path)
        assert list(np.isnan(rows).all(1)) == [False, True, True]
        line = capsys.readouterr().out
        assert f"(2 unreadable, the first images/7.png: {reason}" in line


EXCEPTIONS = [AttributeError, TypeError, struct.error, ValueError, KeyError, IndexError,
              RuntimeError, ZeroDivisionError, OverflowError, SyntaxError, RecursionError,
              AssertionError, NotImplementedError, UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
              Image.DecompressionBombError, SystemError, EOFError,
              OSError("image file is truncated")]


@pytest.mark.parametrize("error", EXCEPTIONS)
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_pillow_raises_is_the_files_word(tmp_path, monkeypatch, capsys, error, step):
    picture_shop(tmp_path, {"a.png": png(), "b.png": png(colour="red")})
    owner = Image if step == "open" else Image.Image
    real = getattr(owner, "open" if step == "open" else "load")
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return real(*args, **kwargs)

    if step == "load":
        from PIL.PngImagePlugin import PngImageFile
        owner, real = PngImageFile, PngImageFile.load
    monkeypatch.setattr(owner, step, fail)
    rows = image_rows(tmp_path)
    assert np.isnan(rows).all(1).sum() == 1
    assert "1 unreadable" in capsys.readouterr().out


MACHINE_ERRORS = [OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many"),
                  PermissionError(errno.EACCES, "Permission denied"), MemoryError(),
                  OSError(errno.ESTALE, "Stale file handle")]


@pytest.mark.parametrize("error", MACHINE_ERRORS)
def test_what_the_machine_says_is_an_error_and_never_cached(tmp_path, monkeypatch, capsys, error):
    """One line that names the file; the next run has every picture."""
    folder = picture_shop(tmp_path / "shop", {f"{n}.png": png() for n in "abcdefghijklmno"})
    real = pictures.read_bytes

    def fail(file):
        if Path(file).name == "b.png":
            if isinstance(error, OSError):
                raise type(error)(error.errno, error.strerror, str(file))
            raise error
        return real(file)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_bytes", fail)
        assert prepare(folder, data_dir=tmp_path / "cache") == 2
        message = only_error(capsys)
        assert "b.png: " in message
        assert "shop" in message
    assert not list(tmp_path.glob("cache/features/*-image-*.npy"))
    assert prepare(folder, data_dir=tmp_path / "cache") == 0
    assert "image: 256-d; 0 of 15 items have none" in capsys.readouterr().out


def test_machine_error_inside_pillow(monkeypatch):
    """Too few descriptors for one of Pillow's own files, or a part of it that cannot be loaded."""
    for error in (OSError(errno.EMFILE, "Too many open files"), ImportError("DLL load failed")):
        def fail(*args, **kwargs):
            raise error
        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(type(error)):
            open_image(io.BytesIO(png()))


@pytest.mark.parametrize("error", [
    MemoryError(), OSError("out of memory error when reading image file")])
def test_memory_that_is_short_and_memory_that_is_lied_about(tmp_path, monkeypatch, error):
    """Where gigabytes could be had, a decoder's lack of memory is a damaged header's doing."""
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(pictures.BadPicture, match="absurd amounts of memory"):
        pictures.read_picture(io.BytesIO(png()))

    def no_map(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr(mmap, "mmap", no_map)
    with pytest.raises(MemoryError):
        pictures.read_picture(io.BytesIO(png()))


def test_pictures_are_decoded_a_few_pixels_at_a_time(monkeypatch):
    """Many small ones side by side, a large one alone, and all of them at last."""
    limit = pictures.PixelLimit(100)
    taken, most, lock, alone = [], [], threading.Lock(), []

    def decode(n):
        with limit.pixels(n):
            with lock:
                taken.append(n)
                most.append(sum(taken))
                alone.append(n < 100 or len(taken) == 1)
            time.sleep(0.002)
            with lock:
                taken.remove(n)

    threads = [threading.Thread(target=decode, args=(n,)) for n in [30, 30, 500, 30, 70, 100] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 18 and all(alone)
    assert max(total for total in most if total < 500) <= 100
    assert limit.free == 100


def test_small_pictures_are_decoded_side_by_side():
    limit, both = pictures.PixelLimit(100), threading.Barrier(2, timeout=20)

    def decode():
        with limit.pixels(30):
            both.wait()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(decode) for _ in range(2)]:
            done.result()


def test_decoded_pictures_are_not_held(tmp_path, monkeypatch):
    """Of 24 pictures only what the encoder needs is kept: no decoded one is alive for long."""
    picture_shop(tmp_path, {f"{n}.png": png(size=(200, 200)) for n in range(24)})
    monkeypatch.setattr(pictures, "decoding", pictures.PixelLimit(40_000))  # one at a time
    decoded, most, real = [], [], encode.TinyEncoder.prepare

    def prepare(self, image):
        decoded.append(weakref.ref(image))
        most.append(sum(picture() is not None for picture in decoded))
        return real(self, image)
    monkeypatch.setattr(encode.TinyEncoder, "prepare", prepare)
    assert np.isfinite(image_rows(tmp_path)).all()
    assert len(most) == 24 and max(most) < 12


def test_a_strip_is_not_scaled_up_to_gigabytes(tmp_path):
    """CLIP scales the short side to 32 and cuts the middle out: of 20,000 x 1 first."""
    name, weights, _ = tiny_clip(tmp_path)
    encoder = encode.ClipEncoder(name, str(weights))
    sizes, real = [], encoder.preprocess

    def preprocess(image):
        sizes.append(image.size)
        return real(image)
    encoder.preprocess = preprocess
    for size in ((20_000, 1), (1, 20_000), (300, 4)):
        assert encoder.prepare(Image.new("RGB", size, "red")).shape == (3, 32, 32)
    assert sizes == [(64, 1), (1, 64), (256, 4)]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 255, 3), np.uint8))
    assert torch.equal(encoder.prepare(picture), encoder.preprocess(picture))


def test_cache_is_keyed_by_what_pictures_hold(tmp_path):
    """Another picture of the same size and time is encoded again, a copy of the same is not."""
    shop, caches = bare_dataset(tmp_path), []
    for colour in ("red", "blue", "red"):
        put(tmp_path, {"a.bmp": png(colour=colour, format="BMP")})
        os.utime(tmp_path / "a.bmp", (1, 1))
        encode.extract(shop, "image", ["a.bmp"], "tiny", None, tmp_path)
        caches.append(len(list(tmp_path.glob("features/*.npy"))))
    assert caches == [1, 2, 2]
    os.utime(tmp_path / "a.bmp", (9, 9))
    encode.extract(shop, "image", ["a.bmp"], "tiny", None, tmp_path)
    assert len(list(tmp_path.glob("features/*.npy"))) == 2


@pytest.mark.parametrize("name", ["x" * 250, os.fsdecode(b"sh\xffop"), "ü" * 120, "a b:c"])
def test_folder_with_an_odd_name(tmp_path, name):
    """Its caches can be written, and its names printed or refused in one line."""
    folder = tmp_path / name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    assert prepare(put(folder, GOOD)) == 0


# --- CLIP: its weights, their preprocessing, its device ------------------------------------

def clip_rows(folder, model, weights):
    encoder = encode.ClipEncoder(model, str(weights))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    return encoder, encoder.image([encoder.prepare(picture)])


def test_clip_preprocessing_is_that_of_the_weights(tmp_path, capsys):
    """From the configuration beside them; without one it is a guess, which is told."""
    name, weights, _ = tiny_clip(tmp_path)
    _, guessed = clip_rows(tmp_path, name, weights)
    assert "how its pictures are prepared is a guess (mean (0.48145466" in capsys.readouterr().out
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear",
                "resize_mode": "squash"}
    config = {"model_cfg": json.loads((tmp_path / f"configs/{name}.json").read_text()),
              "preprocess_cfg": settings}
    put(tmp_path, {"open_clip_config.json": json.dumps(config)})
    encoder, told = clip_rows(tmp_path, name, weights)
    assert "guess" not in capsys.readouterr().out
    assert not np.allclose(told, guessed)
    for key, value in settings.items():
        assert encoder.model.visual.preprocess_cfg[key] == value
    # The same as a folder that open_clip reads itself.
    weights.rename(tmp_path / "open_clip_model.bin")
    encoder, local = clip_rows(tmp_path, f"local-dir:{tmp_path}", "openai")
    assert "guess" not in capsys.readouterr().out
    np.testing.assert_array_equal(local, told)


def test_clip_guess_takes_what_the_published_weights_take(tmp_path, monkeypatch, capsys):
    open_clip = pytest.importorskip("open_clip")
    put(tmp_path, {"w.bin": b"x"})
    guess = encode.file_preprocessing(open_clip, "ViT-B-16-SigLIP", str(tmp_path / "w.bin"))
    assert guess["image_mean"] == (0.5, 0.5, 0.5)
    assert guess["image_resize_mode"] == "squash"
    assert "a guess" in capsys.readouterr().out
    # open_clip's own tags and folders need no guess.
    assert encode.file_preprocessing(open_clip, "ViT-B-32-quickgelu", "openai") == {}
    assert encode.file_preprocessing(open_clip, f"local-dir:{tmp_path}", "") == {}


def test_clip_folder_without_weights_is_refused(tmp_path):
    """open_clip itself would go on with random ones."""
    name, weights, _ = tiny_clip(tmp_path)
    config = {"model_cfg": json.loads((tmp_path / f"configs/{name}.json").read_text())}
    put(tmp_path / "local", {"open_clip_config.json": json.dumps(config)})
    with pytest.raises(InputError, match="cannot be loaded"):
        encode.ClipEncoder(f"local-dir:{tmp_path / 'local'}", "openai")


def test_clip_cache_is_keyed_by_what_is_loaded(tmp_path):
    """Changed weights or configuration, of a file and of a folder, of the same size and time."""
    weights, config = tmp_path / "w.bin", tmp_path / "open_clip_config.json"
    for model in ("m", f"local-dir:{tmp_path}"):
        keys = []
        for content, settings in ((b"a", "{}"), (b"b", "{}"), (b"b", "[]"), (b"a", "{}")):
            put(tmp_path, {"w.bin": content, "open_clip_config.json": settings})
            for path in (weights, config):
                os.utime(path, (1, 1))
            keys.append(tuple(encode.clip_key(model, str(weights))))
        assert len(set(keys)) == 3
        assert keys[0] == keys[3]
    assert encode.clip_key("m", "openai") != encode.clip_key("m", "laion2b")
    make_other(tmp_path / "model.bin", "pipe")
    with pytest.raises(InputError, match="a pipe, where a file is expected"):
        encode.clip_key(f"local-dir:{tmp_path}", "")


@pytest.mark.parametrize("main", [data.main, mmcpr.main])
def test_clip_obeys_the_device(tmp_path, monkeypatch, main):
    """--device cpu never touches a GPU, where there is one."""
    devices = []

    def clip(model, weights, device):
        devices.append(device)
        raise InputError("far enough")
    monkeypatch.chdir(put(tmp_path, {f"shop/{name}": text for name, text in GOOD.items()}))
    monkeypatch.setattr(encode, "ClipEncoder", clip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flags = ("--data", "shop", "--encoder", "clip", "--device", "cpu")
    assert call(main, *flags) == 2
    assert devices == ["cpu"]


def test_clip_batches_are_bounded_in_bytes(tmp_path, monkeypatch):
    """A model of large pictures gets fewer of them at a time."""
    sizes, real = [], encode.TinyEncoder.image

    def image(self, prepared):
        sizes.append(len(prepared))
        return real(self, prepared)
    monkeypatch.setattr(encode.TinyEncoder, "image", image)
    monkeypatch.setattr(encode.TinyEncoder, "prepared_bytes", 1 << 26)
    picture_shop(tmp_path, {f"{n}.png": png() for n in range(9)})
    image_rows(tmp_path)
    assert sizes == [4, 4, 1]


# --- The width of integers ----------------------------------------------------------------

class WindowsNumpy:
    """numpy as version 1 is on Windows, where an integer that nobody named has 32 bits."""

    def __getattr__(self, name):
        return getattr(np, name)

    def arange(self, *args, **kwargs):
        return np.arange(*args, **{"dtype": np.int32} | kwargs)


def windows(monkeypatch):
    for module in (data, folders, metrics, mmcpr, ops):
        monkeypatch.setattr(module, "np", WindowsNumpy())


def test_keys_have_64_bits_where_integers_have_32(monkeypatch):
    """70,000 users times 40,000 items are more than 2^31: the last users' hits are found too."""
    n, m = 70_000, 40_000
    users = np.r_[0:20, n - 20:n]
    items = np.arange(40) * 991
    truth = sp.csr_matrix((np.ones(40, np.float32), (users, items)), (n, m))
    item = torch.randn(m, 8, generator=torch.Generator().manual_seed(0))
    user = torch.zeros(n, 8)
    user[users] = item[items]
    nothing = sp.csr_matrix((n, m), dtype=np.float32)
    expected = metrics.evaluate(user, item, nothing, truth, (20,))
    windows(monkeypatch)
    assert metrics.evaluate(user, item, nothing, truth, (20,)) == expected
    for chosen in (None, np.arange(40, dtype=np.int32)):
        chunk, _, ranked = next(metrics.rank(user[:40], item, nothing[:40], 1, chosen))
        key = torch.from_numpy(chunk + n)[:, None] * m + ranked
        assert (key > 1 << 31).all()


def test_everything_that_is_indexed_has_64_bits(tmp_path, monkeypatch):
    windows(monkeypatch)
    put(tmp_path / "x", {"x.inter": INTER, "text_feat.npy": np.ones((9, 2), np.float32)})
    for folder in (put(tmp_path / "shop", GOOD), tmp_path / "x"):
        dataset = data.load(str(folder), min_count=1, sample=9)
        arrays = [dataset.users, dataset.items, *(rows for _, rows in dataset.ready.values())]
        assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
    assert data.k_core(dataset.users, dataset.items, 1).dtype == np.int64


def test_every_arange_names_its_width():
    """np.arange(n) is of 32 bits on Windows with numpy 1, and nobody would see it here."""
    for name in ("data.py", "folders.py", "encode.py", "ops.py", "metrics.py", "mmcpr.py",
                 "finetune.py"):
        for line in (HERE / name).read_text(encoding="utf-8").splitlines():
            if re.search(r"np\.arange\(|astype\(int\)|dtype=int\b", line):
                assert "dtype=np.int64" in line, (name, line)


# --- Amazon: records that are not as they should be -----------------------------------------

@pytest.mark.parametrize("user, item", [
    (None, "B0"), ("U0", None), ("", "B0"), (["U0"], "B0"), ({"a": 1}, "B0"), (1.5, "B0"),
    (True, "B0"), ("half \ud83d", "B0"), ("U0", "\udc00"), ("U\0", "B0"), ("U" * 101, "B0"),
    (float("nan"), "B0")])
def test_review_without_usable_ids_is_skipped_and_counted(tmp_path, capsys, user, item):
    raw(tmp_path, [review(user, item, "bad", 0), *REVIEWS])
    shop = data.load("amazon:Tiny", tmp_path)
    assert sorted(shop.user_ids) == ["U0", "U1"]
    assert len(shop.users) == len(REVIEWS)
    assert "skipped: 1 reviews and 0 items whose user or item id" in capsys.readouterr().out


def test_ids_that_are_whole_numbers_are_used(tmp_path):
    reviews = [review(u, i, "x", 0) for u in range(2) for i in range(6)]
    raw(tmp_path, reviews, [{"asin": i, "title": "t"} for i in range(6)])
    shop = data.load("amazon:Tiny", tmp_path)
    assert sorted(shop.user_ids) == ["0", "1"]
    assert shop.texts == ["t"] * 6


@pytest.mark.parametrize("time, place", [
    ("1420416000", 2), (1420416000, 2), ("1420416000.5", 2), (1e300, 2), (-5, 0),
    (None, 0), (float("nan"), 0), (float("inf"), 0), ([1420416000], 0), ({}, 0),
    ("01 5, 2015", 0), (10 ** 400, 0)])
def test_times_of_any_type_are_sorted(tmp_path, time, place):
    """A time that is no number counts as none: the earliest."""
    reviews = [review(f"U{n}", "B0", "x", seconds) for n, seconds in enumerate((time, 1, 2))]
    path = put(tmp_path, {"Tiny_5.json.gz": packed(reviews), "meta_Tiny.json.gz": packed(META)})
    amazon.write_amazon(path, path / "Tiny_5.json.gz", path / "meta_Tiny.json.gz")
    users = [row["user"] for row in csv_records(path / "interactions.csv")]
    assert users.index("U0") == place


@pytest.mark.parametrize("value, text", [
    ({"a": 1}, ""), ([{"a": 1}, ["b"], "c", None, 5], "c"), (1984, "1984"), (True, ""),
    (float("nan"), ""), ("a&#" + "1" * 5000 + ";b", "a b"), ("&#65;&#x42;&#0000000067;", "ABC"),
    ("&#99999999;", "\ufffd"), ("a\ud83db", "a?b"), ("<" * 5000, "<" * 5000)])
def test_text_of_any_value(value, text):
    assert amazon.clean(value) == text


@pytest.mark.parametrize("value, urls", [
    (5, []), ({"a": "http://x/a.jpg"}, []), ([5, None, ["http://x"]], []), (None, []), (True, []),
    ("http://x/y.jpg", ["http://x/y.jpg"]), ("file:///etc/passwd", []), ("data:image/png,", []),
    ("http://", []), ("http://[/", []), ("http://x y/", []), ("http://\ud83d/", []),
    ("http://x/\n", []), ("http://x:99999/", []), ("https://x:443/a", ["https://x:443/a"])])
def test_picture_addresses_of_any_value(value, urls):
    assert amazon.image_addresses({"imageURL": value}) == urls


def test_metadata_of_any_shape(tmp_path, capsys):
    """What is usable of each record is used; items whose id is damaged are counted."""
    meta = [{"asin": None, "title": "None"}, {"asin": "B\ud83d"},
            {"asin": "B0", "title": {"a": 1}, "description": {"x": "y"}, "feature": 7},
            {"asin": "B1", "title": "t", "imageURL": 5, "imageURLHighRes": {"a": "http://x"}},
            {"asin": "B2", "title": "&#" + "9" * 5000, "image": "http://x/y.jpg"}]
    raw(tmp_path, REVIEWS, meta)
    shop = data.load("amazon:Tiny", tmp_path, modalities="T")
    assert dict(zip(shop.item_ids, shop.texts)) == {"B0": "7", "B1": "t", "B2": ""}
    assert "skipped: 0 reviews and 2 items" in capsys.readouterr().out


def test_items_share_no_picture_file():
    """Nor do those that differ in case alone, where the file system takes them for one."""
    items = ["a/b", "a_b", "a b", "A_B", "B0", "b0", "..", ".", "é", "X" * 21, "X" * 100]
    paths = [amazon.image_path(item) for item in items]
    assert len({path.lower() for path in paths}) == len(items)
    assert amazon.image_path("B00004") == "images/B00004.jpg"
    for path in paths:
        assert path.count("/") == 1 and len(path) < 60


# --- Amazon: raw files of other shapes ------------------------------------------------------

JSON_LINES = "\n".join(json.dumps(record) for record in REVIEWS).encode()
DEEP = "[" * 100_000 + "]" * 100_000
REVIEW_2023 = {"rating": 5.0, "title": "t", "text": "x", "asin": "B0", "parent_asin": "B0",
               "user_id": "U0", "timestamp": 1588615855070}
META_2023 = {"main_category": "Baby", "title": "t", "parent_asin": "B0", "images": []}


@pytest.mark.parametrize("name, content, words", [
    ("meta", packed(["{'asin': 'B0', 'title': \"Kid's\"}"]), "2014 release (Python literals)"),
    ("Tiny", gzip.compress(packed(REVIEWS), mtime=0), "packed twice: run gunzip on it once"),
    ("Tiny", JSON_LINES, "plain text; name it Tiny_5.json and run gzip on it"),
    ("meta", b"{'asin': 'B0'}\n", "plain text; name it meta_Tiny.json and run gzip on it"),
    ("Tiny", packed([REVIEW_2023]), "2023 release (fields user_id, parent_asin)"),
    ("meta", packed([META_2023]), "2023 release (fields user_id, parent_asin)"),
    ("Tiny", packed(["user_id,parent_asin,rating", "U0,B0,5.0"]), "2023 release (a CSV"),
    ("Tiny", packed(["U0,B0,5.0,1420416000"]), "row 1: not a JSON record; what is read"),
    ("Tiny", packed([json.dumps(REVIEWS)]), "one JSON list of all records"),
    ("Tiny", packed(["<html>"]), "looks like a web page"),
    ("Tiny", packed(META), "no field 'reviewerID'; looks like metadata"),
    ("meta", packed(REVIEWS), "has a field 'reviewerID'; looks like a file of reviews"),
    ("Tiny", packed([REVIEWS[0], '{"reviewerID": ' + DEEP + "}"]), "row 2: not a JSON record"),
    ("Tiny", packed(['{"reviewerID": ' + "1" * 5000 + "}"]), "row 1: not a JSON record"),
    ("Tiny", b"PK\3\4\0\0", "not packed by gzip"),
    ("Tiny", packed(REVIEWS)[:-9], "cut off or damaged; delete it"),
    ("Tiny", b"", "empty; delete it"),
    ("Tiny", packed([]), "empty; delete it"),
    ("Tiny", b"\n<!DOCTYPE html>", "a web page instead of the data; delete it"),
])
def test_raw_file_of_another_shape(tmp_path, capsys, name, content, words):
    """One line says what it looks like; to delete the file is advised only where it helps."""
    path = "Tiny_5.json.gz" if name == "Tiny" else "meta_Tiny.json.gz"
    put(raw(tmp_path) / "amazon", {path: content})
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 2
    message = only_error(capsys)
    assert words in message
    assert f"error: {tmp_path / 'amazon' / path}" in message
    assert ("delete" in message) == ("delete" in words)
    assert "delete" in message or "the 2018 release: its 5-core reviews" in message


def test_raw_file_that_is_no_file(tmp_path, capsys):
    path = raw(tmp_path) / "amazon" / "Tiny_5.json.gz"
    path.unlink()
    os.mkfifo(path)
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 2
    assert "Tiny_5.json.gz: a pipe, where a file is expected" in only_error(capsys)


def test_blank_lines_are_no_records(tmp_path):
    raw(tmp_path, [*REVIEWS, "", "  "], ["", *META, ""])
    assert data.load("amazon:Tiny", tmp_path).n_items == 6


def test_file_without_line_ends_does_not_fill_the_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(amazon, "LONGEST_ROW", 1000)
    raw(tmp_path, [json.dumps(REVIEWS)])
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 2
    assert "one JSON list" in only_error(capsys)


@pytest.mark.parametrize("name", ["Tiny_5.json", "meta_Tiny.json"])
def test_unpacked_raw_file_is_named_before_anything_is_downloaded(tmp_path, capsys, name):
    raw(tmp_path)
    packed_file = tmp_path / "amazon" / f"{name}.gz"
    packed_file.with_suffix("").write_bytes(gzip.decompress(packed_file.read_bytes()))
    packed_file.unlink()
    with server({}) as (url, log):
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert f"{name}: {name}.gz is read here; run gzip on it" in only_error(capsys)
    assert not log


# --- Amazon: folders that are not ours ------------------------------------------------------

KEY = {"version": 1}


def write_new(target):
    put(target, {"interactions.csv": "new", "items.csv": "new"})


@pytest.mark.parametrize("files", [
    {"interactions.csv": "mine"}, {"notes/a.txt": "mine"},
    {"a": "mine", "source.json": '{"from": "my own shop"}'}, {"source.json": "[1"},
    {"source.json": b"\xff\0"}, {"source.json": "[" * 100_000}, {"source.json": "null"}])
def test_folder_of_the_user_is_not_written_to(tmp_path, files):
    put(tmp_path / "Tiny", files)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="Tiny: was not made here"):
        disk.make_folder(tmp_path / "Tiny", KEY, write_new)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("data_name, path", [("demo", "demo"), ("amazon:Tiny", "amazon/Tiny")])
def test_users_data_is_not_written_over(tmp_path, capsys, data_name, path):
    """Nor is anything downloaded for it: that takes hours."""
    put(tmp_path / path, {"interactions.csv": "user,item\nmine,precious\n"})
    with server({}) as (url, log):
        assert prepare(data_name, "--amazon-url", url, data_dir=tmp_path) == 2
    assert f"use it: --data {tmp_path / path}" in only_error(capsys)
    assert not log
    assert "precious" in (tmp_path / path / "interactions.csv").read_text()


@pytest.mark.parametrize("files", [{}, {".DS_Store": "x", ".source.json.7.tmp": "{"}])
def test_empty_folder_is_filled(tmp_path, files):
    (tmp_path / "Tiny").mkdir()
    put(tmp_path / "Tiny", files)
    disk.make_folder(tmp_path / "Tiny", KEY, write_new)
    assert (tmp_path / "Tiny" / "items.csv").read_text() == "new"


def test_interrupted_first_preparation_locks_nobody_out(tmp_path, monkeypatch):
    """Killed at any step, without a chance to tidy up: the next run makes the folder."""
    class Killed(BaseException):
        pass

    def kill_after(steps, real):
        def move(*args, **kwargs):
            steps.pop()
            if not steps:
                raise Killed
            return real(*args, **kwargs)
        return move

    for step in range(5):
        folder = tmp_path / str(step) / "Tiny"
        steps = [None] * (step + 1)  # of both kinds
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill_after(steps, os.replace))
            patch.setattr(os, "rename", kill_after(steps, os.rename))
            try:
                disk.make_folder(folder, KEY, write_new)
                break
            except Killed:
                pass
        disk.make_folder(folder, KEY, write_new)
        assert json.loads((folder / "source.json").read_text()) == KEY
        assert (folder / "items.csv").read_text() == "new"
    assert step == 4


def test_prepared_folder_that_lacks_a_file_is_made_anew(tmp_path):
    """As the remedy for a damaged file says; the pictures stay."""
    folder = tmp_path / "amazon" / "Tiny"
    raw(tmp_path)
    data.load("amazon:Tiny", tmp_path)
    put(folder, {"images/B0.jpg": png()})
    for name in amazon.FILES:
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        data.load("amazon:Tiny", tmp_path)
        assert (folder / name).read_bytes() == before
    assert (folder / "images" / "B0.jpg").exists()


def test_what_a_killed_preparation_has_left_is_removed(tmp_path):
    left, young = tmp_path / ".Tiny.a1.tmp", tmp_path / ".Tiny.b2.tmp"
    users_own = tmp_path / "Tiny.old"
    for folder in (left, young, users_own):
        put(folder, {"Tiny/items.csv": "x"})
    os.utime(left, (0, 0))
    os.utime(users_own, (0, 0))
    disk.make_folder(tmp_path / "Tiny", KEY, write_new)
    assert not left.exists() and young.exists() and users_own.exists()


# --- Downloads: what is remembered of a picture ---------------------------------------------

def picture_folder(folder, urls):
    """A prepared folder whose pictures {name: address} are to be fetched."""
    addresses = {f"images/{name}.jpg": [address] for name, address in urls.items()}
    return put(folder, {"image_urls.json": json.dumps(addresses)})


def refused_names(folder):
    note = folder / "images" / "refused.txt"
    return set(note.read_text().split()) if note.exists() else set()


def status(code, **headers):
    return lambda handler: answer(handler, b"", code, **headers)


def test_only_definite_answers_are_remembered(tmp_path, capsys):
    """The server's no, and a whole file that is no picture. The rest is tried again."""
    def without_length(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(png()[:40])

    routes = {
        "/forbidden": status(403), "/gone": status(410), "/damaged": png()[:-20] + bytes(20),
        "/placeholder": png(size=(1, 1)),
        # The network's and the machine's word.
        "/busy": status(503), "/many": status(429), "/timeout": status(408), "/proxy": status(407),
        "/portal": status(511), "/loop": status(302, Location="/loop"),
        "/nowhere": status(302), "/page": b"<!DOCTYPE html><html>log in</html>",
        "/excuse": b"try again later", "/empty": b"", "/cut": without_length,
        "/text": lambda handler: answer(handler, b"\0\1", **{"Content-Type": "text/html"}),
    }
    definite = {"absent", "forbidden", "gone", "damaged", "placeholder"}
    with server(routes) as (url, log):
        names = [path.strip("/") for path in routes] + ["absent"]
        picture_folder(tmp_path, {name: url + name for name in names})
        download.fetch_images(tmp_path, workers=4)
        assert refused_names(tmp_path) == {f"images/{name}.jpg" for name in definite}
        assert f"5 refused or no picture, {len(names) - 5} unreachable" in capsys.readouterr().out
        for path in routes:
            routes[path] = png()
        download.fetch_images(tmp_path, workers=4)
    assert f"images: {len(names) - 5} fetched, 0 refused" in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "I/O error"),
    ImportError("no decoder")])
def test_the_machines_failure_is_not_the_pictures(tmp_path, capsys, monkeypatch, error):
    def fail(file):
        raise error

    with server({"/a.png": png()}) as (url, log):
        picture_folder(tmp_path, {str(n): url + "a.png" for n in range(12)})
        with monkeypatch.context() as patch:
            patch.setattr(download, "read_picture", fail)
            download.fetch_images(tmp_path, workers=4)
        assert not refused_names(tmp_path)
        assert "0 fetched, 0 refused or no picture, 12 unreachable" in capsys.readouterr().out
        download.fetch_images(tmp_path, workers=4)
    assert "12 fetched" in capsys.readouterr().out


def test_too_few_descriptors_for_sockets(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with server({"/a.png": png()}) as (url, log):
        picture_folder(tmp_path, {"a": url + "a.png"})
        monkeypatch.setattr(download.http.client.socket, "create_connection", fail)
        download.fetch_images(tmp_path)
    line = capsys.readouterr().out
    assert "1 unreachable" in line
    assert "the first is images/a.jpg: [Errno 24] Too many open files" in line
    assert not refused_names(tmp_path)


def test_picture_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def fail(path, write):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with server({"/a.png": png()}) as (url, log):
        picture_folder(tmp_path, {"a": url + "a.png"})
        monkeypatch.setattr(download, "write_file", fail)
        with pytest.raises(PermissionError):
            download.fetch_images(tmp_path)
    assert not refused_names(tmp_path)


# --- Downloads: slow hosts ------------------------------------------------------------------

def drip(start, byte=b"a", pause=0.02):
    """A route that sends `start`, and then a byte every now and then until nobody listens."""
    def route(handler):
        handler.wfile.write(start)
        while True:
            threading.Event().wait(pause)
            handler.wfile.write(byte)
    return route


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"
DRIPS = {"the status line": b"HTTP/1.1 200 O", "a header": HEAD + b"X-Y: ",
         "the body": HEAD + b"\r\n\0",
         "chunks": HEAD[:17] + b"Transfer-Encoding: chunked\r\n\r\n0",
         "the body without length": b"HTTP/1.0 200 OK\r\n\r\n\0",
         "continue": b"HTTP/1.1 100 Continue\r\nX-Y: "}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(download, "SILENCE", 0.5)
    monkeypatch.setattr(download, "WINDOW", 0.2)


@pytest.mark.parametrize("place", DRIPS)
def test_dripping_host_of_pictures(tmp_path, capsys, impatient, place):
    with server({"/drip": drip(DRIPS[place]), "/fine": png()}) as (url, log):
        put(tmp_path, {"image_urls.json": json.dumps({
            "images/a.jpg": [url + "drip"], "images/b.jpg": [url + "drip", url + "fine"]})})
        start = time.monotonic()
        download.fetch_images(tmp_path)
        assert time.monotonic() - start < 3
    assert "1 fetched, 0 refused or no picture, 1 unreachable" in capsys.readouterr().out


def test_dripping_hosts_of_a_raw_file(tmp_path, capsys, monkeypatch, impatient):
    """All at once: what takes the time is waiting."""
    no_sleep(monkeypatch)

    def wait_for(place):
        with server({"/categoryFilesSmall/Tiny_5.json.gz": drip(DRIPS[place])}) as (url, log):
            start = time.monotonic()
            code = prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path / place)
            return code, time.monotonic() - start, len(log)

    with ThreadPoolExecutor(len(DRIPS)) as pool:
        for code, seconds, n_asked in pool.map(wait_for, DRIPS):
            assert code == 2 and seconds < 6 and n_asked == 5
    err = capsys.readouterr().err
    assert err.count("error: ") == len(DRIPS) and "Traceback" not in err
    assert err.count("too slow; run the command again to go on") == len(DRIPS)


def test_slow_but_steady_raw_file_is_fetched(tmp_path, monkeypatch):
    """It takes many times the window, but each brings what it must."""
    monkeypatch.setattr(download, "WINDOW", 0.05)
    monkeypatch.setattr(download, "WINDOW_BYTES", 100)
    content = bytes(range(256)) * 20

    def steady(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for start in range(0, len(content), 256):
            handler.wfile.write(content[start:start + 256])
            threading.Event().wait(0.01)

    with server({"/a.gz": steady}) as (url, log):
        download.fetch_file(url + "a.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == content
    assert len(log) == 1


@pytest.mark.parametrize("what", ["pictures", "raw"])
def test_ctrl_c_while_hosts_are_silent(tmp_path, what):
    """Within seconds, in one line, whatever the threads wait for."""
    connected, done = threading.Event(), threading.Event()

    def hang(handler):
        connected.set()
        done.wait(60)

    with server({"/hang": hang, "/categoryFilesSmall/Tiny_5.json.gz": hang}) as (url, log):
        if what == "pictures":
            meta = [record | {"imageURL": [url + "hang"]} for record in META]
            raw(tmp_path, meta=meta)
        argv = ["data.py", "--data", "amazon:Tiny", "--data-dir", tmp_path, "--amazon-url", url]
        process = subprocess.Popen([sys.executable, *argv], cwd=HERE, env=ON_THE_CPU,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert connected.wait(60)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)  # the host would be silent for longer
        done.set()
    assert process.returncode == 2
    assert "Traceback" not in errors and "Exception" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: interrupted")
    assert not list(tmp_path.rglob("*.tmp"))


# --- Downloads: answers that are no file ----------------------------------------------------

@pytest.mark.parametrize("body", [b"", b"<html>log in</html>", b"service busy"])
def test_answer_that_is_no_file_is_not_kept(tmp_path, monkeypatch, body):
    """Nor does it cost what an earlier run has brought."""
    no_sleep(monkeypatch)
    put(tmp_path, {"a.gz.part": b"\0" * 99})
    with server({"/a.gz": body}) as (url, log):
        with pytest.raises(InputError, match="empty or a web page, not the file; run the command"):
            download.fetch_file(url + "a.gz", tmp_path / "a.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz.part"]
    assert (tmp_path / "a.gz.part").read_bytes() == b"\0" * 99


@pytest.mark.parametrize("target", [
    "file:///etc/hostname", "ftp://127.0.0.1:1/a", "data:image/png;base64,AA", "gopher://x/",
    "http://127.0.0.1:99999999999999999999/", "http://[/", "//", "http://x y/"])
def test_redirects_lead_to_http_alone(tmp_path, capsys, monkeypatch, target):
    no_sleep(monkeypatch)
    monkeypatch.setenv("no_proxy", "*")
    with server({"/a": status(302, Location=target)}) as (url, log):
        picture_folder(tmp_path, {"a": url + "a"})
        download.fetch_images(tmp_path)
        with pytest.raises(InputError, match="run the command again"):
            download.fetch_file(url + "a", tmp_path / "b")
    assert "1 unreachable" in capsys.readouterr().out
    assert not (tmp_path / "b").exists()
    assert not list((tmp_path / "images").iterdir())


# --- Downloads: where pictures are written --------------------------------------------------

@pytest.mark.parametrize("content", [
    '{"../x.jpg": ["http://127.0.0.1:1/"]}', '{"/tmp/x.jpg": []}', '{"images/../../x.jpg": []}',
    '{"images/x\\u0000.jpg": []}', '{"images\\\\..\\\\x.jpg": []}', '{"images/x.jpg": 5}',
    '{"images/x.jpg": null}', '{"images/x.jpg": "http://127.0.0.1:1/"}',
    '{"images/x.jpg\\n": []}', '["images/x.jpg"]', "5", "{", "",
    b"\xff\xfe", "[" * 100_000, '{"images/x.sh": []}'])
def test_damaged_or_changed_picture_list(tmp_path, capsys, content):
    """One line, nothing is written, and what the line says helps."""
    raw(tmp_path)
    data.load("amazon:Tiny", tmp_path)
    path = put(tmp_path / "amazon" / "Tiny", {"image_urls.json": content}) / "image_urls.json"
    before = sorted(tmp_path.rglob("*"))
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 2
    assert f"{path}: damaged or changed; delete it and run" in only_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before
    path.unlink()
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 0


def test_addresses_nobody_can_ask_for_are_left_out(tmp_path, capsys):
    """In a folder prepared earlier, or changed since: only what may be asked for is asked for."""
    urls = ["file:///etc/hostname", "http://x y/", 5, None, "http://[/"]
    put(tmp_path, {"image_urls.json": json.dumps({"images/a.jpg": urls})})
    download.fetch_images(tmp_path)
    assert "1 refused or no picture" in capsys.readouterr().out


@pytest.mark.parametrize("link", ["images/a.jpg", "images/refused.txt", "images"])
def test_no_picture_is_written_through_a_link(tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "Tiny"
    with server({"/a": png()}) as (url, log):
        picture_folder(folder, {"a": url + "a"})
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(outside if link == "images" else outside / "new")
        with pytest.raises(InputError, match=f"{link}: a link, which may lead out of the folder"):
            download.fetch_images(folder)
    assert not list(outside.iterdir())


def test_the_whole_folder_may_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "Tiny").symlink_to(tmp_path / "elsewhere")
    with server({"/a": png()}) as (url, log):
        picture_folder(tmp_path / "Tiny", {"a": url + "a"})
        download.fetch_images(tmp_path / "Tiny")
    assert (tmp_path / "elsewhere" / "images" / "a.jpg").read_bytes() == png()


# --- An emb.npz names what is read, not where anything is written --------------------------

def small_demo(monkeypatch):
    monkeypatch.setattr(demo.write_demo, "__defaults__", (40, 30, 16))


def test_init_from_elsewhere_makes_and_fetches_nothing(tmp_path, monkeypatch, capsys):
    """Its demo is read where it lies; where it is gone, only --data makes one, in ./data."""
    small_demo(monkeypatch)
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    assert call(mmcpr.main, *QUICK, "--data-dir", there) == 0
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 0) == 0
    (there / "demo").rename(tmp_path / "moved")
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 0) == 2
    assert "demo is not there, and for an emb.npz nothing is made" in only_error(capsys)
    assert not (there / "demo").exists() and not (tmp_path / "data").exists()
    assert call(finetune.main, "--init", "emb.npz", "--data", "demo", "--epochs", 0) == 0
    assert (tmp_path / "data" / "demo").exists() and not (there / "demo").exists()


@pytest.mark.parametrize("name", ["vg", "amazon:Books", "amazon:../Books"])
def test_init_that_names_data_to_download(trained, monkeypatch, capsys, name):
    arrays = dict(np.load("emb.npz"))
    meta = json.loads(str(arrays["meta"]))
    meta["data"] |= {"data": name, "data_dir": str(trained / "elsewhere")}
    np.savez("emb.npz", **(arrays | {"meta": np.array(json.dumps(meta))}))
    monkeypatch.setattr(download, "fetch_file", lambda *args: pytest.fail("a download"))
    assert call(finetune.main, "--init", "emb.npz") == 2
    assert "for an emb.npz nothing is made or downloaded" in only_error(capsys)
    assert not (trained / "elsewhere").exists()


# --- What a second look found ---------------------------------------------------------------

def test_made_folder_on_another_disk(tmp_path, monkeypatch):
    """Renaming fails there, so files are copied."""
    def other_disk(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
    monkeypatch.setattr(os, "rename", other_disk)
    for content in ("old", "new"):
        disk.make_folder(tmp_path / "made", {"key": content},
                        lambda folder: put(folder, {"images/a.txt": content, "b.csv": content}))
        assert (tmp_path / "made/images/a.txt").read_text() == content
        assert (tmp_path / "made/b.csv").read_text() == content


def test_download_that_was_whole_already(tmp_path, monkeypatch):
    """Killed after the last byte: the file is renamed, not fetched again."""
    no_sleep(monkeypatch)
    put(tmp_path, {"a.gz.part": b"0123456789"})

    def whole(handler):
        answer(handler, b"", 416, **{"Content-Range": "bytes */10"})
    with server({"/a.gz": whole}) as (url, log):
        download.fetch_file(url + "a.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == b"0123456789" and len(log) == 1


def test_pipe_in_the_place_of_refused_txt(tmp_path):
    put(tmp_path, {"image_urls.json": '{"images/a.jpg": ["http://127.0.0.1:1/a"]}'})
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "refused.txt")
    with pytest.raises(InputError, match="refused.txt: a pipe"):
        download.fetch_images(tmp_path)


def test_leftovers_in_folders_of_ours_are_swept(tmp_path):
    put(tmp_path, {"images/.a.jpg.1.tmp": "", "images/a.jpg": "", "images/.b.jpg.1.tmp": ""})
    os.utime(tmp_path / "images/.a.jpg.1.tmp", (1, 1))
    disk.remove_leftovers(tmp_path / "images")
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"a.jpg", ".b.jpg.1.tmp"}


def test_ml_1m_separators_in_train_txt(tmp_path, capsys):
    put(tmp_path / "x", {"train.txt": "1::2::5\n", "test.txt": "1::3::4\n"})
    assert prepare(tmp_path / "x") == 2
    assert "train.txt, row 1: fields separated by ::; what is read here" in only_error(capsys)


@pytest.mark.parametrize("name", ["a.jfif", "notes.txt", "model.pt"])
def test_output_over_any_other_file_in_the_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    put(tmp_path / "shop", {name: "mine"})
    assert call(finetune.main, "--data", "shop", "--epochs", 0,
                "--metrics", tmp_path / "shop" / name) == 2
    assert "which is read here" in only_error(capsys)
    assert (tmp_path / "shop" / name).read_text() == "mine"


def test_checkpoint_that_another_program_has_open(trained, capsys, monkeypatch):
    """Training goes on."""
    real = os.replace

    def locked(source, target):
        if str(target).endswith(".ckpt") and os.path.exists(target):
            raise PermissionError(13, "Access is denied", str(source), None, str(target))
        real(source, target)
    monkeypatch.setattr(os, "replace", locked)
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--checkpoint-every", 0) == 0
    assert "not saved" in capsys.readouterr().err
