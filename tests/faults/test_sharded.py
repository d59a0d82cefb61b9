"""Sharded checkpoints: each rank writes its part, any number of ranks reads it, what is torn is noticed."""

import hashlib
import os
import pickle
import re
import shutil
import threading

import pytest
import torch

from koala.runs import identify, launch
from koala.runs.on_rank import run
from koala.training import checkpoint
from tests.faults.conftest import Victim
from tests.refused import refused
from tests.training.conftest import closest, whole_state
from tests.training.test_checkpoint import Payload
from tests.training.test_ranks import STEPS, dying_run

pytestmark = [
    pytest.mark.extended,
    pytest.mark.dist,
    pytest.mark.xdist_group(__name__),
]  # of one worker, which makes `part` once

MODES = ("true", "false")  # checkpoint_async
SHARDED = ["optim=koala-m", *STEPS, "strategy=fsdp", "cpu_procs=2"]


def weights(victim: Victim) -> dict[str, torch.Tensor]:
    return whole_state(victim.checkpoints()[-1])["model"]


class Dying:
    """``launch`` of a run that stops dead before a step."""

    def __init__(self, step: int):
        self.step = step

    def launch(self, cfg) -> dict:
        return dying_run(self.step, cfg, identify(cfg), None)


def break_off(victim: Victim, world: int, step: int) -> None:
    """Leaves of a run, with a checkpoint at every step, what there was when its ranks stopped dead before ``step``."""
    ranks = Victim(victim.root, *victim.given, "checkpoint_every=0").start_ranks(world, Dying(step).launch)
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 1
    assert victim.step() == step


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """What two sharded ranks left of a run at step 9 of 20, and the weights that the whole of it comes to."""
    broken = Victim(tmp_path_factory.mktemp("part"), *SHARDED)
    break_off(broken, 2, 9)
    straight = Victim(tmp_path_factory.mktemp("one"), "optim=koala-m", *STEPS)
    launch(straight.cfg)
    return broken.folder / "checkpoints", weights(straight)


@pytest.fixture
def resumed(part, victim):
    """``resumed(*overrides) -> Victim``: a run of which there is what two sharded ranks left."""

    def make(*overrides: str) -> Victim:
        made = victim(*SHARDED, *overrides)
        shutil.copytree(part[0], made.folder / "checkpoints")
        return made

    return make


def test_each_rank_writes_its_shards_and_the_last_two_checkpoints_are_kept(part):
    folders = sorted(part[0].iterdir())
    assert [folder.name.split("-")[1] for folder in folders] == ["000000008", "000000009"]
    for folder in folders:
        names = sorted(path.name for path in folder.iterdir())
        assert [name[:11] for name in names[:2]] == ["shard-00001", "shard-00002"] and names[2:] == ["state.pt"]
        sizes = [path.stat().st_size for path in folder.iterdir()]
        assert max(sizes) < 0.6 * sum(sizes)
        assert not torch.load(folder / "state.pt", weights_only=True)["model"], "all of it is in the shards"


@pytest.mark.parametrize("change, world", [("cpu_procs=3", 3), ("cpu_procs=1", 1), ("strategy=ddp", 2)])
def test_goes_on_with_other_ranks(part, resumed, change, world):
    run = resumed(change, "ranks=2")
    run.finish(world)
    assert run.lives() == [0, 9] and closest(weights(run), part[1]) < 1e-10


@pytest.mark.parametrize("optim", ["koala-v", "adam"])  # without a state, and with numbers beside tensors
def test_a_whole_checkpoint_goes_on_sharded(victim, optim):
    straight = victim(f"optim={optim}", *STEPS, name="straight")
    launch(straight.cfg)
    run = victim(f"optim={optim}", *STEPS, "strategy=fsdp", "cpu_procs=2", "ranks=1")
    break_off(Victim(run.root, f"optim={optim}", *STEPS), 1, 9)
    assert run.checkpoints()[-1].is_file()
    run.finish(2)
    assert run.lives() == [0, 9] and run.checkpoints()[-1].is_dir()
    assert closest(weights(run), weights(straight)) < 1e-10


