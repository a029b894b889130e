"""All-ranking Recall@k and NDCG@k (Section 4.1.2), on CPU or GPU.

Every item that `seen` does not hold for a user is a candidate.

    evaluate(user, item, seen=train, truth=valid, ks=(20,))
    -> {"recall@20": 0.18, "ndcg@20": 0.09}
"""
import numpy as np
import torch

import run

# Scores held at a time, however many users there are: 32 MB, on a GPU 256 MB, as every chunk costs
# it a wait for the host.
CHUNK_SCORES = 1 << 23
CHUNK_SCORES_GPU = 1 << 26


def rank(user, item, seen, k, users=None):
    """Yields (users [c], scores [c, k], items [c, k]): each user's k best unseen, best first.

    user [n_users, d], item [n_items, d]: tensors on one device; seen: CSR [n_users, n_items];
    users: whom to rank for (default: all). A user with fewer than k candidates gets scores of
    -inf in the tail.
    """
    # In 64 bits, also on Windows: evaluate makes keys u n_items + i of them.
    users = np.arange(len(user), dtype=np.int64) if users is None else np.int64(users)
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
        dcg = sum(1 / np.log2(rank + 2) for rank, i in enumerate(ranked) if i in relevant)
        ideal = sum(1 / np.log2(rank + 2) for rank in range(min(k, len(relevant))))
        recalls.append(len(relevant.intersection(ranked)) / len(relevant))
        ndcgs.append(dcg / ideal)
    return {f"recall@{k}": float(np.mean(recalls)), f"ndcg@{k}": float(np.mean(ndcgs))}


def evaluate(user, item, seen, truth, ks=(20, 40, 60)):
    """The same, vectorised: means over the users that have at least one item in `truth`.

    recall@k = hits / |truth_u|; ndcg@k = DCG / the DCG of an ideal ranking, whose first
    min(k, |truth_u|) positions are hits. truth: CSR [n_users, n_items] that shares no entry
    with seen. Several processes rank a share of the users each and get the same means.
    """
    n_items, device = truth.shape[1], user.device
    n_relevant = np.diff(truth.indptr)                                                # [n_users]
    users = np.flatnonzero(n_relevant)
    if not len(users):
        raise ValueError("no user has an item to be ranked for")
    # A ranked item is a hit where its key is among the sorted keys of the truth.
    pairs = truth.tocoo()
    keys = np.sort(pairs.row.astype(np.int64) * n_items + pairs.col)
    keys = torch.from_numpy(keys).to(device)
    top = max(ks)
    positions = torch.arange(1, top + 1, dtype=torch.float64, device=device)
    discount = 1 / torch.log2(positions + 1)                                             # [top]
    ideal_dcg = discount.cumsum(0)
    names = [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")]
    total = torch.zeros(len(names), dtype=torch.float64, device=device)
    for chunk, _, ranked in rank(user, item, seen, top, users[run.my_share()]):
        query = torch.from_numpy(chunk).to(device)[:, None] * n_items + ranked        # [c, top]
        place = torch.searchsorted(keys, query).clamp_(max=len(keys) - 1)
        hit = (keys[place] == query).double()
        gain = hit * discount[:hit.shape[1]]
        n = torch.from_numpy(n_relevant[chunk]).to(device)
        sums = []
        for k in ks:
            sums.append((hit[:, :k].sum(1) / n).sum())
            sums.append((gain[:, :k].sum(1) / ideal_dcg[n.clamp(max=k) - 1]).sum())
        total += torch.stack(sums)
    return dict(zip(names, (run.all_sum(total) / len(users)).tolist()))
