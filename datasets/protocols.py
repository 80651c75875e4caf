"""The four benchmarks as data: folders, lists, batches, schedule and metrics, as in arXiv:2312.10320 and its release.

Two benchmarks differ only in their rows of this table. All other code is the same for all four.
"""

from dataclasses import dataclass

from datasets import classes


@dataclass(frozen=True)
class Protocol:
    """What differs between benchmarks."""

    name: str  # the value of --protocol
    title: str
    data_root: str  # folder of its download
    zero_version: str  # folder of the lists, inside data_root
    checkpoint: str  # folder of its checkpoints
    sketch_lists: tuple[str, ...]  # possible file names, with {} for train, test or zero; the first that exists is read
    photo_lists: tuple[str, ...]
    sketch_folders: tuple[tuple[str, ...], ...]  # every folder of class folders, each with its possible names
    photo_folders: tuple[tuple[str, ...], ...]
    has_mask: bool  # whether training uses cid_mask.pickle, the semantic mask
    has_validation: bool  # whether some sketches are held back for validation; if not, the last epoch is kept
    held_back: int  # validation sketches of each seen class
    seen_names: tuple[str, ...]  # in the order of their labels
    unseen_names: tuple[str, ...]
    published: dict[tuple[str, str], int]  # {(kind, split): number of images}, of the lists whose number is published
    sketch_share: int  # a batch has sketch_share sketches for every photo_share photos
    photo_share: int
    batch_size: int
    last_warmup_epoch: int  # E_w: in epochs 0..E_w only the student is trained
    teacher_lr: float
    clusters: tuple[int, ...]  # K
    subspaces: tuple[int, ...]  # M
    metrics: tuple[str, ...]  # columns of its table (see models.eval.metrics); the first sorts classes and pictures
    # A regular expression of sketch names without suffix, whose first group is the name of the photo that the sketch
    # was drawn from; None where sketches were not drawn from photos.
    pair_pattern: str | None = None

    @property
    def seen_classes(self):
        """Number of seen classes."""
        return len(self.seen_names)

    @property
    def unseen_classes(self):
        """Number of unseen classes."""
        return len(self.unseen_names)

    def list_names(self, kind, split):
        """File names that the list of `kind` ("sketch" or "photo") and `split` can have; the usual name comes first."""
        patterns = self.sketch_lists if kind == "sketch" else self.photo_lists
        return [pattern.format(split) for pattern in patterns]

    def is_derived(self, zero_version):
        """Whether a folder of lists is derived from that of the protocol: zeroshot2_held_out_0 from zeroshot2."""
        return zero_version.startswith(f"{self.zero_version}_")

    def split_batch(self, batch_size):
        """(sketches, photos) in a batch of `batch_size`: B//3 + 2·(B//3), or B//10 + 9·(B//10)."""
        unit = batch_size // (self.sketch_share + self.photo_share)
        return unit * self.sketch_share, unit * self.photo_share

    @property
    def kept_checkpoint(self):
        """Name of the checkpoint that the zero-shot test reads."""
        return "model_best.pth.tar" if self.has_validation else "checkpoint.pth.tar"


_SKETCHY = dict(
    data_root="datasets/Sketchy",
    sketch_lists=("sketch_tx_000000000000_ready_filelist_{}.txt",),
    photo_lists=("all_photo_filelist_{}.txt",),
    sketch_folders=(
        (
            "256x256/sketch/tx_000000000000_ready",
            "256x256/sketch/tx_000000000000",
            "rendered_256x256/256x256/sketch/tx_000000000000",
            "sketch/tx_000000000000",
        ),
    ),
    photo_folders=(
        (
            "256x256/photo/tx_000000000000_ready",
            "256x256/photo/tx_000000000000",
            "rendered_256x256/256x256/photo/tx_000000000000",
            "photo/tx_000000000000",
        ),
        ("EXTEND_image_sketchy_ready", "EXTEND_image_sketchy"),
    ),
    has_mask=True,
    has_validation=True,
    held_back=50,
    sketch_share=1,
    photo_share=2,
    batch_size=210,
    last_warmup_epoch=9,
    teacher_lr=1e-4,
    subspaces=(2, 4),
    pair_pattern=r"(.+)-\d+",  # n02691156_58-1 was drawn from n02691156_58
)

