"""The tests: python -m pytest -q. Every fast path against the plain loop that states its definition, in float64 where a
formula is checked; the real command lines on tiny data; every documented error once. No network, GPU or other data."""
import concurrent.futures
import contextlib
import csv
import errno
import gzip
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from PIL import Image

import baselines
import bench
import data
import finetune
import metrics
import mmcpr
import reproduce

HERE = Path(__file__).parent


def binary(rng, n, m, density, empty_row=None):
    """A random binary CSR matrix [n, m]."""
    cells = rng.random((n, m)) < density
    cells[empty_row if empty_row is not None else []] = False
    return sp.csr_matrix(cells.astype(np.float32))


def shop(rng, n_users=40, n_items=30, tastes=3, width=8):
    """Interactions of a small shop with planted tastes, and noisy item vectors: (pairs [n, 2], text, image [n_items, d])."""
    user_taste, item_taste = rng.integers(tastes, size=n_users), rng.integers(tastes, size=n_items)
    liked = user_taste[:, None] == item_taste
    pairs = np.argwhere(rng.random((n_users, n_items)) < np.where(liked, 0.6, 0.05))
    views = [rng.normal(size=(tastes, width))[item_taste] + 0.3 * rng.normal(size=(n_items, width)) for _ in range(2)]
    return pairs, *views


def write_shop(folder, seed=0, reviews=True):
    """The shop as a folder data set with ready features; some items lack a modality. Returns its pairs."""
    rng = np.random.default_rng(seed)
    pairs, text, image = shop(rng)
    text[3], image[[5, 6]] = np.nan, np.nan
    folder.mkdir()
    np.save(folder / "item_text.npy", text.astype(np.float32))
    np.save(folder / "item_image.npy", image.astype(np.float32))
    if reviews:
        review = rng.normal(size=(len(pairs), 6)).astype(np.float16)
        review[::7] = np.nan
        np.save(folder / "review.npy", review)
    data.write_csv(folder / "interactions.csv", ("user", "item"), [(f"u{u}", f"i{i}") for u, i in pairs])
    data.write_csv(folder / "items.csv", ("item",), [(f"i{i}",) for i in range(30)])
    return pairs


def run(main, *argv):
    return data.cli(main, [str(a) for a in argv])


# --- metrics.py -----------------------------------------------------------------------------------------------------

def test_metrics_by_hand():
    """One user, six items ranked 0, 1, ... 5; item 0 is masked, items 2 and 5 are the truth: hits at positions 2 and 5."""
    score = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    seen, truth = sp.csr_matrix([[1, 0, 0, 0, 0, 0]]), sp.csr_matrix([[0, 0, 1, 0, 0, 1]])
    got = metrics.evaluate(torch.ones(1, 1), score.T, seen, truth, (1, 2, 5))
    ideal = 1 + 1 / np.log2(3)
    want = {"recall@1": 0, "ndcg@1": 0, "recall@2": 1 / 2, "ndcg@2": (1 / np.log2(3)) / ideal,
            "recall@5": 1, "ndcg@5": (1 / np.log2(3) + 1 / np.log2(6)) / ideal}
    assert got == pytest.approx(want, abs=1e-12)


def test_metrics_ideal_is_cut_at_k():
    """Three true items but k = 2: a perfect top two is NDCG 1, Recall 2/3."""
    got = metrics.evaluate(torch.ones(1, 1), torch.tensor([[3.0], [2], [1], [0]]), sp.csr_matrix((1, 4)),
                           sp.csr_matrix([[1, 1, 1, 0]]), (2,))
    assert got == pytest.approx({"recall@2": 2 / 3, "ndcg@2": 1})


@pytest.mark.parametrize("chunk", [1, 60, 1 << 20])
def test_metrics_against_the_loop(monkeypatch, chunk):
    """Users without a test item are left out of the mean; k above the number of candidates is fine; chunks do not matter."""
    monkeypatch.setattr(metrics, "CHUNK_SCORES", chunk)
    rng = np.random.default_rng(1)
    cells = rng.random((17, 25))
    seen, truth = sp.csr_matrix((cells < 0.3) * 1.0), sp.csr_matrix(((cells > 0.85) & (np.arange(17) % 4 > 0)[:, None]) * 1.0)
    user, item = (torch.from_numpy(rng.normal(size=(n, 4))) for n in (17, 25))
    for k in (1, 5, 24, 60):
        got = metrics.evaluate(user, item, seen, truth, (k,))
        tested = np.flatnonzero(np.diff(truth.indptr))
        assert got == pytest.approx(bench.plain_evaluate(user, item, seen, truth, k, tested), abs=1e-12)


def test_ranking_leaves_out_seen_items():
    rng = np.random.default_rng(2)
    seen = binary(rng, 9, 12, 0.5)
    for rows, scores, items in metrics.rank(torch.randn(9, 3), torch.randn(12, 3), seen, 12):
        for row, s, i in zip(rows, scores, items):
            assert set(i[s > -torch.inf].tolist()) == set(range(12)) - set(seen[row].indices)


# --- The co-interaction graph and LightGCN (Eq. 1, 2) ----------------------------------------------------------------

@pytest.mark.parametrize("density", [0.02, 0.15, 0.6])
@pytest.mark.parametrize("form", ["auto", "A", "RE"])
@pytest.mark.parametrize("norm", ["row", "sym"])
def test_co_interaction_against_the_dense_graph(density, form, norm):
    """Product and gradient of R(R'x) - Ex against D^-1 A, or D^-1/2 A D^-1/2, written out from the sets S_a; isolated: 0."""
    rng = np.random.default_rng(3)
    R = binary(rng, 23, 31, density, empty_row=4)
    A = np.array([[float(a != b and bool(set(R[a].indices) & set(R[b].indices))) for b in range(23)] for a in range(23)])
    assert np.array_equal(data.co_interaction(R, block_entries=7).n_neighbours, A.sum(1))
    inverse = np.divide(1, A.sum(1), out=np.zeros(23), where=A.sum(1) > 0)[:, None]
    P = torch.from_numpy(inverse * A if norm == "row" else np.sqrt(inverse) * A * np.sqrt(inverse.T))
    graph = mmcpr.CoInteractionGraph(R, norm, dtype=torch.float64, form=form)
    x, g = torch.randn(2, 23, 5, dtype=torch.float64)
    x.requires_grad_()
    y = graph(x)
    y.backward(g)
    torch.testing.assert_close(y, P @ x)
    torch.testing.assert_close(x.grad, P.T @ g)
    assert not y[4].any()
    assert torch.autograd.gradcheck(graph, torch.randn(23, 2, dtype=torch.float64, requires_grad=True))


def test_co_interaction_keeps_the_smaller_form():
    rng = np.random.default_rng(4)
    sparse, dense = data.co_interaction(binary(rng, 300, 40, 0.03)), data.co_interaction(binary(rng, 50, 40, 0.9))
    assert sparse.A is None and 2 * sparse.R.nnz + sparse.E.nnz < sparse.n_neighbours.sum()
    assert dense.R is None and dense.A.nnz == dense.n_neighbours.sum() == 50 * 49


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_product_against_the_dense_one(dtype):
    """Empty rows are 0; x may be a view that is not contiguous."""
    rng = np.random.default_rng(4)
    matrix = sp.random_array((9, 13), density=0.3, format="csr", rng=rng)
    matrix = sp.csr_matrix(matrix.multiply(np.arange(9)[:, None] != 4))
    x = torch.from_numpy(rng.normal(size=(5, 13))).to(dtype).T
    got = mmcpr.sparse_product(mmcpr.sparse_tensor(matrix, dtype=dtype), x)
    torch.testing.assert_close(got, torch.from_numpy(matrix.toarray()).to(dtype) @ x)
    assert not got[4].any()


def test_lightgcn_layers_against_the_neighbourhood_loop():
    """e^(l+1)_u is the mean of the neighbours' e^(l) (Eq. 1)."""
    R = binary(np.random.default_rng(5), 12, 9, 0.2)
    e = torch.randn(12, 3, dtype=torch.float64)
    layers = mmcpr.lightgcn(e, mmcpr.CoInteractionGraph(R, dtype=torch.float64), 2)
    assert len(layers) == 3 and layers[0] is e
    for l in range(2):
        for u in range(12):
            neighbours = [w for w in range(12) if w != u and set(R[u].indices) & set(R[w].indices)]
            want = sum(layers[l][w] for w in neighbours) / len(neighbours) if neighbours else torch.zeros(3)
            torch.testing.assert_close(layers[l + 1][u], want, check_dtype=False)


# --- Inter-modal aggregation (Eq. 6-8, 12-14) and what is missing ----------------------------------------------------

def test_inter_modal_aggregation_against_the_loop():
    """Missing modalities get weight exactly 0 and the others' weights are the softmax among themselves."""
    rng = np.random.default_rng(6)
    projected, a = torch.from_numpy(rng.normal(size=(20, 3, 4))), torch.from_numpy(rng.normal(size=4))
    present = torch.from_numpy(rng.random((20, 3)) < 0.6)
    present[0], present[1] = False, True
    e, alpha = mmcpr.inter_modal_aggregation(projected, present, a)
    for n in range(20):
        weight = [np.exp(max(0.0, float(a @ projected[n, m]))) if present[n, m] else 0.0 for m in range(3)]
        weight = np.array(weight) / max(sum(weight), 1e-300)
        np.testing.assert_allclose(alpha[n], weight, rtol=1e-12)
        np.testing.assert_allclose(e[n], weight @ projected[n].numpy(), rtol=1e-10, atol=1e-12)
    assert not alpha[~present].any()


def tower(rng, present_text, graph=True, n=10):
    """An item tower over random text (missing where told) and images, and its raw features."""
    text, image = rng.normal(size=(n, 5)) * 20, rng.normal(size=(n, 7))
    text[~present_text] = np.nan
    R = binary(rng, n, 12, 0.3) if graph else None
    return mmcpr.Tower(n, {"T": text, "V": image}, R is not None and mmcpr.CoInteractionGraph(R) or None, dim=4), text, image, R


def test_tower_projects_normalised_features_and_the_graph():
    """e'^m = W e^m + b (Eq. 6, 12): frozen rows L2-normalised, centred, of RMS norm 1; for the graph LightGCN's mean layer (Eq. 2)."""
    rng = np.random.default_rng(7)
    present = np.arange(10) != 3
    model, text, image, R = tower(rng, present)
    e, alpha, projected = model(torch.arange(10))
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    unit -= unit.mean(0)
    unit /= np.sqrt((unit ** 2).sum(1).mean())
    want = unit @ model.W["V"].weight.detach().numpy().T + model.W["V"].bias.detach().numpy()
    np.testing.assert_allclose(projected[:, 1].detach(), want, rtol=1e-5, atol=1e-6)
    graph = sum(mmcpr.lightgcn(model.e0, mmcpr.CoInteractionGraph(R), 2)) / 3
    torch.testing.assert_close(projected[:, 2], model.W["G"](graph))
    assert alpha[3, 0] == 0 and (alpha.detach()[present, 0] > 0).all()
    (e ** 2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters()) and model.a.grad.any()
    assert model.own is None


def test_a_modality_that_nobody_has_changes_nothing():
    """All rows NaN: no attention, and finite values and gradients."""
    image = np.random.default_rng(9).normal(size=(5, 3))
    model = mmcpr.Tower(5, {"T": np.full((5, 2), np.nan), "V": image}, None, dim=4)
    e, alpha, projected = model(torch.arange(5))
    torch.testing.assert_close(e, projected[:, 1])
    assert not alpha[:, 0].any()
    (e ** 2).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_node_with_nothing_uses_its_own_row():
    """No graph and no features for some nodes, or for a whole side: a trainable row of its own, so that L2 is defined."""
    text = np.random.default_rng(8).normal(size=(6, 3))
    text[[1, 4]] = np.nan
    model = mmcpr.Tower(6, {"T": text}, None, dim=4)
    e = model(torch.arange(6))[0]
    torch.testing.assert_close(e[[1, 4]], model.own[[1, 4]])
    e.sum().backward()
    assert model.own.grad[[1, 4]].all() and not model.own.grad[[0, 2, 3, 5]].any()
    torch.testing.assert_close((bare := mmcpr.Tower(6, {}, None, dim=4))(torch.tensor([2, 5]))[0], bare.own[[2, 5]])


# --- The losses (Eq. 11, 15, 16) --------------------------------------------------------------------------------------

def test_cima_against_its_formula():
    rng = np.random.default_rng(9)
    t, v = rng.normal(size=(2, 7, 5))
    s = np.array([[p @ q / (0.1 * np.linalg.norm(p) * np.linalg.norm(q)) for q in v] for p in t])
    sigma = 1 / (1 + np.exp(-s))
    eye = np.eye(7)
    bce = -(eye * np.log(sigma) + (1 - eye) * np.log(1 - sigma)).sum() / 7
    softmax = -np.mean([np.log(np.exp(m[p, p]) / np.exp(m[p]).sum()) for m in (s, s.T) for p in range(7)])
    got = {form: mmcpr.cima(torch.from_numpy(t), torch.from_numpy(v), 0.1, form).item() for form in ("bce", "softmax")}
    assert got == pytest.approx({"bce": bce, "softmax": softmax}, rel=1e-10)


@pytest.mark.parametrize("chunk", [1, 24, 1 << 20])
def test_full_block_bce_against_its_formula(chunk):
    """Value and gradients of all entries of R, zeros too, against the printed formula with its sigmoid, by autograd."""
    rng = np.random.default_rng(10)
    R = binary(rng, 6, 11, 0.3)
    at, column = (torch.from_numpy(x) for x in metrics.entries(R, np.arange(6)))
    tensors = [torch.from_numpy(rng.normal(size=shape)).requires_grad_() for shape in ((6, 4), (11, 4), (11,))]
    fast = mmcpr.FullBlockBCE.apply(*tensors, at, column, chunk)
    got = torch.autograd.grad(3 * fast, tensors)
    p, r = torch.sigmoid(tensors[0] @ tensors[1].T + tensors[2]), torch.from_numpy(R.toarray())
    plain = -(r * p.log() + (1 - r) * (1 - p).log()).sum()
    torch.testing.assert_close(fast, plain)
    for g, want in zip(got, torch.autograd.grad(3 * plain, tensors)):
        torch.testing.assert_close(g, want)
    assert torch.autograd.gradcheck(lambda u, i, b: mmcpr.FullBlockBCE.apply(u, i, b, at, column, chunk), tensors)


def test_full_block_bce_does_not_overflow():
    """Logits of +-1000: log(1 + exp(x)) would be infinite."""
    item = torch.tensor([[1000.0], [-1000.0]])
    loss = mmcpr.FullBlockBCE.apply(torch.ones(1, 1), item, torch.zeros(2), torch.tensor([0]), torch.tensor([1]))
    assert loss.item() == pytest.approx(2000)


def small_model(rng, **options):
    pairs, text, image = shop(rng)
    train = sp.csr_matrix((np.ones(len(pairs), np.float32), pairs.T), (40, 30))
    image[2] = np.nan
    review = rng.normal(size=(40, 6))
    return mmcpr.MMCPR(train, {"R": review, "T": text, "V": image}, dim=8, **options), train


@pytest.mark.parametrize("lam", [0, 0.2, 1])
@pytest.mark.parametrize("bias", ["none", "global", "item"])
def test_objective_is_the_weighted_sum(lam, bias):
    """Eq. 16 against its two terms written out over the whole block; the gradients too."""
    torch.manual_seed(0)
    model, train = small_model(np.random.default_rng(11), bias=bias)
    model = model.double()
    for tower in (model.users, model.items):
        tower.graph = mmcpr.CoInteractionGraph(train if tower is model.users else train.T.tocsr(), dtype=torch.float64)
    rows, some = torch.tensor([3, 1, 8]), model.paired()[:9]
    assert 2 not in model.paired() and len(model.paired()) == 29
    l1, l2, loss = mmcpr.objective(model, train, rows, some, 5.0, lam)
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    item, _, projected = model.items(torch.arange(30))
    s = model.users(rows)[0] @ item.T + model.bias
    r = torch.from_numpy(train[rows.numpy()].toarray()).double()
    plain2 = torch.nn.functional.binary_cross_entropy_with_logits(s, r, reduction="sum") / 5.0
    plain1 = mmcpr.cima(projected[some, 0], projected[some, 1])
    plain = lam * plain1 * 9 / 5.0 + (1 - lam) * plain2
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(bench.plain_objective(model, train, rows, some, 5.0, lam), plain)
    assert l1.item() == pytest.approx(plain1.item() if lam > 0 else 0)
    assert l2.item() == pytest.approx(plain2.item() if lam < 1 else 0)
    for name, g, want in zip(dict(model.named_parameters()), got, torch.autograd.grad(plain, list(model.parameters()))):
        torch.testing.assert_close(torch.zeros_like(want) if g is None else g, want, msg=name)
    if lam == 1:  # only the two projections of CIMA are trained
        moved = {name for (name, _), g in zip(model.named_parameters(), got) if g is not None and g.any()}
        assert moved == {f"items.W.{m}.{part}" for m in "TV" for part in ("weight", "bias")}


# --- LightGCN with MixGCF ---------------------------------------------------------------------------------------------

