"""One's own loop with a scaler, and the training step of timm's train.py."""

import copy

import pytest
import torch
from torch.nn import functional as F

from .problem import (
    ACCUMULATED,
    OPTIMIZERS,
    Images,
    assert_agree,
    assert_same_bits,
    optimizer_for,
    snippets,
    trained_plainly,
)

timm = pytest.importorskip("timm")
schedulers = pytest.importorskip("timm.scheduler")
PAGE = snippets("own", "timm")


@pytest.fixture
def model():
    """A vision transformer of timm's, made small."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, num_classes=4, embed_dim=16, depth=1, num_heads=2
    )


def scaler_for(loop):
    """A gradient scaler for the CPU as the loop takes it, and the torch one inside."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    if loop == "train_epoch":
        return {"scaler": scaler}, scaler
    native = timm.utils.NativeScaler("cpu")
    native._scaler = scaler
    return {"loss_scaler": native}, scaler


@pytest.mark.parametrize(("name", "accumulate"), ACCUMULATED)
@pytest.mark.parametrize("loop", ["train_epoch", "train_one_epoch"])
def test_accumulation(loop, name, accumulate, model):
    truth = trained_plainly(model, name)
    PAGE[loop](model, Images().loader(accumulate), optimizer_for(model, name), accumulate=accumulate)
    assert_agree(model, truth)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("loop", ["train_epoch", "train_one_epoch"])
def test_step_skipped_by_a_scaler(loop, name, model):
    truth = trained_plainly(model, name, batches=[0, 1, 3, 4])
    given, scaler = scaler_for(loop)
    PAGE[loop](model, Images(spoiled=(2,)).loader(4), optimizer_for(model, name), accumulate=4, **given)
    assert scaler.get_scale() == 32.0
    assert_agree(model, truth)


def test_evaluation_in_between_and_average_of_weights(model):
    """Validation through the optimizer's own loss function, with and without torch.no_grad."""
    before = copy.deepcopy(model)
    optimizer = optimizer_for(model, "koala-m")
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    schedule = schedulers.CosineLRScheduler(optimizer, t_initial=5, lr_min=0.5, t_in_epochs=False)
    for first in range(5):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for inputs, targets in Images(2).loader():
                    optimizer.observe(F.cross_entropy(model(inputs), targets, reduction="none"))
        batch = Images().loader().dataset[16 * first : 16 * first + 16]
        PAGE["train_one_epoch"](model, [batch], optimizer, model_ema=average)
        schedule.step_update(first + 1)  # from 0.5 to 0.5: the scheduler's hold on the groups is what is seen here
    assert_agree(model, trained_plainly(before, "koala-m"))
    average.eval()
    assert torch.isfinite(average(Images().inputs)).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_ends_with_the_same_bits(name, model, tmp_path):
    fresh = copy.deepcopy(model)
    full = optimizer_for(model, name)
    PAGE["train_one_epoch"](model, Images().loader(), full)
    torch.save({"model": model.state_dict(), "optimizer": full.state_dict()}, tmp_path / "last.pth")
    PAGE["train_one_epoch"](model, Images().loader(), full)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    resumed = optimizer_for(fresh, name)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    PAGE["train_one_epoch"](fresh, Images().loader(), resumed)
    assert_same_bits(fresh.state_dict(), model.state_dict())
    assert_same_bits(resumed.state_dict(), full.state_dict())
