"""The systems that the paper's Table 2 compares MMCPR with, each from its own paper.

    python -m paper.baselines --method pmgt        demo data: tries three learning rates
    python -m paper.baselines --method gcnp --data vg --lr 1e-3
    python -m paper.baselines --method clip --data path/to/folder --out clip.npz

Each writes <method>.npz, or --out. Then: python finetune.py --init pmgt.npz

    popular     how often each item is bought            users and items
    constant    every item the same random unit vector   items
    clip        text and image vectors, PCA              items
    mmgcn       MMGCN                                    users and items
    gptgnn      GPT-GNN                                  items
    graphbert   Graph-BERT                               items
    pmgt        PMGT                                     items
    gcnp        GCN-P                                    users and items

A method that is trained is a torch module with three functions:

    batches()      the batches of one epoch
    loss(batch)    a scalar
    embed()        (user [n_users, d] or None, item [n_items, d])

One trainer serves them all. Validation Recall@20 chooses the epoch, and the learning rate where
several are given. Methods see the training interactions and the items' features; GCN-P also sees
the users' features. An item without a modality has a row of zeros there.
"""
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
from tqdm import tqdm

import data
import diagnostics
import disk
import finetune
import mmcpr
import ops

CONTENT_FREE = ("popular", "constant")  # methods that read no features and learn nothing
UNTRAINED = (*CONTENT_FREE, "clip")     # methods that learn nothing
METHODS = (*UNTRAINED, "mmgcn", "gptgnn", "graphbert", "pmgt", "gcnp")
N_HEADS = {"gptgnn": 4, "graphbert": 2, "pmgt": 2}  # attention heads of the methods that have any


# --- What several methods share -----------------------------------------------------------

def unit_rows(features, modalities):
    """{modality: float32 [n, d_m]}, rows L2-normalised, missing ones 0."""
    views = {}
    for modality in modalities:
        if modality in features:
            x = torch.from_numpy(np.array(features[modality], np.float32))
            views[modality] = F.normalize(torch.nan_to_num(x))
    return views


def has_view(view):
    """bool [n, 1]: which items have this modality, view [n, d_m]."""
    return view.any(1, keepdim=True)


def feature_mask(views):
    """float [n, sum d_m]: 1 in the columns of a modality that the item has.

    Where the mask is 0 there is nothing to reconstruct.
    """
    masks = []
    for view in views:
        masks.append(has_view(view).float().expand_as(view))
    return torch.cat(masks, 1)


def item_graph(train, cap, block=4096):
    """The weighted item graph, CSR [n_items, n_items]: each item's `cap` heaviest edges.

    Items a and b that share c users are joined with the weight of PMGT:
        w = (ln c + 1) / (ln sqrt(deg_a deg_b) + 1)
    """
    n_items = train.shape[1]
    Rt = train.T.tocsr()
    degree = np.asarray(train.sum(0)).ravel()
    rows, cols, weights = [], [], []
    # A block of rows at a time: all pairs of items would not fit into memory.
    for start in range(0, n_items, block):
        n_shared = (Rt[start:start + block] @ train).tocoo()
        # An item shares all its users with itself: no self-loops.
        is_edge = n_shared.row + start != n_shared.col
        a = n_shared.row[is_edge] + start
        b = n_shared.col[is_edge]
        c = n_shared.data[is_edge]
        w = (np.log(c) + 1) / (np.log(np.sqrt(degree[a] * degree[b])) + 1)
        # Item by item, the heaviest edge first; of equal weights the lower index first.
        order = np.lexsort((b, -w, a))
        n_edges = np.bincount(a, minlength=n_items)
        begin = np.cumsum(n_edges) - n_edges
        place = np.arange(len(a), dtype=np.int64) - np.repeat(begin, n_edges)
        order = order[place < cap]
        rows.append(a[order])
        cols.append(b[order])
        weights.append(w[order])
    weight = np.concatenate(weights).astype(np.float32)
    entries = (weight, (np.concatenate(rows), np.concatenate(cols)))
    return sp.csr_matrix(entries, (n_items, n_items))


def undirected(graph):
    """Makes a graph symmetric: an edge that either of its two items has kept counts for both."""
    return graph.maximum(graph.T).tocsr()


def edge_list(graph):
    """(sender, receiver), int64 [e]: row n of a CSR matrix holds what node n receives from."""
    edges = graph.tocoo()
    return torch.from_numpy(edges.col).long(), torch.from_numpy(edges.row).long()


def draw_columns(matrix, rows):
    """One column of each row of a CSR matrix, drawn uniformly; rows int64 [b].

    Returns (columns int64 [b], has_any bool [b]); an empty row's column is 0.
    """
    begin = torch.from_numpy(matrix.indptr[rows.numpy()]).long()
    end = torch.from_numpy(matrix.indptr[rows.numpy() + 1]).long()
    # A row's columns are one stretch of matrix.indices; the position is drawn from it.
    position = begin + (torch.rand(len(rows)) * (end - begin)).long()
    has_any = end > begin
    columns = torch.zeros(len(rows), dtype=torch.int64)
    # The position drawn for an empty row lies in the next row: it must not be read.
    columns[has_any] = torch.from_numpy(matrix.indices[position[has_any].numpy()]).long()
    return columns, has_any


def are_neighbours(Rt, a, b):
    """Whether two items share a training user, as neighbours in G_i do, and an item with itself.

    Rt: CSR [n_items, n_users]; a int64 [n_a], b int64 [n_b] -> bool [n_a, n_b].
    """
    n_shared = (Rt[a.numpy()] @ Rt[b.numpy()].T).toarray()
    return torch.from_numpy(n_shared > 0)


class ItemMethod(nn.Module):
    """A method of items alone: an epoch is one pass over the items in batches."""

    def __init__(self, n_items, batch):
        super().__init__()
        self.n_items, self.batch = n_items, batch

    def batches(self):
        return torch.randperm(self.n_items).split(self.batch)


class InteractionMethod(nn.Module):
    """A method of users and items: an epoch is one pass over the training interactions.

    A batch, int64 [b], holds the indices of interactions.
    """

    def __init__(self, train, batch):
        super().__init__()
        self.batch = batch
        pairs = train.tocoo()
        self.train_users = torch.from_numpy(pairs.row).long()
        self.train_items = torch.from_numpy(pairs.col).long()
        self.sample_negatives = ops.NegativeSampler(train)

    def batches(self):
        return torch.randperm(len(self.train_users)).split(self.batch)

    def draw(self, batch):
        """(users, their items, one drawn item each that they do not have), int64 [b] each."""
        users = self.train_users[batch]
        return users, self.train_items[batch], self.sample_negatives(users, 1)[:, 0]


# --- What learns nothing ------------------------------------------------------------------

def popular(train, dim):
    """(user, item): for every user an item's score is its number of training interactions.

    This is no start to train from. It is the ranking by popularity, which any system should beat:
    finetune.py --layers 0 --epochs 0 tests the tables as they are.
    """
    user, item = finetune.popularity(train)
    return F.pad(user, (0, dim - 1)), F.pad(item, (0, dim - 1))


