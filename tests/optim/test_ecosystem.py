"""The optimizers in other people's training loops, unchanged. Each test is also the example to copy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import koala

from .cases import NAMES


def blobs():
    """Three well separated classes; 96 samples of 4 features."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(96) % 3
    inputs = torch.randn(96, 4, generator=generator) + 2 * F.one_hot(targets, 4)
    return TensorDataset(inputs, targets)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def mean_loss(model):
    inputs, targets = blobs().tensors
    with torch.no_grad():
        return F.cross_entropy(model(inputs), targets).item()


@pytest.mark.parametrize("name", NAMES)
def test_plain_loop(name):
    model = network()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    before = mean_loss(model)
    for _ in range(4):
        for inputs, targets in DataLoader(blobs(), batch_size=16):

            def closure(inputs=inputs, targets=targets):
                optimizer.zero_grad()
                losses = F.cross_entropy(model(inputs), targets, reduction="none")
                losses.mean().backward()
                return losses

            optimizer.step(closure)
        scheduler.step()
    assert mean_loss(model) < 0.8 * before


@pytest.mark.parametrize("name", NAMES)
def test_lightning(name, tmp_path):
    """Automatic optimization calls ``step(closure)``; its closure returns the mean loss."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch):
            inputs, targets = batch
            return F.cross_entropy(self.net(inputs), targets)

        def configure_optimizers(self):
            optimizer = koala.create_optimizer(name, self.parameters(), lr=0.3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    module = Module()
    before = mean_loss(module.net)
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(blobs(), batch_size=16))
    assert mean_loss(module.net) < 0.8 * before


@pytest.mark.parametrize("name", NAMES)
def test_timm_style(name):
    """timm's script calls ``step()`` bare after its own backward: its loss function tells the optimizer what it saw."""
    timm_scheduler = pytest.importorskip("timm.scheduler")
    model = network()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    scheduler = timm_scheduler.CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=0.01)

    def loss_fn(output, targets):
        return optimizer.observe(F.cross_entropy(output, targets, reduction="none"))

    before = mean_loss(model)
    for epoch in range(4):
        for inputs, targets in DataLoader(blobs(), batch_size=16):
            optimizer.predict()
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
        scheduler.step(epoch + 1)
    assert mean_loss(model) < 0.9 * before


@pytest.mark.parametrize("name", NAMES)
def test_hf_trainer(name, tmp_path):
    """The Trainer calls ``step()`` bare: ``compute_loss_func`` tells the loss, a callback predicts."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, inputs, labels=None):
            return {"logits": self.net(inputs)}

    class Predict(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            optimizer.predict()

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return optimizer.observe(F.cross_entropy(outputs["logits"], labels, reduction="none"))

    model = Model()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    before = mean_loss(model.net)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=16, report_to="none",
            save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True,
        ),
        train_dataset=[{"inputs": x, "labels": y} for x, y in blobs()],
        optimizers=(optimizer, None),
        compute_loss_func=compute_loss,
        callbacks=[Predict()],
    )  # fmt: skip
    trainer.train()
    assert mean_loss(model.net) < 0.8 * before
