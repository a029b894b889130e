"""The tests of all but paper/: python -m pytest -q

Every fast path against its plain definition, in float64 where a formula is checked; the real
command lines on tiny data; every documented error once. No network, GPU or other data.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

import checkpoints
import data
import diagnostics
import disk
import finetune
import folders
import metrics
import mmcpr
import ops
from conftest import HERE, ON_THE_CPU, QUICK, binary, call, matrix_of, shop, write_shop

# A GPU adds up in another order each time.
NONDET = {"cpu": 0, "cuda": 1e-10}


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


def test_place_of_every_test_interaction():
    """Where a sort has it, without the seen items; 0 below the top; in the order of truth."""
    rng = np.random.default_rng(2)
    user, item = torch.randn(6, 4), torch.randn(30, 4)
    seen = binary(rng, 6, 30, 0.2)
    truth = sp.csr_matrix(binary(rng, 6, 30, 0.3, empty_row=2).toarray() * (1 - seen.toarray()))
    want = []
    for u, i in zip(*truth.nonzero()):
        order = [j for j in (-(item @ user[u])).argsort().tolist() if not seen[u, j]]
        place = order.index(i) + 1
        want.append(place if place <= 12 else 0)
    got = metrics.truth_ranks(user, item, seen, truth, 12)
    assert got.tolist() == want and 0 in want and max(want) > 5


@pytest.mark.parametrize("chunk", [1, 60, 1 << 20])
def test_metrics_against_the_loop(monkeypatch, chunk, device):
    """Users without a relevant item are left out; k may exceed the candidates; any chunk."""
    monkeypatch.setattr(metrics, "CHUNK_SCORES", chunk)
    monkeypatch.setattr(metrics, "CHUNK_SCORES_GPU", chunk)
    rng = np.random.default_rng(1)
    cells = rng.random((17, 25))
    has_truth = (np.arange(17) % 4 > 0)[:, None]
    seen = sp.csr_matrix((cells < 0.3) * 1.0)
    truth = sp.csr_matrix(((cells > 0.85) & has_truth) * 1.0)
    user = torch.from_numpy(rng.normal(size=(17, 4))).to(device)
    item = torch.from_numpy(rng.normal(size=(25, 4))).to(device)
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
def test_co_interaction_against_the_sets(density, storage, device):
    """Product and gradient of R(R'x) - Ex against D^-1 A x from the sets S_a; isolated: 0."""
    R = binary(np.random.default_rng(3), 23, 31, density, empty_row=4)
    A = adjacency_by_sets(R)
    assert np.array_equal(ops.co_interaction_plain(R).toarray(), A)
    for block_entries in (7, 1 << 24):  # many blocks of rows, and one
        built = ops.build_co_interaction(R, storage, block_entries)
        kept = built.R @ built.R.T - built.E if built.A is None else built.A
        assert np.array_equal(kept.toarray(), A)
        assert np.array_equal(built.n_neighbours, A.sum(1))
    A = torch.from_numpy(A).to(device)
    graph = ops.CoInteractionGraph(R, device, dtype=torch.float64, storage=storage)
    x, g = torch.randn(2, 23, 5, dtype=torch.float64, device=device)
    x.requires_grad_()
    fast, plain = graph(x), ops.neighbour_mean_plain(A, x)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast, x, g), torch.autograd.grad(plain, x, g))
    assert not fast[4].any()
    small = torch.randn(23, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(graph, small, nondet_tol=NONDET[device])


def test_co_interaction_keeps_the_smaller_form():
    rng = np.random.default_rng(4)
    sparse = ops.build_co_interaction(binary(rng, 300, 40, 0.03))
    dense = ops.build_co_interaction(binary(rng, 50, 40, 0.9))
    assert sparse.A is None
    assert 2 * sparse.R.nnz + sparse.E.nnz < sparse.n_neighbours.sum()
    assert dense.R is None
    assert dense.A.nnz == dense.n_neighbours.sum() == 50 * 49


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_product_against_the_plain_one(dtype, device):
    """Empty rows are 0; x may be a view that is not contiguous."""
    rng = np.random.default_rng(4)
    matrix = sp.csr_matrix(np.where(rng.random((9, 13)) < 0.3, rng.normal(size=(9, 13)), 0))
    matrix = sp.csr_matrix(matrix.multiply(np.arange(9)[:, None] != 4))
    x = torch.from_numpy(rng.normal(size=(5, 13))).to(device, dtype).T
    tensor = ops.sparse_tensor(matrix, device, dtype)
    fast = ops.sparse_product(tensor, x)
    torch.testing.assert_close(fast, ops.sparse_product_plain(tensor, x))
    dense = torch.from_numpy(matrix.toarray()).to(device, dtype)
    torch.testing.assert_close(fast, dense @ x)
    assert not fast[4].any()


# --- ops.py: binary cross-entropy (Eq. 15) ------------------------------------------------

@pytest.mark.parametrize("chunk_scores", [1, 24, 1 << 20])
def test_bce_against_its_formula(chunk_scores, device):
    """All entries of R, zeros too: value and gradients against the printed formula with its
    sigmoid, under autograd."""
    rng = np.random.default_rng(10)
    R = binary(rng, 6, 11, 0.3)
    inputs = [torch.from_numpy(rng.normal(size=shape)).to(device).requires_grad_()
              for shape in ((6, 4), (11, 4), (11,))]
    user, item, bias = inputs
    p, r = torch.sigmoid(user @ item.T + bias), torch.from_numpy(R.toarray()).to(device)
    formula = -(r * p.log() + (1 - r) * (1 - p).log()).sum()
    rows, cols = r.nonzero(as_tuple=True)
    chunked = ops.BlockBCE.apply(*inputs, rows, cols, chunk_scores)
    want = torch.autograd.grad(3 * formula, inputs)
    for loss in (ops.bce_plain(*inputs, rows, cols), ops.bce(*inputs, rows, cols), chunked):
        torch.testing.assert_close(loss, formula)
        for got, gradient in zip(torch.autograd.grad(3 * loss, inputs), want):
            torch.testing.assert_close(got, gradient)

    def function(*tensors):
        return ops.BlockBCE.apply(*tensors, rows, cols, chunk_scores)
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=NONDET[device])