def constant(train, dim):
    """One random unit vector for every item, [n_items, dim]: a control that knows nothing.

    A pre-trained table has a common direction, which a random one lacks. Along it fine-tuning can
    express how popular an item is. This start has that direction and nothing else.
    """
    vector = F.normalize(torch.randn(dim), dim=0)
    return vector.repeat(train.shape[1], 1)


def clip(views, same_space, dim):
    """Item vectors without any learning, float32 [n_items, dim]; views: of text and image.

    Where text and image share a space (CLIP: Radford et al., ICML 2021), x is the mean of those
    that the item has; else x has the two side by side. x is centred, then reduced by PCA. An item
    with neither stays 0. Where x has fewer than dim columns, the other columns are 0.
    """
    n_views = sum(has_view(view).float() for view in views)                    # [n, 1]
    if same_space:
        x = sum(views) / n_views.clamp(min=1)                                  # [n, 512]
    else:
        x = torch.cat(views, 1)                                                # [n, sum d_m]
    has_any = n_views > 0
    center = x[has_any[:, 0]].mean(0)
    x = torch.where(has_any, x - center, 0)
    # The principal axes, in float64: squares of float32 lose half of the digits.
    eigenvalues, vectors = torch.linalg.eigh(x.double().T @ x.double())
    # eigh returns the eigenvalues in ascending order; the largest are wanted.
    components = vectors.flip(1)[:, :dim].float()
    x = x @ components
    return F.pad(x, (0, dim - x.shape[1]))


# --- MMGCN (Wei et al., MM 2019) ----------------------------------------------------------

class MMGCN(InteractionMethod):
    """One graph convolution per modality on the user-item graph, joined by an id embedding.

    Per modality, from x = L2norm([user preference; MLP(features)]), three times:
        h  = LeakyReLU(mean over neighbours of W1 x)
        x^ = LeakyReLU(W2 x + b2) + id
        x  = LeakyReLU(W3 [h || x^] + b3)
    All modalities share id. The representation is the sum over modalities. BPR, one uniform
    negative.

    Where the paper and the authors' code differ, this follows the paper: it sums over modalities
    (the code takes the mean), and it trains id and preferences (in the code they are plain
    tensors that Adam never sees). Ours: every modality goes through a linear layer as wide as its
    features, but at most 256 (theirs: only the visual one, 256 wide); the first convolution leads
    from there to dim (theirs: as wide as its input); the penalty is on the ids of users and
    positives and on all preferences (theirs: negatives too, and only the visual ones).
    """

    def __init__(self, train, views, dim, batch, n_layers=3, width=256, reg=1e-5):
        super().__init__(train, batch)
        n_users, n_items = train.shape
        self.n_users, self.reg, self.views = n_users, reg, views
        # Users, then items, joined by the training interactions.
        A = ops.bipartite_adjacency(train)
        degree = np.maximum(np.asarray(A.sum(1)), 1).astype(np.float32)
        self.A = ops.sparse_tensor(A)
        self.inverse_degree = 1 / torch.from_numpy(degree).view(-1, 1)         # [n, 1]
        self.id = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_users + n_items, dim)))
        self.mlp = nn.ModuleDict()
        self.preference = nn.ParameterDict()
        self.layers = nn.ModuleDict()
        for modality, view in views.items():
            d = min(width, view.shape[1])
            self.mlp[modality] = nn.Linear(view.shape[1], d)
            # Users have no features: a trained row stands for them, one per modality.
            preference = nn.init.xavier_uniform_(torch.empty(n_users, d))
            self.preference[modality] = nn.Parameter(preference)
            self.layers[modality] = nn.ModuleList()
            for layer in range(n_layers):
                d_in = d if layer == 0 else dim
                W1 = nn.Linear(d_in, dim, bias=False)
                W2 = nn.Linear(d_in, dim)
                W3 = nn.Linear(2 * dim, dim)
                self.layers[modality].append(nn.ModuleList([W1, W2, W3]))

    def adjacency(self, x):
        return ops.sparse_product(self.A, x)

    def neighbour_mean(self, x):
        return ops.Propagate.apply(x, self.adjacency, self.inverse_degree)

    def forward(self):
        """(user [n_users, dim], item [n_items, dim])."""
        total = 0
        for modality, view in self.views.items():
            # Without the modality the row stays 0, whatever the bias of the linear layer.
            item = self.mlp[modality](view) * has_view(view)
            x = F.normalize(torch.cat([self.preference[modality], item]))      # [n, d]
            for W1, W2, W3 in self.layers[modality]:
                h = F.leaky_relu(self.neighbour_mean(W1(x)))
                itself = F.leaky_relu(W2(x)) + self.id
                x = F.leaky_relu(W3(torch.cat([h, itself], 1)))                # [n, dim]
            total = total + x
        return total[:self.n_users], total[self.n_users:]

    def loss(self, batch):
        """BPR and the penalty of the batch."""
        users, pos_items, neg_items = self.draw(batch)
        # One forward pass over the whole graph for every batch.
        user, item = self()
        gap = (user[users] * (item[neg_items] - item[pos_items])).sum(1)
        bpr = F.softplus(gap).mean()
        # The penalty is on the trained tables, not on the vectors that forward makes of them.
        id_user = self.id[users].square()
        id_item = self.id[self.n_users + pos_items].square()
        id_size = (id_user + id_item).mean()
        preference_size = sum(p.square().mean() for p in self.preference.values())
        return bpr + self.reg * (id_size + preference_size)

    def embed(self):
        return self()


# --- GPT-GNN (Hu et al., KDD 2020) --------------------------------------------------------

class HGTLayer(nn.Module):
    """Heterogeneous graph transformer (Hu et al., WWW 2020), one type of node and of edge.

    Per head:
        a_ij = softmax_j(q_i . (A k_j) p / sqrt(d_k))
        o_i  = sum_j a_ij M v_j
        h'   = s W gelu(o) + (1 - s) h,    s = sigmoid(skip)
    """

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads, width = n_heads, dim // n_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_heads, width, width)))
        self.M = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_heads, width, width)))
        self.p = nn.Parameter(torch.ones(n_heads))
        self.skip = nn.Parameter(torch.ones(1))

    def split_heads(self, x):
        """[n, d] -> [n, H, d/H]."""
        return x.view(len(x), self.n_heads, -1)

    def forward(self, h, sender, receiver):
        """h [n, d]; edge e carries a message from node sender[e] to node receiver[e]."""
        q = self.split_heads(self.q(h))                                        # [n, H, d/H]
        # A and M have one matrix per head; with several types of edges each type has its own.
        k = torch.einsum("nhd,hde->nhe", self.split_heads(self.k(h)), self.A)
        v = torch.einsum("nhd,hde->nhe", self.split_heads(self.v(h)), self.M)
        score = (q[receiver] * k[sender]).sum(2) * self.p / q.shape[2] ** 0.5  # [e, H]
        # The softmax over a node's incoming edges. Their largest score is subtracted, so that
        # exp does not overflow.
        index = receiver[:, None].expand_as(score)
        highest = torch.full((len(h), self.n_heads), -torch.inf)
        highest = highest.scatter_reduce(0, index, score.detach(), "amax")     # [n, H]
        weight = (score - highest[receiver]).exp()
        total = torch.zeros(len(h), self.n_heads).index_add(0, receiver, weight)
        attention = weight / total[receiver]                                   # [e, H]
        message = attention[:, :, None] * v[sender]                            # [e, H, d/H]
        o = torch.zeros_like(q).index_add(0, receiver, message).flatten(1)     # [n, d]
        # A trained gate mixes what a node receives with what it was. It replaces self-loops.
        s = torch.sigmoid(self.skip)
        return s * self.out(F.gelu(o)) + (1 - s) * h


