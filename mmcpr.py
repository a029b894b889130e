"""MMCPR: multi-modal contrastive pre-training for recommendation (Liu et al., ICMR 2022), the model and its pre-training.

    python mmcpr.py                                     pre-train on the built-in demo data, write emb.npz
    python mmcpr.py --data vg --out vg.npz              the paper's Video Games, from the public raw files
    python mmcpr.py --data folder --modalities TG       your own data (README), any subset of R, T, V, G

Then: python finetune.py --init emb.npz

Symbols, as in the paper. Users u have reviews (R) and the user graph G_u (G); items i have description text (T), an image
(V) and the item graph G_i (G); both graphs join those that share an interaction.

    R        [n_users, n_items]   binary training interactions
    e^m      [n, d_m]             representation of modality m: frozen features, or a trainable table for the graph
    e'^m     [n, d]               the same, projected into the common space, d = 64
    a        [d]                  a side's attention vector
    e        [n, d]               the multi-modal representation, what is handed over
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import xlogy
from torch import nn
from tqdm import tqdm

import data
import metrics


# --- Graph encoder (Eq. 1, 2) ---------------------------------------------------------------------------------------

def sparse_tensor(matrix, device="cpu", dtype=torch.float32):
    """A scipy CSR matrix as a torch CSR tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        return torch.sparse_csr_tensor(torch.from_numpy(matrix.indptr.astype(np.int32)),
                                       torch.from_numpy(matrix.indices.astype(np.int32)),
                                       torch.from_numpy(matrix.data).to(dtype), matrix.shape).to(device)


def sparse_product(matrix, x):
    """matrix @ x: CSR [n, m] times [m, d] -> [n, d], without gradients.

    On a CPU as embedding_bag's weighted sums of rows of x, the same sums in a third of the time of torch's CSR product.
    """
    if x.is_cuda:
        return matrix @ x
    return F.embedding_bag(matrix.col_indices(), x, matrix.crow_indices(), mode="sum", per_sample_weights=matrix.values(),
                           include_last_offset=True)


class Propagate(torch.autograd.Function):
    """x -> P x with P = diag(left) A diag(right) and A symmetric, so that the gradient is diag(right) A diag(left) g."""

    @staticmethod
    def forward(ctx, x, A, left, right):
        """x [n, d]; A: a function; left, right [n, 1], right None for ones."""
        ctx.A, ctx.left, ctx.right = A, left, right
        return A(x if right is None else right * x).mul_(left)

    @staticmethod
    def backward(ctx, g):
        g = ctx.A(ctx.left * g)
        return g if ctx.right is None else g.mul_(ctx.right), None, None, None


class CoInteractionGraph:
    """G_u or G_i as the operator x -> P x; A x is exact without A: R (R^T x) - E x (data.CoInteraction says why).

    norm "row": P = D^-1 A, the mean over the neighbours, as Eq. 1 reads; "sym": D^-1/2 A D^-1/2, LightGCN's own.
    No self-loops; a node without neighbours gets 0.
    """

    def __init__(self, R, norm="row", device="cpu", dtype=torch.float32, form="auto"):
        graph = data.co_interaction(R, form)
        as_tensor = lambda m: None if m is None else sparse_tensor(m, device, dtype)
        self.A, self.E, self.R = as_tensor(graph.A), as_tensor(graph.E), as_tensor(graph.R)
        self.Rt = None if graph.R is None else as_tensor(graph.R.T.tocsr())
        degree = torch.from_numpy(graph.n_neighbours).to(device, dtype)[:, None]          # [n, 1]
        inverse = torch.where(degree > 0, 1 / degree, 0)
        self.left, self.right = (inverse, None) if norm == "row" else (inverse.sqrt(), inverse.sqrt())
        kept = [m for m in (graph.A, graph.R, graph.E) if m is not None]
        self.n_edges, self.touched = int(graph.n_neighbours.sum(dtype=np.float64)), sum(m.nnz for m in kept)
        self.touched += 0 if graph.R is None else graph.R.nnz

    def adjacency(self, x):
        if self.A is not None:
            return sparse_product(self.A, x)
        return sparse_product(self.R, sparse_product(self.Rt, x)).sub_(sparse_product(self.E, x))

    def __call__(self, x):                                                                # [n, d] -> [n, d]
        return Propagate.apply(x, self.adjacency, self.left, self.right)


