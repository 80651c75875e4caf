"""Class names of features that were given, not computed from a benchmark's images."""

import numpy as np
import pytest

from datasets.classes import SKETCHY_SPLIT_UNSEEN, SKETCHY_SPLIT_UNSEEN_SKETCHES
from datasets.lists import open_benchmark, write_list
from datasets.protocols import LABEL_ORDERS
from models.eval.features import Features
from models.testing import name_classes

ORDERS = {release: list(unseen) for release, (_, unseen) in LABEL_ORDERS.items()}


def features_in(unseen, counts=SKETCHY_SPLIT_UNSEEN_SKETCHES):
    """Features with as many sketches of each class as were published, labelled in the order `unseen`."""
    labels = np.repeat(range(21), [counts[SKETCHY_SPLIT_UNSEEN.index(name)] for name in unseen])
    gallery_labels = np.arange(21)
    return Features(np.ones((21, 1), np.float32), gallery_labels, np.ones((len(labels), 1), np.float32), labels)


@pytest.fixture
def benchmark(tmp_path):
    """Class names in the order of the first release."""
    seen, unseen = next(iter(LABEL_ORDERS.values()))
    for file, names in (("cname_cid.txt", seen), ("cname_cid_zero.txt", unseen)):
        write_list(tmp_path / "zeroshot2" / file, zip(names, range(len(names)), strict=True))
    return open_benchmark("sketchy_split", tmp_path)


@pytest.mark.parametrize("release", ORDERS)
def test_given_features_are_named_by_their_own_order(release, benchmark, capsys):
    for lists in (None, benchmark):
        named = name_classes(features_in(ORDERS[release]), lists, given=True)
        assert named.names == ORDERS[release]
        assert f"note: class names follow {release}, as the numbers of sketches" in capsys.readouterr().err
    computed = name_classes(features_in(ORDERS[release]), benchmark)
    assert computed.names == benchmark.unseen_names and not capsys.readouterr().err


def test_an_assumed_order_has_a_note(benchmark, capsys):
    named = name_classes(features_in(SKETCHY_SPLIT_UNSEEN, [2] * 21), benchmark, given=True)
    assert named.names == list(SKETCHY_SPLIT_UNSEEN)
    assert "note: class names follow SAKE's followers (zeroshot0), as" in capsys.readouterr().err