class GPTGNN(ItemMethod):
    """Generative pre-training on the item graph: generates a node's attributes and held-out edges.

    Half of the edges at a batch's targets are held out.

    Attributes: every target has a copy, whose input is one learned vector. The copy receives from
    the target's observed neighbours and sends nothing. Its output generates the attributes:
        L_attr = -cosine / 0.1
    Edges: the target itself keeps its attributes. Each of its held-out neighbours must score
    above negatives. These are 255 items drawn from the step's and a queue of the 256 that were
    drawn last in earlier steps. Epoch e uses the newest e / 20 of the queue, from the 20th on all:
        L_edge = -log softmax(cosine / 0.1)
    An item that shares a training user with the target is no negative, even if their edge was not
    kept. L = (L_edge + L_attr) / 2. Both see directions alone, so unit rows are handed over.

    Not as the authors: each item keeps its 16 heaviest edges; the nodes of a step are the targets
    and `fan` drawn neighbours of each, not depth-6 HGSampling; all targets of a step share the
    negatives and the queue, and a target that has all of these as neighbours adds 0 to L_edge;
    where one batch holds all items, 20 epochs are 20 steps (theirs have 256 targets each); a
    held-out edge of two targets is predicted from both ends (theirs: from one); the generator
    drops entries of its input (theirs: of its output); four heads; no learning rate cycle, no
    clipping.
    """

    def __init__(self, train, x, dim, batch, n_layers=3, n_heads=N_HEADS["gptgnn"], cap=16,
                 fan=4, dropout=0.2, queue_size=256):
        super().__init__(len(x), batch)
        self.graph = undirected(item_graph(train, cap))
        self.Rt = train.T.tocsr()
        self.x, self.fan, self.queue_size, self.epoch = x, fan, queue_size, 0
        self.project = nn.Linear(x.shape[1], dim)
        self.drop = nn.Dropout(dropout)
        # A copy's input, in place of the attributes it must generate; it starts at their mean.
        self.copy_input = nn.Parameter(x.mean(0))
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            self.layers.append(HGTLayer(dim, n_heads))
        self.attribute = nn.Linear(dim, x.shape[1])
        self.edge = nn.Linear(dim, dim)
        self.queue = torch.empty(0, dim)
        self.queue_items = torch.empty(0, dtype=torch.int64)

    def encode(self, x, sender, receiver):
        """x [n, d_x] -> h [n, dim]."""
        h = self.drop(torch.tanh(self.project(x)))
        for layer in self.layers:
            h = self.drop(layer(h, sender, receiver))
        return h

    def batches(self):
        self.epoch += 1
        return super().batches()

    def draw_subgraph(self, targets):
        """(nodes, sender, receiver), int64: the targets come first; edges are places in nodes."""
        drawn = []
        for _ in range(self.fan):
            columns, has_any = draw_columns(self.graph, targets)
            drawn.append(columns[has_any])
        # A drawn neighbour that is a target itself is among the nodes already.
        others = np.setdiff1d(torch.cat(drawn).numpy(), targets.numpy())
        nodes = torch.cat([targets, torch.from_numpy(others)])
        sender, receiver = edge_list(self.graph[nodes.numpy()][:, nodes.numpy()])
        return nodes, sender, receiver

    def hold_out(self, sender, receiver, n_nodes, n_targets):
        """bool [e]: half of the undirected edges at targets, each in both directions."""
        # An edge stands in the list twice, once in each direction. Both get the same number,
        # and so the same draw.
        low = torch.minimum(sender, receiver)
        high = torch.maximum(sender, receiver)
        _, edge = torch.unique(low * n_nodes + high, return_inverse=True)
        n_edges = int(edge.max()) + 1 if len(edge) else 0
        is_drawn = torch.rand(n_edges) < 0.5
        return is_drawn[edge] & (low < n_targets)

    def loss(self, targets):
        nodes, sender, receiver = self.draw_subgraph(targets)
        n, b = len(nodes), len(targets)
        is_held_out = self.hold_out(sender, receiver, n, b)
        # The encoder sees the observed edges only. Those into targets are there once more, as
        # edges into the targets' copies. A copy's number is its target's plus n.
        s, r = sender[~is_held_out], receiver[~is_held_out]
        to_copy = r < b
        x = torch.cat([self.x[nodes], self.copy_input.expand(b, -1)])          # [n + b, d_x]
        s, r = torch.cat([s, s[to_copy]]), torch.cat([r, r[to_copy] + n])
        h = self.encode(x, s, r)
        l_attr = self.attribute_loss(h[n:], targets)
        # The edges to predict: a held-out edge counts once for each of its ends that is a
        # target.
        is_positive = is_held_out & (receiver < b)
        # As in the authors' code: of so few edges there is no edge loss.
        if is_positive.sum() <= 8:
            return l_attr / 2
        l_edge = self.edge_loss(h[:n], nodes, sender[is_positive], receiver[is_positive], b)
        return (l_edge + l_attr) / 2

    def attribute_loss(self, h, targets):
        """h [b, dim]: what the encoder made of the targets' copies."""
        generated = self.attribute(self.drop(h))
        return -F.cosine_similarity(generated, self.x[targets], dim=1).mean() / 0.1

    def edge_loss(self, h, nodes, sender, receiver, b):
        """h [n, dim], nodes int64 [n]: the step's items, the b targets first.

        sender, receiver int64 [e]: the held-out edges, from a node to a target.
        """
        q = F.normalize(self.drop(self.edge(h[:b])))                           # [b, d]
        k = F.normalize(h)                                                     # [n, d]
        drawn = torch.randperm(len(h))[:255]
        length = int(self.queue_size * min(1, self.epoch / 20))
        items = torch.cat([nodes[drawn], self.queue_items[:length]])
        negative = q @ torch.cat([k[drawn], self.queue[:length]]).T / 0.1      # [b, 255 + length]
        # exp(-inf) = 0: a neighbour is not in the sum below.
        is_near = are_neighbours(self.Rt, nodes[:b], items)
        rest = negative.masked_fill(is_near, -torch.inf).logsumexp(1)          # [b]
        score = (q[receiver] * k[sender]).sum(1) / 0.1
        # The newest in front; the oldest fall out.
        self.queue = torch.cat([k[drawn].detach(), self.queue])[:self.queue_size]
        self.queue_items = torch.cat([nodes[drawn], self.queue_items])[:self.queue_size]
        return (torch.logaddexp(score, rest[receiver]) - score).mean()

    def embed(self):
        sender, receiver = edge_list(self.graph)
        return None, F.normalize(self.encode(self.x, sender, receiver))


# --- Graph-BERT (Zhang et al., arXiv 2001.05140) ------------------------------------------

