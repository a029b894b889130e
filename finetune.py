"""LightGCN (He et al., SIGIR 2020) trained with MixGCF (Huang et al., KDD 2021), from any start.

    python finetune.py --init emb.npz                   data and split are read from emb.npz
    python finetune.py --init random --data demo        the same from a random start
    python finetune.py --init emb.npz --seeds 0 1 2 --metrics out.json --recommend recs.csv

This is Section 3.6 of the paper. Validation chooses the epoch. At that epoch the test interactions
are ranked, once, and their Recall and NDCG @20, 40, 60 are printed.

    E0       [n_users + n_items, d]   the only parameters: users' rows, then items'
    A_hat    sparse, symmetric        D^-1/2 A D^-1/2, A = [[0, R], [R^T, 0]]: users and items
    E^(l)    A_hat^l E0               layer l of LightGCN, l = 0, ..., L

(mmcpr.py's graph encoder is a LightGCN too, but on users alone or items alone, and it takes the
mean over neighbours, as the paper's Eq. 1 reads.)
"""
import argparse
import csv
import json
import os
import sys
import time
from typing import NamedTuple

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import data
import disk
import metrics
import ops

KS = (20, 40, 60)

DEFAULTS = dict(
    layers=3,         # MixGCF's authors: 3
    candidates=64,    # paper: M = 64
    lr=1e-3,          # MixGCF's authors: 1e-3
    l2=1e-4,          # MixGCF's authors: 1e-4; a penalty, not the paper's L2
    batch=2048,       # paper: 2048, interactions in a step
    epochs=1000,      # paper: 1000; the maximum
    eval_every=5,     # MixGCF's authors: 5
    patience=10,      # MixGCF's authors: 10, in validations (mmcpr.py's is in epochs)
    scale="asis",     # paper: not said; as they are
)


# --- LightGCN -----------------------------------------------------------------------------

class LightGCN(nn.Module):
    """E^(l+1) = A_hat E^(l); a score is mean_l e_u^(l) . mean_l e_i^(l)."""

    def __init__(self, train, user, item, n_layers=DEFAULTS["layers"]):
        """train: CSR [n_users, n_items]; user [n_users, d], item [n_items, d]: initial E0."""
        super().__init__()
        self.n_users, self.n_layers = len(user), n_layers
        self.E0 = nn.Parameter(torch.cat([user, item]))
        A_hat = ops.normalised_adjacency(train)
        self.A_hat = ops.sparse_tensor(A_hat, self.E0.device, self.E0.dtype)

    @torch.no_grad()
    def layers(self):
        """E^(0), ..., E^(L), each [n_users + n_items, d]; ops.layer_rows gives their gradient."""
        layers = [self.E0.detach()]
        for _ in range(self.n_layers):
            layers.append(ops.sparse_product(self.A_hat, layers[-1]))
        return layers

    def embed(self):
        """(user [n_users, d], item [n_items, d]): the mean over layers."""
        E = sum(self.layers()) / (self.n_layers + 1)
        return E[:self.n_users], E[self.n_users:]


# --- MixGCF -------------------------------------------------------------------------------

def mixgcf_loss(model, users, pos_items, candidates, mix, penalty_weight=DEFAULTS["l2"]):
    """BPR against one mixed negative, plus the penalty of layer 0, summed over a batch.

    users, pos_items int64 [B] and candidates int64 [B, M] are rows of E0; mix [L+1, B] is
    uniform in [0, 1), MixGCF's alpha.
    """
    # The layers are computed without autograd, because ops.layer_rows has their gradient.
    layers = model.layers()
    # Hop mixing: each layer picks the candidate that scores highest. MixGCF first mixes in the
    # positive, which does not change the winner (see ops.hard_negatives). The choice itself has
    # no gradient; the rows that it picks have one.
    picked = ops.hard_negatives(layers, users, candidates)                            # [L+1, B]
    rows = torch.cat([users.expand_as(picked), pos_items.expand_as(picked), picked], 1)
    e = ops.layer_rows(model.E0, model.A_hat, layers, rows)                     # [L+1, 3 B, d]
    e_user, e_pos, e_picked = e.chunk(3, 1)                                   # [L+1, B, d] each
    # Positive mixing: the negative is a random step from the candidate towards the positive.
    mix = mix[:, :, None]
    e_neg = mix * e_pos + (1 - mix) * e_picked
    return bpr_loss(e_user, e_pos, e_neg, penalty_weight)


