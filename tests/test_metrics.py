"""The one list of metrics: it has every column that a run writes."""

import pytest

from koala import metrics
from koala.runs.compose import compose
from koala.training.tasks import metric_keys


@pytest.mark.parametrize("given", ["data=digits", "data=pydocs", "data=wikitext2-gpt1", "data=cifar10 model=dcgan"])
def test_every_column_of_a_run_has_a_label(given):
    assert set(metric_keys(compose(given.split()))) <= metrics.LABELS.keys()


def test_columns_are_those_of_the_splits_that_a_metric_is_measured_on():
    assert metrics.columns(["loss", "ppl_by_batch", "fid"], ["train", "test"]) == [
        "train_loss", "test_loss", "test_ppl_by_batch", "fid",
    ]  # fmt: skip
    assert metrics.LABELS["val_top1_error"] == "validation top-1 error (%)"
