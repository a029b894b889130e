"""MMCPR: multi-modal contrastive pre-training for recommendation (Liu et al., ICMR 2022).

    python mmcpr.py                                     on the built-in demo data, writes emb.npz
    python mmcpr.py --data vg --out vg.npz              the paper's Video Games, from raw files
    python mmcpr.py --data folder --modalities TG       your own data, any subset of R, T, V, G

Then: python finetune.py --init emb.npz

The model and its pre-training, equation by equation. The frozen text and image encoders (Eq. 3,
9, 10) are in encode.py. The fast operators are in ops.py, each under its plain definition. What is
measured and printed is in diagnostics.py.

A user has two modalities and an item has three. The code names them by the letters in quotes:

    users    e^1 reviews "R"    e^2 user graph "G"
    items    e^1 text "T"       e^2 image "V"       e^3 item graph "G"

    R        [n_users, n_items]   binary training interactions
    e^m      [n, d_m]             modality m, `encoded`: frozen features or graph encoder output
    e'^m     [n, d]               the same, `projected` into the common space
    a        [d]                  a side's attention vector
    alpha    [n, M]               attention over a node's M modalities
    e        [n, d]               the multi-modal representation, written to emb.npz

Under torchrun several processes share the work. run.my_share, n_processes, all_sum and
sum_gradients divide it and add up the results. In one process these calls change nothing.
"""
import argparse
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import data
import diagnostics
import disk
import metrics
import ops

DEFAULTS = dict(
    dim=64,              # paper: 64
    layers=2,            # paper: 2, of LightGCN on each graph
    tau=0.1,             # paper: 0.1
    lam=0.2,             # paper: usually 0.2; Figure 4: 0.4 to 0.8
    cima="softmax",      # paper: Eq. 11 as printed is undefined
    bias="global",       # paper: none; ours learns the base rate
    lr=1e-2,             # paper: usually 1e-3; ours needs fewer epochs
    weight_decay=2,      # paper: none; Adam's is this times (1 - lam) / training interactions
    batch=2048,          # paper: 2048, users and CIMA's items
    epochs=1000,         # paper: not said; the maximum
    patience=100,        # paper: not said; epochs without a better validation
    eval_every=5,        # paper: not said; epochs between validations
)

ALL = slice(None)  # all nodes; x[ALL] does not copy x, while x[arange(n)] would


# --- Graph encoder (Eq. 1, 2) -------------------------------------------------------------

def graph_encoder(e0, neighbour_mean, n_layers):
    """LightGCN on G_u or G_i: e^(l+1)_u = sum_{w in N_u} e^(l)_w / |N_u| (Eq. 1), then the
    mean over the layers 0, ..., L (Eq. 2).

    e0 [n, d]: the trained table; neighbour_mean: an ops.CoInteractionGraph. Returns [n, d].
    """
    layers = [e0]
    for _ in range(n_layers):
        layers.append(neighbour_mean(layers[-1]))
    return torch.stack(layers).mean(0)


# --- Intra-modal aggregation (Eq. 4) ------------------------------------------------------

def pool_reviews(review, users, n_users, in_train, chunk=32_768):
    """e_u^1: the mean of the encoded reviews of each user's *training* interactions (Eq. 4).

    Reviews of validation and test interactions are left out. review [n, d_m]: one row per
    interaction of the data set; a row of NaN means that there is no text and does not count.
    users int [n]: the user of each interaction; in_train bool [n]: whether it is for training.
    Returns float32 [n_users, d_m], with a row of NaN for each user without any such review.
    """
    total = np.zeros((n_users, review.shape[1]), np.float32)
    count = np.zeros(n_users, np.float32)
    train_rows = np.flatnonzero(in_train)
    # In chunks: encoded reviews are a file on disk, which may be larger than memory.
    for start in range(0, len(train_rows), chunk):
        rows = train_rows[start:start + chunk]
        block = np.asarray(review[rows], np.float32)                                  # [c, d_m]
        has_text = ~np.isnan(block[:, 0])
        author = users[rows][has_text]
        # This is np.add.at(total, author, block[has_text]), but much faster. It is a product with
        # a sparse matrix that has a 1 at each (author, review).
        review_number = np.arange(len(author), dtype=np.int64)
        ones = np.ones(len(author), np.float32)
        wrote = sp.csr_matrix((ones, (author, review_number)), (n_users, len(author)))
        total += wrote @ block[has_text]
        count += np.bincount(author, minlength=n_users)
    # A user without reviews gets a NaN row: the modality is missing, which is not the same as
    # a zero vector.
    count[count == 0] = np.nan
    return total / count[:, None]


