"""How fast each fast path is against its plain definition; their results are compared first.

    python -m paper.bench                              demo, and generated graphs, vg and tg
    python -m paper.bench --data vg path/to/folder     one of them, and your own interactions
    python -m paper.bench --device cuda                the same on a GPU
    python -m paper.bench --device cuda --epochs       whole epochs of the fast paths alone
    python -m paper.bench --data vg --write folder     writes the generated set as a data set

Here vg and tg name graphs drawn at random with the paper's counts, and with degrees as long-tailed
as the real ones: nothing is downloaded. The table is Markdown. Memory is the host's, on a GPU
too: for building, what it adds to a process at its peak; for pre-training, the whole peak.

--epochs measures epochs and evaluations as the scripts run them. Beside an epoch stands the floor
of its step: the time in which this machine moves the bytes that must be moved, at the speed of a
large copy, and in pre-training does the operations that must be done, at the speed of a large
float32 product (finetuning_traffic, pretraining_floor). Memory is then the GPU's own, by
torch.cuda.max_memory_allocated.

The plain definitions are those of ops.py and metrics.py, and two training steps made of them:
mixgcf_loss_plain and objective_plain.
"""
import argparse
import contextlib
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np
import scipy.sparse as sp
import torch

import data
import disk
import finetune
import metrics
import mmcpr
import ops

SIZES = {  # users, items, interactions (Table 1)
    "vg": (55_217, 17_389, 472_586),
    "tg": (208_143, 78_698, 1_754_420)}
DIM, N_CANDIDATES, BATCH, N_LAYERS = 64, 64, 2048, 3


# --- Generated graphs ---------------------------------------------------------------------

class Generated(NamedTuple):
    """A bipartite graph, with unique pairs in the order drawn, and the shelf of each node."""
    users: np.ndarray       # int64 [n]
    items: np.ndarray       # int64 [n]
    user_shelf: np.ndarray  # int64 [n_users]
    item_shelf: np.ndarray  # int64 [n_items]