def test_lightgcn_against_the_dense_matrix():
    rng = np.random.default_rng(12)
    R = binary(rng, 7, 5, 0.4, empty_row=2)
    model = finetune.LightGCN(R, torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 3)
    A = np.zeros((12, 12))
    A[:7, 7:], A[7:, :7] = R.toarray(), R.toarray().T
    root = np.array([d ** -0.5 if d else 0.0 for d in A.sum(1)])
    P = torch.from_numpy(root[:, None] * A * root)
    want = [torch.linalg.matrix_power(P, l) @ model.E0 for l in range(4)]
    for got, layer in zip(model.layers(), want):
        torch.testing.assert_close(got, layer, rtol=1e-5, atol=1e-6)
    user, item = model.embed()
    torch.testing.assert_close(torch.cat([user, item]), sum(want) / 4, rtol=1e-5, atol=1e-6)
    rows, g = torch.randint(12, (4, 30)), torch.randn(4, 30, 3, dtype=torch.float64)  # rows come more than once
    slow, = torch.autograd.grad(sum((layer[r] * weight).sum() for layer, r, weight in zip(want, rows, g)), model.E0)
    picked = finetune.LayerRows.apply(model.E0, model.layers(), rows, model.A)
    fast, = torch.autograd.grad((picked * g).sum(), model.E0)
    torch.testing.assert_close(picked, torch.stack([layer[r] for layer, r in zip(want, rows)]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_layer_rows_gradcheck(n_layers):
    R = binary(np.random.default_rng(12), 7, 5, 0.4, empty_row=2)
    model = finetune.LightGCN(R, *(torch.randn(n, 3, dtype=torch.float64) for n in (7, 5)), n_layers)
    rows = torch.randint(12, (n_layers + 1, 6))
    assert torch.autograd.gradcheck(lambda E0: finetune.LayerRows.apply(E0, model.layers(), rows, model.A), model.E0)


def mixgcf_by_loop(layers, users, positives, candidates, alpha, l2):
    """MixGCF as its paper states it, sample by sample: mix every candidate, then pick per layer, then pool."""
    total, penalty = 0, 0
    for b in range(len(users)):
        query = sum(layer[users[b]] for layer in layers) / len(layers)
        picked = []
        for l, layer in enumerate(layers):
            mixed = [alpha[l, b] * layer[positives[b]] + (1 - alpha[l, b]) * layer[c] for c in candidates[b]]
            picked.append(mixed[int(np.argmax([(query @ x).item() for x in mixed]))])
        positive = sum(layer[positives[b]] for layer in layers) / len(layers)
        negative = sum(picked) / len(layers)
        total = total + torch.log(1 + torch.exp(query @ negative - query @ positive))
        penalty = penalty + sum((x ** 2).sum() for x in (layers[0][users[b]], layers[0][positives[b]], picked[0]))
    return total + l2 / 2 * penalty


@pytest.mark.parametrize("M", [1, 5, 30])
def test_mixgcf_against_the_loop(M):
    """Value and gradient: the arg-max over unmixed candidates, the sampled product and Horner's rule change nothing."""
    rng = np.random.default_rng(13)
    model = finetune.LightGCN(binary(rng, 8, 12, 0.4), *(torch.from_numpy(rng.normal(size=(n, 6))) for n in (8, 12)), 3)
    users, positives = torch.from_numpy(rng.integers(8, size=9)), torch.from_numpy(rng.integers(8, 20, size=9))
    candidates, alpha = torch.from_numpy(rng.integers(8, 20, size=(9, M))), torch.from_numpy(rng.random((4, 9)))
    fast = finetune.mixgcf_loss(model, users, positives, candidates, alpha, 0.3)
    layers = mmcpr.lightgcn(model.E0, model.A.to_dense().matmul, 3)
    slow = mixgcf_by_loop(layers, users, positives, candidates, alpha, 0.3)
    plain = bench.plain_mixgcf_loss(model.E0, model.A.to_dense().to_sparse_coo(), 3, users, positives, candidates, alpha, 0.3)
    gradient, *others = (torch.autograd.grad(loss, model.E0)[0] for loss in (fast, slow, plain))
    for value, g in zip((slow, plain), others):
        torch.testing.assert_close(fast, value)
        torch.testing.assert_close(gradient, g)


def test_negatives_are_uniform_over_what_the_user_has_not():
    torch.manual_seed(0)
    R = sp.csr_matrix(np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], np.float32))
    drawn = finetune.NegativeSampler(R)(torch.tensor([0, 2, 1]), 4000)
    count = lambda row: np.bincount(drawn[row], minlength=5)
    assert not count(0)[[0, 2]].any() and not count(1)[4]
    assert count(2).sum() == 4000, "a user who has everything gets any item"
    for row, free in ((0, 3), (1, 4)):  # chi-square, 99.9 % quantile of free - 1 degrees of freedom at most 16.3
        observed = count(row)[count(row) > 0]
        assert len(observed) == free and ((observed - 4000 / free) ** 2 / (4000 / free)).sum() < 16.3


def test_epochs_are_those_of_a_plain_trainer(trained, monkeypatch):
    """Every epoch's loss, over several, is that of MixGCF written out, with torch's plain Adam, given the same draws."""
    draws, loss = [], finetune.mixgcf_loss

    def spy(model, *drawn):
        draws.append((model.E0.detach().clone(), *drawn))
        return loss(model, *drawn)

    monkeypatch.setattr(finetune, "mixgcf_loss", spy)
    assert run(finetune.main, "--data", "shop", "--epochs", 6, "--eval-every", 1, "--batch", 50, "--lr", 0.05, "--candidates", 5,
               "--metrics", "m.json") == 0
    train = data.split_dataset(data.load("shop", contents=False)).train
    E0 = torch.nn.Parameter(draws[0][0])
    P = finetune.LightGCN(train, E0[:40].detach(), E0[40:].detach()).A.to_dense().to_sparse_coo()
    optimizer = torch.optim.Adam([E0], lr=0.05, foreach=False, fused=False)
    losses = []
    for _, users, *drawn in draws:
        value = bench.plain_mixgcf_loss(E0, P, 3, users, *drawn)
        optimizer.zero_grad()
        (value / len(users)).backward()
        optimizer.step()
        losses.append(value.item())
    steps = -(-train.nnz // 50)
    want = [sum(losses[k:k + steps]) / train.nnz for k in range(0, len(losses), steps)]
    assert [point["loss"] for point in json.loads(Path("m.json").read_text())["history"]][1:] == pytest.approx(want, rel=1e-4)
    assert want[-1] < 0.95 * want[0]


def test_initial_scale_and_missing_side():
    rng = np.random.default_rng(14)
    train = binary(rng, 50, 30, 0.1, empty_row=7)
    item = rng.normal(size=(30, 16)).astype(np.float32)
    rms = lambda x: x.square().mean().sqrt().item()
    user, same = finetune.initial_tables({"item": item}, train, 16, missing_side="mean")
    np.testing.assert_array_equal(same, item)
    np.testing.assert_allclose(user[3], item[train[3].indices].mean(0), rtol=1e-5)
    assert user[7].any(), "a user without training items is drawn at random"
    given = {"user": 2 * rng.normal(size=(50, 16)).astype(np.float32), "item": item}
    for scale, want in (("xavier", ((2 / 66) ** 0.5, (2 / 46) ** 0.5)), (0.3, (0.3, 0.3))):
        for init in (given, {"item": item}):
            tables = finetune.initial_tables(init, train, 16, scale)
            assert [rms(table) for table in tables] == pytest.approx(want, rel=1e-5)
            np.testing.assert_allclose(tables[1].numpy() / item, want[1] / np.sqrt(np.mean(item ** 2)), rtol=1e-4)  # a factor, no more
    random, _ = finetune.initial_tables(None, train, 16)
    assert random.abs().max() <= (6 / 66) ** 0.5 and rms(random) == pytest.approx((2 / 66) ** 0.5, rel=0.1)


@pytest.mark.parametrize("curve, evaluations", [
    ([1, 2, 3, 3, 3, 3, 3], 6),                          # three in a row without a new best
    ([5, 4, 3, 4, 5, 6, 6, 6, 6, 6], 9),                 # falls, then rises above its start: a new best alone would stop at 4
    ([5, 4, 3, 2, 1, 0, 0], 6),                          # falls for good
    ([5, 4, 3, 2, 2.5, 1, 1.5, 0], 6),                # falls for good with upticks
    ([1, 4, 3, 2, 3, 5], 5)])                         # rises and falls without reaching the old low
def test_patience(curve, evaluations):
    patience = finetune.Patience(3)
    assert next(n for n, value in enumerate(curve, 1) if patience.over(value) or n == len(curve)) == evaluations


# --- The command lines, end to end on tiny data -----------------------------------------------------------------------

QUICK = ("--epochs", 6, "--eval-every", 2, "--dim", 8, "--device", "cpu")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A tiny folder data set and the emb.npz of a short pre-training on it; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    assert run(mmcpr.main, "--data", "shop", *QUICK) == 0
    return tmp_path


def test_pretrain_then_finetune(trained, capsys):
    """emb.npz needs no --data; the metrics file, the final embeddings and recs.csv agree with each other."""
    arrays = data.load_embeddings("emb.npz")
    assert arrays["user"].shape == (40, 8) and arrays["item"].shape == (30, 8) and arrays["item"].dtype == np.float32
    assert arrays["meta"]["data"]["valid"] == 0.1 and list(arrays["item_ids"][:2]) == ["i0", "i1"]
    assert set(arrays["meta"]["report"]["attention"]["item"]) == set("TVG")
    (trained / "elsewhere").mkdir()
    os.chdir(trained / "elsewhere")
    assert run(finetune.main, "--init", "../emb.npz", "--epochs", 6, "--candidates", 4, "--metrics", "m.json",
               "--out", "final.npz", "--recommend", "recs.csv") == 0
    result = json.loads(Path("m.json").read_text())
    assert {"data", "init", "seed", "scale", "epoch", "epochs_run", "seconds", "valid", "test"} <= set(result)
    assert set(result["test"]) == {f"{name}@{k}" for name in ("recall", "ndcg") for k in (20, 40, 60)}
    final = data.load_embeddings("final.npz")
    columns = data.read_csv("recs.csv", ("user", "rank", "item", "score"))
    dataset = data.load("../shop", contents=False)
    parts = data.split_dataset(dataset)
    user_row, item_row = ({name: n for n, name in enumerate(ids)} for ids in (dataset.user_ids, dataset.item_ids))
    hits = np.zeros(40)
    for u, i, score in zip(columns["user"], columns["item"], columns["score"]):
        u, i = user_row[u], item_row[i]
        assert not parts.train[u, i] and not parts.valid[u, i]
        assert final["user"][u] @ final["item"][i] == pytest.approx(float(score), rel=1e-3, abs=1e-5)
        hits[u] += parts.test[u, i]
    tested = np.diff(parts.test.indptr)
    assert np.mean(hits[tested > 0] / tested[tested > 0]) == pytest.approx(result["test"]["recall@20"])
    assert "recall@20" in capsys.readouterr().out


def test_same_seed_same_bytes(trained):
    """Same seed, same machine, same result, in another process too; another seed another one."""
    first = data.load_embeddings("emb.npz")
    command = [sys.executable, HERE / "mmcpr.py", "--data", "shop", *QUICK, "--out", "again.npz"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    again = data.load_embeddings("again.npz")
    assert np.array_equal(first["user"], again["user"]) and np.array_equal(first["item"], again["item"])
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--seed", 1, "--out", "other.npz") == 0
    assert not np.array_equal(first["item"], data.load_embeddings("other.npz")["item"])
    repeats = []
    for _ in range(2):
        assert run(finetune.main, "--init", "emb.npz", "--epochs", 3, "--seeds", 0, 1, "--metrics", "m.json") == 0
        result = json.loads(Path("m.json").read_text())
        repeats.append([{k: v for k, v in r.items() if k != "seconds"} for r in result["runs"]])
    assert repeats[0] == repeats[1] and repeats[0][0]["history"] != repeats[0][1]["history"]
    values = [r["test"]["ndcg@40"] for r in result["runs"]]
    assert result["mean"]["ndcg@40"] == pytest.approx(np.mean(values))
    assert result["std"]["ndcg@40"] == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize("argv, words", [
    (("--split-seed", 1), "other training interactions"), (("--valid", 0), "other training interactions"),
    (("--data", "other"), "other training interactions"), (("--dim", 16), "8 wide"), (("--lr", -1), "--lr")])
def test_finetune_refuses(trained, capsys, argv, words):
    """An initialiser of another split, other data or another width: exit code 2 and one line."""
    write_shop(trained / "other", seed=5)
    assert run(finetune.main, "--init", "emb.npz", *argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize("argv", [("--modalities", "TX"), ("--lam", "1.5"), ("--data-dir",), ("--scale", "-1"), ("--seeds", "x")])
def test_flags_out_of_range_are_refused(argv, capsys):
    main = finetune.main if argv[0] in ("--scale", "--seeds") else mmcpr.main
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("subset", ["R", "T", "V", "G", "TV", "RG", "RTVG"])
def test_any_subset_of_modalities(trained, subset):
    """Figure 3: every subset trains; a side that is left with nothing has rows of its own."""
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--modalities", subset, "--out", "e.npz") == 0
    arrays = data.load_embeddings("e.npz")
    attention = arrays["meta"]["report"]["attention"]
    assert set(attention["user"]) == set(subset) & set("RG") and set(attention["item"]) == set(subset) & set("TVG")
    assert np.isfinite(arrays["user"]).all()


def test_lambda_one_needs_pairs_to_hold_out(trained, capsys):
    pairs = np.load("shop/item_text.npy")
    pairs[10:] = np.nan
    np.save("shop/item_text.npy", pairs)
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--lam", 1) == 2
    assert "only 7 items have both" in capsys.readouterr().err


def test_lambda_one_trains_the_alignment_alone(trained):
    """Table 3's w/o BCE: users stay as initialised, and held-out items' CIMA loss chooses the epoch."""
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--lam", 1, "--out", "e.npz") == 0
    assert run(mmcpr.main, "--data", "shop", *QUICK[2:], "--epochs", 2, "--lam", 1, "--out", "f.npz") == 0
    one, two = data.load_embeddings("e.npz"), data.load_embeddings("f.npz")
    assert np.array_equal(one["user"], two["user"]) and not np.array_equal(one["item"], two["item"])
    history = one["meta"]["report"]["history"]
    assert one["meta"]["report"]["epoch"] == min(history, key=lambda point: point["held_out_cima"])["epoch"]


def test_without_validation_the_last_epoch_is_taken(trained):
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--valid", 0, "--out", "e.npz") == 0
    arrays = data.load_embeddings("e.npz")
    assert arrays["meta"]["report"]["epoch"] == 6 and arrays["meta"]["report"]["valid"]["recall@20"] is None
    assert run(finetune.main, "--init", "e.npz", "--epochs", 3, "--metrics", "m.json") == 0
    assert json.loads(Path("m.json").read_text())["epoch"] == 3


def test_items_only_initialiser(trained):
    """An emb.npz without `user` (a method that learns items alone) takes users from --missing-side."""
    with np.load("emb.npz") as file:
        np.savez("items.npz", **{name: file[name] for name in file.files if name != "user"})
    for side in ("random", "mean"):
        assert run(finetune.main, "--init", "items.npz", "--missing-side", side, "--epochs", 1) == 0


def test_held_out_reviews_and_features_never_reach_the_embeddings(tmp_path, monkeypatch):
    """Replacing every held-out interaction's review by another vector leaves emb.npz's tables as they are, bit for bit."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    tables = []
    for _ in range(2):
        assert run(mmcpr.main, "--data", "shop", *QUICK) == 0
        tables.append(data.load_embeddings("emb.npz"))
        dataset = data.load("shop")
        review = np.load("shop/review.npy")
        review[~data.split_dataset(dataset).in_train] = 9
        np.save("shop/review.npy", review)
    assert np.array_equal(tables[0]["user"], tables[1]["user"]) and np.array_equal(tables[0]["item"], tables[1]["item"])


@pytest.mark.parametrize("script, out", [("mmcpr.py", "--out"), ("finetune.py", "--metrics")])
def test_ctrl_c_keeps_the_best_epoch(tmp_path, script, out):
    """SIGINT during training: the best epoch so far is written, one line says so, exit code 2."""
    write_shop(tmp_path / "shop")
    command = [sys.executable, HERE / script, "--data", "shop", out, "result", "--epochs", "1000000", "--patience", "1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = b""
    while b"recall@20" not in seen:  # the bar shows a validation: there is an epoch to keep
        part = os.read(process.stderr.fileno(), 4096)
        assert part, seen
        seen += part
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and b"error: interrupted" in err and b"Traceback" not in err
    assert (tmp_path / "result").exists()


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # two that wait for each other on a busy machine take minutes
RUNS = {"mmcpr.py": ("--data", "shop", "--dim", "8", "--batch", "15", "--epochs", "60", "--patience", "60", "--eval-every", "4"),
        "finetune.py": ("--data", "shop", "--dim", "8", "--batch", "50", "--epochs", "30", "--patience", "60", "--seeds", "3", "4",
                        "--eval-every", "3", "--metrics", "m.json")}


def outcome(script, folder):
    """All that a run has found, but for the time it took."""
    strip = lambda report: {name: value for name, value in report.items() if name not in ("seconds", "data")}
    arrays = data.load_embeddings(folder / "result.npz")
    if script == "mmcpr.py":
        return arrays["user"], arrays["item"], strip(arrays["meta"]["report"])
    return arrays["user"], arrays["item"], list(map(strip, json.loads((folder / "m.json").read_text())["runs"]))


@pytest.mark.parametrize("script", ["mmcpr.py", "finetune.py"])
def test_interrupted_run_goes_on_to_the_same_bits(tmp_path, script):
    """The real command, killed with -9 at whatever moment, resumed, sent SIGTERM, resumed: as if never interrupted."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, HERE / script, *RUNS[script], "--out", "result.npz"]
    mtime = lambda: max((path.stat().st_mtime_ns for path in cut.glob("*.ckpt")), default=0)
    for folder in (whole, cut):
        folder.mkdir()
        write_shop(folder / "shop")
    reference = subprocess.Popen(command, cwd=whole, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for how in (signal.SIGKILL, signal.SIGTERM):
        before = mtime()
        process = subprocess.Popen([*command, "--resume", "--checkpoint-every", "0"], cwd=cut, env=ONE_THREAD,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and mtime() == before:
            time.sleep(0.01)
        time.sleep(0.15)  # some epochs on, in the middle of whatever it is doing
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        assert (b"goes on in epoch" if before else b"starting from the beginning") in out, (out, err)
        assert process.returncode == (2 if how == signal.SIGTERM else -9) and b"Traceback" not in err
        assert how != signal.SIGTERM or b"--resume goes on" in err
        assert len(list(cut.glob("*.ckpt"))) == 1
    subprocess.run([*command, "--resume"], cwd=cut, env=ONE_THREAD, check=True, capture_output=True, timeout=60)
    assert reference.wait(60) == 0 and not [*cut.glob("*.ckpt"), *cut.glob(".*.tmp")]
    (user, item, report), (user_cut, item_cut, report_cut) = outcome(script, whole), outcome(script, cut)
    assert np.array_equal(user, user_cut) and np.array_equal(item, item_cut)
    assert report == report_cut


@pytest.fixture
def interrupted(trained, monkeypatch):
    """A function that runs a command and interrupts it after its n-th step, as SIGTERM would."""
    tick = mmcpr.Checkpoint.tick

    def command(main, *argv, after=1):
        steps = [0]

        def stop(self, *state):
            steps[0] += 1
            self.asked = self.asked or steps[0] == after
            tick(self, *state)
        with monkeypatch.context() as patch:
            patch.setattr(mmcpr.Checkpoint, "tick", stop)
            assert run(main, *argv) == 2
        return trained
    return command


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main])
@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:500]), lambda path: path.write_bytes(b""),
    lambda path: torch.save({"same": 1}, path), lambda path: torch.save({"results": [], "run": {}, "model": {}, "optimizer": {}}, path)])
def test_damaged_checkpoint(interrupted, capsys, main, damage):
    """One line. Without --resume the run says that a checkpoint lies there, and starts anew."""
    flags = ("--data", "shop", "--epochs", 2, "--eval-every", 1, "--out", "e.npz")
    path = next(interrupted(main, *flags).glob("*.ckpt"))
    damage(path)
    assert run(main, *flags, "--resume") == 2
    assert "not a checkpoint of this version, or damaged; delete it" in capsys.readouterr().err
    assert run(main, *flags) == 0
    assert "--resume would continue it" in capsys.readouterr().out and not path.exists()


@pytest.mark.parametrize("main, change", [
    (mmcpr.main, ("--lr", 0.002)), (mmcpr.main, "text"), (finetune.main, ("--lr", 0.002)), (finetune.main, "init"),
    (finetune.main, ("--split-seed", 1))])