def intimacy(graph, k, alpha=0.15, n_steps=20, block=512):
    """Each item's k most intimate items: (indices int64 [n, k], S float32 [n, k]).

    S = alpha (I - (1 - alpha) A D^-1)^-1 is personalised PageRank; graph: CoInteractionGraph of
    the items. Row i of S is the limit of
        p <- alpha e_i + (1 - alpha) D^-1 A p
    so a block of rows takes n_steps sparse products, and S is never whole in memory.
    """
    n = len(graph.inverse_degree)
    k = min(k, n - 1)
    indices, values = [], []
    for start in tqdm(range(0, n, block), desc="intimacy", unit="block"):
        rows = torch.arange(start, min(start + block, n))
        e = torch.zeros(n, len(rows))
        e[rows, rows - start] = 1
        p = e
        for _ in range(n_steps):
            p = alpha * e + (1 - alpha) * graph.inverse_degree * graph.adjacency(p)  # [n, b]
        # Put last, an item fills only those places of its context for which it reaches no other.
        p[rows, rows - start] = -1
        top = p.T.topk(k)
        indices.append(torch.where(top.values > 0, top.indices, rows[:, None]))
        values.append(top.values)
    return torch.cat(indices), torch.cat(values)


def sinusoid(code, dim):
    """The fixed position embedding (Vaswani et al., 2017): codes [...] -> [..., dim]."""
    angle = code[..., None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :dim]


CODE_RMS = 0.02  # the root mean square of each of a token's codes


class GraphBERT(ItemMethod):
    """A transformer over linkless subgraphs: an item and the k items most intimate with it.

    A token is W x plus the sinusoids of three codes: its Weisfeiler-Lehman role, its rank by
    intimacy (the item itself: 0) and its hops. Each sinusoid is scaled to a root mean square of
    .02. (The authors' code learns tables in their place, which start at that scale.) At their own
    scale, .71, the sinusoids drown the contents. Every layer adds the residual W_r x_i of the
    item ("raw"). z_i is the mean over the tokens. Two losses:
        the item's features, from z_i                squared error
        structure                                    (cos(z_i, z_j) - S_ij)^2
    S's entries are tiny, so each row of S is scaled to a largest entry of 1. Each item is compared
    with one drawn context item and one random item, whose S_ij counts as 0.

    The role is the colour after one refinement, the degree: in graphs this dense a second one
    would tell all items apart. Hops are 0, 1, and 2 for anything farther. Not as the authors: the
    residual is there in pre-training too, dropout is 0.3 throughout (theirs: 0.5 outside of
    attention), batches instead of all items at once; one training has both losses (theirs: one
    each), the features' summed over the columns (theirs: the mean); linear maps start as torch
    has them.
    """

    def __init__(self, train, x, mask, dim, batch, k=7, n_layers=2,
                 n_heads=N_HEADS["graphbert"], dropout=0.3):
        """x float [n, d_x]; mask float [n, d_x]: 1 where x is to be reconstructed."""
        super().__init__(len(x), batch)
        self.x, self.mask = x, mask
        R = train.T.tocsr()
        graph = ops.CoInteractionGraph(R)
        self.context, S = intimacy(graph, k)                                   # [n, k] each
        # The largest stands in front, so a row's largest becomes 1.
        self.closeness = S / S[:, :1].clamp(min=1e-12)
        itself = torch.arange(len(x))[:, None]
        self.tokens = torch.cat([itself, self.context], 1)                     # [n, k+1]
        self.codes = self.token_codes(R, graph, dim)                           # [n, k+1, dim]
        self.embed_x = nn.Linear(x.shape[1], dim)
        self.residual = nn.Linear(x.shape[1], dim)
        self.attribute = nn.Linear(dim, x.shape[1])
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            layer = nn.TransformerEncoderLayer(dim, n_heads, dim, dropout, F.gelu,
                                               batch_first=True)
            self.layers.append(layer)

    def token_codes(self, R, graph, dim):
        """The scaled sinusoids of role, rank and hops, summed; R: CSR [n_items, n_users]."""
        hops = torch.zeros_like(self.tokens)
        for place in range(1, self.tokens.shape[1]):
            other = self.tokens[:, place]
            # Items that share a user are neighbours; any other is farther than one hop.
            n_shared = np.asarray(R.multiply(R[other.numpy()]).sum(1)).ravel()
            hops[:, place] = torch.from_numpy(np.where(n_shared > 0, 1, 2))
        hops[self.tokens == self.tokens[:, :1]] = 0
        degree = graph.inverse_degree.reciprocal().nan_to_num(posinf=0)        # [n, 1]
        role = degree[self.tokens, 0]                                          # [n, k+1]
        rank = torch.arange(self.tokens.shape[1])
        total = sinusoid(role, dim) + sinusoid(rank, dim) + sinusoid(hops, dim)
        # sin^2 + cos^2 = 1: a sinusoid's root mean square is sqrt(1/2), whatever the code.
        return CODE_RMS / 0.5 ** 0.5 * total

    def encode(self, rows):
        """rows int64 [b] -> z [b, dim]."""
        # An item stands in many tokens: it is projected once.
        items, place = self.tokens[rows].unique(return_inverse=True)           # [u], [b, k+1]
        tokens = self.embed_x(self.x[items])[place] + self.codes[rows]         # [b, k+1, dim]
        # The item itself is its first token.
        residual = self.residual(self.x[items])[place[:, :1]]                  # [b, 1, dim]
        h = self.drop(self.norm(tokens))
        for layer in self.layers:
            h = layer(h) + residual
        return h.mean(1)

    def draw_pairs(self, rows):
        """(a context item of each row, its closeness, a random other item), [b] each."""
        place = torch.randint(self.context.shape[1], (len(rows),))
        shift = torch.randint(1, self.n_items, (len(rows),))
        far = (rows + shift) % self.n_items
        return self.context[rows, place], self.closeness[rows, place], far

    def loss(self, rows):
        near, closeness, far = self.draw_pairs(rows)
        # An item that was drawn more than once is encoded once.
        items, place = torch.cat([rows, near, far]).unique(return_inverse=True)
        z, z_near, z_far = self.encode(items)[place].chunk(3)                  # [b, dim] each
        # The mask leaves out the features that an item does not have.
        error = (self.attribute(z) - self.x[rows]).square() * self.mask[rows]
        attributes = error.sum(1).mean()
        # Where an item reaches fewer than k others, it fills the other places itself: no pair.
        is_pair = near != rows
        # Near pairs should be as similar as they are intimate, random ones not at all.
        gap = F.cosine_similarity(z, z_near) - closeness
        structure_near = gap.square()[is_pair].sum() / is_pair.sum().clamp(min=1)
        structure_far = F.cosine_similarity(z, z_far).square().mean()
        return attributes + (structure_near + structure_far)

    def embed(self):
        z = []
        for rows in torch.arange(self.n_items).split(self.batch):
            z.append(self.encode(rows))
        return None, torch.cat(z)


# --- PMGT (Liu et al., MM 2021) -----------------------------------------------------------