def bpr_loss(e_user, e_pos, e_neg, penalty_weight):
    """softplus(score_neg - score_pos) + weight / 2 ||layer 0||^2, summed; each [L+1, B, d]."""
    def score(e_item):
        # LightGCN pools by the mean over layers.
        return (e_user.mean(0) * e_item.mean(0)).sum(1)                                    # [B]

    ranking = F.softplus(score(e_neg) - score(e_pos)).sum()
    penalty = sum(e[0].square().sum() for e in (e_user, e_pos, e_neg))
    return ranking + penalty_weight / 2 * penalty


# --- Initial tables -----------------------------------------------------------------------

def initial_tables(init, train, dim, scale="asis"):
    """(user [n_users, d], item [n_items, d]) to start from, float32 tensors.

    init: {"user": array, "item": array}, or None for a random start; a table that it lacks is
    Xavier-uniform. scale: "asis" changes nothing; "xavier" brings each table to the root mean
    square that Xavier would give it; a number is the root mean square to bring each table to.
    """
    tables = []
    for side, n in (("user", train.shape[0]), ("item", train.shape[1])):
        # Drawn even where init has this table, so that one seed always draws the same tables.
        table = nn.init.xavier_uniform_(torch.empty(n, dim))
        if init and side in init:
            table = torch.from_numpy(np.asarray(init[side], np.float32))
        if scale != "asis":
            # Xavier-uniform entries have the variance 2 / (n + dim).
            rms = (2 / (n + dim)) ** 0.5 if scale == "xavier" else scale
            table = table * (rms / table.square().mean().sqrt().clamp(min=1e-12))
        tables.append(table)
    return tables


# --- Training -----------------------------------------------------------------------------

class Training(NamedTuple):
    """What an epoch needs; all of it on the model's device."""
    model: LightGCN
    optimizer: torch.optim.Optimizer
    pair_user: torch.Tensor                 # int64 [nnz]: the training interactions
    pair_item: torch.Tensor                 # int64 [nnz]
    sample_negatives: ops.NegativeSampler


