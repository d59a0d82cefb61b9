"""The site builds, links, references and all; every optimizer has its page; the code on the pages runs."""

import json
import re
import shlex
import subprocess
import sys

import matplotlib
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import koala
from koala.runs import compose, run_dir
from koala.tables.cli import EXPERIMENTS, RESULTS, load_tables
from koala.tables.experiment import load_experiment
from tests.conftest import ROOT

PAGES = sorted({*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments/README.md"})
FENCE = re.compile(r"^(`{3,}|:{3,})(\S*)[^\n]*\n(.*?)^\1$", flags=re.DOTALL | re.MULTILINE)


def blocks(page, language) -> list[str]:
    return [code for _, fence, code in FENCE.findall(page.read_text()) if fence == language]


@pytest.mark.extended
def test_the_site_builds_without_a_warning(tmp_path):
    options = ["-W", "--keep-going", "--nitpicky", "-q", "-d", tmp_path / "trees"]  # those of scripts/docs.sh
    command = [sys.executable, "-m", "sphinx", *options, "docs", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for info in koala.list_optimizers():
        assert f'id="koala.{info.cls.__name__}"' in (tmp_path / f"site/optimizers/{info.name}.html").read_text()
    configured = re.findall(r"koala\.baselines\S+", "".join(f.read_text() for f in ROOT.glob("configs/optim/*.yaml")))
    baselines = (tmp_path / "site/baselines.html").read_text()
    assert configured and all(f'id="{target}"' in baselines for target in configured)
    assert "cell_output" in (tmp_path / "site/first_steps.html").read_text()  # executed, and its figures shown
    (formulas,) = re.findall(r'src="([^"]*mathjax[^"]*.js)"', (tmp_path / "site/writing.html").read_text())
    assert (tmp_path / "site" / formulas).exists()  # no server is asked for it
    assert 'href="tables/quickstart.html"' in (tmp_path / "site/results/README.html").read_text()
    table = tmp_path / "site/results/tables/quickstart.html"
    (picture,) = re.findall(r'src="([^"]*quickstart-curves.svg)"', table.read_text())
    assert (table.parent / picture).exists()


def test_every_block_says_what_it_is():
    """Code that nobody runs is shell or configuration, and says so."""
    languages = {(page.name, fence) for page in PAGES for _, fence, _ in FENCE.findall(page.read_text())}
    assert {fence for _, fence in languages if fence[:1] != "{"} <= {"python", "bash", "yaml", "text"}, languages
    for page in PAGES:
        assert not re.search(r"\n\n {4}(?! *[-*\d])\S", FENCE.sub("", page.read_text())), f"{page.name}: indented code"


RETIRED = re.compile(
    r"beyond noise|\b(?:gone|goes|go|going) on (?:from|with)|whereabouts|\bledger|a scale a weight|words alone|"
    r"how-manieth|\bas many (?:rates|for)|\bpictures?\b|\b(?:told|said|begun|anew)\b|\b(?:some|every)body\b|"
    r"\bas ever\b|\bfor ever\b|\bwhole of it|\b(?:is|are) none\b|\bstands? there|\bas dear\b|\bpaid for\b|\blooked at\b"
)


def test_no_page_or_caption_has_a_retired_phrase():
    """The field's words instead, as in docs/glossary.md: significant, resume, per-weight scale, images."""
    texts = [
        *PAGES,
        *ROOT.glob("docs/*.ipynb"),
        *ROOT.glob("experiments/**/*.yaml"),
        *ROOT.glob("results/**/*.md"),
        ROOT / "koala/run_keys.py",
    ]
    result = {str(path.relative_to(ROOT)): match[0] for path in texts for match in RETIRED.finditer(path.read_text())}
    assert not result


def test_the_run_of_the_page_on_runs_has_the_name_it_says():
    command, folder = blocks(ROOT / "docs/runs.md", "bash")[0].splitlines()
    assert folder.split()[1] == f"{run_dir(compose(shlex.split(command)[2:]))}/"


# The blocks of training_loops.md, each with a trainer of its own, are run by tests/integrations.
CODE = [page for page in PAGES if blocks(page, "python") and page.name != "training_loops.md"]


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page, tmp_path):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = koala.MomentumKOALA(model.parameters())
    given = {"torch": torch, "F": F, "model": model, "optimizer": optimizer, "x": x, "y": y, "loader": [(x, y)] * 2,
             "loss_fn": nn.CrossEntropyLoss(reduction="none"),
             "checkpoint_path": tmp_path / "checkpoint.pt"}  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), given)
    if re.search(r"model\b", "".join(blocks(page, "python"))) and re.search(r"\.(step|update)\(", page.read_text()):
        assert any(not torch.equal(p, old) for p, old in zip(given["model"].parameters(), before, strict=False))


def test_the_notebook_trains():
    """Its code as plain Python; the site executes it in a kernel, for it is kept without outputs."""
    matplotlib.use("agg")
    cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    given = {}
    for cell in code:
        exec("".join(cell["source"]), given)
    steps, accuracy = given["steps"], given["accuracy"]
    assert steps["loss"][-1] < steps["loss"][0] / 4 and accuracy[-1] > 0.9
    assert all(0 <= gain <= 1 for gain in steps["gain"])


