"""--teacher_head: the ImageNet head that L_ka aligns, for a backbone that has none of its own.

    np.savez("head.npz", weight=(J, D), bias=(J,))              a linear classifier of J classes on pooled features
    np.savez("head.npz", embeddings=(J, D), scale=100.0)        class embeddings, such as CLIP's of texts with the names

The scale, which is 100 where it is left out, is that of the cosines of image and class. The order of classes is that of
the semantic mask.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from utils.cli import InputError
from utils.files import read_npz

MAX_BYTES = 1 << 30  # of the arrays of a file, unpacked


class ClassEmbeddings(nn.Module):
    """Logits (B, J) of pooled features (B, D): their cosines with class embeddings, times a scale, as in CLIP."""

    def __init__(self, embeddings, scale=100.0):
        """embeddings: (J, D) tensor, of any lengths."""
        super().__init__()
        self.embeddings = nn.Parameter(F.normalize(embeddings, dim=1))
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.out_features, self.in_features = embeddings.shape

    def forward(self, pooled):
        return F.linear(F.normalize(pooled, dim=1), self.scale * self.embeddings)


def read_head(path):
    """The head in an .npz file: nn.Linear or ClassEmbeddings. Raises InputError."""
    arrays = _read_arrays(path)
    for first, second in (("weight", "bias"), ("embeddings", "scale")):
        if first in arrays:
            matrix, rest = _floats(path, first, arrays[first], 2), arrays.get(second)
            break
    else:
        held = ", ".join(arrays) or "nothing"
        raise InputError(f"--teacher_head {path}: holds {held}; it needs weight and bias, or embeddings and scale")
    classes, width = matrix.shape
    if first == "embeddings":
        scale = 100.0 if rest is None else _floats(path, second, rest, 0).item()
        if scale <= 0 or not matrix.any(dim=1).all():
            raise InputError(f"--teacher_head {path}: a scale of 0 or less, or an embedding of zeros")
        return ClassEmbeddings(matrix, scale)
    bias = torch.zeros(classes) if rest is None else _floats(path, second, rest, 1)
    if bias.shape != (classes,):
        raise InputError(f"--teacher_head {path}: {len(bias)} values of bias for {classes} classes")
    head = nn.Linear(width, classes)
    head.load_state_dict({"weight": matrix, "bias": bias})
    return head


def _read_arrays(path):
    try:
        return read_npz(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"--teacher_head {path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).split("\n")[0]
        raise InputError(f"--teacher_head {path}: not a readable .npz file ({reason}); save it again") from None


def _floats(path, name, values, dimensions):
    """An array of real numbers as a float32 tensor, checked."""
    if values.ndim != dimensions or values.dtype.kind not in "iuf" or not values.size:
        what = ("one number", "a row of numbers", "a matrix of numbers (classes, values)")[dimensions]
        raise InputError(f"--teacher_head {path}: {name} must be {what}, not {values.dtype} {values.shape}")
    with np.errstate(over="ignore"):
        values = torch.from_numpy(np.asarray(values, np.float32))
    if not values.isfinite().all():
        raise InputError(f"--teacher_head {path}: {name} holds NaN or infinity; save it again")
    return values
