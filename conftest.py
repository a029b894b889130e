"""What the tests share: tiny data, commands in this process, short runs.

pytest finds the scripts beside this file, and paper/, because it is here.
"""
import os
from pathlib import Path

# One thread, here and in the scripts that are started: on tiny data a second one brings nothing,
# and on a busy machine threads that wait for each other take minutes. torch reads it when it is
# imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import disk
import mmcpr
import run

HERE = Path(__file__).parent
# The environment of a script that leaves a GPU, where there is one, alone.
ON_THE_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device of this machine; `pytest -k cuda` runs what is tested on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def commands_on_the_cpu(monkeypatch):
    """--device auto is cpu: only there are results promised bit for bit."""
    device_name = run.device_name

    def cpu_for_auto(text):
        return "cpu" if text == "auto" else device_name(text)
    monkeypatch.setattr(run, "device_name", cpu_for_auto)


def binary(rng, n, m, density, empty_row=None):
    """A random binary CSR matrix [n, m]."""
    cells = rng.random((n, m)) < density
    if empty_row is not None:
        cells[empty_row] = False
    return sp.csr_matrix(cells.astype(np.float32))


def matrix_of(pairs, n_users, n_items):
    """Binary CSR [n_users, n_items] of (user, item) pairs [n, 2]."""
    ones = np.ones(len(pairs), np.float32)
    return sp.csr_matrix((ones, tuple(pairs.T)), (n_users, n_items))


def shop(rng, n_users=40, n_items=30, tastes=3, width=8):
    """A small shop with planted tastes: (pairs [n, 2], noisy text, noisy image [n_items, d])."""
    user_taste = rng.integers(tastes, size=n_users)
    item_taste = rng.integers(tastes, size=n_items)
    liked = user_taste[:, None] == item_taste
    pairs = np.argwhere(rng.random((n_users, n_items)) < np.where(liked, 0.6, 0.05))
    views = []
    for _ in range(2):
        clean = rng.normal(size=(tastes, width))[item_taste]
        views.append(clean + 0.3 * rng.normal(size=(n_items, width)))
    return pairs, *views


def write_shop(folder, seed=0):
    """The shop as a folder data set with ready features; some items lack a modality."""
    rng = np.random.default_rng(seed)
    pairs, text, image = shop(rng)
    text[3], image[[5, 6]] = np.nan, np.nan
    review = rng.normal(size=(len(pairs), 6)).astype(np.float16)
    review[::7] = np.nan
    folder.mkdir()
    np.save(folder / "item_text.npy", text.astype(np.float32))
    np.save(folder / "item_image.npy", image.astype(np.float32))
    np.save(folder / "review.npy", review)
    named = [(f"u{u}", f"i{i}") for u, i in pairs]
    disk.write_csv(folder / "interactions.csv", ("user", "item"), named)
    disk.write_csv(folder / "items.csv", ("item",), [(f"i{i}",) for i in range(30)])


def call(main, *argv):
    """A script's main in this process; returns the exit code."""
    return run.cli(main, [str(a) for a in argv])


QUICK = ("--epochs", 6, "--eval-every", 2, "--dim", 8, "--device", "cpu")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder data set and the emb.npz of a short pre-training, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    assert call(mmcpr.main, "--data", "shop", *QUICK) == 0
    return tmp_path


@pytest.fixture
def interrupted(trained, monkeypatch):
    """A function that runs a command and interrupts it in its n-th step, as Ctrl-C would."""
    step = torch.optim.Adam.step

    def command(main, *argv, after=2):
        steps = []

        def stop(*args, **options):
            steps.append(1)
            if len(steps) == after:
                raise KeyboardInterrupt
            return step(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", stop)
            assert call(main, *argv) == 2
        return trained
    return command
