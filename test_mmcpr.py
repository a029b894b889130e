"""The tests of all but paper/: python -m pytest -q

Every fast path against its plain definition, in float64 where a formula is checked; the real
command lines on tiny data; every documented error once. No network, GPU or other data.
"""
import contextlib
import csv
import errno
import gzip
import inspect
import io
import json
import os
import re
import signal
import socket
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
import torch.nn.functional as F
from PIL import Image

import amazon
import data
import demo
import encode
import finetune
import metrics
import mmcpr
import ops
import run
from run import InputError

HERE = Path(__file__).parent
# Two processes that wait for each other on a busy machine take minutes.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


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
    run.write_csv(folder / "interactions.csv", ("user", "item"), named)
    run.write_csv(folder / "items.csv", ("item",), [(f"i{i}",) for i in range(30)])


def call(main, *argv):
    """A script's main in this process; returns the exit code."""
    return run.cli(main, [str(a) for a in argv])


# --- metrics.py ---------------------------------------------------------------------------

def test_metrics_by_hand():
    """Six items ranked 0, ..., 5; 0 is masked, 2 and 5 are relevant: hits at positions 2 and 5."""
    score = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    seen = sp.csr_matrix([[1, 0, 0, 0, 0, 0]])
    truth = sp.csr_matrix([[0, 0, 1, 0, 0, 1]])
    got = metrics.evaluate(torch.ones(1, 1), score.T, seen, truth, (1, 2, 5))
    ideal = 1 + 1 / np.log2(3)
    want = {"recall@1": 0, "ndcg@1": 0,
            "recall@2": 1 / 2, "ndcg@2": (1 / np.log2(3)) / ideal,
            "recall@5": 1, "ndcg@5": (1 / np.log2(3) + 1 / np.log2(6)) / ideal}
    assert got == pytest.approx(want, abs=1e-12)


def test_metrics_ideal_is_cut_at_k():
    """Three relevant items but k = 2: a perfect top two is NDCG 1, Recall 2/3."""
    item = torch.tensor([[3.0], [2], [1], [0]])
    truth = sp.csr_matrix([[1, 1, 1, 0]])
    got = metrics.evaluate(torch.ones(1, 1), item, sp.csr_matrix((1, 4)), truth, (2,))
    assert got == pytest.approx({"recall@2": 2 / 3, "ndcg@2": 1})


@pytest.mark.parametrize("chunk", [1, 60, 1 << 20])
def test_metrics_against_the_loop(monkeypatch, chunk):
    """Users without a relevant item are left out; k may exceed the candidates; any chunk."""
    monkeypatch.setattr(metrics, "CHUNK_SCORES", chunk)
    rng = np.random.default_rng(1)
    cells = rng.random((17, 25))
    has_truth = (np.arange(17) % 4 > 0)[:, None]
    seen = sp.csr_matrix((cells < 0.3) * 1.0)
    truth = sp.csr_matrix(((cells > 0.85) & has_truth) * 1.0)
    user = torch.from_numpy(rng.normal(size=(17, 4)))
    item = torch.from_numpy(rng.normal(size=(25, 4)))
    tested = np.flatnonzero(np.diff(truth.indptr))
    for k in (1, 5, 24, 60):
        got = metrics.evaluate(user, item, seen, truth, (k,))
        want = metrics.evaluate_plain(user, item, seen, truth, k, tested)
        assert got == pytest.approx(want, abs=1e-12)


def test_ranking_leaves_out_seen_items():
    seen = binary(np.random.default_rng(2), 9, 12, 0.5)
    for users, scores, items in metrics.rank(torch.randn(9, 3), torch.randn(12, 3), seen, 12):
        for u, user_scores, user_items in zip(users, scores, items):
            ranked = set(user_items[user_scores > -torch.inf].tolist())
            assert ranked == set(range(12)) - set(seen[[u]].indices)


# --- ops.py: the co-interaction graph (Eq. 1) ---------------------------------------------

def adjacency_by_sets(R):
    """1 where the item sets S_a and S_b have an element in common, a != b."""
    sets = [set(R[[a]].indices) for a in range(R.shape[0])]
    return np.array([[float(a != b and bool(S & T)) for b, T in enumerate(sets)]
                     for a, S in enumerate(sets)])


@pytest.mark.parametrize("density", [0.02, 0.15, 0.6])
@pytest.mark.parametrize("storage", ["auto", "A", "RE"])
def test_co_interaction_against_the_sets(density, storage):
    """Product and gradient of R(R'x) - Ex against D^-1 A x from the sets S_a; isolated: 0."""
    R = binary(np.random.default_rng(3), 23, 31, density, empty_row=4)
    A = adjacency_by_sets(R)
    assert np.array_equal(ops.co_interaction_plain(R).toarray(), A)
    assert np.array_equal(ops.build_co_interaction(R, block_entries=7).n_neighbours, A.sum(1))
    A = torch.from_numpy(A)
    graph = ops.CoInteractionGraph(R, dtype=torch.float64, storage=storage)
    x, g = torch.randn(2, 23, 5, dtype=torch.float64)
    x.requires_grad_()
    fast, plain = graph(x), ops.neighbour_mean_plain(A, x)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast, x, g), torch.autograd.grad(plain, x, g))
    assert not fast[4].any()
    small = torch.randn(23, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(graph, small)


def test_co_interaction_keeps_the_smaller_form():
    rng = np.random.default_rng(4)
    sparse = ops.build_co_interaction(binary(rng, 300, 40, 0.03))
    dense = ops.build_co_interaction(binary(rng, 50, 40, 0.9))
    assert sparse.A is None
    assert 2 * sparse.R.nnz + sparse.E.nnz < sparse.n_neighbours.sum()
    assert dense.R is None
    assert dense.A.nnz == dense.n_neighbours.sum() == 50 * 49


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_product_against_the_plain_one(dtype):
    """Empty rows are 0; x may be a view that is not contiguous."""
    rng = np.random.default_rng(4)
    matrix = sp.csr_matrix(np.where(rng.random((9, 13)) < 0.3, rng.normal(size=(9, 13)), 0))
    matrix = sp.csr_matrix(matrix.multiply(np.arange(9)[:, None] != 4))
    x = torch.from_numpy(rng.normal(size=(5, 13))).to(dtype).T
    tensor = ops.sparse_tensor(matrix, dtype=dtype)
    fast = ops.sparse_product(tensor, x)
    torch.testing.assert_close(fast, ops.sparse_product_plain(tensor, x))
    torch.testing.assert_close(fast, torch.from_numpy(matrix.toarray()).to(dtype) @ x)
    assert not fast[4].any()


# --- ops.py: binary cross-entropy (Eq. 15) ------------------------------------------------

@pytest.mark.parametrize("chunk_scores", [1, 24, 1 << 20])
def test_bce_against_its_formula(chunk_scores):
    """All entries of R, zeros too: value and gradients against the printed formula with its
    sigmoid, under autograd."""
    rng = np.random.default_rng(10)
    R = binary(rng, 6, 11, 0.3)
    inputs = [torch.from_numpy(rng.normal(size=shape)).requires_grad_()
              for shape in ((6, 4), (11, 4), (11,))]
    user, item, bias = inputs
    p, r = torch.sigmoid(user @ item.T + bias), torch.from_numpy(R.toarray())
    formula = -(r * p.log() + (1 - r) * (1 - p).log()).sum()
    rows, cols = (torch.from_numpy(x).long() for x in R.nonzero())
    chunked = ops.BlockBCE.apply(*inputs, rows, cols, chunk_scores)
    want = torch.autograd.grad(3 * formula, inputs)
    for loss in (ops.bce_plain(*inputs, R), ops.bce(*inputs, R), chunked):
        torch.testing.assert_close(loss, formula)
        for got, gradient in zip(torch.autograd.grad(3 * loss, inputs), want):
            torch.testing.assert_close(got, gradient)

    def function(*tensors):
        return ops.BlockBCE.apply(*tensors, rows, cols, chunk_scores)
    assert torch.autograd.gradcheck(function, inputs)


def test_bce_does_not_overflow():
    """Logits of +-1000: log(1 + exp(x)) would be infinite."""
    item = torch.tensor([[1000.0], [-1000.0]])
    loss = ops.bce(torch.ones(1, 1), item, torch.zeros(2), sp.csr_matrix([[0.0, 1.0]]))
    assert loss.item() == pytest.approx(2000)


# --- ops.py: LightGCN's layers and MixGCF -------------------------------------------------

def small_lightgcn(n_layers=3, dim=3, seed=12):
    """A LightGCN in float64 on 7 users, one of them without items, and 5 items."""
    R = binary(np.random.default_rng(seed), 7, 5, 0.4, empty_row=2)
    torch.manual_seed(seed)
    user, item = torch.randn(7, dim, dtype=torch.float64), torch.randn(5, dim, dtype=torch.float64)
    return finetune.LightGCN(R, user, item, n_layers), R


def test_lightgcn_against_the_dense_matrix():
    model, R = small_lightgcn()
    A = np.zeros((12, 12))
    A[:7, 7:], A[7:, :7] = R.toarray(), R.toarray().T
    root = np.array([degree ** -0.5 if degree else 0.0 for degree in A.sum(1)])
    P = torch.from_numpy(root[:, None] * A * root)
    want = [torch.linalg.matrix_power(P, layer) @ model.E0 for layer in range(4)]
    for got, layer in zip(model.layers(), want):
        torch.testing.assert_close(got, layer, rtol=1e-5, atol=1e-6)
    user, item = model.embed()
    torch.testing.assert_close(torch.cat([user, item]), sum(want) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_layer_rows_against_autograd(n_layers):
    """Values and gradient; rows come more than once."""
    model, _ = small_lightgcn(n_layers)
    rows, g = torch.randint(12, (n_layers + 1, 30)), torch.randn(n_layers + 1, 30, 3).double()
    P = model.A.to_dense().to_sparse_coo()
    plain = ops.layer_rows_plain(model.E0, P, n_layers, rows)
    fast = ops.layer_rows(model.E0, model.layers(), rows, model.A)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast, model.E0, g),
                               torch.autograd.grad(plain, model.E0, g))

    def function(E0):
        return ops.layer_rows(E0, model.layers(), rows[:, :6], model.A)
    assert torch.autograd.gradcheck(function, model.E0)


