"""GPU code on a fake GPU: no operation mixes devices, none is a needless synchronisation, values are the CPU's."""

import json

import numpy as np
import pytest
import torch
from helpers.fake_gpu import FakeGpu, OnGpu, values
from timm.models.convnext import ConvNeXt

from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, TrainingData, open_training_data
from models import train_step as train_step_module
from models import training
from models.eval import codebooks, gmm
from models.eval import evaluate as evaluation
from models.eval.codebooks import fit_codebooks
from models.eval.evaluate import evaluate_rows
from models.eval.features import Features, extract
from models.eval.gmm import fit_mixture
from models.eval.matching import euclidean_distances
from models.eval.metrics import SameClass, average_precision, rank
from models.logger import Log
from models.losses import Batch
from models.networks import PRECISIONS, Student, Teacher, normalise, prepare_models
from models.train_step import LOGGED, TrainConfig, TrainState, create_optimizers, train_step
from models.training import close_epoch, train_epoch
from utils import distributed
from utils.cli import one_line_errors


@pytest.fixture
def gpu():
    with FakeGpu() as fake:
        for device in ("cuda:0", "cuda:1"):
            normalise(torch.zeros(1, 3, 4, 4, dtype=torch.uint8).to(device))  # brings mean and deviation there, once
        fake.reset()
        yield fake


def create_state(device, seen_classes=5, imagenet_classes=20, drop_path=0.0):
    torch.manual_seed(0)
    sizes = dict(
        num_classes=imagenet_classes, depths=[1, 1, 2, 1], dims=[4, 8, 12, 16], use_grn=True, ls_init_value=None
    )
    student, teacher = Student(ConvNeXt(**sizes, drop_path_rate=drop_path), seen_classes), Teacher(ConvNeXt(**sizes))
    teacher.backbone.load_state_dict(student.backbone.state_dict())
    prepare_models(student, teacher, device)
    return TrainState(student, teacher, create_optimizers(student, teacher, 1e-3, 1e-3, 5e-4))


def create_batch(count=9):
    generator = torch.Generator().manual_seed(1)
    images, mask = torch.randn(count, 3, 48, 48, generator=generator), torch.rand(count, 20, generator=generator)
    noise = torch.randn(count, 16, generator=generator)
    return Batch(images, torch.arange(count) % 5, (torch.arange(count) > 2).float(), mask, noise)


def moved(batch, gpu, device):
    return Batch(*(gpu.pin(tensor).to(device, non_blocking=True) for tensor in batch))


def weights(state):
    return [values(value) for network in (state.student, state.teacher) for value in network.parameters()]


def assert_close(ours, theirs, tolerance=1e-6):
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("device", "accum_steps"), [("cuda", 1), ("cuda:1", 1), ("cuda", 2)])
def test_a_step_does_not_synchronise_and_equals_the_cpus(gpu, precision, device, accum_steps):
    batch, state, own = create_batch(), create_state(device), create_state("cpu")
    on_gpu, kernels = moved(batch, gpu, device), []
    for bidirectional in (False, True, True):
        gpu.reset()
        measures, is_finite = train_step(state, on_gpu, bidirectional, accum_steps, precision)
        expected, _ = train_step(own, batch, bidirectional, accum_steps, precision)
        assert not gpu.waits
        kernels.append(gpu.kernels)
        assert values(is_finite).all()
        assert_close([values(measures[name]) for name in expected], expected.values())
    assert_close(weights(state), weights(own))
    # No kernel for each image, class or parameter: twice the images and classes take as many kernels.
    twice = create_state(device, seen_classes=10)
    for bidirectional, count in zip((False, True, True), kernels, strict=True):
        larger = moved(create_batch(18), gpu, device)
        gpu.reset()
        train_step(twice, larger, bidirectional, accum_steps, precision)
        assert gpu.kernels == count
    assert all(isinstance(value, OnGpu) for value in state.trainable_parameters())


class Pinned:
    """A training loader whose batches lie in pinned memory."""

    def __init__(self, loader, gpu):
        self.loader, self.gpu = loader, gpu
        self.batch_sampler, self.dataset = loader.batch_sampler, loader.dataset

    def __iter__(self):
        for batch in self.loader:
            yield [self.gpu.pin(tensor) for tensor in batch]


