"""What is said of disks that are full, or cannot be written."""

import errno
import os

import pytest

from train import calibrate, plan
from train.command import check_output, run_command
from train.config import ConfigError
from train.files import naming, storage_problem, write_text


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "é")
    write_text(path, "new")
    assert path.read_text() == "new" and [found.name for found in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device; make room there"),
        (
            PermissionError(errno.EACCES, "x"),
            "Permission denied; make it readable and writable, or choose another place",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: file 7: No space left on device [tensorstore]"),
            "No space left on device; make",
        ),
        (ValueError("something else"), None),
        (FileNotFoundError(errno.ENOENT, "x"), None),
    ],
)
def test_problems_of_the_disk_by_errors_of_any_library(error, said):
    found = storage_problem(error)
    assert found is None if said is None else found.startswith(said)


def test_an_error_of_an_open_file_gets_its_name():
    with pytest.raises(OSError, match="'b'") as caught, naming("b"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="'b'"), naming("c"):
        raise caught.value


def test_commands_tell_what_is_wrong_with_the_disk_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert run_command(lambda: (tmp_path / "file" / "folder").mkdir()) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file/folder: Not a directory; choose another place, then run the same command again; what "
        "was complete is kept\n"
    )

    def unforeseen():
        raise FileNotFoundError(errno.ENOENT, "gone", "somewhere")

    with pytest.raises(FileNotFoundError, match="gone"):
        run_command(unforeseen)


def test_a_reader_that_has_enough_ends_a_command_without_a_word(monkeypatch, capsys):
    """As `python -m train.plan --json - | head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert run_command(lambda: print("x" * 2**20)) == 1
        print("what is flushed at exit")
    assert capsys.readouterr().err == ""

    def other_pipe():
        raise BrokenPipeError

    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        run_command(other_pipe)


def test_the_folder_of_a_result_is_looked_for_before_the_work(tmp_path, capsys):
    there, missing = tmp_path / "plan.json", tmp_path / "none" / "plan.json"
    check_output("--json", there)
    with pytest.raises(ConfigError, match="--json: got .*none/plan.json, wanted a folder that is there"):
        check_output("--json", missing)
    assert calibrate.main(["--out", str(missing)]) == 2
    assert plan.main(["configs/quickstart.yaml", "--formula", "--json", str(missing)]) == 2
    assert "wanted a folder that is there" in capsys.readouterr().err