def mixgcf_by_loop(layers, users, pos_items, candidates, alpha, l2):
    """MixGCF as its paper states it, sample by sample: mix every candidate, pick, pool."""
    total, penalty = 0, 0
    for b in range(len(users)):
        query = sum(layer[users[b]] for layer in layers) / len(layers)
        picked = []
        for l, layer in enumerate(layers):
            a, pos = alpha[l, b], layer[pos_items[b]]
            mixed = [a * pos + (1 - a) * layer[c] for c in candidates[b]]
            picked.append(mixed[int(np.argmax([(query @ x).item() for x in mixed]))])
        positive = sum(layer[pos_items[b]] for layer in layers) / len(layers)
        negative = sum(picked) / len(layers)
        total = total + torch.log(1 + torch.exp(query @ negative - query @ positive))
        for x in (layers[0][users[b]], layers[0][pos_items[b]], picked[0]):
            penalty = penalty + (x ** 2).sum()
    return total + l2 / 2 * penalty


@pytest.mark.parametrize("M", [1, 5, 30])
def test_mixgcf_against_the_loop(M):
    """Value and gradient: the arg-max over unmixed candidates and Horner's rule change nothing."""
    rng = np.random.default_rng(13)
    R = binary(rng, 8, 12, 0.4)
    start = [torch.from_numpy(rng.normal(size=(n, 6))) for n in (8, 12)]
    model = finetune.LightGCN(R, *start, 3)
    users = torch.from_numpy(rng.integers(8, size=9))
    pos_items = torch.from_numpy(rng.integers(8, 20, size=9))
    candidates = torch.from_numpy(rng.integers(8, 20, size=(9, M)))
    alpha = torch.from_numpy(rng.random((4, 9)))
    layers = [model.E0]
    for _ in range(3):
        layers.append(model.A.to_dense() @ layers[-1])
    picked = ops.hard_negatives(layers, users, candidates)
    plain = ops.hard_negatives_plain(layers, users, pos_items, candidates, alpha)
    assert torch.equal(picked, plain)
    fast = finetune.mixgcf_loss(model, users, pos_items, candidates, alpha, 0.3)
    slow = mixgcf_by_loop(layers, users, pos_items, candidates, alpha, 0.3)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, model.E0),
                               torch.autograd.grad(slow, model.E0))


@pytest.mark.parametrize("sampler", ["fast", "plain"])
def test_negatives_are_uniform_over_what_the_user_has_not(sampler):
    torch.manual_seed(0)
    R = sp.csr_matrix(np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], np.float32))
    users = [0, 2, 1]
    if sampler == "fast":
        drawn = ops.NegativeSampler(R)(torch.tensor(users), 4000).numpy()
    else:
        drawn = ops.sample_negatives_plain(R, users, 4000, np.random.default_rng(0))
    counts = [np.bincount(row, minlength=5) for row in drawn]
    assert not counts[0][[0, 2]].any() and not counts[1][4]
    assert counts[2].sum() == 4000, "a user who has everything gets any item"
    for count, n_free in ((counts[0], 3), (counts[1], 4)):
        observed, expected = count[count > 0], 4000 / n_free
        chi_square = ((observed - expected) ** 2 / expected).sum()
        # 16.3 is the 99.9 % quantile of three degrees of freedom.
        assert len(observed) == n_free and chi_square < 16.3


# --- Review pooling (Eq. 4) and the graph encoder (Eq. 1, 2) ------------------------------

def test_pool_reviews_is_the_mean_of_training_reviews():
    """Against a plain loop; what held-out rows hold, NaN and infinities too, changes no bit."""
    rng = np.random.default_rng(0)
    users, in_train = rng.integers(6, size=60), rng.random(60) < 0.7
    in_train[users == 2] = False
    review = rng.normal(size=(60, 4)).astype(np.float16)
    review[rng.random(60) < 0.2] = np.nan
    pooled = mmcpr.pool_reviews(review, users, 7, in_train, chunk=16)
    counts = in_train & ~np.isnan(review[:, 0])
    for u in range(7):
        rows = [n for n in range(60) if users[n] == u and counts[n]]
        want = review[rows].astype(np.float64).mean(0) if rows else np.full(4, np.nan)
        np.testing.assert_allclose(pooled[u], want, rtol=1e-5)
    for poison in (np.nan, np.inf):
        poisoned = np.where(in_train[:, None], review, np.float16(poison))
        again = mmcpr.pool_reviews(poisoned, users, 7, in_train, chunk=16)
        np.testing.assert_array_equal(again, pooled)


def test_graph_encoder_against_the_neighbourhood_loop():
    """e^(l+1)_u is the mean of the neighbours' e^(l) (Eq. 1), the result the layers' (Eq. 2)."""
    R = binary(np.random.default_rng(5), 12, 9, 0.2)
    A = adjacency_by_sets(R)
    layer = torch.randn(12, 3, dtype=torch.float64)
    got = mmcpr.graph_encoder(layer, ops.CoInteractionGraph(R, dtype=torch.float64), 2)
    total = layer
    for _ in range(2):
        following = torch.zeros_like(layer)
        for u in range(12):
            neighbours = np.flatnonzero(A[u])
            if len(neighbours):
                following[u] = sum(layer[w] for w in neighbours) / len(neighbours)
        layer = following
        total = total + layer
    torch.testing.assert_close(got, total / 3)


# --- Inter-modal aggregation (Eq. 6-8, 12-14) and what is missing -------------------------

def test_inter_modal_aggregation_against_the_loop():
    """Missing modalities get weight exactly 0, the others the softmax among themselves."""
    rng = np.random.default_rng(6)
    projected = torch.from_numpy(rng.normal(size=(20, 3, 4)))
    a = torch.from_numpy(rng.normal(size=4))
    present = torch.from_numpy(rng.random((20, 3)) < 0.6)
    present[0], present[1] = False, True
    e, alpha = mmcpr.inter_modal_aggregation(projected, present, a)
    for n in range(20):
        weight = np.zeros(3)
        for m in range(3):
            if present[n, m]:
                weight[m] = np.exp(max(0.0, float(a @ projected[n, m])))
        weight /= max(weight.sum(), 1e-300)
        np.testing.assert_allclose(alpha[n], weight, rtol=1e-12)
        np.testing.assert_allclose(e[n], weight @ projected[n].numpy(), rtol=1e-10, atol=1e-12)
    assert not alpha[~present].any()