def lightgcn(e0, propagate, n_layers):
    """LightGCN's layers e^(0), ..., e^(L) (Eq. 1), a list of [n, d]; their mean is the representation (Eq. 2)."""
    layers = [e0]
    for _ in range(n_layers):
        layers.append(propagate(layers[-1]))
    return layers


# --- Inter-modal aggregation (Eq. 6-8 for users, 12-14 for items) ---------------------------------------------------

def inter_modal_aggregation(projected, present, a):
    """Attention over modalities: e = sum_m alpha_m e'^m, alpha = softmax_m(ReLU(a . e'^m)) (Eq. 7, 8; 13, 14).

    projected [n, M, d], present bool [n, M], a [d]. Returns (e [n, d], alpha [n, M]). A missing modality gets alpha = 0:
    its logit is set to -inf after the ReLU, which would turn -inf into a 0 that still has weight. Where all are missing,
    alpha and e are 0.
    """
    logits = F.relu(projected @ a)                                                        # [n, M]
    nothing = ~present.any(1, keepdim=True)
    alpha = torch.softmax(logits.masked_fill(~(present | nothing), -torch.inf), 1) * present
    return (alpha[:, :, None] * projected).sum(1), alpha


class Tower(nn.Module):
    """One side: modality encoders, projections, inter-modal aggregation (users Eq. 1-8, items Eq. 9-14).

    features: {modality: float [n, d_m]}, NaN rows where a node lacks it; frozen, L2-normalised here, since raw norms differ
    20-fold between modalities, then centred and brought to a root mean square norm of 1. graph: a CoInteractionGraph, or None.
    A node with no modality at all (reviews alone, and it has none; a whole side when --modalities leaves it nothing) uses its
    row of a trainable table instead.
    """

    def __init__(self, n, features, graph, dim=64, n_layers=2):
        super().__init__()
        self.graph, self.n_layers = graph, n_layers
        self.modalities = [*features, *("G" if graph else "")]
        present = torch.ones(n, len(self.modalities), dtype=torch.bool)
        for m, (name, x) in enumerate(features.items()):
            x = torch.from_numpy(np.array(x, np.float32))                                 # [n, d_m]
            # Missing rows become 0 before W, or NaN would reach its gradient; a zero row has no direction: missing too.
            x = F.normalize(torch.nan_to_num(x))
            present[:, m] = there = x.any(1)
            # Encoders' outputs lie in a narrow cone: W and b absorb centre and scale, but Adam would take ages to find them.
            if there.any():
                x[there] -= x[there].mean(0)
                x /= x[there].square().sum(1).mean().sqrt().clamp(min=1e-3)
            self.register_buffer(f"feature_{name}", x, persistent=False)
        self.register_buffer("present", present, persistent=False)
        width = {name: x.shape[1] for name, x in features.items()} | {"G": dim}
        self.W = nn.ModuleDict({name: nn.Linear(width[name], dim) for name in self.modalities})  # W_m, b_m
        for linear in self.W.values():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        table = lambda: nn.Parameter(nn.init.xavier_uniform_(torch.empty(n, dim)))
        self.e0 = table() if graph else None
        self.own = None if present.any(1).all() else table()
        if self.modalities:
            self.a = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, 1))[:, 0])     # not 0, where ReLU' is 0

    def forward(self, rows):
        """rows: int64 [r]. Returns e [r, d], alpha [r, M], projected [r, M, d]."""
        if not self.modalities:
            return self.own[rows], self.present[rows].float(), None
        encoded = {name: getattr(self, f"feature_{name}")[rows] for name in self.modalities if name != "G"}
        if self.graph:
            encoded["G"] = torch.stack(lightgcn(self.e0, self.graph, self.n_layers)).mean(0)[rows]
        projected = torch.stack([self.W[name](encoded[name]) for name in self.modalities], 1)  # [r, M, d]  (Eq. 6, 12)
        present = self.present[rows]
        e, alpha = inter_modal_aggregation(projected, present, self.a)
        if self.own is not None:
            e = torch.where(present.any(1, keepdim=True), e, self.own[rows])
        return e, alpha, projected


