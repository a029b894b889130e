"""The tests of paper/: python -m pytest -q, from the root.

Every method's formulas against a plain loop; the real command lines on a tiny shop; sweeps with
the real scripts, in this process, where starting them is not what is tested.
"""
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy import stats
from PIL import Image

import data
import disk
import finetune
import metrics
import mmcpr
import ops
import run
from paper import baselines, bench, compare, epochs, map, regimes, reproduce
from paper.cells import Cell, Cells
from paper.sweep import Sweep
from conftest import HERE, binary, call, shop, write_shop

CONTENTS = ("item_text.npy", "item_image.npy", "review.npy", "items.csv")


@pytest.fixture
def shop_folder(tmp_path, monkeypatch):
    """The shop in the folder `shop` of the working directory, which is tmp_path."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop")
    return tmp_path / "shop"


def remove_contents(folder):
    """Leaves the interactions alone."""
    for file in CONTENTS:
        (folder / file).unlink()


def missing_in(rows, x):
    """x float [n, d] with NaN in the rows given."""
    x[rows] = np.nan
    return x


# --- bench.py -----------------------------------------------------------------------------

def test_generated_graph_has_the_counts_and_a_long_tail(tmp_path, monkeypatch):
    graph = bench.generate(600, 300, 5000)
    pairs = graph.users * 300 + graph.items
    assert len(graph.users) == 5000 == len(np.unique(pairs))
    assert len(graph.user_shelf) == 600 and len(graph.item_shelf) == 300
    assert graph.users.max() < 600 and graph.items.max() < 300
    for degree in (np.bincount(graph.users), np.bincount(graph.items)):
        assert degree.max() > 4 * np.median(degree)
    monkeypatch.setitem(bench.SIZES, "vg", (600, 300, 5000))
    assert call(bench.main, "--data", "vg", "--write", tmp_path / "made") == 0
    dataset = data.load(str(tmp_path / "made"))
    assert len(dataset.users) == 5000
    assert data.features(dataset, "RTV")["R"].shape == (5000, 512)
    assert call(bench.main, "--data", "demo", "--write", tmp_path / "made") == 2


def test_generated_set_is_not_written_over_the_users(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "vg", (60, 30, 500))
    (tmp_path / "interactions.csv").write_text("user,item\nmine,precious\n")
    assert call(bench.main, "--data", "vg", "--write", tmp_path) == 2
    assert "was not made here" in capsys.readouterr().err
    assert (tmp_path / "interactions.csv").read_text() == "user,item\nmine,precious\n"


def test_benchmark_compares_before_it_measures(shop_folder, capsys, monkeypatch):
    """The whole table on a tiny folder; a fast path that computes something else stops it."""
    monkeypatch.setattr(bench, "in_new_process", lambda function, *args: function(*args))
    assert call(bench.main, "--data", "shop") == 0
    out = capsys.readouterr().out
    for what in ("user graph: building", "user graph: product", "item graph: building",
                 "item graph: product", "drawing negatives, an epoch", "fine-tuning, an epoch",
                 "evaluation of", "pre-training, an epoch"):
        assert f"| shop | {what}" in out
    loss = finetune.mixgcf_loss
    monkeypatch.setattr(finetune, "mixgcf_loss", lambda *args: 1.001 * loss(*args))
    monkeypatch.setattr(bench, "machine", lambda device: (1e9, 1e9))
    assert call(bench.main, "--data", "shop") == 2
    assert "MixGCF's loss: fast and plain differ by" in capsys.readouterr().err


@pytest.mark.parametrize("M", [1, 5, 30])
def test_plain_finetuning_step_is_the_fast_one(M):
    """Value and gradient, in float64."""
    rng = np.random.default_rng(13)
    R = binary(rng, 8, 12, 0.4)
    user = torch.from_numpy(rng.normal(size=(8, 6)))
    item = torch.from_numpy(rng.normal(size=(12, 6)))
    model = finetune.LightGCN(R, user, item, 3)
    users = torch.from_numpy(rng.integers(8, size=9))
    pos_items = torch.from_numpy(rng.integers(8, 20, size=9))
    candidates = torch.from_numpy(rng.integers(8, 20, size=(9, M)))
    mix = torch.from_numpy(rng.random((4, 9)))
    A_hat = bench.coo_tensor(ops.normalised_adjacency(R), "cpu").double()
    fast = finetune.mixgcf_loss(model, users, pos_items, candidates, mix, 0.3)
    plain = bench.mixgcf_loss_plain(model.E0, A_hat, 3, users, pos_items, candidates, mix, 0.3)
    # A_hat in bench is of float32 numbers.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(fast, plain, **tolerance)
    fast_grad, = torch.autograd.grad(fast, model.E0)
    plain_grad, = torch.autograd.grad(plain, model.E0)
    torch.testing.assert_close(fast_grad, plain_grad, **tolerance)


# --- baselines.py: what several methods share ---------------------------------------------

def weighted_ring():
    """Five items in a ring with a chord, weights that differ; item 5 is alone."""
    W = np.zeros((6, 6), np.float32)
    edges = ((0, 1, 1.0), (1, 2, 3.0), (2, 3, 1.0), (3, 4, 2.0), (4, 0, 1.0), (0, 2, 2.0))
    for a, b, w in edges:
        W[a, b] = W[b, a] = w
    return sp.csr_matrix(W)


def test_item_graph_against_the_loop():
    """PMGT's weights, and of each item the heaviest edges only."""
    R = binary(np.random.default_rng(20), 30, 9, 0.3)
    C, degree = (R.T @ R).toarray(), R.toarray().sum(0)
    for block in (4096, 4):
        got = baselines.item_graph(R, 4, block).toarray()
        for a in range(9):
            want = {}
            for b in range(9):
                if b != a and C[a, b]:
                    root = np.log(np.sqrt(degree[a] * degree[b]))
                    want[b] = (np.log(C[a, b]) + 1) / (root + 1)
            heaviest = sorted(want.values(), reverse=True)[:4]
            kept = sorted(got[a][got[a] > 0], reverse=True)
            assert kept == pytest.approx(heaviest, rel=1e-5)
            for b in want:
                assert got[a, b] in (0, pytest.approx(want[b], rel=1e-5))