def test_tower_projects_standardised_features_and_the_graph():
    """e'^m = W e^m + b (Eq. 6, 12): frozen rows L2-normalised, centred, of RMS norm 1; for the
    graph the mean layer (Eq. 2)."""
    rng = np.random.default_rng(7)
    text, image = rng.normal(size=(10, 5)) * 20, rng.normal(size=(10, 7))
    text[3] = np.nan
    R = binary(rng, 10, 12, 0.3)
    model = mmcpr.Tower(10, {"T": text, "V": image}, ops.CoInteractionGraph(R), dim=4)
    e, alpha, projected = model(torch.arange(10))
    x = image / np.linalg.norm(image, axis=1, keepdims=True)
    x -= x.mean(0)
    x /= np.sqrt((x ** 2).sum(1).mean())
    W, b = model.W["V"].weight.detach().numpy(), model.W["V"].bias.detach().numpy()
    np.testing.assert_allclose(projected[:, 1].detach(), x @ W.T + b, rtol=1e-5, atol=1e-6)
    encoded = mmcpr.graph_encoder(model.e0, ops.CoInteractionGraph(R), 2)
    torch.testing.assert_close(projected[:, 2], model.W["G"](encoded))
    assert alpha[3, 0] == 0 and (alpha[np.arange(10) != 3, 0] > 0).all()
    (e ** 2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.a.grad.any() and model.fallback is None


def test_a_modality_that_nobody_has_changes_nothing():
    """All rows NaN: no attention, and finite values and gradients."""
    image = np.random.default_rng(9).normal(size=(5, 3))
    model = mmcpr.Tower(5, {"T": np.full((5, 2), np.nan), "V": image}, None, dim=4)
    e, alpha, projected = model(torch.arange(5))
    torch.testing.assert_close(e, projected[:, 1])
    assert not alpha[:, 0].any()
    (e ** 2).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_node_with_nothing_uses_its_fallback_row():
    """No graph and no features, for some nodes or a whole side: a trained row, so that L2 is
    defined."""
    text = np.random.default_rng(8).normal(size=(6, 3))
    text[[1, 4]] = np.nan
    model = mmcpr.Tower(6, {"T": text}, None, dim=4)
    e, _, _ = model(torch.arange(6))
    torch.testing.assert_close(e[[1, 4]], model.fallback[[1, 4]])
    e.sum().backward()
    assert model.fallback.grad[[1, 4]].all() and not model.fallback.grad[[0, 2, 3, 5]].any()
    bare = mmcpr.Tower(6, {}, None, dim=4)
    e, _, _ = bare(torch.tensor([2, 5]))
    torch.testing.assert_close(e, bare.fallback[[2, 5]])


# --- The losses (Eq. 11, 16) --------------------------------------------------------------

def test_cima_against_its_formula():
    rng = np.random.default_rng(9)
    t, v = rng.normal(size=(2, 7, 5))
    norms = np.linalg.norm(t, axis=1)[:, None] * np.linalg.norm(v, axis=1)
    s = t @ v.T / (0.1 * norms)
    sigma, C = 1 / (1 + np.exp(-s)), np.eye(7)
    bce = -(C * np.log(sigma) + (1 - C) * np.log(1 - sigma)).sum() / 7
    probabilities = []
    for scores in (s, s.T):
        for p in range(7):
            probabilities.append(np.exp(scores[p, p]) / np.exp(scores[p]).sum())
    softmax = -np.mean(np.log(probabilities))
    for reading, want in (("bce", bce), ("softmax", softmax)):
        got = mmcpr.cima(torch.from_numpy(t), torch.from_numpy(v), 0.1, reading)
        assert got.item() == pytest.approx(want, rel=1e-10)


def small_model(rng, **options):
    pairs, text, image = shop(rng)
    train = matrix_of(pairs, 40, 30)
    image[2] = np.nan
    features = {"R": rng.normal(size=(40, 6)), "T": text, "V": image}
    return mmcpr.MMCPR(train, features, dim=8, **options), train


@pytest.mark.parametrize("lam", [0, 0.2, 1])
@pytest.mark.parametrize("bias", ["none", "global"])
def test_objective_is_the_weighted_sum(lam, bias):
    """Eq. 16 against its two terms over the whole block, value and gradients."""
    torch.manual_seed(0)
    model, train = small_model(np.random.default_rng(11), bias=bias)
    model = model.double()
    model.users.graph = ops.CoInteractionGraph(train, dtype=torch.float64)
    model.items.graph = ops.CoInteractionGraph(train.T.tocsr(), dtype=torch.float64)
    users, cima_items = torch.tensor([3, 1, 8]), model.items_with_pair()[:9]
    assert 2 not in model.items_with_pair() and len(model.items_with_pair()) == 29
    l1, l2, loss = mmcpr.objective(model, train, users, cima_items, 5.0, lam)
    parameters = list(model.parameters())
    got = torch.autograd.grad(loss, parameters, allow_unused=True)

    item, _, projected = model.items(torch.arange(30))
    user, _, _ = model.users(users)
    plain_l2 = ops.bce_plain(user, item, model.bias, train[users.numpy()]) / 5.0
    plain_l1 = mmcpr.cima(projected[cima_items, 0], projected[cima_items, 1])
    plain = lam * plain_l1 * 9 / 5.0 + (1 - lam) * plain_l2
    torch.testing.assert_close(loss, plain)
    assert l1.item() == pytest.approx(plain_l1.item() if lam > 0 else 0)
    assert l2.item() == pytest.approx(plain_l2.item() if lam < 1 else 0)
    names = [name for name, _ in model.named_parameters()]
    moved = set()
    for name, gradient, want in zip(names, got, torch.autograd.grad(plain, parameters)):
        gradient = torch.zeros_like(want) if gradient is None else gradient
        torch.testing.assert_close(gradient, want, msg=name)
        if gradient.any():
            moved.add(name)
    if lam == 1:  # only the two projections of CIMA are trained
        assert moved == {f"items.W.{m}.{part}" for m in "TV" for part in ("weight", "bias")}


def test_popularity_loss_is_the_bce_of_the_log_odds():
    cells = binary(np.random.default_rng(15), 30, 12, 0.3).toarray()
    # Nobody's item and everybody's have no loss.
    train = sp.csr_matrix(np.hstack([cells, np.zeros((30, 1)), np.ones((30, 1))]))
    p = torch.from_numpy(cells.mean(0)).double()
    log_odds = (p / (1 - p)).log().expand(30, -1)
    target = torch.from_numpy(cells).double()
    loss = F.binary_cross_entropy_with_logits(log_odds, target, reduction="sum")
    assert mmcpr.popularity_loss(train) == pytest.approx(loss.item() / train.nnz, rel=1e-6)


@pytest.mark.parametrize("batch", [40, 17])
def test_reported_bce_is_per_positive_whatever_the_last_block(batch):
    """The loss printed at a learning rate of nothing is L2 of the whole of R per positive."""
    pairs, text, image = shop(np.random.default_rng(17))
    train = matrix_of(pairs, 40, 30)
    args = mmcpr.arguments().parse_args(
        ["--lr", "1e-12", "--epochs", "1", "--batch", str(batch), "--bias", "none"])
    parts = Namespace(train=train, valid=sp.csr_matrix((40, 30)))
    user, item, report = mmcpr.pretrain(parts, {"T": text, "V": image}, args)
    tables = torch.from_numpy(user).double(), torch.from_numpy(item).double()
    plain = ops.bce_plain(*tables, torch.zeros(30), train) / train.nnz
    assert report["losses"]["bce"] == pytest.approx(plain.item(), rel=1e-5)


def test_alignment_of_collapsed_towers_is_no_success():
    """Where all vectors are one, every image ties with the true one: text finds nothing."""
    model, _ = small_model(np.random.default_rng(18))
    for name in "TV":
        torch.nn.init.zeros_(model.items.W[name].weight)
        torch.nn.init.ones_(model.items.W[name].bias)
    found = mmcpr.alignment(model, model.items_with_pair())
    assert found["text_to_image_recall@10"] == 0


# --- The parts of the method do what they should, where the truth is planted --------------

def test_cima_aligns_and_its_absence_does_not():
    """Text and image are noisy views of one vector per item: CIMA finds most pairs among 300."""
    rng = np.random.default_rng(15)
    pairs, _, _ = shop(rng, n_users=60, n_items=300, tastes=8)
    truth, views = rng.normal(size=(300, 8)), []
    for _ in range(2):
        views.append(truth @ rng.normal(size=(8, 12)) + 0.3 * rng.normal(size=(300, 12)))
    parts = Namespace(train=matrix_of(pairs, 60, 300), valid=sp.csr_matrix((60, 300)))
    found = {}
    for lam in ("0", "0.2"):
        args = mmcpr.arguments().parse_args(
            ["--lam", lam, "--epochs", "60", "--lr", "0.01", "--dim", "16"])
        _, _, report = mmcpr.pretrain(parts, dict(zip("TV", views)), args)
        found[lam] = report["alignment"]
    assert found["0"]["text_to_image_recall@10"] < 0.3
    assert found["0.2"]["text_to_image_recall@10"] > 0.8
    assert found["0.2"]["cosine_true"] - found["0.2"]["cosine_false"] > 0.5


def test_contents_rank_items_nobody_trained_on():
    """Planted tastes show in text and image: alone they rank new items far above chance."""
    rng = np.random.default_rng(16)
    pairs, text, image = shop(rng, n_users=120, n_items=90, tastes=4)
    is_new = pairs[:, 1] >= 70
    train, test = matrix_of(pairs[~is_new], 120, 90), matrix_of(pairs[is_new], 120, 90)
    args = mmcpr.arguments().parse_args(
        ["--modalities", "TV", "--epochs", "150", "--lr", "0.01", "--dim", "16"])
    parts = Namespace(train=train, valid=sp.csr_matrix((120, 90)))
    user, item, _ = mmcpr.pretrain(parts, {"T": text, "V": image}, args)
    not_new = sp.csr_matrix(np.tile((np.arange(90) < 70) * 1.0, (120, 1)))

    def recall(user, item):
        return metrics.evaluate(user, item, not_new, test, (5,))["recall@5"]
    chance = recall(torch.randn(120, 4), torch.randn(90, 4))
    assert recall(torch.from_numpy(user), torch.from_numpy(item)) > 2.5 * chance


# --- Fine-tuning: the start, and when it stops --------------------------------------------

def test_initial_scale():
    rng = np.random.default_rng(14)
    train = binary(rng, 50, 30, 0.1)
    item = rng.normal(size=(30, 16)).astype(np.float32)
    given = {"user": 2 * rng.normal(size=(50, 16)).astype(np.float32), "item": item}

    def rms(table):
        return table.square().mean().sqrt().item()
    xavier = (2 / 66) ** 0.5, (2 / 46) ** 0.5
    for scale, want in (("xavier", xavier), (0.3, (0.3, 0.3))):
        for init in (given, {"item": item}):
            user, table = finetune.initial_tables(init, train, 16, scale)
            assert (rms(user), rms(table)) == pytest.approx(want, rel=1e-5)
            factor = want[1] / np.sqrt(np.mean(item ** 2))
            np.testing.assert_allclose(table.numpy() / item, factor, rtol=1e-4)
    _, as_is = finetune.initial_tables(given, train, 16)
    np.testing.assert_array_equal(as_is, item)
    random, _ = finetune.initial_tables(None, train, 16)
    assert random.abs().max() <= (6 / 66) ** 0.5
    assert rms(random) == pytest.approx(xavier[0], rel=0.1)


@pytest.mark.parametrize("curve, evaluations", [
    ([1, 2, 3, 3, 3, 3, 3], 6),              # three in a row without a new best
    ([5, 4, 3, 4, 5, 6, 6, 6, 6, 6], 9),     # falls, then rises above its start
    ([5, 4, 3, 2, 1, 0, 0], 6),              # falls for good
    ([5, 4, 3, 2, 2.5, 1, 1.5, 0], 6),       # falls for good with upticks
    ([1, 4, 3, 2, 3, 5], 5)])                # rises and falls without reaching the old low
def test_patience(curve, evaluations):
    stops = [n for n in range(1, len(curve) + 1) if finetune.out_of_patience(curve[:n], 3)]
    assert stops[0] == evaluations


# --- The command lines, end to end on tiny data -------------------------------------------

QUICK = ("--epochs", 6, "--eval-every", 2, "--dim", 8, "--device", "cpu")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder data set and the emb.npz of a short pre-training, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    assert call(mmcpr.main, "--data", "shop", *QUICK) == 0
    return tmp_path


def test_pretrain_then_finetune(trained, capsys):
    """emb.npz needs no --data; metrics, final embeddings and recs.csv agree with each other."""
    arrays = data.load_embeddings("emb.npz")
    assert arrays["user"].shape == (40, 8) and arrays["item"].shape == (30, 8)
    assert arrays["item"].dtype == np.float32 and list(arrays["item_ids"][:2]) == ["i0", "i1"]
    assert arrays["meta"]["data"]["valid"] == 0.1
    assert set(arrays["meta"]["report"]["attention"]["item"]) == set("TVG")
    (trained / "elsewhere").mkdir()
    os.chdir(trained / "elsewhere")
    assert call(finetune.main, "--init", "../emb.npz", "--epochs", 6, "--candidates", 4,
                "--metrics", "m.json", "--out", "final.npz", "--recommend", "recs.csv") == 0
    result = json.loads(Path("m.json").read_text())
    assert {"data", "init", "seed", "scale", "epoch", "epochs_run", "valid"} <= set(result)
    names = {f"{name}@{k}" for name in ("recall", "ndcg") for k in (20, 40, 60)}
    assert set(result["test"]) == names

    final = data.load_embeddings("final.npz")
    columns = data.read_csv("recs.csv", ("user", "rank", "item", "score"))
    dataset = data.load("../shop", contents=False)
    parts = data.split_dataset(dataset)
    user_row = {name: row for row, name in enumerate(dataset.user_ids)}
    item_row = {name: row for row, name in enumerate(dataset.item_ids)}
    hits = np.zeros(40)
    for user, item, score in zip(columns["user"], columns["item"], columns["score"]):
        u, i = user_row[user], item_row[item]
        assert not parts.train[u, i] and not parts.valid[u, i]
        expected = final["user"][u] @ final["item"][i]
        assert expected == pytest.approx(float(score), rel=1e-3, abs=1e-5)
        hits[u] += parts.test[u, i]
    n_test = np.diff(parts.test.indptr)
    recall = np.mean(hits[n_test > 0] / n_test[n_test > 0])
    assert recall == pytest.approx(result["test"]["recall@20"])
    assert "recall@20" in capsys.readouterr().out


def test_same_seed_same_bytes(trained):
    """Same seed, same machine, same result, in another process too; another seed another one."""
    tables = data.load_embeddings("emb.npz")
    command = [sys.executable, HERE / "mmcpr.py", "--data", "shop", *QUICK, "--out", "again.npz"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    again = data.load_embeddings("again.npz")
    assert np.array_equal(tables["user"], again["user"])
    assert np.array_equal(tables["item"], again["item"])
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--seed", 1, "--out", "other.npz") == 0
    assert not np.array_equal(tables["item"], data.load_embeddings("other.npz")["item"])

    repeats = []
    for _ in range(2):
        assert call(finetune.main, "--init", "emb.npz", "--epochs", 3, "--seeds", 0, 1,
                    "--metrics", "m.json") == 0
        summary = json.loads(Path("m.json").read_text())
        for result in summary["runs"]:
            del result["seconds"]
        repeats.append(summary["runs"])
    assert repeats[0] == repeats[1] and repeats[0][0]["history"] != repeats[0][1]["history"]
    values = [result["test"]["ndcg@40"] for result in summary["runs"]]
    assert summary["mean"]["ndcg@40"] == pytest.approx(np.mean(values))
    assert summary["std"]["ndcg@40"] == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize("subset", ["R", "T", "V", "G", "TV", "RG", "RTVG"])
def test_any_subset_of_modalities(trained, subset):
    """Figure 3: every subset trains; a side that is left with nothing has rows of its own."""
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--modalities", subset,
                "--out", "e.npz") == 0
    arrays = data.load_embeddings("e.npz")
    attention = arrays["meta"]["report"]["attention"]
    assert set(attention["user"]) == set(subset) & set("RG")
    assert set(attention["item"]) == set(subset) & set("TVG")
    assert np.isfinite(arrays["user"]).all()


def test_lambda_one_trains_the_alignment_alone(trained):
    """Table 3's w/o BCE: users stay as drawn, held-out items' CIMA loss chooses the epoch."""
    for epochs, out in ((6, "e.npz"), (2, "f.npz")):
        assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", epochs, "--lam", 1,
                    "--out", out) == 0
    one, two = data.load_embeddings("e.npz"), data.load_embeddings("f.npz")
    assert np.array_equal(one["user"], two["user"])
    assert not np.array_equal(one["item"], two["item"])
    report = one["meta"]["report"]
    best = min(report["history"], key=lambda point: point["held_out_cima"])
    assert report["epoch"] == best["epoch"]


