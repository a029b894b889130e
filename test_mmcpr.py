"""The tests: python -m pytest -q. Every fast path against the plain loop that states its definition, in float64 where a
formula is checked; the real command lines on tiny data; every documented error once. No network, GPU or other data."""
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import data
import finetune
import metrics
import mmcpr

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


def metrics_by_loop(user, item, seen, truth, k):
    recall, ndcg = [], []
    for u in range(len(user)):
        wanted = set(truth[u].indices)
        if wanted:
            order = sorted(set(range(len(item))) - set(seen[u].indices), key=lambda i: -float(user[u] @ item[i]))[:k]
            gain = sum(1 / np.log2(place + 2) for place, i in enumerate(order) if i in wanted)
            recall.append(len(wanted & set(order)) / len(wanted))
            ndcg.append(gain / sum(1 / np.log2(place + 2) for place in range(min(k, len(wanted)))))
    return {f"recall@{k}": np.mean(recall), f"ndcg@{k}": np.mean(ndcg)}


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
        assert got == pytest.approx(metrics_by_loop(user.numpy(), item.numpy(), seen, truth, k), abs=1e-12)


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
    """e'^m = W e^m + b with L2-normalised frozen rows (Eq. 6, 12) and the mean over LightGCN's layers for the graph (Eq. 2)."""
    rng = np.random.default_rng(7)
    present = np.arange(10) != 3
    model, text, image, R = tower(rng, present)
    e, alpha, projected = model(torch.arange(10))
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    want = unit @ model.W["V"].weight.detach().numpy().T + model.W["V"].bias.detach().numpy()
    np.testing.assert_allclose(projected[:, 1].detach(), want, rtol=1e-5, atol=1e-6)
    graph = sum(mmcpr.lightgcn(model.e0, mmcpr.CoInteractionGraph(R), 2)) / 3
    torch.testing.assert_close(projected[:, 2], model.W["G"](graph))
    assert alpha[3, 0] == 0 and (alpha.detach()[present, 0] > 0).all()
    (e ** 2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters()) and model.a.grad.any()
    assert model.own is None


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
    plain = lam * plain1 + (1 - lam) * plain2
    torch.testing.assert_close(loss, plain)
    assert l1.item() == pytest.approx(plain1.item() if lam > 0 else 0) and l2.item() == pytest.approx(plain2.item() if lam < 1 else 0)
    for name, g, want in zip(dict(model.named_parameters()), got, torch.autograd.grad(plain, list(model.parameters()))):
        torch.testing.assert_close(torch.zeros_like(want) if g is None else g, want, msg=name)
    if lam == 1:  # only the two projections of CIMA are trained
        moved = {name for (name, _), g in zip(model.named_parameters(), got) if g is not None and g.any()}
        assert moved <= {f"items.W.{m}.{part}" for m in "TV" for part in ("weight", "bias")}


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
    g = torch.randn(12, 3, dtype=torch.float64)
    slow, = torch.autograd.grad((sum(want) * g).sum(), model.E0)
    fast, = torch.autograd.grad((sum(model.layers()) * g).sum(), model.E0)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    user, item = model.embed()
    torch.testing.assert_close(torch.cat([user, item]), sum(want) / 4, rtol=1e-5, atol=1e-6)


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
    return total / len(users) + l2 / (2 * len(users)) * penalty


def test_mixgcf_against_the_loop():
    """Value and gradient: the arg-max over unmixed candidates and the sampled product change nothing."""
    rng = np.random.default_rng(13)
    layers = [torch.from_numpy(rng.normal(size=(20, 6))).requires_grad_() for _ in range(4)]
    users, positives = torch.from_numpy(rng.integers(8, size=9)), torch.from_numpy(rng.integers(8, 20, size=9))
    candidates, alpha = torch.from_numpy(rng.integers(8, 20, size=(9, 5))), torch.from_numpy(rng.random((4, 9)))
    fast = finetune.mixgcf_loss(layers, users, positives, candidates, alpha, 0.3)
    slow = mixgcf_by_loop(layers, users, positives, candidates, alpha, 0.3)
    torch.testing.assert_close(fast, slow)
    for got, want in zip(torch.autograd.grad(fast, layers), torch.autograd.grad(slow, layers)):
        torch.testing.assert_close(got, want)


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


def test_initial_scale_and_missing_side():
    rng = np.random.default_rng(14)
    train = binary(rng, 50, 30, 0.1, empty_row=7)
    item = rng.normal(size=(30, 16)).astype(np.float32)
    rms = lambda x: x.square().mean().sqrt().item()
    user, same = finetune.initial_tables({"item": item}, train, 16, missing_side="mean")
    np.testing.assert_array_equal(same, item)
    np.testing.assert_allclose(user[3], item[train[3].indices].mean(0), rtol=1e-5)
    assert user[7].any(), "a user without training items is drawn at random"
    for scale, want in (("xavier", (2 / 66) ** 0.5), (0.3, 0.3)):
        assert rms(finetune.initial_tables({"item": item}, train, 16, scale)[0]) == pytest.approx(want, rel=1e-5)
    random, _ = finetune.initial_tables(None, train, 16)
    assert random.abs().max() <= (6 / 66) ** 0.5 and rms(random) == pytest.approx((2 / 66) ** 0.5, rel=0.1)


@pytest.mark.parametrize("curve, evaluations", [
    ([1, 2, 3, 3, 3, 3], 6),                          # three in a row without a new best
    ([5, 4, 3, 4, 5, 6, 6, 6, 6], 9),                 # falls, then rises above its start: a new best alone would stop at 4
    ([5, 4, 3, 2, 1, 0], 6),                          # falls for good
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
    for _ in range(2):
        assert run(finetune.main, "--init", "emb.npz", "--epochs", 3, "--seeds", 0, 1, "--metrics", "m.json") == 0
        result = json.loads(Path("m.json").read_text())
        runs = [{k: v for k, v in r.items() if k != "seconds"} for r in result["runs"]]
        assert _ == 0 or runs == earlier
        earlier = runs
    values = [r["test"]["ndcg@40"] for r in runs]
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
    """An emb.npz without `user` (METHOD: baselines of items alone) takes users from --missing-side."""
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
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and b"error: interrupted" in err and b"Traceback" not in err
    assert (tmp_path / "result").exists()


def test_numbers_blow_up_in_one_line(trained, capsys):
    assert run(mmcpr.main, "--data", "shop", *QUICK, "--lr", 1e30) == 2
    assert "lower --lr" in capsys.readouterr().err


# --- The demo's planted truth: each part of the method does what it should ---------------------------------------------

def test_cima_aligns_and_its_absence_does_not():
    """Text finds its image far more often with CIMA than without; true pairs end closer than false ones."""
    rng = np.random.default_rng(15)
    pairs, text, image = shop(rng, n_items=60, tastes=8)
    parts = Namespace(train=sp.csr_matrix((np.ones(len(pairs), np.float32), pairs.T), (40, 60)), valid=sp.csr_matrix((40, 60)))
    found = {}
    for lam in (0, 0.2):
        args = mmcpr.arguments().parse_args(["--lam", str(lam), "--epochs", "60", "--lr", "0.01"])
        found[lam] = mmcpr.pretrain(parts, {"T": text, "V": image}, args)[2]["alignment"]
    assert found[0.2]["text_to_image_recall@10"] > 2 * found[0]["text_to_image_recall@10"]
    assert found[0.2]["cosine_true"] - found[0.2]["cosine_false"] > 0.5
