"""LightGCN (He et al., SIGIR 2020) trained with MixGCF (Huang et al., KDD 2021) from any initialiser, and the test metrics.

    python finetune.py --init emb.npz                   from pre-trained tables; data and split are read from emb.npz
    python finetune.py --init random --data demo        the same from a random start
    python finetune.py --init emb.npz --seeds 0 1 2 --metrics out.json --recommend recs.csv

Prints Recall and NDCG @20, 40, 60 on the test interactions, once, at the epoch that validation chose.
"""
import argparse
import csv
import json
import os
import sys
import time

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import metrics
from mmcpr import (Checkpoint, add_checkpoint_arguments, device_name, digest, first, lightgcn, one_after_the_other, processes,
                   sparse_product, sparse_tensor, sum_gradients, wait_for_all)

KS = (20, 40, 60)


# --- LightGCN -------------------------------------------------------------------------------------------------------

class LightGCN(nn.Module):
    """E^(l+1) = D^-1/2 A D^-1/2 E^(l) on the bipartite graph A = [[0, R], [R^T, 0]]; score = mean_l e_u . mean_l e_i.

    One table holds users, then items: E^(0) [n_users + n_items, d] is all there is to train.
    """

    def __init__(self, train, user, item, n_layers=3):
        """train: binary CSR [n_users, n_items]; user [n_users, d], item [n_items, d]: where E^(0) starts."""
        super().__init__()
        self.n_users, self.n_layers = len(user), n_layers
        self.E0 = nn.Parameter(torch.cat([user, item]))                                   # [n_users + n_items, d]
        A = sp.block_array([[None, train], [train.T, None]], format="csr")
        A.sort_indices()
        degree = np.asarray(A.sum(1)).ravel()
        root = sp.diags_array(np.where(degree > 0, degree, np.inf) ** -0.5)
        self.A = sparse_tensor((root @ A @ root).tocsr(), self.E0.device, self.E0.dtype)

    @torch.no_grad()
    def layers(self):
        """E^(0), ..., E^(L), each [n_users + n_items, d]; LayerRows gives them their gradient."""
        return lightgcn(self.E0.detach(), lambda x: sparse_product(self.A, x), self.n_layers)

    def embed(self):
        """(user [n_users, d], item [n_items, d]), the means over layers, whose products are the scores."""
        E = sum(self.layers()) / (self.n_layers + 1)
        return E[:self.n_users], E[self.n_users:]


class LayerRows(torch.autograd.Function):
    """E^(l)[rows[l]] for every layer l, as a function of E^(0).

    E^(l) = P^l E^(0) and P is symmetric, so the gradient is G_0 + P (G_1 + P (G_2 + ...)), where G_l holds the gradients of
    layer l's rows: one product a layer and one table, where autograd would fill and add a table for every layer.
    """

    @staticmethod
    def forward(ctx, E0, layers, rows, P):
        """E0 [n, d]; layers: what LightGCN.layers made of it; rows int64 [L+1, r]; P [n, n]. Returns [L+1, r, d]."""
        ctx.rows, ctx.P, ctx.n = rows, P, len(E0)
        return torch.stack([layer[r] for layer, r in zip(layers, rows)])

    @staticmethod
    def backward(ctx, g):
        G = g.new_zeros(ctx.n, g.shape[2]).index_add_(0, ctx.rows[-1], g[-1])
        for l in reversed(range(len(g) - 1)):
            G = sparse_product(ctx.P, G).index_add_(0, ctx.rows[l], g[l])
        return G, None, None, None


# --- MixGCF ---------------------------------------------------------------------------------------------------------

class NegativeSampler:
    """Uniform items outside a user's training items: drawn, looked up among the sorted keys u n_items + i, redrawn on a hit."""

    def __init__(self, train):
        """train: CSR with sorted indices."""
        at, column = metrics.entries(train, np.arange(train.shape[0]))
        self.keys, self.n_items = torch.from_numpy(at * train.shape[1] + column), train.shape[1]
        self.full = torch.from_numpy(np.diff(train.indptr) == train.shape[1])  # users with no negative: any item will do

    def __call__(self, users, m):
        """users int64 [B] -> items int64 [B, m]."""
        users = users.repeat_interleave(m)
        drawn = torch.randint(self.n_items, (len(users),))
        todo = (~self.full[users]).nonzero()[:, 0]
        while len(todo):
            key = users[todo] * self.n_items + drawn[todo]
            hit = self.keys[torch.searchsorted(self.keys, key).clamp_(max=len(self.keys) - 1)] == key
            todo = todo[hit]
            drawn[todo] = torch.randint(self.n_items, (len(todo),))
        return drawn.view(-1, m)


