"""The Hugging Face Trainer: accumulation, evaluation, a scaler's skipped step, resuming, and training only biases."""

import copy

import pytest
import torch

import koala

from .problem import (
    ACCUMULATED,
    OPTIMIZERS,
    STEPS,
    Images,
    assert_agree,
    assert_same_bits,
    fp16_scaler,
    snippets,
    trained_plainly,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
PAGE = snippets("transformers", "transformers-tokens")


@pytest.fixture
def model():
    """ConvNeXt of two stages."""
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        image_size=16, patch_size=2, num_channels=1, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4,
        layer_scale_init_value=1.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ConvNextForImageClassification(config)


def examples(images=None):
    images = images or Images()
    return [{"pixel_values": image, "labels": target} for image, target in images]


def trainer_in(folder, model, name, dataset=None, accumulate=1, losses=PAGE["sample_losses"], **arguments):
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 16 // accumulate,
        "gradient_accumulation_steps": accumulate, "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "logging_strategy": "no",
    } | arguments  # fmt: skip
    cls = next(info.cls for info in koala.list_optimizers() if info.name == name)
    # the Trainer's weight decay stands in the groups that it makes
    hyper = dict(OPTIMIZERS[name])
    arguments["weight_decay"] = hyper.pop("weight_decay", 0.0)
    return PAGE["trainer_for"](model, dataset or examples(), losses, (cls, hyper), **arguments)


@pytest.fixture
def no_decay(monkeypatch):
    """The Trainer decays matrices only, so the plain loop would have to group weights as well."""
    monkeypatch.setitem(OPTIMIZERS, "koala-m", {"lr": 0.5})


class Evaluates(transformers.TrainerCallback):
    """Evaluates after every step."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        assert self.trainer.evaluate(examples(Images(2)))["eval_loss"] > 0


@pytest.mark.parametrize(("name", "accumulate"), ACCUMULATED)
def test_accumulation_with_evaluation_in_between(name, accumulate, model, tmp_path, no_decay):
    truth = trained_plainly(model, name)
    trainer = trainer_in(tmp_path, model, name, accumulate=accumulate)
    trainer.add_callback(Evaluates(trainer))
    trainer.train()
    assert_agree(model, truth)


def test_step_skipped_by_a_scaler(model, tmp_path, no_decay, monkeypatch):
    """The Trainer has fp16 on a GPU only; given a scaler for the CPU it does the same."""
    truth = trained_plainly(model, "koala-m", batches=[0, 1, 3, 4], autocast=torch.float16)
    trainer = trainer_in(tmp_path, model, "koala-m", examples(Images(spoiled=(2,))))
    scaler = fp16_scaler(trainer.accelerator, monkeypatch)
    trainer.train()
    assert scaler.get_scale() == 32.0
    assert_agree(model, truth, 2e-3)


@pytest.mark.parametrize("name", ["koala-m", "koala++"])
def test_resume_ends_with_the_same_bits(name, model, tmp_path):
    fresh = copy.deepcopy(model)
    full = trainer_in(tmp_path, model, name, accumulate=4, save_strategy="steps", save_steps=2)
    full.train()
    resumed = trainer_in(tmp_path, fresh, name, accumulate=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(fresh.state_dict(), model.state_dict())
    assert_same_bits(resumed.optimizer.state_dict(), full.optimizer.state_dict())


@pytest.mark.parametrize("name", ["koala-m", "koala++"])
def test_only_biases_train(name, model, tmp_path, no_decay):
    """BitFit: the Trainer's first group, the weights that decay, is empty then."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad = key.endswith("bias")
    truth = trained_plainly(model, name)
    trainer_in(tmp_path, model, name).train()
    assert_agree(model, truth)


def test_tokens_of_a_language_model(tmp_path):
    """Masked tokens do not count, neither in the loss nor in its second moment."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(32, (3 * 16, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(12) >= 4 + torch.arange(len(tokens))[:, None] % 8, -100)
    dataset = [{"input_ids": row, "labels": masked} for row, masked in zip(tokens, labels, strict=True)]
    finals, noises = [], []
    for accumulate in (1, 4):
        finals.append(copy.deepcopy(model))
        trainer = trainer_in(tmp_path, finals[-1], "koala-m", dataset, accumulate, PAGE["token_losses"], max_steps=3)
        trainer.train()
        noises.append(trainer.optimizer.param_groups[0]["R"].item())
    assert_agree(*finals)
    assert noises[0] == pytest.approx(noises[1], rel=1e-4)