def walk(graph, nodes, rng):
    """One neighbour of each node, in proportion to the edges' weights; nodes int64 [n].

    graph: weighted CSR [n_items, n_items]. A node without neighbours stays where it is.
    """
    if not graph.nnz:
        return nodes
    # All edges' weights laid end to end: a node's edges are one stretch of that line.
    line = np.concatenate([[0], np.cumsum(graph.data, dtype=np.float64)])
    begin = line[graph.indptr[nodes]]
    length = line[graph.indptr[nodes + 1]] - begin
    point = begin + rng.random(len(nodes)) * length
    edge = np.searchsorted(line, point, side="right") - 1
    # Rounding may put a point beside its stretch.
    last_edge = np.maximum(graph.indptr[nodes + 1] - 1, 0)
    edge = edge.clip(graph.indptr[nodes], last_edge)
    neighbour = graph.indices[edge.clip(max=graph.nnz - 1)]
    return np.where(length > 0, neighbour, nodes)


def mcn_sampling(graph, rng, sizes=(10, 5, 2), k=10):
    """Each item's k contextual neighbours, best in front, int64 [n, k] (MCNSampling).

    Hop h = 1, 2, ... draws sizes[h - 1] neighbours of every node that hop h - 1 drew, with
    replacement, in proportion to the edges' weights; hop 0 is the item itself. A node scores
    (number of hops - h + 1) whenever hop h draws it. Lists that stay short are repeated; an item
    without neighbours is its own context.
    graph: weighted CSR [n, n].
    """
    n = graph.shape[0]
    reached = np.arange(n, dtype=np.int64)[:, None]                                # [n, drawn]
    keys, points = [], []
    for hop, size in enumerate(sizes):
        nodes = reached.repeat(size)  # all of an item's draws side by side
        reached = walk(graph, nodes, rng).reshape(n, -1)
        # A pair as one number, item * n + node, so that equal pairs can be counted.
        keys.append((np.arange(n, dtype=np.int64)[:, None] * n + reached).ravel())
        points.append(np.full(reached.size, len(sizes) - hop))
    # The score of each pair (item, node), added up over the draws.
    key, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    score = np.bincount(inverse, weights=np.concatenate(points))
    item, node = np.divmod(key, n)
    is_other = node != item
    item, node, score = item[is_other], node[is_other], score[is_other]
    # Item by item, best node in front, ties at random.
    order = np.lexsort((rng.random(len(item)), -score, item))
    node = node[order]
    length = np.bincount(item, minlength=n)
    begin = np.cumsum(length) - length
    # A list that is short starts again from its front.
    context = np.arange(n, dtype=np.int64)[:, None].repeat(k, 1)
    has_any = np.flatnonzero(length)
    place = np.arange(k) % length[has_any][:, None]
    context[has_any] = node[begin[has_any][:, None] + place]
    return torch.from_numpy(context)


class DiverseLayer(nn.Module):
    """A transformer layer whose attention also prefers tokens unlike the query. Per head:

        A = (1 - beta) softmax(Q K^T / sqrt(d)) + beta softmax(1 - cos(E, E) + I),  E = W_E H
    """

    def __init__(self, dim, n_heads, beta):
        super().__init__()
        self.n_heads, self.beta = n_heads, beta
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.e = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def split_heads(self, x):
        """[b, t, d] -> [b, H, t, d/H]."""
        return x.view(x.shape[0], x.shape[1], self.n_heads, -1).transpose(1, 2)

    def attention(self, h):
        """h [b, t, d] -> [b, H, t, t]."""
        q = self.split_heads(self.q(h))
        k = self.split_heads(self.k(h))
        e = F.normalize(self.split_heads(self.e(h)), dim=3)
        # Standard attention, and its opposite, which is large where tokens differ. A token
        # differs from itself by 0; adding I makes that 1.
        alike = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        unlike = 1 - e @ e.transpose(2, 3) + torch.eye(h.shape[1])
        return (1 - self.beta) * alike.softmax(3) + self.beta * unlike.softmax(3)

    def forward(self, h):
        v = self.split_heads(self.v(h))
        message = (self.attention(h) @ v).transpose(1, 2).flatten(2)           # [b, t, d]
        h = self.norm1(h + self.out(message))
        return self.norm2(h + self.ffn(h))


