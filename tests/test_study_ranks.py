"""Studies on several ranks, with gloo: any number of them gives the same table, also after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_study import Scene, free_port, manifest, same, scene, shards, started

from ssm_interp.flow import FlowResult, Ranks, StudyError, ranks, run_study, study_folder
from ssm_interp.flow.study_store import Store
from ssm_interp.prompts import load_prompts, save_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("study"))


def keep_result(tiny: Scene, folder: Path, place: Path) -> None:
    run_study(tiny.study(), folder).save(place / f"{os.environ['RANK']}.parquet")


def test_one_process_is_rank_0_of_1() -> None:
    with ranks() as alone:
        assert (alone.index, alone.count) == (0, 1)
        alone.barrier()
    assert alone == Ranks()


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_ranks_gives_the_same_table(tiny: Scene, tmp_path: Path, count: int) -> None:
    port = free_port()
    results = tmp_path / "results"
    results.mkdir()
    processes = [
        started(keep_result, tiny, tmp_path, results, rank=rank, ranks=count, port=port) for rank in range(count)
    ]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(count):
        same(FlowResult.load(results / f"{rank}.parquet"), tiny.result)
    assert [path.name for path in shards(tiny.study(), tmp_path)] == [f"{shard:05}.parquet" for shard in range(5)]
    assert not list(tmp_path.rglob("manifest.*.json"))
    same(run_study(tiny.study(), tmp_path), tiny.result)


def test_ranks_with_other_weights_or_another_disk_are_refused(tiny: Scene, tmp_path: Path) -> None:
    stored = manifest(tiny.study(), tiny.folder)
    identity = {name: stored[name] for name in ("model", "commit", "options", "weights", "prompts", "features")}
    folder = study_folder(tiny.folder, tiny.options["model"])
    other = Store(folder, identity | {"weights": "others"}, 5, Ranks(index=1))
    with pytest.raises(StudyError, match="what differs: the model's weights"), other.opened({}, 1):
        pass
    elsewhere = Store(tmp_path, identity, 5, Ranks())
    with elsewhere.opened({}, 1), pytest.raises(StudyError, match="shards 00000, .* must see the same folder"):
        elsewhere.collect()


def launched(launcher: list[str], options: list[str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", *launcher, "-m", "ssm_interp", "flow", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("RANK", ""))
    except psutil.Error:
        return ""


def kill_rank_1(launcher: subprocess.Popen[str], folder: Path) -> None:
    """As soon as it has recorded a shard."""
    deadline = time.monotonic() + 120
    while not (folder / "manifest.1.json").is_file():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(launcher.pid).children(recursive=True)
    (victim,) = [child for child in children if rank_of(child) == "1"]
    victim.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_rank_and_another_number_of_ranks(tiny: Scene, tmp_path: Path) -> None:
    prompts = load_prompts(tiny.options["facts"])
    many = [type(prompt)(**vars(prompt) | {"id": f"{prompt.id}, {again}"}) for again in range(8) for prompt in prompts]
    save_prompts(many, tmp_path / "many.jsonl")
    named: dict[str, Any] = {"facts": str(tmp_path / "many.jsonl"), "shard_size": 1}
    options = ["--model", tiny.options["model"], "--facts", named["facts"], "--dtype", "float64", "--shard-size", "1"]
    options += ["--source", "subject", "--source", "last", "--window", "1", "--window", "2", "--device", "cpu"]
    options += ["--features", "all", "--features", "top half", "--out", str(tmp_path / "out")]
    folder = study_folder(tmp_path / "out", tiny.options["model"])
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    first = launched(torchrun, options)
    kill_rank_1(first, folder)
    first.communicate(timeout=120)
    assert first.returncode != 0
    stored = len(list(folder.glob("shards/*.parquet")))
    assert 1 <= stored < 80
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
    accelerate += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), "--num_processes", "3"]
    second = launched(accelerate, options)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert printed.count("64 of 80 prompts answered correctly and kept") == 1
    assert printed.count("wrote ") == 1
    expected = run_study(tiny.study(**named), tmp_path / "whole")
    same(FlowResult.load(tmp_path / "out" / "flow.parquet"), expected)
    same(run_study(tiny.study(**named), tmp_path / "out"), expected)
    assert len(manifest(tiny.study(), tmp_path / "out")["shards"]) == 80
