"""K-FAC and Shampoo against their equations; AdaHessian's average; which tensors Muon takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koala.baselines.adahessian import AdaHessian
from koala.baselines.muon import Muon, hidden_matrices
from koala.baselines.shampoo import Shampoo

from .networks import batch, closure_for, make


def sgd_step(parameters, directions, buffers, lr, momentum, decay, clip):
    """Clipping and SGD on given directions, as torch does them."""
    total = torch.sqrt(sum(d.square().sum() for d in directions))
    scale = min(1.0, clip / (total.item() + 1e-6))
    with torch.no_grad():
        for index, (x, d) in enumerate(zip(parameters, directions, strict=True)):
            d = d * scale + decay * x
            buffers[index] = d if buffers[index] is None else momentum * buffers[index] + d
            x -= lr * buffers[index]


def inverse_root(matrix, power, ridge):
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0) + ridge * values.max()
    return vectors @ torch.diag(values ** (-1 / power)) @ vectors.T


def test_shampoo_follows_its_equations():
    lr, momentum, decay, clip, damping = 0.05, 0.9, 0.01, 1.0, 1e-4
    model, truth = make(), make()
    optimizer = Shampoo(model.parameters(), lr, weight_decay=decay, clip=clip, damping=damping)
    parameters = list(truth.parameters())
    buffers, moments = [None] * len(parameters), {}
    for step in range(3):
        images, targets = batch(step)
        directions = list(torch.autograd.grad(F.cross_entropy(truth(images), targets), parameters))
        for index, gradient in enumerate(directions):
            modes = [mode for mode, size in enumerate(gradient.shape) if size > 1 and gradient.dim() > 1]
            for mode in modes:
                unfolded = gradient.movedim(mode, 0).reshape(gradient.shape[mode], -1)
                old = moments.get((index, mode), damping * torch.eye(len(unfolded), dtype=gradient.dtype))
                moments[index, mode] = old + unfolded @ unfolded.T
                root = inverse_root(moments[index, mode], 2 * gradient.dim(), damping)
                letters = "abcd"[: gradient.dim()]
                new = letters.replace(letters[mode], "z")
                directions[index] = torch.einsum(f"z{letters[mode]},{letters}->{new}", root, directions[index])
        sgd_step(parameters, directions, buffers, lr, momentum, decay, clip)
        optimizer.step(closure_for(model, optimizer, images, targets))
        torch.testing.assert_close(list(model.parameters()), parameters, rtol=1e-4, atol=1e-6)  # roots to 1e-6


def kfac_factors(model, images, seed):
    """A and B of each Linear and Conv2d, of labels drawn with `seed`."""
    model = copy.deepcopy(model)
    inputs, outputs = {}, {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    for name, layer in layers.items():

        def keep(_, given, output, name=name):
            inputs[name], outputs[name] = given[0].detach(), output
            return output.clone()

        layer.register_forward_hook(keep)
    logits = model(images)
    labels = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    grads = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), list(outputs.values()))
    result = {}
    for (name, layer), g in zip(((n, layers[n]) for n in outputs), grads, strict=True):
        a = inputs[name]
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
            a = a.reshape(*a.shape[:2], layer.groups, -1).mean(2)  # groups pooled
            g = g.flatten(2).transpose(1, 2)
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        result[name] = a.T @ a / len(a), g.T @ g / len(images)
    return result


def test_kfac_follows_its_equations_and_leaves_batch_statistics_alone():
    kfac = pytest.importorskip("koala.baselines.kfac", exc_type=ImportError)
    lr, momentum, decay, clip, damping, period, seed = 0.05, 0.9, 0.01, 1.0, 1e-3, 2, 7
    model, truth = make(), make()
    model.grouped = nn.Conv2d(4, 6, 2, bias=False).double()  # its groups are pooled in the library, not in the page
    truth.grouped = copy.deepcopy(model.grouped)
    optimizer = kfac.KFAC(model, lr, weight_decay=decay, clip=clip, damping=damping, update_period=period, seed=seed)
    names, parameters = zip(*truth.named_parameters(), strict=True)
    buffers, inverses = [None] * len(parameters), {}
    for step in range(4):
        images, targets = batch(step)
        if step % period == 0:
            for name, (a, b) in kfac_factors(truth, images, (seed * 1_000_003 + step) * 4096).items():
                pi, r = torch.sqrt(a.diag().mean() / b.diag().mean()), damping**0.5
                inverses[name] = tuple(
                    torch.linalg.inv(m + max(d.item(), 1e-7) * torch.eye(len(m), dtype=m.dtype))
                    for m, d in ((a, r * pi), (b, r / pi))
                )
        directions = list(torch.autograd.grad(F.cross_entropy(truth(images), targets), parameters))
        for index, name in enumerate(names):
            layer, _, part = name.rpartition(".")
            if layer in inverses:
                a, b = inverses[layer]
                g = b @ directions[index].flatten(1) @ a if part == "weight" else b @ directions[index]
                directions[index] = g.view_as(directions[index])
        sgd_step(parameters, directions, buffers, lr, momentum, decay, clip)
        optimizer.step(closure_for(model, optimizer, images, targets))
        torch.testing.assert_close(list(model.parameters()), list(parameters), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(model.norm.running_mean, truth.norm.running_mean, rtol=1e-8, atol=1e-10)
        assert model.norm.num_batches_tracked == step + 1


def test_adahessian_averages_over_kernels_and_takes_the_exact_diagonal():
    """The loss's Hessian is diagonal, so one draw gives |its entries| exactly."""
    torch.manual_seed(0)
    kernel, matrix = nn.Parameter(torch.randn(2, 3, 2, 2).double()), nn.Parameter(torch.randn(3, 2).double())
    curvature = [torch.randn_like(kernel), torch.randn_like(matrix)]
    start = [kernel.detach().clone(), matrix.detach().clone()]
    lr, eps, decay = 0.1, 1e-4, 0.2
    optimizer = AdaHessian([kernel, matrix], lr, eps=eps, weight_decay=decay)
    loss = sum((c * x**2).sum() / 2 for c, x in zip(curvature, (kernel, matrix), strict=True))
    loss.backward(create_graph=True)
    optimizer.step()
    averaged = [curvature[0].abs().mean((2, 3), keepdim=True), curvature[1].abs()]
    for x, before, c, d in zip((kernel, matrix), start, curvature, averaged, strict=True):
        torch.testing.assert_close(x.detach(), before - lr * (c * before / (d + eps) + decay * before))


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.zeros(5, 4))
            self.hidden, self.decoder = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

    def names(model):
        wanted = {id(p) for p in hidden_matrices(model)}
        return {name for name, p in model.named_parameters() if id(p) in wanted}

    assert names(Language()) == {"hidden.weight"}
    model = make(dtype=torch.float32)
    assert names(model) == {"conv.weight", "grouped.weight", "hidden.weight"}
    optimizer = Muon(model, lr=0.01, weight_decay=0.1)
    rates = {group["use_muon"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {True: 0.01, False: 0.01}
    losses = [optimizer.step(closure_for(model, optimizer, *batch(0, dtype=torch.float32))).item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_muon_moves_a_matrix_as_torchs_at_adamws_rate_and_the_rest_as_adamw():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 24, bias=False), nn.Tanh(), nn.Linear(24, 11))

    ours, truth = network(), network()
    optimizer = Muon(ours, lr=0.01, weight_decay=0.1)
    matrix, rest = [truth[1].weight], [truth[0].weight, *truth[3].parameters()]
    muon = torch.optim.Muon(matrix, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(5):
        tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((ours, [optimizer]), (truth, [muon, adamw])):
            model.zero_grad()
            F.cross_entropy(model(tokens), tokens.roll(1)).backward()
            for one in optimizers:
                one.step()
    torch.testing.assert_close(ours[1].weight, truth[1].weight, rtol=0, atol=2e-3)  # five iterations in bfloat16
    for our_part, theirs in zip([ours[0].weight, *ours[3].parameters()], rest, strict=True):
        torch.testing.assert_close(our_part, theirs, rtol=1e-3, atol=1e-4)
