"""What makes both scripts fast: each operator right under its plain definition.

A plain definition says in a few lines what is computed; the fast operator computes the same. The
plain definitions are enough to understand the method. The tests compare exactly these pairs, in
values and gradients; paper/bench.py times most of them. Each section says what its letters mean.

    plain                    fast
    sparse_product_plain     sparse_product       a sparse matrix times a table of vectors
    neighbour_mean_plain     CoInteractionGraph   the mean over co-interaction neighbours (Eq. 1)
    bce_plain                bce                  cross-entropy over all entries of R (Eq. 15)
    layer_rows_plain         layer_rows           rows of LightGCN's layers
    hard_negatives_plain     hard_negatives       MixGCF's hop mixing
    sample_negatives_plain   NegativeSampler      items that a user has not interacted with
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
    # 32 bits take half the memory. 64 are used only where 32 cannot count the entries.
    index = np.int32 if matrix.nnz < 1 << 31 else np.int64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(index)),
            torch.from_numpy(matrix.indices.astype(index)),
            torch.from_numpy(matrix.data).to(dtype), matrix.shape).to(device)


def sparse_product_plain(matrix, x):
    """matrix: CSR tensor [n, m], x [m, d] -> [n, d], without gradients."""
    return matrix @ x


def sparse_product(matrix, x):
    """The same, in a third of the time on a CPU; a GPU uses the plain product, by cuSPARSE.

    Row i of the product is a weighted sum of rows of x. Row i of the matrix says which rows and
    with which weights. embedding_bag computes just that for each bag of rows.
    """
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

    A: tensor [n, n], dense or CSR; x [n, d] -> [n, d].
    """
    degree = A @ torch.ones_like(x[:, :1])                                             # [n, 1]
    return A @ x / degree.clamp(min=1)


class CoInteraction(NamedTuple):
    """The graph, either as A or as R and E with A x = R (R^T x) - E x.

    Written out, A has up to sum_i deg(i)^2 entries, far more than R. But C = R R^T counts the
    columns that each two rows share, so A = C - E with the excess
        E_ab = C_ab - 1 where C_ab >= 2 (a != b),    E_aa = C_aa.
    C x = R (R^T x) takes two products with R, and E holds only the diagonal and the pairs that
    share two or more. The form with fewer entries is kept: R and E, or A where data is dense.
    """
    n_neighbours: np.ndarray  # float32 [n]
    R: sp.csr_matrix | None   # float32 [n, m]
    E: sp.csr_matrix | None   # float32 [n, n]
    A: sp.csr_matrix | None   # float32 [n, n]


def build_co_interaction(R, storage="auto", block_entries=1 << 24):
    """CoInteraction of a binary CSR matrix R [n, m].

    storage: "auto" keeps the form with fewer entries; "A" or "RE" forces that form.
    """
    R = sp.csr_matrix(R, dtype=np.float32)
    E_blocks, n_neighbours = [], np.zeros(R.shape[0], np.int64)
    for C, row in shared_counts(R, block_entries):
        is_edge = C.indices != row
        n_neighbours += np.bincount(row[is_edge], minlength=R.shape[0])
        # C becomes E in place: every entry off the diagonal is reduced by 1.
        C.data -= is_edge
        C.eliminate_zeros()  # removes the pairs that share one column only
        E_blocks.append(C)
    n_neighbours = n_neighbours.astype(np.float32)
    E = stack_blocks(E_blocks)
    n_edges = n_neighbours.sum(dtype=np.float64)
    if storage == "RE" or (storage == "auto" and 2 * R.nnz + E.nnz < n_edges):
        return CoInteraction(n_neighbours, R, E, None)
    # A is built in a second pass, so that it is never in memory where R and E are kept.
    A_blocks = []
    for C, row in shared_counts(R, block_entries):
        C.data[:] = C.indices != row
        C.eliminate_zeros()
        A_blocks.append(C)
    return CoInteraction(n_neighbours, None, None, stack_blocks(A_blocks))


