"""A folder has one owner at a time, and only files of its own are taken for its own."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from atesd.errors import ConfigError
from atesd.storage.folder import FolderInUse, own, own_new

HOLDER = """
import sys, time
from pathlib import Path
from atesd.storage.folder import own
with own(Path(sys.argv[1]), "output_dir"):
    if sys.argv[2:] == ["fork"]:
        import os
        if os.fork() == 0:
            print("held", flush=True)
            time.sleep(60)
            os._exit(0)
    else:
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that owns `tmp_path / "run"`."""
    started = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run"), *flags],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_folder_another_process_owns_is_refused_by_name(tmp_path, holder):
    process = holder()
    with pytest.raises(FolderInUse, match=rf"run is being written by another process .process {process.pid} on"):
        own(tmp_path / "run", "output_dir")
    with pytest.raises(ConfigError, match=r"output_dir is .*is being written by another process"):
        own_new(tmp_path / "run", ("config.yaml",), "output_dir")


@pytest.mark.parametrize("flags", [[], ["fork"]])
def test_the_lock_ends_with_its_process_though_a_child_lives_on(tmp_path, holder, flags):
    process = holder(*flags)
    process.kill()
    process.wait()
    own(tmp_path / "run", "output_dir").close()


def test_two_runs_named_by_the_same_second_get_two_folders(tmp_path):
    folders = [own_new(tmp_path / "runs" / "quickstart", (), "output_dir", numbered=True) for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["quickstart", "quickstart-2", "quickstart-3"]


@pytest.mark.parametrize("name", ["config.yaml", "adapter"])
def test_what_a_run_would_write_over_is_refused_by_name(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"already holds {name}"):
        own_new(tmp_path, ("config.yaml", "adapter"), "output_dir")
    own(tmp_path, "output_dir").close()  # and the refusal did not keep the lock


def test_a_folder_given_up_leaves_only_what_others_put_there(tmp_path):
    for made_before, others in ((False, False), (True, False), (False, True)):
        path = tmp_path / f"{made_before}-{others}"
        if made_before:
            path.mkdir()
        folder = own_new(path, ("config.yaml",), "output_dir")
        (path / "config.yaml").write_text("seed: 0")
        if others:
            (path / "notes").write_text("mine")
        folder.discard("config.yaml")
        assert path.exists() == (made_before or others)
        assert [p.name for p in path.glob("*")] == (["notes"] if others else [])


PLACES = {
    "file": r"\(it is a file, not a folder\)",
    "below_a_file": r"file' is a file, not a folder\)",
    "far_below_a_file": r"file' is a file, not a folder\)",
    "link": r"\(it is a link to nothing\)",
    "too_long": "too long",
    "null_byte": "null",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_where_no_folder_can_be_is_refused_by_name(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    path = {
        "file": tmp_path / "file",
        "below_a_file": tmp_path / "file" / "run",
        "far_below_a_file": tmp_path / "file" / "runs" / "run",
        "link": tmp_path / "link",
        "too_long": tmp_path / ("x" * 300),
        "null_byte": Path(f"{tmp_path}/a\0b"),
    }[place]
    told = rf"output_dir is .*cannot be made or written to .*{PLACES[place]}.*choose another folder"
    with pytest.raises(ConfigError, match=told):
        own_new(path, (), "output_dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_by_name(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="writing is not permitted"):
        own(tmp_path / "run", "output_dir")