def test_row_entries_are_those_of_the_block(device):
    """Rows in any order, one twice, one without entries; a block without any."""
    R = binary(np.random.default_rng(9), 8, 11, 0.3, empty_row=5)
    tensor = ops.sparse_tensor(R, device)
    for users in ([6, 5, 0, 6, 7], [5], []):
        rows, cols = ops.row_entries(tensor, torch.tensor(users, dtype=torch.int64, device=device))
        block = R[users].tocoo()
        assert rows.tolist() == block.row.tolist() and cols.tolist() == block.col.tolist()


def test_bce_does_not_overflow():
    """Logits of +-1000: log(1 + exp(x)) would be infinite."""
    item = torch.tensor([[1000.0], [-1000.0]])
    loss = ops.bce(torch.ones(1, 1), item, torch.zeros(2), torch.tensor([0]), torch.tensor([1]))
    assert loss.item() == pytest.approx(2000)


# --- ops.py: LightGCN's layers and MixGCF -------------------------------------------------

def small_lightgcn(n_layers=3, dim=3, seed=12, device="cpu"):
    """A LightGCN in float64 on 7 users, one of them without items, and 5 items."""
    R = binary(np.random.default_rng(seed), 7, 5, 0.4, empty_row=2)
    torch.manual_seed(seed)
    user, item = torch.randn(7, dim, dtype=torch.float64), torch.randn(5, dim, dtype=torch.float64)
    return finetune.LightGCN(R, user.to(device), item.to(device), n_layers), R


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
def test_layer_rows_against_autograd(n_layers, device):
    """Values and gradient; rows come more than once."""
    model, _ = small_lightgcn(n_layers, device=device)
    rows = torch.randint(12, (n_layers + 1, 30), device=device)
    g = torch.randn(n_layers + 1, 30, 3, device=device).double()
    A_hat = model.A_hat.to_dense().to_sparse_coo()
    plain = ops.layer_rows_plain(model.E0, A_hat, n_layers, rows)
    fast = ops.layer_rows(model.E0, model.A_hat, model.layers(), rows)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast, model.E0, g),
                               torch.autograd.grad(plain, model.E0, g))

    def function(E0):
        return ops.layer_rows(E0, model.A_hat, model.layers(), rows[:, :6])
    assert torch.autograd.gradcheck(function, model.E0, nondet_tol=NONDET[device])


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
def test_mixgcf_against_the_loop(M, device):
    """Value and gradient: the arg-max over unmixed candidates and Horner's rule change nothing."""
    rng = np.random.default_rng(13)
    R = binary(rng, 8, 12, 0.4)
    start = [torch.from_numpy(rng.normal(size=(n, 6))).to(device) for n in (8, 12)]
    model = finetune.LightGCN(R, *start, 3)
    users = torch.from_numpy(rng.integers(8, size=9)).to(device)
    pos_items = torch.from_numpy(rng.integers(8, 20, size=9)).to(device)
    candidates = torch.from_numpy(rng.integers(8, 20, size=(9, M))).to(device)
    alpha = torch.from_numpy(rng.random((4, 9))).to(device)
    layers = [model.E0]
    for _ in range(3):
        layers.append(model.A_hat.to_dense() @ layers[-1])
    picked = ops.hard_negatives(layers, users, candidates)
    plain = ops.hard_negatives_plain(layers, users, pos_items, candidates, alpha)
    assert torch.equal(picked, plain)
    fast = finetune.mixgcf_loss(model, users, pos_items, candidates, alpha, 0.3)
    slow = mixgcf_by_loop(layers, users, pos_items, candidates, alpha, 0.3)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, model.E0),
                               torch.autograd.grad(slow, model.E0))


@pytest.mark.parametrize("sampler", ["fast", "plain"])
def test_negatives_are_uniform_over_what_the_user_has_not(sampler, device):
    torch.manual_seed(0)
    R = sp.csr_matrix(np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], np.float32))
    users = [0, 2, 1]
    if sampler == "fast":
        sample_negatives = ops.NegativeSampler(R, device)
        drawn = sample_negatives(torch.tensor(users, device=device), 4000).cpu().numpy()
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


def test_tower_projects_normalised_features_and_the_graph():
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


