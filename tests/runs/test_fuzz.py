"""Random overrides: each is a configuration or one line, and what is a configuration trains."""

import random

import pytest

from koala.errors import ConfigError
from koala.run_keys import DEFAULTS
from koala.runs import compose, launch
from koala.runs.schema import CHOICES

pytestmark = pytest.mark.extended

BASE = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "max_steps=1", "batch_size=64"]
GROUPS = {
    "optim": "koala-m koala-v koala++ sofim sgd adam adamw lbfgs yogi shampoo nothing null [sgd,adam]".split(),
    "schedule": [*CHOICES["schedule"][1], "linear", "null"],
    "wrapper": [*CHOICES["wrapper"][1], "ema", "null"],
    "model": ["mlp", "resnet10", "tiny-lstm", "null"],
    "data": ["digits", "pydocs", "null"],
}
KEYS = [
    *DEFAULTS,
    *(
        f"data.{key}"
        for key in "name kind path hub classes size channels mean std crop_padding cutout validation".split()
    ),
    *(f"data.{key}" for key in "weight_decay epochs batch_size grad_clip select milestones gamma bptt nothing".split()),
    *(f"model.{key}" for key in "name kind family layers width init block nothing".split()),
    *(f"optim.{key}" for key in "name _target_ lr betas eps weight_decay momentum nesterov r q a sw".split()),
    *(f"optim.{key}" for key in "alpha_r measurement lower_bound target rho beta fused max_iter nothing".split()),
    *(f"schedule.{key}" for key in "name milestones gamma patience final warmup".split()),
    *(f"wrapper.{key}" for key in "name k alpha start every".split()),
    *(f"logger.{key}" for key in "name project entity group tags".split()),
]
SANE = "1 2 8 0.5 0.9 1e-3 true false null last 64 [8] digits sgd".split()
VALUES = [
    *"null true false 0 1 2 3 -1 -0.0 0.5 1e-3 1e30 1e308 -1e308 nan inf -inf 99999999999999999999".split(),
    *"[] [1] [1,2] [0.9,0.99] [a] [[1]] {} {a:1} {1:[2]} {val_loss:1} abc '' ' ' é 'a b' ../x ~ ${x}".split(" "),
    *"${oc.env:HOME} ${data.epochs} 1,2 a=b [1 } \\x1b[31m last best-val ddp fsdp bf16 fp64 gradient".split(),
    "torch.optim.SGD", "torch.optim.Adam", "torch.nn.Linear", "koala.SOFIM", "os.system", "x" * 300,
]  # fmt: skip
HEAVY = {"eval_every", "output_root", "data_root"}  # the disk is the test's own


def draw(source: random.Random) -> list[str]:
    """Up to three overrides; one in ten adds or deletes."""
    chosen = []
    for _ in range(source.randint(1, 2)):
        if source.random() < 0.25:
            group = source.choice(list(GROUPS))
            chosen.append(f"{group}={source.choice(GROUPS[group])}")
            continue
        key = source.choice([key for key in KEYS if key not in HEAVY])
        value = source.choice(SANE if source.random() < 0.5 else VALUES)
        sign = source.choice(["", "", "", "", "", "", "", "", "+", "~"])
        chosen.append(f"~{key}" if sign == "~" else f"{sign}{key}={value}")
    return chosen


def survives(tmp_path, number: int, launched: bool) -> bool:
    """Whether the overrides of this number make a configuration; anything but that or one line is an error."""
    overrides = draw(random.Random(number))
    folders = [f"output_root={tmp_path / str(number)}", f"data_root={tmp_path / 'data'}"]
    try:
        cfg = compose([*BASE, *overrides, *folders])
        if launched and cfg.data.name == "digits" and cfg.cpu_procs == 1 and not cfg.compile:
            cfg.max_steps = 1
            launch(cfg)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000, overrides
        return False
    except BaseException as error:
        raise AssertionError(f"{overrides}: {error!r}") from error
    return True


def test_random_overrides_are_a_run_or_one_line(tmp_path):
    good = sum(survives(tmp_path, number, launched=number % 8 == 0) for number in range(64))
    assert 5 <= good <= 54  # both happen


@pytest.mark.slow
def test_many_random_overrides_are_a_run_or_one_line(tmp_path):
    good = sum(survives(tmp_path, number, launched=True) for number in range(300))
    assert 30 <= good <= 240