# --- Contrastive inter-modal alignment (Eq. 11) ---------------------------------------------------------------------

def cima(text, image, tau=0.1, form="softmax", rows=slice(None)):
    """L1 / N over N items that have both: text, image [N, d] -> a scalar.

    The paper writes e^1, e^2, the encoders' outputs; the encoders are frozen, so that loss would have nothing to train:
    text and image are the projections e'^1, e'^2. As printed, Eq. 11 takes the log of s in [-1/tau, 1/tau]. Two readings:
    "softmax", CLIP's symmetric cross-entropy, "predict which of the N x N possible pairings actually occurred";
    "bce", the formula with the sigmoid it lacks, over all N^2 pairs. rows: of the N x N matrix and of its transpose, the rows
    to sum over (default: all); the sums over the shares of several processes add up to the whole.
    """
    text, image = F.normalize(text, dim=1), F.normalize(image, dim=1)
    true = torch.arange(len(text), device=text.device)[rows]                              # [N']
    s = text[rows] @ image.T / tau                                                        # [N', N]
    if form == "softmax":
        ce = lambda s: F.cross_entropy(s, true, reduction="sum")
        return (ce(s) + ce(image[rows] @ text.T / tau)) / (2 * len(text))
    return (F.softplus(s).sum() - s.gather(1, true[:, None]).sum()) / len(text)


# --- Binary cross-entropy over R (Eq. 15) ---------------------------------------------------------------------------

