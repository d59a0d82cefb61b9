"""Lightning's automatic and manual optimization, its precisions, and Fabric."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import koala

from .problem import (
    OPTIMIZERS,
    STEPS,
    Images,
    assert_agree,
    assert_same_bits,
    optimizer_for,
    snippets,
    trained_plainly,
)

lightning = pytest.importorskip("lightning")
PAGE = snippets("lightning", "lightning-manual", "fabric")


@pytest.fixture
def model():
    """ConvNeXt of two stages, which has no batch statistics."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    blocks = [
        torchvision.models.convnext.CNBlockConfig(8, 16, 1),
        torchvision.models.convnext.CNBlockConfig(16, None, 1),
    ]
    net = torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=0.0, layer_scale=1.0, num_classes=4)
    net.features[0][0] = nn.Conv2d(1, 8, 2, 2)
    return net


def trainer_in(folder, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    arguments = {"max_epochs": 1, "gradient_clip_val": 1.0, "enable_checkpointing": False} | arguments
    return lightning.Trainer(default_root_dir=folder, **quiet, **arguments)


class Skips(PAGE["Classifier"]):
    """Returns None for the batches of ``skipped``, and scores validation batches with the loss of training."""

    skipped = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss

    def validation_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def test_the_page_as_printed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(OPTIMIZERS, "koala-m", {})
    before = copy.deepcopy(model)
    snippets("lightning", "lightning-run", model=model, loader=Images().loader(4))
    assert_agree(model, trained_plainly(before, "koala-m"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_with_validation_in_between(name, model, tmp_path):
    truth = trained_plainly(model, name)
    trainer = trainer_in(tmp_path, accumulate_grad_batches=4, val_check_interval=8)
    trainer.fit(Skips(model, name, **OPTIMIZERS[name]), Images().loader(4), Images(2).loader())
    assert_agree(model, truth)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_batch(name, model, tmp_path):
    truth = trained_plainly(model, name, batches=[0, 1, 3, 4])
    module = Skips(model, name, **OPTIMIZERS[name])
    module.skipped = (2,)
    trainer_in(tmp_path).fit(module, Images().loader())
    assert_agree(model, truth)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_manual_optimization(accumulate, model, tmp_path):
    truth = trained_plainly(model, "koala-m")
    module = PAGE["ManualClassifier"](model, "koala-m", accumulate, **OPTIMIZERS["koala-m"])
    trainer_in(tmp_path, gradient_clip_val=None).fit(module, Images().loader(accumulate))
    assert_agree(model, truth)


def test_manual_optimization_with_the_loss_told_to_step(model, tmp_path):
    class Recorder(PAGE["Classifier"]):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            self.optimizers().zero_grad()
            self.manual_backward(losses.mean())
            self.optimizers().step(loss=losses.mean(), loss_var=losses.square().mean())

    truth = trained_plainly(model, "koala-m", clip=None)
    trainer_in(tmp_path, gradient_clip_val=None).fit(Recorder(model, **OPTIMIZERS["koala-m"]), Images().loader())
    assert_agree(model, truth)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_mixed_precision_with_an_overflow(dtype, tolerance, model, tmp_path):
    """16-mixed on a CPU is the plugin with a scaler for it; one batch overflows and its step is skipped."""
    from lightning.pytorch.plugins import MixedPrecision

    name = "koala-m"
    half = dtype == torch.float16
    truth = trained_plainly(model, name, batches=[0, 1, 3, 4] if half else range(STEPS), autocast=dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if half else None
    plugin = MixedPrecision("16-mixed" if half else "bf16-mixed", "cpu", scaler)
    data = Images(spoiled=(2,) if half else ())
    module = Skips(model, name, **OPTIMIZERS[name])
    trainer_in(tmp_path, plugins=[plugin], accumulate_grad_batches=2).fit(module, data.loader(2))
    assert_agree(model, truth, tolerance)
    if half:
        assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("name", ["koala-m", "koala++"])
def test_resume_ends_with_the_same_bits(name, model, tmp_path):
    def fitted(network, epochs, resume=None):
        trainer = trainer_in(tmp_path, accumulate_grad_batches=4, max_epochs=epochs)
        module = PAGE["Classifier"](network, name, **OPTIMIZERS[name])
        trainer.fit(module, Images().loader(4), ckpt_path=resume, weights_only=True)
        return trainer

    fitted(copy.deepcopy(model), 1).save_checkpoint(tmp_path / "half.ckpt")
    fresh = copy.deepcopy(model)
    resumed = fitted(fresh, 2, tmp_path / "half.ckpt")
    full = fitted(model, 2)
    assert resumed.global_step == full.global_step == 2 * STEPS
    assert_same_bits(fresh.state_dict(), model.state_dict())
    assert_same_bits(resumed.optimizers[0].state_dict(), full.optimizers[0].state_dict())


def test_wrappers_and_the_optimizer_share_one_layout():
    """Two that rebind each other's views would be made anew twice a step."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = koala.MomentumKOALA([weight])
    wrappers = (
        lightning.pytorch.core.optimizer.LightningOptimizer(optimizer),
        lightning.fabric.wrappers._FabricOptimizer(optimizer, None),
    )
    optimizer.predict()
    layout = optimizer.cache.layout
    for wrapper in wrappers:
        weight.grad = torch.ones(3)
        optimizer.update(1.0)
        wrapper.predict()
        assert optimizer.cache.layout is layout
        assert not {"cache", "loss_buffer"} & wrapper.__dict__.keys()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["koala-m", "koala++"])
def test_fabric(name, accumulate, model):
    truth = trained_plainly(model, name)
    fabric = lightning.Fabric(accelerator="cpu")
    PAGE["train_with_fabric"](fabric, model, Images().loader(accumulate), optimizer_for(model, name), accumulate)
    assert_agree(model, truth)