# --- Inter-modal aggregation (Eq. 6-8 for users, 12-14 for items) -------------------------

def inter_modal_aggregation(projected, present, a):
    """e = sum_m alpha_m e'^m with alpha = softmax_m(ReLU(a . e'^m)) (Eq. 7, 8; 13, 14).

    projected [n, M, d], present bool [n, M], a [d] -> (e [n, d], alpha [n, M]). A missing
    modality gets alpha = 0; where all are missing, alpha and e are 0.
    """
    logits = F.relu(projected @ a)                                                      # [n, M]
    # A missing modality must get weight 0. The mask comes after the ReLU, which would raise it to
    # 0, and a logit of 0 has a weight, exp(0) = 1. It is the lowest number and not -inf, because a
    # softmax over -inf alone is NaN. Where all are missing the softmax is uniform, and the product
    # with `present` makes it 0.
    logits = logits.masked_fill(~present, torch.finfo(logits.dtype).min)
    alpha = torch.softmax(logits, 1) * present
    e = (alpha[:, :, None] * projected).sum(1)                                          # [n, d]
    return e, alpha


def normalise(features):
    """Prepares features for W (our addition): unit rows, centred, divided by their RMS length.

    features [n, d_m], NaN rows where a node lacks the modality -> (float32 [n, d_m], present
    bool [n]).
    """
    x = torch.from_numpy(np.array(features, np.float32))
    # A missing row becomes 0: NaN would spread to the gradient of W.
    x = F.normalize(torch.nan_to_num(x))
    # A zero row has no direction, so it counts as missing too.
    present = x.any(1)
    # Encoders' outputs lie close together, in a narrow cone. W and b could undo that, but Adam
    # would take long to find how.
    if present.any():
        x[present] -= x[present].mean(0)
        length = x[present].square().sum(1).mean().sqrt()
        x /= length.clamp(min=1e-3)  # the length is 0 where all rows are the same
    return x, present


class Tower(nn.Module):
    """One side, users or items: its modalities' encoders, projections and aggregation.

    features: {modality: float [n, d_m]}, NaN rows where a node lacks it; graph: an
    ops.CoInteractionGraph, the function x -> mean over neighbours, or None. A node that has no
    modality at all gets a row of a trained table instead, the fallback.
    """

    def __init__(self, n, features, graph, dim=DEFAULTS["dim"], n_layers=DEFAULTS["layers"]):
        super().__init__()
        self.graph, self.n_layers = graph, n_layers
        self.modalities = list(features)
        width, has_modality = {}, []                         # {m: d_m}; bool [n] of each modality
        for name, table in features.items():
            x, has_it = normalise(table)
            # A buffer goes to the GPU with the model; not persistent, it is in no checkpoint.
            self.register_buffer(f"feature_{name}", x, persistent=False)
            width[name] = x.shape[1]
            has_modality.append(has_it)
        if graph is not None:
            self.modalities.append("G")
            width["G"] = dim
            # A node without neighbours lacks the graph modality.
            has_modality.append(graph.inverse_degree[:, 0].cpu() > 0)
        # Without any modality M is 0, and every node uses the fallback.
        present = torch.empty(n, 0, dtype=torch.bool)
        if has_modality:
            present = torch.stack(has_modality, 1)
        self.register_buffer("present", present, persistent=False)                      # [n, M]
        self.W = nn.ModuleDict()             # (Eq. 6, 12): .weight [d, d_m] is W_m^T, .bias b_m
        for name in self.modalities:
            self.W[name] = nn.Linear(width[name], dim)
        for linear in self.W.values():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.e0 = xavier_table(n, dim) if graph is not None else None
        self.fallback = None if present.any(1).all() else xavier_table(n, dim)
        if self.modalities:
            # If `a` started at zeros, all logits would be 0, where the ReLU has no gradient.
            a = nn.init.xavier_uniform_(torch.empty(dim, 1))
            self.a = nn.Parameter(a[:, 0])

    def forward(self, nodes):
        """nodes int64 [b], or ALL -> (e [b, d], alpha [b, M], projected [b, M, d]).

        A side without modalities has M = 0, and None in place of projected.
        """
        present = self.present[nodes]
        if not self.modalities:
            return self.fallback[nodes], present.float(), None
        projected = []
        for name in self.modalities:
            if name == "G":
                # All nodes are encoded (Eq. 5, 9): any may be a neighbour of `nodes`.
                encoded = graph_encoder(self.e0, self.graph, self.n_layers)[nodes]      # [b, d]
            else:
                encoded = self.get_buffer(f"feature_{name}")[nodes]                   # [b, d_m]
            projected.append(self.W[name](encoded))                                 # (Eq. 6, 12)
        projected = torch.stack(projected, 1)                                        # [b, M, d]
        e, alpha = inter_modal_aggregation(projected, present, self.a)
        # For a node without any modality e is 0, from which no score could be learned.
        if self.fallback is not None:
            e = torch.where(present.any(1, keepdim=True), e, self.fallback[nodes])
        return e, alpha, projected

    @torch.no_grad()
    def embed(self):
        """e [n, d] of all nodes."""
        # Cloned, because for a side without modalities the result is the trained table itself.
        return self(ALL)[0].clone()