class PMGT(ItemMethod):
    """Pre-training graph transformer: an item and its sampled context, in order of score.

    A token is the gated sum of the item's projected modalities, g = softmax(W tanh([m1 || m2])),
    plus position and role. The vector of an item is a linear map of its own token's output. The
    first loss is the binary cross-entropy of its cosine to a drawn neighbour (label 1) and to a
    random item (label 0). The second predicts the input features of masked context items from
    their tokens' outputs. 20 % are masked; of these 80 % become the mask vector, 10 % another item.

    Positions and roles start normal with standard deviation .01, so that they do not drown the
    contents; projections and gate start Xavier-uniform, their biases at 0. Both choices are the
    authors'.

    Not as the authors: the other linear maps start as torch has them (theirs: as positions); the
    graph is MMCPR's G_i, with each item's 64 heaviest edges (theirs: edges of three shared users
    or more); an item is not in its own context; the mask vector is learned; only the contexts of
    the batch's own items are masked, and not for the first loss (theirs: for both); the
    feed-forward layers are dim wide (theirs: half of it); the features are unit rows, and their
    squared errors are summed over the columns (theirs: raw features, the mean); no warm-up, no
    falling rate, no clipping. The first loss is the paper's, on cosines alone (their code stacks
    norms too).
    """

    def __init__(self, train, views, dim, batch, n_layers=2, n_heads=N_HEADS["pmgt"], beta=0.2,
                 k=10, masked_share=0.2, cap=64):
        super().__init__(train.shape[1], batch)
        self.graph = undirected(item_graph(train, cap))
        self.R = train.T.tocsr()
        self.k, self.masked_share = k, masked_share
        # numpy draws the contexts; its seed is the one that torch was given.
        self.rng = np.random.default_rng(torch.initial_seed())
        self.views = list(views.values())
        self.present = torch.cat([has_view(view) for view in self.views], 1)   # [n, M]
        self.x = torch.cat(self.views, 1)                                      # [n, sum d_m]
        self.mask = feature_mask(self.views)                                   # [n, sum d_m]
        self.project = nn.ModuleList()
        for view in self.views:
            self.project.append(nn.Linear(view.shape[1], dim))
        self.gate = nn.Linear(len(self.views) * dim, len(self.views))
        for linear in (*self.project, self.gate):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.mask_vector = nn.Parameter(0.01 * torch.randn(dim))
        self.position = nn.Parameter(0.01 * torch.randn(k + 1, dim))
        # Row 0 is for the item itself, row 1 for its context.
        self.role = nn.Parameter(0.01 * torch.randn(2, dim))
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            self.layers.append(DiverseLayer(dim, n_heads, beta))
        self.pool = nn.Linear(dim, dim)
        self.feature = nn.Linear(dim, self.x.shape[1])
        self.context = mcn_sampling(self.graph, self.rng, k=k)

    def fuse(self, tokens):
        """The gated sum of the modalities, tokens int64 [...] -> [..., dim]."""
        # An item stands in many tokens: it is projected once.
        items, place = tokens.unique(return_inverse=True)                      # [u], [...]
        projected = []
        for W, view in zip(self.project, self.views):
            projected.append(W(view[items]))
        m = torch.stack(projected, 1)                                          # [u, M, dim]
        logits = self.gate(torch.tanh(m.flatten(1)))                           # [u, M]
        # A missing modality gets gate 0. Where all are missing no logit is masked, as a softmax
        # over -inf alone is NaN; the product makes these gates 0.
        present = self.present[items]
        hidden = ~present & present.any(-1, keepdim=True)
        g = logits.masked_fill(hidden, -torch.inf).softmax(-1) * present
        return (g[..., None] * m).sum(1)[place]

    def transform(self, h):
        """The transformer, fused tokens [b, k+1, dim] -> [b, k+1, dim]."""
        role = torch.ones(self.k + 1, dtype=torch.int64)
        role[0] = 0
        h = self.norm(h + self.position + self.role[role])
        for layer in self.layers:
            h = layer(h)
        return h

    def context_of(self, rows):
        """The items of the tokens, rows int64 [b] -> [b, k+1]: the item itself, its context."""
        return torch.cat([rows[:, None], self.context[rows]], 1)

    def encode(self, rows):
        """rows int64 [b] -> (tokens' outputs [b, k+1, dim], items of the tokens [b, k+1])."""
        items = self.context_of(rows)
        return self.transform(self.fuse(items)), items

    def encode_masked(self, rows):
        """The same with some context items masked, and which these are: bool [b, k+1]."""
        items = self.context_of(rows)
        n_masked = max(1, round(self.masked_share * self.k))
        is_masked = torch.zeros_like(items, dtype=torch.bool)
        # n_masked items of each context, at random places, but never the item itself.
        is_masked[:, 1:] = torch.rand(len(rows), self.k).argsort(1) < n_masked
        dice = torch.rand(items.shape)
        # Of ten masked items eight become the mask vector, one another item, one stays.
        strangers = torch.randint(self.n_items, items.shape)
        h = self.fuse(torch.where(is_masked & (dice > 0.9), strangers, items))
        is_vector = is_masked & (dice < 0.8)
        h = torch.where(is_vector[:, :, None], self.mask_vector, h)
        return self.transform(h), items, is_masked

    def batches(self):
        # New contexts for every epoch.
        self.context = mcn_sampling(self.graph, self.rng, k=self.k)
        return super().batches()

    def loss(self, rows):
        return self.structure_loss(rows) + self.feature_loss(rows)

    def draw_pairs(self, rows):
        """(a neighbour of each row, does it count, a random item, does it count), [b] each."""
        near, has_near = draw_columns(self.graph, rows)
        far = torch.randint(self.n_items, (len(rows),))
        n_shared = self.R[rows.numpy()].multiply(self.R[far.numpy()]).sum(1)
        # A random item that happens to be a neighbour, or the item itself, is no negative.
        is_linked = torch.from_numpy(np.asarray(n_shared).ravel() > 0) | (far == rows)
        return near, has_near, far, ~is_linked

    def structure_loss(self, rows):
        """Binary cross-entropy of cosines: to a neighbour, to an item that shares no user."""
        near, has_near, far, is_far = self.draw_pairs(rows)
        # An item that was drawn more than once is encoded once.
        items, place = torch.cat([rows, near, far]).unique(return_inverse=True)
        h, _ = self.encode(items)
        z, z_near, z_far = self.pool(h[:, 0])[place].chunk(3)                  # [b, dim] each
        score_near = F.cosine_similarity(z, z_near)[has_near]
        score_far = F.cosine_similarity(z, z_far)[is_far]
        score = torch.cat([score_near, score_far])
        if not len(score):
            return 0
        label = torch.arange(len(score)) < len(score_near)  # the near ones come first
        return F.binary_cross_entropy_with_logits(score, label.float())

    def feature_loss(self, rows):
        """The squared error of the masked items' features, where they have them."""
        h, items, is_masked = self.encode_masked(rows)
        masked_items = items[is_masked]
        error = (self.feature(h[is_masked]) - self.x[masked_items]).square()
        return (error * self.mask[masked_items]).sum(1).mean()

    def embed(self):
        z = []
        for rows in torch.arange(self.n_items).split(self.batch):
            h, _ = self.encode(rows)
            z.append(self.pool(h[:, 0]))
        return None, F.normalize(torch.cat(z))


# --- GCN-P (Meng et al., TOIS 2022, arXiv 2107.03936) -------------------------------------

def nearest_neighbours(x, k, chunk=1024):
    """The k most similar rows of each row by cosine, x float [n, d] with unit rows.

    CSR [n, n] of the cosines above 0, no self-loops.
    """
    n = len(x)
    rows, cols, values = [], [], []
    for start in range(0, n, chunk):
        s = x[start:start + chunk] @ x.T                                       # [c, n]
        # An item is not its own neighbour.
        s.diagonal(start).fill_(-1)
        value, col = s.topk(min(k, n - 1))
        row = torch.arange(start, start + len(s))[:, None].expand_as(col)
        # A negative cosine is no similarity.
        is_kept = value > 0
        rows.append(row[is_kept])
        cols.append(col[is_kept])
        values.append(value[is_kept])
    row, col, value = torch.cat(rows), torch.cat(cols), torch.cat(values)
    return sp.csr_matrix((value.numpy(), (row.numpy(), col.numpy())), (n, n))


class SparseProduct(torch.autograd.Function):
    """x -> P x for a P that is not symmetric: the gradient is P^T g."""

    @staticmethod
    def forward(ctx, x, P, Pt):
        ctx.Pt = Pt
        return ops.sparse_product(P, x)

    @staticmethod
    def backward(ctx, g):
        return ops.sparse_product(ctx.Pt, g.contiguous()), None, None


class NeighbourGraph:
    """H -> D^-1 S H for a sparse S, CSR [n, n]; a row of S that is empty gives 0."""

    def __init__(self, S):
        degree = np.asarray(S.sum(1)).ravel()
        inverse = sp.diags_array(1 / np.where(degree > 0, degree, 1))
        P = (inverse @ S).astype(np.float32).tocsr()
        self.P = ops.sparse_tensor(P)
        self.Pt = ops.sparse_tensor(P.T.tocsr())

    def __call__(self, h):
        return SparseProduct.apply(h, self.P, self.Pt)