def test_without_validation_the_last_epoch_is_taken(trained):
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--valid", 0, "--out", "e.npz") == 0
    report = data.load_embeddings("e.npz")["meta"]["report"]
    assert report["epoch"] == 6 and report["valid"]["recall@20"] is None
    assert call(finetune.main, "--init", "e.npz", "--epochs", 3, "--metrics", "m.json") == 0
    assert json.loads(Path("m.json").read_text())["epoch"] == 3


def test_initialiser_of_items_alone(trained):
    """An emb.npz without `user`: users start as in a random start, items from the file."""
    arrays = dict(np.load("emb.npz"))
    del arrays["user"]
    np.savez("items.npz", **arrays)
    for init, out in (("items.npz", "f.npz"), ("random", "r.npz")):
        assert call(finetune.main, "--init", init, "--data", "shop", "--dim", 8, "--epochs", 0,
                    "--layers", 0, "--out", out) == 0
    final, random = data.load_embeddings("f.npz"), data.load_embeddings("r.npz")
    assert np.array_equal(final["item"], arrays["item"])
    assert np.array_equal(final["user"], random["user"])


def test_data_that_has_none_of_the_modalities_asked_for(tmp_path, monkeypatch):
    """--modalities R without reviews: every node has a row of its own, and L2 trains them."""
    monkeypatch.chdir(tmp_path)
    pairs, _, _ = shop(np.random.default_rng(0))
    (tmp_path / "bare").mkdir()
    run.write_csv(tmp_path / "bare/interactions.csv", ("user", "item"), pairs)
    assert call(mmcpr.main, "--data", "bare", "--modalities", "R", *QUICK) == 0
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 0) == 0
    assert call(mmcpr.main, "--data", "bare", "--lam", 1, *QUICK) == 2


