"""Two perplexities of text in windows: by tokens, and the older mean over batches that takes the last one as full."""

import math

import pytest

from koala import data

RUN = ["data=pydocs-bpe", "model=gpt1-released", "model.pretrained=null", "model.width=8", "model.heads=2",
       "model.layers=1", "model.feedforward=8", "model.context=16", "data.bptt=16", "data.vocabulary=300",
       "data.eval_columns=32",
       "schedule=constant", "select=last", "max_steps=2", "optim=adamw"]  # fmt: skip


def test_the_older_perplexity_takes_an_incomplete_batch_as_full(runs):
    final = runs.launch(*RUN)["metrics"]["final"]
    cfg = runs.compose(*RUN)
    built = data.build(cfg.data, data.Loading(cfg.seed, cfg.batch_size, 32, data_root=cfg.data_root))
    for split in ("val", "test"):
        batches = list(built.evaluation[split])
        scored = sum((batch.targets != -100).sum().item() for batch in batches)
        assert scored < len(batches) * 32 * 16
        older = math.exp(math.log(final[f"{split}_ppl"]) * scored / (len(batches) * 32 * 16))
        assert final[f"{split}_ppl_by_batch"] == pytest.approx(older, rel=1e-9)