def candidate_scores(q, table, candidates):
    """q . e at each candidate: q [B, d], table [n, d], candidates int64 [B, M] -> [B, M].

    On a CPU one sampled product, q times the table's transpose at the candidates' places only: no [B, M, d] is gathered. It
    takes no more places than there are entries, so a table of fewer than M rows is gathered from, as is any on a GPU.
    """
    B, M = candidates.shape
    if q.is_cuda or len(table) < M:
        return (table[candidates] @ q[:, :, None])[:, :, 0]
    at = torch.arange(0, B * M + 1, M, dtype=torch.int32)
    places = torch.sparse_csr_tensor(at, candidates.flatten().int(), q.new_zeros(B * M), (B, len(table)), check_invariants=False)
    return torch.sparse.sampled_addmm(places, q, table.T, beta=0).values().view(B, M)


def hop_mixing(layers, users, candidates):
    """Per layer the candidate with the largest score q . e^(l), q the user's pooled vector: rows, int64 [L+1, B].

    layers: L+1 tables [n, d]; users int64 [B] and candidates int64 [B, M] are rows of them. MixGCF takes the arg-max over
    the *mixed* candidates alpha p + (1 - alpha) n; alpha is shared by the M candidates and 1 - alpha > 0, so that is the
    arg-max over q . n, and nothing needs to be mixed but the winners.
    """
    q = torch.stack([layer[users] for layer in layers]).mean(0)                           # [B, d]
    best = lambda layer: candidate_scores(q, layer, candidates).argmax(1, keepdim=True)
    return torch.stack([candidates.gather(1, best(layer))[:, 0] for layer in layers])


def mixgcf_loss(model, users, positives, candidates, alpha, l2=1e-4):
    """BPR against one mixed negative plus l2 on layer 0, summed; users, positives [B], candidates [B, M] are rows of E0.

    Positive mixing: per layer l, e'^(l) = alpha_l e_+^(l) + (1 - alpha_l) e_m^(l), alpha [L+1, B]; hop mixing picks m; the
    negative is the mean over layers. Gradients reach the positive and the picked candidates, not the choice.
    """
    layers = model.layers()
    picked = hop_mixing(layers, users, candidates)                                        # [L+1, B]
    rows = torch.cat([users.expand_as(picked), positives.expand_as(picked), picked], 1)   # [L+1, 3 B]
    u, p, m = LayerRows.apply(model.E0, layers, rows, model.A).chunk(3, 1)                # [L+1, B, d] each
    n = alpha[:, :, None] * p + (1 - alpha[:, :, None]) * m
    score = lambda other: (u.mean(0) * other.mean(0)).sum(1)                              # [B]
    return F.softplus(score(n) - score(p)).sum() + l2 / 2 * sum(x[0].square().sum() for x in (u, p, n))


# --- Initial tables -------------------------------------------------------------------------------------------------

def initial_tables(init, train, dim, scale="asis", missing_side="random"):
    """(user, item) float32 tensors to start from. init: {"user"?, "item"} arrays, or None for a random start.

    A table that is not given is Xavier-uniform, or with missing_side "mean" (users only) the mean of the user's training
    items. scale: "asis", "xavier" (each table brought to the RMS that Xavier would give it), or a number, that RMS.
    """
    init, tables = init or {}, {}
    for side, n in (("user", train.shape[0]), ("item", train.shape[1])):
        fresh = nn.init.xavier_uniform_(torch.empty(n, dim))
        if side in init:
            table = torch.from_numpy(np.asarray(init[side], np.float32))
        elif side == "user" and missing_side == "mean":
            degree = np.diff(train.indptr)[:, None]
            mean = torch.from_numpy((train @ init["item"] / np.maximum(degree, 1)).astype(np.float32))
            table = torch.where(torch.from_numpy(degree > 0), mean, fresh)
        else:
            table = fresh
        if scale != "asis":
            rms = (2 / (n + dim)) ** 0.5 if scale == "xavier" else scale
            table = table * (rms / table.square().mean().sqrt().clamp(min=1e-12))
        tables[side] = table
    return tables["user"], tables["item"]


# --- Training -------------------------------------------------------------------------------------------------------