def generate(n_users, n_items, n, seed=0, shelf_size=50, loyalty=0.6, spread=1.6):
    """A long-tailed bipartite graph of n pairs.

    Degrees are 5 plus a log-normal. Items stand on shelves of about 50. A user takes the share
    `loyalty` of the items from one shelf and the rest from anywhere, in proportion to popularity.
    With these defaults, and the size of Amazon 2018's Video Games, the quantiles of the degrees
    and the counts of entries of both co-interaction graphs and of E come within 15 % of the real
    ones.
    """
    rng = np.random.default_rng(seed)

    def draw_degrees(k):
        extra = rng.lognormal(0, spread, k)
        return 5 + extra * max(n / k - 5, 0) / extra.mean()

    n_shelves = max(1, n_items // shelf_size)
    user_shelf = rng.integers(n_shelves, size=n_users)
    item_shelf = np.sort(rng.integers(n_shelves, size=n_items))
    # Degrees are laid end to end on a line: a random point of it hits a user or an item in
    # proportion to its degree, and a shelf is a stretch of the items' line.
    user_line = np.cumsum(draw_degrees(n_users))
    item_line = np.concatenate([[0], np.cumsum(draw_degrees(n_items))])
    shelf_begin = item_line[np.searchsorted(item_shelf, np.arange(n_shelves + 1))]
    pairs = np.empty(0, np.int64)
    while len(pairs) < n:
        n_drawn = int(1.2 * (n - len(pairs))) + 100
        user = np.searchsorted(user_line, rng.random(n_drawn) * user_line[-1])
        user = user.clip(max=n_users - 1)
        stays = rng.random(n_drawn) < loyalty
        begin = np.where(stays, shelf_begin[user_shelf[user]], 0)
        end = np.where(stays, shelf_begin[user_shelf[user] + 1], item_line[-1])
        point = begin + rng.random(n_drawn) * (end - begin)
        item = np.searchsorted(item_line, point, side="right") - 1
        item = item.clip(0, n_items - 1)
        pairs = np.concatenate([pairs, user * n_items + item])
        # Each pair once, where it was drawn first.
        _, place = np.unique(pairs, return_index=True)
        pairs = pairs[np.sort(place)]
    users, items = np.divmod(pairs[:n], n_items)
    return Generated(users, items, user_shelf, item_shelf)


def generate_features(graph, width=512, seed=1):
    """{"R": per user, "T", "V": per item}, float32 [n, width]: a shelf's direction plus noise."""
    rng = np.random.default_rng(seed)
    n_shelves = graph.item_shelf.max() + 1

    def view(shelf):
        directions = rng.standard_normal((n_shelves, width), np.float32)
        return directions[shelf] + rng.standard_normal((len(shelf), width), np.float32)

    return {"R": view(graph.user_shelf), "T": view(graph.item_shelf), "V": view(graph.item_shelf)}


def write_generated(name, folder):
    """Writes the generated set into the new `folder`: a data set (README), features as float16."""
    graph = generate(*SIZES[name])
    pairs = zip(graph.users.tolist(), graph.items.tolist())
    disk.write_csv(folder / "interactions.csv", ("user", "item"), pairs)
    disk.write_csv(folder / "items.csv", ("item",), zip(range(len(graph.item_shelf))))
    features = generate_features(graph)
    write_half(folder / "item_text.npy", features["T"])
    write_half(folder / "item_image.npy", features["V"])
    # A review for each interaction: its user's vector.
    write_half(folder / "review.npy", features["R"][graph.users])


def write_half(path, rows):
    disk.write_file(path, lambda file: np.save(file, rows.astype(np.float16)))


def open_set(name):
    """(train, test, features) of a generated set or a data set, without validation."""
    if name in SIZES:
        return split_generated(name)
    args = argparse.Namespace(**data.DATA_DEFAULTS, amazon_url=None)
    args.data, args.valid = name, 0
    dataset, parts, _ = data.open_data(args, contents=False)
    rng = np.random.default_rng(0)
    features = {"R": rng.standard_normal((dataset.n_users, 512), np.float32),
                "T": rng.standard_normal((dataset.n_items, 512), np.float32),
                "V": rng.standard_normal((dataset.n_items, 512), np.float32)}
    return parts.train, parts.test, features


def split_generated(name):
    """The same of a generated set; the split is the paper's, four fifths to train."""
    graph = generate(*SIZES[name])
    in_test = data.split(graph.users, 0, 0) == data.TEST
    matrices = []
    for part in (~in_test, in_test):
        ones = np.ones(part.sum(), np.float32)
        pairs = (graph.users[part], graph.items[part])
        matrix = sp.csr_matrix((ones, pairs), SIZES[name][:2])
        # As the scripts have them: sorted, of float32.
        matrix.sort_indices()
        matrices.append(matrix)
    train, test = matrices
    return train, test, generate_features(graph)


# --- The plain training steps -------------------------------------------------------------

def mixgcf_loss_plain(E0, A_hat, n_layers, users, pos_items, candidates, mix,
                      penalty_weight=1e-4):
    """MixGCF as published: every candidate of every layer is gathered and mixed, by autograd.

    E0 [n, d]; A_hat: ops.normalised_adjacency as a COO tensor [n, n]; users, pos_items [B] and
    candidates [B, M] are rows of E0; mix [L+1, B]. As finetune.mixgcf_loss.
    """
    B, M = candidates.shape
    rows = torch.cat([users, pos_items, candidates.flatten()])
    rows = rows.expand(n_layers + 1, -1)
    e = ops.layer_rows_plain(E0, A_hat, n_layers, rows)                    # [L+1, (2 + M) B, d]
    # All 2 + M rows of a sample, of every layer.
    e_user, e_pos, e_candidates = e.split([B, B, B * M], 1)
    e_candidates = e_candidates.unflatten(1, (B, M))                       # [L+1, B, M, d]
    mix = mix[:, :, None, None]
    mixed = mix * e_pos[:, :, None] + (1 - mix) * e_candidates             # [L+1, B, M, d]
    query = e_user.mean(0)                                                 # [B, d]
    best = (query[:, None] * mixed).sum(3).argmax(2)                       # [L+1, B]
    # gather wants an index for every number that it takes.
    best = best[:, :, None, None].expand(-1, -1, 1, mixed.shape[3])
    e_neg = mixed.gather(2, best)[:, :, 0]                                 # [L+1, B, d]
    return finetune.bpr_loss(e_user, e_pos, e_neg, penalty_weight)


def objective_plain(model, R, users, cima_items, positives_per_block, lam=0.2):
    """Eq. 16 with the whole [B, n_items] blocks of scores and of R in memory, by autograd."""
    item, _, projected = model.item_tower(mmcpr.ALL)
    user, _, _ = model.user_tower(users)
    rows, cols = ops.row_entries(R, users)
    l2 = ops.bce_plain(user, item, model.bias, rows, cols) / positives_per_block
    l1 = mmcpr.cima(projected[cima_items, 0], projected[cima_items, 1])
    return lam * l1 * len(cima_items) / positives_per_block + (1 - lam) * l2


# --- Measuring ----------------------------------------------------------------------------

def seconds(call, device):
    """Seconds of one call, the GPU's queue included."""
    # A GPU's work is only queued by the call: wait until its queue is empty.
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(calls, repeats, device):
    """The median seconds of each of several calls, which are made in turn."""
    times = {call: [] for call in calls}
    # Not all repeats of one call first: if the machine slows down, it slows down all calls.
    for _ in range(repeats + 1):
        for call in calls:
            times[call].append(seconds(call, device))
    # The first time of each call is a warm-up, which does not count.
    return [statistics.median(times[call][1:]) for call in calls]


def check_same(name, plain, fast, tolerance):
    """Stops the benchmark where the fast result is not the plain one's.

    The error is relative to the largest entry.
    """
    largest = plain.abs().max().clamp(min=1e-30)
    error = float((plain - fast).abs().max() / largest)
    if not error < tolerance:
        raise run.InputError(f"{name}: fast and plain differ by {error:.1e} of the largest entry, "
                             f"more than {tolerance:.0e}")


def peak_memory():
    """GiB that this process has held at most; NaN where the system does not say."""
    with contextlib.suppress(OSError):
        # On Linux not by ru_maxrss, which in a new process starts at its parent's.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / (1 << 20)
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    units_per_gib = 1 << 30 if sys.platform == "darwin" else 1 << 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gib


def in_new_process(function, *args):
    """function(*args) in a new process, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def machine(device):
    """(bytes per second of a large copy, float32 operations per second of a large product)."""
    x = torch.ones(1 << 26, device=device)
    y = x.clone()
    a = torch.randn(2048, 2048, device=device)

    def copy():
        y.copy_(x)

    def multiply():
        return a @ a

    copy_seconds, multiply_seconds = in_turn([copy, multiply], 5, device)
    # A copy reads and writes.
    return 2 * x.nbytes / copy_seconds, 2 * 2048 ** 3 / multiply_seconds


# --- The table ----------------------------------------------------------------------------

def print_row(*texts):
    print("| " + " | ".join(texts) + " |", flush=True)


def duration(s):
    if s < 1:
        return f"{s * 1e3:.1f} ms"
    return f"{s:.1f} s" if s < 100 else f"{s:,.0f} s"


def compare(name, what, plain, fast, note=""):
    """One row; plain, fast: seconds."""
    print_row(name, what, duration(plain), duration(fast), f"{plain / fast:.1f}×", note)


# --- 1. The co-interaction product --------------------------------------------------------

def build_graph(path, is_plain):
    """(seconds, GiB added at the peak) of building a graph, written out or as R and E."""
    R = sp.load_npz(path)
    # What Python, numpy and torch hold already.
    before = peak_memory()

    def build():
        if is_plain:
            ops.co_interaction_plain(R)
        else:
            ops.build_co_interaction(R, "RE")

    return seconds(build, "cpu"), peak_memory() - before


def bench_co_interaction(name, train, device):
    for side, R in (("user", train), ("item", train.T.tocsr())):
        bench_building(f"{side} graph", name, R)
        bench_product(f"{side} graph", name, R, device)


def bench_building(graph, name, R):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "R.npz"
        sp.save_npz(path, R)
        plain, plain_peak = in_new_process(build_graph, path, True)
        fast, fast_peak = in_new_process(build_graph, path, False)
    note = f"peak {plain_peak:.2f} GiB → {fast_peak:.2f} GiB"
    compare(name, f"{graph}: building", plain, fast, note)


def bench_product(graph, name, R, device):
    """D^-1 A x and its gradient: torch's product with A, and the fast kernel with each storage."""
    written = ops.CoInteractionGraph(R, device, storage="A")
    factored = ops.CoInteractionGraph(R, device, storage="RE")
    kept = ops.CoInteractionGraph(R, device)
    x = torch.randn(R.shape[0], DIM, device=device)

    def plain_both_ways():
        y = written.inverse_degree * ops.sparse_product_plain(written.A, x)
        grad = ops.sparse_product_plain(written.A, written.inverse_degree * x)
        return y, grad

    def both_ways(operator):
        leaf = x.clone().requires_grad_()
        y = operator(leaf)
        grad, = torch.autograd.grad(y, leaf, x)
        return y.detach(), grad

    def written_both_ways():
        return both_ways(written)

    def factored_both_ways():
        return both_ways(factored)

    def kept_both_ways():
        return both_ways(kept)

    for plain, fast in zip(plain_both_ways(), kept_both_ways()):
        check_same(f"{name}, {graph}", plain, fast, 1e-4)
    calls = [plain_both_ways, written_both_ways, factored_both_ways, kept_both_ways]
    plain, of_written, of_factored, fast = in_turn(calls, 7, device)
    note = (f"{written.n_read:,} → {factored.n_read:,} entries; in the fast kernel the graph "
            f"{duration(of_written)}, R and E {duration(of_factored)}; kept: ")
    note += "R and E" if kept.A is None else "the graph"
    compare(name, f"{graph}: product, both ways", plain, fast, note)


# --- 2. The fine-tuning epoch -------------------------------------------------------------

def coo_tensor(matrix, device):
    """A scipy matrix as a torch COO tensor, whose product autograd knows."""
    matrix = matrix.tocoo()
    index = torch.from_numpy(np.stack([matrix.row, matrix.col])).long()
    values = torch.from_numpy(matrix.data.astype(np.float32))
    return torch.sparse_coo_tensor(index, values, matrix.shape).coalesce().to(device)


class FinetuningSteps:
    """One batch of fine-tuning, as finetune.py draws it, on both paths."""

    def __init__(self, train, device):
        torch.manual_seed(0)
        self.train, n_users = train, train.shape[0]
        user, item = finetune.initial_tables(None, train, DIM)
        # The fast path trains model.E0, the plain one a copy of it.
        self.model = finetune.LightGCN(train, user.to(device), item.to(device), N_LAYERS)
        self.E0 = torch.nn.Parameter(self.model.E0.detach().clone())
        self.A_hat = coo_tensor(ops.normalised_adjacency(train), device)
        self.plain_adam = torch.optim.Adam([self.E0], foreach=False, fused=False)
        self.fast_adam = torch.optim.Adam(self.model.parameters(), fused=True)
        self.sample_negatives = ops.NegativeSampler(train, device)
        self.rng = np.random.default_rng(0)

        pairs = train.tocoo()
        batch = torch.randperm(train.nnz)[:BATCH].numpy()
        self.users = torch.from_numpy(pairs.row[batch]).long().to(device)      # [B]
        pos_items = torch.from_numpy(pairs.col[batch]).long().to(device)       # [B]
        candidates = self.sample_negatives(self.users, N_CANDIDATES)           # [B, M]
        mix = torch.rand(N_LAYERS + 1, len(batch), device=device)
        # Rows of E0, where items come after the users.
        self.batch = (self.users, pos_items + n_users, candidates + n_users, mix)

    def plain_loss(self):
        return mixgcf_loss_plain(self.E0, self.A_hat, N_LAYERS, *self.batch)

    def fast_loss(self):
        return finetune.mixgcf_loss(self.model, *self.batch)

    def plain_step(self):
        self.plain_adam.zero_grad()
        (self.plain_loss() / len(self.users)).backward()
        self.plain_adam.step()

    def fast_step(self):
        self.fast_adam.zero_grad()
        (self.fast_loss() / len(self.users)).backward()
        self.fast_adam.step()

    def plain_drawing(self):
        users = self.users.tolist()
        ops.sample_negatives_plain(self.train, users, N_CANDIDATES, self.rng)

    def fast_drawing(self):
        self.sample_negatives(self.users, N_CANDIDATES)

    def check(self, name):
        """Stops the benchmark where the two losses or their gradients differ."""
        plain, fast = self.plain_loss(), self.fast_loss()
        check_same(f"{name}, MixGCF's loss", plain.detach(), fast.detach(), 1e-5)
        plain_grad, = torch.autograd.grad(plain, self.E0)
        fast_grad, = torch.autograd.grad(fast, self.model.E0)
        check_same(f"{name}, MixGCF's gradient", plain_grad, fast_grad, 1e-4)


def bench_finetuning(name, train, device, bandwidth):
    """Returns the model of the fast path."""
    steps = FinetuningSteps(train, device)
    steps.check(name)
    plain_drawing, fast_drawing = in_turn([steps.plain_drawing, steps.fast_drawing], 3, device)
    plain, fast = in_turn([steps.plain_step, steps.fast_step], 10, device)
    n_steps = -(-train.nnz // BATCH)
    compare(name, "drawing negatives, an epoch", plain_drawing * n_steps,
            fast_drawing * n_steps)
    compare(name, "fine-tuning, an epoch", (plain_drawing + plain) * n_steps,
            (fast_drawing + fast) * n_steps, f"{n_steps:,} steps")

    model = steps.model
    layers, (users, _, candidates, _) = model.layers(), steps.batch

    def mix_hops():
        ops.hard_negatives(layers, users, candidates)

    parts = [model.layers, mix_hops, steps.fast_adam.step, steps.fast_step]
    parts = in_turn(parts, 10, device)
    print_step(train, len(users), fast_drawing, parts, bandwidth)
    return model


def finetuning_traffic(train, batch):
    """Bytes that a step of fine-tuning must move.

    Each of six sparse products reads the graph (a value and an index for each entry) and a table,
    and writes a table. Adam moves seven tables. The candidates' rows of four layers are read.
    """
    table = 4 * DIM * sum(train.shape)
    graph = 8 * 2 * train.nnz
    candidates = 4 * (N_LAYERS + 1) * batch * N_CANDIDATES * DIM
    return 6 * (graph + 2 * table) + 7 * table + candidates


def print_step(train, batch, drawing, parts, bandwidth):
    """Where a step's time goes; parts: seconds of layers, hop mixing, Adam and the whole."""
    layers, hop_mixing, adam, whole = parts
    rest = whole - layers - hop_mixing - adam
    step = drawing + whole
    n_steps = -(-train.nnz // BATCH)
    traffic = finetuning_traffic(train, batch)
    floor = traffic / bandwidth
    print(f"  of a step's {step * 1e3:.0f} ms: drawing {drawing * 1e3:.0f}, "
          f"layers {layers * 1e3:.0f}, hop mixing {hop_mixing * 1e3:.0f}, "
          f"Adam {adam * 1e3:.0f}, loss and backward {rest * 1e3:.0f}; "
          f"traffic floor {traffic / 1e6:.0f} MB = {floor * 1e3:.0f} ms, "
          f"{floor * n_steps:.1f} s an epoch ({floor / step:.0%} reached)")


# --- 3. The all-ranking evaluation --------------------------------------------------------

def bench_evaluation(name, model, train, test, device, sample=100):
    """The plain path ranks `sample` of the users, and its time is scaled up."""
    user, item = model.embed()
    tested = np.flatnonzero(np.diff(test.indptr))
    n_drawn = min(sample, len(tested))
    drawn = np.random.default_rng(0).choice(tested, n_drawn, replace=False)
    is_drawn = np.isin(np.arange(len(user)), drawn).astype(np.float32)
    test_of_drawn = (sp.diags_array(is_drawn).tocsr() @ test).tocsr()
    test_of_drawn.eliminate_zeros()
    plain = metrics.evaluate_plain(user, item, train, test, 20, drawn)
    fast = metrics.evaluate(user, item, train, test_of_drawn, (20,))
    for metric in ("recall@20", "ndcg@20"):
        check_same(f"{name}, evaluation", torch.tensor(plain[metric]),
                   torch.tensor(fast[metric]), 1e-6)

    def plain_evaluation():
        metrics.evaluate_plain(user, item, train, test, 20, drawn)

    def fast_evaluation():
        metrics.evaluate(user, item, train, test, (20, 40, 60))

    plain, fast = in_turn([plain_evaluation, fast_evaluation], 2, device)
    compare(name, f"evaluation of {len(tested):,} users", plain / n_drawn * len(tested), fast,
            f"plain: {n_drawn} users, scaled up")


# --- 4. The pre-training epoch ------------------------------------------------------------

def pretrain_steps(folder, device, is_plain, n_steps):
    """(seconds of each step, losses, peak GiB) of a few steps on R.npz and features.npz.

    The plain path uses the written-out graphs and objective_plain.
    """
    run.keep_freed_memory()
    R = sp.load_npz(folder / "R.npz")
    features = dict(np.load(folder / "features.npz"))
    # With one seed both paths draw the same numbers.
    torch.manual_seed(0)
    model = mmcpr.MMCPR(R, features, bias="global", device=device)
    R_tensor = ops.sparse_tensor(R, device)
    if is_plain:
        model.user_tower.graph = ops.CoInteractionGraph(R, device, storage="A")
        model.item_tower.graph = ops.CoInteractionGraph(R.T.tocsr(), device, storage="A")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    cima_items = model.items_with_pair().to(device)
    n_users = R.shape[0]
    positives_per_block = BATCH * R.nnz / n_users
    blocks = torch.randperm(n_users).split(BATCH)
    losses = []

    def step():
        # Where there are fewer blocks than steps, the blocks are used again in turn.
        users = blocks[len(losses) % len(blocks)].to(device)
        drawn = cima_items[torch.randperm(len(cima_items))[:BATCH].to(device)]
        optimizer.zero_grad()
        if is_plain:
            loss = objective_plain(model, R_tensor, users, drawn, positives_per_block)
        else:
            _, _, loss = mmcpr.objective(model, R_tensor, users, drawn, positives_per_block)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    times = [seconds(step, device) for _ in range(n_steps)]
    return times, losses, peak_memory()


def bench_pretraining(name, train, features, device, n_steps=4):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sp.save_npz(folder / "R.npz", train)
        np.savez(folder / "features.npz", **features)
        # Each path in a process of its own: one's peak must not hide the other's.
        plain = in_new_process(pretrain_steps, folder, device, True, n_steps)
        fast = in_new_process(pretrain_steps, folder, device, False, n_steps)
    plain_times, plain_losses, plain_peak = plain
    fast_times, fast_losses, fast_peak = fast
    check_same(f"{name}, pre-training's losses", torch.tensor(plain_losses),
               torch.tensor(fast_losses), 1e-4)
    n_blocks = -(-train.shape[0] // BATCH)
    # The first step warms up.
    plain_epoch = statistics.median(plain_times[1:]) * n_blocks
    fast_epoch = statistics.median(fast_times[1:]) * n_blocks
    compare(name, "pre-training, an epoch", plain_epoch, fast_epoch,
            f"{n_blocks} blocks; peak {plain_peak:.1f} GiB → {fast_peak:.1f} GiB")


# --- 5. Whole epochs ----------------------------------------------------------------------

def pretraining_floor(model, train, bandwidth, rate):
    """The least time, in seconds, that a step of pre-training with a full block can take.

    Operations, at the machine's rate: a block's scores with all items and their two gradients,
    W_m of every item's features and its gradient, CIMA's two N x N products and their four
    gradients. Bytes, at its bandwidth: each graph is read four times (two layers, both ways), and
    each time a table is read and one is written; the items' features are read twice; Adam moves
    seven times the parameters. Work done once for each user of the block is left out.
    """
    n_users, n_items = train.shape
    item_widths = sum(model.item_tower.get_buffer(f"feature_{m}").shape[1] for m in "TV")
    operations = 3 * 2 * min(BATCH, n_users) * n_items * DIM
    operations += 2 * 2 * n_items * item_widths * DIM
    operations += 6 * 2 * min(BATCH, n_items) ** 2 * DIM
    traffic = 2 * 4 * n_items * item_widths
    for tower in (model.user_tower, model.item_tower):
        traffic += 4 * (8 * tower.graph.n_read + 2 * tower.e0.nbytes)
    traffic += 7 * sum(parameter.nbytes for parameter in model.parameters())
    return operations / rate + traffic / bandwidth


def measure_epoch(name, what, call, n_steps, floor, device, repeats=3):
    """One row: the time of a call and of each of its steps, a step's floor, the GPU's memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    epoch, = in_turn([call], repeats, device)
    step = "" if n_steps == 1 else f"{n_steps:,} steps of {epoch / n_steps * 1e3:.2f} ms"
    share = f"floor {floor * 1e3:.2f} ms, {floor * n_steps / epoch:.0%} reached" if floor else ""
    memory = "-"
    if device == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / (1 << 30):.2f} GiB"
    print_row(name, what, duration(epoch), step, share, memory)
    return epoch


def print_kernels(name, what, call, n_steps):
    """How many kernels a step launches, how long they take, and which are the slowest."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        elapsed = seconds(call, "cuda")
    kernels = [event for event in profile.events()
               if event.device_type == torch.autograd.DeviceType.CUDA
               and not event.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    print(f"  {name}, {what}: {len(kernels) / n_steps:.0f} kernels a step, "
          f"{busy / n_steps * 1e3:.2f} ms of them; profiled, a step takes "
          f"{elapsed / n_steps * 1e3:.2f} ms")
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=12,
                                       max_name_column_width=60))


def bench_finetuning_epoch(name, train, test, device, bandwidth):
    """Returns (seconds of an epoch, of an evaluation)."""
    args = finetune.arguments().parse_args([])
    steps = FinetuningSteps(train, device)
    model, optimizer = steps.model, steps.fast_adam
    pairs = train.tocoo()
    pair_user = torch.from_numpy(pairs.row).to(device).long()
    pair_item = torch.from_numpy(pairs.col).to(device).long()

    def epoch(n_pairs=train.nnz):
        training = finetune.Training(model, optimizer, pair_user[:n_pairs], pair_item[:n_pairs],
                                     steps.sample_negatives)
        finetune.train_epoch(training, 1, args)

    def ten_steps():
        epoch(10 * BATCH)

    def evaluation():
        metrics.evaluate(*model.embed(), train, test, (20,))

    n_steps = -(-train.nnz // BATCH)
    floor = finetuning_traffic(train, BATCH) / bandwidth
    trained = measure_epoch(name, "fine-tuning, an epoch", epoch, n_steps, floor, device)
    evaluated = measure_epoch(name, "an evaluation", evaluation, 1, None, device)
    if device == "cuda":
        print_kernels(name, "fine-tuning", ten_steps, 10)
        bench_kernels(name, steps)
    return trained, evaluated


def bench_pretraining_epoch(name, train, features, device, bandwidth, rate):
    """Returns the seconds of an epoch."""
    args = mmcpr.arguments().parse_args([])
    torch.manual_seed(0)
    model = mmcpr.MMCPR(train, features, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    training = mmcpr.Training(model, optimizer, ops.sparse_tensor(train, device),
                              model.items_with_pair().to(device), None)
    of_five = training._replace(R=ops.sparse_tensor(train[:5 * BATCH], device))

    def epoch():
        mmcpr.train_epoch(training, 1, args)

    def five_steps():
        mmcpr.train_epoch(of_five, 1, args)

    n_steps = -(-train.shape[0] // BATCH)
    floor = pretraining_floor(model, train, bandwidth, rate)
    trained = measure_epoch(name, "pre-training, an epoch", epoch, n_steps, floor, device)
    if device == "cuda":
        print_kernels(name, "pre-training", five_steps, 5)
    return trained


def bench_kernels(name, steps):
    """Times other kernels on a GPU beside cuSPARSE's product and the gathering of candidates."""
    A_hat, x = steps.model.A_hat, steps.model.E0.detach()
    users, _, candidates, _ = steps.batch
    query = x[users]
    row_starts = torch.arange(0, candidates.numel() + 1, candidates.shape[1], device=x.device)
    row_starts = row_starts.int()

    def by_cusparse():
        return ops.sparse_product(A_hat, x)

    def by_embedding_bag():
        return torch.nn.functional.embedding_bag(
            A_hat.col_indices(), x, A_hat.crow_indices(), mode="sum",
            per_sample_weights=A_hat.values(), include_last_offset=True)

    def by_segments():
        rows = x[A_hat.col_indices()] * A_hat.values()[:, None]
        return torch.segment_reduce(rows, "sum", offsets=A_hat.crow_indices().long())

    def by_gathering():
        return ops.candidate_scores(query, x, candidates)

    def by_sampled_addmm():
        places = torch.sparse_csr_tensor(
            row_starts, candidates.flatten().int(), query.new_zeros(candidates.numel()),
            (len(query), len(x)), check_invariants=False)
        return torch.sparse.sampled_addmm(places, query, x.T, beta=0).values().view_as(candidates)

    for kernels in ((by_cusparse, by_embedding_bag, by_segments),
                    (by_gathering, by_sampled_addmm)):
        expected = kernels[0]()
        for kernel in kernels:
            # A kernel that cannot be run on this GPU must not end the benchmark.
            try:
                check_same(f"{name}, {kernel.__name__}", expected, kernel(), 1e-4)
                taken, = in_turn([kernel], 20, "cuda")
                print(f"  {name}, {kernel.__name__}: {taken * 1e3:.3f} ms")
            except (RuntimeError, run.InputError) as error:
                print(f"  {name}, {kernel.__name__}: {str(error).splitlines()[0]}")


def bench_epochs(name, device, bandwidth, rate):
    """Whole epochs and evaluations of one data set, and what 100 or 1,000 epochs take."""
    train, test, features = open_set(name)
    label = Path(name).name
    print_row("data", "what", "in all", "a step", "its floor", "memory")
    print_row(*["---"] * 6)
    pretrained = bench_pretraining_epoch(label, train, features, device, bandwidth, rate)
    trained, evaluated = bench_finetuning_epoch(label, train, test, device, bandwidth)
    # Every fifth epoch is validated.
    print_row(label, "100 epochs of pre-training", duration(100 * pretrained + 20 * evaluated),
              "with 20 evaluations", "", "")
    print_row(label, "1,000 epochs of fine-tuning", duration(1000 * trained + 200 * evaluated),
              "with 200 evaluations", "", "")


# --- The command line ---------------------------------------------------------------------

def bench(name, device, bandwidth):
    """The table of one data set."""
    train, test, features = open_set(name)
    label = Path(name).name
    n_users, n_items = train.shape
    print(f"{label}: {n_users:,} users, {n_items:,} items, {train.nnz:,} training interactions\n")
    print_row("data", "what", "plain", "fast", "ratio", "")
    print_row(*["---"] * 6)
    bench_co_interaction(label, train, device)
    model = bench_finetuning(label, train, device, bandwidth)
    bench_evaluation(label, model, train, test, device)
    bench_pretraining(label, train, features, device)


def arguments():
    parser = run.parser("Fast paths against plain definitions, side by side.",
                        "python -m paper.bench")
    parser.add_argument("--data", nargs="+", default=["demo", "vg", "tg"],
                        help="demo, vg, tg (generated), or folders")
    parser.add_argument("--device", type=run.device_name, default="cpu")
    parser.add_argument("--epochs", action="store_true",
                        help="time whole epochs of the fast paths alone")
    parser.add_argument("--write", type=Path, metavar="FOLDER",
                        help="write the generated set here and stop")
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    if args.write:
        if len(args.data) > 1 or args.data[0] not in SIZES:
            raise run.InputError("--write writes one generated set: "
                                 "pass --data vg or --data tg")
        name = args.data[0]
        disk.make_folder(args.write, {"generated": name}, lambda to: write_generated(name, to))
        print(f"wrote {args.write}; next: python mmcpr.py --data {shlex.quote(str(args.write))}")
        return
    bandwidth, rate = machine(args.device)
    processor = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{torch.get_num_threads()} threads, {processor}: copies {bandwidth / 1e9:.0f} GB/s, "
          f"float32 products {rate / 1e9:,.0f} GFLOP/s")
    for name in args.data:
        if args.epochs:
            bench_epochs(name, args.device, bandwidth, rate)
        else:
            bench(name, args.device, bandwidth)


if __name__ == "__main__":
    sys.exit(run.cli(main))
