"""The systems that the paper's Table 2 compares MMCPR with, each from its own paper, as initialisers for finetune.py.

    python baselines.py --method pmgt                       on demo: tries three learning rates, writes emb.npz
    python baselines.py --method gcnp --data vg --lr 1e-3 --out gcnp.npz
    python baselines.py --method clip --data path/to/folder

Then: python finetune.py --init emb.npz

    random      Xavier tables, nothing is learned          gptgnn      GPT-GNN      (items)
    clip        text and image vectors, PCA    (items)     graphbert   Graph-BERT   (items)
    mmgcn       MMGCN              (users and items)       pmgt        PMGT         (items)
                                                           gcnp        GCN-P        (users and items)

A method is a torch module with batches(), the batches of one epoch; loss(batch), a scalar; and embed(), (user [n_users, d]
or None, item [n_items, d]). One trainer serves all: the epoch, and of several learning rates the one, with the best
validation Recall@20, patience counted from the first epoch; where a method has no users, a user is the mean of the training
items. Methods see the training interactions and the items' (GCN-P: also the users') features; a missing modality is a zero row.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import finetune
import metrics
from mmcpr import CoInteractionGraph, Propagate, sparse_product, sparse_tensor

HEADS = {"gptgnn": 4, "graphbert": 2, "pmgt": 2}  # of attention, where a method has it


# --- What several methods share -------------------------------------------------------------------------------------

def unit_rows(features, names):
    """{modality: float32 [n, d_m]} of those in names, rows L2-normalised, missing ones 0."""
    return {m: F.normalize(torch.nan_to_num(torch.from_numpy(np.array(features[m], np.float32)))) for m in names if m in features}


def item_graph(train, cap):
    """The weighted item graph: CSR [n_items, n_items] with each item's `cap` heaviest edges.

    Items that share c users are joined with PMGT's weight (ln c + 1) / (ln sqrt(deg_a deg_b) + 1).
    """
    Rt, degree = train.T.tocsr(), np.asarray(train.sum(0)).ravel()
    n, kept = train.shape[1], []
    for lo in range(0, n, 4096):
        C = (Rt[lo:lo + 4096] @ train).tocoo()
        a, b, c = C.row + lo, C.col, C.data
        a, b, c = a[a != b], b[a != b], c[a != b]
        w = (np.log(c) + 1) / (np.log(np.sqrt(degree[a] * degree[b])) + 1)
        order = np.lexsort((b, -w, a))
        count = np.bincount(a, minlength=n)
        order = order[np.arange(len(a)) - np.repeat(np.cumsum(count) - count, count) < cap]
        kept.append((a[order], b[order], w[order]))
    a, b, w = (np.concatenate(x) for x in zip(*kept))
    return sp.csr_matrix((w.astype(np.float32), (a, b)), (n, n))


def draw_columns(matrix, rows):
    """One column of each row of a CSR matrix, uniformly: (columns int64 [b], bool [b]: whether the row has any; else 0)."""
    low, high = (torch.from_numpy(matrix.indptr[k:][rows.numpy()]).long() for k in (0, 1))
    at, some = low + (torch.rand(len(rows)) * (high - low)).long(), high > low
    columns = torch.zeros(len(rows), dtype=torch.int64)
    columns[some] = torch.from_numpy(matrix.indices[at[some].numpy()]).long()
    return columns, some


def known(views):
    """float [n, sum d_m]: 1 where a column belongs to a modality that the item has; missing ones are not to be reconstructed."""
    return torch.cat([x.any(1, keepdim=True).float().expand_as(x) for x in views], 1)


class Items(nn.Module):
    """A method that works on items alone: an epoch is one pass over the items in batches."""

    def __init__(self, n_items, batch):
        super().__init__()
        self.n_items, self.batch = n_items, batch

    def batches(self):
        return torch.randperm(self.n_items).split(self.batch)


# --- Random and CLIP ------------------------------------------------------------------------------------------------

def random(train, dim):
    """Xavier-uniform tables: (user, item)."""
    return finetune.initial_tables(None, train, dim)


def clip(views, present, same_space, dim):
    """Item vectors without any learning: [n_items, dim].

    The mean of text and image where they share a space (CLIP: Radford et al., ICML 2021), over what the item has; else the
    two side by side. Centred, then PCA. Rows with nothing stay 0; where there are fewer than dim columns, the rest is 0.
    """
    if same_space:
        x = sum(views) / sum(present).clamp(min=1)[:, None]                               # [n, 512]
    else:
        x = torch.cat(views, 1)                                                           # [n, sum d_m]
    some = sum(present) > 0
    x = torch.where(some[:, None], x - x[some].mean(0), 0)
    values, vectors = torch.linalg.eigh(x.double().T @ x.double())                        # ascending
    x = x @ vectors.flip(1)[:, :dim].float()
    return F.pad(x, (0, dim - x.shape[1]))


# --- MMGCN (Wei et al., MM 2019) ------------------------------------------------------------------------------------

class MMGCN(nn.Module):
    """One graph convolution per modality on the user-item graph, joined by an id embedding that all modalities share.

    Per modality, from x = L2norm([user preference; MLP(features)]), three times:
        h = LeakyReLU(mean over neighbours of W1 x),   x^ = LeakyReLU(W2 x + b2) + id,   x = LeakyReLU(W3 [h || x^] + b3)
    The representation is the sum over modalities, as the paper has it (the authors' code: the mean). id and preferences are
    trained, as the paper means (in the code they are plain tensors that Adam never sees). BPR, one uniform negative. Every modality
    goes through a linear layer of its own width, at most 256 (the authors': only the visual one, of 256).
    """

    def __init__(self, train, views, dim, batch, layers=3, width=256, reg=1e-5):
        super().__init__()
        self.train_pairs = metrics.entries(train, np.arange(train.shape[0]))
        self.sample, self.batch, self.reg = finetune.NegativeSampler(train), batch, reg
        (self.n_users, n_items), xavier = train.shape, nn.init.xavier_uniform_
        A = sp.block_array([[None, train], [train.T, None]], format="csr")
        self.A = sparse_tensor(A)
        self.inverse = 1 / torch.from_numpy(np.maximum(np.asarray(A.sum(1)), 1).astype(np.float32)).view(-1, 1)  # [n, 1]
        self.views, self.id = views, nn.Parameter(xavier(torch.empty(self.n_users + n_items, dim)))
        self.preference, self.mlp, self.W = nn.ParameterDict(), nn.ModuleDict(), nn.ModuleDict()
        for m, x in views.items():
            d = min(width, x.shape[1])
            self.mlp[m] = nn.Linear(x.shape[1], d)
            self.preference[m] = nn.Parameter(xavier(torch.empty(self.n_users, d)))
            self.W[m] = nn.ModuleList(nn.ModuleList((nn.Linear(d if l == 0 else dim, dim, bias=False),
                                                     nn.Linear(d if l == 0 else dim, dim), nn.Linear(2 * dim, dim)))
                                      for l in range(layers))

    def forward(self):
        mean = lambda x: Propagate.apply(x, lambda y: sparse_product(self.A, y), self.inverse, None)
        total = 0
        for m, view in self.views.items():
            item = self.mlp[m](view) * view.any(1, keepdim=True)
            x = F.normalize(torch.cat([self.preference[m], item]))                        # [n, d]
            for W1, W2, W3 in self.W[m]:
                h = F.leaky_relu(mean(W1(x)))
                own = F.leaky_relu(W2(x)) + self.id
                x = F.leaky_relu(W3(torch.cat([h, own], 1)))                              # [n, dim]
            total = total + x
        return total[:self.n_users], total[self.n_users:]

    def batches(self):
        return torch.randperm(len(self.train_pairs[0])).split(self.batch)

    def loss(self, rows):
        u, i = (torch.from_numpy(x)[rows] for x in self.train_pairs)
        j = self.sample(u, 1)[:, 0]
        user, item = self()
        bpr = F.softplus((user[u] * (item[j] - item[i])).sum(1)).mean()
        size = (self.id[u].square() + self.id[self.n_users + i].square()).mean() + \
            sum(p.square().mean() for p in self.preference.values())
        return bpr + self.reg * size

    def embed(self):
        return self()


# --- GPT-GNN (Hu et al., KDD 2020) ----------------------------------------------------------------------------------

class HGTLayer(nn.Module):
    """Heterogeneous graph transformer (Hu et al., WWW 2020) with one type of node and of edge.

    Per head: a_ij = softmax_j(q_i . (A k_j) p / sqrt(d_k)), o_i = sum_j a_ij M v_j;  h' = s W gelu(o) + (1 - s) h, s = sigmoid(skip).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, width = heads, dim // heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.A, self.M = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, width, width))) for _ in range(2))
        self.p, self.skip = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.ones(1))

    def forward(self, h, source, target):
        """h [n, d]; an edge brings source[e]'s message to target[e]."""
        split = lambda x: x.view(len(x), self.heads, -1)
        q = split(self.q(h))                                                              # [n, H, d/H]
        k, v = (torch.einsum("nhd,hde->nhe", split(x), W) for x, W in ((self.k(h), self.A), (self.v(h), self.M)))
        score = (q[target] * k[source]).sum(2) * self.p / q.shape[2] ** 0.5               # [e, H]
        at = target[:, None].expand_as(score)
        highest = torch.full((len(h), self.heads), -torch.inf).scatter_reduce(0, at, score.detach(), "amax")
        weight = (score - highest[target]).exp()
        total = torch.zeros(len(h), self.heads).index_add(0, target, weight)
        message = (weight / total[target])[:, :, None] * v[source]                        # [e, H, d/H]
        o = torch.zeros_like(q).index_add(0, target, message).flatten(1)                  # [n, d]
        s = torch.sigmoid(self.skip)
        return s * self.out(F.gelu(o)) + (1 - s) * h


class GPTGNN(Items):
    """Generative pre-training on the item graph: the attributes of a node and its held-out edges from its observed edges.

    Of the edges at a batch's targets half are held out. A copy of every target, its input one learned vector, receives from the
    target's observed neighbours and sends nothing: from its output the attributes are generated (cosine / 0.1). The target
    itself keeps its attributes: against it the held-out neighbours must score above sources that are no neighbours, of the
    batch and of a queue of earlier batches that grows over 20 epochs (softmax of cosine / 0.1). L = (L_edge + L_attr) / 2.
    Not as the authors: each item's 16 heaviest edges; the nodes of a step are the targets and `fan` drawn neighbours of each, not
    depth-6 HGSampling; the 255 negatives, which are no kept neighbours, and the queue are shared by all targets of a step; four
    heads; Adam without cycle, decay or clipping. Both losses see directions alone, so unit rows are handed over.
    """

    def __init__(self, train, x, dim, batch, layers=3, heads=HEADS["gptgnn"], cap=16, fan=4, dropout=0.2, queue=256):
        super().__init__(len(x), batch)
        A = item_graph(train, cap)
        self.A = A.maximum(A.T).tocsr()                                                   # undirected again
        self.x, self.fan, self.limit, self.epoch = x, fan, queue, 0
        self.inp, self.drop = nn.Linear(x.shape[1], dim), nn.Dropout(dropout)
        self.init_emb = nn.Parameter(x.mean(0))
        self.layers = nn.ModuleList(HGTLayer(dim, heads) for _ in range(layers))
        self.attribute, self.edge = nn.Linear(dim, x.shape[1]), nn.Linear(dim, dim)
        self.register_buffer("queue", torch.empty(0, dim), persistent=False)

    def encode(self, x, source, target):
        h = self.drop(torch.tanh(self.inp(x)))
        for layer in self.layers:
            h = self.drop(layer(h, source, target))
        return h

    def batches(self):
        self.epoch += 1
        return super().batches()

    def sampled(self, targets):
        """(nodes: the targets first, edges of the subgraph they induce: source, target), int64."""
        draws = (draw_columns(self.A, targets) for _ in range(self.fan))
        rest = np.setdiff1d(torch.cat([columns[some] for columns, some in draws]).numpy(), targets.numpy())
        nodes = torch.cat([targets, torch.from_numpy(rest)])
        edges = self.A[nodes.numpy()][:, nodes.numpy()].tocoo()
        return nodes, torch.from_numpy(edges.col).long(), torch.from_numpy(edges.row).long()

    def hold_out(self, source, target, n_nodes, n_targets):
        """bool [e]: each undirected edge at a target is held out with probability 1/2, in both directions."""
        low, high = torch.minimum(source, target), torch.maximum(source, target)
        _, edge = torch.unique(low * n_nodes + high, return_inverse=True)
        return (torch.rand(int(edge.max()) + 1 if len(edge) else 0) < 0.5)[edge] & (low < n_targets)

    def loss(self, targets):
        nodes, source, target = self.sampled(targets)
        n, b = len(nodes), len(targets)
        held = self.hold_out(source, target, n, b)
        s, t = source[~held], target[~held]                                               # what the encoder may see
        copies = t < b
        x = torch.cat([self.x[nodes], self.init_emb.expand(b, -1)])                       # [n + b, d_x]
        h = self.encode(x, torch.cat([s, s[copies]]), torch.cat([t, t[copies] + n]))
        l_attr = -F.cosine_similarity(self.attribute(self.drop(h[n:])), self.x[targets], dim=1).mean() / 0.1
        positive = held & (target < b)                                                    # held-out edges, seen from a target
        if int(positive.sum()) <= 8:
            return l_attr / 2
        q = F.normalize(self.drop(self.edge(h[:b])))                                      # [b, d]
        k = F.normalize(h[:n])
        some = torch.randperm(n)[:255]
        neighbour = torch.zeros(b, n, dtype=torch.bool)
        neighbour[target[target < b], source[target < b]] = True
        neighbour[torch.arange(b), torch.arange(b)] = True
        negative = (q @ k[some].T / 0.1).masked_fill(neighbour[:, some], -torch.inf)      # [b, 255]
        queue = self.queue[:int(self.limit * min(1, self.epoch / 20))]
        rest = torch.cat([negative, q @ queue.T / 0.1], 1).logsumexp(1)                   # [b]
        score = (q[target[positive]] * k[source[positive]]).sum(1) / 0.1
        l_edge = (torch.logaddexp(score, rest[target[positive]]) - score).mean()
        self.queue = torch.cat([k[some].detach(), self.queue])[:self.limit]
        return (l_edge + l_attr) / 2

    def embed(self):
        edges = self.A.tocoo()
        h = self.encode(self.x, torch.from_numpy(edges.col).long(), torch.from_numpy(edges.row).long())
        return None, F.normalize(h)


# --- Graph-BERT (Zhang et al., arXiv 2001.05140) --------------------------------------------------------------------

def intimacy(train, k, alpha=0.15, steps=20, block=512):
    """Each item's k most intimate items: (their indices int64 [n_items, k], S float32 [n_items, k]).

    S = alpha (I - (1 - alpha) A D^-1)^-1, the graph's personalised PageRank. Row i of S is the limit of
    p <- alpha e_i + (1 - alpha) D^-1 A p: `steps` sparse products for a block of rows at a time, S is never whole in memory.
    """
    graph, n = CoInteractionGraph(train.T.tocsr()), train.shape[1]
    index, value = [], []
    for lo in tqdm(range(0, n, block), desc="intimacy", unit="block"):
        rows = torch.arange(lo, min(lo + block, n))
        e = torch.zeros(n, len(rows))
        e[rows, rows - lo] = 1
        p = e
        for _ in range(steps):
            p = alpha * e + (1 - alpha) * graph.left * graph.adjacency(p)                 # [n, b]
        p[rows, rows - lo] = -1  # an item is not its own context
        top = p.T.topk(min(k, n - 1))
        index.append(torch.where(top.values > 0, top.indices, rows[:, None]))  # but where it reaches no other
        value.append(top.values)
    return torch.cat(index), torch.cat(value)


def sinusoid(code, dim):
    """The fixed position embedding of integer codes [...] -> [..., dim] (Vaswani et al., 2017)."""
    angle = code[..., None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :dim]


class GraphBERT(Items):
    """A transformer over linkless subgraphs: an item and the k items most intimate with it, no edges.

    A token is W x plus the sinusoids of its Weisfeiler-Lehman role, its rank by intimacy (the item itself: 0) and its hops;
    every layer adds the residual W_r x_i of the item ("raw"). z_i is the mean over the tokens. Two losses: the item's features
    from z_i, and |cos(z_i, z_j) - S_ij|^2. S's entries are tiny and a random pair's is 0, so S is scaled to 1 in each row, and
    each item is compared with one drawn context item and one random item. The role is the colour after one refinement, the
    degree: in graphs this dense the next one tells all items apart. Hops are 0, 1, and 2 for anything farther. Not as the
    authors: the residual is there in pre-training too, dropout is 0.3 throughout, no weight decay.
    """

    def __init__(self, train, x, known, dim, batch, k=7, layers=2, heads=HEADS["graphbert"], dropout=0.3):
        super().__init__(len(x), batch)
        self.x, self.known = x, known
        self.context, S = intimacy(train, k)                                              # [n, k]
        self.closeness = S / S[:, :1].clamp(min=1e-12)
        R = train.T.tocsr()
        shared = [np.asarray(R.multiply(R[c]).sum(1)).ravel() for c in self.context.T.numpy()]
        hop = torch.from_numpy(np.where(np.stack(shared, 1) > 0, 1, 2))                   # [n, k]
        hop[self.context == torch.arange(len(x))[:, None]] = 0
        role = torch.from_numpy(CoInteractionGraph(R).left.reciprocal().nan_to_num(posinf=0).numpy())  # degree in G_i
        rank = torch.arange(self.context.shape[1] + 1)
        tokens = torch.cat([torch.arange(len(x))[:, None], self.context], 1)              # [n, k+1]
        self.tokens = tokens
        self.codes = sinusoid(role[tokens, 0], dim) + sinusoid(rank, dim) + sinusoid(F.pad(hop, (1, 0)), dim)  # [n, k+1, dim]
        self.embed_x, self.residual, self.attribute = nn.Linear(x.shape[1], dim), nn.Linear(x.shape[1], dim), nn.Linear(dim, x.shape[1])
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(dim, heads, dim, dropout, F.gelu, batch_first=True) for _ in range(layers))

    def encode(self, rows):
        """rows int64 [b] -> z [b, dim]."""
        h = self.drop(self.norm(self.embed_x(self.x[self.tokens[rows]]) + self.codes[rows]))  # [b, k+1, dim]
        for layer in self.layers:
            h = layer(h) + self.residual(self.x[rows])[:, None]
        return h.mean(1)

    def loss(self, rows):
        which = torch.randint(self.context.shape[1], (len(rows),))
        near, far = self.context[rows, which], (rows + torch.randint(1, self.n_items, (len(rows),))) % self.n_items
        z, z_near, z_far = self.encode(torch.cat([rows, near, far])).chunk(3)
        attributes = ((self.attribute(z) - self.x[rows]).square() * self.known[rows]).sum(1).mean()
        there = near != rows  # an item that reaches fewer than k others has no pair in the other places
        gap = (F.cosine_similarity(z, z_near) - self.closeness[rows, which]).square()
        structure = gap[there].sum() / there.sum().clamp(min=1) + F.cosine_similarity(z, z_far).square().mean()
        return attributes + structure

    def embed(self):
        return None, torch.cat([self.encode(rows) for rows in torch.arange(self.n_items).split(self.batch)])