def test_checkpoint_of_other_options_or_inputs_is_left_alone(interrupted, capsys, main, change):
    """Its name carries a digest: other options, features or initial tables start from the beginning and delete nothing."""
    flags = ["--data", "shop", "--epochs", 2, "--eval-every", 1, "--out", "e.npz", *(("--init", "emb.npz") if change == "init" else ())]
    folder = interrupted(main, *flags)
    path = next(folder.glob("*.ckpt"))
    if change == "text":
        np.save(folder / "shop/item_text.npy", np.load(folder / "shop/item_text.npy")[::-1])
    elif change == "init":
        assert run(mmcpr.main, "--data", "shop", *QUICK, "--seed", 5) == 0
    else:
        flags += change
    assert run(main, *flags, "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().out and path.exists()


def test_finished_seeds_are_not_lost_nor_claimed(interrupted, capsys):
    """Interrupted in the second seed: the first is kept; a file only its run could have written is not promised."""
    flags = ("--data", "shop", "--epochs", 2, "--seeds", 0, 1, "--dim", 8)
    interrupted(finetune.main, *flags, "--metrics", "m.json", after=3)
    assert [r["seed"] for r in json.loads(Path("m.json").read_text())["runs"]] == [0, 1]
    assert run(finetune.main, *flags, "--metrics", "m.json", "--recommend", "recs.csv", "--resume") == 2
    assert "recs.csv: belongs to seed 0" in capsys.readouterr().err
    assert run(finetune.main, *flags, "--metrics", "m.json", "--resume") == 0
    runs = json.loads(Path("m.json").read_text())["runs"]
    assert [(r["seed"], r["interrupted"]) for r in runs] == [(0, False), (1, False)]


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main])
def test_resuming_is_promised_only_where_a_checkpoint_lies(interrupted, capsys, monkeypatch, main):
    """A second Ctrl-C comes in mid-step and saves nothing."""
    flags = ("--data", "shop", "--epochs", 2, "--eval-every", 1, "--out", "e.npz")
    interrupted(main, *flags)
    assert "the same command with --resume goes on" in capsys.readouterr().err
    for path in Path().glob("*.ckpt"):
        path.unlink()

    def second(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(mmcpr.Checkpoint, "tick", second)
    assert run(main, *flags) == 2
    assert "no checkpoint yet; the same command starts anew" in capsys.readouterr().err and not list(Path().glob("*.ckpt"))


def test_checkpoint_that_cannot_be_written_does_not_end_the_run(trained, capsys, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(RuntimeError("enforce fail: disk full")))
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--checkpoint-every", 0) == 0
    assert "not saved (enforce fail: disk full); training goes on" in capsys.readouterr().err


@pytest.mark.parametrize("module, options", [(mmcpr, ("--batch", "13")), (mmcpr, ("--lam", "1", "--cima", "bce")),
                                             (finetune, ("--batch", "53"))])
def test_two_processes_get_what_one_gets(trained, module, options):
    """torchrun with two CPU processes: losses, validation and embeddings of the single process, to rounding; one report."""
    flags = ("--data", "shop", "--dim", "8", "--epochs", "6", "--eval-every", "2", *options)
    outputs = [("--out", f"{k}.npz", *(("--metrics", f"{k}.json") if module is finetune else ())) for k in (1, 2)]
    assert run(module.main, *flags, *outputs[0]) == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", module.__file__)
    done = subprocess.run([*launcher, *flags, *outputs[1]], env=ONE_THREAD, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count(b"next: python") == 1, done
    one, two = (data.load_embeddings(output[1]) for output in outputs)
    for side in ("user", "item"):
        np.testing.assert_allclose(two[side], one[side], rtol=1e-4, atol=1e-6)
    histories = [json.loads(Path(output[3]).read_text())["history"] if module is finetune else arrays["meta"]["report"]["history"]
                 for output, arrays in zip(outputs, (one, two))]
    assert len(histories[0]) == len(histories[1]) >= 3
    for a, b in zip(*histories):
        assert {k: v for k, v in b.items() if v is not None} == pytest.approx({k: v for k, v in a.items() if v is not None}, rel=1e-4)


@pytest.mark.parametrize("main, flag", [(mmcpr.main, "--out"), (finetune.main, "--metrics"), (finetune.main, "--recommend")])
@pytest.mark.parametrize("path", ["shop", "shop/items.csv/x", "pipe"])
def test_outputs_are_checked_before_the_work(trained, capsys, monkeypatch, main, flag, path):
    """A folder, a path below a file, or what renaming would replace, like /dev/null: said at once, not after the training."""
    monkeypatch.setattr(data, "load", None)  # nothing may be loaded before
    os.mkfifo("pipe")
    assert run(main, "--data", "shop", flag, path) == 2
    assert "choose another output path" in capsys.readouterr().err


def test_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    data.replace_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere/file").read_bytes() == b"new"


def test_link_to_the_tables_it_starts_from_is_refused(trained, capsys):
    """It would be written through; the same for two outputs that are one file."""
    before = Path("emb.npz").read_bytes()
    Path("link.npz").symlink_to("emb.npz")
    assert run(finetune.main, "--init", "emb.npz", "--out", "link.npz", "--epochs", 1) == 2
    assert "would overwrite the tables" in capsys.readouterr().err and Path("emb.npz").read_bytes() == before
    assert run(finetune.main, "--out", "emb.npz", "--metrics", "link.npz") == 2
    assert "given twice" in capsys.readouterr().err


def test_next_command_keeps_the_flags(trained, capsys):
    """Of data.py and finetune.py; typed as printed it works on the same data and split."""
    flags = ("--data", "shop", "--min-count", 2, "--valid", 0.2)
    for main, more in ((data.main, ()), (finetune.main, ("--epochs", 1))):
        assert run(main, *flags, *more) == 0
        command = capsys.readouterr().out.splitlines()[-1].split("python mmcpr.py ")[1].split(",")[0]
        assert command == f"--data {trained / 'shop'} --min-count 2 --valid 0.2"
    (trained / "shop").rename(trained / "my shop")
    assert run(data.main, "--data", "my shop", "--encoder", "tiny") == 0
    assert f"python mmcpr.py --data '{trained / 'my shop'}' --encoder tiny\n" in capsys.readouterr().out
    assert run(finetune.main, "--init", "emb.npz", "--data", "my shop", "--epochs", 2, "--seeds", 3, 4, "--scale", "xavier") == 0
    assert f"--init random --data '{trained / 'my shop'}' --dim 8 --seeds 3 4 --epochs 2, the start" in capsys.readouterr().out


def test_runs_that_went_wrong_say_so(trained, interrupted, capsys):
    """A loss no better than popularity's, fine-tuning that only made it worse, tables of an interrupted pre-training."""
    flags, hints = ("--data", "shop", "--dim", 8, "--eval-every", 1), ("hardly better than popularity", "try a lower --lr")
    capsys.readouterr()
    for main, more in ((mmcpr.main, ("--weight-decay", 0, "--lr", 0.1)), (finetune.main, ())):
        assert run(main, *flags, "--epochs", 60, "--valid", 0, *more) == 0
    out = capsys.readouterr().out
    assert "seed 0, epoch 60 of 60" in out and not any(hint in out for hint in hints)
    assert run(mmcpr.main, *flags, "--lr", 10, "--epochs", 3, "--out", "wild.npz") == 0 and hints[0] in capsys.readouterr().out
    assert run(finetune.main, "--init", "wild.npz", "--lr", 1e-9, "--epochs", 2) == 0 and hints[1] in capsys.readouterr().out
    interrupted(mmcpr.main, *flags, "--epochs", 9, "--out", "cut.npz", after=4)
    assert run(finetune.main, "--init", "cut.npz", "--epochs", 1) == 0
    assert "cut.npz: of a pre-training that was interrupted" in capsys.readouterr().out


def test_output_that_nobody_reads(tmp_path):
    """`python data.py | head -0`: no traceback."""
    write_shop(tmp_path / "shop")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, HERE / "data.py", "--data", "shop"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_data_that_has_none_of_the_modalities_asked_for(tmp_path, monkeypatch):
    """--modalities R without reviews, interactions alone: every node has a row of its own, and L2 trains them."""
    monkeypatch.chdir(tmp_path)
    pairs = shop(np.random.default_rng(0))[0]
    (tmp_path / "bare").mkdir()
    data.write_csv(tmp_path / "bare/interactions.csv", ("user", "item"), pairs)
    assert run(mmcpr.main, "--data", "bare", "--modalities", "R", *QUICK) == 0
    assert run(finetune.main, "--init", "emb.npz", "--epochs", 0) == 0
    assert run(mmcpr.main, "--data", "bare", "--lam", 1, *QUICK) == 2


def test_readme_quotes_the_code():
    """Every decision's line in the README's numbered list stands in the file it names."""
    quotes = re.findall(r"`(\w+\.py)`:\s+`([^`]+)`", (HERE / "README.md").read_text(encoding="utf-8").split("leaves open")[1])
    assert len(quotes) >= 23
    for name, line in quotes:
        assert line in (HERE / name).read_text(encoding="utf-8"), (name, line)


def test_numbers_blow_up_in_one_line(trained, capsys):
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--lr", 1e30) == 2
    assert "lower --lr" in capsys.readouterr().err


def test_validation_chooses_the_epoch_and_test_is_ranked_once(trained, monkeypatch):
    """Both scripts rank validation alone until the end; what they hand over is the epoch with the best validation Recall@20."""
    parts = data.split_dataset(data.load("shop", contents=False))
    ranked, evaluate = [], metrics.evaluate

    def spy(user, item, seen, truth, ks):
        ranked.append(next(name for name in ("valid", "test") if (truth != getattr(parts, name)).nnz == 0))
        return evaluate(user, item, seen, truth, ks)

    monkeypatch.setattr(metrics, "evaluate", spy)
    assert run(mmcpr.main, "--data", "shop", *QUICK[2:], "--epochs", 40, "--lr", 0.1, "--out", "e.npz") == 0
    assert set(ranked) == {"valid"}
    ranked.clear()
    assert run(finetune.main, "--init", "e.npz", "--epochs", 30, "--eval-every", 2, "--lr", 0.1, "--scale", "xavier",
               "--metrics", "m.json", "--out", "f.npz") == 0
    assert ranked.count("test") == 1 == len(ranked) - ranked.index("test")
    for arrays, history in ((data.load_embeddings("e.npz"), data.load_embeddings("e.npz")["meta"]["report"]["history"]),
                            (data.load_embeddings("f.npz"), json.loads(Path("m.json").read_text())["history"])):
        values = [point["recall@20"] for point in history]
        assert values[-1] < max(values), "the last epoch is the best: the test shows nothing"
        user, item = torch.from_numpy(arrays["user"]), torch.from_numpy(arrays["item"])
        assert evaluate(user, item, parts.train, parts.valid, (20,))["recall@20"] == pytest.approx(max(values))


def test_finetuning_steps_see_training_pairs_and_negatives(trained, monkeypatch):
    """An epoch is each training pair once, the last partial batch too; candidates are items outside the user's training."""
    train, seen, loss = data.split_dataset(data.load("shop", contents=False)).train, [], finetune.mixgcf_loss

    def spy(model, users, positives, candidates, alpha, l2):
        assert alpha.shape == (4, len(users)) and l2 == 0.5
        seen.extend(zip(users.tolist(), (positives - 40).tolist()))
        assert not train.toarray()[users[:, None], candidates - 40].any()
        return loss(model, users, positives, candidates, alpha, l2)

    monkeypatch.setattr(finetune, "mixgcf_loss", spy)
    assert run(finetune.main, "--init", "emb.npz", "--epochs", 1, "--batch", 50, "--candidates", 5, "--l2", 0.5) == 0
    assert sorted(seen) == sorted(zip(*(x.tolist() for x in train.nonzero())))


def test_missing_side_reaches_the_start(trained):
    """--missing-side mean: at epoch 0 and without layers a user's row is the mean of the training items' rows."""
    with np.load("emb.npz") as file:
        np.savez("items.npz", **{name: file[name] for name in file.files if name != "user"})
    assert run(finetune.main, "--init", "items.npz", "--missing-side", "mean", "--epochs", 0, "--layers", 0,
               "--out", "f.npz") == 0
    arrays, train = data.load_embeddings("f.npz"), data.split_dataset(data.load("shop", contents=False)).train
    np.testing.assert_allclose(arrays["user"][0], arrays["item"][train[[0]].indices].mean(0), rtol=1e-5)


def test_popularity_loss_is_the_bce_of_the_log_odds():
    train = binary(np.random.default_rng(15), 30, 12, 0.3)
    train = sp.csr_matrix(np.hstack([train.toarray(), np.zeros((30, 1)), np.ones((30, 1))]))  # nobody's item, everybody's: no loss
    p = torch.from_numpy(train.toarray().mean(0)[:12])
    s, R = (p / (1 - p)).log().expand(30, -1), torch.from_numpy(train.toarray()[:, :12])
    want = torch.nn.functional.binary_cross_entropy_with_logits(s, R, reduction="sum").item() / train.nnz
    assert mmcpr.popularity_loss(train) == pytest.approx(want, rel=1e-9)


def test_pretraining_patience_starts_after_the_plateau(trained, monkeypatch):
    """However late the plateau is left, patience is counted from there, not from a best epoch on it."""
    monkeypatch.setattr(metrics, "evaluate", lambda *args: {"recall@20": 0.5})  # the first evaluation stays the best
    ends = {}
    for height in (1e9, -1):  # left at once; never
        monkeypatch.setattr(mmcpr, "popularity_loss", lambda train: height)
        assert run(mmcpr.main, "--data", "shop", *QUICK[2:], "--epochs", 30, "--patience", 10, "--out", "e.npz") == 0
        ends[height] = data.load_embeddings("e.npz")["meta"]["report"]["epochs_run"]
    assert ends == {1e9: 12, -1: 30}


def test_weight_decay_falls_with_the_number_of_users(trained, monkeypatch):
    """Adam gets --weight-decay / n_users (40 here), times the weight of BCE in the loss: lam weighs CIMA alone."""
    given, Adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: given.append(options["weight_decay"]) or Adam(*args, **options))
    for flags in ((), ("--weight-decay", 2), ("--lam", 0), ("--lam", 0.5)):
        assert run(mmcpr.main, "--data", "shop", *QUICK[2:], "--epochs", 1, *flags, "--out", "e.npz") == 0
    assert given == pytest.approx([0.6 / 40, 1.6 / 40, 0.75 / 40, 0.375 / 40])


@pytest.mark.parametrize("n_users, batch", [(40, 40), (40, 17)])
def test_reported_bce_is_per_positive_whatever_the_last_block(n_users, batch):
    """The loss printed at a learning rate of nothing is L2 of the whole of R per positive."""
    rng = np.random.default_rng(17)
    pairs, text, image = shop(rng)
    train = sp.csr_matrix((np.ones(len(pairs), np.float32), pairs.T), (40, 30))
    args = mmcpr.arguments().parse_args(["--lr", "1e-12", "--epochs", "1", "--batch", str(batch), "--bias", "none"])
    user, item, report = mmcpr.pretrain(Namespace(train=train, valid=sp.csr_matrix((40, 30))), {"T": text, "V": image}, args)
    s = torch.from_numpy(user @ item.T).double()
    r = torch.from_numpy(train.toarray()).double()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(s, r, reduction="sum") / train.nnz
    assert report["losses"]["bce"] == pytest.approx(plain.item(), rel=1e-5)


def test_alignment_of_collapsed_towers_is_no_success(trained):
    """Where all vectors are one, every image ties with the true one: text finds nothing; where they are the pairs, all."""
    model, _ = small_model(np.random.default_rng(18))
    items = model.paired()
    for name in "TV":
        torch.nn.init.zeros_(model.items.W[name].weight)
        torch.nn.init.ones_(model.items.W[name].bias)
    assert mmcpr.alignment(model, items)["text_to_image_recall@10"] == 0


@pytest.mark.parametrize("main, argv, words", [
    (mmcpr.main, ("--lr", "nan"), "--lr"), (mmcpr.main, ("--batch", 1), "--batch"), (mmcpr.main, ("--out", ""), "output path"),
    (mmcpr.main, ("--epochs", 1, "--lr", 1e30), "lower --lr"), (finetune.main, ("--l2", "nan"), "--l2"),
    (finetune.main, ("--epochs", 1, "--valid", 0, "--lr", 1e30), "lower --lr"),
    (finetune.main, ("--out", "x", "--metrics", "./x"), "given twice"), (finetune.main, ("--seeds", 2, 2), "names a seed twice"),
    (finetune.main, ("--init", "emb.npz", "--out", "./emb.npz"), "would overwrite the tables it starts from"),
    (finetune.main, ("--init", "emb.npz", "--metrics", "emb.npz"), "would overwrite the tables it starts from")])
def test_more_flags_that_cannot_work(trained, capsys, main, argv, words):
    assert run(main, "--data", "shop", *argv) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


# --- The parts of the method do what they should, where the truth is planted ------------------------------------------

def test_cima_aligns_and_its_absence_does_not():
    """Text and image are noisy views of one vector per item: CIMA finds most pairs among 300 items, its absence few."""
    rng = np.random.default_rng(15)
    pairs = shop(rng, n_users=60, n_items=300, tastes=8)[0]
    truth = rng.normal(size=(300, 8))
    text, image = (truth @ rng.normal(size=(8, 12)) + 0.3 * rng.normal(size=(300, 12)) for _ in range(2))
    parts = Namespace(train=sp.csr_matrix((np.ones(len(pairs), np.float32), pairs.T), (60, 300)), valid=sp.csr_matrix((60, 300)))
    found = {}
    for lam in (0, 0.2):
        args = mmcpr.arguments().parse_args(["--lam", str(lam), "--epochs", "60", "--lr", "0.01", "--dim", "16"])
        found[lam] = mmcpr.pretrain(parts, {"T": text, "V": image}, args)[2]["alignment"]
    assert found[0]["text_to_image_recall@10"] < 0.3 and found[0.2]["text_to_image_recall@10"] > 0.8
    assert found[0.2]["cosine_true"] - found[0.2]["cosine_false"] > 0.5


def test_contents_rank_items_nobody_trained_on():
    """Planted tastes show in the contents, so text and image, alone, put new items before users far better than chance."""
    rng = np.random.default_rng(16)
    pairs, text, image = shop(rng, n_users=120, n_items=90, tastes=4)
    new = pairs[:, 1] >= 70
    matrix = lambda rows: sp.csr_matrix((np.ones(len(rows), np.float32), rows.T), (120, 90))
    train, test = matrix(pairs[~new]), matrix(pairs[new])
    args = mmcpr.arguments().parse_args(["--modalities", "TV", "--epochs", "150", "--lr", "0.01", "--dim", "16"])
    user, item, _ = mmcpr.pretrain(Namespace(train=train, valid=sp.csr_matrix((120, 90))), {"T": text, "V": image}, args)
    old = sp.csr_matrix(np.repeat((np.arange(90) < 70)[None], 120, 0).astype(np.float32))  # rank the 20 new items alone
    got = metrics.evaluate(torch.from_numpy(user), torch.from_numpy(item), old, test, (5,))["recall@5"]
    chance = metrics.evaluate(torch.randn(120, 4), torch.randn(90, 4), old, test, (5,))["recall@5"]
    assert got > 2.5 * chance


# --- data.py: helpers --------------------------------------------------------------------------------------------------------

GOOD = {"interactions.csv": "user,item,review\n" + "".join(f"u{u},i{i},word{i}\n" for u in range(2) for i in range(6)),
        "items.csv": "item,text,image\n" + "".join(f"i{i},text {i},\n" for i in range(6))}
INTER = "userID\titemID\trating\tx_label\n" + "".join(f"{n % 3}\t{n % 5}\t1.0\t{n % 5 % 3}\n" for n in range(15))


def put(folder, files):
    """Writes {name: text, bytes or array} below folder, which it returns; None: no such file."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def prepare(folder, *more, data_dir=None):
    """python data.py on a folder or a named data set, in this process; returns the exit code."""
    place = data_dir or folder.parent / "cache"
    return data.cli(data.main, ["--data", str(folder), "--data-dir", str(place), "--encoder", "tiny", *map(str, more)])


def only_error(capsys):
    """What the command said last: the one `error: ` line of stderr (progress bars come before it)."""
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    assert [line for line in lines if "error:" in line or "Traceback" in line] == lines[-1:]
    assert lines[-1].startswith("error: ")
    return lines[-1]


def png(mode="RGB", size=(12, 9), colour=None, format="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, 0 if colour is None else colour).save(file, format)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoder_calls(monkeypatch, fail_at=None):
    """A list that gets the texts of each call of the tiny encoder; the call number fail_at is interrupted."""
    calls, real = [], data.TinyEncoder.text

    def text(self, texts):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(list(texts))
        return real(self, texts)

    monkeypatch.setattr(data.TinyEncoder, "text", text)
    return calls


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- Folders that cannot be read ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, words", [
    ("interactions.csv", "user,text\nu,i\n", "interactions.csv, row 1: no column 'item'"),
    ("interactions.csv", "user,itme\nu,i\n", "row 1: no column 'item'; rename 'itme'"),
    ("interactions.csv", "user,item,reveiw\nu,i0,x\n", "row 1: unknown column 'reveiw'; did you mean 'review'"),
    ("items.csv", "item,txt\ni0,x\n", "items.csv, row 1: unknown column 'txt'; did you mean 'text'"),
    ("interactions.csv", "user,item,item\nu,i0,i0\n", "row 1: a column name occurs twice"),
    ("interactions.csv", "", "interactions.csv: the file is empty"),
    ("interactions.csv", "user,item\n", "interactions.csv: the header is there, but no row follows"),
    ("interactions.csv", "user,item\nu,i0\nu,i1,more\n", "interactions.csv, row 3: 3 fields, the header has 2"),
    ("interactions.csv", "user,item\nu,i0\nu\n", "interactions.csv, row 3: 1 fields"),
    ("interactions.csv", b"user,item\nu,i0\nu,caf\xe9\nu,i1\n", "interactions.csv, row 3: not UTF-8; save"),
    ("interactions.csv", "user;item\nu;i0\n", "row 1: no column 'user'; separate the columns by commas"),
    ("interactions.csv", 'user,item\nu,i0\nu,"i1" x\n', "interactions.csv, row 3: "),
    ("interactions.csv", 'user,item\n"a\nb",i0\nu,"i1\nu,i2\nu,i3\n', "interactions.csv, row 4: unexpected end of data; mend that row"),
    ("interactions.csv", '"user,item\nu,i0\n', "interactions.csv, row 1: unexpected end of data"),
    ("interactions.csv", "user,item\nu,i0\n,i1\n", "interactions.csv: data row 2 has no user; fill it in or remove"),
    ("interactions.csv", "user,item\nu,i0\nu,\n", "interactions.csv: data row 2 has no item"),
    ("items.csv", "item,text\ni0,x\n,y\n", "items.csv: data row 2 has no item"),
    ("interactions.csv", "user,item\nu,i0\nu,i9\n", "interactions.csv: data row 2 has item 'i9', which is not in items.csv"),
    ("items.csv", GOOD["items.csv"] + "i2,again,\n", "items.csv: data row 7 lists item 'i2' a second time; remove"),
    ("items.csv", GOOD["items.csv"] + "j,x,a/../../x.png\n", "items.csv: data row 7: image 'a/../../x.png' leaves"),
    ("items.csv", GOOD["items.csv"] + "j,x,/x.png\n", "items.csv: data row 7: image '/x.png' leaves the folder; use"),
    ("interactions.csv", "user,item\n" + "".join(f"u{n // 4},i{n % 4}\n" for n in range(12)), "leaves nothing to test"),
    ("interactions.csv", None, "neither interactions.csv nor one .inter file"),
])
def test_folder_that_cannot_be_read(tmp_path, capsys, name, content, words):
    """A folder's defect ends with code 2 and one line that names the file, the row and the remedy."""
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
    files = GOOD | {"interactions.csv": "user,item\n" + "".join(f"u,i{i}\n" for i in range(6))}
    put(tmp_path / "shop", files | {file: edit(np.arange(18, dtype=np.float32).reshape(6, 3))})
    assert prepare(tmp_path / "shop") == 2
    message = only_error(capsys)
    assert file in message and words in message


@pytest.mark.parametrize("old, new, words", [
    ("x_label", "label", "x.inter, row 1: no column 'x_label'"),
    ("1.0\t2", "1.0\t3", "data row 3: x_label 3 is none of 0 (train), 1 (valid), 2 (test)"),
    ("1.0\t2", "1.0\t-1", "data row 3: x_label '-1' is not a whole number"),
    ("\n2\t2", "\n2\tB002", "data row 3: itemID 'B002' is not a whole number"),
    ("\n2\t2", "\n2.0\t2", "data row 3: userID '2.0' is not a whole number"),
    ("\n2\t2", f"\n{10 ** 20}\t2", f"data row 3: userID '{10 ** 20}'"),
    ("1.0\t2", "1.0", "x.inter, row 4: 3 fields"),
])
def test_mmrec_folder_that_cannot_be_read(tmp_path, capsys, old, new, words):
    """An MMRec folder's defect is named by row."""
    assert prepare(put(tmp_path / "x", {"x.inter": INTER.replace(old, new, 1)})) == 2
    assert words in only_error(capsys)


def test_mmrec_folder_without_training_rows(tmp_path, capsys):
    assert prepare(put(tmp_path / "x", {"x.inter": re.sub(r"0$", "2", INTER, flags=re.M)})) == 2
    assert "nothing to train on: no row has x_label 0" in only_error(capsys)


@pytest.mark.parametrize("name, words", [
    ("nowhere", "--data nowhere: no such folder, and not one of demo, vg, tg, sharee, amazon:<Category>"),
    ("sharee", "private data set cannot be downloaded"),
    ("amazon:", "a category is letters, digits and _"),
    ("amazon:../x", "amazon:../x: a category is letters, digits and _"),
])
def test_unknown_data(tmp_path, capsys, name, words):
    assert prepare(name, data_dir=tmp_path) == 2
    assert words in only_error(capsys)


def test_mmrec_labels_without_a_test_are_told_as_such(tmp_path, capsys):
    """Published labels with no 2 among them: the number of a user's interactions is not the reason."""
    assert prepare(put(tmp_path / "x", {"x.inter": INTER.replace("1.0\t2", "1.0\t1")})) == 2
    message = only_error(capsys)
    assert "nothing to test" in message and "5 interactions" not in message


# --- Folders that can -----------------------------------------------------------------------------------------------

def test_duplicates_are_merged_and_the_earliest_review_stays(tmp_path, capsys):
    put(tmp_path, {"interactions.csv": "user,item,review\nu,b,first\nv,b,other\nu,b,second\nu,a,\nu,a,late\n"})
    shop = data.load(str(tmp_path))
    pairs = list(zip(shop.user_ids[shop.users], shop.item_ids[shop.items], shop.reviews))
    assert pairs == [("u", "b", "first"), ("v", "b", "other"), ("u", "a", "")]
    assert "2 duplicate pairs merged" in capsys.readouterr().out


def test_csv_dialect(tmp_path):
    """A byte order mark, CRLF, quoted commas, quotes and line breaks, blank lines, other columns, items nobody bought."""
    put(tmp_path, {"interactions.csv": '\ufeffuser,when,item,review\r\nu,1,"a,b","one ""two""\nthree"\r\n\r\nu,2,ü,\r\n',
                   "items.csv": 'text,item\n"x, y",ü\n,"a,b"\nz,unsold\n'})
    shop = data.load(str(tmp_path))
    assert list(shop.item_ids) == ["ü", "a,b", "unsold"] and shop.texts == ["x, y", "", "z"] and shop.images is None
    assert list(shop.item_ids[shop.items]) == ["a,b", "ü"] and shop.reviews == ['one "two"\nthree', ""]


def test_user_with_one_interaction_trains_and_is_not_tested(tmp_path):
    put(tmp_path, GOOD | {"interactions.csv": GOOD["interactions.csv"] + "single,i0,\n"})
    shop = data.load(str(tmp_path))
    parts = data.split_dataset(shop)
    assert shop.user_ids[2] == "single" and [m[[2]].nnz for m in (parts.train, parts.valid, parts.test)] == [1, 0, 0]


def test_interactions_alone_are_a_data_set(tmp_path, capsys):
    assert prepare(put(tmp_path / "shop", {"interactions.csv": GOOD["interactions.csv"].replace(",review", ",note")})) == 0
    assert "2 users, 6 items, 12 interactions" in capsys.readouterr().out


def test_folder_may_be_called_like_a_built_in_set(tmp_path, capsys, monkeypatch):
    """--data demo is the built-in set, also where a folder of that name lies in the working directory."""
    monkeypatch.chdir(put(tmp_path, {f"demo/{name}": content for name, content in GOOD.items()}))
    monkeypatch.setattr(data.write_demo, "__defaults__", (40, 30, 16))
    assert prepare("demo", data_dir=tmp_path / "made") == 0
    assert "demo: 40 users, 30 items" in capsys.readouterr().out


def test_item_features_need_their_catalogue(tmp_path, capsys):
    put(tmp_path / "shop", GOOD | {"items.csv": None, "item_text.npy": np.ones((6, 2), np.float32)})
    assert prepare(tmp_path / "shop") == 2
    assert "item_text.npy: its rows are those of items.csv" in only_error(capsys)


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main, data.main])
def test_help_names_each_default_once(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text and not re.search(r"default: [^)]*\) \(default", text)


# --- Images ---------------------------------------------------------------------------------------------------------

def test_unreadable_images_are_nan_rows_and_counted(tmp_path, capsys):
    """Exactly the missing, cut-off, fake and absurdly large pictures are left out."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = {}
    for kind in ("PNG", "JPEG"):
        noise.save(file := io.BytesIO(), kind)
        whole[kind] = file.getvalue()
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)) + \
        chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    fine = {"rgb.png": whole["PNG"], "rgb.jpg": whole["JPEG"], "rgba.png": png("RGBA", colour=(9, 9, 9, 99)),
            "palette.png": png("P"), "grey.png": png("L"), "grey_alpha.png": png("LA"), "bit.png": png("1"),
            "grey16.png": png("I;16"), "cmyk.jpg": png("CMYK", format="JPEG"), "still.gif": png("P", format="GIF")}
    bad = {"missing.png": None, "cut.png": whole["PNG"][:3000], "cut.jpg": whole["JPEG"][:1000], "text.png": "hello",
           "empty.jpg": b"", "bomb.png": bomb}
    pictures = fine | bad
    items = "item,image\n" + "".join(f"{n},{name}\n" for n, name in enumerate(pictures)) + "none,\n"
    put(tmp_path, pictures | {"items.csv": items, "interactions.csv": "user,item\nu,none\n"})
    V = data.features(data.load(str(tmp_path)), "V", "tiny", tmp_path)["V"]
    whole_rows = dict(zip(pictures, ~np.isnan(V).any(1)))
    assert whole_rows == {name: name in fine for name in pictures} and np.isnan(V[-1]).all()
    assert "image: 256-d; 7 of 17 items have none (6 images missing or unreadable)" in capsys.readouterr().out


def test_open_image_composes_transparency_and_caps_pixels(tmp_path, monkeypatch):
    clear = io.BytesIO(png("RGBA", (16, 16), (200, 0, 0, 0)))
    monkeypatch.setattr(data, "MAX_PIXELS", 256)
    assert np.all(np.asarray(data.open_image(clear)) == 255)
    monkeypatch.setattr(data, "MAX_PIXELS", 255)
    clear.seek(0)
    assert data.open_image(clear) is None


# --- The split ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("valid", [0, 0.1, 0.5, 1])
def test_split_counts(valid):
    """floor(n_u / 5) to test, round(valid * training) to validation, and every user keeps one to train."""
    users = np.random.default_rng(3).permutation(np.repeat(np.arange(40), 1 + np.arange(40) % 13))
    part, n = data.split(users, 1, valid), np.bincount(users)
    assert np.array_equal(np.bincount(users[part == data.TEST], minlength=40), n // 5)
    assert np.bincount(users[part == data.TRAIN], minlength=40).min() >= 1
    rest = len(users) - np.sum(n // 5)
    assert np.sum(part == data.VALID) == min(round(valid * rest), rest - 40)


def test_split_seeds_are_reproducible_and_differ():
    users = np.repeat(np.arange(30), 10)
    assert np.array_equal(data.split(users, 5), data.split(users, 5))
    for held in (data.VALID, data.TEST):
        assert np.any((data.split(users, 5) == held) != (data.split(users, 6) == held))


def test_split_is_uniform_over_a_users_interactions():
    """Over many seeds each of ten interactions is tested in 1/5 of the splits (binomial, 6 sigma)."""
    tested = np.mean([data.split(np.zeros(10, int), seed) == data.TEST for seed in range(1000)], axis=0)
    assert np.all(np.abs(tested - 0.2) < 6 * np.sqrt(0.2 * 0.8 / 1000))


def test_published_labels_are_respected(tmp_path):
    """MMRec's x_label is the split; --valid 0 trains on its validation too; ids have gaps and feature rows follow them."""
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    inter = INTER + "9\t5\t1.0\t0\n"
    put(tmp_path / "x", {"x.inter": inter, "text_feat.npy": features, "image_feat.npy": features + 1})
    shop = data.load(str(tmp_path / "x"))
    parts, merged = data.split_dataset(shop, 0, 0.1), data.split_dataset(shop, 0, 0)
    rows = [list(map(int, (u, i, label))) for u, i, _, label in map(str.split, inter.splitlines()[1:])]
    for label, matrix in enumerate((parts.train, parts.valid, parts.test)):
        got = {(int(shop.user_ids[u]), int(shop.item_ids[i])) for u, i in zip(*matrix.nonzero())}
        assert got == {(u, i) for u, i, x in rows if x == label}
    assert (merged.train != parts.train + parts.valid).nnz == 0 == merged.valid.nnz
    assert list(shop.user_ids) == ["0", "1", "2", "9"]
    made = data.features(shop, "TV")
    assert np.array_equal(made["T"], features) and np.array_equal(made["V"], features + 1)


def test_labels_without_validation_get_one_from_training(tmp_path):
    """Where a published split has no validation, `valid` of its training is drawn; each user keeps one to train."""
    put(tmp_path / "x", {"x.inter": INTER.replace("1.0\t1\n", "1.0\t0\n")})
    shop = data.load(str(tmp_path / "x"))
    parts = data.split_dataset(shop, 0, 0.3)
    train = np.sum(shop.labels == data.TRAIN)
    assert parts.valid.nnz == round(0.3 * train) and parts.train.nnz == train - parts.valid.nnz
    assert np.diff(parts.train.indptr).min() >= 1 and parts.test.nnz == np.sum(shop.labels == data.TEST)


# --- Nothing held out leaks -----------------------------------------------------------------------------------------

def test_pool_reviews_is_the_mean_of_training_reviews():
    """Against a plain loop; what held-out rows hold, NaN and infinities too, changes no bit."""
    rng = np.random.default_rng(0)
    users, in_train = rng.integers(6, size=60), rng.random(60) < 0.7
    in_train[users == 2] = False
    review = rng.normal(size=(60, 4)).astype(np.float16)
    review[rng.random(60) < 0.2] = np.nan
    pooled = data.pool_reviews(review, users, 7, in_train, chunk=16)
    for u in range(7):
        own = [review[n].astype(np.float64) for n in range(60) if users[n] == u and in_train[n] and review[n, 0] == review[n, 0]]
        np.testing.assert_allclose(pooled[u], np.mean(own, 0) if own else np.full(4, np.nan), rtol=1e-5)
    for poison in (np.nan, np.inf):
        poisoned = np.where(in_train[:, None], review, np.float16(poison))
        np.testing.assert_array_equal(data.pool_reviews(poisoned, users, 7, in_train, chunk=16), pooled)


def test_fingerprint_and_graph_see_training_interactions_only():
    def parts(items, labels):
        ids = np.array(list("abcdef"))
        return data.split_dataset(data.Dataset("x", Path(), ids[:2], ids, np.array([0, 0, 0, 1, 1, 1]), np.array(items),
                                               np.array(labels, np.int8)))
    one, other = parts([0, 1, 2, 0, 1, 3], [0, 0, 2, 0, 1, 2]), parts([0, 1, 5, 0, 4, 2], [0, 0, 1, 0, 2, 2])
    changed = parts([0, 3, 2, 0, 1, 3], [0, 0, 2, 0, 1, 2])
    assert one.fingerprint == other.fingerprint != changed.fingerprint
    graphs = [data.co_interaction(p.train.T.tocsr(), "A").A for p in (one, other, changed)]
    assert (graphs[0] != graphs[1]).nnz == 0 < (graphs[0] != graphs[2]).nnz


# --- Filters --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_k_core_is_the_fixpoint(count):
    rng = np.random.default_rng(count)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.integers(25, size=90), rng.integers(20, size=90))})
    left = list(range(len(pairs)))
    while True:
        users, items = [pairs[n][0] for n in left], [pairs[n][1] for n in left]
        keep = [n for n in left if users.count(pairs[n][0]) >= count and items.count(pairs[n][1]) >= count]
        if keep == left:
            break
        left = keep
    users, items = np.array(pairs).T
    assert list(data.k_core(users, items, count)) == left