def xavier_table(n, dim):
    """A trained table, initialised like the graph encoder's in the paper (Section 4.1.4)."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(n, dim)))


# --- Contrastive inter-modal alignment, CIMA (Eq. 11) -------------------------------------

def cima(text, image, tau=DEFAULTS["tau"], reading=DEFAULTS["cima"]):
    """L1 / N for N items that have both a text and an image: text, image [N, d] -> scalar.

    The paper writes e^1 and e^2, but these are frozen and there would be nothing to train. So
    text and image are the projections e'^1 and e'^2. Eq. 11 as printed takes the log of a number
    that may be negative. There are two readings: "softmax" is CLIP's symmetric cross-entropy
    ("which of the N x N possible pairings actually occurred"); "bce" adds a sigmoid to the formula.
    """
    text, image = F.normalize(text, dim=1), F.normalize(image, dim=1)
    s = text @ image.T / tau                         # s_pq = cos(text_p, image_q) / tau, [N, N]
    if reading == "bce":
        C = torch.eye(len(s), device=s.device, dtype=s.dtype)
        return F.binary_cross_entropy_with_logits(s, C, reduction="sum") / len(s)
    labels = torch.arange(len(s), device=s.device)   # the image of text p is the p-th
    text_to_image = F.cross_entropy(s, labels, reduction="sum")
    # These logits are s.T. They are computed anew so that softmax runs along contiguous rows.
    image_to_text = F.cross_entropy(image @ text.T / tau, labels, reduction="sum")
    return (text_to_image + image_to_text) / (2 * len(s))


# --- The model and its joint objective (Eq. 15, 16) ---------------------------------------

class MMCPR(nn.Module):
    """Both towers, and the bias of the score, which is trained but not written to emb.npz.

    R: CSR [n_users, n_items]; features: {"R": [n_users, d_m], "T", "V": [n_items, d_m]}, any
    subset; use_graphs: whether to use modality G; bias: "global" (one trained number) or "none"
    (as in Eq. 15); known_items: int64, the items that both losses see, or None for all. One
    step's loss is `objective`, below.
    """

    def __init__(self, R, features, use_graphs=True, dim=DEFAULTS["dim"],
                 n_layers=DEFAULTS["layers"], bias=DEFAULTS["bias"], device="cpu",
                 known_items=None):
        super().__init__()
        n_users, n_items = R.shape
        self.known_items = ALL if known_items is None else torch.from_numpy(known_items).to(device)
        # Both graphs come from the training interactions alone.
        user_graph = item_graph = None
        if use_graphs:
            user_graph = ops.CoInteractionGraph(R, device)
            item_graph = ops.CoInteractionGraph(R.T.tocsr(), device)
        user_features = {"R": features["R"]} if "R" in features else {}
        item_features = {}
        for name in ("T", "V"):  # in this order, which items_with_pair relies on
            if name in features:
                item_features[name] = features[name]
        self.user_tower = Tower(n_users, user_features, user_graph, dim, n_layers)
        self.item_tower = Tower(n_items, item_features, item_graph, dim, n_layers)
        if bias == "none":
            self.register_buffer("bias", torch.zeros(1), persistent=False)
        else:
            # The bias starts at the log-odds of R's density, about -7. Without a bias e_u . e_i
            # would have to learn that constant.
            density = R.nnz / n_users / n_items
            log_odds = float(np.log(density / (1 - density)))
            self.bias = nn.Parameter(torch.full((1,), log_odds))
        self.to(device)

    def items_with_pair(self):
        """The known items that have both text and image, int64 [N]: those that CIMA aligns."""
        if self.item_tower.modalities[:2] != ["T", "V"]:  # they come before G
            return torch.empty(0, dtype=torch.int64)
        has_pair = self.item_tower.present[:, :2].all(1)                           # [n_items]
        is_known = torch.zeros_like(has_pair)
        is_known[self.known_items] = True
        return (has_pair & is_known).nonzero()[:, 0]

    def embed(self):
        """(user [n_users, d], item [n_items, d])."""
        return self.user_tower.embed(), self.item_tower.embed()


def objective(model, R, users, drawn_items, positives_per_block, lam=DEFAULTS["lam"],
              tau=DEFAULTS["tau"], reading=DEFAULTS["cima"]):
    """L = lam L1 + (1 - lam) L2 of one step (Eq. 16).

    R: CSR tensor [n_users, n_known_items]; users int64 [B]: the block of users;
    drawn_items int64 [N]: those that CIMA aligns; positives_per_block: the mean number of training
    interactions in a block of full size.

    L1 and L2 are sums. We divide both by the same constant, positives_per_block, so that lam
    weighs the two sums, as in the paper:

        loss = lam L1 / positives_per_block + (1 - lam) L2 / positives_per_block

    Returns (L1 / N, L2 / positives_per_block, loss), scalars. With several processes each
    returns its share. A term that lam gives no weight (lam 0 or 1) is not computed, and is 0.
    """
    # A block of users is scored against all known items, and CIMA needs some of them too.
    item, _, projected = model.item_tower(ALL)                 # [n_items, d], [n_items, M, d]
    l1_per_item = l2_per_positive = torch.zeros((), device=item.device)
    if lam > 0 and len(drawn_items) > 1:
        aligned = projected[drawn_items]                                             # [N, M, d]
        text, image = aligned[:, 0], aligned[:, 1]
        # Every process computes the whole term, so each adds only a share of it to the sum.
        l1_per_item = cima(text, image, tau, reading) / run.n_processes()
    if lam < 1:
        users = users[run.my_share()]
        user, _, _ = model.user_tower(users)                                            # [B, d]
        item = item[model.known_items]                                       # [n_known_items, d]
        # The bias is one number; ops.bce takes one for each item.
        bias = model.bias.expand(len(item))
        rows, cols = ops.row_entries(R, users)
        l2 = ops.bce(user, item, bias, rows, cols)                                      # (Eq. 15)
        l2_per_positive = l2 / positives_per_block
    l1 = l1_per_item * len(drawn_items)  # the sum of Eq. 11
    loss = lam * l1 / positives_per_block + (1 - lam) * l2_per_positive                 # (Eq. 16)
    return l1_per_item, l2_per_positive, loss


# --- Pre-training -------------------------------------------------------------------------

class Training(NamedTuple):
    """What pre-training works on; all tensors are on the model's device."""
    model: MMCPR
    optimizer: torch.optim.Optimizer
    R: torch.Tensor              # CSR [n_users, n_known_items]: the training interactions
    cima_items: torch.Tensor     # int64: those that each step's N items are drawn from
    heldout_items: torch.Tensor  # int64: with lam 1, held out from CIMA to choose the epoch by