def start_training(parts, init, args, seed, device):
    """The Training before epoch 1, with the tables that initial_tables returns."""
    torch.manual_seed(seed)
    user, item = initial_tables(init, parts.train, args.dim, args.scale)
    model = LightGCN(parts.train, user.to(device), item.to(device), args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    pairs = parts.train.tocoo()
    pair_user = torch.from_numpy(pairs.row).to(device).long()
    pair_item = torch.from_numpy(pairs.col).to(device).long()
    # While training, a new item is not there yet, so it must not be anybody's negative.
    sample_negatives = ops.NegativeSampler(parts.train, device, parts.known_items())
    return Training(model, optimizer, pair_user, pair_item, sample_negatives)


def train_epoch(training, epoch, args):
    """Trains one pass over the training interactions, in random order. Returns the mean loss.

    InputError, which names the epoch, where the loss is not finite.
    """
    model, optimizer, pair_user, pair_item, sample_negatives = training
    device, share = model.E0.device, run.my_share()
    loss_sum = torch.zeros((), device=device)
    # The last batch may be smaller; it is not dropped.
    for indices in torch.randperm(len(pair_user), device=device).split(args.batch):
        users, pos_items = pair_user[indices], pair_item[indices]                          # [B]
        candidates = sample_negatives(users, args.candidates)                           # [B, M]
        mix = torch.rand(args.layers + 1, len(indices), device=device)                # [L+1, B]
        # Items' rows of E0 come after the users'.
        pos_items, candidates = pos_items + model.n_users, candidates + model.n_users
        loss = mixgcf_loss(model, users[share], pos_items[share], candidates[share],
                           mix[:, share], args.l2)
        loss = loss / len(indices)
        optimizer.zero_grad()
        loss.backward()
        run.sum_gradients(model)
        optimizer.step()
        loss_sum += run.all_sum(loss.detach()) * len(indices)
    mean_loss = loss_sum.item() / len(pair_user)
    if not np.isfinite(mean_loss):
        raise run.InputError(f"the loss is not finite at epoch {epoch}; "
                             f"lower --lr (now {args.lr}) or --scale")
    return mean_loss


def finetune(parts, init, args, seed, device="cpu", checkpoint=None):
    """Trains LightGCN with MixGCF. Returns (user, item, result, ranks) of the best epoch.

    ranks: where each test interaction is ranked (metrics.truth_ranks).

    Validation chooses the best epoch; without validation it is the last of args.epochs. Epoch 0
    is LightGCN over the tables as given; it is evaluated too and can win.
    """
    started = time.time()
    checkpoint = checkpoint or checkpoints.Checkpoint()
    train, has_valid = parts.train, parts.valid.nnz > 0
    training = start_training(parts, init, args, seed, device)
    model, optimizer = training.model, training.optimizer

    progress = checkpoint.restore(model, optimizer) or {
        "epoch": -1, "history": [], "best": None, "seconds": 0.0}
    started -= progress["seconds"]  # of the run that was interrupted
    with checkpoint.loop(progress, args.epochs, f"fine-tuning, seed {seed}", 0) as epochs:
        for epoch in epochs:
            values = [point["recall@20"] for point in progress["history"]]
            if out_of_patience(values, args.patience):
                break
            mean_loss = train_epoch(training, epoch, args) if epoch > 0 else None
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                tables = model.embed()
                if not has_valid:
                    value = epoch  # so that the last epoch is the best
                else:
                    value = metrics.evaluate(*tables, train, parts.valid, (20,))["recall@20"]
                # The epoch is chosen on validation. Test is ranked once, at the very end.
                if progress["best"] is None or value > progress["best"]["value"]:
                    progress["best"] = {"epoch": epoch, "value": value, "tables": tables}
                if has_valid:
                    progress["history"].append({"epoch": epoch, "recall@20": value,
                                                "loss": mean_loss})
                    # Shown only after it is kept, because Ctrl-C may come right afterwards.
                    epochs.set_postfix({"loss": mean_loss, "valid recall@20": f"{value:.4f}"})
            progress["epoch"], progress["seconds"] = epoch, time.time() - started
            checkpoint.update(model, optimizer, progress)

    best = progress["best"]
    user, item = best["tables"]
    user, item = user.to(device), item.to(device)  # tables from a checkpoint are on the CPU
    if not torch.isfinite(user.square().sum() + item.square().sum()):
        raise run.InputError(f"the tables are not finite at epoch {best['epoch']}; "
                             f"lower --lr (now {args.lr}) or --scale")
    valid = metrics.evaluate(user, item, train, parts.valid, KS) if has_valid else {}
    test, ranks = rank_test(user, item, parts)
    result = {"seed": seed, "epoch": best["epoch"], "epochs_run": progress["epoch"],
              "seconds": round(time.time() - started, 1),
              "interrupted": progress["interrupted"], "valid": valid, "test": test,
              "history": progress["history"]}
    return user, item, result, ranks


def rank_test(user, item, parts):
    """(test metrics, where each test interaction is ranked: int64 [parts.test.nnz])."""
    # A user's validation items are no candidates either: at test time they are known.
    seen, truth = train_and_valid(parts), parts.test
    # Where there are new items, only these are candidates.
    if parts.new_items is not None:
        item = item[torch.from_numpy(parts.new_items).to(item.device)]
        seen, truth = seen[:, parts.new_items], truth[:, parts.new_items]
    ranks = metrics.truth_ranks(user, item, seen, truth, max(KS))
    return metrics.means(ranks, truth, KS), ranks


def popularity(train):
    """(user [n_users, 1], item [n_items, 1]); a score is the item's interaction count in train."""
    count = torch.from_numpy(np.asarray(train.sum(0), np.float32).ravel())
    return torch.ones(train.shape[0], 1), count[:, None]


def train_and_valid(parts):
    return parts.train + parts.valid


def out_of_patience(values, patience):
    """Whether the last `patience` validations brought no new best. values: of all validations.

    Values before the lowest of the first `patience` ones do not count: a pre-trained start first
    falls, then rises above where it began, and would be stopped on its way up. From a random start
    the first value is the lowest, so all count, as in MixGCF (where an equal value is a new best
    too). Example: patience 2 and values .10 .05 .04 .06 .05 .05. They count from the first .05 on;
    the best is .06, and two values without a new best follow it: True.
    """
    if not values:
        return False
    lowest = int(np.argmin(values[:patience]))
    best = lowest + int(np.argmax(values[lowest:]))
    return len(values) - 1 - best >= patience


# --- What is written and printed ----------------------------------------------------------

def recommend(path, user, item, dataset, parts, top=20, all_seen=False):
    """recs.csv: each user's `top` best items with ranks and scores.

    A user's candidates are, as in the test, all items but those in training and validation.
    Unlike in the test, --new-items does not limit them to new items. all_seen, for real use:
    items in test are left out too. (What --keep or --new-items has dropped is not known.)
    """
    seen = train_and_valid(parts)
    if all_seen:
        seen = seen + parts.test
    n_untrained = int(np.sum(np.diff(parts.train.indptr) == 0))
    if n_untrained:
        print(f"{path}: {n_untrained:,} users have no training interaction; their lists are "
              "no better than chance")

    def write(file):
        writer = csv.writer(file)
        writer.writerow(("user", "rank", "item", "score"))
        for users, scores, items in metrics.rank(user, item, seen, top):
            for u, user_scores, user_items in zip(users, scores.tolist(), items.tolist()):
                for rank, (score, i) in enumerate(zip(user_scores, user_items), 1):
                    if score > -np.inf:
                        writer.writerow((dataset.user_ids[u], rank, dataset.item_ids[i],
                                         f"{score:.6g}"))
    disk.write_file(path, write, "w")
    print(f"wrote {path}")


def write_per_user(path, ranks, dataset, parts):
    """Writes an .npz of the test, user by user and interaction by interaction.

    For each tested user, [n_tested]: user_ids, train int (how many training interactions the user
    has), recall@20 and so on float. For each test interaction: user (a row of user_ids), item_ids,
    item_train (how many training interactions the item has), rank (1 is best; 0: not among the
    first 60).
    """
    test = parts.test.sorted_indices().tocoo()
    tested, of_user = np.unique(test.row, return_inverse=True)
    degree = np.diff(parts.train.indptr)
    item_degree = np.asarray(parts.train.sum(0), np.int64).ravel()
    arrays = {"user_ids": dataset.user_ids[tested], "train": degree[tested]}
    arrays |= metrics.per_user(ranks, parts.test, KS)
    arrays |= {"user": of_user, "item_ids": dataset.item_ids[test.col],
               "item_train": item_degree[test.col], "rank": ranks}
    disk.write_file(path, lambda file: np.savez_compressed(file, **arrays))
    print(f"wrote {path}")


def summarise(results, args, data_options):
    """What --metrics writes: one seed's result, or several seeds' with their mean and std."""
    if len(args.seeds) == 1:
        return results[0]
    mean, std = {}, {}
    for name in results[0]["test"]:
        values = [result["test"][name] for result in results]
        mean[name] = float(np.mean(values))
        std[name] = float(np.std(values, ddof=1)) if len(results) > 1 else None
    return {"data": data_options["data"], "init": args.init, "scale": args.scale,
            "runs": results, "mean": mean, "std": std}


def write_metrics(args, results, data_options):
    if args.metrics:
        summary = summarise(results, args, data_options)
        disk.write_file(args.metrics, lambda file: json.dump(summary, file, indent=1), "w")
        print(f"wrote {args.metrics}")


def write_outputs(args, results, user, item, ranks, dataset, parts, data_options):
    """Writes the files asked for, after every seed; all but --metrics are of the first seed."""
    write_metrics(args, results, data_options)
    if len(results) > 1:
        return
    if args.per_user:
        write_per_user(args.per_user, ranks, dataset, parts)
    if args.out:
        meta = {"method": "LightGCN + MixGCF", "data": data_options, "init": args.init,
                "scale": args.scale, "seed": args.seeds[0]}
        data.save_embeddings(args.out, dataset, parts, user.cpu().numpy(), item.cpu().numpy(),
                             meta)
        print(f"wrote {args.out}")
    if args.recommend:
        recommend(args.recommend, user, item, dataset, parts, args.top, args.all_seen)


METRIC_NAMES = [f"{name}@{k}" for name in ("recall", "ndcg") for k in KS]


def print_row(label, values):
    print(f"{label:<28}" + "".join(f"{value:>11}" for value in values))


def print_popularity(parts, device):
    """Prints the test metrics of the most popular items: hard to beat on scarce data."""
    if parts.new_items is not None:
        return  # nobody has bought a new item in training
    user, item = popularity(parts.train)
    values, _ = rank_test(user.to(device), item.to(device), parts)
    print_row("the most popular items", [f"{values[name]:.4f}" for name in METRIC_NAMES])


def print_result(result):
    """One seed's test metrics, as a row of a table."""
    label = f"seed {result['seed']}, epoch {result['epoch']} of {result['epochs_run']}"
    print_row(label, [f"{result['test'][name]:.4f}" for name in METRIC_NAMES])


def print_spread(results):
    """Prints the rows below the seeds' own: their mean and standard deviation (n - 1)."""
    table = np.array([[result["test"][name] for name in METRIC_NAMES] for result in results])
    if len(results) > 1:
        print_row("mean", [f"{value:.4f}" for value in table.mean(0)])
        print_row("± std", [f"{value:.4f}" for value in table.std(0, ddof=1)])
    if results[0]["valid"]:
        values = [result["valid"]["recall@20"] for result in results]
        print(f"validation Recall@20, to choose by: {np.mean(values):.4f}"
              + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""))
    if any(training_brought_nothing(result) for result in results):
        print("epoch 0: on validation no training was better than LightGCN over the tables as "
              "given; try a lower --lr")