# --- PMGT (Liu et al., MM 2021) -------------------------------------------------------------------------------------

def mcn_sampling(graph, rng, sizes=(10, 5, 2), k=10):
    """Each item's k contextual neighbours, best first, int64 [n, k] (MCNSampling).

    Hop h draws sizes[h] neighbours of every node that hop h - 1 drew, with replacement, in proportion to the edges' weights;
    a node scores (number of hops - h + 1) whenever hop h draws it. Lists that stay short are repeated; an item without
    neighbours is its own context. graph: weighted CSR [n, n].
    """
    n, indptr = graph.shape[0], graph.indptr
    mass = np.concatenate([[0], np.cumsum(graph.data, dtype=np.float64)])
    low, span = mass[indptr[:-1]], mass[indptr[1:]] - mass[indptr[:-1]]
    reached, keys, scores = np.arange(n)[:, None], [], []
    for hop, size in enumerate(sizes):
        here = reached.repeat(size)                                                       # target-major
        at = np.searchsorted(mass, low[here] + rng.random(len(here)) * span[here], side="right") - 1
        at = at.clip(indptr[here], np.maximum(indptr[here + 1] - 1, 0))
        there = np.where(span[here] > 0, graph.indices[at.clip(max=graph.nnz - 1)], here) if graph.nnz else here
        reached = there.reshape(n, -1)
        keys.append((np.arange(n)[:, None] * n + reached).ravel())
        scores.append(np.full(len(there), len(sizes) - hop))
    key, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    score = np.bincount(inverse, weights=np.concatenate(scores))
    target, node = np.divmod(key, n)
    target, node, score = (x[node != target] for x in (target, node, score))
    order = np.lexsort((rng.random(len(target)), -score, target))                         # ties at random
    count = np.bincount(target, minlength=n)
    context = np.arange(n)[:, None].repeat(k, 1)
    some = np.flatnonzero(count)
    place = np.arange(k) % count[some][:, None]                                           # short lists from the start again
    context[some] = node[order][(np.cumsum(count) - count)[some][:, None] + place]
    return torch.from_numpy(context)