def shared_counts(R, block_entries):
    """Yields C = R R^T in blocks of rows: (CSR [c, n], int64 [nnz]: the row a of each entry).

    A block has as many rows as take about block_entries multiplications, so that C is never in
    memory as a whole.
    """
    n, Rt = R.shape[0], R.T.tocsr()
    # Row a of R R^T adds up the rows of R^T at a's columns: a multiplication for each entry there.
    multiplications = R @ np.diff(Rt.indptr)                                               # [n]
    done = np.cumsum(np.append(0, multiplications))  # multiplications before each row
    start = 0
    while start < n:
        # `end` is one past the last row that still fits; a block has at least one row.
        end = np.searchsorted(done, done[start] + block_entries, side="right") - 1
        end = int(min(n, max(end, start + 1)))
        C = R[start:end] @ Rt
        row = np.repeat(np.arange(start, end, dtype=np.int64), np.diff(C.indptr))
        yield C, row
        start = end


def stack_blocks(blocks):
    matrix = sp.vstack(blocks, format="csr")
    matrix.sort_indices()
    return matrix


class Propagate(torch.autograd.Function):
    """x -> D^-1 A x for a symmetric A, so that the gradient is (D^-1 A)^T g = A (D^-1 g)."""

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

    The same as neighbour_mean_plain with A = co_interaction_plain(R). For G_i pass R's
    transpose.
    """

    def __init__(self, R, device="cpu", dtype=torch.float32, storage="auto"):
        graph = build_co_interaction(R, storage)
        degree = torch.from_numpy(graph.n_neighbours).to(device, dtype)[:, None]       # [n, 1]
        # Where a node has no neighbours the mean is 0.
        self.inverse_degree = torch.where(degree > 0, 1 / degree, 0)
        self.n_edges = int(graph.n_neighbours.sum(dtype=np.float64))
        self.A = None
        if graph.A is not None:
            self.A = sparse_tensor(graph.A, device, dtype)
            self.n_read = graph.A.nnz  # entries that one product reads
        else:
            self.R = sparse_tensor(graph.R, device, dtype)
            self.Rt = sparse_tensor(graph.R.T.tocsr(), device, dtype)
            self.E = sparse_tensor(graph.E, device, dtype)
            self.n_read = 2 * graph.R.nnz + graph.E.nnz

    def adjacency(self, x):
        """A x, without gradients."""
        if self.A is not None:
            return sparse_product(self.A, x)
        C_x = sparse_product(self.R, sparse_product(self.Rt, x))
        return C_x.sub_(sparse_product(self.E, x))

    def __call__(self, x):
        return Propagate.apply(x, self.adjacency, self.inverse_degree)


# --- Binary cross-entropy over all of R (Eq. 15) ------------------------------------------

def row_entries(R, users):
    """Where the entries of the block R[users] are: (rows, cols), int64 [nnz] each.

    The same as the rows and columns of a SciPy matrix's R[users].tocoo(). R: CSR tensor [n_users,
    n_items], users int64 [B]; rows are positions in `users`. Everything is on the device of R.
    """
    start = R.crow_indices()[users].long()                                                # [B]
    n_entries = R.crow_indices()[users + 1].long() - start
    rows = torch.arange(len(users), device=users.device).repeat_interleave(n_entries)
    # Entry k of the block is entry k - block_start of its row. That row begins at start in R.
    block_start = n_entries.cumsum(0) - n_entries
    k = torch.arange(len(rows), device=users.device)
    entry = k - block_start[rows] + start[rows]
    return rows, R.col_indices()[entry].long()


def bce_plain(user, item, bias, rows, cols):
    """-sum R log(sigma(s)) + (1 - R) log(1 - sigma(s)) with s = user . item + bias.

    user [B, d], item [n_items, d], bias [n_items]; R [B, n_items] is 1 at (rows, cols), int64
    [nnz] each, as row_entries returns them.
    """
    scores = user @ item.T + bias                                                # [B, n_items]
    target = torch.zeros_like(scores)
    target[rows, cols] = 1
    return F.binary_cross_entropy_with_logits(scores, target, reduction="sum")


def bce(user, item, bias, rows, cols):
    """The same, with at most chunk_scores of the [B, n_items] scores at a time."""
    # On a CPU a chunk should fit in the cache. A GPU is faster with few, large chunks (256 MB).
    chunk_scores = 1 << 26 if user.is_cuda else 1 << 21
    return BlockBCE.apply(user, item, bias, rows, cols, chunk_scores)


class BlockBCE(torch.autograd.Function):
    """Eq. 15 as sum softplus(s) - sum_positives s.

    Its derivative with respect to s is sigma(s) - R. So forward scores one chunk of items at a
    time, adds the chunk's part to the gradients of all three inputs, and drops the scores.
    backward only multiplies these gradients by the incoming one.
    """

    @staticmethod
    def forward(ctx, user, item, bias, rows, cols, chunk_scores):
        """The positives are (rows, cols); chunk_scores: how many scores are held at a time."""
        positive = (user[rows] * item[cols]).sum() + bias[cols].sum()
        grad_user = torch.zeros_like(user).index_add_(0, rows, item[cols], alpha=-1)
        grad_item = torch.zeros_like(item).index_add_(0, cols, user[rows], alpha=-1)
        grad_bias = bias.new_zeros(len(item))
        grad_bias.index_add_(0, cols, bias.new_ones(len(cols)), alpha=-1)
        total = torch.zeros((), dtype=torch.float64, device=user.device)
        step = max(1, chunk_scores // max(1, len(user)))
        for start in range(0, len(item), step):
            chunk = slice(start, start + step)
            s = torch.addmm(bias[chunk], user, item[chunk].T)                          # [B, c]
            p = s.sigmoid()
            # softplus(s) = max(s, 0) - log max(p, 1 - p), and max(p, 1 - p) = |p - .5| + .5.
            # This takes a seventh of F.softplus's time on a CPU and is exact to 6e-8 a score.
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
    root = sp.diags_array(np.where(degree > 0, degree, np.inf) ** -0.5)  # inf ** -0.5 = 0
    return (root @ A @ root).tocsr()


def layer_rows_plain(E0, A_hat, n_layers, rows):
    """Rows of the layers E^(l) = A_hat^l E0, under autograd.

    E0 [n, d], A_hat: sparse COO tensor [n, n], rows int64 [L+1, r] -> [L+1, r, d].
    """
    layers = [E0]
    for _ in range(n_layers):
        layers.append(torch.sparse.mm(A_hat, layers[-1]))
    return torch.stack([layer[row] for layer, row in zip(layers, rows)])


def layer_rows(E0, A_hat, layers, rows):
    """The same rows, from layers that are already computed: L+1 tables [n, d]; A_hat CSR.

    The gradient goes to E0. A_hat must be symmetric.
    """
    return LayerRows.apply(E0, A_hat, layers, rows)


class LayerRows(torch.autograd.Function):
    """With G_l the gradient at layer l's rows, E0's is G_0 + A_hat (G_1 + A_hat (G_2 + ...)).

    This is Horner's rule. It takes one product per layer and a single table. Autograd would fill
    a table for every layer and add them up.
    """

    @staticmethod
    def forward(ctx, E0, A_hat, layers, rows):
        ctx.A_hat, ctx.rows, ctx.n = A_hat, rows, len(E0)
        return torch.stack([layer[row] for layer, row in zip(layers, rows)])

    @staticmethod
    def backward(ctx, g):
        n_layers = len(g) - 1
        grad = g.new_zeros(ctx.n, g.shape[2])
        grad.index_add_(0, ctx.rows[n_layers], g[n_layers])
        for layer in reversed(range(n_layers)):
            grad = sparse_product(ctx.A_hat, grad)
            grad.index_add_(0, ctx.rows[layer], g[layer])
        return grad, None, None, None


# --- MixGCF's hop mixing ------------------------------------------------------------------

def hard_negatives_plain(layers, users, pos_items, candidates, mix):
    """Mixes each candidate with the positive; in each layer takes the one that scores highest.

    layers: L+1 tables [n, d]. users, pos_items [B] and candidates [B, M] are row numbers.
    mix [L+1, B] is the share of the positive. Returns row numbers, int64 [L+1, B].
    """
    query = torch.stack([layer[users] for layer in layers]).mean(0)                    # [B, d]
    picked = []
    for layer, a in zip(layers, mix):
        a = a[:, None, None]                                                        # [B, 1, 1]
        positive = layer[pos_items][:, None]                                        # [B, 1, d]
        mixed = a * positive + (1 - a) * layer[candidates]                          # [B, M, d]
        best = (query[:, None] * mixed).sum(2).argmax(1, keepdim=True)
        picked.append(candidates.gather(1, best)[:, 0])
    return torch.stack(picked)


def hard_negatives(layers, users, candidates):
    """The same rows, without mixing.

    In a layer all candidates of a sample share one mix and one positive, and 1 - mix is above 0.
    So the arg-max over the mixed candidates is the arg-max over the candidates as they are.
    """
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
    # On a CPU query @ table.T is computed at the candidates' places only: no [B, M, d] is gathered.
    # `places` is no proper CSR matrix, because a row's columns are unsorted and may repeat.
    # sampled_addmm does not mind, so torch's check is off. More entries in a row than columns it
    # refuses, hence the test of M above.
    row_starts = torch.arange(0, B * M + 1, M, dtype=torch.int32)
    places = torch.sparse_csr_tensor(
        row_starts, candidates.flatten().int(), query.new_zeros(B * M), (B, len(table)),
        check_invariants=False)
    scores = torch.sparse.sampled_addmm(places, query, table.T, beta=0)
    return scores.values().view(B, M)


# --- Negative items -----------------------------------------------------------------------

def sample_negatives_plain(train, users, m, rng):
    """m items for each user, each drawn until it is not one of the user's training items."""
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
    """The same for all users at once.

    The pair (u, i) has the number u * n_items + i. A drawn pair is a training interaction if
    binary search finds its number among the sorted numbers of the training interactions.
    """

    def __init__(self, train, device="cpu", items=None):
        """train: CSR [n_users, n_items] with sorted indices; device: where it draws.

        items: int64, sorted; only these items are drawn. None: all are.
        """
        self.items = None
        if items is not None:
            train = train[:, items]
            self.items = torch.from_numpy(items).to(device)
        self.n_items, self.device = train.shape[1], device
        pairs = train.tocoo()
        keys = pairs.row.astype(np.int64) * self.n_items + pairs.col
        self.keys = torch.from_numpy(keys).to(device)
        # A user who has every item has no negative, and may be given any item.
        has_all = np.diff(train.indptr) == self.n_items
        self.has_all = torch.from_numpy(has_all).to(device)

    def __call__(self, users, m):
        """users int64 [B] -> items int64 [B, m], both on the sampler's device."""
        users = users.repeat_interleave(m)
        drawn = torch.randint(self.n_items, (len(users),), device=self.device)
        unchecked = (~self.has_all[users]).nonzero()[:, 0]
        while len(unchecked):
            key = users[unchecked] * self.n_items + drawn[unchecked]
            place = torch.searchsorted(self.keys, key).clamp_(max=len(self.keys) - 1)
            redraw = self.keys[place] == key
            unchecked = unchecked[redraw]
            drawn[unchecked] = torch.randint(self.n_items, (len(unchecked),),
                                             device=self.device)
        if self.items is not None:
            drawn = self.items[drawn]
        return drawn.view(-1, m)
