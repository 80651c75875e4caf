"""The four benchmarks as data: folders, lists, batches, schedule and metrics, as in arXiv:2312.10320 and its release.

All else is shared; a benchmark differs from another only here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """What differs between benchmarks."""

    title: str
    data_root: str  # where its download goes
    zero_version: str  # folder of the lists, inside data_root
    checkpoint: str  # where its checkpoints go
    sketch_lists: tuple[str, ...]  # file names with {} for train, test or zero; the first that exists is read
    photo_lists: tuple[str, ...]
    has_mask: bool  # cid_mask.pickle, the semantic mask
    has_validation: bool  # a list of held-back sketches; without one the last epoch is kept
    seen_classes: int
    unseen_classes: int
    sketch_share: int  # of a batch: sketches to photos, as sketch_share to photo_share
    photo_share: int
    batch_size: int
    warmup_epochs: int  # the last epoch (from 0) in which only the student learns
    teacher_lr: float
    clusters: tuple[int, ...]  # K
    subspaces: tuple[int, ...]  # M
    map_at: int | None  # None ranks the whole gallery
    prec_at: int

    def split_batch(self, batch_size):
        """(sketches, photos) in a batch of `batch_size`: B//3 + 2·(B//3), or B//10 + 9·(B//10)."""
        unit = batch_size // (self.sketch_share + self.photo_share)
        return unit * self.sketch_share, unit * self.photo_share

    @property
    def metrics(self):
        """Names of its two metrics, such as ("mAP@all", "Prec@100")."""
        return f"mAP@{self.map_at or 'all'}", f"Prec@{self.prec_at}"

    @property
    def kept_checkpoint(self):
        """Name of the checkpoint that the zero-shot test reads."""
        return "model_best.pth.tar" if self.has_validation else "checkpoint.pth.tar"


_SKETCHY = dict(
    data_root="datasets/Sketchy",
    sketch_lists=("sketch_tx_000000000000_ready_filelist_{}.txt",),
    photo_lists=("all_photo_filelist_{}.txt",),
    has_mask=True,
    has_validation=True,
    sketch_share=1,
    photo_share=2,
    batch_size=210,
    warmup_epochs=9,
    teacher_lr=1e-4,
    subspaces=(2, 4),
)

PROTOCOLS = {
    "sketchy": Protocol(
        title="Sketchy Ext",
        zero_version="zeroshot1",
        checkpoint="checkpoint/sketchy/zeroshot1",
        seen_classes=100,
        unseen_classes=25,
        clusters=tuple(range(22, 29)),
        map_at=None,
        prec_at=100,
        **_SKETCHY,
    ),
    "sketchy_split": Protocol(
        title="Sketchy Ext Split",
        zero_version="zeroshot2",
        checkpoint="checkpoint/sketchy/zeroshot2",
        seen_classes=104,
        unseen_classes=21,
        clusters=tuple(range(18, 25)),
        map_at=200,
        prec_at=200,
        **_SKETCHY,
    ),
    "tuberlin": Protocol(
        title="TU-Berlin Ext",
        data_root="datasets/TUBerlin",
        zero_version="zeroshot",
        checkpoint="checkpoint/tuberlin",
        sketch_lists=("png_ready_filelist_{}.txt",),
        photo_lists=("ImageResized_ready_filelist_{}.txt",),
        has_mask=True,
        has_validation=True,
        seen_classes=220,
        unseen_classes=30,
        sketch_share=1,
        photo_share=9,
        batch_size=210,
        warmup_epochs=5,
        teacher_lr=5e-5,
        clusters=tuple(range(27, 34)),
        subspaces=(2, 4),
        map_at=None,
        prec_at=100,
    ),
    "quickdraw": Protocol(
        title="QuickDraw Ext",
        data_root="datasets/QuickDraw",
        zero_version="zeroshot",
        checkpoint="checkpoint/quickdraw",
        sketch_lists=("sketch_filelist_{}.txt", "sketch_{}.txt"),
        photo_lists=("all_photo_filelist_{}.txt", "all_photo_{}.txt"),
        has_mask=False,
        has_validation=False,
        seen_classes=80,
        unseen_classes=30,
        sketch_share=1,
        photo_share=9,
        batch_size=110,
        warmup_epochs=3,
        teacher_lr=1e-4,
        clusters=tuple(range(27, 34)),
        subspaces=(2,),
        map_at=None,
        prec_at=200,
    ),
}


def protocol_of(name, zero_version):
    """Name of the protocol whose lists `zero_version` names in the data set of protocol `name`; else `name` itself."""
    data_root = PROTOCOLS[name].data_root
    split = (
        other for other, row in PROTOCOLS.items() if (row.data_root, row.zero_version) == (data_root, zero_version)
    )
    return next(split, name)