def test_a_node_without_neighbours_has_no_graph_modality():
    """Its attention to G is exactly 0; with nothing else it uses its fallback row."""
    R = binary(np.random.default_rng(7), 10, 12, 0.3, empty_row=4)
    text = np.random.default_rng(8).normal(size=(10, 5))
    graph = ops.CoInteractionGraph(R)
    e, alpha, projected = mmcpr.Tower(10, {"T": text}, graph, dim=4)(torch.arange(10))
    assert alpha[4].tolist() == [1, 0] and (alpha[np.arange(10) != 4] > 0).all()
    torch.testing.assert_close(e[4], projected[4, 0])
    alone = mmcpr.Tower(10, {}, graph, dim=4)
    torch.testing.assert_close(alone(torch.arange(10))[0][4], alone.fallback[4])
    # Where nobody has it there is nothing to tell of it.
    nobody = ops.CoInteractionGraph(sp.csr_matrix((10, 12), dtype=np.float32))
    tower = mmcpr.Tower(10, {"T": text}, nobody, dim=4)
    assert set(diagnostics.tower_state(tower)) == {"T"}


def test_state_of_the_modalities_against_the_loop():
    """Mean attention, share of logits cut to 0, variance of the projection: over who has it."""
    rng = np.random.default_rng(10)
    text, image = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    text[:7] = np.nan
    tower = mmcpr.Tower(40, {"T": text, "V": image}, None, dim=4)
    nodes = torch.arange(40)
    _, alpha, projected = tower(nodes)
    state = diagnostics.tower_state(tower)
    for m, name in enumerate("TV"):
        has = nodes[7:] if name == "T" else nodes
        p = projected[has, m].detach()
        logits = [float(row @ tower.a.detach()) for row in p]
        want = {"attention": alpha[has, m].mean().item(),
                "cut": np.mean([logit <= 0 for logit in logits]),
                "variance": (p - p.mean(0)).square().sum(1).mean().item()}
        assert state[name] == pytest.approx(want, rel=1e-5)
        assert 0 < state[name]["cut"] < 1


def test_a_dead_modality_is_told(capsys):
    alive = {"attention": 0.5, "cut": 0.1, "variance": 0.2}
    diagnostics.print_modalities("item", {"T": alive, "V": alive | {"variance": 1e-4}})
    out = capsys.readouterr().out
    assert "items: T 0.500 (cut 0.10, varies 0.2), V 0.500" in out
    assert "V is dead among the items" in out and "T is dead" not in out


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
def test_objective_is_the_weighted_sum(lam, bias, device):
    """Eq. 16 against its two terms over the whole block, value and gradients."""
    torch.manual_seed(0)
    model, train = small_model(np.random.default_rng(11), bias=bias, device=device)
    model = model.double()
    model.user_tower.graph = ops.CoInteractionGraph(train, device, torch.float64)
    model.item_tower.graph = ops.CoInteractionGraph(train.T.tocsr(), device, torch.float64)
    R, users = ops.sparse_tensor(train, device), torch.tensor([3, 1, 8], device=device)
    cima_items = model.items_with_pair()[:9]
    assert 2 not in model.items_with_pair() and len(model.items_with_pair()) == 29
    l1, l2, loss = mmcpr.objective(model, R, users, cima_items, 5.0, lam)
    parameters = list(model.parameters())
    got = torch.autograd.grad(loss, parameters, allow_unused=True)

    item, _, projected = model.item_tower(torch.arange(30, device=device))
    user, _, _ = model.user_tower(users)
    rows, cols = ops.row_entries(R, users)
    plain_l2 = ops.bce_plain(user, item, model.bias, rows, cols) / 5.0
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
        assert moved == {f"item_tower.W.{m}.{part}" for m in "TV" for part in ("weight", "bias")}


def test_popularity_loss_is_the_bce_of_the_log_odds():
    cells = binary(np.random.default_rng(15), 30, 12, 0.3).toarray()
    # Nobody's item and everybody's have no loss.
    train = sp.csr_matrix(np.hstack([cells, np.zeros((30, 1)), np.ones((30, 1))]))
    p = torch.from_numpy(cells.astype(np.float64).mean(0))
    log_odds = (p / (1 - p)).log().expand(30, -1)
    target = torch.from_numpy(cells).double()
    loss = F.binary_cross_entropy_with_logits(log_odds, target, reduction="sum")
    assert diagnostics.popularity_loss(train) == pytest.approx(loss.item() / train.nnz, rel=1e-9)


@pytest.mark.parametrize("batch", [40, 17])
def test_reported_bce_is_per_positive_whatever_the_last_block(batch):
    """The loss printed at a learning rate of nothing is L2 of the whole of R per positive."""
    pairs, text, image = shop(np.random.default_rng(17))
    train = matrix_of(pairs, 40, 30)
    args = mmcpr.arguments().parse_args(
        ["--lr", "1e-12", "--epochs", "1", "--batch", str(batch), "--bias", "none"])
    parts = data.Parts(train, sp.csr_matrix((40, 30)), None, None, "")
    user, item, report = mmcpr.pretrain(parts, {"T": text, "V": image}, args)
    tables = torch.from_numpy(user).double(), torch.from_numpy(item).double()
    rows, cols = ops.row_entries(ops.sparse_tensor(train), torch.arange(40))
    plain = ops.bce_plain(*tables, torch.zeros(30), rows, cols) / train.nnz
    assert report["losses"]["bce"] == pytest.approx(plain.item(), rel=1e-5)


def test_shared_ranking_is_the_variance_between_items():
    user, item = torch.randn(30, 4) + 1, torch.randn(20, 4)
    scores = (user @ item.T).double().numpy()
    want = scores.mean(0).var() / scores.var()
    assert 0.1 < want < 0.9
    assert diagnostics.shared_ranking(user, item) == pytest.approx(want, rel=1e-5)
    assert diagnostics.shared_ranking(user[:1].expand(30, 4), item) == pytest.approx(1)
    assert diagnostics.shared_ranking(torch.zeros(30, 4), item) == 1


