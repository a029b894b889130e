"""What makes both scripts fast: each operator right under its plain definition.

`x_plain` says what is computed, in a few lines; `x` computes the same, faster. The tests and
paper/bench.py compare exactly these pairs, values and gradients.

    sparse_product        a sparse matrix times a table of vectors
    CoInteractionGraph    the mean over co-interaction neighbours (Eq. 1), the graph unwritten
    bce                   binary cross-entropy over all entries of R (Eq. 15)
    layer_rows            rows of LightGCN's layers, with the gradient at few rows
    hard_negatives        MixGCF's hop mixing: which candidate each layer takes
    NegativeSampler       items that a user has not interacted with
"""
import warnings
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F


# --- The sparse product -------------------------------------------------------------------

def sparse_tensor(matrix, device="cpu", dtype=torch.float32):
    """A scipy CSR matrix as a torch CSR tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int32)),
            torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(matrix.data).to(dtype), matrix.shape).to(device)


def sparse_product_plain(matrix, x):
    """matrix: CSR tensor [n, m], x [m, d] -> [n, d], without gradients."""
    return matrix @ x


def sparse_product(matrix, x):
    """The same. On a CPU embedding_bag sums the same rows in a third of the time."""
    if x.is_cuda:
        return sparse_product_plain(matrix, x)
    return F.embedding_bag(
        matrix.col_indices(), x, matrix.crow_indices(), mode="sum",
        per_sample_weights=matrix.values(), include_last_offset=True)


# --- The co-interaction graph (Eq. 1) -----------------------------------------------------

def co_interaction_plain(R):
    """The adjacency A of G_u: 1 where two rows of R share a column (Sections 3.3, 3.4).

    R: binary CSR [n, m] -> CSR [n, n], without self-loops. For G_i pass R's transpose.
    """
    C = (R @ R.T).tocoo()
    edge = C.row != C.col
    ones = np.ones(edge.sum(), np.float32)
    return sp.csr_matrix((ones, (C.row[edge], C.col[edge])), C.shape)


def neighbour_mean_plain(A, x):
    """D^-1 A x: the mean of x over each row's neighbours (Eq. 1); 0 where there are none.

    A: dense [n, n], x [n, d] -> [n, d].
    """
    return A @ x / A.sum(1, keepdim=True).clamp(min=1)


class CoInteraction(NamedTuple):
    """A, or what stands for it: R and E with A x = R (R^T x) - E x.

    Written out, A has up to sum_i deg(i)^2 entries, far more than R. But C = R R^T counts
    what each two rows share, so A = C - E, where
        E_ab = C_ab - 1 where C_ab >= 2 (a != b),    E_aa = C_aa.
    Two thin products, and an E that holds only the diagonal and the pairs that share two or
    more. The form that has fewer entries is kept: R and E, or A where the data is dense.
    """
    n_neighbours: np.ndarray  # float32 [n]
    R: sp.csr_matrix | None   # float32 [n, m]
    E: sp.csr_matrix | None   # float32 [n, n]
    A: sp.csr_matrix | None   # float32 [n, n]


def build_co_interaction(R, storage="auto", block_entries=1 << 24):
    """CoInteraction of a binary CSR matrix R [n, m].

    storage: "auto" chooses by count, "A" and "RE" force one.
    """
    R = sp.csr_matrix(R, dtype=np.float32)

    def excess(off_diagonal, C):
        keep = ~off_diagonal | (C >= 2)
        return keep, np.where(off_diagonal, C - 1, C)

    def adjacency(off_diagonal, C):
        return off_diagonal, np.ones_like(C)

    E, n_neighbours = select_from_product(R, excess, block_entries)
    n_edges = n_neighbours.sum(dtype=np.float64)
    if storage == "RE" or (storage == "auto" and 2 * R.nnz + E.nnz < n_edges):
        return CoInteraction(n_neighbours, R, E, None)
    A, _ = select_from_product(R, adjacency, block_entries)
    return CoInteraction(n_neighbours, None, None, A)


def select_from_product(R, select, block_entries):
    """Entries of C = R R^T, which is never whole in memory, and each row's neighbour count.

    select(off_diagonal, C_ab) -> (bool: which entries stay, their new values), [e] each.
    Returns (CSR [n, n], float32 [n]).
    """
    n, Rt = R.shape[0], R.T.tocsr()
    # A block is as many rows as take about block_entries multiplications.
    work = np.cumsum(np.concatenate([[0], R @ np.diff(Rt.indptr)]))
    values, columns, row_sizes, n_neighbours = [], [], [], []
    start = 0
    while start < n:
        end = np.searchsorted(work, work[start] + block_entries, side="right") - 1
        end = int(min(n, max(end, start + 1)))
        C = R[start:end] @ Rt                                         # [end - start, n]
        row = np.repeat(np.arange(end - start), np.diff(C.indptr))
        off_diagonal = C.indices != row + start
        keep, value = select(off_diagonal, C.data)
        values.append(value[keep])
        columns.append(C.indices[keep])
        row_sizes.append(np.bincount(row[keep], minlength=end - start))
        n_neighbours.append(np.bincount(row[off_diagonal], minlength=end - start))
        start = end
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(row_sizes))])
    selected = sp.csr_matrix((np.concatenate(values), np.concatenate(columns), indptr), (n, n))
    selected.sort_indices()
    return selected, np.concatenate(n_neighbours).astype(np.float32)


class Propagate(torch.autograd.Function):
    """x -> D^-1 A x for a symmetric A, whose gradient is A (D^-1 g)."""

    @staticmethod
    def forward(ctx, x, adjacency, inverse_degree):
        """x [n, d]; adjacency: the function x -> A x; inverse_degree [n, 1]."""
        ctx.adjacency, ctx.inverse_degree = adjacency, inverse_degree
        return adjacency(x).mul_(inverse_degree)

    @staticmethod
    def backward(ctx, g):
        return ctx.adjacency(ctx.inverse_degree * g), None, None


class CoInteractionGraph:
    """G_u or G_i as the operator x [n, d] -> D^-1 A x [n, d], with its gradient.

    The same as neighbour_mean_plain(co_interaction_plain(R), x). For G_i pass R's transpose.
    """

    def __init__(self, R, device="cpu", dtype=torch.float32, storage="auto"):
        graph = build_co_interaction(R, storage)
        degree = torch.from_numpy(graph.n_neighbours).to(device, dtype)[:, None]       # [n, 1]
        # An isolated node gets 0 from its neighbours.
        self.inverse_degree = torch.where(degree > 0, 1 / degree, 0)
        self.n_edges = int(graph.n_neighbours.sum(dtype=np.float64))
        self.A = None
        if graph.A is not None:
            self.A = sparse_tensor(graph.A, device, dtype)
            self.n_read = graph.A.nnz
        else:
            self.R = sparse_tensor(graph.R, device, dtype)
            self.Rt = sparse_tensor(graph.R.T.tocsr(), device, dtype)
            self.E = sparse_tensor(graph.E, device, dtype)
            self.n_read = 2 * graph.R.nnz + graph.E.nnz

    def adjacency(self, x):
        """A x, without gradients."""
        if self.A is not None:
            return sparse_product(self.A, x)
        shared = sparse_product(self.R, sparse_product(self.Rt, x))                    # C x
        return shared.sub_(sparse_product(self.E, x))

    def __call__(self, x):
        return Propagate.apply(x, self.adjacency, self.inverse_degree)


# --- Binary cross-entropy over all of R (Eq. 15) ------------------------------------------

def bce_plain(user, item, bias, R):
    """-sum R log(sigma(s)) + (1 - R) log(1 - sigma(s)) with s = user . item + bias.

    user [B, d], item [n_items, d], bias [n_items]; R: binary CSR block [B, n_items].
    """
    scores = user @ item.T + bias                                                # [B, n_items]
    target = torch.from_numpy(R.toarray()).to(scores)
    return F.binary_cross_entropy_with_logits(scores, target, reduction="sum")


def bce(user, item, bias, R):
    """The same, without a [B, n_items] matrix."""
    positives = R.tocoo()
    rows = torch.from_numpy(positives.row).long().to(user.device)                       # [nnz]
    cols = torch.from_numpy(positives.col).long().to(user.device)
    return BlockBCE.apply(user, item, bias, rows, cols)


class BlockBCE(torch.autograd.Function):
    """sum softplus(s) - sum_positives s.

    Its derivative by s is sigma(s) - R, so the block is scored a chunk of items at a time and
    the gradients of all three inputs are added up in the forward pass.
    """

    @staticmethod
    def forward(ctx, user, item, bias, rows, cols, chunk_scores=1 << 21):
        """The positives are (rows, cols), int64 [nnz] each; chunk_scores fit into a cache."""
        positive = (user[rows] * item[cols]).sum() + bias[cols].sum()
        grad_user = torch.zeros_like(user).index_add_(0, rows, item[cols], alpha=-1)
        grad_item = torch.zeros_like(item).index_add_(0, cols, user[rows], alpha=-1)
        grad_bias = -torch.bincount(cols, minlength=len(item)).to(bias.dtype)
        total = torch.zeros((), dtype=torch.float64, device=user.device)
        step = max(1, chunk_scores // max(1, len(user)))
        for start in range(0, len(item), step):
            chunk = slice(start, start + step)
            s = torch.addmm(bias[chunk], user, item[chunk].T)                          # [B, c]
            p = s.sigmoid()
            # softplus(s) = max(s, 0) - log max(p, 1 - p): in a seventh of F.softplus's time
            # on a CPU, to 6e-8 a score.
            total += s.clamp_(min=0).sum() - (p - 0.5).abs_().add_(0.5).log_().sum()
            grad_user.addmm_(p, item[chunk])
            grad_item[chunk].addmm_(p.T, user)
            grad_bias[chunk] += p.sum(0)
        ctx.save_for_backward(grad_user, grad_item, grad_bias)
        return (total - positive).to(user.dtype)

    @staticmethod
    def backward(ctx, g):
        grad_user, grad_item, grad_bias = ctx.saved_tensors
        return g * grad_user, g * grad_item, g * grad_bias, None, None, None


# --- LightGCN's layers --------------------------------------------------------------------

def bipartite_adjacency(train):
    """[[0, R], [R^T, 0]]: users, then items, CSR [n_users + n_items, n_users + n_items]."""
    A = sp.block_array([[None, train], [train.T, None]], format="csr")
    A.sort_indices()
    return A


def normalised_adjacency(train):
    """D^-1/2 A D^-1/2 of the bipartite graph; rows without an edge are 0."""
    A = bipartite_adjacency(train)
    degree = np.asarray(A.sum(1)).ravel()
    root = sp.diags_array(np.where(degree > 0, degree, np.inf) ** -0.5)
    return (root @ A @ root).tocsr()


def layer_rows_plain(E0, P, n_layers, rows):
    """Rows of the layers E^(l) = P^l E0, under autograd.

    E0 [n, d], P: sparse tensor [n, n], rows int64 [L+1, r] -> [L+1, r, d].
    """
    layers = [E0]
    for _ in range(n_layers):
        layers.append(torch.sparse.mm(P, layers[-1]))
    return torch.stack([layer[row] for layer, row in zip(layers, rows)])


def layer_rows(E0, layers, rows, P):
    """The same of layers that are there already (list of [n, d]), P symmetric CSR."""
    return LayerRows.apply(E0, layers, rows, P)


class LayerRows(torch.autograd.Function):
    """The gradient of E0 is G_0 + P (G_1 + P (G_2 + ...)), G_l that of layer l's rows.

    One product a layer and one table, where autograd fills and adds a table for every layer.
    """

    @staticmethod
    def forward(ctx, E0, layers, rows, P):
        ctx.rows, ctx.P, ctx.n = rows, P, len(E0)
        return torch.stack([layer[row] for layer, row in zip(layers, rows)])

    @staticmethod
    def backward(ctx, g):
        n_layers = len(g) - 1
        G = g.new_zeros(ctx.n, g.shape[2]).index_add_(0, ctx.rows[n_layers], g[n_layers])
        for layer in reversed(range(n_layers)):
            G = sparse_product(ctx.P, G).index_add_(0, ctx.rows[layer], g[layer])
        return G, None, None, None


# --- MixGCF's hop mixing ------------------------------------------------------------------

def hard_negatives_plain(layers, users, pos_items, candidates, alpha):
    """Mixes every candidate with the positive and takes, per layer, the one nearest the user.

    layers: L+1 tables [n, d], of which users, pos_items [B] and candidates [B, M] are rows;
    alpha [L+1, B], shared by a sample's candidates. Returns rows, int64 [L+1, B].
    """
    query = torch.stack([layer[users] for layer in layers]).mean(0)                    # [B, d]
    picked = []
    for layer, a in zip(layers, alpha):
        a = a[:, None, None]
        mixed = a * layer[pos_items][:, None] + (1 - a) * layer[candidates]         # [B, M, d]
        best = (query[:, None] * mixed).sum(2).argmax(1, keepdim=True)
        picked.append(candidates.gather(1, best)[:, 0])
    return torch.stack(picked)


def hard_negatives(layers, users, candidates):
    """The same rows. alpha is one number for all M candidates and 1 - alpha > 0, so the
    arg-max over mixed candidates is the arg-max over the candidates as they are."""
    query = torch.stack([layer[users] for layer in layers]).mean(0)                    # [B, d]
    picked = []
    for layer in layers:
        best = candidate_scores(query, layer, candidates).argmax(1, keepdim=True)
        picked.append(candidates.gather(1, best)[:, 0])
    return torch.stack(picked)                                                       # [L+1, B]


def candidate_scores(query, table, candidates):
    """query . table[candidate]: query [B, d], table [n, d], candidates [B, M] -> [B, M]."""
    B, M = candidates.shape
    if query.is_cuda or len(table) < M:
        return (table[candidates] @ query[:, :, None])[:, :, 0]
    # On a CPU as one product that is computed at the candidates' places only: no [B, M, d] is
    # gathered. It takes no more places in a row than there are columns, hence the test above.
    row_starts = torch.arange(0, B * M + 1, M, dtype=torch.int32)
    places = torch.sparse_csr_tensor(
        row_starts, candidates.flatten().int(), query.new_zeros(B * M), (B, len(table)),
        check_invariants=False)
    scores = torch.sparse.sampled_addmm(places, query, table.T, beta=0)
    return scores.values().view(B, M)


# --- Negative items -----------------------------------------------------------------------

def sample_negatives_plain(train, users, m, rng):
    """For each user m items, each drawn until it is none of the user's training items."""
    n_items = train.shape[1]
    drawn = np.empty((len(users), m), np.int64)
    for row, user in enumerate(users):
        interacted = set(train.indices[train.indptr[user]:train.indptr[user + 1]].tolist())
        for k in range(m):
            item = rng.integers(n_items)
            while item in interacted and len(interacted) < n_items:
                item = rng.integers(n_items)
            drawn[row, k] = item
    return drawn


class NegativeSampler:
    """The same, all at once: a drawn pair is looked up among the sorted keys u n_items + i."""

    def __init__(self, train):
        """train: CSR [n_users, n_items] with sorted indices."""
        self.n_items = train.shape[1]
        pairs = train.tocoo()
        keys = pairs.row.astype(np.int64) * self.n_items + pairs.col
        self.keys = torch.from_numpy(keys)
        # A user with all items has no negative: any item will do.
        self.has_all = torch.from_numpy(np.diff(train.indptr) == self.n_items)

    def __call__(self, users, m):
        """users int64 [B] -> items int64 [B, m]."""
        users = users.repeat_interleave(m)
        drawn = torch.randint(self.n_items, (len(users),))
        unchecked = (~self.has_all[users]).nonzero()[:, 0]
        while len(unchecked):
            key = users[unchecked] * self.n_items + drawn[unchecked]
            place = torch.searchsorted(self.keys, key).clamp_(max=len(self.keys) - 1)
            redraw = self.keys[place] == key
            unchecked = unchecked[redraw]
            drawn[unchecked] = torch.randint(self.n_items, (len(unchecked),))
        return drawn.view(-1, m)
