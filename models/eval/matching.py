"""One-to-one and one-to-many cluster matching of SBKA (arXiv:2312.10320): distances and scores, smaller is nearer.

Features are cut into M sub-spaces of d = D/M dimensions; a codebook (M, K, d) holds K codewords, the cluster means, of
each. A photo's code in a sub-space is the index of its nearest codeword. Depends on NumPy and PyTorch alone.
"""

import numpy as np
import torch

CLUSTER_WEIGHT = 0.8


def euclidean_distances(query, gallery, out=None):
    """‖q − g‖ of query (Q, D) and gallery (N, D): (Q, N) in their dtype, written to `out` if it is given."""
    squares = _product(-2 * query, gallery.T, out)
    squares += (query.norm(dim=1) ** 2)[:, None]
    squares += gallery.norm(dim=1) ** 2
    return squares.clamp_(min=0).sqrt_()


def nearest_codes(gallery, codebook):
    """Codes of the gallery: the index of the nearest codeword in each sub-space.

    gallery (N, D), codebook (M, K, d) -> (N, M) int64. As in the release, this is not the component that the mixture
    predicts.
    """
    return code_distances(gallery, codebook).argmin(dim=2)


def code_members(codes, clusters):
    """Codes (N, M) one-hot: (M·K, N) uint8, where row m·K + k marks the photos with code k in sub-space m."""
    members = torch.zeros(codes.shape[1], clusters, len(codes), dtype=torch.uint8, device=codes.device)
    return members.scatter_(1, codes.T[:, None], 1).flatten(0, 1)


def code_distances(features, codebook):
    """Squared distances of features (Q, D) to the codewords of codebook (M, K, d) in each sub-space: (Q, M, K)."""
    subspaces = features.view(len(features), len(codebook), -1).transpose(0, 1)  # (Q, D) -> (M, Q, d)
    squares = (subspaces**2).sum(dim=2)[:, :, None] + (codebook**2).sum(dim=2)[:, None, :]
    return torch.baddbmm(squares, subspaces, codebook.transpose(1, 2), alpha=-2).clamp_(min=0).transpose(0, 1)


def cluster_distances(query, codebook, members, out=None):
    """D(q, g) = Σ_m ‖q_m − codeword_m(g)‖²: (Q, N), written to `out` if it is given.

    query (Q, D), codebook (M, K, d), members (M·K, N) of code_members, in one dtype. A product with one-hot codes is
    faster than indexing by codes, and rounds in the same way.
    """
    return _product(code_distances(query, codebook).flatten(1), members, out)


def fused_scores(cluster, euclidean, weight=CLUSTER_WEIGHT, out=None):
    """weight · D + (1 − weight) · d. D is a squared distance and d is not, as in the release.

    Written to `out` if it is given, which may be D itself.
    """
    rest = round(1 - weight, 12)  # 0.2 beside 0.8, not 0.19999999999999996
    return torch.mul(cluster, weight, out=out).add_(euclidean, alpha=rest)


def _product(a, b, out=None):
    """a @ b. On a CPU NumPy's product, which has no gradient, is up to twice as fast as torch's, never much slower."""
    if a.device.type != "cpu" or a.requires_grad or b.requires_grad:
        return torch.matmul(a, b, out=out)
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy(), out=None if out is None else out.numpy()))