class DiverseLayer(nn.Module):
    """Transformer layer whose attention also prefers tokens unlike the query, so that contexts stay diverse:

    A = (1 - beta) softmax(Q K^T / sqrt(d)) + beta softmax(1 - cos(E, E) + I), E = W_E H, per head.
    """

    def __init__(self, dim, heads, beta):
        super().__init__()
        self.heads, self.beta = heads, beta
        self.q, self.k, self.v, self.e, self.out = (nn.Linear(dim, dim) for _ in range(5))
        self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def attention(self, h):
        """h [b, t, d] -> [b, heads, t, t]."""
        split = lambda x: x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)            # [b, H, t, d/H]
        q, k, e = split(self.q(h)), split(self.k(h)), F.normalize(split(self.e(h)), dim=3)
        unlike = 1 - e @ e.transpose(2, 3) + torch.eye(h.shape[1])
        return (1 - self.beta) * (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3) + self.beta * unlike.softmax(3)

    def forward(self, h):
        v = self.v(h).view(*h.shape[:2], self.heads, -1).transpose(1, 2)
        h = self.norm1(h + self.out((self.attention(h) @ v).transpose(1, 2).flatten(2)))
        return self.norm2(h + self.ffn(h))


class PMGT(Items):
    """Pre-training graph transformer: an item and its sampled context, in the order of their scores.

    A token is the gated sum of the item's projected modalities, g = softmax(W tanh([m1 || m2])), plus position and role. The
    vector of an item is a linear map of its own token's output. Two losses: binary cross-entropy of its cosine to a drawn
    neighbour (1) and to a random item (0); and the raw features of masked context items (20 %; of these 80 % become the mask
    vector, 10 % another item) from their tokens' outputs. Not as the authors: the graph is MMCPR's G_i, each item's 64 heaviest
    edges, not those of three shared users or more; an item is not in its own context; the mask vector is learned; masked contexts
    are the targets'; Adam without warm-up, decay or clipping. The paper's loss on cosines alone (the code stacks norms too).
    """

    def __init__(self, train, views, dim, batch, layers=2, heads=HEADS["pmgt"], beta=0.2, k=10, mask=0.2, cap=64):
        super().__init__(train.shape[1], batch)
        graph = item_graph(train, cap)
        self.graph, self.R = graph.maximum(graph.T).tocsr(), train.T.tocsr()
        self.k, self.mask, self.rng = k, mask, np.random.default_rng(torch.initial_seed())
        self.views = list(views.values())
        self.present = torch.stack([x.any(1) for x in self.views], 1)                     # [n, M]
        self.raw, self.known = torch.cat(self.views, 1), known(self.views)                # [n, sum d_m] each
        self.project = nn.ModuleList(nn.Linear(x.shape[1], dim) for x in self.views)
        self.gate = nn.Linear(len(self.views) * dim, len(self.views))
        self.unknown = nn.Parameter(0.01 * torch.randn(dim))
        self.position, self.role, self.norm = nn.Embedding(k + 1, dim), nn.Embedding(2, dim), nn.LayerNorm(dim)
        self.layers = nn.ModuleList(DiverseLayer(dim, heads, beta) for _ in range(layers))
        self.pool, self.feature = nn.Linear(dim, dim), nn.Linear(dim, self.raw.shape[1])
        self.context = mcn_sampling(self.graph, self.rng, k=k)

    def fuse(self, rows):
        """Gated sum of the modalities of items rows [...] -> [..., dim]."""
        m = torch.stack([W(x[rows]) for W, x in zip(self.project, self.views)], -2)       # [..., M, dim]
        g = self.gate(torch.tanh(m.flatten(-2)))                                          # [..., M]
        present = self.present[rows]
        g = g.masked_fill(~present & present.any(-1, keepdim=True), -torch.inf).softmax(-1) * present
        return (g[..., None] * m).sum(-2)

    def encode(self, rows, masked=False):
        """rows int64 [b] -> (tokens' outputs [b, k+1, dim], items of the tokens [b, k+1], which were masked [b, k+1])."""
        items = torch.cat([rows[:, None], self.context[rows]], 1)                         # [b, k+1]
        hidden, seen = torch.zeros_like(items, dtype=torch.bool), items
        if masked:
            hidden[:, 1:] = torch.rand(len(rows), self.k).argsort(1) < max(1, round(self.mask * self.k))
            dice = torch.rand(items.shape)
            seen = torch.where(hidden & (dice > 0.9), torch.randint(self.n_items, items.shape), items)
        h = self.fuse(seen)
        if masked:
            h = torch.where((hidden & (dice < 0.8))[:, :, None], self.unknown, h)
        role = torch.ones(self.k + 1, dtype=torch.int64)
        role[0] = 0
        h = self.norm(h + self.position.weight + self.role(role))
        for layer in self.layers:
            h = layer(h)
        return h, items, hidden

    def batches(self):
        self.context = mcn_sampling(self.graph, self.rng, k=self.k)
        return super().batches()

    def loss(self, rows):
        near, has = draw_columns(self.graph, rows)
        far = torch.randint(self.n_items, (len(rows),))
        linked = torch.from_numpy(np.asarray(self.R[rows.numpy()].multiply(self.R[far.numpy()]).sum(1)).ravel() > 0) | (far == rows)
        z, z_near, z_far = self.pool(self.encode(torch.cat([rows, near, far]))[0][:, 0]).chunk(3)
        score = torch.cat([F.cosine_similarity(z, z_near)[has], F.cosine_similarity(z, z_far)[~linked]])
        true = torch.arange(len(score)) < has.sum()
        l1 = F.binary_cross_entropy_with_logits(score, true.float()) if len(score) else 0
        h, items, hidden = self.encode(rows, masked=True)
        l2 = ((self.feature(h[hidden]) - self.raw[items[hidden]]).square() * self.known[items[hidden]]).sum(1).mean()
        return l1 + l2

    def embed(self):
        z = [self.pool(self.encode(rows)[0][:, 0]) for rows in torch.arange(self.n_items).split(self.batch)]
        return None, F.normalize(torch.cat(z))


