"""Watching Slurm's queue when squeue fails: a script stands in for it, so this needs no Slurm."""

import pytest

from koala import cluster, records
from koala.reproduce.plan import Plan
from koala.reproduce.slurm import PATIENCE, SlurmLauncher
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment
from tests.refused import refused
from tests.reproduce.test_search import finish

pytestmark = pytest.mark.extended


@pytest.fixture
def plan(tmp_path):
    """One run, whose job is in the queue."""
    extra = [f"output_root={tmp_path}/outputs", "optim=sgd", "num_gpus=0", "logger=none"]
    made = Plan([load_experiment(EXPERIMENTS, "quickstart")], "smoke", extra=extra)
    del made.samples[1:]
    (run,) = made.runs
    (tmp_path / "outputs/slurm").mkdir(parents=True)
    records.append_row(tmp_path / "outputs" / cluster.JOBS, {"job": "7", "run": str(run.path.resolve())})
    return made


@pytest.fixture
def answers(tmp_path, stand_in):
    """`answers(True, False)`: squeue answers, then fails, and so for ever."""

    def prepare(*good: bool) -> None:
        tasks = "".join(f"{at}) {'echo 7 RUNNING' if works else 'fail'} ;;\n" for at, works in enumerate(good, 1))
        stand_in(
            "squeue",
            f"""fail() {{ echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }}
echo >>{tmp_path}/asked
case $(wc -l <{tmp_path}/asked) in
{tasks}*) {"echo 7 RUNNING" if good[-1] else "fail"} ;;
esac""",
        )

    return prepare


def test_queue_that_does_not_answer_for_a_while_is_asked_again(plan, answers):
    answers(True, True, *[False] * 5, True)
    seen, polls = [], 0
    for event in SlurmLauncher().run(plan.runs, poll=0):
        seen += [event.state] if event else []
        polls += event is None
        if polls == 8:
            finish(plan, lambda optim, rate: 1.0)
    assert seen == ["running", "done"]


def test_queue_that_never_answers_again_is_given_up_in_one_line(plan, answers, tmp_path):
    answers(True, True, False)
    with refused("Slurm", mentions="slurm_load_jobs error"):
        list(SlurmLauncher().run(plan.runs, poll=0))
    assert (tmp_path / "asked").read_text().count("\n") == 2 + PATIENCE


def test_queue_that_cannot_be_asked_takes_no_jobs(plan, answers):
    answers(False)
    with refused("Slurm", mentions="slurm_load_jobs error"):
        next(SlurmLauncher().run(plan.runs))