def test_filters_keep_contents_and_features_with_their_ids(tmp_path):
    """After merging, --min-count and --sample each review and each feature row still belongs to its id."""
    rng = np.random.default_rng(0)
    pairs = [(int(u), int(i)) for u, i in rng.integers(14, size=(160, 2))]
    number = lambda rows: np.array(rows, np.float32)[:, None]
    put(tmp_path, {"interactions.csv": "user,item,review\n" + "".join(f"{u},{i},{n}\n" for n, (u, i) in enumerate(pairs)),
                   "items.csv": "item,text\n" + "".join(f"{i},text {i}\n" for i in range(14, -1, -1)),
                   "item_text.npy": number(range(14, -1, -1)), "review.npy": number(range(160))})
    for min_count, sample in ((0, 0), (5, 0), (5, 40)):
        shop = data.load(str(tmp_path), min_count=min_count, sample=sample, seed=1)
        made = data.features(shop, "TR")
        assert list(made["T"][:, 0]) == [int(i) for i in shop.item_ids] == [int(t.split()[1]) for t in shop.texts]
        rows = [int(n) for n in shop.reviews]
        assert list(made["R"][:, 0]) == rows == sorted(rows)
        assert [pairs[n] for n in rows] == [(int(shop.user_ids[u]), int(shop.item_ids[i]))
                                            for u, i in zip(shop.users, shop.items)]
        assert all(pairs.index(pairs[n]) == n for n in rows)
        assert len(rows) == (sample or len(rows)) and np.bincount(shop.users).min() >= (1 if sample else min_count or 1)
    with pytest.raises(data.InputError, match="--min-count 99 leaves no interaction"):
        data.load(str(tmp_path), min_count=99)


