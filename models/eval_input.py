"""What a test evaluates: stored features, or those of a checkpoint or an untrained network on a benchmark's images."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from datasets.lists import LIST_DESCRIPTIONS, Benchmark, QueryGallery, open_benchmark
from datasets.protocols import PROTOCOLS, protocol_of
from models.checkpoints import NAMES, check_seen_classes, find_checkpoint, load_student
from models.eval.features import FEATURES, SEEN_FEATURES, compute_features, record, source_of, stored_features
from models.memory_needs import inference_memory
from models.weights import check_size, create_student, resize, weights_digest
from utils import distributed
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import check_writable, sha256_of
from utils.memory import check_memory, keep_freed_memory


@dataclass(frozen=True)
class EvalInput:
    """The input of a test: features_zero.pickle in `folder`, or weights and a benchmark's images."""

    folder: Path  # for the results
    checkpoint: Path | None
    benchmark: Benchmark | None  # None if it cannot be read
    images: QueryGallery | None
    error: InputError | None  # why the benchmark cannot be read
    untrained: str | None = None  # a value of --finetune: weights of a network that is tested without a checkpoint
    split: str = "zero"  # of the images: "zero", or "test" for the held-back ones of seen classes

    @property
    def weights(self):
        """What the features are computed with: a checkpoint or `untrained`; None for features as they are."""
        return self.checkpoint or self.untrained

    def digest(self, model):
        """What identifies the weights: the SHA-256 of their file, or timm's name of them."""
        return weights_digest(self.untrained, model) if self.untrained else sha256_of(self.checkpoint)

    @property
    def path(self):
        """Where the features are stored."""
        return self.folder / (FEATURES if self.split == "zero" else SEEN_FEATURES)


def find_input(protocol, path, data_root, zero_version, untrained=None):
    """The EvalInput of a test of `protocol`; path: a checkpoint, or a folder that holds one or features_zero.pickle.

    untrained: weights, as --finetune has them, of a network that is tested without a checkpoint; path: the folder for
    its results. Raises InputError where there is nothing to test, or the folder cannot be written.
    """
    if untrained:
        folder, checkpoint = path, None
        if found := [name for name in NAMES if os.path.exists(folder / name)]:
            raise InputError(f"--features_only: {folder} holds {found[0]}; choose another --resume_dir for the results")
    elif os.path.isfile(path):
        folder, checkpoint = path.parent, path if path.name != FEATURES else None
    else:
        folder, checkpoint = path, find_checkpoint(path, protocol.kept_checkpoint)
        if checkpoint is None and not os.path.isfile(path / FEATURES):
            raise InputError(
                f"{path}: neither {protocol.kept_checkpoint} nor {FEATURES} is there; train first, or set --resume_dir"
            )
    check_writable(folder)
    other = PROTOCOLS[protocol_of(protocol.name, zero_version)]
    if other is not protocol:
        log_rank0(f"note: {zero_version} is the folder of {other.title}; this is the test of {protocol.title}")
    try:
        benchmark = open_benchmark(protocol.name, data_root, zero_version)
        return EvalInput(folder, checkpoint, benchmark, benchmark.read_query_gallery(), None, untrained)
    except InputError as error:  # matters only if features must be computed
        return EvalInput(folder, checkpoint, None, None, error, untrained)


def find_seen_input(eval_input):
    """The EvalInput of held-back photos and validation sketches of seen classes, for generalised retrieval.

    Raises InputError where there are none.
    """
    benchmark = eval_input.benchmark
    if benchmark is None:
        if not eval_input.weights and os.path.isfile(eval_input.folder / SEEN_FEATURES):
            return replace(eval_input, split="test")
        raise InputError(f"--generalised: {eval_input.error}")
    for kind, option in (("photo", "--hold_out_photos 0.1"), ("sketch", "--held_back 50")):
        if not os.path.isfile(path := benchmark.path(kind, "test")):
            way_out = f"python -m datasets.prepare lists {benchmark.root} --protocol {benchmark.protocol.name} {option}"
            raise InputError(
                f"--generalised: no {LIST_DESCRIPTIONS[kind, 'test']} of seen classes ({path}); {way_out} makes lists "
                "with them; train and test with their --zero_version"
            )
    images = QueryGallery(benchmark.read("photo", "test"), benchmark.read("sketch", "test"))
    seen_input = replace(eval_input, images=images, split="test")
    if not eval_input.weights and not os.path.isfile(seen_input.path):
        raise InputError(
            f"--generalised: {eval_input.folder} holds no checkpoint, and no {SEEN_FEATURES} beside {FEATURES}"
        )
    return seen_input


def get_features(
    eval_input, loading, *, model, imagenet_classes=1000, compiled=False, precision="fp32", recompute=False
):
    """Features of an EvalInput: the stored ones if they are up to date, else computed, on all ranks.

    loading: LoaderOptions; model, imagenet_classes: those of the checkpoint; compiled: compute them with torch.compile;
    precision: see models.networks.arithmetic; recompute: never use stored features. Raises InputError where features
    must be computed and cannot.
    """
    path, checkpoint, source = eval_input.path, eval_input.checkpoint, None
    if eval_input.weights:
        recorded = record(path).get("source", {}).get("data_root")
        if eval_input.error and recorded and os.path.isdir(recorded):  # mistyped options, not data that are gone
            raise InputError(f"{eval_input.error}; the features in {path.parent} are of {recorded}")
        digest = eval_input.digest(model)
        source = source_of(digest, model, loading.size, precision, eval_input.benchmark, eval_input.split)
    elif recompute:
        way_out = "test them as they are"
        raise InputError(f"--recompute: {path.parent} holds no checkpoint to compute features with; {way_out}")
    features = None if recompute else stored_features(path, checkpoint, source)
    if features is not None:
        distributed.init_process_group(loading.device)
        return features
    if eval_input.images is None:
        is_known = checkpoint and os.path.isfile(path)
        way_out = f", or move {checkpoint.name} away to test {path.name} as it is" if is_known else ""
        raise InputError(f"{eval_input.error}{way_out}")
    student = _load_student(eval_input, model, imagenet_classes)
    resize(student, model, loading.size)
    check_size(student, model, loading.size)
    if torch.device(loading.device).type == "cpu":
        needed = inference_memory(student, loading.size, loading.batch_size)
        check_memory(loading.size, loading.batch_size, needed)
    eval_input.images.check()
    if compiled:
        student.compile_features()
    distributed.init_process_group(loading.device)
    try:
        with keep_freed_memory():
            return compute_features(path, student.to(loading.device), eval_input.images, loading, precision, source)
    except FloatingPointError:
        way_out = "test another checkpoint, or train anew"
        raise InputError(f"{eval_input.weights}: its features are not finite; {way_out}") from None


def _load_student(eval_input, model, imagenet_classes):
    """The Student of the weights of an EvalInput."""
    if eval_input.untrained:
        torch.manual_seed(0)  # of random weights
        return create_student(model, 1, eval_input.untrained, imagenet_classes).eval()
    student, metadata, _ = load_student(eval_input.checkpoint, model, imagenet_classes=imagenet_classes)
    check_seen_classes(eval_input.checkpoint, metadata["seen_classes"], len(eval_input.benchmark.seen_names))
    return student