# --- GCN-P (Meng et al., TOIS 2022, arXiv 2107.03936) ---------------------------------------------------------------

class CosineGraph:
    """H -> (D^-1 S + I) H with S all pairs' cosines, S H = F (F^T H) without S; F [n, d] has unit rows (0: no features).

    D is held at 1 or above, what an item alone has, lest negative cosines cancel it.
    """

    def __init__(self, x):
        self.x = x
        self.left = 1 / (x @ x.sum(0)).clamp(min=1)[:, None]                              # D^-1 [n, 1]

    def __call__(self, h):
        return self.left * (self.x @ (self.x.T @ h)) + h


def nearest_neighbours(x, k, chunk=1024):
    """The k most similar rows of each row by cosine, x [n, d] with unit rows: CSR [n, n] of the cosines above 0, no self-loops."""
    k, kept = min(k, len(x) - 1), []
    for lo in range(0, len(x), chunk):
        s = x[lo:lo + chunk] @ x.T                                                        # [c, n]
        s.diagonal(lo).fill_(-1)
        value, column = s.topk(k)
        row = torch.arange(lo, lo + len(s))[:, None].expand_as(column)
        kept.append(torch.stack([row[value > 0].double(), column[value > 0].double(), value[value > 0].double()]))
    row, column, value = torch.cat(kept, 1).numpy()
    return sp.csr_matrix((value.astype(np.float32), (row.astype(np.int64), column.astype(np.int64))), (len(x), len(x)))