@pytest.mark.parametrize("method", ["mmgcn", "gcnp"])
def test_epoch_visits_every_interaction_once(method):
    """Each with one negative, an item that the user does not have."""
    rng = np.random.default_rng(31)
    R = binary(rng, 12, 9, 0.3)
    x = baselines.unit_rows({"T": rng.normal(size=(9, 4))}, "T")["T"]
    if method == "mmgcn":
        model = baselines.MMGCN(R, {"T": x}, 6, 5)
    else:
        model = baselines.GCNP(R, None, x, 6, 5, k=4)
    draw, drawn = model.draw, []

    def spy(batch):
        drawn.append(draw(batch))
        return drawn[-1]

    model.draw = spy
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        drawn.clear()
        assert len(baselines.train_epoch(model, optimizer)) == -(-R.nnz // 5)
        users, pos_items, neg_items = (torch.cat(part).tolist() for part in zip(*drawn))
        assert sorted(zip(users, pos_items)) == list(zip(*R.nonzero()))
        assert not any(R[u, j] for u, j in zip(users, neg_items))


# --- baselines.py: CLIP, MMGCN ------------------------------------------------------------

@pytest.mark.parametrize("same_space", [True, False])
def test_clip_is_the_pca_of_what_each_item_has(same_space):
    """The mean over the modalities an item has, or both side by side; numpy's SVD, any signs."""
    rng = np.random.default_rng(21)
    features = {"T": missing_in([2, 5], rng.normal(size=(12, 6))),
                "V": missing_in([3, 5], rng.normal(size=(12, 6)))}
    views = list(baselines.unit_rows(features, "TV").values())
    got = baselines.clip(views, same_space, 4)
    unit, n_views = {}, 0
    for m, x in features.items():
        unit[m] = np.nan_to_num(x / np.linalg.norm(x, axis=1, keepdims=True))
        n_views = n_views + (~np.isnan(x[:, :1])).astype(float)
    if same_space:
        x = (unit["T"] + unit["V"]) / np.maximum(n_views, 1)
    else:
        x = np.concatenate([unit["T"], unit["V"]], 1)
    present = np.delete(np.arange(12), 5)
    x = x[present] - x[present].mean(0)
    want = x @ np.linalg.svd(x)[2][:4].T
    assert not got[5].any()
    np.testing.assert_allclose(got[present].abs().numpy(), np.abs(want), rtol=1e-3, atol=1e-5)
    assert baselines.clip(views, same_space, 20)[:, 12:].abs().max() == 0


def test_mmgcn_aggregation_against_the_loop():
    """Three layers, node by node, from the equations; a missing modality starts from zeros."""
    rng = np.random.default_rng(22)
    R = binary(rng, 5, 4, 0.5, empty_row=3)
    torch.manual_seed(0)
    features = {"T": rng.normal(size=(4, 3)), "V": missing_in([1], rng.normal(size=(4, 300)))}
    views = baselines.unit_rows(features, "TV")
    model = baselines.MMGCN(R, views, 6, 10)
    neighbours = [5 + R[[u]].indices for u in range(5)]
    neighbours += [R.T.tocsr()[[i]].indices for i in range(4)]
    total = 0
    for m, view in views.items():
        zeros = torch.zeros(model.mlp[m].out_features)
        item = torch.stack([model.mlp[m](v) if v.any() else zeros for v in view])
        x = F.normalize(torch.cat([model.preference[m], item]))
        for W1, W2, W3 in model.layers[m]:
            rows = []
            for n in range(9):
                received = [W1(x[j]) for j in neighbours[n]]
                mean = sum(received) / len(received) if received else torch.zeros(6)
                h = F.leaky_relu(mean)
                itself = F.leaky_relu(W2(x[n])) + model.id[n]
                rows.append(F.leaky_relu(W3(torch.cat([h, itself]))))
            x = torch.stack(rows)
        total = total + x
    torch.testing.assert_close(torch.cat(model()), total)
    assert model.mlp["V"].out_features == 256 and model.mlp["T"].out_features == 3
    # Trained, as the paper means.
    trained = [model.id, *model.preference.values()]
    for grad in torch.autograd.grad(model.loss(torch.arange(3)), trained):
        assert grad.any()


# --- baselines.py: GPT-GNN ----------------------------------------------------------------

def test_hgt_layer_against_the_loop():
    torch.manual_seed(1)
    layer, h = baselines.HGTLayer(6, 2), torch.randn(5, 6)
    sender, receiver = torch.tensor([0, 1, 2, 3, 0, 4]), torch.tensor([1, 0, 1, 1, 2, 2])
    rows = []
    for n in range(5):
        o = torch.zeros(6)
        senders = sender[receiver == n]
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            if not len(senders):
                continue
            scores, messages = [], []
            for j in senders:
                k = layer.k(h[j])[part] @ layer.A[head]
                scores.append(layer.q(h[n])[part] @ k * layer.p[head] / 3 ** 0.5)
                messages.append(layer.v(h[j])[part] @ layer.M[head])
            attention = torch.stack(scores).softmax(0)
            o[part] = (attention[:, None] * torch.stack(messages)).sum(0)
        s = torch.sigmoid(layer.skip)
        rows.append(s * layer.out(F.gelu(o)) + (1 - s) * h[n])
    torch.testing.assert_close(layer(h, sender, receiver), torch.stack(rows))


def pairs_of(sender, receiver):
    """The undirected edges, a set."""
    return {frozenset(edge) for edge in zip(sender.tolist(), receiver.tolist())}


def test_gptgnn_never_sees_the_edges_it_must_predict(monkeypatch):
    """Neither direction of a held-out edge reaches the encoder; copies receive, send nothing."""
    rng = np.random.default_rng(23)
    torch.manual_seed(0)
    x = torch.from_numpy(rng.normal(size=(40, 5))).float()
    model = baselines.GPTGNN(binary(rng, 60, 40, 0.15), x, 8, 16, n_heads=2)
    encode, hold_out = model.encode, model.hold_out
    encoded, held_out = [], []

    def spy_encode(x, sender, receiver):
        encoded.append((x, sender, receiver))
        return encode(x, sender, receiver)

    def spy_hold_out(sender, receiver, n_nodes, n_targets):
        is_out = hold_out(sender, receiver, n_nodes, n_targets)
        held_out.append((sender, receiver, n_nodes, n_targets, is_out))
        return is_out

    monkeypatch.setattr(model, "encode", spy_encode)
    monkeypatch.setattr(model, "hold_out", spy_hold_out)
    for targets in model.batches():
        model.loss(targets)
        x, s, r = encoded[-1]
        sender, receiver, n, b, is_out = held_out[-1]
        hidden = pairs_of(sender[is_out], receiver[is_out])
        observed = pairs_of(sender[~is_out], receiver[~is_out])
        assert hidden and not hidden & observed
        to_node = r < n
        assert not hidden & pairs_of(s[to_node], r[to_node])
        assert not hidden & pairs_of(s[~to_node], r[~to_node] - n)
        assert s.max() < n and torch.equal(x[n:], model.copy_input.expand(b, -1))
        is_at_target = torch.minimum(sender, receiver) < b
        assert 0.3 < is_out[is_at_target].float().mean() < 0.7
        assert not is_out[~is_at_target].any()


@pytest.mark.parametrize("epoch", [1, 10, 30])
def test_gptgnn_negatives_share_no_user_with_the_target(epoch):
    """The loss by a plain loop, where most edges of G_i are not kept; so for the queue.

    Item 0 shares a user with every other one: without any negative its edges cost nothing.
    """
    rng = np.random.default_rng(32)
    R = binary(rng, 40, 30, 0.06).tolil()
    for other in range(30):
        R[other, [0, other]] = 1
    R = R.tocsr()
    A = (R.T @ R).toarray() > 0
    torch.manual_seed(0)
    model = baselines.GPTGNN(R, torch.randn(30, 5), 8, 16, n_heads=2, cap=2).eval()
    kept = model.graph.toarray() > 0
    assert kept.sum() < A.sum() / 2
    model.epoch = epoch
    # Items of the step: the first four are targets. Of the queue a part counts.
    nodes = torch.tensor([0, 7, 3, 9, 12, 5, 20, 21, 25, 28])
    h = torch.randn(10, 8, requires_grad=True)
    queue = F.normalize(torch.randn(256, 8))
    queue_items = torch.from_numpy(rng.integers(30, size=256))
    model.queue, model.queue_items = queue, queue_items
    sender, receiver = torch.tensor([4, 5, 1, 8, 2]), torch.tensor([0, 1, 2, 3, 3])
    loss = model.edge_loss(h, nodes, sender, receiver, 4)

    def score(target, vector):
        return F.cosine_similarity(model.edge(h[target]), vector, dim=0) / 0.1

    losses, n_left_out = [], 0
    for s, t in zip(sender.tolist(), receiver.tolist()):
        length = min(256, 256 * epoch // 20)
        others = list(zip(nodes.tolist(), h)) + list(zip(queue_items.tolist(), queue[:length]))
        negatives = []
        for item, vector in others:
            target = nodes[t].item()
            if item != target and not A[target, item]:
                negatives.append(score(t, vector))
            n_left_out += item != target and A[target, item] and not kept[target, item]
        scores = torch.stack([score(t, h[s]), *negatives])
        losses.append(-scores.log_softmax(0)[0])
    assert n_left_out and losses[0] == 0 and min(losses[1:]) > 0
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert torch.autograd.grad(loss, h)[0].isfinite().all()
    # The queue keeps which item a vector is of; the newest in front.
    place = {item: n for n, item in enumerate(nodes.tolist())}
    assert len(model.queue) == 256
    assert sorted(model.queue_items[:10].tolist()) == sorted(nodes.tolist())
    for vector, item in zip(model.queue[:10], model.queue_items[:10].tolist()):
        torch.testing.assert_close(vector, F.normalize(h[place[item]].detach(), dim=0))
    assert torch.equal(model.queue[10:], queue[:246])
    assert torch.equal(model.queue_items[10:], queue_items[:246])


# --- baselines.py: Graph-BERT -------------------------------------------------------------

def test_intimacy_against_the_dense_inverse():
    """The k largest of each row of S, but the item's own; blocks do not matter."""
    R = binary(np.random.default_rng(24), 50, 20, 0.08)
    A = ((R.T @ R).toarray() > 0) * (1 - np.eye(20))
    degree = np.maximum(A.sum(0), 1)
    S = 0.15 * np.linalg.inv(np.eye(20) - 0.85 * A / degree)
    np.fill_diagonal(S, 0)
    graph = ops.CoInteractionGraph(R.T.tocsr())
    index, value = baselines.intimacy(graph, 4, n_steps=200, block=7)
    np.testing.assert_allclose(value, -np.sort(-S, 1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(S, index.numpy(), 1), value, atol=1e-5)
    alone = np.flatnonzero(A.sum(1) == 0)
    assert len(alone)
    assert (index[alone] == torch.from_numpy(alone)[:, None]).all()  # its own context


def test_graphbert_contexts_and_losses_against_the_loop():
    """Codes, each of a root mean square of .02, what z must say and how near it must be; empty
    places of a context have no pair."""
    rng = np.random.default_rng(28)
    R = binary(rng, 40, 20, 0.06)
    A = ((R.T @ R).toarray() > 0) * (1 - np.eye(20, dtype=int))
    torch.manual_seed(0)
    x = torch.from_numpy(rng.normal(size=(20, 5))).float()
    x[3, :2] = 0
    mask = (x != 0).float()
    model = baselines.GraphBERT(R, x, mask, 8, 20, k=6).eval()  # no dropout
    index, S = baselines.intimacy(ops.CoInteractionGraph(R.T.tocsr()), 6)
    rows = torch.arange(20)
    is_empty = index == rows[:, None]
    assert is_empty.any() and is_empty.all(1).any() and not is_empty.all()
    assert torch.equal(model.context, index)
    for i in range(20):
        for place, j in enumerate([i, *index[i].tolist()]):
            hops = 0 if j == i else 1 if A[i, j] else 2
            want = 0
            for code in (A[j].sum(), place, hops):
                wave = baselines.sinusoid(torch.tensor(float(code)), 8)
                want = want + 0.02 * wave / wave.square().mean().sqrt()
            torch.testing.assert_close(model.codes[i, place], want)

    draw_pairs, drawn = model.draw_pairs, []

    def spy(rows):
        near, closeness, far = draw_pairs(rows)
        drawn.append((near.tolist(), far.tolist()))
        return near, closeness, far

    model.draw_pairs = spy
    losses = [model.loss(rows).item() for _ in range(3)]
    z = model.encode(rows)

    def cosine(a, b):
        return F.cosine_similarity(z[a], z[b], dim=0).item()

    for loss, (near, far) in zip(losses, drawn):
        errors, near_gaps, far_gaps = [], [], []
        for i in range(20):
            error = (model.attribute(z[i]) - x[i]).square()
            errors.append(sum(error[c].item() for c in range(5) if mask[i, c]))
            if near[i] != i:
                closeness = (S[i, index[i] == near[i]] / S[i, 0]).item()
                near_gaps.append((cosine(i, near[i]) - closeness) ** 2)
            assert far[i] != i
            far_gaps.append(cosine(i, far[i]) ** 2)
        want = np.mean(errors) + np.mean(near_gaps) + np.mean(far_gaps)
        assert loss == pytest.approx(want, rel=1e-4) and len(near_gaps) < 20


# --- baselines.py: PMGT -------------------------------------------------------------------

def test_mcn_sampling_frequencies():
    """One draw: in proportion to the weights. Two hops: the nearer counts more; short lists."""
    graph, rng = weighted_ring(), np.random.default_rng(25)
    drawn = [baselines.mcn_sampling(graph, rng, (1,), 1).numpy() for _ in range(4000)]
    drawn = np.concatenate(drawn, 1)
    for item in range(5):
        share = np.bincount(drawn[item], minlength=6) / 4000
        weights = graph[[item]].toarray()[0]
        np.testing.assert_allclose(share, weights / weights.sum(), atol=0.035)
    assert (drawn[5] == 5).all()
    path = sp.csr_matrix(np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32))
    contexts = set()
    for _ in range(50):
        contexts.add(tuple(baselines.mcn_sampling(path, rng, (3, 1), 3)[0].tolist()))
    assert contexts <= {(1, 2, 1), (1, 1, 1)} and (1, 2, 1) in contexts


def test_mcn_sampling_without_any_edge():
    """Every item is its own context."""
    nothing = sp.csr_matrix((4, 4), dtype=np.float32)
    context = baselines.mcn_sampling(nothing, np.random.default_rng(0), (2, 1), 3)
    assert torch.equal(context, torch.arange(4)[:, None].expand(4, 3))


def test_diversity_attention_against_its_formula():
    torch.manual_seed(2)
    layer, h = baselines.DiverseLayer(6, 2, 0.3), torch.randn(2, 4, 6)
    got = layer.attention(h)
    for b in range(2):
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            q, k, e = layer.q(h[b])[:, part], layer.k(h[b])[:, part], layer.e(h[b])[:, part]
            unlike = torch.zeros(4, 4)
            for x in range(4):
                for y in range(4):
                    unlike[x, y] = 1 - torch.cosine_similarity(e[x], e[y], dim=0) + (x == y)
            want = 0.7 * (q @ k.T / 3 ** 0.5).softmax(1) + 0.3 * unlike.softmax(1)
            torch.testing.assert_close(got[b, head], want)


def pmgt_views(rng):
    """Unit rows of 20 items: texts of 4 numbers, images of 3, which the first five lack."""
    features = {"T": rng.normal(size=(20, 4)),
                "V": missing_in(range(5), rng.normal(size=(20, 3)))}
    return baselines.unit_rows(features, "TV")


def test_pmgt_starts_from_the_contents():
    """Positions and roles from N(0, .01): items of different contents have different vectors."""
    rng = np.random.default_rng(33)
    torch.manual_seed(0)
    features = {"T": rng.normal(size=(200, 32)), "V": rng.normal(size=(200, 16))}
    views = baselines.unit_rows(features, "TV")
    model = baselines.PMGT(binary(rng, 300, 200, 0.01), views, 64, 100, k=20)
    for table in (model.position, model.role):
        assert abs(table.mean()) < 0.003
        assert table.std().item() == pytest.approx(0.01, rel=0.15)
    for linear in (*model.project, model.gate):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    _, item = baselines.embed(model)
    assert baselines.mean_cosine(item) < 0.6


def test_pmgt_masks_context_tokens_only():
    rng = np.random.default_rng(26)
    torch.manual_seed(0)
    views = pmgt_views(rng)
    model = baselines.PMGT(binary(rng, 40, 20, 0.2), views, 8, 10)
    _, items, is_masked = model.encode_masked(torch.arange(20))
    assert torch.equal(items[:, 0], torch.arange(20))
    assert not is_masked[:, 0].any() and (is_masked.sum(1) == 2).all()
    # A missing modality has no gate.
    text_only = model.project[0](model.views[0][:5])
    torch.testing.assert_close(model.fuse(torch.arange(5)), text_only)


def test_pmgt_losses_against_the_loop():
    """Cosines to a neighbour and to an item that shares no user; masked items' raw features."""
    rng = np.random.default_rng(29)
    # Ten items without users, which share none with themselves.
    R = binary(rng, 20, 40, 0.06, empty_row=range(10)).T.tocsr()
    A = (R.T @ R).toarray() > 0
    np.fill_diagonal(A, False)
    torch.manual_seed(0)
    views = pmgt_views(rng)
    raw = np.concatenate([view.numpy() for view in views.values()], 1)
    model = baselines.PMGT(R, views, 8, 20)
    draw_pairs, encode_masked = model.draw_pairs, model.encode_masked
    seen = {}

    def spy(rows):
        seen["pairs"] = draw_pairs(rows)
        return seen["pairs"]

    def spy_masked(rows):
        seen["masked"] = encode_masked(rows)
        return seen["masked"]

    model.draw_pairs, model.encode_masked = spy, spy_masked
    n_itself = 0
    for _ in range(4):
        loss = model.loss(torch.arange(20)).item()
        # Each item on its own.
        z = [model.pool(model.encode(torch.tensor([i]))[0][0, 0]) for i in range(20)]
        structure = []

        def cosine(a, b):
            return F.cosine_similarity(z[a], z[b], dim=0)

        near, _, far, _ = seen["pairs"]
        for i in range(20):
            n_itself += far[i] == i < 10
            if A[i].any():
                assert A[i, near[i]]
                structure.append(F.softplus(-cosine(i, near[i])).item())
            if far[i] != i and not A[i, far[i]]:
                structure.append(F.softplus(cosine(i, far[i])).item())
        h, items, is_masked = seen["masked"]
        features = []
        for i, t in is_masked.nonzero().tolist():
            j = items[i, t].item()
            error = (model.feature(h[i, t]) - torch.from_numpy(raw[j])).square()
            # The first five items have no image, the last three columns.
            features.append(error[:4 if j < 5 else 7].sum().item())
        assert loss == pytest.approx(np.mean(structure) + np.mean(features), rel=1e-4)
    assert n_itself and A.any()


# --- baselines.py: GCN-P ------------------------------------------------------------------

def dense_nearest(x, k):
    """[n, n]: of each row's k largest cosines those above 0, without the row itself."""
    S, n = x @ x.T, len(x)
    near = torch.zeros_like(S)
    for a in range(n):
        others = [b for b in range(n) if b != a]
        for b in sorted(others, key=lambda b: -S[a, b])[:k]:
            near[a, b] = S[a, b].clamp(min=0)
    return near


def test_gcnp_layers_and_loss_against_the_loop():
    rng = np.random.default_rng(30)
    R = binary(rng, 12, 9, 0.3)
    x = baselines.unit_rows({"T": rng.normal(size=(9, 4)) + 1}, "T")["T"]
    A = ((R @ R.T).toarray() > 0) * (1 - np.eye(12))
    torch.manual_seed(0)
    model = baselines.GCNP(R, None, x, 6, 100, k=4)
    for bias in model.biases:
        torch.nn.init.normal_(bias)
    outputs = []
    for side, S in enumerate((torch.from_numpy(A).float(), dense_nearest(x, 4))):
        h = model.tables[side]
        for W in model.layers[side]:
            degree = S.sum(1, keepdim=True)
            mean = S @ h / torch.where(degree > 0, degree, 1)
            h = F.normalize(torch.tanh((mean + h) @ W.weight.T + W.bias))
        outputs.append(h)
    for got, want in zip(model.embed(), outputs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    batch, neg_items = [2, 7, 11], torch.tensor([4, 4, 8])
    users, pos_items = (part[batch] for part in R.nonzero())
    model.sample_negatives = lambda users, m: neg_items[:, None]

    def probability(u, i):
        score = outputs[0][u] @ outputs[1][i] + model.biases[0][u] + model.biases[1][i]
        return torch.sigmoid(score).item()

    want = 0
    for u, i, j in zip(users, pos_items, neg_items):
        want += (-np.log(probability(u, i)) - np.log(1 - probability(u, j))) / 3
    assert model.loss(torch.tensor(batch)).item() == pytest.approx(want, rel=1e-4)


def test_gcnp_graph_against_the_dense_one():
    """The 20 nearest against a sort, with the gradient; chunks do not matter."""
    rng = np.random.default_rng(27)
    x = F.normalize(torch.from_numpy(rng.normal(size=(30, 8)) + 1)).float()
    h = torch.from_numpy(rng.normal(size=(30, 3))).float().requires_grad_()
    g = torch.from_numpy(rng.normal(size=(30, 3))).float()
    S = dense_nearest(x, 20)
    graph = baselines.NeighbourGraph(baselines.nearest_neighbours(x, 20, 7))
    got, want = graph(h), S / S.sum(1, keepdim=True) @ h
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got_grad, want_grad = torch.autograd.grad(got, h, g), torch.autograd.grad(want, h, g)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-5)


# --- baselines.py: training ---------------------------------------------------------------

class Stub(torch.nn.Module):
    """A method of n_steps steps an epoch that nothing can be learned from."""

    def __init__(self, n_steps=1):
        super().__init__()
        self.n_steps = n_steps
        self.table = torch.nn.Parameter(torch.full((3, 2), 2.0))

    def batches(self):
        return range(self.n_steps)

    def loss(self, batch):
        return 0 * self.table.sum()

    def embed(self):
        return None, self.table.detach().clone()


def train_stub(monkeypatch, stub, method, lr, *flags):
    """The Trial of the stub in place of the method, all else as it is by default."""
    args = baselines.arguments().parse_args(["--method", method, *flags])
    parts = Namespace(train=None)
    monkeypatch.setattr(baselines, "build_model", lambda *_: stub)
    monkeypatch.setattr(baselines, "validate", lambda *_: 0.5)
    return baselines.pretrain(args, parts, {}, lr)


@pytest.mark.parametrize("n_steps, epochs", [(1, 1005), (3, 340), (100, 55)])
def test_patience_counts_steps(monkeypatch, n_steps, epochs):
    """1,000 steps without a new best, however many make an epoch, and ten validations, of which
    every 5th epoch has one."""
    trial = train_stub(monkeypatch, Stub(n_steps), "mmgcn", 0.01)
    assert trial.report["epoch"] == 5 and trial.report["step"] == 5 * n_steps
    assert trial.report["epochs_run"] == epochs
    assert trial.report["steps_run"] == n_steps * epochs >= 1000 + 5 * n_steps


@pytest.mark.parametrize("method, decay", [("pmgt", 1e-4), ("gptgnn", 1e-2), ("mmgcn", 0),
                                           ("gcnp", 0)])
def test_decay_apart_from_the_gradient(monkeypatch, method, decay):
    """A step at rate .1, without any gradient, from a table of 2s."""
    trial = train_stub(monkeypatch, Stub(), method, 0.1, "--epochs", "1")
    want = torch.full((3, 2), 2 * (1 - 0.1 * decay))
    torch.testing.assert_close(trial.item, want, rtol=0, atol=1e-6)


def test_decay_of_graphbert_is_part_of_the_gradient(monkeypatch):
    """Adam's first step is the rate, .1, against the gradient, however small that is."""
    stub = Stub()
    stub.loss = lambda batch: (stub.table * torch.tensor([0, -1e-3])).sum()
    trial = train_stub(monkeypatch, stub, "graphbert", 0.1, "--epochs", "1")
    # The decay's gradient is 5e-4 * 2; in the second column the loss's cancels it.
    want = torch.tensor([1.9, 2]).expand(3, 2)
    torch.testing.assert_close(trial.item, want, rtol=0, atol=1e-3)


def test_users_of_a_validation_are_means_of_centred_items():
    """Where all items lean one way, more or less, what they differ in says whom they are for."""
    rng = np.random.default_rng(34)
    user_taste, item_taste = rng.integers(2, size=30), rng.integers(2, size=60)
    liked = (user_taste[:, None] == item_taste) & (rng.random((30, 60)) < 0.5)
    is_valid = liked & (rng.random((30, 60)) < 0.3)
    train = sp.csr_matrix((liked & ~is_valid).astype(np.float32))
    valid = sp.csr_matrix(is_valid.astype(np.float32))
    columns = [2 * item_taste - 1, 30 + 0.3 * rng.normal(size=60)]
    item = torch.from_numpy(np.stack(columns, 1)).float()
    user, uncentred = torch.zeros(30, 2), torch.zeros(30, 2)
    for u in range(30):
        bought = item[train[[u]].indices]
        user[u] = (bought - item.mean(0)).mean(0)
        uncentred[u] = bought.mean(0)
    users = np.flatnonzero(np.diff(valid.indptr))
    got = baselines.validate(None, item, Namespace(train=train, valid=valid))
    want = metrics.evaluate_plain(user, item, train, valid, 20, users)["recall@20"]
    without = metrics.evaluate_plain(uncentred, item, train, valid, 20, users)["recall@20"]
    assert got == pytest.approx(want) and got > without + 0.2


def test_mean_cosine_against_the_double_loop():
    rng = np.random.default_rng(35)
    x = torch.from_numpy(rng.normal(size=(9, 4)) + 0.7)
    x[3] = 0
    cosines = []
    for a in range(9):
        for b in range(9):
            if a != b:
                cosines.append(F.cosine_similarity(x[a], x[b], dim=0).item())
    assert baselines.mean_cosine(x) == pytest.approx(np.mean(cosines))


# --- baselines.py: the command line -------------------------------------------------------

TRAINED = ("mmgcn", "gptgnn", "graphbert", "pmgt", "gcnp")
ON_SHOP = ("--data", "shop", "--dim", 8, "--out", "b.npz")


def pretrain(method, *flags):
    """The exit code of paper.baselines on the shop."""
    return call(baselines.main, "--method", method, *ON_SHOP, *flags)


def report_of(path):
    return data.load_embeddings(path)["meta"]["report"]


def test_baseline_does_not_write_over_mmcprs_embeddings(shop_folder, capsys):
    Path("emb.npz").write_bytes(b"mine")
    assert call(baselines.main, "--method", "constant", "--data", "shop") == 0
    assert Path("emb.npz").read_bytes() == b"mine" and Path("constant.npz").is_file()
    assert "next: python finetune.py --init constant.npz" in capsys.readouterr().out


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_baseline_initialises_finetuning(shop_folder, capsys, method):
    """Its loss falls, validation chooses the rate, its emb.npz fine-tunes; twice the same."""
    flags = ("--epochs", 12, "--batch", 64, "--eval-every", 3)
    assert pretrain(method, *flags, "--lr", 0.01) == 0
    arrays = data.load_embeddings("b.npz")
    assert arrays["item"].shape == (30, 8)
    assert ("user" in arrays) == (method in ("popular", "mmgcn", "gcnp"))
    # Ready features are not CLIP's.
    assert arrays["meta"]["method"] == ("text+image" if method == "clip" else method)
    report = arrays["meta"]["report"]
    cosine = baselines.mean_cosine(torch.from_numpy(arrays["item"]))
    assert report["mean_cosine"] == pytest.approx(cosine, abs=1e-6)
    assert f"mean cosine of the item rows {cosine:.3f}" in capsys.readouterr().out
    if method in TRAINED:
        assert report["history"][-1]["loss"] < report["history"][0]["loss"]
        assert pretrain(method, *flags, "--lr", 1e-6, 0.01, "--out", "two.npz") == 0
        two = data.load_embeddings("two.npz")
        slow, fast = two["meta"]["report"]["trials"]
        assert two["meta"]["report"]["recall@20"] == max(slow["recall@20"], fast["recall@20"])
        # The same method, rate and seed a second time.
        assert fast | {"seconds": 0} == report["trials"][0] | {"seconds": 0}
        is_better = fast["recall@20"] > slow["recall@20"]
        assert two["meta"]["report"]["lr"] == (0.01 if is_better else 1e-6)
        if is_better:
            assert np.array_equal(two["item"], arrays["item"])
    assert call(finetune.main, "--init", "b.npz", "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert "test, init b.npz" in out and "interrupted" not in out


def test_rates_that_were_finished_outlive_an_interruption(shop_folder, capsys, monkeypatch):
    train, rates = baselines.pretrain, []

    def stop_at_the_third(args, parts, features, lr):
        rates.append(lr)
        if len(rates) == 3:
            raise KeyboardInterrupt
        return train(args, parts, features, lr)

    monkeypatch.setattr(baselines, "pretrain", stop_at_the_third)
    assert pretrain("mmgcn", "--epochs", 2, "--eval-every", 1) == 2
    report = report_of("b.npz")
    assert [trial["lr"] for trial in report["trials"]] == rates[:2]
    assert report["recall@20"] == max(trial["recall@20"] for trial in report["trials"])
    out, err = capsys.readouterr()
    assert "lr 0.001: loss" in out and "interrupted" in err
    assert call(finetune.main, "--init", "b.npz", "--epochs", 1) == 0
    assert "b.npz: of a pre-training that was interrupted" in capsys.readouterr().out


def test_baseline_at_rates_that_diverge(shop_folder, capsys):
    """What another rate found is kept; nothing that is not finite is written."""
    flags = ("--epochs", 2, "--eval-every", 1)
    for n_epochs in (1, 2):  # one: the loss is still finite, the tables no more
        assert pretrain("mmgcn", *flags, "--lr", 1e30, "--epochs", n_epochs) == 2
        assert "not finite" in capsys.readouterr().err and not Path("b.npz").exists()
    assert pretrain("mmgcn", *flags, "--lr", 1e30, 0.01) == 0
    report = report_of("b.npz")
    assert report["lr"] == 0.01 and len(report["trials"]) == 1
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize("spread, is_alike", [(0.05, True), (0.3, False)])
def test_rows_that_are_nearly_alike_are_warned_of(shop_folder, capsys, monkeypatch, spread,
                                                  is_alike):
    torch.manual_seed(0)
    item = 1 + spread * torch.randn(30, 8)
    monkeypatch.setattr(baselines, "embed", lambda model: (None, item))
    assert pretrain("pmgt", "--epochs", 1, "--lr", 0.01) == 0
    report, out = report_of("b.npz"), capsys.readouterr().out
    assert (report["mean_cosine"] > 0.99) == is_alike
    assert ("item rows are nearly alike" in out) == is_alike
    assert ("(mean cosine 0.99" in out) == is_alike
    # Who learns nothing has not learned little.
    assert pretrain("constant") == 0 and report_of("b.npz")["mean_cosine"] == pytest.approx(1)
    assert "nearly alike" not in capsys.readouterr().out


def test_baseline_without_validation(shop_folder, capsys):
    """One rate, no recall, the last epoch."""
    flags = ("--epochs", 2, "--eval-every", 1, "--valid", 0)
    assert pretrain("mmgcn", *flags, "--lr", 1e-3, 0.01) == 2
    assert "nothing chooses among several learning rates" in capsys.readouterr().err
    assert pretrain("mmgcn", *flags, "--lr", 0.01) == 0
    report = report_of("b.npz")
    assert report["recall@20"] is None and report["epoch"] == 2
    assert "Recall" not in capsys.readouterr().out


@pytest.mark.parametrize("method, n_heads", [("gptgnn", 4), ("graphbert", 2), ("pmgt", 2)])
def test_width_that_the_heads_do_not_divide(shop_folder, capsys, method, n_heads):
    assert pretrain(method, "--dim", 9) == 2
    assert f"{n_heads} attention heads" in capsys.readouterr().err
    assert pretrain(method, "--dim", n_heads, "--epochs", 1, "--lr", 0.01) == 0


def test_baseline_that_is_trained_does_not_know_new_items(shop_folder, capsys):
    assert pretrain("pmgt", "--new-items", 0.1) == 2
    assert "would train on the new items" in capsys.readouterr().err
    assert pretrain("constant", "--new-items", 0.1) == 0


def test_rate_of_a_baseline_is_above_0(shop_folder, capsys):
    assert pretrain("mmgcn", "--lr", 0.01, 0) == 2
    assert "--lr must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["clip", *TRAINED])
@pytest.mark.parametrize("modality", ["T", "V"])
def test_baselines_take_a_single_modality(shop_folder, method, modality):
    flags = ("--epochs", 2, "--lr", 0.01, "--modalities", modality)
    assert pretrain(method, *flags) == 0


@pytest.mark.parametrize("method", baselines.METHODS)
def test_baselines_on_interactions_alone(tmp_path, capsys, monkeypatch, method):
    """GCN-P falls back on co-interaction graphs; what needs features says there is nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    pairs = shop(np.random.default_rng(0))[0]
    disk.write_csv(tmp_path / "bare/interactions.csv", ("user", "item"), pairs)
    code = pretrain(method, "--data", "bare", "--epochs", 2, "--lr", 0.01)
    assert code == (0 if method in ("popular", "constant", "gcnp") else 2)
    assert code == 0 or f"nothing for --method {method}" in capsys.readouterr().err


def test_popular_ranks_by_training_interactions(shop_folder):
    """finetune.py --layers 0 --epochs 0 tests that ranking itself."""
    assert pretrain("popular") == 0
    assert call(finetune.main, "--init", "b.npz", "--layers", 0, "--epochs", 0,
                "--metrics", "m.json") == 0
    parts = data.split_dataset(data.load("shop", contents=False))
    count = np.asarray(parts.train.sum(0)).ravel()
    want = metrics.evaluate(torch.ones(40, 1), torch.from_numpy(count)[:, None],
                            (parts.train + parts.valid).tocsr(), parts.test)
    assert json.loads(Path("m.json").read_text())["test"] == pytest.approx(want)


# --- compare.py ---------------------------------------------------------------------------

def test_user_table_puts_every_user_into_its_column():
    runs = [{"user_ids": np.array(["b", "d"]), "recall@20": np.array([0.5, 1])},
            {"user_ids": np.array(["a", "b"]), "recall@20": np.array([0.25, 0])}]
    got = compare.user_table(runs, np.array(["a", "b", "c", "d"]), "recall@20")
    want = [[np.nan, 0.5, np.nan, 1], [0.25, 0, np.nan, np.nan]]
    np.testing.assert_array_equal(got, want)


def test_bootstrap_of_a_known_difference():
    """One run: the mean difference, and the standard error of a mean. No difference is no news,
    and a large one is sure."""
    rng = np.random.default_rng(0)
    other = rng.normal(size=(1, 900))
    gap = 0.1 + rng.normal(size=(1, 900))
    found = compare.paired_bootstrap(other + gap, other)
    assert found.mean == pytest.approx(gap.mean())
    assert found.error == pytest.approx(gap.std() / 30, rel=0.06)
    z = gap.mean() / (gap.std() / 30)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.5, abs=0.005)
    assert compare.paired_bootstrap(other, other).p == 1
    assert compare.paired_bootstrap(other + 1 + gap, other).p < 0.001


@pytest.mark.parametrize("of_user, of_run, noise",
                         [(1, 0, 0), (1, 0, 1), (0.3, 0, 1), (0.5, 0.2, 1)])
def test_error_of_the_bootstrap_is_the_spread_of_the_mean(of_user, of_run, noise):
    """Over many made-up experiments of three runs: what users, runs and their noise add."""
    rng = np.random.default_rng(2)
    means, errors = [], []
    for _ in range(150):
        gap = noise * rng.normal(size=(3, 200)) + of_user * rng.normal(size=200)
        gap += of_run * rng.normal(size=(3, 1))
        found = compare.paired_bootstrap(gap, np.zeros((3, 200)), n_draws=200)
        means.append(found.mean)
        errors.append(found.error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.25)


@pytest.mark.parametrize("of_user, of_run, noise",
                         [(1, 0, 0.1), (0.5, 0.2, 1), (0, 0.1, 1), (0, 0.4, 1)])
def test_p_is_below_a_twentieth_as_rarely_as_it_says(of_user, of_run, noise):
    """Made-up experiments of three runs without any difference, that vary by users and by run."""
    rng = np.random.default_rng(3)
    ps = []
    for _ in range(400):
        gap = noise * rng.normal(size=(3, 200)) + of_user * rng.normal(size=200)
        gap += of_run * rng.normal(size=(3, 1))
        found = compare.paired_bootstrap(gap, np.zeros((3, 200)), n_draws=400)
        ps.append(found.p)
        # Below .05 where the mean is above the smallest that is told from none.
        assert (found.p < 0.05) == (abs(found.mean) > found.smallest) or 0.02 < found.p < 0.08
    assert 0.002 <= np.mean(np.array(ps) < 0.05) <= 0.08


def test_bootstrap_leaves_out_who_is_not_tested():
    rng = np.random.default_rng(1)
    ours, other = rng.normal(size=(2, 2, 50))
    ours[0, :20] = other[0, :20] = np.nan
    ours[1, 40:] = other[1, 40:] = np.nan
    found = compare.paired_bootstrap(ours, other)
    want = np.mean([(ours[0, 20:] - other[0, 20:]).mean(), (ours[1, :40] - other[1, :40]).mean()])
    assert found.mean == pytest.approx(want)


def test_bins_hold_the_means_of_who_is_in_them():
    assert compare.bin_names((0, 1, 5, np.inf)) == ["0", "1-4", "5+"]
    run = {"train": np.array([1, 4, 7]), "recall@20": np.array([0.5, 0, 1]),
           "item_train": np.array([0, 0, 3, 200]), "rank": np.array([20, 21, 0, 1])}
    _, means, counts = compare.by_user([run, run], edges=(0, 1, 5, np.inf))
    np.testing.assert_array_equal(means, [np.nan, 0.25, 1])
    assert counts.tolist() == [0, 4, 2]
    _, means, counts = compare.by_item([run], edges=(0, 1, 5, np.inf))
    assert means.tolist() == [0.5, 0, 1] and counts.tolist() == [2, 1, 1]


# --- The test over the epochs ----------------------------------------------------------------

def test_curve_ends_where_finetuning_ends(shop_folder, capsys):
    """Every point is the test of a fine-tuning of that many epochs."""
    flags = ("--data", "shop", "--valid", 0, "--eval-every", 2)
    assert call(epochs.main, *flags, "--epochs", 5, "--metrics", "curve.json") == 0
    points = json.loads(Path("curve.json").read_text())["points"]
    assert [point["epoch"] for point in points] == [0, 2, 4, 5]
    for point in points:
        flags = ("--data", "shop", "--valid", 0, "--epochs", point["epoch"])
        assert call(finetune.main, *flags, "--metrics", "m.json") == 0
        test = json.loads(Path("m.json").read_text())["test"]
        assert {name: point[name] for name in test} == test
    assert call(epochs.main, "--figure", "epochs.png", "curve.json") == 0
    assert Image.open("epochs.png").size[0] > 300


def test_curve_starts_from_tables_of_its_own_split(shop_folder, capsys):
    assert call(baselines.main, "--method", "constant", "--data", "shop") == 0
    flags = ("--init", "constant.npz", "--epochs", 1, "--metrics")
    assert call(epochs.main, *flags, "curve.json") == 0
    assert call(epochs.main, *flags, "other.json", "--valid", 0) == 2
    assert "other training interactions" in capsys.readouterr().err


def test_curve_is_not_written_over_the_data(shop_folder, capsys):
    before = (shop_folder / "interactions.csv").read_bytes()
    flags = ("--data", "shop", "--epochs", 1, "--metrics", "shop/interactions.csv")
    assert call(epochs.main, *flags) == 2 and "interactions.csv" in capsys.readouterr().err
    assert (shop_folder / "interactions.csv").read_bytes() == before


def test_curve_is_not_written_over_another(shop_folder, capsys):
    flags = ("--data", "shop", "--epochs", 1, "--metrics", "c.json")
    assert call(epochs.main, *flags) == 0
    before = Path("c.json").read_bytes()
    assert call(epochs.main, *flags) == 2 and "c.json is there" in capsys.readouterr().err
    assert Path("c.json").read_bytes() == before


def test_interrupted_curve_goes_on_to_the_same_bits(interrupted, capsys):
    flags = ("--init", "emb.npz", "--epochs", 5, "--eval-every", 2, "--metrics")
    assert call(epochs.main, *flags, "whole.json") == 0
    assert not list(Path().glob("*.ckpt"))
    # One step an epoch: the third is the first after a test.
    interrupted(epochs.main, *flags, "curve.json", after=3)
    assert "interrupted at epoch 2; curve.json has the tests so far" in capsys.readouterr().err
    points = json.loads(Path("curve.json").read_text())["points"]
    assert [point["epoch"] for point in points] == [0, 2]
    # No curve is written over: neither another one, nor this one from its start.
    assert call(epochs.main, *flags, "whole.json", "--resume") == 2
    assert call(epochs.main, *flags, "curve.json") == 2
    assert call(epochs.main, *flags, "curve.json", "--resume") == 0
    assert Path("curve.json").read_bytes() == Path("whole.json").read_bytes()
    assert not list(Path().glob("*.ckpt"))


@pytest.mark.parametrize("flags, words", [
    ((), "--metrics must say where"), (("--figure", "f.png"), "name some"),
    (("--figure", "f.png", "no.json"), "no.json: not there"),
    (("--metrics", "c.json", "--seeds", 0, 1), "further --seeds"),
    (("--metrics", "c.json", "--out", "o.npz"), "--out: "),
    (("--metrics", "c.json", "--top", 5), "--top: "),
    (("--metrics", "c.json", "--patience", 3), "--patience: "),
    (("--metrics", "c.json", "old.json"), "JSON files"),
    (("--metrics", "c.json", "--lr", 1e30, "--valid", 0), "not finite at epoch")])
def test_curve_that_is_not_there(shop_folder, capsys, flags, words):
    assert call(epochs.main, "--data", "shop", "--epochs", 2, *flags) == 2
    assert words in capsys.readouterr().err


# --- reproduce.py: sweeps on the shop, in this process ------------------------------------

MAINS = {"mmcpr.py": mmcpr.main, "baselines.py": baselines.main, "finetune.py": finetune.main}
PATH_FLAGS = ("--out", "--metrics", "--init")

# What a script has written, by all that this depends on: many sweeps below run the same cells.
WRITTEN = {}


def split_command(command):
    """(script, flags) of a command of reproduce.py."""
    if command[1] == "-m":
        return "baselines.py", command[3:]
    return Path(command[1]).name, command[2:]


def run_script(script, flags):
    """Runs a script for two epochs; None, or what it said where it failed.

    From the same flags, data and tables as before it writes what it wrote then.
    """
    digest, outputs = hashlib.sha256(script.encode()), []
    for flag, value in zip(flags, [*flags[1:], ""]):
        if flag.startswith("--data="):
            folder = Path(flag.split("=")[1])
            for path in sorted(folder.iterdir()):
                digest.update(path.name.encode() + path.read_bytes())
        elif flag.startswith("--data-dir="):
            pass
        elif flag in ("--out", "--metrics", "--per-user"):
            outputs.append(Path(value))
        elif flag == "--init" and value != "random":
            digest.update(Path(value).read_bytes())
        elif not flag.endswith((".npz", ".metrics")):
            digest.update(flag.encode() + b"\0")
    key = digest.hexdigest()
    if key not in WRITTEN:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = call(MAINS[script], *flags, "--epochs", 2, "--eval-every", 1)
        contents = [] if code else [path.read_bytes() for path in outputs]
        WRITTEN[key] = (err.getvalue() if code else None, contents)
    error, contents = WRITTEN[key]
    for path, content in zip(outputs, contents):
        path.write_bytes(content)
    return error


class Sweeps:
    """Runs reproduce.py's targets on the shop, with scripts that train for two epochs.

    ran: the commands that were started, (script, *flags) each. fails: a function of such a
    command, the error that it ends with or None.
    """

    def __init__(self):
        self.ran, self.fails = [], lambda command: None

    def side_by_side(self, commands, jobs, keep, title, folder):
        """Stands in for paper.cells.run_side_by_side: in this process, one by one."""
        for key, command in commands.items():
            script, flags = split_command(command)
            self.ran.append((script, *flags))
            error = run_script(script, flags)
            keep(key, self.fails(self.ran[-1]) or error)

    def target(self, *argv):
        """The exit code of reproduce.py."""
        return call(reproduce.main, *argv, "--data", "shop")

    def ran_script(self, script):
        return [command for command in self.ran if command[0] == script]


@pytest.fixture
def sweep(shop_folder, monkeypatch):
    sweeps = Sweeps()
    monkeypatch.setattr("paper.cells.run_side_by_side", sweeps.side_by_side)
    return sweeps


@pytest.fixture(scope="module")
def all_made(tmp_path_factory):
    """Every target from an empty folder, with two seeds: (sweeps, folder, what was printed)."""
    folder, sweeps = tmp_path_factory.mktemp("all"), Sweeps()
    write_shop(folder / "shop")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr("paper.cells.run_side_by_side", sweeps.side_by_side)
        assert sweeps.target("all", *ALL) == 0
    return sweeps, folder, out.getvalue()


@pytest.fixture
def all_targets(all_made, monkeypatch):
    """The same in the working directory: (sweeps, what was printed)."""
    sweeps, folder, out = all_made
    monkeypatch.chdir(folder)
    monkeypatch.setattr("paper.cells.run_side_by_side", sweeps.side_by_side)
    return sweeps, out


FOLDER = Path("results/shop")
SHORT = ("--seeds", 0, "--rates", "1e-2")
ALL = ("--seeds", 0, 1, "--rates", "1e-3", "1e-2", "--shares", "0.4", "1")


def cell_files():
    return sorted(FOLDER.glob("cells/*.json"))


def read_cells():
    return [json.loads(path.read_text()) for path in cell_files()]


def table_row(table, name):
    """The texts of a row of a table in Markdown."""
    for line in (FOLDER / f"{table}.md").read_text().splitlines():
        if line.startswith(f"| {name} |"):
            return line.strip("| ").split(" | ")
    return None


def mean_text(values):
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def files_made():
    """{name: bytes} of the tables."""
    return {path.name: path.read_bytes() for path in FOLDER.glob("*.[mc]*")}


def test_all_tables_and_figures_are_made(all_targets):
    """They stand in files and on the screen; a second call runs nothing and makes the same."""
    sweep, out = all_targets
    for name in ("table1", "table2", "table3", "fig3", "fig4", "scale", "regimes",
                 "paper-recipe", "new-items", "recipe"):
        assert (FOLDER / f"{name}.md").read_text().strip() in out
    for name in ("fig3", "fig4", "training", "attention", "scale", "regimes", "who"):
        assert Image.open(FOLDER / f"{name}.png").size[0] > 300
    for name in ("Random", "Constant", "Eq. 15 alone", "Random at the RMS of MMCPR as is",
                 "MMCPR, the paper's recipe", "text+image", "MMGCN", "GPT-GNN",
                 "Graph-BERT", "PMGT", "GCN-P", "MMCPR without reviews",
                 "MMCPR, contents shuffled", "MMCPR"):
        assert table_row("table2", name)
    before, n_ran = files_made(), len(sweep.ran)
    assert sweep.target("all", *ALL) == 0
    assert len(sweep.ran) == n_ran and before == files_made()
    assert not (FOLDER / "table1.csv").exists()


def usual_cells():
    """The cells of the whole split: not those of regimes and new-items."""
    return [cell for cell in read_cells() if len(cell["data"]) == 2]


def test_map_reads_what_regimes_wrote(all_targets, capsys):
    """Every curve's values are those of the table's rows, at the scale that was chosen."""
    curves = map.read_curves(FOLDER / "regimes.csv")
    assert set(curves) == set(map.LABELS)
    table = (FOLDER / "regimes.md").read_text()
    for name, start in (("Random", "random"), ("Constant", "baselines.py --method constant"),
                        ("Contents alone (RTV)", "contents"), ("MMCPR", "mmcpr.py")):
        shares, values = curves[start]
        assert shares == [0.4, 1]
        rows = [line for line in table.splitlines() if line.startswith(f"| {name} | ")]
        # The metrics at both shares; below them are the tables of who gains.
        assert [row.split(" | ")[1] for row in rows[:2]] == [mean_text(of) for of in values]
    assert call(map.main, "shop") == 0
    assert Image.open("results/map.png").size[0] > 300
    assert call(map.main, "nowhere") == 2
    assert "regimes.csv: not there" in capsys.readouterr().err
    Path("results/empty").mkdir()
    Path("results/empty/regimes.csv").write_text("a,b\n1,2\n")
    assert call(map.main, "empty") == 2
    assert "not written by python -m paper.reproduce regimes" in capsys.readouterr().err


def test_rows_are_the_means_of_the_cells_run_with_their_flags(all_targets):
    cells = usual_cells()
    assert all(cell["data"] == ["--split-seed", str(cell["seed"])] for cell in cells)
    random = []
    for cell in cells:
        if cell["pretraining"] is None and not cell["finetuning"]:
            random.append(cell["finetune"]["test"]["recall@20"])
    assert len(random) == 2 and table_row("table2", "Random")[1] == mean_text(random)
    # Of MMCPR's variants: those with its flags, from the scale that was chosen.
    variants = [("table3", "w/o BCE (λ = 1)", {"--lam", "1"}),
                ("fig3", "VG", {"--modalities", "VG"}),
                ("fig3", "RTV shuffled", {"--modalities", "RTV", "--shuffle-contents"}),
                ("fig4", "softmax, λ = 0.4", {"--lam", "0.4"}),
                ("fig4", "bce, λ = 0.6", {"--lam", "0.6", "--cima", "bce"})]
    ours = [cell for cell in cells if cell["pretraining"] and cell["pretraining"][0] == "mmcpr.py"]
    chosen = next(cell for cell in ours if "0.4" in cell["pretraining"])
    for table, row, flags in variants:
        values = []
        for cell in ours:
            is_variant = set(cell["pretraining"][3:]) == flags
            same_rate = cell["pretraining"][:3] == chosen["pretraining"][:3]
            if is_variant and same_rate and cell["finetuning"] == chosen["finetuning"]:
                values.append(cell["finetune"]["test"]["ndcg@40"])
        assert len(values) == 2 and table_row(table, row)[5] == mean_text(values)


def test_every_run_stands_in_the_csv_once(all_targets):
    """And says what its cell says."""
    with open(FOLDER / "table2.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_command = {(row["pretraining"], row["finetuning"], row["seed"]): row for row in rows}
    # The choice: seven systems at two rates and two scales, text+image and constant at two
    # scales, Random and popularity. The other seed of eleven systems. Three more rows of two
    # seeds each; the paper's recipe at two scales, and the other seed.
    assert len(by_command) == len(rows) == (7 * 2 * 2 + 2 * 2 + 2) + 11 + 3 * 2 + 3
    for cell in usual_cells():
        pretraining = cell["pretraining"] or ["random"]
        finetuning = ["finetune.py", *cell["finetuning"]]
        row = by_command.get((" ".join(pretraining), " ".join(finetuning), str(cell["seed"])))
        is_variant = {"--lam", "--cima", "--modalities"} & set(pretraining)
        if is_variant and not {"TVG", "none"} & set(pretraining):
            assert row is None  # of other tables
        elif row:
            found = cell["finetune"]
            assert float(row["recall@60"]) == pytest.approx(found["test"]["recall@60"], abs=1e-6)
            assert int(row["epoch"]) == found["epoch"]
            assert row["data"] == " ".join(cell["data"])
    assert ("random", "finetune.py", "0") in by_command
    assert ("random", "finetune.py", "1") in by_command


@pytest.mark.parametrize("seed, has_own", [(2, True), (3, False)])
def test_learning_rate_and_scale_are_the_validations_choice(sweep, seed, has_own):
    """MMCPR's for its variants too, and beside them a variant's own, where that is another."""
    assert sweep.target("table3", "--seeds", seed, "--rates", "1e-3", "1e-1") == 0
    trials = {}
    for cell in read_cells():
        # The controls are rows too.
        if cell["pretraining"] is None or cell["pretraining"][1] != "--lr":
            continue
        _, _, rate, *flags = cell["pretraining"]
        scale = "Xavier's" if "xavier" in cell["finetuning"] else "as is"
        trials.setdefault(tuple(flags), {})[rate, scale] = cell["finetune"]

    def shown(row, flags):
        """The choice in a row, whose test is that of the cell."""
        texts = table_row("table3", row)
        test = trials[flags][texts[7], texts[8]]["test"]["recall@20"]
        assert float(texts[1]) == pytest.approx(test, abs=1e-4)
        return texts[7], texts[8]

    def is_best(pair, flags):
        values = {pair: found["valid"]["recall@20"] for pair, found in trials[flags].items()}
        return len(values) == 4 and values[pair] == max(values.values())

    ours = shown("MMCPR", ())
    assert is_best(ours, ())
    for name, flags in reproduce.ABLATIONS.items():
        assert shown(name, flags) == ours
        own = f"{name}, its own rate and scale"
        assert bool(table_row("table3", own)) == has_own
        choice = shown(own, flags) if has_own else ours
        assert is_best(choice, flags) and (choice != ours) == has_own
    # Both scales start from the same tables.
    trained = [c for c in sweep.ran_script("mmcpr.py") if not {"--lam", "none"} & set(c)]
    assert len(trained) == 2


def test_recipes_are_compared_on_validation_by_the_better_scale(all_targets):
    """A row for each share and recipe, its mean over two seeds at the first one's better scale."""
    rows = {}
    for line in (FOLDER / "recipe.md").read_text().splitlines()[4:]:
        texts = line.strip("| ").split(" | ")
        rows[tuple(texts[:2])] = texts[2:]
    with open(FOLDER / "recipe.csv", newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    # Of each share and recipe the first seed at both scales, the second at the chosen one.
    assert len(runs) == 2 * 3 * len(reproduce.RECIPES)
    for share, data_flags in regimes.splits_of(regimes.TWO_SHARES).items():
        for name, flags in reproduce.RECIPES.items():
            found = {"0": {}, "1": {}}
            for run in runs:
                if (run["pretraining"] == " ".join(("mmcpr.py", *flags))
                        and ("--keep" in run["data"]) == bool(data_flags)):
                    scale = "Xavier's" if "xavier" in run["finetuning"] else "as is"
                    found[run["seed"]][scale] = float(run["valid recall@20"])
            valid, by_seed, scale = rows[share, name][:3]
            first, second = found["0"], found["1"]
            assert len(first) == 2 and list(second) == [scale]
            assert first[scale] == max(first.values())
            assert by_seed == f"{first[scale]:.4f} {second[scale]:.4f}"
            assert float(valid) == pytest.approx((first[scale] + second[scale]) / 2, abs=1e-4)
    for name, flags in reproduce.RECIPES.items():
        shared, like_popularity = {}, {}
        for cell in usual_cells():
            if cell["pretraining"] == ["mmcpr.py", *flags]:
                shared[cell["seed"]] = cell["report"]["shared_ranking"]
                like_popularity[cell["seed"]] = cell["report"]["popularity_correlation"]
        if flags:  # a cell of the default may be another target's, which names the rate
            assert len(shared) == 2
            assert rows["1", name][4] == f"{np.mean(list(shared.values())):.2f}"
            assert rows["1", name][5] == f"{np.mean(list(like_popularity.values())):.2f}"


def test_dead_modalities_are_those_that_mmcpr_warns_of():
    alive, dead = {"attention": .5, "variance": 1.}, {"attention": .5, "variance": 1e-4}
    report = {"modalities": {"user": {"R": alive, "G": dead}, "item": {"T": dead, "V": alive}}}
    assert reproduce.dead_modalities(report) == ["user G", "item T"]


def test_not_trained_is_what_it_says():
    """The control's flags leave the towers where their seed drew them."""
    rng = np.random.default_rng(0)
    train, text = binary(rng, 40, 30, 0.2), rng.normal(size=(30, 8)).astype(np.float32)
    args = mmcpr.arguments().parse_args([*reproduce.NO_TRAINING, "--seed", "3"])
    parts = data.Parts(train, sp.csr_matrix((40, 30)), None, None, "")
    user, item, _ = mmcpr.pretrain(parts, {"T": text}, args)
    torch.manual_seed(3)
    model = mmcpr.MMCPR(train, {"T": text}, True, args.dim, args.layers, args.bias)
    drawn_user, drawn_item = model.embed()
    np.testing.assert_allclose(user, drawn_user, atol=1e-7)
    np.testing.assert_allclose(item, drawn_item, atol=1e-7)


def test_patience_of_a_sweep_is_that_of_mmcpr(sweep):
    """It counts epochs; that of the other systems counts steps, and stays theirs. --epochs is of
    those of them that are trained."""
    assert sweep.target("table2", *SHORT, "--patience", 7, "--epochs", 9) == 0
    trained = sweep.ran_script("mmcpr.py")
    for command in trained:
        assert command[command.index("--patience") + 1] == "7"
        assert "--epochs" not in command
    # MMCPR, without reviews, contents shuffled, by the paper's recipe; Eq. 15 alone.
    assert len(trained) == 5
    for command in sweep.ran_script("baselines.py"):
        assert "--patience" not in command
        is_trained = command[command.index("--method") + 1] not in baselines.UNTRAINED
        assert (("--epochs", "9") in zip(command, command[1:])) == is_trained
    title = (FOLDER / "table2.md").read_text().splitlines()[0]
    assert title.endswith("patience 7, at most 9 epochs of the other systems")
    assert "1e-2" in table_row("table2", "MMCPR")


def test_sweep_with_a_failing_cell_names_it_and_goes_on(sweep, capsys):
    """Nothing is started after it; the same command runs what is missing, and only that."""
    def sixth_fails(command):
        return "the disk is gone" if len(sweep.ran) == 6 else None

    sweep.fails = sixth_fails
    assert sweep.target("scale", "--seeds", 0) == 2
    assert "finetune.py" in sweep.ran[5] and len(sweep.ran) == 6
    assert "the disk is gone" in capsys.readouterr().err
    done = sweep.ran[:5]
    sweep.ran, sweep.fails = [], lambda command: None
    assert sweep.target("scale", "--seeds", 0) == 0
    assert not set(done) & set(sweep.ran)


def test_what_an_interrupted_pretraining_left_is_not_used(sweep, capsys):
    """mmcpr.py writes its best so far when interrupted, and ends with 2: it is trained again."""
    def interrupted(command):
        return "interrupted at epoch 1" if command[0] == "mmcpr.py" else None

    sweep.fails = interrupted
    assert sweep.target("scale", "--seeds", 0) == 2
    assert "interrupted at epoch 1" in capsys.readouterr().err
    stopped = sweep.ran_script("mmcpr.py")
    sweep.ran, sweep.fails = [], lambda command: None
    assert sweep.target("scale", "--seeds", 0) == 0
    assert set(stopped) <= set(sweep.ran)


def diverging_at(value):
    """A sweep's `fails`: commands with this flag's value diverge."""
    def fails(command):
        if value in command:
            return f"error: the loss is not finite at epoch 3; lower --lr (now {value})"
        return None
    return fails


def test_rate_at_which_training_diverges_is_not_chosen(sweep, capsys):
    """It loses the choice; where a cell of a table diverges, the sweep stops and says so."""
    rates = ("--rates", "1e-2", "1e-3")
    sweep.fails = diverging_at("1e-2")
    assert sweep.target("table3", "--seeds", 0, *rates) == 0
    for cell in read_cells():
        assert "diverged" in cell or "1e-2" not in (cell["pretraining"] or ())
    # And it is not tried a second time.
    sweep.ran = []
    assert sweep.target("table3", "--seeds", 0, *rates) == 0 and not sweep.ran
    # Neither pre-training nor fine-tuning.
    for seed, value in ((1, "1"), (2, "xavier")):
        sweep.fails = diverging_at(value)  # of --lam, of --scale
        code = sweep.target("table3", "--seeds", seed, "--rates", "1e-3")
        assert code == (2 if value == "1" else 0)
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:200], lambda whole: None,
    lambda whole: whole[:300] + b"\0\1" * 30 + whole[360:]])
def test_damaged_per_user_file_is_named(sweep, capsys, damage):
    """With its cell, which is to be run again too."""
    assert sweep.target("table3", *SHORT) == 0
    for path in FOLDER.glob("cells/*.npz"):
        content = damage(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    assert sweep.target("table3", *SHORT) == 2
    message = "json: damaged; delete it and run the same command again"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seed": 0}'])
def test_damaged_cell_is_named(sweep, capsys, content):
    assert sweep.target("table3", *SHORT) == 0
    path = cell_files()[0]
    path.write_text(content)
    sweep.ran = []
    assert sweep.target("table3", *SHORT) == 2
    message = f"{path.name}: damaged; delete it and run the same command again"
    assert message in capsys.readouterr().err and not sweep.ran
    path.unlink()
    assert sweep.target("table3", *SHORT) == 0


def test_damaged_tables_are_named(sweep, capsys):
    assert sweep.target("table3", *SHORT) == 0
    for path in cell_files():
        path.unlink()
    for path in FOLDER.glob("tables/*.npz"):
        path.write_bytes(b"PK")
    assert sweep.target("table3", *SHORT) == 2
    message = "npz: damaged; delete it and run the same command again"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (("--seeds", 0, 0), "--seeds names one twice"),
    (("--rates", "1e-2", "0.01"), "--rates names one twice"),
    (("--valid", 0), "--valid 0 leaves nothing to choose"),
    (("--keep", 0.5), "leave them out"), (("--new-items", 0.1), "leave them out"),
    (("--shares", "0.2", ".2"), "--shares names one twice")])