def test_the_rule_of_thumb_holds_on_the_records():
    """docs/choosing.md: lr of the rule beats a quarter and four times of it, and is near the best that was tried."""
    [board] = load_tables(["board"], RESULTS / "measured")
    row = re.compile(r"^\| ([^|]+, [^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", flags=re.MULTILINE)
    rule = {task: numbers for task, *numbers in row.findall((ROOT / "docs/choosing.md").read_text())}
    labels = {task: value.label for task, value in board.experiment.axes["task"].values.items()}
    assert sorted(rule) == sorted(labels.values())
    for entry in (entry for entry in board.entries if entry.key["optim"] in ("koala-v", "koala-m")):
        lr, *shown = map(float, rule[labels[entry.key["task"]]])
        losses = {trial.point["optim.lr"]: trial.value for trial in entry.trials}
        best = min(value for value in losses.values() if value is not None)
        ratios = [losses[rate] / best for rate in (lr / 4, lr, 4 * lr)]
        assert ratios[1] < min(ratios[0], ratios[2]), entry.key
        assert ratios[1] < 1.05 or entry.key["task"] == "digits", entry.key
        if entry.key["optim"] == "koala-m":
            assert ratios == pytest.approx(shown, abs=0.0051), entry.key


@pytest.mark.extended
def test_the_first_steps_are_those_of_their_rows():
    """The table of docs/choosing.md, and one of its runs once more."""
    rows = ROOT / "results/benchmarks/first_steps.jsonl"

    def script(*options) -> list[str]:
        command = [sys.executable, ROOT / "scripts/first_steps.py", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    table = "\n".join(script("--table", rows))
    assert table in (ROOT / "docs/choosing.md").read_text()
    [again] = map(json.loads, script("--tasks", "MLP, digits", "--clips", "1", "--rates", "1", "--seeds", "2"))
    measured = {name: again.pop(name) for name in ("rise", "end")}
    [row] = (row for row in map(json.loads, rows.read_text().splitlines()) if again.items() <= row.items())
    assert measured == pytest.approx({name: row[name] for name in measured}, rel=0.02)


@pytest.mark.extended
def test_a_data_set_of_ones_own_trains(run_door, tmp_path, folders):
    """As docs/questions.md says: a file of YAML beside the repository, and folders of images."""
    [config] = blocks(ROOT / "docs/questions.md", "yaml")
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/flowers.yaml").write_text(config)
    for split, count in (("train", 8), ("test", 2)):
        for name, color in (("rose", "red"), ("violet", "blue")):
            (tmp_path / "flowers" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), color).save(tmp_path / "flowers" / split / name / f"{number}.png")
    run = ["data=flowers", f"data.path={tmp_path}/flowers", "model=mlp", "num_gpus=0", "max_steps=2", "logger=none"]
    done = run_door("train.py", "--config-dir", f"{tmp_path}/mine", *run, *folders)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("outputs/flowers/mlp/koala-m/*/seed1/record.json")


@pytest.mark.slow
def test_the_filter_of_the_tutorial_trains_in_the_suite(run_door, tmp_path, folders):
    """As docs/writing.md says: a file, five lines of YAML beside the repository, and train.py."""
    page = ROOT / "docs/writing.md"
    (config,) = blocks(page, "yaml")
    (tmp_path / "mine/optim").mkdir(parents=True)
    (tmp_path / "mine/optim/constant.yaml").write_text(config)
    (tmp_path / "constant.py").write_text("import torch\n" + blocks(page, "python")[1])
    run = ["optim=constant", "data=digits", "model=mlp", "num_gpus=0", "max_steps=2", "logger=none"]
    done = run_door("train.py", "--config-dir", f"{tmp_path}/mine", *run, *folders, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("outputs/digits/mlp/constant/*/seed1/record.json")


def test_the_settings_of_the_board_are_those_of_its_file():
    """docs/board.md has what the runs of profile cpu are composed of, and each optimizer's first rates."""
    board = load_experiment(EXPERIMENTS, "board")
    cpu, (tasks, optimizers) = board.profile("cpu"), (board.axes[name].values for name in ("task", "optim"))
    expected = []
    for task, value in tasks.items():
        config = compose(board.overrides({"task": task, "optim": "koala-m"}, cpu, {}))
        data, model = config.data, config.model
        if images := data.kind == "images":
            size, layers = f"{data.resize or data.size}x{data.resize or data.size}", ""
        else:
            size, layers = data.vocabulary, f", {model.layers} layers"
        clip = "not" if config.grad_clip is None else f"{config.grad_clip:g}"
        target, seeds = (by["task"][task] for by in (cpu.metrics["steps"].below, cpu.trial_seeds))
        row = [value.label, f"`{data.name}`", size, f"`{model.name}`, width {model.width}{layers}"]
        row += [config.epochs, config.batch_size, clip, f"{target:g}", seeds]
        expected.append([str(entry) for entry in row])
        assert (config.schedule.name, config.schedule.warmup, config.precision) == ("cosine", 0.0, "fp32")
        assert (config.optim.weight_decay, config.select) == ((5e-4, "last") if images else (0, "best-val"))
        assert images or data.bptt == 35
    rates = {}
    for value in optimizers.values():
        rates.setdefault(", ".join(f"{rate:g}" for rate in value.grid["optim.lr"]), []).append(value.label)
    expected += [[", ".join(labels), grid] for grid, labels in rates.items()]
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs/board.md").read_text(), flags=re.MULTILINE)
    assert [row.split(" | ") for row in rows if not row.startswith(("task", "optimizer", "---"))] == expected
    assert list(cpu.seeds) == [1, 2, 3, 4, 5]