# --- The demo and the tiny encoder ----------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys, data, numpy as np
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
data.write_demo(folder, 60, 50)
tiny = data.TinyEncoder()
pictures = [data.open_image(path) for path in sorted(folder.glob("images/*"))]
rows = tiny.text((folder / "items.csv").read_text().splitlines()), tiny.image(pictures)
files = [path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in sorted(folder.rglob("*.*"))]
print(len(files), [hashlib.sha256(x).hexdigest() for x in (b"".join(files), *(row.tobytes() for row in rows))])
"""


def test_demo_and_tiny_encoder_are_the_same_in_every_process(tmp_path):
    runs = [subprocess.Popen([sys.executable, "-c", DIGEST, tmp_path / seed], text=True, stdout=subprocess.PIPE,
                             cwd=Path(data.__file__).parent, env=os.environ | {"PYTHONHASHSEED": seed}) for seed in "12"]
    (one, other), codes = [process.communicate()[0] for process in runs], [process.returncode for process in runs]
    assert codes == [0, 0] and one == other and int(one.split()[0]) > 40


def test_tiny_encoder_tells_contents_apart():
    """Unit rows; the same content gives the same row, a shared word a closer one, no word at all a zero row."""
    text = data.TinyEncoder().text(["a red lamp", "A red, lamp!", "a red kettle", "zzz", "..."])
    same = text @ text.T
    assert same[0, 1] == pytest.approx(1) and 0.2 < same[0, 2] < 0.9 and abs(same[0, 3]) < 0.2 and not text[4].any()
    image = data.TinyEncoder().image([Image.new("RGB", (9, 5), c) for c in ("red", "red", "blue")])
    same = image @ image.T
    assert same[0, 1] == pytest.approx(1) and np.diag(same) == pytest.approx(1) and same[0, 2] < 0.5


# --- The feature cache ----------------------------------------------------------------------------------------------

def texts_of(folder, texts):
    return data.Dataset("shop", folder, *[np.array(["x"])] * 2, *[np.zeros(1, int)] * 2, texts=texts)


def extract(folder, texts, encoder="tiny", chunk=4):
    return np.array(data.extract(texts_of(folder, texts), "text", texts, encoder, ("m", "w"), folder, chunk))


TEXTS = [f"word{n} word{n % 3}" if n % 5 else "" for n in range(11)]


def test_cached_features_are_not_made_again(tmp_path, monkeypatch):
    first = extract(tmp_path, TEXTS)
    assert list(np.isnan(first).all(1)) == [not text for text in TEXTS] and np.isfinite(first).any(1).sum() == 8
    files = set(tmp_path.rglob("*.npy"))
    calls = encoder_calls(monkeypatch, fail_at=0)
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), first)
    assert set(tmp_path.rglob("*.*")) == files and calls == []


@pytest.mark.parametrize("change", [
    lambda patch: TEXTS[:-1] + ["changed"], lambda patch: TEXTS[::-1],
    lambda patch: patch.setattr(data, "FEATURES_VERSION", 99) or TEXTS,
    lambda patch: patch.setattr(data, "ClipEncoder", lambda *clip: data.TinyEncoder()) or TEXTS,
])
def test_other_contents_or_encoder_other_cache(tmp_path, monkeypatch, change):
    """A text, the order, the version or the encoder changes the cache's name; the earlier one stays."""
    before = extract(tmp_path, TEXTS)
    texts = change(monkeypatch)
    after = extract(tmp_path, texts, "clip" if data.ClipEncoder.__name__ == "<lambda>" else "tiny")
    assert len(list(tmp_path.rglob("*.npy"))) == 2 and np.array_equal(np.isnan(after).any(1), [not t for t in texts])
    monkeypatch.undo()
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), before)


def test_replaced_picture_is_encoded_again(tmp_path):
    """One of the same size in bytes too."""
    shop = texts_of(tmp_path, None)
    rows = []
    for colour in ("red", "blue"):
        put(tmp_path, {"a.bmp": png(colour=colour, format="BMP")})
        os.utime(tmp_path / "a.bmp", (len(rows), len(rows)))
        rows.append(np.array(data.extract(shop, "image", ["a.bmp"], "tiny", None, tmp_path)))
    assert not np.array_equal(*rows)


@pytest.mark.parametrize("cut", [0, 7, 100_000])
def test_interrupted_extraction_goes_on(tmp_path, monkeypatch, cut):
    """Ctrl-C after the first chunk, then `cut` bytes lost: the rest alone is encoded, and the result is the same."""
    whole = extract(tmp_path / "whole", TEXTS)
    encoder_calls(monkeypatch, fail_at=1)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, TEXTS)
    part, = tmp_path.glob("features/*.part")
    os.truncate(part, max(0, part.stat().st_size - cut))
    monkeypatch.undo()
    calls = encoder_calls(monkeypatch)
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), whole)
    done = {0: 4, 7: 3, 100_000: 0}[cut]
    assert sum(calls, []) == [text for text in TEXTS[done:] if text] and not part.exists()


def test_two_that_encode_the_same_at_once(tmp_path, monkeypatch):
    """The second starts in the middle of the first and is done before it: both get the whole."""
    whole, second = extract(tmp_path / "whole", TEXTS), []
    text, calls = data.TinyEncoder.text, []

    def beside(self, texts):
        calls.append(texts)
        if len(calls) == 2:
            second.append(extract(tmp_path, TEXTS))
        return text(self, texts)
    monkeypatch.setattr(data.TinyEncoder, "text", beside)
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), whole)
    np.testing.assert_array_equal(second[0], whole)
    assert [path.suffix for path in tmp_path.glob("features/*")] == [".npy"]


def test_interrupted_command_says_so_and_the_next_one_goes_on(tmp_path, capsys, monkeypatch):
    encoder_calls(monkeypatch, fail_at=1)
    assert prepare(put(tmp_path / "shop", GOOD)) == 2
    assert "interrupted" in only_error(capsys)
    monkeypatch.undo()
    calls = encoder_calls(monkeypatch)
    assert prepare(tmp_path / "shop") == 0
    assert calls == [[f"word{i}" for _ in range(2) for i in range(6)]]


def test_full_disk_while_encoding(tmp_path, capsys, monkeypatch):
    """One line, code 2; what was written stays a .part, and the next run makes the same as an undisturbed one."""
    whole = extract(tmp_path / "whole", TEXTS)
    put(tmp_path / "shop", GOOD)
    real = data.tqdm.update
    monkeypatch.setattr(data.tqdm, "update", no_space)  # called after each chunk that was written
    assert prepare(tmp_path / "shop") == 2
    assert "the disk is full" in only_error(capsys)
    with pytest.raises(OSError):
        extract(tmp_path, TEXTS)
    monkeypatch.setattr(data.tqdm, "update", real)
    assert not list(tmp_path.glob("features/*.npy"))
    np.testing.assert_array_equal(extract(tmp_path, TEXTS), whole)
    assert prepare(tmp_path / "shop") == 0


# --- Files that are whole or not there ------------------------------------------------------------------------------

@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_earlier_file(tmp_path, capsys, monkeypatch, call):
    """Wherever writing fails, the file that was there is intact and no temporary one stays."""
    data.replace_file(tmp_path / "a.csv", lambda file: file.write("earlier"), "w")
    if call != "write":
        monkeypatch.setattr(data.os, call, no_space)
    fill = lambda file: (file.write("half"), no_space() if call == "write" else None)
    assert data.cli(lambda argv: data.replace_file(tmp_path / "a.csv", fill, "w")) == 2
    assert "the disk is full" in only_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"] and (tmp_path / "a.csv").read_text() == "earlier"


def embeddings(folder, with_user=True):
    """Saves random tables of a data set with unicode ids; returns (path, dataset, parts, user, item)."""
    shop = data.load(str(put(folder, {"interactions.csv": GOOD["interactions.csv"].replace("u1", "ü1").replace("i3", "項3")})))
    parts, rng = data.split_dataset(shop), np.random.default_rng(0)
    user, item = (rng.normal(size=(n, 4)).astype(np.float32) for n in (shop.n_users, shop.n_items))
    data.save_embeddings(folder / "emb.npz", shop, parts, user if with_user else None, item, {"data": {"data": str(folder)}})
    return folder / "emb.npz", shop, parts, user, item


@pytest.mark.parametrize("with_user", [True, False])
def test_embeddings_round_trip(tmp_path, with_user):
    path, shop, parts, user, item = embeddings(tmp_path, with_user)
    back = data.load_embeddings(path)
    assert np.array_equal(back["item"], item) and back["item"].dtype == np.float32
    assert ("user" in back) == with_user and (not with_user or np.array_equal(back["user"], user))
    assert list(back["user_ids"]) == ["u0", "ü1"] and list(back["item_ids"]) == list(shop.item_ids) and "項3" in back["item_ids"]
    assert back["meta"] == {"data": {"data": str(tmp_path)}} and back["fingerprint"] == parts.fingerprint


@pytest.mark.parametrize("name, edit, words", [
    *[(name, None, f"no array '{name}'") for name in ("item", "item_ids", "user_ids", "meta", "fingerprint")],
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
    """finetune.py refuses an emb.npz with an array missing, pickled, misshapen or not finite, and names the file."""
    path = embeddings(tmp_path)[0]
    arrays = dict(np.load(path))
    arrays.update({name: edit(arrays[name])}) if edit else arrays.pop(name)
    np.savez(path, **arrays)
    assert data.cli(finetune.main, ["--init", str(path)]) == 2
    message = only_error(capsys)
    assert str(path) in message and words in message


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b[:200], lambda b: b"", lambda b: b"text",
                                    lambda b: npy(np.ones((6, 4))), lambda b: None])
def test_damaged_embeddings_file(tmp_path, capsys, damage):
    """Cut off, empty, not an .npz, or not there."""
    path = embeddings(tmp_path)[0]
    content = path.read_bytes()
    path.unlink()
    put(tmp_path, {"emb.npz": damage(content)})
    assert data.cli(finetune.main, ["--init", str(path)]) == 2
    message = only_error(capsys)
    assert f"error: {path}: " in message and "make it" in message


# --- Amazon: the raw files ------------------------------------------------------------------------------------------

REVIEWS = [{"reviewerID": f"U{u}", "asin": f"B{i}", "reviewText": f"text {u} {i}", "unixReviewTime": 100 * u + i}
           for u in range(2) for i in range(6)]
META = [{"asin": f"B{i}", "title": f"Thing {i}", "description": [], "imageURL": []} for i in range(6)]