def test_flags_of_a_sweep(sweep, capsys, flags, words):
    assert sweep.target("table3", *flags) == 2 and words in capsys.readouterr().err
    assert not sweep.ran


@pytest.mark.parametrize("rate", ["abc", "-1", "nan"])
def test_rates_that_are_none(sweep, rate):
    with pytest.raises(SystemExit):
        sweep.target("table3", f"--rates={rate}")
    assert not sweep.ran


def test_rate_and_scale_of_a_row_are_its_cells(all_targets):
    """Of the rows that Table 2 adds to the systems, too."""
    for name, flags in (("MMCPR, the paper's recipe", ["mmcpr.py", *reproduce.PAPERS_RECIPE]),
                        ("MMCPR without reviews", ["--modalities", "TVG"]),
                        ("Random at the RMS of MMCPR as is", [])):
        found = {}
        for cell in usual_cells():
            command = cell["pretraining"] or []
            if command[-len(flags):] == flags:
                rate = command[command.index("--lr") + 1] if command else ""
                scale = " ".join(cell["finetuning"]).removeprefix("--scale ") or "as is"
                recall = cell["finetune"]["test"]["recall@20"]
                found.setdefault((rate, scale), []).append(recall)
        texts = table_row("table2", name)
        scale = texts[9].removeprefix("RMS ").replace("Xavier's", "xavier")
        assert texts[1] == mean_text(found[texts[8], scale])


