"""What only a GPU can get wrong: draws and sums on the device, waits, a process group of nccl.

Each test runs on the CPU too, where there is something to be seen.
"""
import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.distributed as dist

import data
import encode
import finetune
import mmcpr
import ops
from conftest import HERE, call, matrix_of, shop
from paper import bench
from test_files import tiny_clip


def assert_same_run(got, want, device):
    """Tables of two runs with the same draws: on a CPU bit for bit.

    A GPU adds up in another order each time, and Adam makes much of little gradients.
    """
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= (0 if device == "cpu" else 1e-2)


@contextlib.contextmanager
def no_waiting(device):
    """An error where the GPU's queue is waited for, as for a number or a copy to the CPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def plain_towers(train, features, weights, device):
    """MMCPR with these weights whose graphs are dense matrices."""
    model = mmcpr.MMCPR(train, features, dim=8, device=device)
    for tower, R in ((model.user_tower, train), (model.item_tower, train.T.tocsr())):
        A = torch.from_numpy(ops.co_interaction_plain(R).toarray()).to(device)
        tower.graph = lambda x, A=A: ops.neighbour_mean_plain(A, x)
    model.load_state_dict(weights)
    return model


def test_pretraining_epochs_are_those_of_a_plain_trainer(monkeypatch, device):
    """Every epoch's losses are those of the plain definitions, with plain Adam, given the same
    draws."""
    rng = np.random.default_rng(21)
    pairs, text, image = shop(rng)
    train = matrix_of(pairs, 40, 30)
    features = {"R": rng.normal(size=(40, 6)), "T": text, "V": image}
    args = mmcpr.arguments().parse_args(
        ["--epochs", "6", "--eval-every", "1", "--batch", "17", "--dim", "8", "--lr", "0.05"])
    steps, objective = [], mmcpr.objective

    def spy(model, R, users, cima_items, *rest):
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        steps.append((weights, users, cima_items))
        return objective(model, R, users, cima_items, *rest)

    monkeypatch.setattr(mmcpr, "objective", spy)
    parts = data.Parts(train, sp.csr_matrix((40, 30)), None, None, "")
    _, _, report = mmcpr.pretrain(parts, features, args, device)
    model = plain_towers(train, features, steps[0][0], device)
    R, every_item = ops.sparse_tensor(train, device), torch.arange(30, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=2 * 0.8 / train.nnz,
                                 foreach=False, fused=False)
    per_block, losses = 17 * train.nnz / 40, []
    for _, users, cima_items in steps:
        item, _, projected = model.item_tower(every_item)
        user, _, _ = model.user_tower(users)
        l1 = mmcpr.cima(projected[cima_items, 0], projected[cima_items, 1])
        l2 = ops.bce_plain(user, item, model.bias, *ops.row_entries(R, users)) / per_block
        optimizer.zero_grad()
        (0.2 * l1 * len(cima_items) / per_block + 0.8 * l2).backward()
        optimizer.step()
        losses.append((l1.item(), l2.item()))
    losses = np.array(losses).reshape(6, 3, 2).sum(1)                     # three blocks an epoch
    history = report["history"]
    assert [point["cima"] for point in history] == pytest.approx(losses[:, 0] / 3, rel=1e-4)
    assert [point["bce"] for point in history] == pytest.approx(losses[:, 1] * 17 / 40, rel=1e-4)
    assert history[-1]["cima"] < 0.8 * history[0]["cima"]
    assert history[-1]["bce"] < history[0]["bce"]


def test_a_step_waits_for_nothing(device):
    """Of both steps only the number of a block's positives, and of items drawn anew, is waited
    for."""
    torch.manual_seed(0)
    pairs, text, image = shop(np.random.default_rng(22))
    train = matrix_of(pairs, 40, 30)
    light = finetune.LightGCN(train, torch.randn(40, 8).to(device), torch.randn(30, 8).to(device))
    model = mmcpr.MMCPR(train, {"T": text, "V": image}, dim=8, device=device)
    users, items = torch.arange(9, device=device), torch.arange(40, 49, device=device)
    candidates = torch.randint(40, 70, (9, 5), device=device)
    mix, cima_items = torch.rand(4, 9, device=device), model.items_with_pair()
    R = ops.sparse_tensor(train, device)
    rows, cols = ops.row_entries(R, users)

    def finetuning_loss():
        return finetune.mixgcf_loss(light, users, items, candidates, mix)

    def pretraining_loss():
        _, _, loss = mmcpr.objective(model, R, users, cima_items, 5.0)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "row_entries", lambda R, users: (rows, cols))
        for trained, loss in ((light, finetuning_loss), (model, pretraining_loss)):
            optimizer = torch.optim.Adam(trained.parameters(), fused=True)
            for step in range(2):
                # The first step builds the optimiser's state and the libraries' handles.
                with no_waiting(device if step else "cpu"):
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()
            assert all(x.device.type == device for x in trained.parameters())


COMMANDS = {
    "mmcpr": (mmcpr.main, ("--data", "shop", "--dim", 8, "--epochs", 6, "--eval-every", 2,
                           "--batch", 13, "--out")),
    "finetune": (finetune.main, ("--data", "shop", "--dim", 8, "--epochs", 6, "--eval-every", 2,
                                 "--batch", 53, "--out"))}


def tables(path):
    arrays = data.load_embeddings(path)
    return np.concatenate([arrays["user"], arrays["item"]])


@pytest.mark.parametrize("script", COMMANDS)
def test_resumed_run_draws_what_the_whole_run_draws(interrupted, script, device):
    """The random state of the device is part of a checkpoint."""
    main, flags = COMMANDS[script]
    flags = (*flags, "a.npz", "--device", device, "--checkpoint-every", 0)
    interrupted(main, *flags, after=12)
    assert call(main, *flags, "--resume") == 0
    resumed = tables("a.npz")
    assert call(main, *flags) == 0
    assert_same_run(tables("a.npz"), resumed, device)


@pytest.mark.parametrize("script", COMMANDS)
def test_group_of_one_gets_what_no_group_gets(trained, script, device):
    """Through gloo or nccl: shares, sums of gradients and losses, barriers."""
    main, flags = COMMANDS[script]
    assert call(main, *flags, "alone.npz", "--device", device) == 0
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1,
                            init_method=(trained / "meeting").as_uri())
    try:
        assert call(main, *flags, "group.npz", "--device", device) == 0
    finally:
        dist.destroy_process_group()
    assert_same_run(tables("group.npz"), tables("alone.npz"), device)


@pytest.mark.parametrize("script", COMMANDS)
def test_torchrun_starts_one_process(trained, script, device):
    if device == "cpu":
        pytest.skip("two processes are tested there")
    _, flags = COMMANDS[script]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=1", HERE / f"{script}.py", *flags, "one.npz", "--device", device]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path("one.npz").exists()


@pytest.mark.parametrize("tower", ["text", "image"])
def test_clip_in_half_precision(tmp_path, tower, device):
    """Vectors of float16 products have a cosine of .9995 or more to those of float32; where
    numbers are too large for float16, they are float32's."""
    name, weights, _ = tiny_clip(tmp_path)
    encoder = encode.ClipEncoder(name, str(weights), device)
    assert encoder.half == (device == "cuda")
    batch = ["a red lamp", "blue " * 90, "3 x 5 mm"]
    if tower == "image":
        torch.manual_seed(0)
        batch = list(torch.randn(5, 3, 32, 32))

    def rows_of(half):
        encoder.half = half
        return getattr(encoder, tower)(batch)

    want, got = rows_of(False), rows_of(True)
    assert got.dtype == np.float32 and not np.array_equal(got, want)
    cosine = (want * got).sum(1) / np.linalg.norm(want, axis=1) / np.linalg.norm(got, axis=1)
    assert cosine.min() > 0.9995
    # A product of 1e5 is infinite in float16.
    projection = encoder.model.visual.proj if tower == "image" else encoder.model.text_projection
    projection.data *= 1e7
    assert np.array_equal(rows_of(True), rows_of(False)) and np.isfinite(rows_of(True)).all()


def test_epochs_are_measured(trained, capsys, device):
    """The benchmark's whole epochs: a floor for both stages, what 1,000 epochs take."""
    assert call(bench.main, "--data", "shop", "--epochs", "--device", device) == 0
    out = capsys.readouterr().out
    assert out.count("reached") == 2
    assert "1,000 epochs of fine-tuning" in out
    if device == "cuda":
        assert out.count("kernels a step") == 2 and out.count("GiB") == 3