def packed(records):
    """A .json.gz file of these records; a str is a line as it is."""
    return gzip.compress("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode())


def raw(folder, reviews=REVIEWS, meta=META):
    """Puts the raw files of amazon:Tiny where data.py downloads them to."""
    put(folder / "amazon", {"Tiny_5.json.gz": packed(reviews), "meta_Tiny.json.gz": packed(meta)})
    return folder


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_amazon_warts(tmp_path, capsys):
    """The raw files' known defects, each once; co-purchases and ranks, which are interactions, reach no text."""
    leaks = {"also_buy": ["leak1"], "also_view": ["leak2"], "similar_item": "leak3", "rank": "leak4 in Toys",
             "also_bought": ["leak5"], "main_cat": "leak6", "category": ["leak7"], "salesRank": {"leak8": 1}}
    pictures = [f"http://127.0.0.1/{n}.jpg" for n in range(5)]
    meta = [{"asin": "B0", "title": "A <b>bold</b> &amp; <i>new<span class='x", "description": ["One<br>two", "three"],
             "feature": ["soft"], "brand": "Acme", "imageURL": pictures[:1], "imageURLHighRes": pictures[1:2], **leaks},
            {"asin": "B0", "title": "listed twice", "description": ["two"], **leaks},
            {"asin": "B1", "title": "var aPageStart = (new Date()).getTime();", "description": "", "image": pictures[2:3]},
            {"asin": "B2", "title": None, "description": "a <script>leak9()</script>plain string", "image": pictures[3]},
            {"asin": "B3", "title": "Half a pair \ud83d", "description": [""], "feature": None, "imageURL": ["data:x"]},
            {"asin": "unsold", "title": "nobody wrote about it"}]
    reviews = [{"reviewerID": "U0", "asin": "B0", "reviewText": "later", "unixReviewTime": 9},
               {"reviewerID": "U0", "asin": "B0", "reviewText": "earlier <br /> one", "unixReviewTime": 2},
               {"reviewerID": "U0", "asin": "B1", "summary": "only a summary", "unixReviewTime": 1},
               {"reviewerID": "U0", "asin": "B2", "reviewText": None, "unixReviewTime": 3},
               {"reviewerID": "U0", "asin": "B3", "reviewText": "&#34;quoted&#34;, with a comma", "unixReviewTime": 4},
               {"reviewerID": "U1", "asin": "gone", "reviewText": "its item has no metadata", "unixReviewTime": 0},
               {"reviewerID": "U2", "asin": "gone", "reviewText": "this one too", "unixReviewTime": 5},
               {"reviewerID": "U2", "asin": "B0", "reviewText": "at no known time", "unixReviewTime": None}]
    raw(tmp_path, reviews, meta)
    shop = data.load("amazon:Tiny", tmp_path, modalities="RTG")
    texts = dict(zip(shop.item_ids, shop.texts))
    assert texts["B0"] == "A bold & new One two three soft Acme"
    assert texts["B1"] == "" and texts["B2"] == "a plain string" and texts["B3"].startswith("Half a pair")
    assert list(texts) == ["B0", "B1", "B2", "B3"]
    got = {(shop.user_ids[u], shop.item_ids[i]): review for u, i, review in zip(shop.users, shop.items, shop.reviews)}
    assert got == {("U0", "B0"): "earlier one", ("U0", "B1"): "only a summary", ("U0", "B2"): "",
                   ("U0", "B3"): '"quoted", with a comma', ("U2", "B0"): "at no known time"}
    assert list(shop.user_ids) == ["U2", "U0"]  # U1 is gone; the oldest review first
    folder = tmp_path / "amazon" / "Tiny"
    assert "leak" not in (folder / "items.csv").read_text()
    assert json.loads((folder / "image_urls.json").read_text()) == {
        "images/B0.jpg": [pictures[1], pictures[0]], "images/B1.jpg": [pictures[2]], "images/B2.jpg": [pictures[3]]}
    assert [bool(row["image"]) for row in table(folder / "items.csv")] == [True, True, True, False]
    out = capsys.readouterr().out
    assert "8 reviews, 5 items, of which 1 without metadata are dropped, with 2 reviews" in out
    assert "1 duplicate pairs merged" in out


def test_amazon_is_prepared_once_and_again_when_a_raw_file_changes(tmp_path, monkeypatch):
    writes, real = [], data.write_amazon
    monkeypatch.setattr(data, "write_amazon", lambda *args: writes.append(1) or real(*args))
    for meta, expected in ((META, 1), (None, 1), (META[:5], 2)):
        if meta:
            raw(tmp_path, meta=meta)
        shop = data.load("amazon:Tiny", tmp_path)
        assert len(writes) == expected and shop.n_items == (6 if expected == 1 else 5)
    for path in (tmp_path / "amazon").glob("*.gz"):
        path.unlink()
    assert data.load("amazon:Tiny", tmp_path).n_items == 5 and len(writes) == 2
    assert {path.name for path in (tmp_path / "amazon").iterdir()} == {"Tiny"}


@pytest.mark.parametrize("name, content, words", [
    ("Tiny_5.json.gz", lambda b: b[:-20], "Tiny_5.json.gz: cut off or damaged; delete it"),
    ("meta_Tiny.json.gz", lambda b: b[:40] + b"xxxx" + b[44:], "meta_Tiny.json.gz: cut off or damaged; delete it"),
    ("meta_Tiny.json.gz", lambda b: b"<html>moved</html>", "meta_Tiny.json.gz: cut off or damaged; delete it"),
    ("meta_Tiny.json.gz", lambda b: packed([*META, "{'a': 1}"]), "meta_Tiny.json.gz, row 7: not a JSON record"),
    ("Tiny_5.json.gz", lambda b: packed([REVIEWS[0], "[1]"]), "Tiny_5.json.gz, row 2: not a JSON record"),
    ("Tiny_5.json.gz", lambda b: packed([REVIEWS[0], {"asin": "B1"}]), "Tiny_5.json.gz, row 2: no field 'reviewerID'"),
    ("meta_Tiny.json.gz", lambda b: packed([{"asin": "other"}]), "no item of Tiny_5.json.gz is in it"),
])
def test_damaged_raw_file(tmp_path, capsys, name, content, words):
    """A raw file's defect is one line, and no half-made folder stays."""
    path = raw(tmp_path) / "amazon" / name
    path.write_bytes(content(path.read_bytes()))
    assert prepare("amazon:Tiny", data_dir=tmp_path) == 2
    assert words in only_error(capsys)
    assert {p.name for p in (tmp_path / "amazon").iterdir()} == {"Tiny_5.json.gz", "meta_Tiny.json.gz"}


# --- Amazon: the downloads, from a server on this machine -----------------------------------------------------------

@contextlib.contextmanager
def server(routes):
    """Serves {path: bytes, or answer(handler)}, other paths are 404; yields (address, log of (path, Range header))."""
    log = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            log.append((self.path, self.headers["Range"]))
            route = routes.get(self.path)
            with contextlib.suppress(ConnectionError):
                if callable(route):
                    route(self)
                else:
                    answer(self, route or b"no such file", 200 if route else 404)

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
    for name, value in {"Content-Length": len(body), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body[:sent])


def cut_once(body, at, ranges):
    """A route that closes the first connection after `at` bytes, then goes on from there or, without ranges, anew."""
    seen = []

    def route(handler):
        start = int(re.match(r"bytes=(\d+)-$", handler.headers["Range"])[1]) if ranges and handler.headers["Range"] else 0
        seen.append(start)
        answer(handler, body[start:], 206 if start else 200, sent=at if len(seen) == 1 else None)

    return route


@pytest.mark.parametrize("ranges", [True, False])
def test_amazon_from_nothing(tmp_path, capsys, monkeypatch, ranges):
    """Raw files through a redirect and a cut connection, pictures of every kind; the second run asks for nothing again."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(data.fetch_image, "__defaults__", (5000, 2))  # a cap of 5,000 bytes, two tries
    good = png(colour="red", format="JPEG")
    big = good + bytes(5000)  # whole within the cap, but for its size a fine picture

    def slow(handler):
        time.sleep(0.2)
        answer(handler, good)

    pictures = {"good": good, "slow": slow, "page": b"<html>captcha</html>", "big": big, "empty": lambda h: answer(h, b""),
                "moved": lambda h: answer(h, b"", 302, Location="/good"), "cut": cut_once(good, 300, False)}
    wanted = [["good"], ["slow"], ["page"], ["big"], ["gone"], ["gone", "good"], ["moved"], ["cut"], ["empty"]]
    reviews = [{"reviewerID": f"U{u}", "asin": f"B{i}", "reviewText": "x"} for u in range(3) for i in range(9)]
    routes = {f"/{name}": route for name, route in pictures.items()}
    with server(routes) as (url, log):
        meta = packed([{"asin": f"B{i}", "title": f"Thing {i}", "imageURLHighRes": [url + name for name in names]}
                       for i, names in enumerate(wanted)])
        routes["/old/categoryFilesSmall/Tiny_5.json.gz"] = lambda h: answer(h, b"", 302, Location="/new")
        routes["/new"] = packed(reviews)
        routes["/old/metaFiles2/meta_Tiny.json.gz"] = cut_once(meta, 50, ranges)
        assert prepare("amazon:Tiny", "--amazon-url", url + "old", data_dir=tmp_path) == 0  # no slash at the end
        first, out = len(log), capsys.readouterr().out
        assert prepare("amazon:Tiny", "--amazon-url", url + "old", data_dir=tmp_path) == 0
        assert len(log) == first
    assert [range for path, range in log if "meta" in path] == [None, "bytes=50-"]
    folder = tmp_path / "amazon"
    assert (folder / "meta_Tiny.json.gz").read_bytes() == meta and (folder / "Tiny_5.json.gz").read_bytes() == routes["/new"]
    assert not list(tmp_path.rglob("*.part"))
    fetched = {path.name: path.read_bytes() for path in (folder / "Tiny" / "images").glob("*.jpg")}
    assert fetched == {f"B{i}.jpg": good for i in (0, 1, 5, 6, 7)}
    assert "images: 5 fetched, 4 refused or no picture, 0 unreachable; their items go without" in out
    assert "image: 256-d; 4 of 9 items have none (4 images missing or unreadable)" in out


def test_raw_file_that_is_not_there(tmp_path, capsys):
    with server({}) as (url, log):
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    message = only_error(capsys)
    assert f"{url}categoryFilesSmall/Tiny_5.json.gz: HTTP 404" in message and len(log) == 1
    assert "put the file at" in message and str(tmp_path / "amazon" / "Tiny_5.json.gz") in message


@pytest.mark.parametrize("url", ["127.0.0.1:1/", "http://127.0.0.1:1/", "http://[/"])
def test_server_that_is_not_there(tmp_path, capsys, monkeypatch, url):
    """A malformed address or a port where nobody listens: tried a few times, then one line that says how to go on."""
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert "put the file at" in only_error(capsys) and waits == sorted(waits) and len(waits) < 10


def test_server_that_never_gets_further_is_given_up(tmp_path, capsys, monkeypatch):
    """Every answer cut at the same place: no endless loop."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    route = lambda handler: answer(handler, bytes(1000), sent=100)
    with server({"/categoryFilesSmall/Tiny_5.json.gz": route}) as (url, log):
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert "the connection was cut; run the command again" in only_error(capsys) and 2 < len(log) < 20


def test_part_file_that_is_already_whole_or_foreign(tmp_path, monkeypatch):
    """HTTP 416: what is here does not fit what is there, and is fetched anew."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    route = lambda handler: answer(handler, b"new") if not handler.headers["Range"] else answer(handler, b"", 416)
    put(tmp_path, {"a.gz.part": "something longer"})
    with server({"/a.gz": route}) as (url, log):
        data.download(url + "a.gz", tmp_path / "a.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"] and (tmp_path / "a.gz").read_bytes() == b"new"


def test_dead_picture_server_stops_the_asking(tmp_path, capsys):
    """After 32 failures in a row without an answer the rest is left for another run; nothing is noted as refused."""
    names = {f"images/{n}.jpg": [f"http://127.0.0.1:1/{n}.jpg"] for n in range(200)}
    put(tmp_path, {"image_urls.json": json.dumps(names)})
    data.fetch_images(tmp_path)
    counts = re.search(r"0 fetched, 0 refused or no picture, (\d+) unreachable; gave up after 32 in a row, (\d+) not tried",
                       capsys.readouterr().out)
    assert 32 <= int(counts[1]) < 64 and int(counts[1]) + int(counts[2]) == 200
    assert not list((tmp_path / "images").iterdir())


def test_unreachable_pictures_are_asked_for_again(tmp_path, capsys, monkeypatch):
    """A server error or a time-out is no refusal: the next run tries again, and only that."""
    real = data.urllib.request.urlopen
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda request, timeout: real(request, timeout=0.3))
    state = {"busy": True}
    hangs = lambda handler: time.sleep(0.5) if state["busy"] else answer(handler, png())
    fails = lambda handler: answer(handler, b"", 503) if state["busy"] else answer(handler, png())
    with server({"/hangs": hangs, "/fails": fails, "/fine": png()}) as (url, log):
        names = {f"images/{name}.jpg": [url + name] for name in ("hangs", "fails", "fine", "gone")}
        put(tmp_path, {"image_urls.json": json.dumps(names)})
        data.fetch_images(tmp_path)
        assert "1 fetched, 1 refused or no picture, 2 unreachable" in capsys.readouterr().out
        first = len(log)
        state["busy"] = False
        data.fetch_images(tmp_path)
    assert sorted(path for path, _ in log[first:]) == ["/fails", "/hangs"]
    assert "2 fetched, 0 refused or no picture, 0 unreachable" in capsys.readouterr().out


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("what", ["raw", "picture"])
def test_full_disk_while_downloading(tmp_path, capsys, monkeypatch, what, code):
    """A full disk is told at once, not taken for a broken connection; no half picture stays."""
    def full(*args, **kwargs):
        raise OSError(code, "full")

    monkeypatch.setattr(data.time, "sleep", full)
    with server({"/categoryFilesSmall/Tiny_5.json.gz": bytes(9), "/a.png": png()}) as (url, log):
        raw(tmp_path, meta=[META[0] | {"imageURL": [url + "a.png"]}, *META[1:]])
        if what == "raw":
            (tmp_path / "amazon" / "Tiny_5.json.gz").unlink()
            monkeypatch.setattr(data.tqdm, "update", full)
        else:
            real = os.replace
            monkeypatch.setattr(data.os, "replace", lambda a, b: full() if Path(b).suffix == ".jpg" else real(a, b))
        assert prepare("amazon:Tiny", "--amazon-url", url, data_dir=tmp_path) == 2
    assert "the disk is full" in only_error(capsys) and len(log) == 1
    assert not list(tmp_path.glob("amazon/Tiny/images/*"))


# --- CLIP -----------------------------------------------------------------------------------------------------------

def tiny_clip(folder, custom_text=False):
    """(name, weights file, model): a one-layer CLIP with random weights, registered with open_clip."""
    open_clip, torch = pytest.importorskip("open_clip"), pytest.importorskip("torch")
    name = f"tiny-{'custom-' if custom_text else ''}test"
    config = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
              **({"custom_text": True} if custom_text else {})}
    put(folder, {f"configs/{name}.json": json.dumps(config)})
    open_clip.add_model_config(folder / "configs")
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), folder / f"{name}.pt")
    return name, folder / f"{name}.pt", model


def test_clip_features_are_the_towers_projections(tmp_path, monkeypatch):
    """Text against the model's own parts by hand, pictures against encode_image; a broken-off cache is gone on with."""
    name, weights, model = tiny_clip(tmp_path)
    import open_clip
    import torch
    texts, colours = ["a red lamp", "", "word " * 200, "blue"], ["red", None, "blue", "green"]
    put(tmp_path / "shop", {f"{c}.png": png(size=(50, 40), colour=c) for c in colours if c} |
        {"items.csv": "item,text,image\n" + "".join(f"{n},{t},{c + '.png' if c else ''}\n"
                                                     for n, (t, c) in enumerate(zip(texts, colours))),
         "interactions.csv": "user,item\n" + "".join(f"u,{n}\n" for n in range(4))})
    shop = data.load(str(tmp_path / "shop"))
    clip = (name, str(weights))
    made = data.features(shop, "TV", "clip", tmp_path, clip)
    assert made["T"].shape == made["V"].shape == (4, 24)
    some = [0, 2, 3]
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(name)([texts[n] for n in some])                 # [3, 77]
        x = model.transformer(model.token_embedding(tokens) + model.positional_embedding, attn_mask=model.attn_mask)
        by_hand = model.ln_final(x)[torch.arange(3), tokens.argmax(1)] @ model.text_projection
        transform = open_clip.image_transform(32, is_train=False, mean=model.visual.image_mean, std=model.visual.image_std)
        pictures = torch.stack([transform(Image.open(tmp_path / "shop" / f"{colours[n]}.png")) for n in some])
        seen = model.encode_image(pictures)
    for modality, truth in (("T", by_hand), ("V", seen)):
        np.testing.assert_allclose(made[modality][some], truth, rtol=1e-2, atol=2e-3)
        assert np.isnan(made[modality][1]).all()
    path, = tmp_path.glob("features/*-text-clip-*.npy")
    os.truncate(path, path.stat().st_size - 50)  # the last row and a byte or two of the one before
    path.rename(path.with_suffix(".part"))
    np.testing.assert_allclose(data.features(shop, "T", "clip", tmp_path, clip)["T"], made["T"], atol=1e-3)
    os.utime(weights, (1, 1))
    data.features(shop, "T", "clip", tmp_path, clip)
    assert len(list(tmp_path.glob("features/*-text-clip-*.npy"))) == 2  # other weights, other cache


def test_clip_model_with_its_own_text_tower(tmp_path):
    """open_clip keeps a custom text tower's projection elsewhere (SigLIP and others)."""
    name, weights, model = tiny_clip(tmp_path, custom_text=True)
    encoder = data.ClipEncoder(name, str(weights))
    assert encoder.text(["a"]).shape == (1, encoder.text_width) and encoder.text_width == 24


@pytest.mark.parametrize("weights", ["no-such-tag", "nowhere.pt", "empty.pt", "text.pt", None])
def test_clip_weights_that_cannot_be_had(tmp_path, capsys, monkeypatch, weights):
    """One line with both remedies, whatever open_clip raises, an error without a message (None) included."""
    pytest.importorskip("open_clip")
    monkeypatch.chdir(put(tmp_path, {"empty.pt": b"", "text.pt": "no weights"}))
    if weights is None:
        monkeypatch.setattr("open_clip.create_model_and_transforms", lambda *a, **k: (_ for _ in ()).throw(TimeoutError()))
    put(tmp_path / "shop", GOOD)
    argv = ["--data", "shop", "--encoder", "clip", "--clip-weights", weights or "openai", "--data-dir", "cache"]
    assert data.cli(mmcpr.main, argv) == 2
    message = only_error(capsys)
    assert "--clip-weights FILE" in message and "--encoder tiny" in message and "connect" in message


# --- More that must not end in a traceback ---------------------------------------------------------------------------

def test_damaged_avif_is_left_out():
    """Pillow's AVIF reader raises RuntimeError."""
    file = io.BytesIO()
    try:
        Image.new("RGB", (32, 32), "red").save(file, "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    whole = file.getvalue()
    assert data.open_image(io.BytesIO(whole)) is not None
    for at in range(60, len(whole), 7):
        for damaged in (whole[:at], whole[:at] + b"\xff\xff\xff" + whole[at + 3:]):
            data.open_image(io.BytesIO(damaged))  # None or a picture, but no exception


def test_damaged_cache_is_named(tmp_path, capsys):
    """A feature cache that a copy cut off: its name and the remedy, no traceback."""
    assert prepare(put(tmp_path / "shop", GOOD)) == 0
    cache, = tmp_path.glob("cache/features/*-text-*.npy")
    os.truncate(cache, 200)
    assert prepare(tmp_path / "shop") == 2
    message = only_error(capsys)
    assert cache.name in message and "delete" in message


def test_pictures_survive_an_interrupted_renewal(tmp_path, monkeypatch):
    """Ctrl-C at any step of replacing a prepared folder by a newer one loses no picture that was fetched."""
    for step in range(1, 20):
        folder, left = tmp_path / str(step) / "Tiny", [step]
        data.make_folder(folder, 1, lambda target: put(target, {"images/a.jpg": png(), "items.csv": "old"}))

        def until_then(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)
            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (data.shutil, "rmtree")):
                patch.setattr(module, name, until_then(getattr(module, name)))
            with contextlib.suppress(KeyboardInterrupt):
                data.make_folder(folder, 2, lambda target: put(target, {"items.csv": "new"}))
        data.make_folder(folder, 2, lambda target: put(target, {"items.csv": "new"}))
        assert (folder / "images" / "a.jpg").exists() and (folder / "items.csv").read_text() == "new"
        if left[0] > 0:
            break
    assert 2 < step < 19


def test_clip_tokenizer_that_cannot_be_had(tmp_path, capsys, monkeypatch):
    """Some models' tokenizer is a download of its own (SigLIP): the same line with both remedies."""
    name, weights, _ = tiny_clip(tmp_path)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda model: (_ for _ in ()).throw(OSError("no connection")))
    put(tmp_path / "shop", GOOD)
    argv = ["--data", str(tmp_path / "shop"), "--encoder", "clip", "--clip-model", name, "--clip-weights", str(weights),
            "--data-dir", str(tmp_path)]
    assert data.cli(data.main, argv) == 2
    assert "--encoder tiny" in only_error(capsys)


def test_clip_without_weights_is_refused(tmp_path, capsys):
    """An empty --clip-weights: open_clip would give random towers and say so only in its log."""
    name, _, _ = tiny_clip(tmp_path)
    put(tmp_path / "shop", GOOD)
    argv = ["--data", str(tmp_path / "shop"), "--encoder", "clip", "--clip-model", name, "--clip-weights", "",
            "--data-dir", str(tmp_path)]
    assert data.cli(data.main, argv) == 2
    assert "--clip-weights FILE" in only_error(capsys)


def test_mmrec_id_too_large_for_a_table(tmp_path, capsys):
    """A stray item id stands for as many rows: named, not allocated (2e9 ids as text are 80 GB)."""
    assert prepare(put(tmp_path / "x", {"x.inter": INTER.replace("\n2\t2", "\n2\t2000000000", 1)})) == 2
    message = only_error(capsys)
    assert "data row 3" in message and "2000000000" in message


# --- bench.py -------------------------------------------------------------------------------------------------------

def test_generated_graph_has_the_counts_and_a_long_tail(tmp_path, monkeypatch):
    user, item, of_user, of_item = bench.generate(600, 300, 5000)
    assert len(user) == 5000 == len(np.unique(user * 300 + item)) and len(of_user) == 600 and len(of_item) == 300
    assert user.max() < 600 and item.max() < 300
    for degree in (np.bincount(user), np.bincount(item)):
        assert degree.max() > 4 * np.median(degree)
    monkeypatch.setitem(bench.SIZES, "vg", (600, 300, 5000))
    assert run(bench.main, "--data", "vg", "--write", tmp_path / "made") == 0
    dataset = data.load(str(tmp_path / "made"))
    assert len(dataset.users) == 5000 and data.features(dataset, "RTV")["R"].shape == (5000, 512)
    assert run(bench.main, "--data", "demo", "--write", tmp_path / "made") == 2


def test_benchmark_compares_before_it_measures(trained, capsys, monkeypatch):
    """The whole table on a tiny folder; a fast path that computes something else stops it."""
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    assert run(bench.main, "--data", "shop") == 0
    out = capsys.readouterr().out
    for what in ("user graph: building", "item graph: product", "fine-tuning, an epoch", "evaluation of", "pre-training, an epoch"):
        assert f"| shop | {what}" in out
    loss = finetune.mixgcf_loss
    monkeypatch.setattr(finetune, "mixgcf_loss", lambda *args: 1.001 * loss(*args))
    assert run(bench.main, "--data", "shop") == 2
    assert "MixGCF's loss: fast and plain differ by" in capsys.readouterr().err


# --- baselines.py ---------------------------------------------------------------------------------------------------

def weighted_ring():
    """Five items in a ring with a chord, weights that differ; item 5 is alone."""
    W = np.zeros((6, 6), np.float32)
    for a, b, w in ((0, 1, 1.0), (1, 2, 3.0), (2, 3, 1.0), (3, 4, 2.0), (4, 0, 1.0), (0, 2, 2.0)):
        W[a, b] = W[b, a] = w
    return sp.csr_matrix(W)


def test_item_graph_against_the_loop():
    """PMGT's weights, and of each item the heaviest edges only."""
    R = binary(np.random.default_rng(20), 30, 9, 0.3)
    C, degree = (R.T @ R).toarray(), R.toarray().sum(0)
    got = baselines.item_graph(R, 4).toarray()
    for a in range(9):
        want = {b: (np.log(C[a, b]) + 1) / (np.log(np.sqrt(degree[a] * degree[b])) + 1) for b in range(9) if b != a and C[a, b]}
        heaviest = sorted(want.values(), reverse=True)[:4]
        assert sorted(got[a][got[a] > 0], reverse=True) == pytest.approx(heaviest, rel=1e-5)
        assert all(got[a, b] in (0, pytest.approx(want[b], rel=1e-5)) for b in want)


@pytest.mark.parametrize("same_space", [True, False])
def test_clip_is_the_pca_of_what_each_item_has(same_space):
    """The mean over the modalities an item has, or both side by side; against numpy's SVD, whose signs are free."""
    rng = np.random.default_rng(21)
    features = {m: rng.normal(size=(12, 6)) for m in "TV"}
    features["T"][2], features["V"][[3, 5]], features["T"][5] = np.nan, np.nan, np.nan
    views = list(baselines.unit_rows(features, "TV").values())
    got = baselines.clip(views, [v.any(1).float() for v in views], same_space, 4)
    unit = {m: np.nan_to_num(x / np.linalg.norm(x, axis=1, keepdims=True)) for m, x in features.items()}
    has = sum((~np.isnan(x[:, :1])).astype(float) for x in features.values())
    x = (unit["T"] + unit["V"]) / np.maximum(has, 1) if same_space else np.concatenate([unit["T"], unit["V"]], 1)
    some = np.delete(np.arange(12), 5)
    x = x[some] - x[some].mean(0)
    want = x @ np.linalg.svd(x)[2][:4].T
    assert not got[5].any()
    np.testing.assert_allclose(got[some].abs().numpy(), np.abs(want), rtol=1e-3, atol=1e-5)
    assert baselines.clip(views, [v.any(1).float() for v in views], same_space, 20)[:, 12:].abs().max() == 0