def test_systems_and_scales_that_are_left_out(sweep):
    """Nothing of them is run; the controls and MMCPR stay."""
    assert sweep.target("table2", *SHORT, "--systems", "clip", "--scales", "xavier") == 0
    rows = (FOLDER / "table2.md").read_text()
    assert "text+image" in rows and "PMGT" not in rows and "scale Xavier's" in rows
    assert {row for row in reproduce.CONTROLS if not table_row("table2", row)} == set()
    assert not any("pmgt" in command for command in sweep.ran)
    scales = {cell["finetuning"][-1] for cell in read_cells() if "--scale" in cell["finetuning"]}
    rms = table_row("table2", "Random at the RMS of MMCPR as is")
    assert rms and len(scales) == 2 and "xavier" in scales  # and that RMS
    learned = [cell for cell in read_cells() if cell["pretraining"]]
    assert all(cell["finetuning"] in (["--scale", "xavier"], ["--layers", "0", "--epochs", "0"])
               for cell in learned)


def test_gain_is_relative_and_paired(all_targets):
    """Of two rows of a table: the difference of their means, over the other's mean."""
    for table, name, other, words in (
            ("table2", "MMCPR", "Random", "(?:over Random|best control, Random,)"),
            ("table2", "MMCPR, contents shuffled", "MMCPR", "over MMCPR,"),
            ("regimes", "Contents alone (RTV)", "MMCPR", "over MMCPR,")):
        lines = (FOLDER / f"{table}.md").read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"- {name}, recall@20: "))
        ours = float(table_row(table, name)[1].split()[0])
        theirs = float(table_row(table, other)[1].split()[0])
        said = re.search(words + r" ([+-][\d.]+) % ± [\d.]+ \(p", line)
        assert float(said[1]) == pytest.approx(100 * (ours / theirs - 1), abs=0.1)