class NeighbourGraph:
    """H -> (D^-1 S + I) H for a sparse S, not symmetric: the transposed product carries the gradient."""

    def __init__(self, S):
        degree = np.asarray(S.sum(1)).ravel()
        P = (sp.diags_array(1 / np.where(degree > 0, degree, 1)) @ S).astype(np.float32).tocsr()
        self.P, self.Pt = sparse_tensor(P), sparse_tensor(P.T.tocsr())

    def __call__(self, h):
        return SparseProduct.apply(h, self.P, self.Pt) + h


class SparseProduct(torch.autograd.Function):
    """x -> P x, gradient P^T g."""

    @staticmethod
    def forward(ctx, x, P, Pt):
        ctx.Pt = Pt
        return sparse_product(P, x)

    @staticmethod
    def backward(ctx, g):
        return sparse_product(ctx.Pt, g.contiguous()), None, None


class GCNP(nn.Module):
    """Two graph convolutional networks, of users and of items, joined by the interactions they must predict.

    H^(l+1) = L2norm(tanh((D^-1 S + I) H^(l) W + b)), three layers from a trained table; S: cosines of the side information, of the
    20 nearest (graph "knn"; among CLIP's vectors all pairs are alike) or all pairs ("cosine", as the authors). A side without
    features uses its co-interaction graph. BCE of sigmoid(u . i + b_u + b_i), one uniform negative per positive. An epoch is
    one pass over the users, each with one of its interactions. The outputs are handed over, without the biases (the authors'
    code hands over the tables under the convolutions).
    """

    def __init__(self, train, user_x, item_x, dim, batch, graph="knn", layers=3):
        super().__init__()
        self.train_matrix, self.batch, self.sample = train, batch, finetune.NegativeSampler(train)
        self.users = torch.from_numpy(np.flatnonzero(np.diff(train.indptr)))
        self.graphs, self.tables, self.W, self.bias = [], nn.ParameterList(), nn.ModuleList(), nn.ParameterList()
        for x, R in ((user_x, train), (item_x, train.T.tocsr())):
            if x is None:
                operator = CoInteractionGraph(R)
                self.graphs.append(lambda h, operator=operator: operator(h) + h)
            else:
                self.graphs.append(CosineGraph(x) if graph == "cosine" else NeighbourGraph(nearest_neighbours(x, 20)))
            self.tables.append(nn.Parameter((2 * torch.rand(R.shape[0], dim) - 1) * 0.1 / dim ** 0.5))
            self.W.append(nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers)))
            self.bias.append(nn.Parameter(torch.zeros(R.shape[0])))

    def batches(self):
        return self.users[torch.randperm(len(self.users))].split(self.batch)

    def loss(self, u):
        i, j = draw_columns(self.train_matrix, u)[0], self.sample(u, 1)[:, 0]
        user, item = self.embed()
        score = lambda v: (user[u] * item[v]).sum(1) + self.bias[0][u] + self.bias[1][v]
        return (F.softplus(-score(i)) + F.softplus(score(j))).mean()

    def embed(self):
        outputs = []
        for h, graph, layers in zip(self.tables, self.graphs, self.W):
            for W in layers:
                h = F.normalize(torch.tanh(W(graph(h))))                                  # [n, d]
            outputs.append(h)
        return outputs