# --- What may be looked at, and when ------------------------------------------------------

def test_held_out_reviews_never_reach_the_embeddings(tmp_path, monkeypatch):
    """Other vectors for all held-out interactions' reviews leave emb.npz as it is, bit for bit."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    tables = []
    for _ in range(2):
        assert call(mmcpr.main, "--data", "shop", *QUICK) == 0
        tables.append(data.load_embeddings("emb.npz"))
        review = np.load("shop/review.npy")
        review[~data.split_dataset(data.load("shop")).in_train] = 9
        np.save("shop/review.npy", review)
    for side in ("user", "item"):
        assert np.array_equal(tables[0][side], tables[1][side])


def test_validation_chooses_the_epoch_and_test_is_ranked_once(trained, monkeypatch):
    """Both scripts rank validation alone until the end, and hand over its best epoch."""
    parts = data.split_dataset(data.load("shop", contents=False))
    ranked, evaluate = [], metrics.evaluate

    def spy(user, item, seen, truth, ks):
        for name in ("valid", "test"):
            if (truth != getattr(parts, name)).nnz == 0:
                ranked.append(name)
        return evaluate(user, item, seen, truth, ks)

    monkeypatch.setattr(metrics, "evaluate", spy)
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", 40, "--lr", 0.1,
                "--out", "e.npz") == 0
    assert set(ranked) == {"valid"}
    ranked.clear()
    assert call(finetune.main, "--init", "e.npz", "--epochs", 30, "--eval-every", 2,
                "--lr", 0.1, "--scale", "xavier", "--metrics", "m.json", "--out", "f.npz") == 0
    assert ranked.count("test") == 1 and ranked[-1] == "test"
    pretrained, final = data.load_embeddings("e.npz"), data.load_embeddings("f.npz")
    histories = ((pretrained, pretrained["meta"]["report"]["history"]),
                 (final, json.loads(Path("m.json").read_text())["history"]))
    for arrays, history in histories:
        values = [point["recall@20"] for point in history]
        assert values[-1] < max(values), "the last epoch is the best: the test shows nothing"
        user, item = torch.from_numpy(arrays["user"]), torch.from_numpy(arrays["item"])
        got = evaluate(user, item, parts.train, parts.valid, (20,))["recall@20"]
        assert got == pytest.approx(max(values))


def test_finetuning_steps_see_training_pairs_and_negatives(trained, monkeypatch):
    """An epoch is each training pair once, the last partial batch too; candidates are items
    outside the user's training."""
    train = data.split_dataset(data.load("shop", contents=False)).train
    pairs, loss = [], finetune.mixgcf_loss

    def spy(model, users, pos_items, candidates, alpha, l2):
        assert alpha.shape == (4, len(users)) and l2 == 0.5
        pairs.extend(zip(users.tolist(), (pos_items - 40).tolist()))
        assert not train.toarray()[users[:, None], candidates - 40].any()
        return loss(model, users, pos_items, candidates, alpha, l2)

    monkeypatch.setattr(finetune, "mixgcf_loss", spy)
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 1, "--batch", 50,
                "--candidates", 5, "--l2", 0.5) == 0
    users, items = train.nonzero()
    assert sorted(pairs) == sorted(zip(users.tolist(), items.tolist()))


def test_epochs_are_those_of_a_plain_trainer(trained, monkeypatch):
    """Every epoch's loss is that of MixGCF written out, with plain Adam, given the same draws."""
    steps, loss = [], finetune.mixgcf_loss

    def spy(model, users, pos_items, candidates, alpha, l2):
        steps.append((model.E0.detach().clone(), users, pos_items, candidates, alpha))
        return loss(model, users, pos_items, candidates, alpha, l2)

    monkeypatch.setattr(finetune, "mixgcf_loss", spy)
    assert call(finetune.main, "--data", "shop", "--epochs", 6, "--eval-every", 1,
                "--batch", 50, "--lr", 0.05, "--candidates", 5, "--metrics", "m.json") == 0
    train = data.split_dataset(data.load("shop", contents=False)).train
    E0 = torch.nn.Parameter(steps[0][0])
    P = ops.sparse_tensor(ops.normalised_adjacency(train)).to_dense()
    optimizer = torch.optim.Adam([E0], lr=0.05, foreach=False, fused=False)
    losses = []
    for _, users, pos_items, candidates, alpha in steps:
        layers = [E0]
        for _ in range(3):
            layers.append(P @ layers[-1])
        picked = ops.hard_negatives_plain(layers, users, pos_items, candidates, alpha)
        layers = torch.stack(layers)                                               # [L+1, n, d]
        e_pos, a = layers[:, pos_items], alpha[:, :, None]
        e_neg = a * e_pos + (1 - a) * layers[torch.arange(4)[:, None], picked]
        value = finetune.bpr_loss(layers[:, users], e_pos, e_neg, 1e-4)
        optimizer.zero_grad()
        (value / len(users)).backward()
        optimizer.step()
        losses.append(value.item())
    per_epoch = -(-train.nnz // 50)
    want = []
    for start in range(0, len(losses), per_epoch):
        want.append(sum(losses[start:start + per_epoch]) / train.nnz)
    history = json.loads(Path("m.json").read_text())["history"]
    assert [point["loss"] for point in history][1:] == pytest.approx(want, rel=1e-4)
    assert want[-1] < 0.95 * want[0]


def test_pretraining_patience_starts_after_the_plateau(trained, monkeypatch):
    """However late the plateau is left, patience counts from there, not from a best on it."""
    # The first evaluation stays the best.
    monkeypatch.setattr(metrics, "evaluate", lambda *args: {"recall@20": 0.5})
    epochs_run = {}
    for height in (1e9, -1):  # left at once; never
        monkeypatch.setattr(mmcpr, "popularity_loss", lambda R: height)
        assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", 30, "--patience", 10,
                    "--out", "e.npz") == 0
        epochs_run[height] = data.load_embeddings("e.npz")["meta"]["report"]["epochs_run"]
    assert epochs_run == {1e9: 12, -1: 30}


def test_weight_decay_falls_with_the_number_of_users(trained, monkeypatch):
    """Adam gets --weight-decay / n_users (40 here), times the weight of BCE in the loss."""
    given, Adam = [], torch.optim.Adam

    def spy(*args, **options):
        given.append(options["weight_decay"])
        return Adam(*args, **options)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    for flags in ((), ("--weight-decay", 2), ("--lam", 0), ("--lam", 0.5)):
        assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", 1, *flags,
                    "--out", "e.npz") == 0
    assert given == pytest.approx([0.6 / 40, 1.6 / 40, 0.75 / 40, 0.375 / 40])