def test_tables_of_interactions_alone(sweep, shop_folder):
    """What needs features or pairs is left out; the rest is there, with one seed too."""
    remove_contents(shop_folder)
    for name in ("table2", "table3", "fig4", "scale"):
        assert sweep.target(name, "--seeds", 0) == 0
    for name in ("Random", "GCN-P", "MMCPR"):
        assert table_row("table2", name)
    assert table_row("table2", "PMGT") is None
    assert "λ" not in (FOLDER / "table3.md").read_text()
    assert "CIMA" not in (FOLDER / "scale.md").read_text()
    assert not (FOLDER / "fig4.md").exists()  # CIMA has nothing to align
    # The graphs are all there is: the cells of Table 2.
    sweep.ran = []
    assert sweep.target("fig3", "--seeds", 0) == 0
    assert not sweep.ran and table_row("fig3", "G")


def test_what_is_not_the_default_stands_in_the_title(sweep):
    flags = ("--valid", 0.2, "--min-count", 2, "--encoder", "tiny")
    assert sweep.target("table3", *SHORT, *flags) == 0
    title = "# Table 3, shop, seeds 0, rates 1e-2, min count 2, valid 0.2, encoder tiny\n"
    assert (FOLDER / "table3.md").read_text().startswith(title)
    assert sweep.target("table1", "--min-count", 2) == 0
    assert (FOLDER / "table1.md").read_text().startswith("# Table 1, min count 2\n")