def training_brought_nothing(result):
    """Whether epoch 0 stayed the best on validation. False for a Recall of 1: it cannot rise."""
    if result["epoch"] > 0 or result["epochs_run"] == 0 or not result["valid"]:
        return False
    return result["valid"]["recall@20"] < 1


# --- The command line ---------------------------------------------------------------------

def read_init(args):
    """(the arrays of --init, the options of their data), or (None, None) for a random start.

    Sets args.dim to the width of the tables.
    """
    if args.init == "random":
        args.dim = args.dim or 64
        return None, None
    arrays = data.load_embeddings(args.init)
    width = arrays["item"].shape[1]
    if args.dim not in (None, width):
        raise run.InputError(f"{args.init}: its tables are {width} wide, not --dim {args.dim}; "
                             "leave --dim out")
    args.dim = width
    if arrays["meta"].get("report", {}).get("interrupted"):
        print(f"{args.init}: of a pre-training that was interrupted")
    return arrays, arrays["meta"].get("data")


def check_same_split(path, arrays, dataset, parts):
    """InputError where the embeddings were made from other training interactions than these."""
    same = (arrays["fingerprint"] == parts.fingerprint
            and np.array_equal(arrays["item_ids"], dataset.item_ids)
            and np.array_equal(arrays["user_ids"], dataset.user_ids))
    if not same:
        made = ", ".join(f"{k} {v}" for k, v in arrays["meta"].get("data", {}).items())
        raise run.InputError(
            f"{path}: made from other training interactions ({made}); leave the options of the "
            "data out, they are read from it; or, where the data has changed since, pre-train "
            "again")