_ROWS = (
    Protocol(
        name="sketchy",
        title="Sketchy Ext",
        zero_version="zeroshot1",
        checkpoint="checkpoint/sketchy/zeroshot1",
        seen_names=classes.SKETCHY_SEEN,
        unseen_names=classes.SKETCHY_UNSEEN,
        published={
            ("sketch", "train"): 55_252,
            ("sketch", "test"): 5_000,
            ("sketch", "zero"): 15_229,
            ("photo", "train"): 68_401,
            ("photo", "zero"): 17_101,
        },
        clusters=tuple(range(22, 29)),
        metrics=("mAP@all", "Prec@100"),
        **_SKETCHY,
    ),
    Protocol(
        name="sketchy_split",
        title="Sketchy Ext Split",
        zero_version="zeroshot2",
        checkpoint="checkpoint/sketchy/zeroshot2",
        seen_names=classes.SKETCHY_SPLIT_SEEN,
        unseen_names=classes.SKETCHY_SPLIT_UNSEEN,
        published={
            ("sketch", "train"): 57_587,
            ("sketch", "zero"): 12_694,
            ("photo", "train"): 72_949,
            ("photo", "zero"): 12_553,
        },
        clusters=tuple(range(18, 25)),
        metrics=("mAP@200", "Prec@200"),
        **_SKETCHY,
    ),
    Protocol(
        name="tuberlin",
        title="TU-Berlin Ext",
        data_root="datasets/TUBerlin",
        zero_version="zeroshot",
        checkpoint="checkpoint/tuberlin",
        sketch_lists=("png_ready_filelist_{}.txt",),
        photo_lists=("ImageResized_ready_filelist_{}.txt",),
        sketch_folders=(("png_ready", "png"),),
        photo_folders=(("ImageResized_ready", "ImageResized"),),
        has_mask=True,
        has_validation=True,
        held_back=10,
        seen_names=classes.TUBERLIN_SEEN,
        unseen_names=classes.TUBERLIN_UNSEEN,
        published={
            ("sketch", "train"): 15_400,
            ("sketch", "test"): 2_200,
            ("sketch", "zero"): 2_400,
            ("photo", "zero"): 27_989,
        },
        sketch_share=1,
        photo_share=9,
        batch_size=210,
        last_warmup_epoch=5,
        teacher_lr=5e-5,
        clusters=tuple(range(27, 34)),
        subspaces=(2, 4),
        metrics=("mAP@all", "Prec@100"),
    ),
    Protocol(
        name="quickdraw",
        title="QuickDraw Ext",
        data_root="datasets/QuickDraw",
        zero_version="zeroshot",
        checkpoint="checkpoint/quickdraw",
        sketch_lists=("sketch_filelist_{}.txt", "sketch_{}.txt"),
        photo_lists=("all_photo_filelist_{}.txt", "all_photo_{}.txt"),
        sketch_folders=(("sketches",),),
        photo_folders=(("images",),),
        has_mask=False,
        has_validation=False,
        held_back=0,
        seen_names=classes.QUICKDRAW_SEEN,
        unseen_names=classes.QUICKDRAW_UNSEEN,
        published={("sketch", "zero"): 92_291, ("photo", "zero"): 54_151},
        sketch_share=1,
        photo_share=9,
        batch_size=110,
        last_warmup_epoch=3,
        teacher_lr=1e-4,
        clusters=tuple(range(27, 34)),
        subspaces=(2,),
        metrics=("mAP@all", "Prec@200"),
    ),
)
PROTOCOLS = {row.name: row for row in _ROWS}

# {release: (seen names, unseen names), in the order of labels} of a split that was published in two orders
LABEL_ORDERS = {
    "SAKE's followers (zeroshot0)": (classes.SKETCHY_SPLIT_SEEN, classes.SKETCHY_SPLIT_UNSEEN),
    "the authors' next release (CMCA)": (classes.CMCA_SPLIT_SEEN, classes.CMCA_SPLIT_UNSEEN),
}


def unseen_names_of(sketches):
    """(release, unseen names in the order of labels) of published features, identified by the sketches of each label.

    sketches: numbers of sketches of the labels 0, 1, ... Returns (None, None) if they are not those of LABEL_ORDERS.
    """
    counts = dict(zip(classes.SKETCHY_SPLIT_UNSEEN, classes.SKETCHY_SPLIT_UNSEEN_SKETCHES, strict=True))
    for release, (_, unseen) in LABEL_ORDERS.items():
        if [counts[name] for name in unseen] == list(sketches):
            return release, list(unseen)
    return None, None


def protocol_of(name, zero_version):
    """Name of the protocol whose lists are in the folder `zero_version` of the data set of protocol `name`.

    Lists derived from those of a protocol, such as zeroshot2_held_out_0, belong to it, too. For a folder that belongs
    to no protocol, this is `name` itself.
    """
    data_root = PROTOCOLS[name].data_root
    split = (
        other
        for other, row in PROTOCOLS.items()
        if row.data_root == data_root and (zero_version == row.zero_version or row.is_derived(zero_version))
    )
    return next(split, name)