def test_the_papers_figure_stands_in_its_own_row(sweep, tmp_path):
    """Also where only one of the three rows can be made."""
    for n_rows in (3, 1):
        folder = tmp_path / str(n_rows) / "vg"
        folder.parent.mkdir()
        write_shop(folder)
        if n_rows == 1:
            remove_contents(folder)
        code = call(reproduce.main, "table3", "--data", folder, *SHORT,
                    "--results", folder.parent / "results")
        assert code == 0
        last = []
        for line in (folder.parent / "results/vg/table3.md").read_text().splitlines():
            if line.startswith(("| w/o", "| MMCPR")) and "its own" not in line:
                last.append(line.split(" | ")[-1])
        assert last == ["0.1898 |", "0.1729 |", "0.1939 |"][-n_rows:]


# --- reproduce.py: which cells are the same -----------------------------------------------

def test_changed_defaults_and_data_are_other_cells(tmp_path, monkeypatch):
    cells = Cells((), (), "abc", tmp_path, 1)
    cell = Cell(("mmcpr.py", "--lam", "0"), (), 0)
    name = cells.cell_path(cell)
    same = Cell(("mmcpr.py", "--lam", "0.0"), ("--scale", "asis"), 0)
    assert name == cells.cell_path(same)
    # Where files go changes nothing.
    same = Cell(("mmcpr.py", "--lam", "0", "--out", "x.npz"), ("--metrics", "m.json"), 0)
    assert name == cells.cell_path(same)
    other_data = Cells((), (), "abd", tmp_path, 1)
    others = {cells.cell_path(cell._replace(seed=1)),
              cells.cell_path(cell._replace(pretraining=None)), other_data.cell_path(cell)}
    assert name not in others and len(others) == 3
    arguments = mmcpr.arguments

    def with_another_tau():
        parser = arguments()
        parser.set_defaults(tau=0.2)
        return parser

    monkeypatch.setattr(mmcpr, "arguments", with_another_tau)
    assert name != Cells((), (), "abc", tmp_path, 1).cell_path(cell)