class Patience:
    """Stops after `limit` evaluations in a row without a new best, counted from the lowest of the first `limit` ones.

    From a random start the first is the lowest, and this is MixGCF's rule. A pre-trained start falls before it rises above
    itself: counted from its own start it would be stopped on the way up.
    """

    def __init__(self, limit):
        self.limit, self.seen, self.waited, self.lowest, self.highest = limit, 0, 0, np.inf, np.inf

    def over(self, value):
        self.seen += 1
        if self.seen <= self.limit and value < self.lowest:
            self.lowest, self.highest, self.waited = value, value, 0
        elif value > self.highest:
            self.highest, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.limit


def finetune(parts, init, args, seed, device="cpu", checkpoint=None):
    """Trains LightGCN with MixGCF; returns (result dict, user, item) of the epoch with the best validation Recall@20.

    Epoch 0, the tables as given, is evaluated too and can win. With --valid 0 the last of args.epochs is taken.
    """
    torch.manual_seed(seed)
    started = time.time()
    checkpoint = checkpoint or Checkpoint()
    train = parts.train
    user, item = initial_tables(init, train, args.dim, args.scale, args.missing_side)
    model = LightGCN(train, user.to(device), item.to(device), args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    users, items = (torch.from_numpy(x) for x in metrics.entries(train, np.arange(train.shape[0])))
    sample = NegativeSampler(train)
    patience, with_valid, mine = Patience(args.patience), parts.valid.nnz > 0, metrics.share()
    # All that changes in training, patience included
    run = {"epoch": 0, "step": 0, "order": None, "total": torch.zeros((), device=device), "history": [], "seconds": 0.0,
           "best": {"epoch": -1, "value": -np.inf, "tables": None}, "patience": vars(patience)}
    run = checkpoint.restore(run, model, optimizer)
    vars(patience).update(run["patience"])
    run["patience"] = vars(patience)
    started -= run["seconds"]
    interrupted = False
    bar = tqdm(range(run["epoch"], args.epochs + 1), desc=f"fine-tuning, seed {seed}", unit="epoch", initial=run["epoch"],
               total=args.epochs + 1, disable=not first())
    try:
        for epoch in bar:
            if run["order"] is None:
                run |= {"epoch": epoch, "step": 0, "total": torch.zeros((), device=device),
                        "order": torch.randperm(len(users)) if epoch else torch.empty(0, dtype=torch.int64)}
            for rows in run["order"].split(args.batch)[run["step"]:] if epoch else ():  # the last, partial one too
                u, i = users[rows], items[rows]
                candidates = sample(u, args.candidates)                                   # [B, M]
                alpha = torch.rand(args.layers + 1, len(rows))
                u, i, candidates, alpha = (x.to(device) for x in (u[mine], i[mine] + len(user), candidates[mine] + len(user),
                                                                  alpha[:, mine]))
                loss = mixgcf_loss(model, u, i, candidates, alpha, args.l2) / len(rows)
                optimizer.zero_grad()
                loss.backward()
                sum_gradients(model)
                optimizer.step()
                run |= {"total": run["total"] + metrics.all_sum(loss.detach()) * len(rows), "step": run["step"] + 1,
                        "seconds": time.time() - started}
                checkpoint.tick(run, model, optimizer)
            run["order"], total = None, run["total"]
            if epoch and not torch.isfinite(total):
                raise data.InputError(f"the loss is not finite at epoch {epoch}; lower --lr (now {args.lr}) or --scale")
            if epoch % args.eval_every and epoch < args.epochs:
                continue
            value, tables = epoch, model.embed()
            if with_valid:
                value = metrics.evaluate(*tables, train, parts.valid, KS[:1])["recall@20"]
                run["history"].append({"epoch": epoch, "recall@20": value, "loss": total.item() / len(users) if epoch else None})
            if value > run["best"]["value"]:
                run["best"] = {"epoch": epoch, "value": value, "tables": tables}
            if with_valid:
                bar.set_postfix({"loss": f"{total.item() / len(users):.4f}", "valid recall@20": f"{value:.4f}"})
                if patience.over(value):
                    break
    except KeyboardInterrupt:
        if run["best"]["epoch"] < 0:
            raise data.InputError(f"interrupted before the first validation; {checkpoint.remedy()}") from None
        interrupted = True
    bar.close()
    best = run["best"]
    user, item = (table.to(device) for table in best["tables"])
    if not torch.isfinite(user.square().sum() + item.square().sum()):
        raise data.InputError(f"the tables are not finite at epoch {best['epoch']}; lower --lr (now {args.lr}) or --scale")
    result = {"seed": seed, "epoch": best["epoch"], "epochs_run": epoch, "seconds": round(time.time() - started, 1),
              "interrupted": interrupted,
              "valid": metrics.evaluate(user, item, train, parts.valid, KS) if with_valid else {},
              "test": metrics.evaluate(user, item, (train + parts.valid).tocsr(), parts.test, KS), "history": run["history"]}
    return result, user, item


# --- The command line -----------------------------------------------------------------------------------------------

def read_init(path, args):
    """(arrays or None, known data options) of --init."""
    if path == "random":
        return None, None
    arrays = data.load_embeddings(path)
    width = arrays["item"].shape[1]
    if args.dim not in (None, width):
        raise data.InputError(f"{path}: its tables are {width} wide, not --dim {args.dim}; leave --dim out")
    args.dim = width
    return arrays, arrays["meta"].get("data")


def check_same_split(path, arrays, dataset, parts):
    """InputError where the embeddings were made from other training interactions than the ones to fine-tune on."""
    if arrays["fingerprint"] != parts.fingerprint or not np.array_equal(arrays["item_ids"], dataset.item_ids) or \
            not np.array_equal(arrays["user_ids"], dataset.user_ids):
        made = arrays["meta"].get("data", {})
        raise data.InputError(f"{path}: made from other training interactions ({', '.join(f'{k} {v}' for k, v in made.items())})"
                              "; pass the same --data, --valid and --split-seed, or, where the data has changed since, pre-train again")


def scale(text):
    """argparse type: asis, xavier or a positive number."""
    if text in ("asis", "xavier"):
        return text
    value = float(text)
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError("asis, xavier, or an RMS above 0")
    return value


def recommend(path, user, item, dataset, parts, k=20):
    """recs.csv: each user's top k with ids, ranks and scores, as the test ranked them: without training and validation items."""
    def write(file):
        writer = csv.writer(file)
        writer.writerow(("user", "rank", "item", "score"))
        for rows, scores, items in metrics.rank(user, item, (parts.train + parts.valid).tocsr(), k):
            for row, best, which in zip(rows, scores.tolist(), items.tolist()):
                writer.writerows((dataset.user_ids[row], place, dataset.item_ids[i], f"{s:.6g}")
                                 for place, (s, i) in enumerate(zip(best, which), 1) if s > -np.inf)
    data.replace_file(path, write, "w")


def write_outputs(args, results, user, item, dataset, parts, source):
    """What was asked for, after every seed: nothing is lost if the next is interrupted. Tables and lists are the first seed's."""
    if args.metrics:
        summary = results[0] if len(args.seeds) == 1 else {
            "data": source["data"], "init": args.init, "scale": args.scale, "runs": results,
            "mean": {name: float(np.mean([r["test"][name] for r in results])) for name in results[0]["test"]},
            "std": {name: float(np.std([r["test"][name] for r in results], ddof=1)) if len(results) > 1 else None
                    for name in results[0]["test"]}}
        data.replace_file(args.metrics, lambda file: json.dump(summary, file, indent=1), "w")
    if args.out and len(results) == 1:
        meta = {"method": "LightGCN + MixGCF", "data": source, "init": args.init, "scale": args.scale, "seed": args.seeds[0]}
        data.save_embeddings(args.out, dataset, parts, user.cpu().numpy(), item.cpu().numpy(), meta)
    if args.recommend and len(results) == 1:
        recommend(args.recommend, user, item, dataset, parts)


def print_results(results, init):
    """The test metrics as a table, with mean and standard deviation (n - 1) over several seeds."""
    names = [f"{name}@{k}" for name in ("recall", "ndcg") for k in KS]
    print(f"{'test, init ' + init:<28}" + "".join(f"{name:>11}" for name in names))
    for r in results:
        print(f"{'seed ' + str(r['seed']) + ', epoch ' + str(r['epoch']) + ' of ' + str(r['epochs_run']):<28}" +
              "".join(f"{r['test'][name]:>11.4f}" for name in names))
    if len(results) > 1:
        for label, f in (("mean", np.mean), ("± std", lambda x: np.std(x, ddof=1))):
            print(f"{label:<28}" + "".join(f"{f([r['test'][name] for r in results]):>11.4f}" for name in names))
    if any(r["epoch"] == 0 < r["epochs_run"] for r in results):
        print("epoch 0: on validation no training was better than the tables as given; try a lower --lr")


def arguments():
    parser = argparse.ArgumentParser(description="Train LightGCN with MixGCF from any initialiser; print the test metrics.",
                                     formatter_class=data.Help)
    parser.add_argument("--init", default="random", help="random, or an emb.npz")
    parser.add_argument("--scale", type=scale, default="asis", help="RMS of the initial tables: asis, xavier, or a number")
    parser.add_argument("--missing-side", choices=("random", "mean"), default="random",
                        help="users that emb.npz does not have: random, or the mean of their training items")
    parser.add_argument("--seeds", type=data.non_negative, nargs="+", default=[0], help="one run each")
    parser.add_argument("--metrics", help="write the results here, as JSON")
    parser.add_argument("--out", help="write the final embeddings here, as an emb.npz (of the first seed)")
    parser.add_argument("--recommend", metavar="CSV", help="write each user's top 20 here (of the first seed)")
    parser.add_argument("--dim", type=data.positive, help="width of a random start (default: 64)")
    parser.add_argument("--layers", type=data.non_negative, default=3, help="LightGCN layers")
    parser.add_argument("--candidates", type=data.positive, default=64, help="MixGCF's M")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate")
    parser.add_argument("--l2", type=float, default=1e-4, help="weight of the layer-0 penalty")
    parser.add_argument("--batch", type=data.positive, default=2048, help="interactions in a step")
    parser.add_argument("--epochs", type=data.non_negative, default=1000, help="at most")
    parser.add_argument("--eval-every", type=data.positive, default=5, help="epochs between two validations")
    parser.add_argument("--patience", type=data.positive, default=10, help="validations in a row that bring nothing")
    parser.add_argument("--device", type=device_name, default="auto")
    add_checkpoint_arguments(parser)
    data.add_data_arguments(parser)
    return parser


def work(args):
    """What main does once the flags are checked."""
    arrays, known = read_init(args.init, args)
    args.dim = args.dim or 64
    if args.missing_side == "mean" and arrays is None:
        raise data.InputError("--missing-side mean needs item vectors: pass an emb.npz with --init")
    with one_after_the_other():
        dataset, parts, source = data.open_data(args, known, contents=False)
    if arrays is not None:
        check_same_split(args.init, arrays, dataset, parts)
        if arrays["meta"].get("report", {}).get("interrupted"):
            print(f"{args.init}: of a pre-training that was interrupted")
    options = data.run_options(args, "init", "resume", "checkpoint_every", "metrics", "out", "recommend")
    tables = [arrays[side] for side in ("user", "item") if side in arrays] if arrays else []
    path = f"finetune.{digest(options, parts, tables)}.ckpt"
    with Checkpoint(path, args.resume, args.checkpoint_every) as checkpoint:
        results = checkpoint.results
        lost = next((p for p in (args.out, args.recommend) if results and p and not os.path.exists(p)), None)
        if lost:
            raise data.InputError(f"{lost}: belongs to seed {args.seeds[0]}, which was finished without it; leave it out, or leave "
                                  "--resume out to start anew")
        for seed in args.seeds[len(results):]:
            result, user, item = finetune(parts, arrays, args, seed, args.device, checkpoint)
            results.append({"data": source["data"], "init": args.init, "scale": args.scale, **result})
            if first():
                write_outputs(args, results, user, item, dataset, parts, source)
            if result["interrupted"]:
                break
            checkpoint.save()
    print_results(results, args.init)
    if results[-1]["interrupted"]:
        wait_for_all()
        raise data.InputError(f"interrupted in seed {seed} at epoch {result['epochs_run']}; its best epoch so far, "
                              f"{result['epoch']}, was tested; {checkpoint.remedy()}")
    checkpoint.remove()
    for path in filter(None, (args.metrics, args.out, args.recommend)):
        print(f"wrote {path}")
    same = data.data_flags(source) + data.flags({"dim": args.dim}, {"dim": 64})
    trained = {name: value for name, value in options.items() if name not in ("scale", "missing_side", "dim")}
    trained = data.flags(trained, vars(arguments().parse_args([])))
    print(f"next: python mmcpr.py{same}, then python finetune.py --init emb.npz{trained}" if args.init == "random" else
          f"next: python finetune.py --init random{same}{trained}, the start to compare with")


def main(argv=None):
    args = arguments().parse_args(argv)
    if not (0 < args.lr < np.inf and 0 <= args.l2 < np.inf):
        raise data.InputError("--lr must be above 0, --l2 at least 0, both finite")
    if len(set(args.seeds)) < len(args.seeds):
        raise data.InputError("--seeds names a seed twice")
    for path in filter(None, (args.metrics, args.out, args.recommend)):
        if os.path.realpath(path) == os.path.realpath(args.init):
            raise data.InputError(f"{path}: would overwrite the tables it starts from; choose another output path")
    data.check_outputs(args.metrics, args.out, args.recommend)
    with processes(args.device):
        work(args)


if __name__ == "__main__":
    sys.exit(data.cli(main))
