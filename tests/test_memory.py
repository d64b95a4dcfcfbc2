"""Free memory, within the limits of a container."""

from pathlib import Path

import psutil
import pytest
import torch

from ssm_interp.hooks.rows import memory
from ssm_interp.hooks.rows.memory import free_memory, left_in_groups

V2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 150\n"}
V1 = {
    "memory.limit_in_bytes": "5000\n",
    "memory.usage_in_bytes": "900\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
}


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_limits_of_every_group_above_count(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", {"cgroup": "0::/user/one\n"})
    groups = tmp_path / "sys/fs/cgroup"
    write(groups / "user/one", V2 | {"memory.max": "max\n"})
    assert list(left_in_groups(tmp_path)) == []
    write(groups / "user", V2)
    write(groups, {"memory.stat": ""})  # the top one has no limit
    assert list(left_in_groups(tmp_path)) == [450]
    write(groups / "user/one", V2 | {"memory.max": "600\n"})
    assert list(left_in_groups(tmp_path)) == [50, 450]
    write(groups / "user/one", {"memory.max": "500\n"})
    assert list(left_in_groups(tmp_path)) == [0, 450]


def test_version_1_and_paths_outside_the_container(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", {"cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/a:b\n0::/\n"})
    write(tmp_path / "sys/fs/cgroup/memory", V1)
    assert list(left_in_groups(tmp_path)) == [4300]
    write(tmp_path / "sys/fs/cgroup/memory/docker/a:b", V1 | {"memory.limit_in_bytes": "1000\n"})
    assert list(left_in_groups(tmp_path)) == [300, 4300]


def test_the_least_of_them_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, available = torch.device("cpu"), psutil.virtual_memory().available
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert free_memory(cpu) == pytest.approx(available, rel=0.5)
    write(tmp_path / "proc/self", {"cgroup": "0::/\n"})
    write(tmp_path / "sys/fs/cgroup", V2)
    assert free_memory(cpu) == 450
    write(tmp_path / "sys/fs/cgroup", {"memory.max": f"{2**63}\n"})
    assert free_memory(cpu) == pytest.approx(available, rel=0.5)