def test_an_epoch_synchronises_once_at_its_end_and_logs_every_step(gpu, tiny, tmp_path):
    benchmark = open_benchmark("sketchy", tiny)
    data = open_training_data(benchmark, LoaderOptions(48, 3), imagenet_classes=None, validate=False)
    config, own, expected = config_of(epochs=1), create_state("cpu", 2, 1000), []
    assert not train_epoch(own, data, config, after_step=lambda each: expected.append(each.clone()))
    state, log = create_state("cuda", 2, 1000), Log(tmp_path, 0, 0, len(expected))
    loader, mask = Pinned(data.train_loader, gpu), gpu.pin(data.semantic_mask).to("cuda", non_blocking=True)
    found, waits = [], []
    gpu.reset()

    def after_step(each):
        found.append(values(each))
        waits.append(sum(gpu.waits.values()))

    train_epoch(state, TrainingData(loader, mask, data.file_lists), config, log, print_freq=1, after_step=after_step)
    assert waits == [0] * len(expected)
    assert dict(gpu.waits) == {"an event that nothing follows": 1}
    # Of a step: images, labels, which are photos, noise; and back, what was measured.
    assert gpu.copies == 5 * len(expected)
    assert_close(found, expected)
    assert_close(weights(state), weights(own))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [[line[name] for name in LOGGED] for line in lines] == [each.tolist() for each in found]