class FullBlockBCE(torch.autograd.Function):
    """L2 of a block of users against all items, zeros of R too: sum softplus(s) - sum_positives s, s = U I^T + b.

    dL2/ds = sigmoid(s) - R is known, so the block is scored a chunk of items at a time, the gradients of U, I and b are
    accumulated there and then, and no [B, n_items] matrix is kept.
    """

    @staticmethod
    def forward(ctx, user, item, bias, at, column, chunk=1 << 21):
        """user [B, d], item [n_items, d], bias [n_items]; the positives are (at, column), int64 [nnz] each."""
        positive = (user[at] * item[column]).sum() + bias[column].sum()
        g_user = torch.zeros_like(user).index_add_(0, at, item[column], alpha=-1)
        g_item = torch.zeros_like(item).index_add_(0, column, user[at], alpha=-1)
        g_bias = -torch.bincount(column, minlength=len(item)).to(bias.dtype)
        total = torch.zeros((), dtype=torch.float64, device=user.device)
        step = max(1, chunk // max(1, len(user)))
        for lo in range(0, len(item), step):
            part = slice(lo, lo + step)
            s = torch.addmm(bias[part], user, item[part].T)                               # [B, c]
            p = s.sigmoid()
            # softplus(s) = max(s, 0) - log max(p, 1 - p), in a seventh of F.softplus's time on a CPU, to 6e-8 a score
            total += s.clamp_(min=0).sum() - (p - 0.5).abs_().add_(0.5).log_().sum()
            g_user.addmm_(p, item[part])
            g_item[part].addmm_(p.T, user)
            g_bias[part] += p.sum(0)
        ctx.save_for_backward(g_user, g_item, g_bias)
        return (total - positive).to(user.dtype)

    @staticmethod
    def backward(ctx, g):
        g_user, g_item, g_bias = ctx.saved_tensors
        return g * g_user, g * g_item, g * g_bias, None, None, None


# --- The model and its joint objective (Eq. 16) ---------------------------------------------------------------------

class MMCPR(nn.Module):
    """Both towers and the optional bias of the score; features: {"R": per user, "T", "V": per item}."""

    def __init__(self, train, features, modalities="RTVG", dim=64, n_layers=2, norm="row", bias="none", device="cpu"):
        super().__init__()
        n_users, n_items = train.shape
        graph = lambda R: CoInteractionGraph(R, norm, device) if "G" in modalities else None
        self.users = Tower(n_users, {m: features[m] for m in "R" if m in features}, graph(train), dim, n_layers)
        self.items = Tower(n_items, {m: features[m] for m in "TV" if m in features}, graph(train.T.tocsr()), dim, n_layers)
        density = train.nnz / n_users / n_items
        start = torch.full((n_items if bias == "item" else 1,), float(np.log(density / (1 - density))))
        if bias == "none":
            self.register_buffer("bias", torch.zeros(1), persistent=False)
        else:
            self.bias = nn.Parameter(start)
        self.n_items, self.has_pair = n_items, {"T", "V"} <= set(self.items.modalities)
        self.to(device)

    def paired(self):
        """Items that have both text and image, int64: the ones that take part in CIMA."""
        return self.items.present[:, :2].all(1).nonzero()[:, 0] if self.has_pair else torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def embed(self, chunk=1 << 15):
        """(user [n_users, d], item [n_items, d], {side: {modality: mean attention where present}})."""
        tables, attention = [], {}
        for side, tower in (("user", self.users), ("item", self.items)):
            rows = torch.arange(len(tower.present), device=tower.present.device)
            parts = [tower(part)[:2] for part in rows.split(chunk)]
            tables.append(torch.cat([e for e, _ in parts]))
            alpha = torch.cat([alpha for _, alpha in parts]).sum(0) / tower.present.sum(0).clamp(min=1)
            attention[side] = dict(zip(tower.modalities, alpha.tolist()))
        return *tables, attention


def objective(model, train, rows, some, positives, lam=0.2, tau=0.1, form="softmax"):
    """(L1 / N, L2 / positives, (lam L1 + (1 - lam) L2) / positives) of one step (Eq. 16), scalars; lam 0 or 1 skips one.

    rows int64 [B]: the block of users; some int64 [N]: the items of CIMA (fewer than two: no CIMA); positives: the mean
    number of training interactions in a block. The paper sums; one constant under both sums leaves its lam what it weighs.
    One of several processes returns its share: every rank's users of the block, and rows of CIMA's matrices.
    """
    device = model.users.present.device
    item, _, projected = model.items(torch.arange(model.n_items, device=device))          # [n_items, d]
    l1 = l2 = torch.zeros((), device=device)
    if lam > 0 and len(some) > 1:
        l1 = cima(projected[some, 0], projected[some, 1], tau, form, metrics.share())
    if lam < 1:
        rows = rows[metrics.share()]
        at, column = (torch.from_numpy(x).to(device) for x in metrics.entries(train, rows.cpu().numpy()))
        user = model.users(rows)[0]                                                       # [B, d]
        l2 = FullBlockBCE.apply(user, item, model.bias.expand(model.n_items), at, column) / positives
    return l1, l2, lam * l1 * len(some) / positives + (1 - lam) * l2


@torch.no_grad()
def alignment(model, items, k=10, chunk=1024):
    """How well text finds its image among `items`: R@k, and the mean cosine of true and of false pairs."""
    if len(items) < 2:
        return {}
    projected = model.items(items)[2]
    text, image = F.normalize(projected[:, 0], dim=1), F.normalize(projected[:, 1], dim=1)
    true = (text * image).sum(1)
    n, rank = len(items), []
    for lo in range(0, n, chunk):
        s = text[lo:lo + chunk] @ image.T                                                 # [c, n]
        rank.append((s >= s.diagonal(lo)[:, None]).sum(1) - 1)  # ties count against it: collapsed towers find nothing
    rank = torch.cat(rank)
    false = (text.double().sum(0) @ image.double().sum(0) - true.double().sum()) / (n * (n - 1))
    return {f"text_to_image_recall@{k}": (rank < k).double().mean().item(), "cosine_true": true.mean().item(),
            "cosine_false": false.item(), "pairs": n}


# --- Long runs: several processes, interruptions --------------------------------------------------------------------

@contextlib.contextmanager
def processes(device):
    """Joins the other processes where torchrun started several: gloo on CPUs, nccl on GPUs, one each.

    All draw the same random numbers and hold all tables; each takes every k-th user of a block (fine-tuning: interaction of
    a batch), row of CIMA's matrices and user to rank, and the sums are added up. The first reports and writes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "LOCAL_RANK" not in os.environ:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    with contextlib.nullcontext() if first() else contextlib.redirect_stdout(io.StringIO()):
        yield
    wait_for_all()
    dist.destroy_process_group()


def wait_for_all():
    """None leaves while another still talks to it, or writes: torchrun ends the rest."""
    if dist.is_initialized():
        dist.barrier()


def first():
    """Whether this process is the one that reports and writes."""
    return metrics.share().start == 0


@contextlib.contextmanager
def one_after_the_other():
    """The first process goes through first: what it downloads, extracts and caches is there for the others."""
    if not first():
        wait_for_all()
    yield
    if first():
        wait_for_all()


def sum_gradients(model):
    """Adds the gradients of all processes up, so that all take the same step."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            metrics.all_sum(parameter.grad)


def digest(options, parts, arrays):
    """Twelve hex digits of all that a run depends on: its options, the split, and the arrays it starts from."""
    sha = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for array in (*(x for m in (parts.train, parts.valid, parts.test) for x in (m.indptr, m.indices)), *arrays):
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()[:12]


class Checkpoint:
    """The state of a run: saved every few minutes, at Ctrl-C and at SIGTERM; --resume continues it bit by bit.

    with Checkpoint(path, resume) as checkpoint: catches both signals; the step under way is finished first, a second Ctrl-C
    does not wait for it. The path carries the run's digest, so that no run finds, overwrites or deletes another's. results: what
    the run has finished, saved along. Without a path nothing is saved and no signal is caught.
    """

    def __init__(self, path=None, resume=False, every=180):
        self.path, self.every, self.results = path, every, []
        self.saved, self.asked, self.state, self.handlers = time.time(), False, None, {}
        if path is None or not Path(path).exists():
            if resume:
                print(f"{path}: no checkpoint of this data and these options; starting from the beginning")
        elif not resume:
            print(f"{path}: checkpoint of this run, interrupted; --resume would continue it, now it starts anew")
        else:
            with self.readable():
                self.state = torch.load(path, map_location="cpu", weights_only=True)
                self.results = self.state["results"]

    @contextlib.contextmanager
    def readable(self):
        """One line where the file is not what this program writes; zipfile, pickle and torch each raise their own."""
        try:
            yield
        except Exception:
            raise data.InputError(f"{self.path}: not a checkpoint of this version, or damaged; delete it and start anew") from None

    def __enter__(self):
        def ask(number, _):
            if self.asked and number == signal.SIGINT and not dist.is_initialized():
                raise KeyboardInterrupt
            self.asked = True
        self.handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def restore(self, run, model, optimizer):
        """`run` of the checkpoint, its model, optimiser and random state put back; `run` as it is where there is none."""
        state, self.state = self.state, None
        if state is None or state["run"] is None:
            return run
        with self.readable():
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            device = next(model.parameters()).device
            restored = {name: x.to(device) if torch.is_tensor(x) and torch.is_tensor(run[name]) else x
                        for name, x in state["run"].items()}
        print(f"{self.path}: goes on in epoch {restored['epoch']}")
        return restored

    def save(self, run=None, model=None, optimizer=None):
        self.saved = time.time()
        if self.path is None or not first():
            return
        state = {"results": self.results, "run": run, "model": model and model.state_dict(),
                 "optimizer": optimizer and optimizer.state_dict(), "random": torch.get_rng_state()}
        try:
            data.replace_file(self.path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch's own for a full disk
            goes_on = "" if self.asked else "; training goes on"
            print(f"{self.path}: not saved ({str(error).splitlines()[0]}){goes_on}", file=sys.stderr)

    def tick(self, run, model, optimizer):
        """After each step: saves where it is time or a signal came, and raises KeyboardInterrupt in the second case."""
        asked = self.asked
        if dist.is_initialized():  # all stop after the same step
            asked = bool(metrics.all_sum(torch.tensor(float(asked), device=next(model.parameters()).device)))
        if asked or time.time() - self.saved >= self.every:
            self.save(run, model, optimizer)
        if asked:
            raise KeyboardInterrupt

    def remedy(self):
        """What to type after an interruption; a second Ctrl-C comes in mid-step, where nothing can be saved."""
        if self.path and Path(self.path).exists():
            return "the same command with --resume goes on"
        return "there is no checkpoint yet; the same command starts anew"

    def remove(self):
        """At the end of a run that was not interrupted."""
        if first():
            Path(self.path).unlink(missing_ok=True)
            for cut in Path(self.path).parent.glob(f".{Path(self.path).name}.*.tmp"):  # what a kill in mid-writing left
                cut.unlink()


# --- Pre-training ---------------------------------------------------------------------------------------------------

def pretrain(parts, features, args, device="cpu", checkpoint=None):
    """Trains MMCPR on parts.train; returns (user, item, report) of the epoch with the best validation Recall@20.

    An epoch is one pass over the users in blocks of `args.batch`. Patience counts epochs without a new best, and starts
    once L2 is 2 % below what scoring every item at its own log-odds would give (`popularity_loss`): until then it sits on a
    plateau where all it learns is how popular items are. With --lam 1 users stay as they were drawn, so the CIMA loss of
    held-out items chooses the epoch instead; else, with --valid 0, the last of args.epochs is taken.
    """
    torch.manual_seed(args.seed)
    train, started = parts.train, time.time()
    checkpoint = checkpoint or Checkpoint()
    model = MMCPR(train, features, args.modalities, args.dim, args.layers, args.norm, args.bias, device)
    for side, tower in (("user", model.users), ("item", model.items)):
        if tower.graph:
            print(f"{side} graph: {tower.graph.n_edges:,} entries, " + ("kept as it is" if tower.graph.R is None else
                  f"a product touches {tower.graph.touched:,}, by R(R'x) - Ex"))
    n_users = train.shape[0]
    batch = min(args.batch, n_users)
    paired = model.paired().to(device)
    paired = paired[torch.randperm(len(paired)).to(device)]
    held = paired[:len(paired) // 10] if args.lam == 1 else paired[:0]
    paired = paired[len(held):]
    if args.lam == 1 and len(held) < 2:
        raise data.InputError(f"--lam 1 trains CIMA alone, but only {len(held) + len(paired)} items have both a text and an "
                              "image; 20 are needed")
    if args.lam > 0 and len(paired) < 2:
        print("no two items have both text and image: CIMA is left out")
    positives = batch * train.nnz / n_users  # the mean number in a block: what L2 is divided by
    # Of the mean loss a user's row sees 1 / n_users: a decay that did not fall with it would weigh more the larger the data.
    # And a decay that stayed where lam takes weight from BCE would drown it: lam is to weigh CIMA alone.
    decay = args.weight_decay * (1 - args.lam) / n_users
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=decay, fused=True)
    plateau = popularity_loss(train)
    # All that changes in training. passed: the epoch at which the plateau was left
    run = {"epoch": 1, "step": 0, "blocks": None, "sums": torch.zeros(2, device=device), "passed": 0, "history": [],
           "best": {"epoch": -1, "value": -np.inf}, "kept": None, "seconds": 0.0}
    run = checkpoint.restore(run, model, optimizer)
    started -= run["seconds"]
    interrupted = False
    bar = tqdm(range(run["epoch"], args.epochs + 1), desc="pre-training", unit="epoch", initial=run["epoch"] - 1,
               total=args.epochs, disable=not first())
    try:
        for epoch in bar:
            if run["blocks"] is None:
                run |= {"epoch": epoch, "step": 0, "blocks": torch.randperm(n_users), "sums": torch.zeros(2, device=device)}
            for rows in run["blocks"].split(batch)[run["step"]:]:
                some = paired[torch.randperm(len(paired))[:args.batch].to(device)]        # N items, drawn anew each step
                l1, l2, loss = objective(model, train, rows.to(device), some, positives, args.lam, args.tau, args.cima)
                optimizer.zero_grad()
                loss.backward()
                sum_gradients(model)
                optimizer.step()
                run["sums"] = run["sums"] + metrics.all_sum(torch.stack([l1, l2]).detach())
                run |= {"step": run["step"] + 1, "seconds": time.time() - started}
                checkpoint.tick(run, model, optimizer)
            run["blocks"] = None
            l1, l2 = run["sums"][0].item() / run["step"], run["sums"][1].item() * batch / n_users  # the last block may be smaller
            if not np.isfinite(l1 + l2):
                raise data.InputError(f"the loss is not finite at epoch {epoch}; lower --lr (now {args.lr})")
            if epoch % args.eval_every and epoch < args.epochs:
                continue
            point = {"epoch": epoch, "cima": l1, "bce": l2}
            run["passed"] = run["passed"] or (epoch if l2 < 0.98 * plateau else 0)
            if args.lam == 1:
                with torch.no_grad():
                    projected = model.items(held)[2]
                    loss = cima(projected[:, 0], projected[:, 1], args.tau, args.cima, metrics.share())
                point["held_out_cima"] = metrics.all_sum(loss).item()
                value = -point["held_out_cima"]
            elif parts.valid.nnz:
                value = metrics.evaluate(*model.embed()[:2], parts.train, parts.valid, (20,))["recall@20"]
                point["recall@20"] = value
            else:
                value = epoch  # no validation: the last epoch is the best
            run["history"].append(point)
            if value > run["best"]["value"]:
                run["kept"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                run["best"] = {"value": value, **point}
            bar.set_postfix({k: f"{v:.4f}" for k, v in point.items() if k != "epoch"})
            if run["passed"] and epoch - max(run["best"]["epoch"], run["passed"]) >= args.patience:
                break
    except KeyboardInterrupt:
        if run["kept"] is None:
            raise data.InputError(f"interrupted before the first validation; {checkpoint.remedy()}") from None
        interrupted = True
    bar.close()
    model.load_state_dict(run["kept"])
    best = run["best"]
    user, item, attention = model.embed()
    if not torch.isfinite(user.square().sum() + item.square().sum()):
        raise data.InputError(f"the tables are not finite at epoch {best['epoch']}; lower --lr (now {args.lr})")
    valid = best.get("recall@20")  # not ranked yet where CIMA alone chose the epoch
    if valid is None and parts.valid.nnz:
        valid = metrics.evaluate(user, item, parts.train, parts.valid, (20,))["recall@20"]
    report = {"epoch": best["epoch"], "epochs_run": epoch, "interrupted": interrupted,
              "seconds": round(time.time() - started, 1),
              "losses": {"cima": best["cima"], "bce": best["bce"]}, "attention": attention,
              "alignment": alignment(model, held if len(held) else paired) | {"held_out": len(held) > 0},
              "popularity_loss": plateau,
              "valid": {"recall@20": valid},
              "rms": {"user": user.square().mean().sqrt().item(), "item": item.square().mean().sqrt().item(),
                      "all": torch.cat([user, item]).square().mean().sqrt().item()}, "history": run["history"]}
    return user.cpu().numpy(), item.cpu().numpy(), report


def popularity_loss(train):
    """L2 per positive of the best score that knows items' popularity alone, s_ui = log-odds of p_i = deg(i) / n_users."""
    p = np.asarray(train.sum(0), np.float64).ravel() / train.shape[0]
    return float(-(xlogy(p, p) + xlogy(1 - p, 1 - p)).sum() * train.shape[0] / train.nnz)


def print_report(report):
    """The numbers at the end of pre-training, one line each."""
    l1, l2 = report["losses"]["cima"], report["losses"]["bce"]
    print(f"epoch {report['epoch']} of {report['epochs_run']} in {report['seconds']:.0f} s: "
          f"CIMA (L1/N) {f'{l1:.4f}' if l1 else 'left out'}, BCE (L2 per positive) {f'{l2:.4f}' if l2 else 'left out'} "
          f"(popularity alone: {report['popularity_loss']:.4f})")
    if l2 >= 0.98 * report["popularity_loss"]:
        print("that is hardly better than popularity alone: give it more --epochs, or another --lr")
    for side, weights in report["attention"].items():
        print(f"mean attention where present, {side}s: " + (", ".join(f"{m} {w:.3f}" for m, w in weights.items()) or
              "none: this side has no modality, each node has a row of its own"))
    if "pairs" in report["alignment"]:
        a = report["alignment"]
        kind = "held-out" if a["held_out"] else "training"
        print(f"text to image: R@10 {a['text_to_image_recall@10']:.3f} among {a['pairs']:,} {kind} pairs; mean cosine of true "
              f"pairs {a['cosine_true']:.3f}, of false pairs {a['cosine_false']:.3f}")
    if report["valid"]["recall@20"] is not None:
        print(f"validation Recall@20 of the tables themselves {report['valid']['recall@20']:.4f}")
    print("RMS of the entries: " + ", ".join(f"{k} {v:.3f}" for k, v in report["rms"].items()))


def modalities(text):
    """argparse type: a subset of RTVG."""
    text = text.upper().replace(",", "")
    if not text or set(text) - set("RTVG"):
        raise argparse.ArgumentTypeError("letters of R (reviews), T (text), V (image), G (graphs)")
    return text


def device_name(text):
    """argparse type: auto, cpu or cuda; auto is cuda where there is one."""
    if text not in ("auto", "cpu", "cuda") or (text == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError("auto, cpu, or cuda where torch finds one")
    return ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text


def add_checkpoint_arguments(parser):
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    parser.add_argument("--checkpoint-every", type=data.non_negative, default=180, metavar="SECONDS")


def arguments():
    parser = argparse.ArgumentParser(description="Pre-train MMCPR and write the embeddings to hand over.", formatter_class=data.Help)
    parser.add_argument("--out", default="emb.npz", help="where the embeddings go")
    parser.add_argument("--modalities", type=modalities, default="RTVG", help="subset of R, T, V, G (Figure 3)")
    parser.add_argument("--lam", type=data.fraction, default=0.2, help="weight of CIMA; 0 drops it, 1 drops BCE (Eq. 16)")
    parser.add_argument("--tau", type=float, default=0.1, help="CIMA's temperature")
    parser.add_argument("--cima", choices=("softmax", "bce"), default="softmax", help="reading of Eq. 11")
    parser.add_argument("--bias", choices=("none", "global", "item"), default="global", help="trained beside the score of "
                        "Eq. 15, never exported")
    parser.add_argument("--norm", choices=("row", "sym"), default="row", help="Eq. 1's normalisation")
    parser.add_argument("--layers", type=data.non_negative, default=2, help="LightGCN layers of the graph encoder")
    parser.add_argument("--dim", type=data.positive, default=64, help="width d of the common space")
    parser.add_argument("--lr", type=float, default=1e-2, help="Adam's learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.75, help="Adam's is this times (1 - lam) / users, "
                        "on all that is trained")
    parser.add_argument("--batch", type=data.positive, default=2048, help="users in a block, items in CIMA's N x N")
    parser.add_argument("--epochs", type=data.positive, default=1000, help="at most; one is a pass over the users")
    parser.add_argument("--patience", type=data.positive, default=100, help="epochs without a better validation Recall@20")
    parser.add_argument("--eval-every", type=data.positive, default=5, help="epochs between two validations")
    parser.add_argument("--seed", type=data.non_negative, default=0)
    parser.add_argument("--device", type=device_name, default="auto")
    add_checkpoint_arguments(parser)
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    return parser


def work(args):
    """What main does once the flags are checked."""
    with one_after_the_other():
        dataset, parts, source = data.open_data(args, modalities=args.modalities)
        features = data.features(dataset, args.modalities, args.encoder, Path(source["data_dir"]),
                                 (args.clip_model, args.clip_weights))
    if "R" in features:
        features["R"] = data.pool_reviews(features["R"], dataset.users, dataset.n_users, parts.in_train)  # Eq. 4
    dataset.texts = dataset.images = dataset.reviews = None  # their features are made
    options = data.run_options(args, "out", "resume", "checkpoint_every")
    path = f"{args.out}.{digest(options, parts, features.values())}.ckpt"
    with Checkpoint(path, args.resume, args.checkpoint_every) as checkpoint:
        user, item, report = pretrain(parts, features, args, args.device, checkpoint)
    meta = {"method": "MMCPR", "data": source, "options": options, "report": report,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}}
    if first():
        data.save_embeddings(args.out, dataset, parts, user, item, meta)
    print_report(report)
    if report["interrupted"]:
        wait_for_all()
        raise data.InputError(f"interrupted at epoch {report['epochs_run']}; {args.out} holds epoch {report['epoch']}, the best "
                              f"so far; {checkpoint.remedy()}")
    checkpoint.remove()
    print(f"wrote {args.out}; next: python finetune.py --init {args.out}")


def main(argv=None):
    args = arguments().parse_args(argv)
    if not (0 < args.tau < np.inf and 0 < args.lr < np.inf and 0 <= args.weight_decay < np.inf):
        raise data.InputError("--tau and --lr must be above 0, --weight-decay at least 0, all finite")
    if args.lam > 0 and args.batch < 2:
        raise data.InputError("--batch must be at least 2 for CIMA; or pass --lam 0")
    data.check_outputs(args.out)
    with processes(args.device):
        work(args)


if __name__ == "__main__":
    sys.exit(data.cli(main))
