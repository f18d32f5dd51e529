"""Memory within the limits of containers, whose files are written here as Linux writes them."""

import pytest

from bigmodel_utils import host


def write_group(folder, limit, used, cached, version):
    """One control group's files."""
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    limit_name, used_name, prefix = names[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {cached}\n{prefix}active_file 3\n")


@pytest.mark.parametrize("version, mount", [(1, "sys/fs/cgroup/memory"), (2, "sys/fs/cgroup")])
def test_the_narrowest_container_limits_memory(tmp_path, version, mount):
    def available():
        return host.available_memory_bytes(root=tmp_path)

    (tmp_path / "proc/self").mkdir(parents=True)
    path = "/outer/in:ner"
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/\n4:memory:{path}\n" if version == 1 else f"0::{path}\n")
    assert available() > 2**20  # a container without those files
    write_group(tmp_path / mount / "outer/in:ner", 9000, 4000, 500, version)
    assert available() == 9000 - 4000 + 500
    write_group(tmp_path / mount / "outer", 5000, 4700, 100, version)
    assert available() == 5000 - 4700 + 100
    write_group(tmp_path / mount, 50, 60, 0, version)
    assert available() == 0
    for folder in ("outer/in:ner", "outer", "."):
        write_group(tmp_path / mount / folder, "max" if version == 2 else 2**63 - 4096, 4000, 0, version)
    assert available() > 2**20


def test_without_linuxs_files_there_is_no_container(tmp_path):
    assert host.available_memory_bytes(root=tmp_path) > 2**20