def test_mmgcn_aggregation_against_the_loop():
    """Three layers, node by node, from the equations; an item without the modality starts from a zero row."""
    rng = np.random.default_rng(22)
    R = binary(rng, 5, 4, 0.5, empty_row=3)
    torch.manual_seed(0)
    views = baselines.unit_rows({"T": rng.normal(size=(4, 3)), "V": np.where(np.arange(4)[:, None] == 1, np.nan, rng.normal(size=(4, 300)))}, "TV")
    model = baselines.MMGCN(R, views, 6, 10)
    neighbours = [5 + R[u].indices for u in range(5)] + [R.T.tocsr()[i].indices for i in range(4)]
    total = 0
    for m, view in views.items():
        item = torch.stack([model.mlp[m](v) if v.any() else torch.zeros(model.mlp[m].out_features) for v in view])
        x = torch.nn.functional.normalize(torch.cat([model.preference[m], item]))
        for W1, W2, W3 in model.W[m]:
            rows = []
            for n in range(9):
                received = [W1(x[j]) for j in neighbours[n]]
                h = torch.nn.functional.leaky_relu(sum(received) / len(received) if received else torch.zeros(6))
                own = torch.nn.functional.leaky_relu(W2(x[n])) + model.id[n]
                rows.append(torch.nn.functional.leaky_relu(W3(torch.cat([h, own]))))
            x = torch.stack(rows)
        total = total + x
    torch.testing.assert_close(torch.cat(model()), total)
    assert model.mlp["V"].out_features == 256 and model.mlp["T"].out_features == 3
    grads = torch.autograd.grad(model.loss(torch.arange(3)), [model.id, *model.preference.values()])
    assert all(g.any() for g in grads)  # trained, as the paper means


def test_hgt_layer_against_the_loop():
    torch.manual_seed(1)
    layer, h = baselines.HGTLayer(6, 2), torch.randn(5, 6)
    source, target = torch.tensor([0, 1, 2, 3, 0, 4]), torch.tensor([1, 0, 1, 1, 2, 2])
    rows = []
    for n in range(5):
        o = torch.zeros(6)
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            sent = source[target == n]
            if len(sent):
                score = torch.stack([layer.q(h[n])[part] @ (layer.k(h[j])[part] @ layer.A[head]) * layer.p[head] / 3 ** 0.5 for j in sent])
                o[part] = (score.softmax(0)[:, None] * torch.stack([layer.v(h[j])[part] @ layer.M[head] for j in sent])).sum(0)
        s = torch.sigmoid(layer.skip)
        rows.append(s * layer.out(torch.nn.functional.gelu(o)) + (1 - s) * h[n])
    torch.testing.assert_close(layer(h, source, target), torch.stack(rows))


def test_gptgnn_never_sees_the_edges_it_must_predict(monkeypatch):
    """Neither direction of a held-out edge reaches the encoder; copies of the targets receive what they may see, send nothing."""
    rng = np.random.default_rng(23)
    torch.manual_seed(0)
    model = baselines.GPTGNN(binary(rng, 60, 40, 0.15), torch.from_numpy(rng.normal(size=(40, 5))).float(), 8, 16, heads=2)
    held, seen = [], []
    encode, hold_out = model.encode, model.hold_out
    monkeypatch.setattr(model, "encode", lambda x, s, t: seen.append((x, s, t)) or encode(x, s, t))
    monkeypatch.setattr(model, "hold_out", lambda s, t, n, b: held.append((s, t, n, b, hold_out(s, t, n, b))) or held[-1][-1])
    for targets in model.batches():
        model.loss(targets)
        (x, s, t), (source, target, n, b, out) = seen[-1], held[-1]
        hidden = {frozenset(e) for e in zip(source[out].tolist(), target[out].tolist())}
        observed = {frozenset(e) for e in zip(source[~out].tolist(), target[~out].tolist())}
        assert hidden and not hidden & observed
        real = t < n
        assert not hidden & {frozenset(e) for e in zip(s[real].tolist(), t[real].tolist())}
        assert not hidden & {frozenset(e) for e in zip(s[~real].tolist(), (t[~real] - n).tolist())}
        assert s.max() < n and torch.equal(x[n:], model.init_emb.expand(b, -1))
        touched = torch.minimum(source, target) < b
        assert 0.3 < out[touched].float().mean() < 0.7 and not out[~touched].any()


def test_intimacy_against_the_dense_inverse(monkeypatch):
    """Rows of S = alpha (I - (1 - alpha) A D^-1)^-1, their k largest entries but the item's own; blocks do not matter."""
    R = binary(np.random.default_rng(24), 50, 20, 0.08)
    A = ((R.T @ R).toarray() > 0) * (1 - np.eye(20))
    degree = np.maximum(A.sum(0), 1)
    S = 0.15 * np.linalg.inv(np.eye(20) - 0.85 * A / degree)
    np.fill_diagonal(S, 0)
    index, value = baselines.intimacy(R, 4, steps=200, block=7)
    np.testing.assert_allclose(value, -np.sort(-S, 1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(S, index.numpy(), 1), value, atol=1e-5)
    alone = A.sum(1) == 0
    assert alone.any() and (index[alone] == torch.from_numpy(np.flatnonzero(alone))[:, None]).all()  # its own context


def test_graphbert_contexts_and_losses_against_the_loop():
    """Tokens' codes, what z must say and how near it must be; an item that reaches too few others has no pair in the empty places."""
    rng = np.random.default_rng(28)
    R = binary(rng, 40, 20, 0.06)
    A = ((R.T @ R).toarray() > 0) * (1 - np.eye(20, dtype=int))
    torch.manual_seed(0)
    x = torch.from_numpy(rng.normal(size=(20, 5))).float()
    x[3, :2] = 0
    known = (x != 0).float()
    model = baselines.GraphBERT(R, x, known, 8, 20, k=6).eval()  # no dropout
    index, S = baselines.intimacy(R, 6)
    rows = torch.arange(20)
    empty = index == rows[:, None]
    assert empty.any() and empty.all(1).any() and not empty.all() and torch.equal(model.context, index)
    for i in range(20):
        for place, j in enumerate([i, *index[i].tolist()]):
            hop = 0 if j == i else 1 if A[i, j] else 2
            want = sum(baselines.sinusoid(torch.tensor(float(code)), 8) for code in (A[j].sum(), place, hop))
            torch.testing.assert_close(model.codes[i, place], want)
    near, far = [], []
    encode = model.encode
    model.encode = lambda rows: near.append(rows[20:40]) or far.append(rows[40:]) or encode(rows)
    draws = [model.loss(rows).item() for _ in range(3)]
    z = encode(rows)
    cos = lambda a, b: torch.nn.functional.cosine_similarity(z[a], z[b], dim=0).item()
    for value, others, strangers in zip(draws, near, far):
        attributes = np.mean([sum((model.attribute(z[i]) - x[i])[c].item() ** 2 for c in range(5) if known[i, c]) for i in range(20)])
        pairs = [(i, j, (S[i, index[i] == j] / S[i, 0]).item()) for i, j in enumerate(others.tolist()) if i != j]
        structure = np.mean([(cos(i, j) - s) ** 2 for i, j, s in pairs]) + np.mean([cos(i, j) ** 2 for i, j in enumerate(strangers.tolist())])
        assert value == pytest.approx(attributes + structure, rel=1e-4) and len(pairs) < 20
        assert (strangers != rows).all()


def test_mcn_sampling_frequencies():
    """One draw: neighbours in proportion to the weights. Two hops: the nearer hop counts more; short lists start again."""
    graph, rng = weighted_ring(), np.random.default_rng(25)
    first = np.concatenate([baselines.mcn_sampling(graph, rng, (1,), 1).numpy() for _ in range(4000)], 1)
    for item in range(5):
        share = np.bincount(first[item], minlength=6) / 4000
        np.testing.assert_allclose(share, graph[[item]].toarray()[0] / graph[[item]].sum(), atol=0.035)
    assert (first[5] == 5).all()
    path = sp.csr_matrix(np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32))
    contexts = {tuple(baselines.mcn_sampling(path, rng, (3, 1), 3)[0].tolist()) for _ in range(50)}
    assert contexts <= {(1, 2, 1), (1, 1, 1)} and (1, 2, 1) in contexts


def test_diversity_attention_against_its_formula():
    torch.manual_seed(2)
    layer, h = baselines.DiverseLayer(6, 2, 0.3), torch.randn(2, 4, 6)
    got = layer.attention(h)
    for b in range(2):
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            q, k, e = (W(h[b])[:, part] for W in (layer.q, layer.k, layer.e))
            unlike = torch.tensor([[1 - torch.cosine_similarity(e[x], e[y], dim=0).item() + (x == y) for y in range(4)] for x in range(4)])
            want = 0.7 * (q @ k.T / 3 ** 0.5).softmax(1) + 0.3 * unlike.softmax(1)
            torch.testing.assert_close(got[b, head], want)


def test_pmgt_masks_context_tokens_only():
    rng = np.random.default_rng(26)
    torch.manual_seed(0)
    views = baselines.unit_rows({"T": rng.normal(size=(20, 4)), "V": np.where(np.arange(20)[:, None] < 5, np.nan, 1.0) * rng.normal(size=(20, 3))}, "TV")
    model = baselines.PMGT(binary(rng, 40, 20, 0.2), views, 8, 10)
    _, items, hidden = model.encode(torch.arange(20), masked=True)
    assert torch.equal(items[:, 0], torch.arange(20)) and not hidden[:, 0].any() and (hidden.sum(1) == 2).all()
    text_only = model.project[0](model.views[0][:5])
    torch.testing.assert_close(model.fuse(torch.arange(5)), text_only)  # a missing modality has no gate


def test_pmgt_losses_against_the_loop():
    """Cosines of an item to a neighbour and to an item that shares no user; the raw features of masked items, where they are known."""
    rng = np.random.default_rng(29)
    R = binary(rng, 20, 40, 0.06, empty_row=range(10)).T.tocsr()  # ten items without users, which share none with themselves
    A = (R.T @ R).toarray() > 0
    np.fill_diagonal(A, False)
    torch.manual_seed(0)
    views = baselines.unit_rows({"T": rng.normal(size=(20, 4)), "V": np.where(np.arange(20)[:, None] < 5, np.nan, rng.normal(size=(20, 3)))}, "TV")
    raw = np.concatenate([view.numpy() for view in views.values()], 1)
    model, seen, itself = baselines.PMGT(R, views, 8, 20), [], 0
    encode = model.encode
    model.encode = lambda *args, **options: seen.append(encode(*args, **options)) or seen[-1]
    for _ in range(4):
        value = model.loss(torch.arange(20)).item()
        (h, items, _), (masked, contexts, hidden) = seen[-2:]
        z, logits = model.pool(h[:, 0]), []
        for i in range(20):
            near, far = items[20 + i, 0].item(), items[40 + i, 0].item()
            cos = lambda row: torch.nn.functional.cosine_similarity(z[i], z[row], dim=0)
            itself += far == i < 10
            if A[i].any():
                assert A[i, near]
                logits.append(torch.nn.functional.softplus(-cos(20 + i)).item())
            if far != i and not A[i, far]:
                logits.append(torch.nn.functional.softplus(cos(40 + i)).item())
        features = [sum((model.feature(masked[i, t])[c].item() - raw[j, c]) ** 2 for c in range(7) if c < 4 or j >= 5)
                    for i in range(20) for t, j in enumerate(contexts[i].tolist()) if hidden[i, t]]
        assert value == pytest.approx(np.mean(logits) + np.mean(features), rel=1e-4)
    assert itself and A.any()


def test_gcnp_layers_and_loss_against_the_loop(monkeypatch):
    rng = np.random.default_rng(30)
    R, x = binary(rng, 12, 9, 0.3), baselines.unit_rows({"T": rng.normal(size=(9, 4)) + 1}, "T")["T"]
    A = ((R @ R.T).toarray() > 0) * (1 - np.eye(12))
    torch.manual_seed(0)
    model = baselines.GCNP(R, None, x, 6, 100, graph="cosine")
    for bias in model.bias:
        torch.nn.init.normal_(bias)
    outputs = []
    for table, layers, S in zip(model.tables, model.W, (torch.from_numpy(A).float(), x @ x.T)):
        h = table
        for W in layers:
            h = torch.nn.functional.normalize(torch.tanh((S @ h / S.sum(1, keepdim=True).clamp(min=1) + h) @ W.weight.T + W.bias))
        outputs.append(h)
    for got, want in zip(model.embed(), outputs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    u, i, j = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 0]), torch.tensor([4, 4, 8])
    monkeypatch.setattr(baselines, "draw_columns", lambda matrix, rows: (i, torch.ones(3, dtype=torch.bool)))
    model.sample = lambda rows, count: j[:, None]
    p = lambda a, b: torch.sigmoid(outputs[0][a] @ outputs[1][b] + model.bias[0][a] + model.bias[1][b]).item()
    want = np.mean([-np.log(p(a, b)) - np.log(1 - p(a, c)) for a, b, c in zip(u, i, j)])
    assert model.loss(u).item() == pytest.approx(want, rel=1e-4)


def test_gcnp_graphs_against_the_dense_ones():
    """F (F^T H) against the n x n cosines, the 20 nearest against a sort; both with their gradients."""
    rng = np.random.default_rng(27)
    x = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(30, 8)) + 1)).float()
    h, g = (torch.from_numpy(rng.normal(size=(30, 3))).float().requires_grad_() for _ in range(2))
    S = x @ x.T
    near = torch.zeros_like(S)
    for a in range(30):
        for b in sorted(set(range(30)) - {a}, key=lambda b: -S[a, b])[:20]:
            near[a, b] = S[a, b].clamp(min=0)
    for operator, dense in ((baselines.CosineGraph(x), S), (baselines.NeighbourGraph(baselines.nearest_neighbours(x, 20, 7)), near)):
        want = dense / dense.sum(1, keepdim=True) @ h + h
        torch.testing.assert_close(operator(h), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad((y * g).sum(), h)[0] for y in (operator(h), want)), rtol=1e-4, atol=1e-5)


TRAINED = ("mmgcn", "gptgnn", "graphbert", "pmgt", "gcnp")


@pytest.mark.parametrize("method", ["random", "clip", *TRAINED])
def test_every_baseline_initialises_finetuning(trained, capsys, method):
    """Its loss falls, validation chooses the learning rate, its emb.npz fine-tunes; two runs give the same bytes."""
    command = ("--method", method, "--data", "shop", "--dim", 8, "--epochs", 12, "--batch", 64, "--eval-every", 3)
    assert run(baselines.main, *command, "--lr", 0.01, "--out", "b.npz") == 0
    arrays = data.load_embeddings("b.npz")
    assert arrays["item"].shape == (30, 8) and ("user" in arrays) == (method in ("random", "mmgcn", "gcnp"))
    assert arrays["meta"]["method"] == ("text+image" if method == "clip" else method)  # ready features are not CLIP's
    if method in TRAINED:
        history = arrays["meta"]["report"]["history"]
        assert history[-1]["loss"] < history[0]["loss"]
        assert run(baselines.main, *command, "--lr", 1e-6, 0.01, "--out", "two.npz") == 0
        two = data.load_embeddings("two.npz")
        trials = two["meta"]["report"]["trials"]
        assert len(trials) == 2 and two["meta"]["report"]["recall@20"] == max(trial["recall@20"] for trial in trials)
        if trials[1]["recall@20"] > trials[0]["recall@20"]:  # the same method, rate and seed a second time: the same bytes
            assert np.array_equal(two["item"], arrays["item"])
        assert trials[1] | {"seconds": 0} == arrays["meta"]["report"]["trials"][0] | {"seconds": 0}
        assert two["meta"]["report"]["lr"] == (0.01 if trials[1]["recall@20"] > trials[0]["recall@20"] else 1e-6)
    assert run(finetune.main, "--init", "b.npz", "--epochs", 1) == 0
    assert "test, init b.npz" in capsys.readouterr().out


def test_rates_that_were_finished_outlive_an_interruption(trained, capsys, monkeypatch):
    pretrain, rates = baselines.pretrain, []

    def stop_at_the_third(build, parts, lr, args):
        rates.append(lr)
        if len(rates) == 3:
            raise KeyboardInterrupt
        return pretrain(build, parts, lr, args)
    monkeypatch.setattr(baselines, "pretrain", stop_at_the_third)
    assert run(baselines.main, "--method", "mmgcn", "--data", "shop", "--dim", 8, "--epochs", 2, "--eval-every", 1, "--out", "b.npz") == 2
    report = data.load_embeddings("b.npz")["meta"]["report"]
    assert [trial["lr"] for trial in report["trials"]] == rates[:2]
    assert report["recall@20"] == max(trial["recall@20"] for trial in report["trials"])
    out, err = capsys.readouterr()
    assert "lr 0.001: loss" in out and "interrupted" in err


def test_baseline_at_rates_that_diverge_and_without_validation(trained, capsys):
    """What another rate found is kept; nothing that is not finite is written; without validation there is one rate and no recall."""
    command = ("--method", "mmgcn", "--data", "shop", "--dim", 8, "--epochs", 2, "--eval-every", 1, "--out", "b.npz")
    for epochs in (1, 2):  # one: the loss is still finite, the tables no more
        assert run(baselines.main, *command, "--lr", 1e30, "--epochs", epochs) == 2
        assert "not finite" in capsys.readouterr().err and not Path("b.npz").exists()
    assert run(baselines.main, *command, "--lr", 1e30, 0.01) == 0
    report = data.load_embeddings("b.npz")["meta"]["report"]
    assert report["lr"] == 0.01 and len(report["trials"]) == 1 and "not finite" in capsys.readouterr().out
    assert run(baselines.main, *command, "--lr", 1e-3, 0.01, "--valid", 0) == 2
    assert "nothing chooses among several learning rates" in capsys.readouterr().err
    assert run(baselines.main, *command, "--lr", 0.01, "--valid", 0) == 0
    report = data.load_embeddings("b.npz")["meta"]["report"]
    assert report["recall@20"] is None and report["epoch"] == 2 and "Recall" not in capsys.readouterr().out


@pytest.mark.parametrize("method, heads", [("gptgnn", 4), ("graphbert", 2), ("pmgt", 2)])
def test_width_that_the_heads_do_not_divide(trained, capsys, method, heads):
    assert run(baselines.main, "--method", method, "--data", "shop", "--dim", 9) == 2
    assert f"{heads} attention heads" in capsys.readouterr().err
    assert run(baselines.main, "--method", method, "--data", "shop", "--dim", heads, "--epochs", 1, "--lr", 0.01) == 0


@pytest.mark.parametrize("method", ["clip", *TRAINED])
@pytest.mark.parametrize("modality", ["T", "V"])
def test_baselines_take_a_single_modality(trained, method, modality):
    assert run(baselines.main, "--method", method, "--data", "shop", "--dim", 8, "--epochs", 2, "--lr", 0.01, "--modalities", modality,
               "--out", "b.npz") == 0


@pytest.mark.parametrize("method", ["random", "clip", *TRAINED])
def test_baselines_on_interactions_alone(tmp_path, capsys, monkeypatch, method):
    """GCN-P falls back on the co-interaction graphs; what needs item features says that there is nothing for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    data.write_csv(tmp_path / "bare/interactions.csv", ("user", "item"), shop(np.random.default_rng(0))[0])
    code = run(baselines.main, "--method", method, "--data", "bare", "--dim", 8, "--epochs", 2, "--lr", 0.01)
    assert code == (0 if method in ("random", "gcnp") else 2)
    assert code == 0 or f"nothing for --method {method}" in capsys.readouterr().err


# --- reproduce.py ---------------------------------------------------------------------------------------------------

class InTurn(concurrent.futures.Executor):
    """Runs what is submitted at once, in this thread: signal handlers can be set in the main one only."""

    def __init__(self, jobs):
        self.failed = False

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        if not self.failed:
            try:
                future.set_result(function(*args))
            except Exception as error:
                self.failed = True
                future.set_exception(error)
        return future


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """(run a target on the shop with short runs in this process, the list of commands that were run)."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    ran, mains = [], {"mmcpr.py": mmcpr.main, "baselines.py": baselines.main, "finetune.py": finetune.main}

    def command(self, script, *flags):
        ran.append((script, *flags))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = run(mains[script], *flags, "--epochs", 2, "--eval-every", 1)
        if code:
            raise data.InputError(err.getvalue())
    monkeypatch.setattr(reproduce.Cells, "command", command)
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", InTurn)
    return lambda *argv: run(reproduce.main, *argv, "--data", "shop"), ran