@pytest.mark.parametrize("labels, data_flags, is_drawn", [
    (None, (), True), ([0, 1, 2], (), False), ([0, 0, 2], (), True),
    ([0, 1, 2], ("--keep", "0.2"), True)])
def test_seed_has_a_split_of_its_own_where_any_of_it_is_drawn(labels, data_flags, is_drawn):
    """Published labels may lack validation, and --keep draws from any training part."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Sweep))
    labels = labels and np.array(labels, np.int8)
    fields |= {"dataset": SimpleNamespace(labels=labels), "split_seed": 5, "new_splits": True}
    cell = Sweep(**fields).cell(None, (), 2, data_flags)
    assert cell.data == (("--split-seed", "7") if is_drawn else ()) + data_flags


def test_changed_features_and_held_out_parts_are_other_cells(sweep, shop_folder):
    assert sweep.target("table3", *SHORT) == 0
    n_cells = len(cell_files())
    text = np.load(shop_folder / "item_text.npy")
    np.save(shop_folder / "item_text.npy", 2 * text)
    assert sweep.target("table3", *SHORT) == 0
    assert len(cell_files()) == 2 * n_cells
    assert sweep.target("table3", *SHORT, "--valid", 0.2) == 0
    assert len(cell_files()) == 3 * n_cells


def test_sweep_goes_on_where_the_data_has_moved(sweep, shop_folder, tmp_path):
    assert sweep.target("table3", *SHORT) == 0
    for path in cell_files():
        path.unlink()
    (tmp_path / "elsewhere").mkdir()
    shop_folder.rename(tmp_path / "elsewhere/shop")
    sweep.ran = []
    assert call(reproduce.main, "table3", *SHORT, "--data", "elsewhere/shop") == 0
    assert sweep.ran and sweep.ran_script("finetune.py") == sweep.ran


# --- reproduce.py: scripts in processes of their own --------------------------------------

@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that reproduce.py takes for the project's: the test's own scripts are in it."""
    monkeypatch.setattr("paper.cells.ROOT", tmp_path)
    (tmp_path / "paper").mkdir()
    return tmp_path


