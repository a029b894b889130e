"""What a pre-training tells about itself: measures of its loss and tables, and the printed lines.

Nothing here changes a weight. One function acts on training: patience starts when
beats_popularity says so. What the lines mean is told in paper/results/README.md. Notation as in
mmcpr.py; a model is an mmcpr.MMCPR.

    popularity_loss         the loss of a model that knows only how popular items are
    beats_popularity        whether a loss is clearly below it
    modality_states         attention, cut and variance of each modality; is_dead judges them
    alignment               how well a text finds the image of its item
    table_sizes             the root mean square of the tables' entries
    shared_ranking          how far all users get one and the same ranking
    popularity_correlation  how much that ranking is popularity's
    print_graphs            at the start of pre-training
    print_report            at its end
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import xlogy

CLEARLY_BELOW = 0.98  # a loss is clearly below another one where it is below this share of it

DEAD = 1e-3  # a modality counts as dead where its mean attention or its variance is below this


# --- Measures -----------------------------------------------------------------------------

def popularity_loss(R):
    """L2 per positive of the best score that knows only how popular items are.

    That score gives item i the probability p_i = deg(i) / n_users for every user. Its loss is
    -n_users sum_i (p_i log p_i + (1 - p_i) log(1 - p_i)), divided by the number of positives.
    """
    n_users = R.shape[0]
    p = np.asarray(R.sum(0), np.float64).ravel() / n_users
    return float(-(xlogy(p, p) + xlogy(1 - p, 1 - p)).sum() * n_users / R.nnz)


def beats_popularity(loss, popularity):
    """Whether L2 per positive is clearly below popularity_loss."""
    return loss < CLEARLY_BELOW * popularity


def modality_states(model):
    """{side: {modality: tower_state's entry}}."""
    return {"user": tower_state(model.user_tower), "item": tower_state(model.item_tower)}


@torch.no_grad()
def tower_state(tower):
    """{modality: {"attention", "cut", "variance"}}, over the nodes that have the modality.

    attention: the mean alpha; cut: the share of logits a . e'^m that the ReLU makes 0;
    variance: the mean squared distance of e'^m from its mean. A variance of 0 means
    that the modality says the same of every node.
    """
    if not tower.modalities:
        return {}
    _, alpha, projected = tower(slice(None))                                # [n, M], [n, M, d]
    state = {}
    for m, name in enumerate(tower.modalities):
        has_it = tower.present[:, m]
        if has_it.any():
            x = projected[has_it, m]                                                    # [k, d]
            is_cut = x @ tower.a <= 0
            state[name] = {"attention": alpha[has_it, m].mean().item(),
                           "cut": is_cut.double().mean().item(),
                           "variance": x.double().var(0, correction=0).sum().item()}
    return state


def is_dead(state):
    """Whether a modality says next to nothing; state: its entry in tower_state."""
    return min(state["attention"], state["variance"]) < DEAD


@torch.no_grad()
def alignment(model, items):
    """How well a text finds its image among `items`: R@10, mean cosine of true and false pairs.

    items: int64, of model.items_with_pair(): modalities 0 and 1 are text and image. Fewer than two
    items: {}.
    """
    n = len(items)
    if n < 2:
        return {}
    _, _, projected = model.item_tower(items)
    text, image = F.normalize(projected[:, 0], dim=1), F.normalize(projected[:, 1], dim=1)
    cosine_true = (text * image).sum(1)
    n_before, chunk = [], 1024
    for start in range(0, n, chunk):
        s = text[start:start + chunk] @ image.T                                         # [c, n]
        # Row 0 of s is text number `start`, and its own image is in column `start`.
        true_score = s.diagonal(start)[:, None]
        # Ties count against the true pair: vectors that are all equal must not count as found.
        n_before.append((s >= true_score).sum(1) - 1)
    found = (torch.cat(n_before) < 10).double().mean().item()
    # sum_pq text_p . image_q = (sum_p text_p) . (sum_q image_q)
    all_pairs = text.double().sum(0) @ image.double().sum(0)
    cosine_false = (all_pairs - cosine_true.double().sum()) / (n * (n - 1))
    return {"text_to_image_recall@10": found, "cosine_true": cosine_true.mean().item(),
            "cosine_false": cosine_false.item(), "pairs": n}


def rms(table):
    return table.square().mean().sqrt().item()


def table_sizes(user, item):
    """The root mean square of the entries of each table and of both, {name: float}."""
    return {"user": rms(user), "item": rms(item), "all": rms(torch.cat([user, item]))}


def mean_scores(user, item):
    """Each item's score, mean over the users: the ranking that all share; float64 [n_items]."""
    return item.double() @ user.double().mean(0)


def shared_ranking(user, item):
    """The share of the scores' variance that is between items: 1 if all users rank alike.

    user [n_users, d], item [n_items, d]. The scores user @ item.T are not written out: their sum
    of squares is that of the entries of (user^T user) * (item^T item).
    """
    item_means = mean_scores(user, item)                                            # [n_items]
    user, item = user.double(), item.double()
    second_moment = ((user.T @ user) * (item.T @ item)).sum() / (len(user) * len(item))
    variance = second_moment - item_means.mean().square()
    if variance <= 0:  # all scores are the same
        return 1.0
    return (item_means.var(correction=0) / variance).item()


def popularity_correlation(user, item, train):
    """How much the ranking that all users share is popularity's: Spearman's rank correlation.

    Of the items' mean scores with their numbers of training interactions, over the items that have
    any. train: CSR [n_users, n_items]. 0 where all the means, or all the numbers, are the same.
    """
    item_means = mean_scores(user, item).cpu().numpy()                              # [n_items]
    count = np.asarray(train.sum(0)).ravel()
    is_bought = count > 0
    if np.ptp(item_means[is_bought]) == 0 or np.ptp(count[is_bought]) == 0:
        return 0.0
    # scipy.stats has this too, but takes half a second to load.
    return float(np.corrcoef(ranks(item_means[is_bought]), ranks(count[is_bought]))[0, 1])


def ranks(x):
    """The place of each entry in ascending order, x [n]; equal entries share their mean place."""
    _, group, n_equal = np.unique(x, return_inverse=True, return_counts=True)
    last_place = np.cumsum(n_equal)
    return (last_place - (n_equal - 1) / 2)[group]


# --- What is printed ----------------------------------------------------------------------

def print_graphs(model):
    for side, tower in (("user", model.user_tower), ("item", model.item_tower)):
        if tower.graph is None:
            continue
        how = "written out"
        if tower.graph.A is None:
            how = f"not written out: a product reads {tower.graph.n_read:,} instead"
        print(f"{side} graph: {tower.graph.n_edges:,} entries, {how}")


def print_report(report):
    """The numbers at the end of pre-training."""
    popularity = report["popularity_loss"]
    losses = {}
    for name, loss in report["losses"].items():
        losses[name] = f"{loss:.4f}" if loss else "left out"
    print(f"epoch {report['epoch']} of {report['epochs_run']} in {report['seconds']:.0f} s: "
          f"CIMA (L1/N) {losses['cima']}, BCE (L2 per positive) {losses['bce']} "
          f"(popularity alone: {popularity:.4f})")
    if not (beats_popularity(report["losses"]["bce"], popularity) or report["interrupted"]):
        print("that is hardly better than popularity alone, or worse: "
              "try more --epochs, --weight-decay 0 or another --lr")
    for side, modalities in report["modalities"].items():
        print_modalities(side, modalities)
    pairs = report["alignment"]
    if "pairs" in pairs:
        kind = "held-out" if pairs["held_out"] else "training"
        if not report["losses"]["cima"]:
            kind = "untrained"
        print(f"text to image: R@10 {pairs['text_to_image_recall@10']:.3f} among "
              f"{pairs['pairs']:,} {kind} pairs; mean cosine of true pairs "
              f"{pairs['cosine_true']:.3f}, of false pairs {pairs['cosine_false']:.3f}")
    recall = report["valid"]["recall@20"]
    if recall is not None:
        print(f"validation Recall@20 of the tables themselves {recall:.4f}")
    entries = ", ".join(f"{table} {value:.3f}" for table, value in report["rms"].items())
    print(f"RMS of the entries: {entries}")
    print(f"of the scores' variance {report['shared_ranking']:.2f} is one ranking for all users; "
          f"its rank correlation with popularity: {report['popularity_correlation']:.2f}")


def print_modalities(side, modalities):
    """Prints one line about a side's modalities, and one more for each dead modality."""
    if not modalities:
        print(f"{side}s have no modality: each has a row of its own")
        return
    texts = []
    for name, state in modalities.items():
        texts.append(f"{name} {state['attention']:.3f} (cut {state['cut']:.2f}, "
                     f"varies {state['variance']:.2g})")
    print(f"mean attention where present, {side}s: {', '.join(texts)}")
    for name, state in modalities.items():
        if is_dead(state):
            print(f"{name} is dead among the {side}s: its attention or its variance is below "
                  f"{DEAD:g}; try a lower --weight-decay, or leave it out by --modalities")
