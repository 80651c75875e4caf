import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets import loaders
from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, PairedBatchSampler, evaluation_loader, training_loader

ROOT = Path(__file__).resolve().parents[2]


def test_an_epoch_pairs_every_sketch_and_photo_until_the_shorter_list_ends():
    batches = PairedBatchSampler(sketches=10, photos=7, sketches_per_batch=2, photos_per_batch=4, seed=0)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 2  # the photos end in the second step, with a batch of 3
    indices = [[index for _, index in batch] for batch in epoch]
    assert [sum(index < 10 for index in batch) for batch in indices] == [2, 2]
    assert [sum(index >= 10 for index in batch) for batch in indices] == [4, 3]
    assert sorted(index for batch in indices for index in batch if index >= 10) == list(range(10, 17))


def test_epochs_differ_and_seeds_repeat():
    first, again, other = (PairedBatchSampler(30, 30, 3, 6, seed) for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert list(first) != list(other)
    again.epoch = 1
    assert [i for b in first for _, i in b] != [i for b in again for _, i in b]


def test_sketches_and_photos_are_mixed_within_a_batch():
    batches = list(PairedBatchSampler(300, 600, 30, 60, seed=0))
    assert all(any(index >= 300 for _, index in batch[:30]) for batch in batches)


@pytest.fixture
def lists(miniature):
    benchmark = open_benchmark("sketchy", miniature)
    return benchmark.read("sketch", "train"), benchmark.read("photo", "train")


def test_workers_change_nothing(lists):
    epochs = []
    for workers in (0, 2):
        loader = training_loader(*lists, LoaderOptions(32, workers=workers), (2, 4), seed=5)
        loader.batch_sampler.epoch = 3
        epochs.append([next(batches) for batches in [iter(loader)] for _ in range(5)])
    for one, two in zip(*epochs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_batches_hold_what_the_lists_say(lists):
    sketches, photos = lists
    loader = training_loader(sketches, photos, LoaderOptions(32), (2, 4), seed=5)
    keys = list(loader.batch_sampler)
    for batch, (images, labels, is_photo) in zip(keys[:3], loader, strict=False):
        expected = [(*sketches.labels, *photos.labels)[index] for _, index in batch]
        assert labels.tolist() == expected
        assert is_photo.tolist() == [float(index >= len(sketches)) for _, index in batch]
        assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8


def test_evaluation_goes_in_list_order_without_augmentation(lists):
    sketches, _ = lists
    once, twice = (
        list(evaluation_loader(sketches, LoaderOptions(32, size, workers))) for size, workers in ((7, 0), (16, 2))
    )
    for field in range(2):
        assert torch.equal(torch.cat([batch[field] for batch in once]), torch.cat([batch[field] for batch in twice]))
    assert torch.cat([labels for _, labels in once]).tolist() == sketches.labels.tolist()


MB = 1 << 20


@pytest.mark.parametrize(
    ("free", "processes", "expected"),
    [(None, 1, 4), (10 * MB, 1, 4), (9 * MB, 1, 3), (64 * MB, 8, 3), (4 * MB, 1, 1), (3 * MB, 1, 0), (0, 1, 0)],
)  # fmt: skip
def test_workers_are_fewer_where_shared_memory_is_small(monkeypatch, capsys, free, processes, expected):
    loaders._note_once.cache_clear()
    monkeypatch.setattr(loaders, "free_shared_memory", lambda: free)
    monkeypatch.setattr(loaders.distributed, "local_world_size", lambda: processes)
    for _ in range(2):
        assert loaders.fit_workers(4, MB) == expected
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == (expected < 4) and all("/dev/shm" in note and "--shm-size" in note for note in notes)
    assert loaders.fit_workers(0, MB) == 0


def test_a_loader_counts_the_images_of_its_own_batches(monkeypatch, lists):
    sizes = []
    monkeypatch.setattr(loaders, "fit_workers", lambda workers, size: sizes.append(size) or 0)
    loading = LoaderOptions(32, batch_size=5, workers=2)
    images, _ = next(iter(evaluation_loader(lists[0], loading)))
    assert sizes.pop() == images.nbytes
    images, *_ = next(iter(training_loader(*lists, loading, (2, 4), share=lambda count: slice(count // 2))))
    assert sizes.pop() == images.nbytes


SMALL_MEMORY = """
import sys
from utils.cli import one_line_errors
from datasets import loaders
from datasets.lists import open_benchmark

@one_line_errors()
def main(root, checked):
    if checked == "unchecked":
        loaders.free_shared_memory = lambda: None
    files = open_benchmark("sketchy", root).read("photo", "train")
    images = 0
    for batch, _ in loaders.evaluation_loader(files, loaders.LoaderOptions(224, batch_size=8, workers=1)):
        images += len(batch)
    print(images == len(files))

main(*sys.argv[1:])
"""


@pytest.mark.parametrize("checked", ["checked", "unchecked"])
def test_a_small_shared_memory_ends_in_a_result_or_in_one_line(miniature, checked):
    namespace = ["unshare", "--mount", "bash", "-c"]
    mount = "mount -t tmpfs -o size=512k tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a file system")
    command = [sys.executable, "-c", SMALL_MEMORY, str(miniature), checked]
    result = subprocess.run(
        [*namespace, f'{mount} && exec "$@"', "-", *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and "/dev/shm" in lines[0], result.stderr
    expected = (0, "True\n") if checked == "checked" else (2, "")
    assert (result.returncode, result.stdout) == expected