class GCNP(InteractionMethod):
    """Two graph convolutional networks, of users and of items, joined by their interactions.

    Per side, three layers from a trained table:
        H^(l+1) = L2norm(tanh((D^-1 S + I) H^(l) W + b))
    S: each node's cosines to the 20 nodes nearest by side information (the authors: to all nodes;
    among CLIP's vectors all pairs are alike). A side without features uses its co-interaction
    graph.

    Loss: BCE of sigmoid(u . i + b_u + b_i), one uniform negative per positive. The outputs are
    handed over, without the biases (the authors' code hands over the tables that the convolutions
    start from).

    Not as the authors: a batch holds interactions, each once in an epoch (theirs: as many steps,
    but a step draws users uniformly and one interaction of each); all layers are 64 wide (theirs:
    128, above tables of 64); no penalty on the outputs, which are unit vectors.
    """

    def __init__(self, train, user_x, item_x, dim, batch, n_layers=3, k=20):
        """user_x, item_x: float [n, d] with unit rows, or None."""
        super().__init__(train, batch)
        self.graphs = []
        self.tables = nn.ParameterList()
        self.layers = nn.ModuleList()
        self.biases = nn.ParameterList()
        # Users, then items.
        for x, R in ((user_x, train), (item_x, train.T.tocsr())):
            if x is None:
                self.graphs.append(ops.CoInteractionGraph(R))
            else:
                self.graphs.append(NeighbourGraph(nearest_neighbours(x, k)))
            # Uniform between -0.1 / sqrt(dim) and 0.1 / sqrt(dim), as the authors draw them.
            uniform = 2 * torch.rand(R.shape[0], dim) - 1
            self.tables.append(nn.Parameter(uniform * 0.1 / dim ** 0.5))
            self.layers.append(nn.ModuleList())
            for _ in range(n_layers):
                self.layers[-1].append(nn.Linear(dim, dim))
            self.biases.append(nn.Parameter(torch.zeros(R.shape[0])))

    def scores(self, user, item, users, items):
        """float [b]: the scores of the pairs (users, items), int64 [b] each."""
        bias = self.biases
        return (user[users] * item[items]).sum(1) + bias[0][users] + bias[1][items]

    def loss(self, batch):
        users, pos_items, neg_items = self.draw(batch)
        # One forward pass over both graphs for every batch.
        user, item = self.embed()
        # -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s).
        pos_scores = self.scores(user, item, users, pos_items)
        neg_scores = self.scores(user, item, users, neg_items)
        return (F.softplus(-pos_scores) + F.softplus(neg_scores)).mean()

    def embed(self):
        user = self.convolve(0)
        item = self.convolve(1)
        return user, item

    def convolve(self, side):
        """The output of one side's network, [n, dim]; side: 0 for users, 1 for items."""
        graph, h = self.graphs[side], self.tables[side]
        for layer in self.layers[side]:
            h = F.normalize(torch.tanh(layer(graph(h) + h)))
        return h


# --- Training, the same for all -----------------------------------------------------------

# The authors' weight decay, on all parameters: AdamW's is apart from the gradient, Adam's is a
# part of it. (PMGT's code leaves out biases and norms.) MMGCN has a penalty in its loss instead.
# GCN-P's penalty is on unit vectors, where it is a constant.
OPTIMIZERS = {
    "gptgnn": (torch.optim.AdamW, 1e-2),
    "graphbert": (torch.optim.Adam, 5e-4),
    "pmgt": (torch.optim.AdamW, 1e-4),
}
MIN_VALIDATIONS = 10  # without a new best, whatever the patience: an epoch may be many steps
ALIKE = 0.99  # rows of a higher mean cosine have little but a common direction


class Trial(NamedTuple):
    """What one learning rate found."""
    user: torch.Tensor | None
    item: torch.Tensor
    report: dict


def validate(user, item, parts):
    """Recall@20 on validation; None where there is no validation.

    Where a method has no users, a user is the mean of the user's training items. Items are
    centred first: a direction that all of them have in common would swamp their differences.
    """
    if not parts.valid.nnz:
        return None
    if user is None:
        item = item - item.mean(0)
        degree = np.maximum(np.diff(parts.train.indptr), 1)[:, None]
        mean = parts.train @ item.numpy() / degree
        user = torch.from_numpy(mean.astype(np.float32))
    return mmcpr.validation_recall(user, item, parts)


def mean_cosine(table):
    """The mean cosine of two different rows; a row of zeros has cosine 0 to all; table [n, d].

    The squared length of the sum of unit rows is the sum of the cosines of all n x n pairs; n of
    these pair a row with itself.
    """
    n = len(table)
    unit = F.normalize(table.double())
    total = unit.sum(0).square().sum() - unit.square().sum()
    return total.item() / max(1, n * (n - 1))


def make_optimizer(method, model, lr):
    """Adam, with the weight decay that the method's authors have."""
    kind, decay = OPTIMIZERS.get(method, (torch.optim.Adam, 0))
    return kind(model.parameters(), lr=lr, weight_decay=decay, fused=True)


def train_epoch(model, optimizer):
    """One pass over the method's batches; returns their losses."""
    model.train()
    losses = []
    for batch in model.batches():
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def embed(model):
    """(user or None, item): the method's tables as they are now, without dropout."""
    model.eval()
    with torch.no_grad():
        return model.embed()


def pretrain(args, parts, features, lr):
    """Trains one method at one learning rate: the Trial of its best validation Recall@20.

    Patience counts the steps since the best, not the epochs: an epoch is a single step for some
    methods and many for others. Without validation the last epoch is taken.
    """
    # Each learning rate starts from the same draws.
    torch.manual_seed(args.seed)
    started = time.time()
    model = build_model(args, parts.train, features)
    optimizer = make_optimizer(args.method, model, lr)
    best = {"recall@20": -1.0}
    history, step = [], 0
    bar = tqdm(range(1, args.epochs + 1), desc=f"{args.method}, lr {lr:g}", unit="epoch")
    for epoch in bar:
        losses = train_epoch(model, optimizer)
        step += len(losses)
        if not np.isfinite(losses).all():
            raise run.InputError(f"the loss is not finite at epoch {epoch}; "
                                 f"lower --lr (now {lr:g})")
        # Ranking takes time, so not every epoch is validated; the last one always is.
        if epoch % args.eval_every and epoch < args.epochs:
            continue
        user, item = embed(model)
        recall = validate(user, item, parts)
        point = {"epoch": epoch, "step": step, "loss": float(np.mean(losses)),
                 "recall@20": recall}
        history.append(point)
        if recall is None or recall > best["recall@20"]:
            best, best_user, best_item = point, user, item
        bar.set_postfix_str(f"loss {point['loss']:.4f}" + recall_text(recall))
        n_waited = len(history) - 1 - history.index(best)
        if step - best["step"] >= args.patience and n_waited >= MIN_VALIDATIONS:
            break
    bar.close()
    # A loss is taken before its step: a last step that was too large shows only in the tables.
    if not (is_finite(best_user) and is_finite(best_item)):
        raise run.InputError(f"the tables are not finite at epoch {best['epoch']}; "
                             f"lower --lr (now {lr:g})")
    seconds = round(time.time() - started, 1)
    report = {"lr": lr} | best | {"mean_cosine": mean_cosine(best_item), "epochs_run": epoch,
                                  "steps_run": step, "seconds": seconds, "history": history}
    return Trial(best_user, best_item, report)


def is_finite(table):
    return table is None or bool(table.isfinite().all())


def recall_text(recall):
    return "" if recall is None else f", validation Recall@20 {recall:.4f}"


# --- The command line ---------------------------------------------------------------------

def build_model(args, train, features):
    """The module of a method that is trained."""
    views = unit_rows(features, "TV")
    x = None
    if views:
        x = F.normalize(torch.cat(list(views.values()), 1))                    # [n, sum d_m]
    if args.method == "mmgcn":
        return MMGCN(train, views, args.dim, args.batch)
    if args.method == "gptgnn":
        return GPTGNN(train, x, args.dim, args.batch)
    if args.method == "graphbert":
        return GraphBERT(train, x, feature_mask(views.values()), args.dim, args.batch)
    if args.method == "pmgt":
        return PMGT(train, views, args.dim, args.batch)
    user_x = unit_rows(features, "R").get("R")
    return GCNP(train, user_x, x, args.dim, args.batch)