def test_popularity_correlation_is_that_of_the_ranks():
    """Pearson's correlation of the average ranks, over the items that anybody has bought."""
    cells = binary(np.random.default_rng(20), 30, 20, 0.2).toarray()
    cells[:, 7] = 0
    R = sp.csr_matrix(cells)
    count = np.asarray(R.sum(0)).ravel()
    user, item = torch.randn(30, 4) + 1, torch.randn(20, 4)
    bought = np.flatnonzero(count)
    means = (user @ item.T).double().numpy().mean(0)[bought]

    def ranks(x):
        return (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2
    want = np.corrcoef(ranks(means), ranks(count[bought]))[0, 1]
    assert len(set(count)) < len(bought) < 20  # some are equal, and item 7 is left out
    got = diagnostics.popularity_correlation(user, item, R)
    assert got == pytest.approx(want, abs=1e-6)
    tables = finetune.popularity(R)
    assert diagnostics.popularity_correlation(*tables, R) == pytest.approx(1)
    assert diagnostics.popularity_correlation(user, torch.ones(20, 4), R) == 0


def test_alignment_of_collapsed_towers_is_no_success():
    """Where all vectors are one, every image ties with the true one: text finds nothing."""
    model, _ = small_model(np.random.default_rng(18))
    for name in "TV":
        torch.nn.init.zeros_(model.item_tower.W[name].weight)
        torch.nn.init.ones_(model.item_tower.W[name].bias)
    found = diagnostics.alignment(model, model.items_with_pair())
    assert found["text_to_image_recall@10"] == 0


# --- The parts of the method do what they should, where the truth is planted --------------

def test_cima_aligns_and_its_absence_does_not():
    """Text and image are noisy views of one vector per item: CIMA finds most pairs among 300."""
    rng = np.random.default_rng(15)
    pairs, _, _ = shop(rng, n_users=60, n_items=300, tastes=8)
    truth, views = rng.normal(size=(300, 8)), []
    for _ in range(2):
        views.append(truth @ rng.normal(size=(8, 12)) + 0.3 * rng.normal(size=(300, 12)))
    parts = data.Parts(matrix_of(pairs, 60, 300), sp.csr_matrix((60, 300)), None, None, "")
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
    parts = data.Parts(train, sp.csr_matrix((120, 90)), None, None, "")
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

def test_pretrain_then_finetune(trained, capsys):
    """emb.npz needs no --data; metrics, final embeddings and recs.csv agree with each other."""
    arrays = data.load_embeddings("emb.npz")
    assert arrays["user"].shape == (40, 8) and arrays["item"].shape == (30, 8)
    assert arrays["item"].dtype == np.float32 and list(arrays["item_ids"][:2]) == ["i0", "i1"]
    assert arrays["meta"]["data"]["valid"] == 0.1
    assert set(arrays["meta"]["report"]["modalities"]["item"]) == set("TVG")
    (trained / "elsewhere").mkdir()
    os.chdir(trained / "elsewhere")
    assert call(finetune.main, "--init", "../emb.npz", "--epochs", 6, "--candidates", 4,
                "--metrics", "m.json", "--out", "final.npz", "--recommend", "recs.csv") == 0
    result = json.loads(Path("m.json").read_text())
    assert {"data", "init", "seed", "scale", "epoch", "epochs_run", "valid"} <= set(result)
    names = {f"{name}@{k}" for name in ("recall", "ndcg") for k in (20, 40, 60)}
    assert set(result["test"]) == names

    final = data.load_embeddings("final.npz")
    columns = folders.read_csv("recs.csv", ("user", "rank", "item", "score"))
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
    out = capsys.readouterr().out
    assert "recall@20" in out
    # Beside it what popularity alone would rank.
    count = torch.from_numpy(np.asarray(parts.train.sum(0)).ravel())[:, None]
    popular = metrics.evaluate(torch.ones(40, 1), count, parts.train + parts.valid, parts.test)
    line = next(line for line in out.splitlines() if line.startswith("the most popular items"))
    assert line.split()[4:] == [f"{popular[name]:.4f}" for name in finetune.METRIC_NAMES]


def test_per_user_file_is_the_test_user_by_user(trained):
    """Its means are the metrics that are printed; ranks, users and items are those of recs.csv."""
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 4, "--metrics", "m.json",
                "--per-user", "users.npz", "--recommend", "recs.csv", "--top", 60) == 0
    test = json.loads(Path("m.json").read_text())["test"]
    parts = data.split_dataset(data.load("shop", contents=False))
    with np.load("users.npz", allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    for name, value in test.items():
        assert found[name].mean() == pytest.approx(value, abs=1e-12)
    assert len(found["user_ids"]) == np.sum(np.diff(parts.test.indptr) > 0)
    columns = folders.read_csv("recs.csv", ("user", "rank", "item", "score"))
    rank = {}
    for u, place, i in zip(columns["user"], columns["rank"], columns["item"]):
        rank[u, i] = int(place)
    assert len(found["rank"]) == parts.test.nnz
    for u, i, place in zip(found["user"], found["item_ids"], found["rank"]):
        assert rank[str(found["user_ids"][u]), str(i)] == place
    dataset = data.load("shop", contents=False)
    of_user = {name: parts.train[[row]].nnz for row, name in enumerate(dataset.user_ids)}
    of_item = {name: parts.train[:, [row]].nnz for row, name in enumerate(dataset.item_ids)}
    assert found["train"].tolist() == [of_user[name] for name in found["user_ids"].tolist()]
    assert found["item_train"].tolist() == [of_item[name] for name in found["item_ids"].tolist()]


def test_kept_share_goes_with_the_tables(trained, capsys):
    """finetune.py takes it from emb.npz; another one is another split."""
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--keep", 0.5, "--out", "e.npz") == 0
    n_train = data.split_dataset(data.load("shop", contents=False), share=0.5).train.nnz
    capsys.readouterr()
    assert call(finetune.main, "--init", "e.npz", "--epochs", 1, "--per-user", "u.npz") == 0
    out = capsys.readouterr().out
    assert f"split: {n_train} training" in out and "--keep 0.5" in out
    with np.load("u.npz", allow_pickle=False) as file:
        assert file["train"].sum() <= n_train
    assert call(finetune.main, "--init", "e.npz", "--epochs", 1, "--keep", 1) == 2
    assert "made from other training interactions" in capsys.readouterr().err


def test_new_items_are_nobodys_negatives():
    """Eq. 15 and the sampler leave them out: what is not there yet has not been passed over."""
    rng = np.random.default_rng(3)
    train = binary(rng, 20, 12, 0.3).tolil()
    train[:, [2, 7]] = 0
    train = train.tocsr()
    train.sort_indices()
    known = np.setdiff1d(np.arange(12), [2, 7])
    drawn = ops.NegativeSampler(train, items=known)(torch.arange(20), 300)
    for user in range(20):
        assert set(drawn[user].tolist()) == set(known) - set(train[[user]].indices)
    model = mmcpr.MMCPR(train, {}, True, 4, known_items=known)
    R = ops.sparse_tensor(train[:, known])
    _, l2, loss = mmcpr.objective(model, R, torch.arange(20), torch.empty(0, dtype=int), 1.0, 0)
    user, item = model.embed()
    want = 0
    for u in range(20):
        for i in known:
            p = torch.sigmoid(user[u] @ item[i] + model.bias).item()
            want -= np.log(p) if train[u, i] else np.log(1 - p)
    assert l2.item() == pytest.approx(want, rel=1e-4)
    loss.backward()
    assert not model.item_tower.fallback.grad[[2, 7]].any()


def test_new_items_are_no_part_of_cima():
    rng = np.random.default_rng(4)
    features = {"T": rng.normal(size=(12, 5)), "V": rng.normal(size=(12, 5))}
    features["V"][3] = np.nan
    known = np.setdiff1d(np.arange(12), [2, 7])
    model = mmcpr.MMCPR(binary(rng, 20, 12, 0.3), features, True, 4, known_items=known)
    assert model.items_with_pair().tolist() == [0, 1, 4, 5, 6, 8, 9, 10, 11]


def test_new_items_are_ranked_among_themselves(trained, capsys):
    """From the contents, which know the planted tastes, better than by chance."""
    flags = ("--data", "shop", "--new-items", 0.5)
    assert call(mmcpr.main, *flags, "--epochs", 60, "--dim", 8, "--modalities", "TV",
                "--out", "e.npz") == 0
    assert call(finetune.main, "--init", "e.npz", "--epochs", 0, "--metrics", "m.json",
                "--per-user", "u.npz") == 0
    out = capsys.readouterr().out
    assert "on 15 new items" in out and "only 15 items are ranked" in out
    # Nobody has bought any: there is no ranking by popularity.
    assert "the most popular items" not in out
    with np.load("u.npz", allow_pickle=False) as file:
        place, item_train = file["rank"], file["item_train"]
    # All fifteen are ranked, so every test item has a place; by chance the mean of it is 8.
    assert place.min() >= 1 and place.max() <= 15 and not item_train.any()
    assert place.mean() < 7


def test_same_seed_same_bytes(trained, monkeypatch):
    """Same seed, same machine, same result, in another process too; another seed another one."""
    flags = ("--data", "shop", *QUICK, "--out")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    try:
        assert call(mmcpr.main, *flags, "once.npz") == 0
    finally:
        torch.set_num_threads(1)
    command = [sys.executable, HERE / "mmcpr.py", *flags, "again.npz"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    tables, again = data.load_embeddings("once.npz"), data.load_embeddings("again.npz")
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


@pytest.mark.parametrize("main, flags", [(mmcpr.main, ("--k", 5)), (finetune.main, ("--epoch", 1))])
def test_shortened_flags_are_no_flags(trained, capsys, main, flags):
    """--k would be --keep, where --k 5 means something else to who types it."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, flags), "--data", "shop"])
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("subset", ["R", "T", "V", "G", "TV", "RG", "RTVG", ""])
def test_any_subset_of_modalities(trained, capsys, subset):
    """Figure 3: every subset trains; a side that is left with nothing has rows of its own."""
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--modalities", subset or "none",
                "--out", "e.npz") == 0
    arrays = data.load_embeddings("e.npz")
    modalities = arrays["meta"]["report"]["modalities"]
    assert set(modalities["user"]) == set(subset) & set("RG")
    assert set(modalities["item"]) == set(subset) & set("TVG")
    assert np.isfinite(arrays["user"]).all()
    # The shop has pairs for CIMA: who leaves a modality out knows.
    assert "CIMA is left out" not in capsys.readouterr().out


def test_shuffled_contents_are_the_same_rows_elsewhere(trained):
    """A control: an item's text and image stay together, and nothing else of a row is kept."""
    rng = np.random.default_rng(0)
    features = {"T": rng.normal(size=(50, 3)), "V": np.arange(50.)[:, None],
                "R": np.arange(80.)[:, None]}
    features["T"][:, 0] = np.arange(50)
    permuted = data.shuffled(features, 1)
    for modality, table in features.items():
        order = permuted[modality][:, 0].astype(int)
        assert np.array_equal(permuted[modality], table[order])
        assert np.array_equal(np.sort(order), np.arange(len(table)))
        assert np.mean(order == np.arange(len(table))) < 0.2
    assert np.array_equal(permuted["T"][:, 0], permuted["V"][:, 0])
    for flags in ((), ("--shuffle-contents",)):
        assert call(mmcpr.main, "--data", "shop", *QUICK, *flags, "--out", f"{len(flags)}.npz") == 0
    plain, control = data.load_embeddings("0.npz"), data.load_embeddings("1.npz")
    assert not np.array_equal(plain["item"], control["item"])


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
    disk.write_csv(tmp_path / "bare/interactions.csv", ("user", "item"), pairs)
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
    ranked, truth_ranks = [], metrics.truth_ranks

    def spy(user, item, seen, truth, top):
        matches = [name for name in ("valid", "test")
                   if (truth != getattr(parts, name)).nnz == 0]
        assert len(matches) == 1, "neither validation nor test is ranked"
        ranked.extend(matches)
        return truth_ranks(user, item, seen, truth, top)

    monkeypatch.setattr(metrics, "truth_ranks", spy)
    assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", 40, "--lr", 0.1,
                "--out", "e.npz") == 0
    assert set(ranked) == {"valid"}
    ranked.clear()
    assert call(finetune.main, "--init", "e.npz", "--epochs", 30, "--eval-every", 2,
                "--lr", 0.1, "--scale", "xavier", "--metrics", "m.json", "--out", "f.npz") == 0
    # By popularity, which nothing is chosen by; and at the very end.
    assert ranked.count("test") == 2 and ranked[0] == ranked[-1] == "test"
    pretrained, final = data.load_embeddings("e.npz"), data.load_embeddings("f.npz")
    histories = ((pretrained, pretrained["meta"]["report"]["history"]),
                 (final, json.loads(Path("m.json").read_text())["history"]))
    for arrays, history in histories:
        values = [point["recall@20"] for point in history]
        assert values[-1] < max(values), "the last epoch is the best: the test shows nothing"
        user, item = torch.from_numpy(arrays["user"]), torch.from_numpy(arrays["item"])
        got = metrics.evaluate(user, item, parts.train, parts.valid, (20,))["recall@20"]
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


def test_epochs_are_those_of_a_plain_trainer(trained, monkeypatch, device):
    """Every epoch's loss is that of MixGCF written out, with plain Adam, given the same draws."""
    steps, loss = [], finetune.mixgcf_loss

    def spy(model, users, pos_items, candidates, alpha, l2):
        steps.append((model.E0.detach().clone(), users, pos_items, candidates, alpha))
        return loss(model, users, pos_items, candidates, alpha, l2)

    monkeypatch.setattr(finetune, "mixgcf_loss", spy)
    assert call(finetune.main, "--data", "shop", "--epochs", 6, "--eval-every", 1,
                "--batch", 50, "--lr", 0.05, "--candidates", 5, "--metrics", "m.json",
                "--device", device) == 0
    train = data.split_dataset(data.load("shop", contents=False)).train
    E0 = torch.nn.Parameter(steps[0][0])
    P = ops.sparse_tensor(ops.normalised_adjacency(train), device).to_dense()
    optimizer = torch.optim.Adam([E0], lr=0.05, foreach=False, fused=False)
    losses = []
    for _, users, pos_items, candidates, alpha in steps:
        layers = [E0]
        for _ in range(3):
            layers.append(P @ layers[-1])
        picked = ops.hard_negatives_plain(layers, users, pos_items, candidates, alpha)
        layers = torch.stack(layers)                                               # [L+1, n, d]
        e_pos, a = layers[:, pos_items], alpha[:, :, None]
        e_neg = a * e_pos + (1 - a) * layers[torch.arange(4, device=device)[:, None], picked]
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
        monkeypatch.setattr(diagnostics, "popularity_loss", lambda R: height)
        assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", 30, "--patience", 10,
                    "--out", "e.npz") == 0
        epochs_run[height] = data.load_embeddings("e.npz")["meta"]["report"]["epochs_run"]
    assert epochs_run == {1e9: 12, -1: 30}