def start_training(parts, features, args, device):
    """The Training before epoch 1; args.seed draws the parameters and the held-out items."""
    torch.manual_seed(args.seed)
    train, known_items = parts.train, parts.known_items()
    R = ops.sparse_tensor(train if known_items is None else train[:, known_items], device)
    model = MMCPR(train, features, "G" in args.modalities, args.dim, args.layers, args.bias,
                  device, known_items)
    diagnostics.print_graphs(model)
    cima_items, heldout_items = choose_cima_items(model, args)
    # --weight-decay is c, the precision of a Gaussian prior on every entry w: it adds c / 2 w^2 to
    # the sum of Eq. 15. On average over blocks, the loss contains (1 - lam) / nnz times that sum,
    # so the prior takes the same factor. What then stands for c is Adam's decay. (The last block
    # may be smaller, but its step has the full decay.)
    decay = args.weight_decay * (1 - args.lam) / train.nnz
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=decay, fused=True)
    return Training(model, optimizer, R, cima_items, heldout_items)


def train_epoch(training, epoch, args):
    """Trains on all users once, in blocks. Returns (L1 / N, L2 / nnz(R)), floats.

    InputError, which names the epoch, where these are not finite.
    """
    model, optimizer, R, cima_items, _ = training
    n_users, nnz, device = R.shape[0], len(R.values()), R.device
    batch = min(args.batch, n_users)
    positives_per_block = batch * nnz / n_users
    loss_sums = torch.zeros(2, device=device)      # of L1 / N and of L2 / positives_per_block
    blocks = torch.randperm(n_users, device=device).split(batch)
    for users in blocks:
        # N items, drawn anew for each step.
        drawn = torch.randperm(len(cima_items), device=device)[:args.batch]
        l1_per_item, l2_per_positive, loss = objective(
            model, R, users, cima_items[drawn], positives_per_block, args.lam, args.tau, args.cima)
        optimizer.zero_grad()
        loss.backward()
        run.sum_gradients(model)
        optimizer.step()
        loss_sums += run.all_sum(torch.stack([l1_per_item, l2_per_positive]).detach())
    # N is the same in all steps, so the mean over the steps is L1 / N.
    cima_loss = loss_sums[0].item() / len(blocks)
    # The last block may be smaller, so this is no mean over the steps: it is the sum L2 / nnz(R).
    bce_loss = loss_sums[1].item() * positives_per_block / nnz
    if not np.isfinite(cima_loss + bce_loss):
        raise run.InputError(f"the loss is not finite at epoch {epoch}; "
                             f"lower --lr (now {args.lr})")
    return cima_loss, bce_loss