def is_clip_space(args, dataset):
    """Whether texts and images are vectors of one space, CLIP's."""
    if args.encoder == "auto":
        has_ready_features = "T" in dataset.ready or "V" in dataset.ready
        return not has_ready_features and dataset.encoder == "clip"
    return args.encoder == "clip"


def needed_modalities(args):
    """The letters of the features that the method reads."""
    if args.method in CONTENT_FREE:
        return ""
    if args.method == "gcnp":
        return args.modalities + "R"
    return args.modalities


def open_features(args):
    """(dataset, parts, data options, features) of a command line; reviews are pooled per user."""
    modalities = needed_modalities(args)
    dataset, parts, data_options = data.open_data(args, modalities=modalities)
    disk.check_outputs([args.out], folder=dataset.folder)
    clip_options = (args.clip_model, args.clip_weights)
    features = data.features(dataset, modalities, args.encoder, Path(data_options["data_dir"]),
                             clip_options, "cpu")
    # Only the reviews of training interactions, as in MMCPR (Eq. 4).
    if "R" in features:
        features["R"] = mmcpr.pool_reviews(features["R"], dataset.users, dataset.n_users,
                                           parts.in_train)
    has_item_features = "T" in features or "V" in features
    if not has_item_features and args.method not in (*CONTENT_FREE, "gcnp"):
        raise run.InputError(f"this data has neither texts nor images: nothing for --method "
                             f"{args.method}; gcnp, {' and '.join(CONTENT_FREE)} can use it")
    return dataset, parts, data_options, features


def untrained(args, parts, features, same_space):
    """The Trial of a method that learns nothing."""
    torch.manual_seed(args.seed)
    if args.method == "popular":
        user, item = popular(parts.train, args.dim)
    elif args.method == "constant":
        user, item = None, constant(parts.train, args.dim)
    else:
        views = unit_rows(features, "TV")
        user, item = None, clip(list(views.values()), same_space, args.dim)
    report = {"recall@20": validate(user, item, parts), "mean_cosine": mean_cosine(item)}
    return Trial(user, item, report)


def recall_of(trial):
    return trial.report["recall@20"] or 0


def best_report(trials):
    """The report of the best trial, with what the others found."""
    # Without validation all trials would have 0 here, but then there is only one.
    best = max(trials, key=recall_of)
    size = {"item": diagnostics.rms(best.item)}
    if best.user is not None:
        size["user"] = diagnostics.rms(best.user)
    rates = []
    for trial in trials:
        if "lr" in trial.report:
            rates.append({key: trial.report[key] for key in trial.report if key != "history"})
    return best.report | {"rms": size, "trials": rates}


def save_best(path, trials, is_whole, dataset, parts, meta):
    """Writes the best of the trials so far as an emb.npz; is_whole: no trial is to come."""
    best = max(trials, key=recall_of)
    user = None if best.user is None else best.user.numpy()
    # finetune.py tells of an interrupted one.
    meta = meta | {"report": best_report(trials) | {"interrupted": not is_whole}}
    data.save_embeddings(path, dataset, parts, user, best.item.numpy(), meta)


def try_rates(args, parts, features, save):
    """Trains at each learning rate; calls save(trials, is_whole) after each and at the end.

    Returns the trials.
    """
    if len(args.lr) > 1 and not parts.valid.nnz:
        raise run.InputError("without validation nothing chooses among several learning rates; "
                             "pass one: --lr 1e-3")
    trials, diverged = [], None
    for lr in args.lr:
        try:
            trial = pretrain(args, parts, features, lr)
        except run.InputError as error:
            # A rate that diverges loses the choice; the others may be fine.
            diverged = error
            print(f"lr {lr:g}: {error}", flush=True)
            continue
        trials.append(trial)
        report = trial.report
        print(f"lr {lr:g}: loss {report['loss']:.4f}{recall_text(report['recall@20'])}, "
              f"mean cosine {report['mean_cosine']:.3f} at epoch {report['epoch']} of "
              f"{report['epochs_run']} ({report['steps_run']:,} steps), "
              f"{report['seconds']:.0f} s", flush=True)
        # Saved at once, so that an interruption of the next rate does not lose this one.
        try:
            save(trials, is_whole=False)
        except OSError as error:
            print(f"not written ({error}); tried again after the next rate", flush=True)
    if not trials:
        raise diverged
    save(trials, is_whole=True)
    return trials


def arguments():
    parser = run.parser("Pre-train one of the systems of the paper's Table 2.",
                        "python -m paper.baselines")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", help="where the embeddings go (default: <method>.npz)")
    parser.add_argument("--modalities", choices=("TV", "T", "V"), default="TV",
                        help="item features to use")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2],
                        help="tried in turn; validation chooses "
                        "(default: the paper's grid, 1e-4 1e-3 1e-2)")
    parser.add_argument("--dim", type=run.positive, default=64, help="width of the tables")
    parser.add_argument("--batch", type=run.positive, default=2048,
                        help="items or interactions in a step")
    parser.add_argument("--epochs", type=run.positive, default=10_000,
                        help="at most; without validation, all of them")
    parser.add_argument("--patience", type=run.positive, default=1000,
                        help="optimizer steps without a better validation Recall@20")
    parser.add_argument("--eval-every", type=run.positive, default=5,
                        help="epochs between two validations")
    parser.add_argument("--seed", type=run.non_negative, default=0, help="of all random draws")
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    return parser


def check_arguments(args):
    # The default is not emb.npz, which is MMCPR's.
    args.out = args.out or f"{args.method}.npz"
    for lr in args.lr:
        if not 0 < lr < np.inf:
            raise run.InputError("--lr must be above 0 and finite")
    if args.new_items and args.method not in UNTRAINED:
        raise run.InputError("--new-items: this method would train on the new items, as negatives "
                             "or by their contents; leave it out")
    n_heads = N_HEADS.get(args.method, 1)
    if args.dim % n_heads:
        raise run.InputError(f"--dim {args.dim}: {args.method} has {n_heads} attention heads; "
                             "choose a multiple of that")
    disk.check_outputs([args.out])


def main(argv=None):
    args = arguments().parse_args(argv)
    check_arguments(args)
    dataset, parts, data_options, features = open_features(args)
    same_space = is_clip_space(args, dataset)
    # Vectors that are not CLIP's must not stand under its name.
    name = "text+image" if args.method == "clip" and not same_space else args.method
    options = data.training_options(args)
    meta = {"method": name, "data": data_options, "options": options}

    def save(trials, is_whole):
        save_best(args.out, trials, is_whole, dataset, parts, meta)

    is_trained = args.method not in UNTRAINED
    if not is_trained:
        trials = [untrained(args, parts, features, same_space)]
        save(trials, is_whole=True)
    else:
        trials = try_rates(args, parts, features, save)
    report = best_report(trials)
    text = ", ".join(f"{side} {value:.3f}" for side, value in report["rms"].items())
    no_users = "" if "user" in report["rms"] else "; no users"
    cosine = report["mean_cosine"]
    print(f"{name}: RMS of the entries: {text}{no_users}; "
          f"mean cosine of the item rows {cosine:.3f}")
    if is_trained and cosine > ALIKE:
        print(f"warning: item rows are nearly alike (mean cosine {cosine:.4f}): the method has "
              "learned little but a common direction")
    print(f"wrote {args.out}; next: python finetune.py --init {shlex.quote(args.out)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
