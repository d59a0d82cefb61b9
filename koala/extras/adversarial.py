"""Adversarial training as another step of the same loop: WGAN with gradient penalty (Gulrajani et al., 2017).

A step of the loop is a batch of real images and one step of the critic on it; every `model.n_critic`-th is also one of
the generator. Each has its own optimizer of the same configuration. What is evaluated is an image of samples and the
Frechet distance of many (koala/extras/frechet.py).
"""

from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from koala.data.base import Batch
from koala.training.machine import Arithmetic
from koala.training.optimizers import allow_only, build_optimizer, filter_of, needs_of
from koala.training.ranks import Ranks
from koala.training.step import seed_all
from koala.training.tally import Tally
from koala.training.tasks import Task


class Pair(Optimizer):
    """The generator's and the critic's optimizers: one to a schedule and a checkpoint, two to their networks."""

    def __init__(self, generator: Optimizer, critic: Optimizer):
        self.generator, self.critic = generator, critic  # without Optimizer.__init__: it holds no tensors of its own

    @property
    def param_groups(self) -> list[dict]:
        """Both optimizers' groups, the very same: what a schedule sets is set."""
        return self.generator.param_groups + self.critic.param_groups

    def step(self, critic: Callable, generator: Callable | None = None) -> None:
        """The critic's step, and the generator's if there is a closure for it."""
        self.critic.step(critic)
        if generator is not None:
            self.generator.step(generator)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Both networks' gradients."""
        for optimizer in (self.generator, self.critic):
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """Both states by name."""
        return {"generator": self.generator.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """The inverse of `state_dict`."""
        self.generator.load_state_dict(state_dict["generator"])
        self.critic.load_state_dict(state_dict["critic"])


class Adversarial(Task):
    """Two networks in turn. Its tally is of the critic's losses; the generator's are counted beside them."""

    unit = "images"
    counts = ("generator_sum", "generator_count")
    splits = ("train",)

    def __init__(self, cfg: DictConfig, num_classes: int):
        self.metrics = ("loss", "generator_loss", "fid" if cfg.model.features == "inception" else "feature_distance")

    def check(self, cfg: DictConfig, world: int) -> None:
        """See `Task`."""
        super().check(cfg, world)
        allowed = {"accumulation": (1,), "compile": (False,), "wrapper": ("none",), "ranks": (1,)}
        allow_only(allowed, cfg, world, f"model={cfg.model.name} trains two networks in turn")

    def build_optimizer(self, cfg: DictConfig, module: nn.Module) -> Pair:
        """An optimizer for each of the two networks."""
        return Pair(*(build_optimizer(cfg.optim, cfg.wrapper, part) for part in (module.generator, module.critic)))

    def build_step(self, cfg, ranks, arithmetic, module, net, optimizer) -> "AdversarialStep":
        """See `AdversarialStep`."""
        return AdversarialStep(cfg, ranks, arithmetic, module, optimizer)

    def build_evaluation(self, *arguments):
        """See `AdversarialEvaluation`."""
        from koala.extras.frechet import AdversarialEvaluation  # here: torchmetrics takes a second to import

        return AdversarialEvaluation(*arguments)

    def summary(self, tally: Tally) -> dict[str, float]:
        """The critic's mean loss, and the generator's if it took a step."""
        generated = float(tally["generator_count"])
        generator = {"generator_loss": float(tally["generator_sum"]) / generated} if generated else {}
        return {"loss": float(tally.losses.mean)} | generator


class AdversarialStep:
    """One batch of real images: the critic's step, and every `n_critic`-th time the generator's.

    The losses of sample j, with critic D, generator G, noise z and x^ between a real and a generated image:

        critic      D(G(z_j)) - D(x_j) + penalty (|dD/dx^_j| - 1)^2
        generator   -D(G(z_j))

    A filter measures these losses; `optim.target` makes its innovation absolute, since their zero has no meaning.
    """

    def __init__(self, cfg: DictConfig, ranks: Ranks, arithmetic: Arithmetic, module: nn.Module, optimizer: Pair):
        self.cfg, self.ranks, self.arithmetic, self.module, self.optimizer = cfg, ranks, arithmetic, module, optimizer
        self.scale = Scale(cfg.data)
        self.create_graph = needs_of(cfg.optim).create_graph

    def __call__(self, batch: Batch, count: int, step: int) -> Tally:
        """Steps, and returns the tally of the losses before each step (see `Adversarial`)."""
        real = self.arithmetic.cast(batch).inputs
        seed_all(self.ranks.device, self.cfg.seed, "step", step, self.ranks.rank)
        self.module.train()
        first: dict[str, Tensor] = {}  # each network's losses at the weights before the step
        generate = (step + 1) % self.cfg.model.n_critic == 0
        self.optimizer.step(
            self._closure("critic", lambda: self._critic_losses(real), first),
            self._closure("generator", lambda: self._generator_losses(real), first) if generate else None,
        )
        if self.create_graph:
            self.optimizer.zero_grad()
        generated = first.get("generator", real.new_empty(0)).double()
        count = generated.new_full((), len(generated))
        return Tally.of(first["critic"], generator_sum=generated.sum(), generator_count=count)

    def _closure(self, name: str, losses_of: Callable[[], Tensor], first: dict[str, Tensor]) -> Callable:
        network, optimizer = getattr(self.module, name), getattr(self.optimizer, name)
        weights = [weight for weight in network.parameters() if weight.requires_grad]

        def closure():
            optimizer.zero_grad(set_to_none=True)
            with self.arithmetic.autocast():
                losses = losses_of()
            losses.mean().backward(inputs=weights, create_graph=self.create_graph)  # the other network gets no gradient
            if self.cfg.grad_clip is not None:
                nn.utils.clip_grad_norm_(weights, self.cfg.grad_clip)
            first.setdefault(name, losses.detach())
            return Tally.of(losses).losses if filter_of(optimizer) is not None else losses.detach().mean()

        return closure

    def _critic_losses(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self._generated(real)
        between = torch.lerp(real, fake, torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype))
        between.requires_grad_()
        critic = self.module.critic
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        norm = slope.flatten(1).norm(dim=1)
        return (critic(fake) - critic(real)).to(norm) + self.cfg.model.penalty * (norm - 1).square()

    def _generator_losses(self, real: Tensor) -> Tensor:
        return -self.module.critic(self._generated(real)).to(real.dtype)

    def _generated(self, like: Tensor) -> Tensor:
        """As many images as `like` has, in its dtype, normalised as the data are."""
        noise = torch.randn(len(like), self.module.latent, device=like.device, dtype=like.dtype)
        return self.scale.normalised(self.module(noise)).to(like.dtype)


class Scale:
    """Between a generator's (-1, 1), the data's normalised values and bytes."""

    def __init__(self, data: DictConfig):
        self.mean, self.std = (torch.tensor(list(data[key])).view(-1, 1, 1) for key in ("mean", "std"))

    def normalised(self, images: Tensor) -> Tensor:
        """Of images in (-1, 1)."""
        return ((images + 1) * 127.5 - self.mean.to(images)) / self.std.to(images)

    def as_bytes(self, images: Tensor) -> Tensor:
        """uint8 images, of images normalised as the data are."""
        return (images * self.std.to(images) + self.mean.to(images)).round().clamp(0, 255).byte()