# --- Training, the same for all -------------------------------------------------------------------------------------

def validate(user, item, parts):
    """Recall@20 on validation, None without it; users that a method does not have are the means of their training items."""
    if not parts.valid.nnz:
        return None
    if user is None:
        degree = np.maximum(np.diff(parts.train.indptr), 1)[:, None]
        user = torch.from_numpy((parts.train @ item.numpy() / degree).astype(np.float32))
    return metrics.evaluate(user, item, parts.train, parts.valid, (20,))["recall@20"]


def pretrain(build, parts, lr, args):
    """Trains one method at one learning rate: (user or None, item, report) of the epoch with the best validation Recall@20."""
    torch.manual_seed(args.seed)
    started, model = time.time(), build()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    best, history = {"recall@20": -1.0}, []
    bar = tqdm(range(1, args.epochs + 1), desc=f"{args.method}, lr {lr:g}", unit="epoch")
    for epoch in bar:
        model.train()
        losses = []
        for batch in model.batches():
            loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if not np.isfinite(losses).all():
            raise data.InputError(f"the loss is not finite at epoch {epoch}; lower --lr (now {lr:g})")
        if epoch % args.eval_every and epoch < args.epochs:
            continue
        model.eval()
        with torch.no_grad():
            user, item = model.embed()
        recall = validate(user, item, parts)
        point = {"epoch": epoch, "loss": float(np.mean(losses)), "recall@20": recall}
        history.append(point)
        if recall is None or recall > best["recall@20"]:
            best, tables = point, (user, item)  # without validation the last
        bar.set_postfix({name: f"{value:.4f}" for name, value in point.items() if name != "epoch" and value is not None})
        if epoch - best["epoch"] >= args.patience:
            break
    bar.close()
    if not all(x.isfinite().all() for x in tables if x is not None):
        raise data.InputError(f"the tables are not finite at epoch {best['epoch']}; lower --lr (now {lr:g})")
    return *tables, {"lr": lr, **best, "epochs_run": epoch, "seconds": round(time.time() - started, 1), "history": history}