# --- What is refused ----------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (("--split-seed", 1), "other training interactions"),
    (("--valid", 0), "other training interactions"),
    (("--data", "other"), "other training interactions"),
    (("--dim", 16), "8 wide"),
    (("--lr", -1), "--lr")])
def test_finetune_refuses(trained, capsys, argv, words):
    """An initialiser of another split, other data or another width."""
    write_shop(trained / "other", seed=5)
    assert call(finetune.main, "--init", "emb.npz", *argv) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("main, argv", [
    (mmcpr.main, ("--modalities", "TX")), (mmcpr.main, ("--lam", "1.5")),
    (mmcpr.main, ("--data-dir",)), (finetune.main, ("--scale", "-1")),
    (finetune.main, ("--seeds", "x"))])
def test_flags_out_of_range_are_refused(main, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("main, argv, words", [
    (mmcpr.main, ("--lr", "nan"), "--lr"),
    (mmcpr.main, ("--batch", 1), "--batch"),
    (mmcpr.main, ("--out", ""), "output path"),
    (mmcpr.main, ("--epochs", 1, "--lr", 1e30), "lower --lr"),
    (finetune.main, ("--l2", "nan"), "--l2"),
    (finetune.main, ("--epochs", 1, "--valid", 0, "--lr", 1e30), "lower --lr"),
    (finetune.main, ("--out", "x", "--metrics", "./x"), "given twice"),
    (finetune.main, ("--seeds", 2, 2), "names a seed twice"),
    (finetune.main, ("--init", "emb.npz", "--out", "./emb.npz"), "would overwrite the tables"),
    (finetune.main, ("--init", "emb.npz", "--metrics", "emb.npz"), "would overwrite the tables")])
def test_flags_that_cannot_work(trained, capsys, main, argv, words):
    assert call(main, "--data", "shop", *argv) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_lambda_one_needs_pairs_to_hold_out(trained, capsys):
    text = np.load("shop/item_text.npy")
    text[10:] = np.nan
    np.save("shop/item_text.npy", text)
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--lam", 1) == 2
    assert "only 7 items have both" in capsys.readouterr().err


def test_numbers_blow_up_in_one_line(trained, capsys):
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--lr", 1e30) == 2
    assert "lower --lr" in capsys.readouterr().err


def test_runs_that_went_wrong_say_so(trained, interrupted, capsys):
    """A loss no better than popularity's, fine-tuning that only made it worse, tables of an
    interrupted pre-training."""
    flags = ("--data", "shop", "--dim", 8, "--eval-every", 1)
    hints = ("hardly better than popularity", "try a lower --lr")
    capsys.readouterr()
    for main, more in ((mmcpr.main, ("--weight-decay", 0, "--lr", 0.1)), (finetune.main, ())):
        assert call(main, *flags, "--epochs", 60, "--valid", 0, *more) == 0
    out = capsys.readouterr().out
    assert "seed 0, epoch 60 of 60" in out and not any(hint in out for hint in hints)
    assert call(mmcpr.main, *flags, "--lr", 10, "--epochs", 3, "--out", "wild.npz") == 0
    assert hints[0] in capsys.readouterr().out
    assert call(finetune.main, "--init", "wild.npz", "--lr", 1e-9, "--epochs", 2) == 0
    assert hints[1] in capsys.readouterr().out
    interrupted(mmcpr.main, *flags, "--epochs", 9, "--out", "cut.npz", after=4)
    assert call(finetune.main, "--init", "cut.npz", "--epochs", 1) == 0
    assert "cut.npz: of a pre-training that was interrupted" in capsys.readouterr().out


# --- Outputs ------------------------------------------------------------------------------

@pytest.mark.parametrize("main, flag", [
    (mmcpr.main, "--out"), (finetune.main, "--metrics"), (finetune.main, "--recommend")])
@pytest.mark.parametrize("path", ["shop", "shop/items.csv/x", "pipe"])
def test_outputs_are_checked_before_the_work(tmp_path, capsys, monkeypatch, main, flag, path):
    """A folder, a path below a file, or what renaming would replace, like /dev/null."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    monkeypatch.setattr(data, "load", None)  # nothing may be loaded before
    os.mkfifo("pipe")
    assert call(main, "--data", "shop", flag, path) == 2
    assert "choose another output path" in capsys.readouterr().err


def test_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    run.write_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere/file").read_bytes() == b"new"


def test_link_to_the_tables_it_starts_from_is_refused(trained, capsys):
    """It would be written through; the same for two outputs that are one file."""
    before = Path("emb.npz").read_bytes()
    Path("link.npz").symlink_to("emb.npz")
    assert call(finetune.main, "--init", "emb.npz", "--out", "link.npz", "--epochs", 1) == 2
    assert "would overwrite the tables" in capsys.readouterr().err
    assert Path("emb.npz").read_bytes() == before
    assert call(finetune.main, "--out", "emb.npz", "--metrics", "link.npz") == 2
    assert "given twice" in capsys.readouterr().err


def test_output_that_nobody_reads(tmp_path):
    """`python data.py | head -0`: no traceback."""
    write_shop(tmp_path / "shop")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, HERE / "data.py", "--data", "shop"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_next_commands_can_be_typed(trained, capsys):
    """Each script ends with the command that comes next."""
    assert call(data.main, "--data", "shop") == 0
    assert "next: python mmcpr.py --data" in capsys.readouterr().out
    assert call(mmcpr.main, "--data", "shop", *QUICK) == 0
    assert "next: python finetune.py --init emb.npz\n" in capsys.readouterr().out
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 1) == 0
    assert f"next: python finetune.py --init random --data {trained / 'shop'}" in \
        capsys.readouterr().out


# --- Interruptions ------------------------------------------------------------------------

RUNS = {
    "mmcpr.py": ("--data", "shop", "--dim", "8", "--batch", "15", "--epochs", "150",
                 "--patience", "150", "--eval-every", "4"),
    "finetune.py": ("--data", "shop", "--dim", "8", "--batch", "50", "--epochs", "60",
                    "--patience", "60", "--seeds", "3", "4", "--eval-every", "3",
                    "--metrics", "m.json")}


def outcome(folder):
    """All that a run has found, but for the time it took."""
    arrays = data.load_embeddings(folder / "result.npz")
    reports = [arrays["meta"].get("report", {})]
    if (folder / "m.json").exists():
        reports = json.loads((folder / "m.json").read_text())["runs"]
    for report in reports:
        report.pop("seconds", None)
        report.pop("data", None)
    return arrays["user"], arrays["item"], reports


@pytest.mark.parametrize("script", ["mmcpr.py", "finetune.py"])
def test_interrupted_run_goes_on_to_the_same_bits(tmp_path, script):
    """The real command, killed with -9 at whatever moment, resumed, sent SIGTERM, resumed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, HERE / script, *RUNS[script], "--out", "result.npz"]
    for folder in (whole, cut):
        folder.mkdir()
        write_shop(folder / "shop")

    def start(folder, *flags):
        return subprocess.Popen([*command, *flags], cwd=folder, env=ONE_THREAD,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def last_checkpoint():
        return max((path.stat().st_mtime_ns for path in cut.glob("*.ckpt")), default=0)

    reference = start(whole)
    for kill in (signal.SIGKILL, signal.SIGTERM):
        before = last_checkpoint()
        process = start(cut, "--resume", "--checkpoint-every", "0")
        while process.poll() is None and last_checkpoint() == before:
            time.sleep(0.01)
        time.sleep(0.1)  # some epochs on, in the middle of whatever it is doing
        process.send_signal(kill)
        out, err = process.communicate(timeout=60)
        assert (b"goes on after epoch" if before else b"starting from the beginning") in out
        assert b"Traceback" not in err
        assert process.returncode == (2 if kill == signal.SIGTERM else -9), err
        assert kill != signal.SIGTERM or b"--resume goes on" in err
        assert len(list(cut.glob("*.ckpt"))) == 1
    assert start(cut, "--resume").wait(60) == 0 and reference.wait(60) == 0
    assert not [*cut.glob("*.ckpt"), *cut.glob(".*.tmp")]
    user, item, reports = outcome(whole)
    user_cut, item_cut, reports_cut = outcome(cut)
    assert np.array_equal(user, user_cut) and np.array_equal(item, item_cut)
    assert reports == reports_cut


@pytest.mark.parametrize("script, out", [("mmcpr.py", "--out"), ("finetune.py", "--metrics")])
def test_ctrl_c_keeps_the_best_epoch(tmp_path, script, out):
    """SIGINT during training: the best epoch so far is written, one line, exit code 2."""
    write_shop(tmp_path / "shop")
    command = [sys.executable, HERE / script, "--data", "shop", out, "result",
               "--epochs", "1000000", "--patience", "1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    progress = b""
    while b"recall@20" not in progress:  # the bar shows a validation: there is one to keep
        part = os.read(process.stderr.fileno(), 4096)
        assert part, progress
        progress += part
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and b"error: interrupted" in err and b"Traceback" not in err
    assert (tmp_path / "result").exists()


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


TWO_EPOCHS = ("--data", "shop", "--epochs", 2, "--eval-every", 1, "--out", "e.npz")


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main])
@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:500]),
    lambda path: path.write_bytes(b""),
    lambda path: torch.save({"other": 1}, path),
    lambda path: torch.save({"results": [], "training": {"model": {}}}, path)])
