"""All-ranking Recall@k and NDCG@k, vectorised over users, on CPU or GPU.

Every item that `seen` does not hold for a user is a candidate. Users are ranked in chunks: memory does not depend on
how many there are.

    evaluate(user, item, seen=train, truth=valid, ks=(20,))     -> {"recall@20": 0.18, "ndcg@20": 0.09}
"""
import numpy as np
import torch
import torch.distributed as dist

CHUNK_SCORES = 1 << 23  # scores held at a time: 32 MB in float32


def share():
    """The slice of the work that this process takes: all of it, or under torchrun every k-th row from its rank on."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(0, None, 1)


def all_sum(x):
    """The tensor x, summed in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def entries(matrix, rows):
    """The entries of `rows` of a scipy CSR matrix: (position in `rows`, column), two int64 arrays."""
    block = matrix[rows]
    return np.repeat(np.arange(len(rows)), np.diff(block.indptr)), block.indices.astype(np.int64)


def rank(user, item, seen, k, rows=None):
    """Yields (rows [c], scores [c, k], items [c, k]): each user's k best unseen items, best first.

    user [n_users, d] and item [n_items, d] are tensors on one device; seen is a scipy CSR matrix [n_users, n_items];
    rows are the users to rank (default: all). A user with fewer than k candidates gets scores of -inf in the tail.
    """
    rows = np.arange(len(user)) if rows is None else rows
    k, chunk = min(k, len(item)), max(1, CHUNK_SCORES // len(item))
    for part in (rows[start:start + chunk] for start in range(0, len(rows), chunk)):
        scores = user[torch.from_numpy(part).to(user.device)] @ item.T                 # [c, n_items]
        at, column = (torch.from_numpy(x).to(user.device) for x in entries(seen, part))
        scores[at, column] = -torch.inf
        yield part, *torch.topk(scores, k)                                            # [c, k]


def evaluate(user, item, seen, truth, ks=(20, 40, 60)):
    """Recall@k and NDCG@k, means over the users that have at least one item in `truth`; the others are not ranked.

    recall@k = hits / |truth_u|;  ndcg@k = (sum over hits of 1/log2(position + 1)) / (the same for an ideal ranking, whose
    first min(k, |truth_u|) positions are hits). truth is a scipy CSR matrix that shares no entry with seen. Several
    processes rank a share of the users each and get the same means.
    """
    n_items, device = truth.shape[1], user.device
    size = np.diff(truth.indptr)
    rows = np.flatnonzero(size)
    if not len(rows):
        raise ValueError("no user has an item to be ranked for")
    at, column = entries(truth, np.arange(truth.shape[0]))
    keys = torch.from_numpy(np.sort(at * n_items + column)).to(device)
    top = max(ks)
    discount = 1 / torch.log2(torch.arange(2, top + 2, dtype=torch.float64, device=device))  # [top]
    ideal = discount.cumsum(0)
    names = [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")]
    total = torch.zeros(len(names), dtype=torch.float64, device=device)
    for part, _, ranked in rank(user, item, seen, top, rows[share()]):
        query = torch.from_numpy(part).to(device)[:, None] * n_items + ranked           # [c, top]
        found = torch.searchsorted(keys, query).clamp_(max=len(keys) - 1)
        hit = (keys[found] == query).double()
        n = torch.from_numpy(size[part]).to(device)
        gain = hit * discount[:hit.shape[1]]
        total += torch.stack([(found / best).sum() for k in ks for found, best in
                              ((hit[:, :k].sum(1), n), (gain[:, :k].sum(1), ideal[n.clamp(max=k) - 1]))])
    return dict(zip(names, (all_sum(total) / len(rows)).tolist()))