def test_weight_decay_is_a_prior_on_every_entry(trained, monkeypatch):
    """Adam gets --weight-decay / nnz, times the weight of BCE in the loss."""
    given, Adam = [], torch.optim.Adam

    def spy(*args, **options):
        given.append(options["weight_decay"])
        return Adam(*args, **options)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    for flags in (("--weight-decay", 2), ("--weight-decay", 2, "--lam", 0.5)):
        assert call(mmcpr.main, "--data", "shop", *QUICK, "--epochs", 1, *flags,
                    "--out", "e.npz") == 0
    nnz = data.split_dataset(data.load("shop", contents=False)).train.nnz
    assert given == pytest.approx([1.6 / nnz, 1 / nnz])


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
    (finetune.main, ("--init", "emb.npz", "--out", "./emb.npz"), "would overwrite"),
    (finetune.main, ("--init", "emb.npz", "--metrics", "emb.npz"), "would overwrite")])
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
    # The shop has fewer items than the longest list.
    assert "only 30 items" in out
    interrupted(mmcpr.main, *flags, "--epochs", 9, "--out", "cut.npz", after=4)
    assert call(finetune.main, "--init", "cut.npz", "--epochs", 1) == 0
    assert "cut.npz: of a pre-training that was interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("epoch, epochs_run, valid, expected", [
    (0, 9, {"recall@20": .2}, True), (0, 9, {"recall@20": 1.}, False), (0, 9, {}, False),
    (5, 9, {"recall@20": .2}, False), (0, 0, {"recall@20": .2}, False)])