def test_damaged_checkpoint(interrupted, capsys, main, damage):
    """One line. Without --resume the run says that a checkpoint lies there, and starts anew."""
    folder = interrupted(main, *TWO_EPOCHS)
    path, = folder.glob("*.ckpt")
    damage(path)
    assert call(main, *TWO_EPOCHS, "--resume") == 2
    err = capsys.readouterr().err
    assert "not a checkpoint of this version, or damaged; delete it" in err
    assert call(main, *TWO_EPOCHS) == 0
    assert "--resume would continue it" in capsys.readouterr().out and not path.exists()


@pytest.mark.parametrize("main, change", [
    (mmcpr.main, ("--lr", 0.002)), (mmcpr.main, "text"), (finetune.main, ("--lr", 0.002)),
    (finetune.main, "init"), (finetune.main, ("--split-seed", 1))])
def test_checkpoint_of_another_run_is_left_alone(interrupted, capsys, main, change):
    """Other options, features or initial tables: started anew, and nothing is deleted."""
    flags = [*TWO_EPOCHS, "--init", "emb.npz"] if change == "init" else [*TWO_EPOCHS]
    folder = interrupted(main, *flags)
    path, = folder.glob("*.ckpt")
    if change == "text":
        features = folder / "shop/item_text.npy"
        np.save(features, np.load(features)[::-1])
    elif change == "init":
        assert call(mmcpr.main, "--data", "shop", *QUICK, "--seed", 5) == 0
    else:
        flags += change
    assert call(main, *flags, "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().out and path.exists()


def test_finished_seeds_are_not_lost_nor_claimed(interrupted, capsys):
    """Interrupted in the second seed: the first is kept; a file that only its run could have
    written is not promised."""
    flags = ("--data", "shop", "--epochs", 2, "--seeds", 0, 1, "--dim", 8, "--metrics", "m.json")
    interrupted(finetune.main, *flags, after=3)
    runs = json.loads(Path("m.json").read_text())["runs"]
    assert [result["seed"] for result in runs] == [0, 1]
    assert call(finetune.main, *flags, "--recommend", "recs.csv", "--resume") == 2
    assert "recs.csv: belongs to seed 0" in capsys.readouterr().err
    assert call(finetune.main, *flags, "--resume") == 0
    runs = json.loads(Path("m.json").read_text())["runs"]
    assert [(result["seed"], result["interrupted"]) for result in runs] == [(0, False), (1, False)]


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main])
def test_resuming_is_promised_only_where_a_checkpoint_lies(interrupted, capsys, monkeypatch, main):
    interrupted(main, *TWO_EPOCHS)
    assert "the same command with --resume goes on" in capsys.readouterr().err
    for path in Path().glob("*.ckpt"):
        path.unlink()
    monkeypatch.setattr(run.Checkpoint, "write", lambda self: None)
    interrupted(main, *TWO_EPOCHS)
    assert "no checkpoint yet; the same command starts anew" in capsys.readouterr().err


def test_checkpoint_that_cannot_be_written_does_not_end_the_run(trained, capsys, monkeypatch):
    def full(*args):
        raise RuntimeError("enforce fail: disk full")
    monkeypatch.setattr(torch, "save", full)
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--checkpoint-every", 0) == 0
    assert "not saved (enforce fail: disk full)" in capsys.readouterr().err


def start_two(script, flags, torchrun):
    """Two CPU processes that work together: by torchrun, or quicker, as torchrun starts them."""
    if torchrun:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        environments = [ONE_THREAD]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher, environments = (), []
        for rank in "01":
            environments.append(ONE_THREAD | {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    command = [sys.executable, *launcher, HERE / script, *flags]
    return [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for environment in environments]


@pytest.mark.parametrize("script, options, torchrun", [
    ("mmcpr.py", ("--batch", "13"), True),
    ("mmcpr.py", ("--lam", "1", "--cima", "bce"), False),
    ("finetune.py", ("--batch", "53", "--metrics", "1.json"), False)])
def test_two_processes_get_what_one_gets(trained, script, options, torchrun):
    """Losses, validation and embeddings of one process, to rounding; one of the two reports."""
    flags = ("--data", "shop", "--dim", "8", "--epochs", "6", "--eval-every", "2", *options)
    both = [flag.replace("1.json", "2.json") for flag in flags]
    processes = start_two(script, [*both, "--out", "2.npz"], torchrun)
    main = mmcpr.main if script == "mmcpr.py" else finetune.main
    assert call(main, *flags, "--out", "1.npz") == 0
    printed = ""
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        printed += out
    assert printed.count("next: python") == 1
    tables, histories = [], []
    for k in (1, 2):
        tables.append(data.load_embeddings(f"{k}.npz"))
        report = tables[-1]["meta"].get("report")
        if script == "finetune.py":
            report = json.loads(Path(f"{k}.json").read_text())
        histories.append(report["history"])
    for side in ("user", "item"):
        np.testing.assert_allclose(tables[1][side], tables[0][side], rtol=1e-4, atol=1e-6)
    assert len(histories[0]) == len(histories[1]) >= 3
    for point, other in zip(*histories):
        point = {name: value or 0 for name, value in point.items()}
        other = {name: value or 0 for name, value in other.items()}
        assert other == pytest.approx(point, rel=1e-4)


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

TOO_FEW = csv_text("user,item", [(f"u{n // 4}", f"i{n % 4}") for n in range(12)])


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
     "interactions.csv, row 3: 3 fields, the header has 2"),
    ("interactions.csv", "user,item\nu,i0\nu\n",
     "interactions.csv, row 3: 1 fields"),
    ("interactions.csv", b"user,item\nu,i0\nu,caf\xe9\nu,i1\n",
     "interactions.csv, row 3: not UTF-8; save"),
    ("interactions.csv", "user;item\nu;i0\n",
     "row 1: no column 'user'; separate the columns by commas"),
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
     "interactions.csv: data row 2 has item 'i9', which is not in items.csv"),
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
    ("1.0\t2", "1.0", "x.inter, row 4: 3 fields"),
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
    assert "nothing to train on: no row has x_label 0" in only_error(capsys)


def test_mmrec_labels_without_a_test_are_told_as_such(tmp_path, capsys):
    """No 2 among the published labels: the number of a user's interactions is not the reason."""
    inter = INTER.replace("1.0\t2", "1.0\t1")
    assert prepare(put(tmp_path / "x", {"x.inter": inter})) == 2
    message = only_error(capsys)
    assert "nothing to test" in message
    assert "5 interactions" not in message