def scale(text):
    """argparse type: asis, xavier or a positive number."""
    if text in ("asis", "xavier"):
        return text
    value = float(text)
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError("asis, xavier, or an RMS above 0")
    return value


def arguments():
    parser = run.parser(
        "Train LightGCN with MixGCF from any initialiser; print the test metrics.")
    add = parser.add_argument
    add("--init", default="random", help="random, or an emb.npz")
    add("--scale", type=scale, help="RMS of the initial tables: asis, xavier, or a number")
    add("--seeds", type=run.non_negative, nargs="+", default=[0], help="one run each")
    add("--metrics", help="write the results here, as JSON")
    add("--per-user", metavar="NPZ", help="write each user's test metrics here (first seed)")
    add("--out", help="write the final embeddings here, as an emb.npz (of the first seed)")
    add("--recommend", metavar="CSV", help="write each user's best items here (first seed)")
    add("--top", type=run.positive, default=20, help="how many items a user is recommended")
    add("--all-seen", action="store_true",
        help="recommend no item that the user has in training, validation or test")
    add("--dim", type=run.positive, help="width of a random start (default: 64)")
    add("--layers", type=run.non_negative, help="LightGCN layers")
    add("--candidates", type=run.positive, help="negatives drawn for each positive, MixGCF's M")
    add("--lr", type=float, help="Adam's learning rate")
    add("--l2", type=float, help="weight of the layer-0 penalty")
    add("--batch", type=run.positive, help="interactions in a step")
    add("--epochs", type=run.non_negative, help="at most")
    add("--eval-every", type=run.positive, help="epochs between two validations")
    add("--patience", type=run.positive, help="validations in a row without a new best")
    add("--device", type=run.device_name, default="auto", help="auto, cpu or cuda")
    parser.set_defaults(**DEFAULTS)
    checkpoints.add_checkpoint_arguments(parser)
    data.add_data_arguments(parser)
    return parser