def build_method(args, parts, features, same_space):
    """() -> the method's module, or its tables where nothing is trained; InputError where the data has nothing for it."""
    train, method = parts.train, args.method
    if method == "random":
        return lambda: random(train, args.dim)
    views = unit_rows(features, "TV")
    if not views and method != "gcnp":
        raise data.InputError(f"this data has neither texts nor images: nothing for --method {method}; random, gcnp and mmcpr.py can "
                              "use it")
    x = F.normalize(torch.cat(list(views.values()), 1)) if views else None                # [n_items, sum d_m]
    if method == "clip":
        return lambda: (None, clip(list(views.values()), [v.any(1).float() for v in views.values()], same_space, args.dim))
    if method == "gcnp":
        user_x = unit_rows(features, "R").get("R")
        return lambda: GCNP(train, user_x, x, args.dim, args.batch, args.graph)
    if method in ("mmgcn", "pmgt"):
        return lambda: {"mmgcn": MMGCN, "pmgt": PMGT}[method](train, views, args.dim, args.batch)
    if method == "graphbert":
        return lambda: GraphBERT(train, x, known(list(views.values())), args.dim, args.batch)
    return lambda: GPTGNN(train, x, args.dim, args.batch)


def arguments():
    parser = argparse.ArgumentParser(description="Pre-train one of the systems of the paper's Table 2.", formatter_class=data.Help)
    parser.add_argument("--method", choices=("random", "clip", "mmgcn", "gptgnn", "graphbert", "pmgt", "gcnp"), required=True)
    parser.add_argument("--out", default="emb.npz", help="where the embeddings go")
    parser.add_argument("--modalities", choices=("TV", "T", "V"), default="TV", help="item features to use")
    parser.add_argument("--graph", choices=("knn", "cosine"), default="knn", help="GCN-P's: the 20 nearest, or all pairs")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2], help="tried in turn; validation chooses "
                        "(default: the paper's grid, 1e-4 1e-3 1e-2)")
    parser.add_argument("--dim", type=data.positive, default=64)
    parser.add_argument("--batch", type=data.positive, default=2048, help="items, users or interactions in a step")
    parser.add_argument("--epochs", type=data.positive, default=1000, help="at most")
    parser.add_argument("--patience", type=data.positive, default=100, help="epochs without a better validation Recall@20")
    parser.add_argument("--eval-every", type=data.positive, default=5, help="epochs between two validations")
    parser.add_argument("--seed", type=data.non_negative, default=0)
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    if not all(0 < lr < np.inf for lr in args.lr):
        raise data.InputError("--lr must be above 0 and finite")
    heads = HEADS.get(args.method, 1)
    if args.dim % heads:
        raise data.InputError(f"--dim {args.dim}: {args.method} has {heads} attention heads; choose a multiple of that")
    data.check_outputs(args.out)
    wanted = {"random": "", "gcnp": args.modalities + "R"}.get(args.method, args.modalities)
    dataset, parts, source = data.open_data(args, modalities=wanted)
    features = data.features(dataset, wanted, args.encoder, Path(source["data_dir"]), (args.clip_model, args.clip_weights))
    if "R" in features:
        features["R"] = data.pool_reviews(features["R"], dataset.users, dataset.n_users, parts.in_train)
    encoded = args.encoder == "clip" or (args.encoder == "auto" and not {"T", "V"} & set(dataset.ready) and dataset.name != "demo")
    name = args.method if args.method != "clip" or encoded else "text+image"
    torch.manual_seed(args.seed)
    build = build_method(args, parts, features, encoded)
    trials = []  # (user or None, item, report)

    def write():
        """The best trial so far, after each: what one learning rate found is not lost with the next. Returns its report."""
        user, item, report = max(trials, key=lambda trial: trial[2]["recall@20"] or 0)
        rms = lambda x: x.square().mean().sqrt().item()
        report = report | {"rms": {"item": rms(item)} | ({} if user is None else {"user": rms(user)}),
                           "trials": [{k: v for k, v in found.items() if k != "history"} for _, _, found in trials if "lr" in found]}
        meta = {"method": name, "data": source, "options": data.run_options(args, "out"), "report": report}
        data.save_embeddings(args.out, dataset, parts, None if user is None else user.numpy(), item.numpy(), meta)
        return report

    if args.method in ("random", "clip"):
        user, item = build()
        trials.append((user, item, {"recall@20": validate(user, item, parts)}))
        report = write()
    else:
        if len(args.lr) > 1 and not parts.valid.nnz:
            raise data.InputError("without validation nothing chooses among several learning rates; pass one: --lr 1e-3")
        diverged = []
        for lr in args.lr:
            try:
                trials.append(pretrain(build, parts, lr, args))
            except data.InputError as error:
                diverged.append(error)
                print(f"lr {lr:g}: {error}", flush=True)
                continue
            report, trial = write(), trials[-1][2]
            recall = "" if trial["recall@20"] is None else f", validation Recall@20 {trial['recall@20']:.4f}"
            print(f"lr {lr:g}: loss {trial['loss']:.4f}{recall} at epoch {trial['epoch']} of {trial['epochs_run']}, "
                  f"{trial['seconds']:.0f} s", flush=True)
        if not trials:
            raise diverged[-1]
    print(f"{name}: RMS of the entries: " + ", ".join(f"{side} {value:.3f}" for side, value in report["rms"].items()) +
          ("" if "user" in report["rms"] else "; no users"))
    print(f"wrote {args.out}; next: python finetune.py --init {args.out}")


if __name__ == "__main__":
    sys.exit(data.cli(main))
