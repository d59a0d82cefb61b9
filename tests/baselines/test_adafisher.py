"""AdaFisher against its equations, evaluated sample by sample, and what they imply."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koala.baselines.adafisher import AdaFisher, AdaFisherW, normalised
from tests.refused import rejected

from .networks import batch, closure_for, make

GAMMA, LAYERS = 0.8, ("conv", "norm", "grouped", "tokens", "hidden", "head")


def seen(model, images, targets):
    """Each layer's input and the gradient of the batch's mean loss with respect to its output."""
    model, inputs, outputs = copy.deepcopy(model), {}, {}
    for name in LAYERS:

        def keep(_, given, output, name=name):
            inputs[name], outputs[name] = given[0].detach().clone(), output
            return output.clone()  # what follows may change its input in place

        layer = getattr(model, name)
        layer._forward_hooks.clear()
        layer.register_forward_hook(keep)
    loss = F.cross_entropy(model(images), targets)
    return inputs, dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))


def diagonals(model, images, targets):
    """H and S of every layer, by loops over samples and positions."""
    inputs, gradients = seen(model, images, targets)
    result = {}
    for name in LAYERS:
        layer, h, s = getattr(model, name), inputs[name], gradients[name]
        if isinstance(layer, nn.Linear):
            rows = [torch.cat([row, row.new_ones(1)]) for row in h.reshape(-1, h.shape[-1])]
            result[name] = (
                sum(r**2 for r in rows) / len(rows),
                sum(r**2 for r in s.reshape(-1, s.shape[-1])) / s[..., 0].numel(),
            )
        elif isinstance(layer, nn.Conv2d):
            padded, k, patches = F.pad(h, [layer.padding[0]] * 4), layer.kernel_size[0], []
            for image in padded:
                for part in image.chunk(layer.groups):
                    for row in range(0, part.shape[1] - k + 1, layer.stride[0]):
                        for column in range(0, part.shape[2] - k + 1, layer.stride[0]):
                            patch = part[:, row : row + k, column : column + k].flatten()
                            patches.append(torch.cat([patch, patch.new_ones(1)]) if layer.bias is not None else patch)
            moments = sum(p**2 for p in patches) / len(patches)
            columns = s.permute(0, 2, 3, 1).reshape(-1, s.shape[1])
            result[name] = moments / len(moments), sum(c**2 for c in columns) / len(columns)
        else:
            count, kinds, positions = len(h), h.shape[1], h[0, 0].numel()
            data = sum((h[:, c].sum() / positions**2) ** 2 for c in range(kinds)) / count**2
            per = s.sum((0, 2, 3)) if isinstance(layer, nn.BatchNorm2d) else s.sum((0, 1))
            result[name] = torch.stack([data, data.new_tensor(kinds / count**2)]), per**2 / count
    return result


def norm(v):
    return (v - v.min()) / (v.max() - v.min() + 1e-6)


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_follows_its_equations(kind):
    lr, beta, damping, decay, period, scale = 0.01, 0.9, 1e-3, 0.05, 2, 300.0
    model, truth = make(), make()
    optimizer = kind(model, lr, weight_decay=decay, update_period=period, loss_scale=scale)
    h = s = None
    momentum = {name: torch.zeros_like(p) for name, p in truth.named_parameters()}
    for step in range(5):
        images, targets = batch(step)
        if step % period == 0:
            new = diagonals(truth, images, targets)
            h = {n: 0.1 * GAMMA * (h[n] if h else 1) + 0.01 * GAMMA * norm(new[n][0]) for n in LAYERS}
            s = {n: 0.1 * GAMMA * (s[n] if s else 1) + 0.01 * GAMMA * norm(scale**2 * new[n][1]) for n in LAYERS}
        loss = F.cross_entropy(truth(images), targets)
        gradients = torch.autograd.grad(loss, list(truth.parameters()))
        with torch.no_grad():
            for (name, x), g in zip(truth.named_parameters(), gradients, strict=True):
                layer, _, part = name.rpartition(".")
                fisher = torch.ones_like(x)
                if layer:
                    joint = torch.outer(s[layer], h[layer]) + damping
                    fisher = joint[:, -1] if part == "bias" else joint[:, : x[0].numel()].reshape(x.shape)
                g = g + decay * x if kind is AdaFisher else g
                momentum[name] = beta * momentum[name] + (1 - beta) * g
                direction = momentum[name] / ((1 - beta ** (step + 1)) * fisher)
                x -= lr * (direction + decay * x if kind is AdaFisherW else direction)
        optimizer.step(closure_for(model, optimizer, images, targets))
        for (name, actual), expected in zip(model.named_parameters(), truth.parameters(), strict=True):
            torch.testing.assert_close(
                actual, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name, k=step: f"{n} {k}: {m}"
            )


def test_two_numbers_of_a_norm_are_zero_and_one_and_the_scale_of_the_loss_matters():
    for numbers in ([3.0, 0.5], [1e-3, 0.9]):
        assert sorted(normalised(torch.tensor(numbers)).round(decimals=5).tolist()) == [0.0, 1.0]
    assert normalised(torch.tensor([float("inf"), 0.0, 0.5])).tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-5)
    gradients = torch.tensor([1e-9, 3e-9, 5e-9])  # of a batch-mean loss: far below the absolute 1e-6
    assert normalised(gradients).max() < 0.01
    assert normalised(gradients * 65536.0**2).max() > 0.99


def test_pieces_of_a_batch_give_the_same_step_as_the_whole():
    full, pieces = make(), make()
    for model in (full, pieces):
        model.norm = nn.Identity()  # normalises over what it sees, so its outputs differ
    one, two = AdaFisher(full, loss_scale=1e3), AdaFisher(pieces, loss_scale=1e3)
    images, targets = batch(0)

    def in_two():
        two.zero_grad()
        for part in (slice(0, 2), slice(2, 6)):
            (F.cross_entropy(pieces(images[part]), targets[part], reduction="sum") / 6).backward()

    one.step(closure_for(full, one, images, targets))
    two.step(in_two)
    torch.testing.assert_close(list(full.parameters()), list(pieces.parameters()), rtol=1e-9, atol=1e-12)


def test_evaluation_shows_nothing_and_a_saved_state_goes_on_with_the_same_bits():
    def train(steps, model, optimizer):
        for step in steps:
            optimizer.step(closure_for(model, optimizer, *batch(step)))
            model.eval()
            model(batch(99)[0])
            with torch.no_grad():
                model.train()(batch(98)[0])
        return model

    first = make()
    optimizer = AdaFisher(first, update_period=2, loss_scale=1e3)
    train(range(3), first, optimizer)
    second = copy.deepcopy(first)  # with hooks that still point to the first's optimizer, as a weight average has
    fresh = make(1)
    fresh.load_state_dict(second.state_dict())
    resumed = AdaFisher(fresh, update_period=2, loss_scale=1e3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(range(3, 6), fresh, resumed)
    train(range(3, 6), first, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True))


def test_refuses_what_it_cannot_do():
    with rejected(ValueError, "damping=0"):
        AdaFisher(make(), damping=0)
    with rejected(ValueError, "padding=same"):
        AdaFisher(nn.Conv2d(1, 1, 3, padding="same"))