def test_training_that_brought_nothing(epoch, epochs_run, valid, expected):
    result = {"epoch": epoch, "epochs_run": epochs_run, "valid": valid}
    assert finetune.training_brought_nothing(result) == expected


# --- Outputs ------------------------------------------------------------------------------

@pytest.mark.parametrize("main, flag", [
    (mmcpr.main, "--out"), (finetune.main, "--metrics"), (finetune.main, "--recommend"),
    (finetune.main, "--per-user")])
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
    disk.write_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere/file").read_bytes() == b"new"


def test_link_to_the_tables_it_starts_from_is_refused(trained, capsys):
    """It would be written through; the same for two outputs that are one file."""
    before = Path("emb.npz").read_bytes()
    Path("link.npz").symlink_to("emb.npz")
    assert call(finetune.main, "--init", "emb.npz", "--out", "link.npz", "--epochs", 1) == 2
    assert "would overwrite emb.npz, which is read here" in capsys.readouterr().err
    assert Path("emb.npz").read_bytes() == before
    assert call(finetune.main, "--out", "emb.npz", "--metrics", "link.npz") == 2
    assert "given twice" in capsys.readouterr().err


def test_output_that_nobody_reads(tmp_path):
    """`python data.py | head -0`: no traceback."""
    write_shop(tmp_path / "shop")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, HERE / "data.py", "--data", "shop"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, timeout=300)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_next_commands_can_be_typed(trained, capsys):
    """Each script ends with the command that comes next."""
    assert call(data.main, "--data", "shop") == 0
    assert "next: python mmcpr.py --data" in capsys.readouterr().out
    assert call(mmcpr.main, "--data", "shop", *QUICK) == 0
    assert "next: python finetune.py --init emb.npz\n" in capsys.readouterr().out
    assert call(finetune.main, "--init", "emb.npz", "--epochs", 1) == 0
    command = f"next, to compare with: python finetune.py --init random --data {trained / 'shop'}"
    assert f"{command}\n" in capsys.readouterr().out
    # What names another split stands in it, or the two could not be compared.
    split = ("--min-count", 2, "--valid", 0.2, "--split-seed", 3)
    assert call(mmcpr.main, "--data", "shop", *QUICK, *split, "--out", "e.npz") == 0
    assert call(finetune.main, "--init", "e.npz", "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert f"{command} --min-count 2 --valid 0.2 --split-seed 3\n" in out


# --- Interruptions ------------------------------------------------------------------------

RUNS = {
    "mmcpr.py": ("--data", "shop", "--dim", "8", "--batch", "15", "--epochs", "150",
                 "--patience", "150", "--eval-every", "4", "--out", "result.npz"),
    "finetune.py": ("--data", "shop", "--dim", "8", "--batch", "50", "--epochs", "60",
                    "--patience", "60", "--seeds", "3", "4", "--eval-every", "3",
                    "--metrics", "m.json", "--out", "result.npz")}


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


def test_interrupted_run_goes_on_to_the_same_bits(tmp_path, interrupted, monkeypatch, capsys):
    """The real commands, ended at whatever moment, one by kill -9, one by SIGTERM; resumed,
    interrupted once more, resumed."""
    with ThreadPoolExecutor(2) as pool:  # they take seconds to start, so both at once
        runs = [pool.submit(start_and_kill, tmp_path / "mmcpr.py/cut", signal.SIGKILL),
                pool.submit(start_and_kill, tmp_path / "finetune.py/cut", signal.SIGTERM)]
        for done in runs:
            done.result()
    # The others in this process, which has loaded torch already.
    for script, main in (("mmcpr.py", mmcpr.main), ("finetune.py", finetune.main)):
        whole, cut = tmp_path / script / "whole", tmp_path / script / "cut"
        whole.mkdir()
        write_shop(whole / "shop")
        monkeypatch.chdir(whole)
        assert call(main, *RUNS[script]) == 0
        monkeypatch.chdir(cut)
        capsys.readouterr()
        interrupted(main, *RUNS[script], "--resume", after=9)
        assert "goes on after epoch" in capsys.readouterr().out
        assert call(main, *RUNS[script], "--resume") == 0
        assert "goes on after epoch" in capsys.readouterr().out
        assert not [*cut.glob("*.ckpt"), *cut.glob(".*.tmp")]
        user, item, reports = outcome(whole)
        user_cut, item_cut, reports_cut = outcome(cut)
        assert np.array_equal(user, user_cut) and np.array_equal(item, item_cut)
        assert reports == reports_cut


def start_and_kill(cut, kill):
    """Leaves in <script>/cut the checkpoint of the script, which got the signal `kill`."""
    script = cut.parent.name
    cut.mkdir(parents=True)
    write_shop(cut / "shop")
    command = [sys.executable, HERE / script, *RUNS[script], "--resume", "--checkpoint-every", "0"]
    process = subprocess.Popen(command, cwd=cut, env=ON_THE_CPU, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while process.poll() is None and not list(cut.glob("*.ckpt")):
        time.sleep(0.01)
    time.sleep(0.1)  # some epochs on, in the middle of whatever it is doing
    process.send_signal(kill)
    out, err = process.communicate(timeout=300)
    assert b"starting from the beginning" in out and b"Traceback" not in err
    assert process.returncode == (2 if kill == signal.SIGTERM else -9), err
    assert kill != signal.SIGTERM or b"--resume goes on" in err
    assert len(list(cut.glob("*.ckpt"))) == 1


def test_ctrl_c_keeps_the_best_epoch(tmp_path):
    """SIGINT during training: the best epoch so far is written, one line, exit code 2."""
    write_shop(tmp_path / "shop")
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(interrupt_training, tmp_path, "mmcpr.py", "--out", "emb.npz"),
                pool.submit(interrupt_training, tmp_path, "finetune.py", "--metrics", "m.json")]
        for done in runs:
            done.result()


def interrupt_training(folder, script, out, name):
    command = [sys.executable, HERE / script, "--data", "shop", out, name,
               "--epochs", "1000000", "--patience", "1000000"]
    process = subprocess.Popen(command, cwd=folder, env=ON_THE_CPU, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    progress = b""
    while b"recall@20" not in progress:  # the bar shows a validation: there is one to keep
        part = os.read(process.stderr.fileno(), 4096)
        assert part, progress
        progress += part
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and b"error: interrupted" in err and b"Traceback" not in err
    assert (folder / name).exists()


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
    for flag, path in (("--recommend", "recs.csv"), ("--per-user", "users.npz")):
        assert call(finetune.main, *flags, flag, path, "--resume") == 2
        assert f"{path}: belongs to seed 0" in capsys.readouterr().err
    assert call(finetune.main, *flags, "--resume") == 0
    runs = json.loads(Path("m.json").read_text())["runs"]
    assert [(result["seed"], result["interrupted"]) for result in runs] == [(0, False), (1, False)]


@pytest.mark.parametrize("main", [mmcpr.main, finetune.main])
def test_resuming_is_promised_only_where_a_checkpoint_lies(interrupted, capsys, monkeypatch, main):
    interrupted(main, *TWO_EPOCHS)
    assert "the same command with --resume goes on" in capsys.readouterr().err
    for path in Path().glob("*.ckpt"):
        path.unlink()
    # Interrupted in the first step of mmcpr.py's first epoch there is nothing to go on from; in
    # fine-tuning there is epoch 0, so there the writing is prevented.
    if main is finetune.main:
        monkeypatch.setattr(checkpoints.Checkpoint, "write", lambda self: None)
    interrupted(main, *TWO_EPOCHS, after=1)
    assert "no checkpoint yet; the same command starts anew" in capsys.readouterr().err
    assert not list(Path().glob("*.ckpt"))


def test_ctrl_c_in_the_first_epoch_leaves_an_earlier_checkpoint_alone(interrupted, capsys):
    """--resume was forgotten, and the run is stopped at once."""
    interrupted(mmcpr.main, *TWO_EPOCHS)
    path, = Path().glob("*.ckpt")
    before = path.read_bytes()
    interrupted(mmcpr.main, *TWO_EPOCHS, after=1)
    assert path.read_bytes() == before
    assert call(mmcpr.main, *TWO_EPOCHS, "--resume") == 0
    assert "goes on after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_ctrl_c_while_a_checkpoint_is_written(trained, capsys, monkeypatch, n):
    """torch.save takes what is raised in it for its own: the signal waits until it is done."""
    real, calls = disk.write_file, []

    def write_file(path, write, mode="wb"):
        def interrupted_write(file):
            class Slow:
                def write(self, content):
                    calls.append(1)
                    if len(calls) == n:
                        os.kill(os.getpid(), signal.SIGINT)
                    return file.write(content)

                def flush(self):
                    file.flush()
            write(Slow() if str(path).endswith(".ckpt") else file)
        real(path, interrupted_write, mode)
    monkeypatch.setattr(disk, "write_file", write_file)
    flags = ("--data", "shop", *QUICK, "--epochs", 50, "--checkpoint-every", 0, "--out", "e.npz")
    assert call(mmcpr.main, *flags) == 2
    assert "interrupted" in capsys.readouterr().err and list(Path().glob("*.ckpt"))


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
        environments = [ON_THE_CPU]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher, environments = (), []
        for rank in "01":
            environments.append(ON_THE_CPU | {
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


# --- The documents ------------------------------------------------------------------------

def test_links_of_the_documents_lead_somewhere():
    """Files that are there, headings that are there."""
    n_links = 0
    for document in (*HERE.glob("*.md"), *HERE.glob("paper/results/*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = document.parent / file if file else document
            assert target.exists(), (document.name, link)
            if anchor:
                headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
                anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                           for heading in headings]
                assert anchor in anchors, (document.name, link)
            n_links += 1
    assert n_links > 20


def test_decisions_quote_the_code():
    """Every decision's line stands in the file that DECISIONS.md names."""
    text = (HERE / "DECISIONS.md").read_text(encoding="utf-8")
    quotes = re.findall(r"`([\w/]+\.py)`:\s+`([^`]+)`", text)
    assert len(quotes) >= 23
    for name, line in quotes:
        assert line in (HERE / name).read_text(encoding="utf-8"), (name, line)