def pretrain(parts, features, args, device="cpu", checkpoint=None):
    """Trains MMCPR on parts.train. Returns (user, item, report) of the best epoch.

    The best epoch has the highest Recall@20 on validation. With args.lam 1, where users are not
    trained, it has the lowest CIMA loss on held-out items. Without validation it is the last one.
    """
    started = time.time()
    checkpoint = checkpoint or checkpoints.Checkpoint()
    training = start_training(parts, features, args, device)
    model = training.model
    popularity_loss = diagnostics.popularity_loss(parts.train)

    progress = checkpoint.restore(model, training.optimizer) or {
        "epoch": 0, "history": [], "best": None, "beat_popularity_at": None, "seconds": 0.0}
    started -= progress["seconds"]  # of the run that was interrupted
    with checkpoint.loop(progress, args.epochs, "pre-training") as epochs:
        for epoch in epochs:
            if out_of_patience(progress, args.patience):
                break
            cima_loss, bce_loss = train_epoch(training, epoch, args)
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                value, measured = validate(training, parts, epoch, args)
                point = {"epoch": epoch, "cima": cima_loss, "bce": bce_loss, **measured}
                record(progress, point, value, model, popularity_loss)
                epochs.set_postfix({k: f"{v:.4f}" for k, v in point.items() if k != "epoch"})
            progress["epoch"], progress["seconds"] = epoch, time.time() - started
            checkpoint.update(model, training.optimizer, progress)

    best = progress["best"]
    model.load_state_dict(best["weights"])
    user, item = model.embed()
    if not torch.isfinite(user.square().sum() + item.square().sum()):
        raise run.InputError(f"the tables are not finite at epoch {best['epoch']}; "
                             f"lower --lr (now {args.lr})")
    report = make_report(training, parts, user, item, progress)
    report |= {"popularity_loss": popularity_loss, "interrupted": progress["interrupted"],
               "seconds": round(time.time() - started, 1)}
    return user.cpu().numpy(), item.cpu().numpy(), report