def short_of_memory(most):
    """`_add_gradients` on a GPU that holds `most` images at a time, and the numbers of images that it was given."""
    add, tried = train_step_module._add_gradients, []

    def limited(student, teacher, batch, *rest):
        tried.append(len(batch.images))
        if len(batch.images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return add(student, teacher, batch, *rest)

    return limited, tried


def train_epochs(state, data, config):
    """The values (LOGGED,) of all steps, on the CPU."""
    steps = []
    for _ in range(config.epochs):
        train_epoch(state, data, config, after_step=lambda each: steps.append(values(each).clone()))
        close_epoch(state, data, config)
    return steps


def config_of(**options):
    return TrainConfig(last_warmup_epoch=-1, lr=1e-3, teacher_lr=1e-3, **options)


def test_a_batch_that_does_not_fit_is_accumulated_with_one_note(gpu, tiny, monkeypatch, capsys):
    data = open_training_data(
        open_benchmark("sketchy", tiny), LoaderOptions(48, 6), imagenet_classes=None, validate=False
    )
    own = create_state("cpu", 2, 1000, drop_path=0.5)
    expected = train_epochs(own, data, config_of(epochs=2, accum_steps=4))
    limited, tried = short_of_memory(2)
    monkeypatch.setattr(train_step_module, "_add_gradients", limited)
    state = create_state("cuda", 2, 1000, drop_path=0.5)
    on_gpu = TrainingData(data.train_loader, data.semantic_mask.to("cuda"), data.file_lists)
    # The second epoch knows what the first one found out.
    assert_close(train_epochs(state, on_gpu, config_of(epochs=2)), expected)
    assert_close(weights(state), weights(own))
    assert tried[:3] == [6, 3, 2] and max(tried[3:]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith("--accum_steps 4")


@pytest.fixture
def other_rules():
    """TF32 is allowed by the environment, which the precision fp32 forbids."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield lambda: [switch.allow_tf32 for switch in switches]
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


def test_the_memory_probe_allocates_as_much_as_a_step_and_frees_it(gpu, monkeypatch, other_rules):
    add, tried = train_step_module._add_gradients, []

    def short_of_memory_once(student, teacher, batch, counts, bidirectional, precision, loss_weights):
        tried.append((bidirectional, other_rules(), gpu.held()))
        found = add(student, teacher, batch, counts, bidirectional, precision, loss_weights)
        activations = batch.images + 1
        if len(tried) == 1:
            raise torch.OutOfMemoryError(f"CUDA out of memory beside {activations.shape}")
        return found

    state, batch = create_state("cuda"), moved(create_batch(), gpu, "cuda")
    before, emptied = gpu.held(), []
    monkeypatch.setattr(train_step_module, "_add_gradients", short_of_memory_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(gpu.held()))
    assert train_step_module.find_accum_steps(state, batch, 1, "fp32") == 2
    assert gpu.held() == before and emptied == [before]
    for _ in range(2):  # the second has Adam's moments
        train_step(state, batch, True, 2, "fp32")
    assert all(each[:2] == (True, [False, False]) for each in tried)
    whole, half, _, first, _, second, _ = (size for *_, size in tried)
    assert half == whole  # nothing of the whole is left
    assert 0.99 * second < half and first < 0.9 * second  # Adam also counts steps, in a number for each parameter


def test_validation_has_the_precision_of_training(monkeypatch, other_rules):
    state, data, seen = create_state("cpu"), TrainingData(None, None, [], val_loader=[], val_size=1), []
    state.metric_sums, state.step = torch.zeros(len(LOGGED)), 1
    monkeypatch.setattr(training, "validate", lambda *_: seen.append(other_rules()) or 50.0)
    close_epoch(state, data, config_of(epochs=1, precision="fp32"))
    assert seen == [[False, False]] and state.history[0]["accuracy"] == 50


def test_out_of_memory_with_single_images_ends_the_run(gpu, monkeypatch):
    limited, _ = short_of_memory(0)
    monkeypatch.setattr(train_step_module, "_add_gradients", limited)
    with pytest.raises(torch.OutOfMemoryError):
        train_step_module.find_accum_steps(create_state("cuda"), moved(create_batch(), gpu, "cuda"), 1, "fp32")


def test_an_illegal_memory_access_is_not_out_of_memory(gpu, monkeypatch):
    tried, state, batch = [], create_state("cuda"), moved(create_batch(), gpu, "cuda")
    monkeypatch.setattr(train_step_module, "_add_gradients", lambda *_: illegal(tried))
    for work in (
        lambda: train_step_module.find_accum_steps(state, batch, 1, "fp32"),
        lambda: evaluation._halving(lambda _: illegal(tried), lambda: None)(torch.arange(6)),
        one_line_errors()(lambda: illegal(tried)),  # a bug keeps its traceback
    ):
        tried.clear()
        with pytest.raises(RuntimeError, match="illegal memory access"):
            work()
        assert tried == [1]


def illegal(tried):
    tried.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_extraction_synchronises_once_a_batch(gpu):
    images = torch.randint(0, 256, (10, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batches = [(gpu.pin(part.clone()), None) for part in images.split(4)]
    loader = type("Loader", (), {"dataset": images, "__iter__": lambda self: iter(batches)})()
    expected = list(extract(create_state("cpu").student, loader, "cpu"))
    student = create_state("cuda:1").student
    gpu.reset()
    found = list(extract(student, loader, "cuda:1"))
    assert dict(gpu.waits) == {"a copy to the host": len(batches)} and gpu.copies == 2 * len(batches)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_evaluation_synchronises_a_few_times_a_chunk(gpu, golden):
    z = golden("matching")
    features = Features(*(z[name].numpy() for name in ("gallery", "gallery_labels", "query", "query_labels")))
    rows = {None: None, (2, 5): z["M2K5_codebook"].numpy()}
    expected = evaluate_rows(features, rows, nearest={(2, 5): 7}, dtype=torch.float64)
    gpu.reset()
    found = evaluate_rows(features, rows, nearest={(2, 5): 7}, device="cuda", dtype=torch.float64)
    # One chunk. Copies of its queries, the relevant photos of each row, and the values that come back.
    assert sum(gpu.waits.values()) < 45
    for key, row in expected.items():
        for name, value in row.items():
            torch.testing.assert_close(found[key][name], value, rtol=0, atol=1e-12)


def test_the_memory_of_a_chunk_is_freed_before_it_is_halved(gpu, golden, monkeypatch):
    z, tried = golden("matching"), []
    features = Features(*(z[name].numpy() for name in ("gallery", "gallery_labels", "query", "query_labels")))

    def short_of_memory(query, photos, out=None):
        tried.append((len(query), gpu.held()))
        found = euclidean_distances(query, photos, out=out)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(evaluation, "euclidean_distances", short_of_memory)
    evaluate_rows(features, {None: None}, device="cuda", dtype=torch.float64)
    (whole, before), (half, after), _ = tried
    # Of each sketch: its row of the scratch matrix, its feature and its label, 8 bytes a number.
    assert before - after == (whole - half) * 8 * (len(features.gallery) + features.query.shape[1] + 1)


def test_ranks_equal_the_cpus(gpu):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (5, 40), generator=generator).float()  # with ties
    labels, gallery = torch.arange(5) % 3, torch.arange(40) % 3
    expected = rank(scores, SameClass(labels, gallery), nearest=4)
    found = rank(scores.to("cuda"), SameClass(labels, gallery).to("cuda"), nearest=4)
    assert torch.equal(values(found.hits), expected.hits) and torch.equal(values(found.nearest), expected.nearest)
    assert torch.equal(values(average_precision(found)), average_precision(expected))


def test_an_operation_on_two_devices_fails(gpu):
    one, other, host = torch.ones(2).to("cuda:0"), torch.ones(2).to("cuda:1"), torch.ones(2)
    for pair in ((one, other), (one, host), (host, one)):
        with pytest.raises(RuntimeError, match="tensors on"):
            torch.add(*pair)
    assert values(one + torch.tensor(2.0)).tolist() == [3, 3]  # a number is passed along


def test_what_waits_is_counted(gpu):
    one = torch.ones(2).to("cuda")
    assert dict(gpu.waits) == {"a copy from memory that is not pinned": 1}
    for wait in (one.tolist, one.nonzero, lambda: bool(one.sum() > 1), lambda: one[one > 0], one.cpu):
        gpu.reset()
        wait()
        assert sum(gpu.waits.values()) == 1, gpu.waits
    gpu.reset()
    gpu.pin(host := torch.ones(2)).to("cuda", non_blocking=True)
    assert not gpu.waits
    host.to("cuda")
    assert sum(gpu.waits.values()) == 1 and gpu.copies == 2


def points_of(components):
    """Points (600, 12) float32 around as many centres, and the component that each point starts in."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(components, 12))[generator.integers(components, size=600)]
    points = centres + 0.7 * generator.normal(size=(600, 12))
    return torch.from_numpy(points).float(), torch.arange(600) % components


def test_a_mixture_equals_the_cpus_and_synchronises_once_an_iteration(gpu, monkeypatch):
    monkeypatch.setattr(gmm, "ITERATIONS", 8)
    points, start = points_of(5)
    expected = fit_mixture(points, start, 5)
    on_gpu = points.to("cuda:1")
    gpu.reset()
    found = fit_mixture(on_gpu, start, 5)
    assert found.iterations == expected.iterations > 3 and found.means.dtype == torch.float64
    torch.testing.assert_close(values(found.means), expected.means, rtol=0, atol=1e-9)
    # Before the first iteration the start is copied, and the first factorisations are checked.
    assert sum(gpu.waits.values()) <= found.iterations + 3, gpu.waits


def test_each_iteration_launches_as_many_kernels_whatever_the_number_of_components(gpu, monkeypatch):
    kernels = {}
    for components in (2, 9):
        points, start = points_of(components)
        for iterations in (1, 2, 3):
            monkeypatch.setattr(gmm, "ITERATIONS", iterations)
            gpu.reset()
            assert fit_mixture(points.to("cuda"), start, components).iterations == iterations
            kernels[components, iterations] = gpu.kernels
    assert all(kernels[2, iterations] == kernels[9, iterations] for iterations in (1, 2, 3))
    assert kernels[9, 3] - kernels[9, 2] == kernels[9, 2] - kernels[9, 1] > 0


def test_codebooks_equal_the_cpus_and_k_means_runs_on_the_cpu(gpu, golden):
    gallery = golden("matching")["gallery"].numpy()
    expected, _ = fit_codebooks(gallery, [(2, 5), (4, 6)])
    gpu.reset()
    found, failures = fit_codebooks(gallery, [(2, 5), (4, 6)], device="cuda")
    assert gpu.copies >= 6 and gpu.kernels > 0  # all six mixtures were fitted there
    assert not failures and found.keys() == expected.keys()
    for key, codebook in expected.items():
        np.testing.assert_allclose(found[key], codebook, atol=1e-6)


@pytest.mark.parametrize(("on_gpu", "device"), [(0.01, "cuda"), (0.5, "cpu")])
def test_mixtures_are_fitted_on_the_cpu_if_the_gpu_is_slow_in_float64(monkeypatch, on_gpu, device):
    monkeypatch.setattr(codebooks, "_time_matmul", {"cpu": 1.0, "cuda": on_gpu}.get)
    codebooks.mixture_device.cache_clear()
    assert codebooks.mixture_device("cuda") == device and codebooks.mixture_device("cpu") == "cpu"
    codebooks.mixture_device.cache_clear()


def test_a_rank_sets_its_gpu_before_the_process_group_forms(monkeypatch):
    called = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(str(device)))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, device_id: called.append((backend, str(device_id)))
    )
    distributed.init_process_group(distributed.local_device("cuda"))
    # Else every process would take memory of the first GPU, too. Gloo is for what the host says.
    assert called == ["cuda:1", ("cpu:gloo,cuda:nccl", "cuda:1")]
