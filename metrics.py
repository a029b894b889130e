"""All-ranking Recall@k and NDCG@k (Section 4.1.2), on CPU or GPU.

A user's candidates are all items except those that `seen` holds for this user.

    evaluate(user, item, seen=train, truth=valid, ks=(20,))
    -> {"recall@20": 0.18, "ndcg@20": 0.09}
"""
import numpy as np
import torch

import run

# How many scores are held at a time: 32 MB of them on a CPU, 256 MB on a GPU. There should be few
# chunks on a GPU, because it waits for the host at each one.
CHUNK_SCORES = 1 << 23
CHUNK_SCORES_GPU = 1 << 26


def rank(user, item, seen, k, users=None):
    """Yields (users [c], scores [c, k], items [c, k]): the k best unseen items, best first.

    user [n_users, d], item [n_items, d]: tensors on one device; seen: CSR [n_users, n_items];
    users: the users to rank for (default: all). With fewer than k candidates, a user's last
    scores are -inf.
    """
    # int64, also on Windows, because truth_ranks computes keys u n_items + i from the users.
    users = np.arange(len(user), dtype=np.int64) if users is None else users.astype(np.int64)
    k = min(k, len(item))
    chunk_scores = CHUNK_SCORES_GPU if user.is_cuda else CHUNK_SCORES
    chunk_users = max(1, chunk_scores // len(item))
    for start in range(0, len(users), chunk_users):
        chunk = users[start:start + chunk_users]
        scores = user[torch.from_numpy(chunk).to(user.device)] @ item.T           # [c, n_items]
        interacted = seen[chunk].tocoo()
        rows = torch.from_numpy(interacted.row).to(user.device).long()
        cols = torch.from_numpy(interacted.col).to(user.device).long()
        scores[rows, cols] = -torch.inf
        best_scores, best_items = torch.topk(scores, k)                                # [c, k]
        yield chunk, best_scores, best_items


def evaluate_plain(user, item, seen, truth, k, users):
    """Recall@k and NDCG@k user by user: score, sort, leave out what was seen, count hits."""
    recalls, ndcgs = [], []
    for u in users:
        relevant = set(truth[[u]].indices.tolist())
        interacted = set(seen[[u]].indices.tolist())
        order = (user[u] @ item.T).argsort(descending=True).tolist()
        ranked = [i for i in order if i not in interacted][:k]
        dcg = sum(1 / np.log2(place + 2) for place, i in enumerate(ranked) if i in relevant)
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(relevant))))
        recalls.append(len(relevant.intersection(ranked)) / len(relevant))
        ndcgs.append(dcg / ideal)
    return {f"recall@{k}": float(np.mean(recalls)), f"ndcg@{k}": float(np.mean(ndcgs))}


def evaluate(user, item, seen, truth, ks=(20, 40, 60)):
    """The same, vectorised: means over the users that have at least one item in `truth`.

    truth: CSR [n_users, n_items] that shares no entry with seen.
    """
    return means(truth_ranks(user, item, seen, truth, max(ks)), truth, ks)


def means(ranks, truth, ks):
    """{"recall@20": float, ...}: the means over users of what per_user returns."""
    return {name: float(of_users.mean()) for name, of_users in per_user(ranks, truth, ks).items()}


def truth_ranks(user, item, seen, truth, top):
    """The rank of each entry of truth in its user's list: int64 [nnz], 1 is best.

    0 means: not among the first `top`. The ranks are in the order of truth's entries: by row, then
    by column. With several processes each ranks a share of the users, and all return all ranks.
    """
    n_items, device = truth.shape[1], user.device
    users = np.flatnonzero(np.diff(truth.indptr))
    if not len(users):
        raise ValueError("no user has an item to be ranked for")
    # A ranked item is in truth if its key u n_items + i is among the sorted keys of truth.
    pairs = truth.sorted_indices().tocoo()
    keys = torch.from_numpy(pairs.row.astype(np.int64) * n_items + pairs.col).to(device)
    ranks = torch.zeros(len(keys), dtype=torch.int64, device=device)
    for chunk, _, ranked in rank(user, item, seen, top, users[run.my_share()]):
        ranked_keys = torch.from_numpy(chunk).to(device)[:, None] * n_items + ranked  # [c, top]
        entry = torch.searchsorted(keys, ranked_keys).clamp_(max=len(keys) - 1)
        is_hit = keys[entry] == ranked_keys
        row, place = is_hit.nonzero(as_tuple=True)
        ranks[entry[row, place]] = place + 1
    return run.all_sum(ranks).cpu().numpy()


def per_user(ranks, truth, ks):
    """{"recall@20": float64 [users with an item in truth], ...} from the ranks of truth_ranks.

    recall@k = hits / |truth_u|; ndcg@k = DCG / the DCG of an ideal ranking, whose first
    min(k, |truth_u|) positions are hits.
    """
    n_relevant = np.diff(truth.indptr)
    n_relevant = n_relevant[n_relevant > 0]                                         # [n_tested]
    # `ranks` has one user's entries after the other's. A user's begin at `start`, and reduceat
    # sums from each start to the next.
    start = np.cumsum(n_relevant) - n_relevant                                      # [n_tested]
    position = np.arange(1, max(ks) + 1, dtype=np.int64)
    discount = 1 / np.log2(position + 1)
    ideal_dcg = np.cumsum(discount)
    values = {}
    for k in ks:
        is_hit = (ranks > 0) & (ranks <= k)
        # An entry that is no hit gains 0, but its rank must be a valid index all the same.
        gain = np.where(is_hit, discount[np.clip(ranks, 1, k) - 1], 0)
        values[f"recall@{k}"] = np.add.reduceat(is_hit, start, dtype=np.float64) / n_relevant
        dcg = np.add.reduceat(gain, start)
        values[f"ndcg@{k}"] = dcg / ideal_dcg[np.minimum(n_relevant, k) - 1]
    return values