def record(progress, point, value, model, popularity_loss):
    """Adds a validation to `progress`, and the model's weights if it is the best so far."""
    progress["history"].append(point)
    # At first the model learns how popular items are, and validation stands still. Patience starts
    # when the model knows more than that. (With lam 1 the BCE is 0, so patience starts at once.)
    beats_popularity = diagnostics.beats_popularity(point["bce"], popularity_loss)
    if progress["beat_popularity_at"] is None and beats_popularity:
        progress["beat_popularity_at"] = point["epoch"]
    # The epoch is chosen on validation; test is not looked at here.
    if progress["best"] is None or value > progress["best"]["value"]:
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        progress["best"] = {"value": value, "weights": weights, **point}


def make_report(training, parts, user, item, progress):
    """The numbers of the best epoch and its tables, kept in emb.npz; print_report prints most."""
    best, model = progress["best"], training.model
    recall = best.get("recall@20")
    if recall is None and parts.valid.nnz:  # not ranked yet where CIMA alone chose the epoch
        recall = validation_recall(user, item, parts)
    is_held_out = len(training.heldout_items) > 0
    pairs = training.heldout_items if is_held_out else training.cima_items
    return {
        "epoch": best["epoch"], "epochs_run": progress["epoch"],
        "losses": {"cima": best["cima"], "bce": best["bce"]},
        "modalities": diagnostics.modality_states(model),
        "alignment": diagnostics.alignment(model, pairs) | {"held_out": is_held_out},
        "valid": {"recall@20": recall}, "rms": diagnostics.table_sizes(user, item),
        "shared_ranking": diagnostics.shared_ranking(user, item),
        "popularity_correlation": diagnostics.popularity_correlation(user, item, parts.train),
        "history": progress["history"]}


def choose_cima_items(model, args):
    """(items that CIMA trains on, items held out to choose the epoch by), int64, shuffled."""
    device = model.item_tower.present.device
    items = model.items_with_pair().to(device)
    # Shuffled, so that the held-out tenth is a random one.
    items = items[torch.randperm(len(items)).to(device)]
    if 0 < args.lam < 1 and len(items) < 2 and {"T", "V"} <= set(args.modalities):
        print("no two items have both text and image: CIMA is left out")
    n_heldout = len(items) // 10 if args.lam == 1 else 0
    if args.lam == 1 and n_heldout < 2:
        raise run.InputError(f"--lam 1 trains CIMA alone, but only {len(items)} items have both "
                             "a text and an image; 20 are needed")
    return items[n_heldout:], items[:n_heldout]


def validate(training, parts, epoch, args):
    """(the value to choose the epoch by, larger is better; a dict of what to report)."""
    model = training.model
    if args.lam == 1:
        with torch.no_grad():
            _, _, projected = model.item_tower(training.heldout_items)
            loss = cima(projected[:, 0], projected[:, 1], args.tau, args.cima).item()
        return -loss, {"held_out_cima": loss}
    if parts.valid.nnz:
        user, item = model.embed()
        recall = validation_recall(user, item, parts)
        return recall, {"recall@20": recall}
    return epoch, {}  # so that the last one is chosen


def validation_recall(user, item, parts):
    return metrics.evaluate(user, item, parts.train, parts.valid, (20,))["recall@20"]


def out_of_patience(progress, patience):
    """Whether `patience` epochs have passed since the best epoch, and as many since the first
    epoch whose loss beat popularity's. Without such an epoch: False.
    """
    if progress["beat_popularity_at"] is None:
        return False
    since = max(progress["best"]["epoch"], progress["beat_popularity_at"])
    return progress["history"][-1]["epoch"] - since >= patience


# --- The command line ---------------------------------------------------------------------

def modalities(text):
    """argparse type: a subset of RTVG, or none."""
    text = text.upper()
    if text == "NONE":
        return ""
    if not text or set(text) - set("RTVG"):
        raise argparse.ArgumentTypeError(
            "letters of R (reviews), T (text), V (image), G (graphs), or none")
    return text


