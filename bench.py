"""How fast: each fast path against the plain definition that states it, side by side, the results compared first.

    python bench.py                              demo, and generated graphs of the paper's sizes, vg and tg
    python bench.py --data vg path/to/folder     one of them, and your own interactions
    python bench.py --device cuda                the same on a GPU
    python bench.py --data vg --write folder     writes the generated set as a folder data set, with generated features

Here vg and tg name graphs drawn at random with the paper's counts, degrees as long-tailed as the real ones': nothing is
downloaded. The table is Markdown. Memory is what building adds to a process at its peak, and what a process that pre-trains
holds in all; on a GPU the host's.
"""
import argparse
import contextlib
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

import data
import finetune
import metrics
import mmcpr

SIZES = {"vg": (55_217, 17_389, 472_586), "tg": (208_143, 78_698, 1_754_420)}  # users, items, interactions (Table 1)
D, M, BATCH = 64, 64, 2048


# --- Generated graphs -----------------------------------------------------------------------------------------------

def generate(n_users, n_items, n, seed=0, shelf=50, own=0.6, spread=1.6):
    """A long-tailed bipartite graph: (user [n], item [n], shelf of each user, of each item), pairs unique, in drawn order.

    Degrees are 5 plus a log-normal. Items stand on shelves of about 50; a user takes `own` of the items from one shelf, in
    proportion to their popularity, the rest from anywhere. With these values, and the size of Amazon 2018's Video Games, the
    quantiles of the degrees, the edges of both co-interaction graphs and of E come within 15 % of the real ones.
    """
    rng = np.random.default_rng(seed)
    def degrees(k):
        extra = rng.lognormal(0, spread, k)
        return 5 + extra * max(n / k - 5, 0) / extra.mean()
    shelves = max(1, n_items // shelf)
    of_user, of_item = rng.integers(shelves, size=n_users), np.sort(rng.integers(shelves, size=n_items))
    user_mass, item_mass = np.cumsum(degrees(n_users)), np.concatenate([[0], np.cumsum(degrees(n_items))])
    start = item_mass[np.searchsorted(of_item, np.arange(shelves + 1))]  # where each shelf's mass begins
    pairs = np.empty(0, np.int64)
    while len(pairs) < n:
        more = int(1.2 * (n - len(pairs))) + 100
        user = np.searchsorted(user_mass, rng.random(more) * user_mass[-1]).clip(max=n_users - 1)
        mine = rng.random(more) < own
        low = np.where(mine, start[of_user[user]], 0)
        high = np.where(mine, start[of_user[user] + 1], item_mass[-1])
        item = (np.searchsorted(item_mass, low + rng.random(more) * (high - low), side="right") - 1).clip(0, n_items - 1)
        pairs = np.concatenate([pairs, user * n_items + item])
        pairs = pairs[np.sort(np.unique(pairs, return_index=True)[1])]
    return *np.divmod(pairs[:n], n_items), of_user, of_item


def generated_features(of_user, of_item, width=512, seed=1):
    """{"R": per user, "T", "V": per item}, float32 [n, width]: the shelf's own direction plus noise."""
    rng = np.random.default_rng(seed)
    def view(of):
        return rng.standard_normal((of_item.max() + 1, width), np.float32)[of] + rng.standard_normal((len(of), width), np.float32)
    return {"R": view(of_user), "T": view(of_item), "V": view(of_item)}


def write(name, folder):
    """The generated set as a folder data set (README), features as float16."""
    user, item, of_user, of_item = generate(*SIZES[name])
    folder.mkdir(parents=True, exist_ok=True)
    data.write_csv(folder / "interactions.csv", ("user", "item"), zip(user.tolist(), item.tolist()))
    data.write_csv(folder / "items.csv", ("item",), ((i,) for i in range(SIZES[name][1])))
    features = generated_features(of_user, of_item)
    for modality, file in (("T", "item_text.npy"), ("V", "item_image.npy"), ("R", "review.npy")):
        rows = features[modality] if modality != "R" else features["R"][user]
        data.replace_file(folder / file, lambda out, rows=rows: np.save(out, rows.astype(np.float16)))
    print(f"wrote {folder}; next: python mmcpr.py --data {folder}")


def open_set(name):
    """(train, test, features) of a generated set or a data set; the split is 80/20, without validation."""
    if name in SIZES:
        user, item, of_user, of_item = generate(*SIZES[name])
        in_test = data.split(user, 0, 0) == data.TEST
        train, test = (sp.csr_matrix((np.ones(part.sum(), np.float32), (user[part], item[part])), SIZES[name][:2])
                       for part in (~in_test, in_test))
        train.sort_indices()
        return train, test, generated_features(of_user, of_item)
    args = argparse.Namespace(**(data.DATA_DEFAULTS | {"data": name, "valid": 0, "amazon_url": None}))
    dataset, parts, _ = data.open_data(args, contents=False)
    rng = np.random.default_rng(0)
    n = {"R": dataset.n_users, "T": dataset.n_items, "V": dataset.n_items}
    return parts.train, parts.test, {m: rng.standard_normal((n[m], 512), np.float32) for m in n}


# --- The plain definitions; the tests use them as oracles -----------------------------------------------------------

def plain_mixgcf_loss(E0, P, n_layers, users, positives, candidates, alpha, l2=1e-4):
    """MixGCF as published: every candidate of every layer is gathered and mixed, autograd does the rest. P: sparse COO."""
    layers = [E0]
    for _ in range(n_layers):
        layers.append(torch.sparse.mm(P, layers[-1]))
    layers = torch.stack(layers, 1)                                                       # [n, L+1, d]
    u, p, a = layers[users], layers[positives], alpha.T[:, :, None]                       # [B, L+1, d], [B, L+1, 1]
    mixed = a[:, None] * p[:, None] + (1 - a[:, None]) * layers[candidates]               # [B, M, L+1, d]
    picked = (u.mean(1)[:, None, None] * mixed).sum(3).argmax(1)                          # [B, L+1]
    n = mixed.gather(1, picked[:, None, :, None].expand(-1, 1, -1, E0.shape[1]))[:, 0]    # [B, L+1, d]
    score = lambda other: (u.mean(1) * other.mean(1)).sum(1)
    return F.softplus(score(n) - score(p)).sum() + l2 / 2 * sum(x[:, 0].square().sum() for x in (u, p, n))


def plain_negatives(train, users, m, rng):
    """For each user m items, drawn until they are none of the user's training items."""
    has = {u: set(train.indices[train.indptr[u]:train.indptr[u + 1]].tolist()) for u in set(users)}
    drawn = np.empty((len(users), m), np.int64)
    for row, u in zip(drawn, users):
        for k in range(m):
            while (item := int(rng.integers(train.shape[1]))) in has[u] and len(has[u]) < train.shape[1]:
                pass
            row[k] = item
    return drawn


def plain_objective(model, train, rows, some, positives, lam=0.2):
    """Eq. 16 with the whole [B, n_items] block of scores and of R in memory, by autograd."""
    item, _, projected = model.items(torch.arange(model.n_items, device=rows.device))
    scores = model.users(rows)[0] @ item.T + model.bias
    R = torch.from_numpy(train[rows.cpu().numpy()].toarray()).to(scores)
    l2 = F.binary_cross_entropy_with_logits(scores, R, reduction="sum") / positives
    return lam * mmcpr.cima(projected[some, 0], projected[some, 1]) * len(some) / positives + (1 - lam) * l2


def plain_evaluate(user, item, seen, truth, k, rows):
    """Recall@k and NDCG@k user by user: score, sort, leave out what was seen, count."""
    recall, ndcg = [], []
    for u in rows:
        wanted, known = set(truth[u].indices.tolist()), set(seen[u].indices.tolist())
        order = (user[u] @ item.T).argsort(descending=True).tolist()
        ranked = [i for i in order if i not in known][:k]
        gain = sum(1 / np.log2(place + 2) for place, i in enumerate(ranked) if i in wanted)
        recall.append(len(wanted.intersection(ranked)) / len(wanted))
        ndcg.append(gain / sum(1 / np.log2(place + 2) for place in range(min(k, len(wanted)))))
    return {f"recall@{k}": float(np.mean(recall)), f"ndcg@{k}": float(np.mean(ndcg))}


# --- Measuring ------------------------------------------------------------------------------------------------------

def seconds(call, device):
    """Seconds of one call, the GPU's queue included."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def in_turn(calls, repeats, device):
    """Medians of the seconds of several calls, made in turn so that the machine's moods hit all alike."""
    times = [[seconds(call, device) for call in calls] for _ in range(repeats + 1)][1:]  # the first warms up
    return [statistics.median(column) for column in zip(*times)]


def same(name, plain, fast, tolerance):
    """Stops the benchmark where the fast path's result is not the plain one's, relative to its largest entry."""
    error = float((plain - fast).abs().max() / plain.abs().max().clamp(min=1e-30))
    if not error < tolerance:
        raise data.InputError(f"{name}: fast and plain differ by {error:.1e} of the largest entry, more than {tolerance:.0e}")


def peak_memory():
    """GiB that this process has held at most; on Linux VmHWM, because ru_maxrss starts with the parent's."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / (1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)


def alone(function, *args):
    """function(*args) in a new process, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def duration(s):
    return f"{s * 1e3:.1f} ms" if s < 1 else f"{s:.1f} s" if s < 100 else f"{s:,.0f} s"


def compare(name, what, plain, fast, note=""):
    row(name, what, duration(plain), duration(fast), f"{plain / fast:.1f}×", note)


def machine(device):
    """(bytes per second of a large copy, read and write counted; float32 operations per second of a large product)."""
    x, a = torch.ones(1 << 26, device=device), torch.randn(2048, 2048, device=device)
    y = x.clone()
    copy, product = in_turn([lambda: y.copy_(x), lambda: a @ a], 5, device)
    return 2 * x.nbytes / copy, 2 * 2048 ** 3 / product


# --- 1. The co-interaction product ----------------------------------------------------------------------------------

def build(path, form):
    """(seconds, GiB added at the peak) of building a graph in the form "A" or "RE"."""
    R, before = sp.load_npz(path), peak_memory()
    spent = seconds(lambda: data.co_interaction(R, form), "cpu")
    return spent, peak_memory() - before


def bench_co_interaction(name, train, device):
    for side, R in (("user", train), ("item", train.T.tocsr())):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "R.npz"
            sp.save_npz(path, R)
            (plain, plain_peak), (fast, fast_peak) = (alone(build, path, form) for form in ("A", "RE"))
        note = f"peak {plain_peak:.2f} GiB → {fast_peak:.2f} GiB"
        compare(name, f"{side} graph: building", plain, fast, note)
        graphs = {form: mmcpr.CoInteractionGraph(R, device=device, form=form) for form in ("A", "RE", "auto")}
        x = torch.randn(R.shape[0], D, device=device)
        A, left = graphs["A"].A, graphs["A"].left

        def both_ways(graph):
            leaf = x.clone().requires_grad_()
            y = graph(leaf)
            return y.detach(), torch.autograd.grad(y, leaf, x)[0]

        plain_both = lambda: (left * (A @ x), A @ (left * x))  # the product and, for a gradient x, its gradient
        for plain, fast in zip(plain_both(), both_ways(graphs["auto"])):
            same(f"{name}, {side} graph", plain, fast, 1e-4)
        plain, kernel, fast, auto = in_turn([plain_both, *(lambda g=g: both_ways(g) for g in graphs.values())], 7, device)
        compare(name, f"{side} graph: product, both ways", plain, auto,
                f"{graphs['A'].touched:,} → {graphs['RE'].touched:,} entries; in the fast kernel the graph {duration(kernel)}, R and E "
                f"{duration(fast)}; kept: " + ("R and E" if graphs["auto"].A is None else "the graph"))


# --- 2. The fine-tuning epoch ---------------------------------------------------------------------------------------

def bench_finetuning(name, train, device, bandwidth):
    torch.manual_seed(0)
    n_users, n_items = train.shape
    steps = -(-train.nnz // BATCH)
    model = finetune.LightGCN(train, *(t.to(device) for t in finetune.initial_tables(None, train, D)), 3)
    other = torch.nn.Parameter(model.E0.detach().clone())
    at, item = (torch.from_numpy(x) for x in metrics.entries(train, np.arange(n_users)))
    root = [torch.from_numpy(np.maximum(np.asarray(train.sum(axis)).ravel(), 1) ** -0.5).float() for axis in (1, 0)]
    ends = torch.stack([torch.cat([at, item + n_users]), torch.cat([item + n_users, at])])
    P = torch.sparse_coo_tensor(ends, (root[0][at] * root[1][item]).repeat(2), (n_users + n_items,) * 2).coalesce().to(device)
    sample, rng = finetune.NegativeSampler(train), np.random.default_rng(0)
    draw = torch.randperm(len(at))[:BATCH]
    users, positives = at[draw], item[draw]
    alpha = torch.rand(4, len(draw), device=device)
    u, p, c = (x.to(device) for x in (users, positives + n_users, sample(users, M) + n_users))
    losses = {"plain": lambda: plain_mixgcf_loss(other, P, 3, u, p, c, alpha), "fast": lambda: finetune.mixgcf_loss(model, u, p, c, alpha)}
    gradients = [torch.autograd.grad(losses[kind](), table)[0] for kind, table in (("plain", other), ("fast", model.E0))]
    same(f"{name}, MixGCF's loss", *(losses[kind]().detach() for kind in losses), 1e-5)
    same(f"{name}, MixGCF's gradient", *gradients, 1e-4)
    optimizers = {"plain": torch.optim.Adam([other], foreach=False, fused=False), "fast": torch.optim.Adam(model.parameters(), fused=True)}

    def step(kind):
        optimizers[kind].zero_grad()
        (losses[kind]() / len(draw)).backward()
        optimizers[kind].step()

    plain_draw, fast_draw = in_turn([lambda: plain_negatives(train, users.tolist(), M, rng), lambda: sample(users, M)], 3, device)
    plain, fast = in_turn([lambda: step("plain"), lambda: step("fast")], 10, device)
    compare(name, "drawing negatives, an epoch", plain_draw * steps, fast_draw * steps)
    compare(name, "fine-tuning, an epoch", (plain_draw + plain) * steps, (fast_draw + fast) * steps, f"{steps:,} steps")
    layers = model.layers()
    forward, hop, adam, whole = in_turn([model.layers, lambda: finetune.hop_mixing(layers, u, c), optimizers["fast"].step,
                                         lambda: step("fast")], 10, device)
    table = 4 * D * (n_users + n_items)
    traffic = 6 * (8 * 2 * train.nnz + 2 * table) + 7 * table + 4 * D * 4 * len(draw) * M
    print(f"  of a step's {(fast_draw + whole) * 1e3:.0f} ms: drawing {fast_draw * 1e3:.0f}, layers {forward * 1e3:.0f}, hop mixing "
          f"{hop * 1e3:.0f}, Adam {adam * 1e3:.0f}, loss and backward {(whole - forward - hop - adam) * 1e3:.0f}; traffic floor "
          f"{traffic / 1e6:.0f} MB = {traffic / bandwidth * 1e3:.0f} ms, {traffic / bandwidth * steps:.1f} s an epoch "
          f"({traffic / bandwidth / (fast_draw + whole):.0%} reached)")
    return model


# --- 3. The all-ranking evaluation ----------------------------------------------------------------------------------

def bench_evaluation(name, model, train, test, device, sample=100):
    user, item = model.embed()
    tested = np.flatnonzero(np.diff(test.indptr))
    rows = np.random.default_rng(0).choice(tested, min(sample, len(tested)), replace=False)
    few = sp.diags_array(np.isin(np.arange(len(user)), rows).astype(np.float32)).tocsr() @ test
    few.eliminate_zeros()
    plain = plain_evaluate(user, item, train, test, 20, rows)
    fast = metrics.evaluate(user, item, train, sp.csr_matrix(few), (20,))
    same(f"{name}, evaluation", *(torch.tensor(list(values.values())) for values in (plain, fast)), 1e-6)
    slow, quick = in_turn([lambda: plain_evaluate(user, item, train, test, 20, rows),
                           lambda: metrics.evaluate(user, item, train, test, (20, 40, 60))], 2, device)
    compare(name, f"evaluation of {len(tested):,} users", slow / len(rows) * len(tested), quick,
            f"plain: {len(rows)} users, scaled up")


# --- 4. The pre-training epoch --------------------------------------------------------------------------------------

def pretraining(path, features, device, kind, steps):
    """(seconds of each step, losses, peak GiB) of a few steps; plain: on the materialised graphs, by plain_objective."""
    data.keep_freed_memory()
    train = sp.load_npz(path)
    features = dict(np.load(features))
    torch.manual_seed(0)
    model = mmcpr.MMCPR(train, features, bias="global", device=device)
    if kind == "plain":
        model.users.graph = mmcpr.CoInteractionGraph(train, device=device, form="A")
        model.items.graph = mmcpr.CoInteractionGraph(train.T.tocsr(), device=device, form="A")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    paired, positives = model.paired().to(device), BATCH * train.nnz / train.shape[0]
    blocks, spent, losses = torch.randperm(train.shape[0]).split(BATCH), [], []
    for rows in (blocks * steps)[:steps]:
        some = paired[torch.randperm(len(paired))[:BATCH].to(device)]

        def step(rows=rows.to(device), some=some):
            optimizer.zero_grad()
            loss = plain_objective(model, train, rows, some, positives) if kind == "plain" else \
                mmcpr.objective(model, train, rows, some, positives)[2]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        spent.append(seconds(step, device))
    return spent, losses, peak_memory()


def bench_pretraining(name, train, features, device, steps=4):
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "R.npz", Path(folder) / "features.npz"
        sp.save_npz(paths[0], train)
        np.savez(paths[1], **features)
        runs = [alone(pretraining, *paths, device, kind, steps) for kind in ("plain", "fast")]
    same(f"{name}, pre-training's losses", *(torch.tensor(losses) for _, losses, _ in runs), 1e-4)
    blocks = -(-train.shape[0] // BATCH)
    plain, fast = (statistics.median(spent[1:]) * blocks for spent, _, _ in runs)
    compare(name, "pre-training, an epoch", plain, fast, f"{blocks} blocks; peak {runs[0][2]:.1f} GiB → {runs[1][2]:.1f} GiB")


# --- The command line -----------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Fast paths against plain definitions, side by side.", formatter_class=data.Help)
    parser.add_argument("--data", nargs="+", default=["demo", "vg", "tg"], help="demo, vg, tg (generated), or folders")
    parser.add_argument("--device", type=mmcpr.device_name, default="cpu")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the generated set here and stop")
    args = parser.parse_args(argv)
    if args.write:
        if len(args.data) > 1 or args.data[0] not in SIZES:
            raise data.InputError("--write writes one generated set: pass --data vg or --data tg")
        return write(args.data[0], args.write)
    bandwidth, rate = machine(args.device)
    print(f"{torch.get_num_threads()} threads, " + (torch.cuda.get_device_name() if args.device == "cuda" else "CPU") +
          f": copies {bandwidth / 1e9:.0f} GB/s, float32 products {rate / 1e9:,.0f} GFLOP/s")
    for name in args.data:
        train, test, features = open_set(name)
        label = Path(name).name
        print(f"{label}: {train.shape[0]:,} users, {train.shape[1]:,} items, {train.nnz:,} training interactions\n")
        row("data", "what", "plain", "fast", "ratio", "")
        row(*["---"] * 6)
        bench_co_interaction(label, train, args.device)
        model = bench_finetuning(label, train, args.device, bandwidth)
        bench_evaluation(label, model, train, test, args.device)
        bench_pretraining(label, train, features, args.device)


if __name__ == "__main__":
    sys.exit(data.cli(main))