def test_the_best_weights_are_sharded_too(victim):
    """Broken off after the selection, the run still tests the weights that it selected."""
    common = ["optim=adam", "optim.lr=0.03", *STEPS[:2], "log_every=1", "epochs=2", "select=best-val"]
    expected = launch(victim(*common, name="straight").cfg)["metrics"]["final"]
    run = victim(*common, "strategy=fsdp", "cpu_procs=2")
    break_off(run, 2, 25)
    newest = run.checkpoints()[-1]
    assert torch.load(newest / "state.pt", weights_only=True)["selected"] == {} and whole_state(newest)["selected"]
    final = run.finish(2)["metrics"]["final"]
    assert final == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("damage", ["torn", "flipped", "missing", "state torn"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_used(part, tmp_path, damage):
    shutil.copytree(part[0], tmp_path / "checkpoints")
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = newest / "state.pt" if damage == "state torn" else next(newest.glob("shard-00002-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "missing":
        file.unlink()
    with pytest.warns(UserWarning, match=f"{newest.name}/{file.name}"):
        assert checkpoint.load(tmp_path / "checkpoints")["step"] == 8


def test_ranks_agree_on_a_torn_shard_and_go_on_from_the_checkpoint_before(part, resumed):
    run = resumed()
    file = next(run.checkpoints()[-1].glob("shard-00002-*"))
    os.truncate(file, file.stat().st_size // 2)
    run.finish(2)
    assert run.lives() == [0, 8] and file.name in run.log.read_text()
    assert closest(weights(run), part[1]) < 1e-10


@pytest.mark.parametrize("position", ["index of torch", "index of torch, named", "state", "shard"])
def test_code_is_refused_and_not_run(resumed, monkeypatch, tmp_path, position):
    """Also when all checksums match: they tell damage, not malice."""
    run = resumed("cpu_procs=1", "ranks=2")
    newest = run.checkpoints()[-1]
    monkeypatch.chdir(tmp_path)
    code = pickle.dumps({"format": checkpoint.FORMAT, "step": 9, "model": Payload()}, protocol=2)
    state = torch.load(newest / "state.pt", weights_only=True)
    if position == "shard":
        shard = min(newest.glob("shard-*"))
        shard.write_bytes(code)
        state["shards"][shard.name] = hashlib.sha256(code).hexdigest()
    elif position != "state":
        (newest / ".metadata").write_bytes(code)
        if "named" in position:
            state["shards"][".metadata"] = hashlib.sha256(code).hexdigest()
    torch.save(state, newest / "state.pt")
    if position == "state":
        (newest / "state.pt").write_bytes(code)
    digest = hashlib.sha256((newest / "state.pt").read_bytes()).hexdigest()
    newest = newest.rename(newest.with_name(f"{newest.name[:-16]}{digest[:16]}"))
    with refused(str(newest), None, checkpoint.AGAIN):
        launch(run.cfg)
    assert not (tmp_path / "pwned").exists()


FULL = r"^OSError: \[Errno 28\] .*output_root="  # the last line of each rank


class FullDisk:
    """``launch`` of a run of whose ranks one cannot flush what it writes."""

    def __init__(self, whom: int):
        self.whom = whom

    def launch(self, cfg) -> dict:
        if os.environ["RANK"] == str(self.whom):

            def full(*_):
                raise OSError(28, "No space left on device")

            os.fsync = full
        return run(cfg, identify(cfg), None)


@pytest.mark.parametrize("beside", MODES)
@pytest.mark.parametrize("whom", [0, 1])  # the one that gives the whole its name, and another
def test_a_rank_whose_disk_is_full_ends_all_with_that_message_and_the_checkpoints_before(part, resumed, whom, beside):
    broken = resumed("checkpoint_every=0", f"checkpoint_async={beside}")
    before = broken.checkpoints()
    for rank in broken.start_ranks(2, FullDisk(whom).launch):
        rank.join(120)
        assert rank.exitcode == 1
    assert len(re.findall(FULL, broken.log.read_text(), re.MULTILINE)) == 2
    assert broken.checkpoints() == before
    broken.finish(2)
    assert closest(weights(broken), part[1]) < 1e-10
    assert not list((broken.folder / "checkpoints").glob(".*")), "what was half written is cleared away"


class LastToSee(FullDisk):
    """As a full disk; the rank whose it is learns so when the others have gone, in the middle of a collective."""

    def launch(self, cfg) -> dict:
        writer, reported = checkpoint.Writer, threading.Event()
        check, join, write = writer.check, writer.join, writer._write_in_background

        def check_when_written(self):
            join(self)
            check(self)

        def write_and_be_told_late(self, *args):
            write(self, *args)
            failure, self._failure = self._failure, None
            assert reported.wait(60)
            self._failure = failure

        def join_and_be_told(self):
            if self._thread is not None:  # the run ends, or this rank has come to the next checkpoint
                reported.set()
            join(self)

        if os.environ["RANK"] == str(self.whom):
            writer._write_in_background, writer.join = write_and_be_told_late, join_and_be_told
        else:
            writer.check = check_when_written
        return super().launch(cfg)


def test_the_last_rank_to_see_a_full_disk_says_so_and_not_that_the_others_went(resumed):
    broken = resumed("checkpoint_every=0", "checkpoint_async=true")
    for rank in broken.start_ranks(2, LastToSee(0).launch):
        rank.join(120)
        assert rank.exitcode == 1
    assert len(re.findall(FULL, broken.log.read_text(), re.MULTILINE)) == 2