def test_all_tables_and_figures(sweep, capsys):
    """Everything from an empty cache; the means are those of the cells; a second call runs nothing and prints the same."""
    target, ran = sweep
    assert target("all", "--seeds", 0, 1) == 0
    folder, count = Path("results/shop"), len(ran)
    out = capsys.readouterr().out
    for name in ("table1", "table2", "table3", "fig3", "fig4", "scale"):
        assert (folder / f"{name}.md").read_text().strip() in out
    for name in ("fig3", "fig4", "training", "attention", "scale"):
        assert Image.open(folder / f"{name}.png").size[0] > 300
    table2 = (folder / "table2.md").read_text()
    for name in ("Random", "Random at the RMS of MMCPR as is", "text+image", "MMGCN", "GPT-GNN", "Graph-BERT", "PMGT", "GCN-P",
                 "MMCPR without reviews", "MMCPR"):
        assert f"| {name} |" in table2
    cells = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]
    plain = [c["finetune"]["test"]["recall@20"] for c in cells if c["pretraining"] is None and not c["finetuning"]]
    assert len(plain) == 2 and f"| Random | {np.mean(plain):.4f} ± {np.std(plain, ddof=1):.4f} |" in table2
    # A row of MMCPR's variants is the mean over the cells that were run with its flags
    start = next(tuple(c["finetuning"]) for c in cells if c["pretraining"] and "--lam" in c["pretraining"] and "0.4" in c["pretraining"])
    for name, row, flags in (("table3", "w/o BCE (λ = 1)", {"--lam", "1"}), ("fig3", "VG", {"--modalities", "VG"}),
                             ("fig4", "softmax, λ = 0.4", {"--lam", "0.4"}), ("fig4", "bce, λ = 0.6", {"--lam", "0.6", "--cima", "bce"})):
        values = [c["finetune"]["test"]["ndcg@40"] for c in cells if c["pretraining"] and c["pretraining"][0] == "mmcpr.py" and
                  set(c["pretraining"][3:]) == flags and tuple(c["finetuning"]) == start]
        line = next(line for line in (folder / f"{name}.md").read_text().splitlines() if line.startswith(f"| {row} |"))
        assert len(values) == 2 and line.split(" | ")[5] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    # Every run once in <target>.csv, and there what its cell says
    with open(folder / "table2.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Six systems at three rates and two scales, text+image at two, Random: the choice; eight systems' other seed; two rows of MMCPR's
    assert len({(row["pretraining"], row["finetuning"], row["seed"]) for row in rows}) == len(rows) == (6 * 3 * 2 + 2 + 1) + 8 + 2 * 2
    for cell in cells:
        command = (" ".join(cell["pretraining"] or ["random"]), " ".join(["finetune.py", *cell["finetuning"]]), str(cell["seed"]))
        row = [row for row in rows if (row["pretraining"], row["finetuning"], row["seed"]) == command]
        if {"--lam", "--cima", "--modalities"} & set(cell["pretraining"] or ()) and "TVG" not in cell["pretraining"]:
            assert not row  # of other tables
        elif row:
            assert float(row[0]["recall@60"]) == pytest.approx(cell["finetune"]["test"]["recall@60"], abs=1e-6)
            assert int(row[0]["epoch"]) == cell["finetune"]["epoch"]
    assert [row["seed"] for row in rows if row["pretraining"] == "random" and row["finetuning"] == "finetune.py"] == ["0", "1"]
    made = lambda: {path.name: path.read_bytes() for path in folder.glob("*.[mc]*")}
    before = made()
    assert target("all", "--seeds", 0, 1) == 0
    assert len(ran) == count and before == made() and not (folder / "table1.csv").exists()


def test_learning_rate_and_scale_are_the_validations_choice(sweep):
    target, ran = sweep
    assert target("table3", "--seeds", 3, "--rates", "1e-3", "1e-1") == 0
    cells = [json.loads(path.read_text()) for path in Path("results/shop/cells").glob("*.json")]
    trials = {(c["pretraining"][2], *c["finetuning"]): c["finetune"]["valid"]["recall@20"] for c in cells if len(c["pretraining"]) == 3}
    assert set(trials) == {(rate, *scale) for rate in ("1e-3", "1e-1") for scale in ((), ("--scale", "xavier"))}
    chosen = {(c["pretraining"][2], *c["finetuning"]) for c in cells if "--lam" in c["pretraining"]}
    assert len(chosen) == 1 and trials[chosen.pop()] == max(trials.values())
    assert len([c for c in ran if c[0] == "mmcpr.py" and "--lam" not in c]) == 2  # both scales start from the same tables


def test_not_trained_is_what_it_says():
    """The control's flags leave the towers where their seed drew them."""
    rng = np.random.default_rng(0)
    train, text = binary(rng, 40, 30, 0.2), rng.normal(size=(30, 8)).astype(np.float32)
    args = mmcpr.arguments().parse_args([*reproduce.UNTRAINED, "--seed", "3"])
    found = mmcpr.pretrain(Namespace(train=train, valid=sp.csr_matrix((40, 30))), {"T": text}, args)
    torch.manual_seed(3)
    drawn = mmcpr.MMCPR(train, {"T": text}, args.modalities, args.dim, args.layers, args.norm, args.bias).embed()
    for table, expected in zip(found[:2], drawn[:2]):
        np.testing.assert_allclose(table, expected, atol=1e-7)


def test_patience_of_a_sweep_is_that_of_every_pretraining(sweep):
    target, ran = sweep
    assert target("table2", "--seeds", 0, "--rates", "1e-2", "--patience", 7) == 0
    trained = [c for c in ran if c[0] == "mmcpr.py" or c[0] == "baselines.py" and "clip" not in c]
    assert len(trained) == 7 and all(c[c.index("--patience") + 1] == "7" for c in trained)
    assert "| 1e-2 |" in Path("results/shop/table2.md").read_text()


def test_interrupted_sweep_goes_on_and_a_failing_cell_is_named(sweep, capsys, monkeypatch):
    target, ran = sweep
    command = reproduce.Cells.command
    monkeypatch.setattr(reproduce.Cells, "command", lambda self, *c: command(self, *c) if len(ran) < 5 else command(self, *c, "--lr", "0"))
    assert target("scale", "--seeds", 0) == 2
    assert "--lr must be above 0" in capsys.readouterr().err
    monkeypatch.setattr(reproduce.Cells, "command", command)
    done, ran[:] = [c for c in ran if c[0] == "mmcpr.py"][:2], []
    assert target("scale", "--seeds", 0) == 0
    assert not {c[:5] for c in ran} & {c[:5] for c in done}


def test_rate_at_which_training_diverges_is_not_chosen(sweep, capsys, monkeypatch):
    """It loses the choice; where a cell of a table diverges, the sweep stops and says so."""
    target, ran = sweep
    command = reproduce.Cells.command

    def diverging(rate):
        def run(self, *c):
            if rate in c:
                raise data.InputError(f"the loss is not finite at epoch 3; lower --lr (now {rate})")
            command(self, *c)
        return run
    monkeypatch.setattr(reproduce.Cells, "command", diverging("1e-2"))
    assert target("table3", "--seeds", 0, "--rates", "1e-2", "1e-3") == 0
    assert all("1e-3" in c for c in ran if c[0] == "mmcpr.py")
    monkeypatch.setattr(reproduce.Cells, "command", lambda self, *c: pytest.fail(f"run a second time: {c}"))
    assert target("table3", "--seeds", 0, "--rates", "1e-2", "1e-3") == 0
    monkeypatch.setattr(reproduce.Cells, "command", diverging("1"))  # of --lam
    assert target("table3", "--seeds", 1, "--rates", "1e-3") == 2 and "not finite" in capsys.readouterr().err


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """(script of mmcpr.py, cells): a sweep of two jobs over the cells that gets SIGTERM once the script has made a file `started`."""
    monkeypatch.setattr(reproduce, "HERE", tmp_path)

    def kill():
        while not list(tmp_path.glob("cells/started*")):
            time.sleep(0.01)
        time.sleep(0.2)  # a cell that waits for the other's tables is there by now
        os.kill(os.getpid(), signal.SIGTERM)

    def sweep(script, wanted):
        (tmp_path / "mmcpr.py").write_text("import os, pathlib, signal, sys, time\n" + script)
        threading.Thread(target=kill).start()
        with pytest.raises(KeyboardInterrupt):
            reproduce.Cells((), (), "abc", tmp_path, 2).all(wanted, "cells")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield sweep
    signal.signal(signal.SIGTERM, before)


def test_sweep_that_is_killed_starts_nothing_more(killed, tmp_path):
    """Two cells want the same tables: the one that waits for the other's does not pre-train in its place."""
    killed("signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))\npathlib.Path(f'started{os.getpid()}').touch()\ntime.sleep(20)\n",
           [(("mmcpr.py",), scale, 0) for scale in reproduce.SCALES])
    assert len(list(tmp_path.glob("cells/started*"))) == 1


def test_sweep_that_is_killed_takes_its_runs_along(killed, tmp_path):
    """SIGTERM is passed on to the script that is running, which saves a checkpoint, and waits for it."""
    killed("def stop(*_):\n    time.sleep(0.2)\n    pathlib.Path('saved').touch()\n    sys.exit(2)\n"
           "signal.signal(signal.SIGTERM, stop)\npathlib.Path('started').touch()\ntime.sleep(60)\n", [(("mmcpr.py",), (), 0)])
    assert (tmp_path / "cells/saved").exists()


def test_cells_that_run_beside_a_failing_one_finish(tmp_path, monkeypatch):
    """baselines.py keeps no checkpoint: what it has computed would be lost."""
    (tmp_path / "mmcpr.py").write_text("import pathlib, sys, time\n"
                                       "while not pathlib.Path('started').exists(): time.sleep(0.01)\nsys.exit('the cell that fails')\n")
    (tmp_path / "baselines.py").write_text("import pathlib, sys, time\npathlib.Path('started').touch()\ntime.sleep(0.5)\n"
                                           "pathlib.Path('finished').touch()\nsys.exit(2)\n")
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    with pytest.raises(data.InputError, match="the cell that fails"):
        reproduce.Cells((), (), "abc", tmp_path, 2).all([(("mmcpr.py",), (), 0), (("baselines.py", "--method", "pmgt"), (), 0)], "cells")
    assert (tmp_path / "cells/finished").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seed": 0}'])
def test_damaged_cell_is_named(sweep, capsys, content):
    target, ran = sweep
    assert target("table3", "--seeds", 0, "--rates", "1e-2") == 0
    cell = sorted(Path("results/shop/cells").glob("*.json"))[0]
    cell.write_text(content)
    assert target("table3", "--seeds", 0, "--rates", "1e-2") == 2
    assert f"{cell.name}: damaged; delete it and run the same command again" in capsys.readouterr().err
    cell.unlink()
    assert target("table3", "--seeds", 0, "--rates", "1e-2") == 0


def test_damaged_tables_are_named(sweep, capsys):
    target, ran = sweep
    assert target("table3", "--seeds", 0, "--rates", "1e-2") == 0
    for path in (*Path("results/shop/cells").glob("*.json"), *Path("results/shop/tables").glob("*.npz")):
        path.unlink() if path.suffix == ".json" else path.write_bytes(b"PK")
    assert target("table3", "--seeds", 0, "--rates", "1e-2") == 2
    assert "npz: damaged; delete it and run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [(("--seeds", 0, 0), "--seeds names one twice"), (("--rates", "1e-2", "0.01"), "--rates names one twice"),
                                          (("--valid", 0), "--valid 0 leaves nothing to choose")])
def test_flags_of_a_sweep(sweep, capsys, flags, words):
    assert sweep[0]("table3", *flags) == 2 and words in capsys.readouterr().err
    for bad in ("abc", "-1", "nan"):
        with pytest.raises(SystemExit):
            sweep[0]("table3", f"--rates={bad}")
    assert not sweep[1]


def test_gain_is_relative_and_paired():
    ours, other = np.array([0.12, 0.22, 0.33]), np.array([0.1, 0.2, 0.3])
    assert reproduce.gain(ours, other) == "+11.7% (p = 0.020)"  # t = (.07 / 3) / (.00577 / sqrt 3) = 7, two degrees of freedom
    assert reproduce.gain(other, ours).startswith("-10.4%")


def test_cells_side_by_side_through_the_command_line(tmp_path):
    """Nothing replaced: two jobs, real processes; cells that share tables pre-train them once; what the data lacks is left out."""
    write_shop(tmp_path / "shop")
    for file in ("item_text.npy", "item_image.npy", "review.npy", "items.csv"):
        (tmp_path / "shop" / file).unlink()
    command = [sys.executable, str(Path(reproduce.__file__)), "table3", "--data", "shop", "--seeds", "0", "--rates", "1e-2",
               "--patience", "1", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    table3 = (tmp_path / "results/shop/table3.md").read_text()
    assert table3.strip() in done.stdout and "seeds 0, rates 1e-2, patience 1\n" in table3 and "| MMCPR |" in table3
    assert len(list((tmp_path / "results/shop/tables").glob("*"))) == 1  # both scales' tables; no checkpoint, no part
    assert not list(tmp_path.glob("*.ckpt"))


def test_what_an_interrupted_pretraining_left_is_not_used(sweep, capsys, monkeypatch):
    """mmcpr.py writes its best so far when interrupted and ends with 2: the next sweep trains that cell again."""
    target, ran = sweep
    command = reproduce.Cells.command

    def interrupted(self, *c):
        command(self, *c)
        if c[0] == "mmcpr.py":
            raise data.InputError("interrupted at epoch 1")
    monkeypatch.setattr(reproduce.Cells, "command", interrupted)
    assert target("scale", "--seeds", 0) == 2 and "interrupted at epoch 1" in capsys.readouterr().err
    first = next(c for c in ran if c[0] == "mmcpr.py")
    monkeypatch.setattr(reproduce.Cells, "command", command)
    ran.clear()
    assert target("scale", "--seeds", 0) == 0 and first in ran


def test_tables_of_interactions_alone(sweep, tmp_path):
    """Systems that need features, and the ablation that needs pairs, are left out; the rest is there, with one seed too."""
    target, ran = sweep
    for file in ("item_text.npy", "item_image.npy", "review.npy", "items.csv"):
        (tmp_path / "shop" / file).unlink()
    for name in ("table2", "table3", "fig4", "scale"):
        assert target(name, "--seeds", 0) == 0
    table2 = Path("results/shop/table2.md").read_text()
    assert all(f"| {name} |" in table2 for name in ("Random", "GCN-P", "MMCPR")) and "PMGT" not in table2
    assert "λ" not in Path("results/shop/table3.md").read_text() and "CIMA" not in Path("results/shop/scale.md").read_text()
    assert not Path("results/shop/fig4.md").exists()  # CIMA has nothing to align
    ran.clear()
    assert target("fig3", "--seeds", 0) == 0
    assert not ran and "| G |" in Path("results/shop/fig3.md").read_text()  # the graphs are all there is: the cells of Table 2


def test_what_is_not_the_default_stands_in_the_title(sweep):
    target, ran = sweep
    assert target("table3", "--seeds", 0, "--rates", "1e-2", "--valid", 0.2, "--min-count", 2, "--encoder", "tiny") == 0
    title = "# Table 3, shop, seeds 0, rates 1e-2, valid 0.2, min count 2, encoder tiny\n"
    assert Path("results/shop/table3.md").read_text().startswith(title)
    assert target("table1", "--min-count", 2) == 0
    assert Path("results/shop/table1.md").read_text().startswith("# Table 1, min count 2\n")


def test_sweep_goes_on_where_the_data_has_moved(sweep, tmp_path):
    target, ran = sweep
    assert target("table3", "--seeds", 0, "--rates", "1e-2") == 0
    for path in Path("results/shop/cells").glob("*.json"):
        path.unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shop").rename(tmp_path / "elsewhere/shop")
    ran.clear()
    assert run(reproduce.main, "table3", "--seeds", 0, "--rates", "1e-2", "--data", "elsewhere/shop") == 0
    assert ran and all(c[0] == "finetune.py" for c in ran)


def test_the_papers_figure_stands_in_its_own_row(sweep, tmp_path):
    """Also where only one of the three rows can be made."""
    for files, rows in (((), 3), (("item_text.npy", "item_image.npy", "review.npy", "items.csv"), 1)):
        folder = tmp_path / str(rows) / "vg"
        folder.parent.mkdir()
        write_shop(folder)
        for file in files:
            (folder / file).unlink()
        assert run(reproduce.main, "table3", "--data", folder, "--seeds", 0, "--rates", "1e-2", "--results", folder.parent) == 0
        lines = [line for line in (folder / "table3.md").read_text().splitlines() if line.startswith(("| w/o", "| MMCPR"))]
        assert [line.split(" | ")[-1] for line in lines] == ["0.1898 |", "0.1729 |", "0.1939 |"][-rows:]


def test_changed_defaults_and_data_are_other_cells(tmp_path, monkeypatch):
    cells = reproduce.Cells((), (), "abc", tmp_path, 1)
    name = cells.name(("mmcpr.py", "--lam", "0"), ("finetune.py",), seed=0)
    assert name == cells.name(("mmcpr.py", "--lam", "0.0"), ("finetune.py", "--scale", "asis"), seed=0)
    others = {cells.name(("mmcpr.py", "--lam", "0"), ("finetune.py",), seed=1), cells.name(None, ("finetune.py",), seed=0),
              reproduce.Cells((), (), "abd", tmp_path, 1).name(("mmcpr.py", "--lam", "0"), ("finetune.py",), seed=0)}
    assert name not in others and len(others) == 3
    arguments = mmcpr.arguments
    monkeypatch.setattr(mmcpr, "arguments", lambda: (parser := arguments()).set_defaults(tau=0.2) or parser)
    assert name != cells.name(("mmcpr.py", "--lam", "0"), ("finetune.py",), seed=0)


def test_changed_features_and_held_out_parts_are_other_cells(sweep, tmp_path):
    target, ran = sweep
    assert target("fig4", "--seeds", 0, "--rates", "1e-2") == 0
    count = len(list(Path("results/shop/cells").glob("*.json")))
    text = np.load(tmp_path / "shop" / "item_text.npy")
    np.save(tmp_path / "shop" / "item_text.npy", 2 * text)
    assert target("fig4", "--seeds", 0, "--rates", "1e-2") == 0
    assert len(list(Path("results/shop/cells").glob("*.json"))) == 2 * count
    assert target("fig4", "--seeds", 0, "--rates", "1e-2", "--valid", 0.2) == 0
    assert len(list(Path("results/shop/cells").glob("*.json"))) == 3 * count