@pytest.mark.parametrize("name, words", [
    ("nowhere", "--data nowhere: no such folder, and not one of "
                "demo, vg, tg, sharee, amazon:<Category>"),
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
            "shop: interactions.csv has user, item (not read: reveiw, rating)",
            "shop: items.csv has item, image (not read: txt)",
        ]


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
    """Also where the name needs quotes; without --data it is the demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.write_demo, "__defaults__", (40, 30, 16))
    put(tmp_path / "my shop", GOOD)
    for argv, name in ((("--data", "my shop", "--encoder", "tiny"), "'my shop'"), ((), "demo")):
        assert call(data.main, *argv) == 0
        assert capsys.readouterr().out.endswith(f"next: python mmcpr.py --data {name}\n")


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
    line = "image: 256-d; 7 of 17 items have none (6 images missing or unreadable)"
    assert line in capsys.readouterr().out


def test_open_image_composes_transparency_and_caps_pixels(monkeypatch):
    clear = io.BytesIO(png("RGBA", (16, 16), (200, 0, 0, 0)))
    monkeypatch.setattr(encode, "MAX_PIXELS", 256)
    assert np.all(np.asarray(encode.open_image(clear)) == 255)
    monkeypatch.setattr(encode, "MAX_PIXELS", 255)
    clear.seek(0)
    assert encode.open_image(clear) is None


def test_damaged_avif_is_left_out():
    """Pillow's AVIF reader raises RuntimeError."""
    file = io.BytesIO()
    try:
        Image.new("RGB", (32, 32), "red").save(file, "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    whole = file.getvalue()
    assert encode.open_image(io.BytesIO(whole)) is not None
    for length in range(60, len(whole), 7):
        cut_off = whole[:length]
        overwritten = cut_off + b"\xff\xff\xff" + whole[length + 3:]
        for damaged in (cut_off, overwritten):
            encode.open_image(io.BytesIO(damaged))  # None or a picture, but no exception


# --- The split ------------------------------------------------------------------------------

@pytest.mark.parametrize("valid", [0, 0.1, 0.5, 1])
def test_split_counts(valid):
    """floor(n_u / 5) to test, round(valid * training) to validation, and each user keeps one."""
    users = np.repeat(np.arange(40), 1 + np.arange(40) % 13)
    users = np.random.default_rng(3).permutation(users)
    part, n = data.split(users, 1, valid), np.bincount(users)
    assert np.array_equal(np.bincount(users[part == data.TEST], minlength=40), n // 5)
    assert np.bincount(users[part == data.TRAIN], minlength=40).min() >= 1
    n_rest = len(users) - np.sum(n // 5)
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
        data.Dataset("x", Path(), ids[:2], ids, users, np.array(items), labels))


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
    demo.write_demo(folder, 60, 50)
    paths = sorted(folder.rglob("*.*"))
    files = hashlib.sha256()
    for path in paths:
        files.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    tiny = encode.TinyEncoder()
    texts = tiny.text((folder / "items.csv").read_text().splitlines())
    pictures = [encode.open_image(path) for path in sorted(folder.glob("images/*"))]
    rows = hashlib.sha256(texts.tobytes() + tiny.image(pictures).tobytes())
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
    image = tiny.image([Image.new("RGB", (9, 5), colour) for colour in ("red", "red", "blue")])
    cosine = image @ image.T
    assert np.diag(cosine) == pytest.approx(1)
    assert cosine[0, 1] == pytest.approx(1)
    assert cosine[0, 2] < 0.5


# --- The feature cache ----------------------------------------------------------------------

TEXTS = [f"word{n} word{n % 3}" if n % 5 else "" for n in range(11)]


def bare_dataset(folder):
    """A data set that is a name and a folder."""
    ids, index = np.array(["x"]), np.zeros(1, int)
    return data.Dataset("shop", folder, ids, ids, index, index)


def extract(folder, texts, encoder="tiny"):
    """The features of texts, encoded four at a time."""
    rows = encode.extract(
        bare_dataset(folder), "text", texts, encoder, ("m", "w"), folder, chunk=4)
    return np.array(rows)


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


def test_replaced_picture_is_encoded_again(tmp_path):
    """One of the same size in bytes too."""
    rows = []
    for seconds, colour in enumerate(("red", "blue")):
        put(tmp_path, {"a.bmp": png(colour=colour, format="BMP")})
        os.utime(tmp_path / "a.bmp", (seconds, seconds))
        features = encode.extract(
            bare_dataset(tmp_path), "image", ["a.bmp"], "tiny", None, tmp_path)
        rows.append(np.array(features))
    assert not np.array_equal(rows[0], rows[1])


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
    run.write_file(path, lambda file: file.write("earlier"), "w")
    if step != "write":
        monkeypatch.setattr(os, step, no_space)

    def fill(file):
        file.write("half")
        if step == "write":
            no_space()

    assert run.cli(lambda argv: run.write_file(path, fill, "w")) == 2
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
        run.make_folder(folder, 1, write_old)
        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (run.shutil, "rmtree")):
                patch.setattr(module, name, interrupted(getattr(module, name)))
            with contextlib.suppress(KeyboardInterrupt):
                run.make_folder(folder, 2, write_new)
        run.make_folder(folder, 2, write_new)
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
    return gzip.compress("".join(lines).encode())


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
     "meta_Tiny.json.gz: cut off or damaged; delete it"),
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
        def do_GET(self):
            log.append((self.path, self.headers["Range"]))
            route = routes.get(self.path)
            with contextlib.suppress(ConnectionError):
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
    monkeypatch.setattr(amazon.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("ranges", [True, False])
def test_amazon_from_nothing(tmp_path, capsys, monkeypatch, ranges):
    """Raw files through a redirect and a cut connection, pictures of every kind.

    The second run asks for nothing again.
    """
    no_sleep(monkeypatch)
    # A picture may have 5,000 bytes and is asked for twice.
    monkeypatch.setattr(amazon.fetch_image, "__defaults__", (5000, 2))
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
        assert len(log) == n_asked
    assert [asked for path, asked in log if "meta" in path] == [None, "bytes=50-"]
    folder = tmp_path / "amazon"
    assert (folder / "meta_Tiny.json.gz").read_bytes() == meta
    assert (folder / "Tiny_5.json.gz").read_bytes() == reviews
    assert not list(tmp_path.rglob("*.part"))
    fetched = {}
    for path in (folder / "Tiny" / "images").glob("*.jpg"):
        fetched[path.name] = path.read_bytes()
    assert fetched == {f"B{i}.jpg": good for i in (0, 1, 5, 6, 7)}
    assert ("images: 5 fetched, 4 refused or no picture, 0 unreachable; "
            "their items go without") in out
    assert "image: 256-d; 4 of 9 items have none (4 images missing or unreadable)" in out


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
            answer(handler, b"new")

    put(tmp_path, {"a.gz.part": "something longer"})
    with server({"/a.gz": whole_only}) as (url, log):
        amazon.download(url + "a.gz", tmp_path / "a.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"]
    assert (tmp_path / "a.gz").read_bytes() == b"new"


def test_dead_picture_server_stops_the_asking(tmp_path, capsys):
    """After 32 failures in a row the rest is left for another run, and none counts as refused."""
    urls = {f"images/{n}.jpg": [f"http://127.0.0.1:1/{n}.jpg"] for n in range(200)}
    put(tmp_path, {"image_urls.json": json.dumps(urls)})
    amazon.fetch_images(tmp_path)
    line = capsys.readouterr().out
    counts = re.search(r"0 fetched, 0 refused or no picture, (\d+) unreachable; "
                       r"gave up after 32 in a row, (\d+) not tried", line)
    n_unreachable, n_left = map(int, counts.groups())
    assert 32 <= n_unreachable < 64
    assert n_unreachable + n_left == 200
    assert not list((tmp_path / "images").iterdir())


def test_unreachable_pictures_are_asked_for_again(tmp_path, capsys, monkeypatch):
    """A server error or a time-out is no refusal: the next run tries again, and only that."""
    real = amazon.urllib.request.urlopen

    def impatient(request, timeout):
        return real(request, timeout=0.2)

    monkeypatch.setattr(amazon.urllib.request, "urlopen", impatient)
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
        amazon.fetch_images(tmp_path)
        line = capsys.readouterr().out
        assert "1 fetched, 1 refused or no picture, 2 unreachable" in line
        n_asked = len(log)
        busy = False
        done.set()
        amazon.fetch_images(tmp_path)
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

    monkeypatch.setattr(amazon.time, "sleep", full)
    routes = {"/categoryFilesSmall/Tiny_5.json.gz": bytes(9), "/a.png": png()}
    with server(routes) as (url, log):
        with_picture = META[0] | {"imageURL": [url + "a.png"]}
        raw(tmp_path, meta=[with_picture, *META[1:]])
        if what == "raw":
            (tmp_path / "amazon" / "Tiny_5.json.gz").unlink()
            monkeypatch.setattr(amazon.tqdm, "update", full)
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
    # Other weights, other cache.
    os.utime(weights, (1, 1))
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
        monkeypatch.setattr("open_clip.create_model_and_transforms", raises(TimeoutError()))
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


# --- The documents ------------------------------------------------------------------------

def test_decisions_quote_the_code():
    """Every decision's line stands in the file that DECISIONS.md names."""
    text = (HERE / "DECISIONS.md").read_text(encoding="utf-8")
    quotes = re.findall(r"`([\w/]+\.py)`:\s+`([^`]+)`", text)
    assert len(quotes) >= 20
    for name, line in quotes:
        assert line in (HERE / name).read_text(encoding="utf-8"), (name, line)
