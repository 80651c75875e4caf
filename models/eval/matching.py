"""One-to-one and one-to-many cluster matching of SBKA (arXiv:2312.10320): distances and scores, smaller is nearer.

Features are cut into M sub-spaces of d = D/M dimensions; a codebook (M, K, d) holds K codewords, the cluster means, of
each. A photo's code in a sub-space is the index of its nearest codeword. Depends on NumPy and PyTorch alone.
"""

import numpy as np
import torch

CLUSTER_WEIGHT = 0.8


def euclidean_distances(query, gallery, out=None):
    """‖q − g‖ of query (Q, D) and gallery (N, D): (Q, N) in their dtype, written to `out` if it is given."""
    squares = matmul(-2 * query, gallery.T, out)
    squares += squared_norms(query)[:, None]
    squares += squared_norms(gallery)
    return squares.clamp_(min=0).sqrt_()


def nearest_codes(gallery, codebook):
    """Codes of the gallery: the index of the nearest codeword in each sub-space.

    gallery (N, D), codebook (M, K, d) -> (N, M) int64. As in the release, this is not the component that the mixture
    predicts.
    """
    return code_distances(gallery, codebook).argmin(dim=2)


def distinct_codes(codes):
    """The cells of codes (N, M), photos that share all codes: (codes of the cells (cells, M), cell of each photo (N,)).

    Photos of a cell have the same cluster distances. There are far fewer cells than photos.
    """
    return codes.unique(dim=0, return_inverse=True)


def code_distances(features, codebook):
    """Squared distances of features (Q, D) to the codewords of codebook (M, K, d) in each sub-space: (Q, M, K)."""
    subspaces = features.view(len(features), len(codebook), -1).transpose(0, 1)  # (Q, D) -> (M, Q, d)
    squares = (subspaces**2).sum(dim=2)[:, :, None] + (codebook**2).sum(dim=2)[:, None, :]
    return torch.baddbmm(squares, subspaces, codebook.transpose(1, 2), alpha=-2).clamp_(min=0).transpose(0, 1)


def cluster_distances(query, codebook, codes):
    """D(q, g) = Σ_m ‖q_m − codeword_m(g)‖²: (Q, N).

    query (Q, D), codebook (M, K, d), codes (N, M) of nearest_codes or distinct_codes.
    """
    first, *others = code_distances(query, codebook).unbind(dim=1)  # M of (Q, K)
    distances = first.index_select(1, codes[:, 0])
    for squares, column in zip(others, codes.T[1:], strict=True):
        distances += squares.index_select(1, column)
    return distances


def fused_scores(cluster, euclidean, weight=CLUSTER_WEIGHT, cells=None):
    """weight · D + (1 − weight) · d: (Q, N). D is a squared distance and d is not, as in the release.

    cluster: (Q, N), or (Q, cells) with the cell (N,) of each photo; euclidean: (Q, N).
    """
    rest = round(1 - weight, 12)  # 0.2 beside 0.8, not 0.19999999999999996
    weighted = cluster * weight
    if cells is not None:
        weighted = weighted.index_select(1, cells)
    return weighted.add_(euclidean, alpha=rest)


def squared_norms(features):
    """‖f‖² of features (N, D): (N,), exact for whole numbers, so that equal distances are equal to the bit."""
    if _needs_torch(features):
        return (features * features).sum(dim=1)
    return torch.from_numpy(np.einsum("nd,nd->n", features.numpy(), features.numpy()))  # without an array of N·D


def matmul(a, b, out=None):
    """a @ b. On a CPU NumPy's product, which has no gradient, is up to twice as fast as torch's, never much slower."""
    if _needs_torch(a, b):
        return torch.matmul(a, b, out=out)
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy(), out=None if out is None else out.numpy()))


def _needs_torch(*tensors):
    """Whether a tensor is on another device than the CPU, or needs a gradient, both of which NumPy lacks."""
    return any(each.device.type != "cpu" or each.requires_grad for each in tensors)