def check_arguments(args):
    if not (0 < args.lr < np.inf and 0 <= args.l2 < np.inf):
        raise run.InputError("--lr must be above 0, --l2 at least 0, both finite")
    if len(set(args.seeds)) < len(args.seeds):
        raise run.InputError("--seeds names a seed twice")
    disk.check_outputs(outputs(args), [args.init])


def outputs(args):
    return [args.metrics, args.out, args.recommend, args.per_user]


def check_resumed_outputs(args, results):
    """InputError where a file is asked for that only an already finished seed could write."""
    for path in (args.out, args.recommend, args.per_user):
        if results and path and not os.path.exists(path):
            raise run.InputError(
                f"{path}: belongs to seed {args.seeds[0]}, which was finished without it; leave "
                "it out, or leave --resume out to start anew")


def open_init_and_data(args):
    """(the arrays of --init or None, dataset, parts, data options).

    InputError where an output would be written over what is read here.
    """
    arrays, data_options = read_init(args)
    with run.main_process_first():
        dataset, parts, data_options = data.open_data(args, data_options, contents=False)
        disk.check_outputs(outputs(args), folder=dataset.folder)
    if arrays is not None:
        check_same_split(args.init, arrays, dataset, parts)
    return arrays, dataset, parts, data_options


def open_checkpoint(name, args, parts, arrays, **more_options):
    """The Checkpoint <name>.<digest>.ckpt of a fine-tuning that starts from the arrays of --init.

    more_options: what tells two runs apart, beside the options that say how to train.
    """
    tables = [arrays[side] for side in ("user", "item") if arrays and side in arrays]
    # Without the path of --init, because run_id takes the tables themselves.
    options = data.training_options(args, "init") | more_options
    path = f"{name}.{checkpoints.run_id(options, parts, tables)}.ckpt"
    return checkpoints.Checkpoint(path, args.resume, args.checkpoint_every)


def finetune_and_save(args):
    arrays, dataset, parts, data_options = open_init_and_data(args)
    n_ranked = dataset.n_items if parts.new_items is None else len(parts.new_items)
    if n_ranked <= max(KS):
        print(f"only {n_ranked} items are ranked, so Recall@{max(KS)} is 1 whatever the model; "
              "these metrics are made for more")

    with open_checkpoint("finetune", args, parts, arrays) as checkpoint:
        results = list(checkpoint.results)
        check_resumed_outputs(args, results)
        print_row(f"test, init {args.init}", METRIC_NAMES)
        print_popularity(parts, args.device)
        for result in results:
            print_result(result)
        if results and run.is_main_process():
            write_metrics(args, results, data_options)  # --metrics may name a new file now
        for seed in args.seeds[len(results):]:
            user, item, result, ranks = finetune(parts, arrays, args, seed, args.device,
                                                 checkpoint)
            result = {"data": data_options["data"], "init": args.init, "scale": args.scale,
                      **result}
            results.append(result)
            # Printed before writing, so that a full disk does not lose the numbers too.
            print_result(result)
            if run.is_main_process():
                with checkpoint.kept_if_writing_fails():
                    write_outputs(args, results, user, item, ranks, dataset, parts,
                                  data_options)
            if result["interrupted"]:
                break
            checkpoint.finish(result)
    print_spread(results)
    last = results[-1]
    if last["interrupted"]:
        run.wait_for_all()
        raise run.InputError(
            f"interrupted in seed {last['seed']} at epoch {last['epochs_run']}; its best epoch so "
            f"far, {last['epoch']}, was tested; {checkpoint.remedy()}")
    checkpoint.remove()
    flags = data.data_flags(data_options)
    if args.init == "random":
        print(f"next: python mmcpr.py{flags} && python finetune.py --init emb.npz")
    else:
        print(f"next, to compare with: python finetune.py --init random{flags}")


def main(argv=None):
    args = arguments().parse_args(argv)
    check_arguments(args)
    with run.processes(args.device):
        finetune_and_save(args)


if __name__ == "__main__":
    sys.exit(run.cli(main))