def arguments():
    parser = run.parser("Pre-train MMCPR and write the embeddings to hand over.")
    add = parser.add_argument
    add("--out", default="emb.npz", help="where the embeddings go")
    add("--modalities", type=modalities, default="RTVG",
        help="any of R reviews, T text, V image, G graphs; none: Eq. 15 alone, on trained tables")
    add("--shuffle-contents", action="store_true",
        help="a control: items have each other's texts and images, users each other's reviews")
    add("--lam", type=run.fraction, help="weight of CIMA; 0 drops it, 1 drops BCE (Eq. 16)")
    add("--tau", type=float, help="CIMA's temperature")
    add("--cima", choices=("softmax", "bce"),
        help="reading of Eq. 11: CLIP's cross-entropy, or the formula with a sigmoid")
    add("--bias", choices=("none", "global"), help="added to the score of Eq. 15, not exported")
    add("--layers", type=run.non_negative, help="LightGCN layers of the graph encoder")
    add("--dim", type=run.positive, help="width d of the common space")
    add("--lr", type=float, help="Adam's learning rate")
    add("--weight-decay", type=float, help="Adam's is this times (1 - lam) / training interactions")
    add("--batch", type=run.positive, help="users in a block, items in CIMA's N x N")
    add("--epochs", type=run.positive, help="at most; one is a pass over the users")
    add("--patience", type=run.positive,
        help="epochs without a better validation, once popularity is beaten")
    add("--eval-every", type=run.positive, help="epochs between two validations")
    add("--seed", type=run.non_negative, default=0, help="of all random draws but the split's")
    add("--device", type=run.device_name, default="auto", help="auto, cpu or cuda")
    parser.set_defaults(**DEFAULTS)
    checkpoints.add_checkpoint_arguments(parser)
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    return parser


def check_arguments(args):
    are_valid = 0 < args.tau < np.inf and 0 < args.lr < np.inf and 0 <= args.weight_decay < np.inf
    if not are_valid:
        raise run.InputError(
            "--tau and --lr must be above 0, --weight-decay at least 0, all finite")
    if args.lam > 0 and args.batch < 2:
        raise run.InputError("--batch must be at least 2 for CIMA; or pass --lam 0")
    disk.check_outputs([args.out])


def pretrain_and_save(args):
    with run.main_process_first():
        dataset, parts, data_options = data.open_data(args, modalities=args.modalities)
        disk.check_outputs([args.out], [args.clip_weights], dataset.folder)
        features = data.features(dataset, args.modalities, args.encoder,
                                 Path(data_options["data_dir"]),
                                 (args.clip_model, args.clip_weights), args.device)
    if args.shuffle_contents:
        features = data.shuffled(features, args.seed)
    if "R" in features:
        features["R"] = pool_reviews(features["R"], dataset.users, dataset.n_users,
                                     parts.in_train)
    # The features are made by now, so the contents need not stay in memory.
    dataset.texts = dataset.images = dataset.reviews = None

    options = data.training_options(args)
    path = f"{args.out}.{checkpoints.run_id(options, parts, features.values())}.ckpt"
    with checkpoints.Checkpoint(path, args.resume, args.checkpoint_every) as checkpoint:
        user, item, report = pretrain(parts, features, args, args.device, checkpoint)
        versions = {"python": platform.python_version(), "numpy": np.__version__,
                    "torch": torch.__version__}
        meta = {"method": "MMCPR", "data": data_options, "options": options, "report": report,
                "versions": versions}
        # Printed before writing, so that a full disk does not lose the numbers too.
        diagnostics.print_report(report)
        if run.is_main_process():
            with checkpoint.kept_if_writing_fails():
                data.save_embeddings(args.out, dataset, parts, user, item, meta)
    if report["interrupted"]:
        run.wait_for_all()
        raise run.InputError(
            f"interrupted at epoch {report['epochs_run']}; {args.out} holds epoch "
            f"{report['epoch']}, the best so far; {checkpoint.remedy()}")
    checkpoint.remove()
    print(f"wrote {args.out}; next: python finetune.py --init {shlex.quote(args.out)}")


def main(argv=None):
    args = arguments().parse_args(argv)
    check_arguments(args)
    with run.processes(args.device):
        pretrain_and_save(args)


if __name__ == "__main__":
    sys.exit(run.cli(main))