def wait_for(condition, seconds=30):
    """Whether the condition came true in time."""
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.01)
    return condition()


WAITING = """import os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(f"stopped{os.getpid()}").touch()
    time.sleep(0.2)
    pathlib.Path(f"saved{os.getpid()}").touch()
    sys.exit(2)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(f"started{os.getpid()}").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sweep_that_is_stopped_takes_its_runs_along_and_starts_no_more(root, number):
    """The signal reaches the scripts that are running, which save; they are waited for."""
    (root / "mmcpr.py").write_text(WAITING)
    folder = root / "cells"

    def kill():
        wait_for(lambda: len(list(folder.glob("started*"))) == 2)
        os.kill(os.getpid(), number)

    cells = [Cell(("mmcpr.py", "--lam", lam), (), 0) for lam in ("0", "0.5", "1")]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Cells((), (), "abc", root, 2).run(cells, "cells")
    thread.join()
    assert len(list(folder.glob("started*"))) == len(list(folder.glob("saved*"))) == 2
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_cell_that_is_finished_while_the_sweep_is_stopped_is_kept(root, monkeypatch):
    """The signal comes when fine-tuning has its result but has not ended."""
    (root / "finetune.py").write_text(
        "import json, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('started').touch()\n"
        "while not pathlib.Path('killed').exists(): time.sleep(0.01)\n"
        "path = sys.argv[sys.argv.index('--metrics') + 1]\n"
        "pathlib.Path(path).write_text(json.dumps({'test': {'recall@20': 0.5}}))\n")
    cells = Cells((), (), "abc", root, 1)
    cell = Cell(None, (), 0)

    def kill():
        wait_for((root / "cells/started").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        (root / "cells/killed").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        cells.run([cell], "cells")
    thread.join()
    assert cells.run([cell], "cells")[0]["finetune"]["test"] == {"recall@20": 0.5}


@pytest.mark.skipif(sys.platform != "linux", reason="nothing ends the scripts elsewhere")
def test_sweep_that_is_killed_at_once_leaves_no_script_behind(tmp_path):
    """kill -9 of a sweep: its scripts get SIGTERM."""
    (tmp_path / "script.py").write_text(WAITING)
    sweep = ("import sys\nfrom pathlib import Path\nfrom paper import cells\n"
             "commands = {n: [sys.executable, '../script.py'] for n in range(2)}\n"
             "cells.run_side_by_side(commands, 2, print, 'scripts', Path('cells'))\n")
    (tmp_path / "cells").mkdir()
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen([sys.executable, "-c", sweep], cwd=tmp_path, env=environment,
                               stderr=subprocess.DEVNULL)
    started = tmp_path / "cells"
    assert wait_for(lambda: len(list(started.glob("started*"))) == 2)
    process.kill()
    process.wait()
    assert wait_for(lambda: len(list(started.glob("saved*"))) == 2)


def test_cells_that_run_beside_a_failing_one_finish(root):
    """baselines.py keeps no checkpoint: what it has computed would be lost."""
    (root / "mmcpr.py").write_text(
        "import pathlib, sys, time\n"
        "while not pathlib.Path('started').exists(): time.sleep(0.01)\n"
        "sys.exit('the cell that fails')\n")
    (root / "paper/baselines.py").write_text(
        "import pathlib, sys, time\npathlib.Path('started').touch()\ntime.sleep(0.5)\n"
        "pathlib.Path('finished').touch()\n"
        "pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).touch()\n")
    wanted = [Cell(("mmcpr.py",), (), 0),
              Cell(("baselines.py", "--method", "pmgt"), (), 0),
              Cell(("baselines.py", "--method", "mmgcn"), (), 0)]
    cells = Cells((), (), "abc", root, 2)
    with pytest.raises(run.InputError, match="mmcpr.py, seed 0: the cell that fails"):
        cells.run(wanted, "cells")
    assert (root / "cells/finished").exists() and cells.table_path(wanted[1]).exists()
    assert not cells.table_path(wanted[2]).exists()  # not started any more


@pytest.mark.parametrize("script, words", [
    ("sys.exit(3)", "ended with 3, without a message"),
    ("sys.stderr.write('epoch 7\\n'); os.kill(os.getpid(), 9)", "ended with -9, without"),
    ("sys.stderr.write('epoch 7\\rerror: a file is gone\\n'); sys.exit(2)", "a file is gone"),
    ("raise RuntimeError('two\\nlines')", "RuntimeError: two")])
def test_what_a_failing_script_said_is_told(root, script, words):
    (root / "mmcpr.py").write_text(f"import os, sys\n{script}\n")
    cells = Cells((), (), "abc", root, 1)
    with pytest.raises(run.InputError, match=f"mmcpr.py, seed 0: {words}"):
        cells.run([Cell(("mmcpr.py",), (), 0)], "cells")


def test_cells_side_by_side_in_processes_of_their_own(tmp_path, monkeypatch):
    """Nothing replaced: two jobs, real processes."""
    write_shop(tmp_path / "shop")
    monkeypatch.chdir(tmp_path)
    short = ("--epochs", "2", "--eval-every", "1")
    wanted = [Cell(("mmcpr.py", *short), (*short, *reproduce.XAVIER), 0),
              Cell(None, short, 0, ("--keep", "0.5"))]
    cells = Cells([f"--data={tmp_path / 'shop'}"], [], "abc", tmp_path / "results", 2)
    found = cells.run(wanted, "cells")
    assert all(cell["finetune"]["epochs_run"] <= 2 for cell in found)
    assert [cell["finetune"]["scale"] for cell in found] == ["xavier", "asis"]
    n_train = data.split_dataset(data.load("shop", contents=False), share=0.5).train.nnz
    assert cells.per_user(wanted[1])["train"].sum() <= n_train
    # No checkpoint, no part, no metrics are left.
    assert len(list(tmp_path.glob("results/tables/*"))) == 1
    assert {path.suffix for path in tmp_path.glob("results/cells/*")} == {".json", ".npz"}
    assert not list(tmp_path.rglob("*.ckpt"))


def test_sweep_from_the_command_line(tmp_path):
    write_shop(tmp_path / "shop")
    command = [sys.executable, "-m", "paper.reproduce", "table1", "--data", "shop"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / FOLDER / "table1.md").read_text().strip() in done.stdout
