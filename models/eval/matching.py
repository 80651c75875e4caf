"""One-to-one and one-to-many cluster matching of SBKA (arXiv:2312.10320): distances and scores, smaller is nearer.

Features are cut into M sub-spaces of d = D/M dimensions; a codebook (M, K, d) holds K cluster means in each.
Stands alone.
"""

import torch

CLUSTER_WEIGHT, EUCLIDEAN_WEIGHT = 0.8, 0.2


def euclidean_distances(query, gallery):
    """‖q − g‖ of query (Q, D) and gallery (N, D): (Q, N) in their dtype. float64 keeps close calls in order."""
    squares = (query**2).sum(dim=1)[:, None] + (gallery**2).sum(dim=1)
    return torch.addmm(squares, query, gallery.T, alpha=-2).clamp_(min=0).sqrt_()


def nearest_codes(gallery, codebook):
    """Index of the nearest mean for each part of each gallery feature.

    gallery (N, D), codebook (M, K, d) -> (N, M) int64. The release does not code by the mixture's own prediction.
    """
    return code_distances(gallery, codebook).argmin(dim=2)


def code_distances(features, codebook):
    """Squared distance of each part of features (Q, D) to each mean of codebook (M, K, d): (Q, M, K)."""
    parts = features.view(len(features), len(codebook), -1).transpose(0, 1)  # (Q, D) -> (M, Q, d)
    squares = (parts**2).sum(dim=2)[:, :, None] + (codebook**2).sum(dim=2)[:, None, :]
    return torch.baddbmm(squares, parts, codebook.transpose(1, 2), alpha=-2).clamp_(min=0).transpose(0, 1)


def cluster_distances(query, codebook, codes):
    """D(q, g) = Σ_m ‖q_m − codeword_m(g)‖²: query (Q, D), codebook (M, K, d), codes (N, M) of the gallery -> (Q, N)."""
    table = code_distances(query, codebook)
    distances = table[:, 0, codes[:, 0]]
    for subspace in range(1, len(codebook)):
        distances += table[:, subspace, codes[:, subspace]]
    return distances


def fused_scores(cluster, euclidean):
    """0.8 · D + 0.2 · d, squared with plain distance: the release does this, so do we."""
    return CLUSTER_WEIGHT * cluster + EUCLIDEAN_WEIGHT * euclidean
