"""Writing aside, flushing, renaming: what a crash, a full disk or a second writer leaves."""

import errno
import os
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from dpo_fast import durable
from dpo_fast.durable import aside, publish, write_file, writing
from dpo_fast.errors import UserError


class Killed(BaseException):
    """Ends a process at once, as far as the code under test can tell: nothing catches it."""


@pytest.fixture
def journal(monkeypatch):
    """What reached the disk, and what was renamed, in order."""
    events, replace, rename = [], os.replace, Path.rename

    def fsync(descriptor):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def note(act):
        def noted(source, target):
            events.append(("rename", Path(source).name, Path(target).name))
            return act(source, target)

        return noted

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", note(replace))
    monkeypatch.setattr(Path, "rename", note(rename))
    return events


def finished_folder(root: Path, content: str = "new") -> Path:
    folder = root / "finished"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text(content)
    return folder


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_a_file_is_flushed_before_it_is_renamed_and_nothing_stays_aside(tmp_path, journal, content):
    file = tmp_path / "file"
    file.write_text("old")
    write_file(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert journal == [
        ("flush", ".file.partial"),
        ("rename", ".file.partial", "file"),
        ("flush", tmp_path.name),
    ]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, moment):
    file = tmp_path / "file"
    write_file(file, "old")

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, moment, killed)
        write_file(file, "new, and longer")
    assert file.read_text() == "old"
    assert aside(file).exists(), "the process was killed before it could tidy up"
    write_file(file, "next")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "next")]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch, moment):
    file = tmp_path / "file"
    write_file(file, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, moment, full)
    with (
        pytest.raises(
            UserError, match=r"file cannot be written: .*No space left .*free.*Make room"
        ),
        writing(file, "Make room"),
    ):
        write_file(file, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "old")]


def test_a_folder_is_flushed_before_it_is_renamed(tmp_path, journal):
    publish(finished_folder(tmp_path), tmp_path / "target")
    assert (tmp_path / "target" / "inner" / "file").read_text() == "new"
    flushed, renamed, root = journal[:-2], journal[-2], journal[-1]
    assert {event[1] for event in flushed} == {"finished", "inner", "file"}
    assert (renamed, root) == (("rename", "finished", "target"), ("flush", tmp_path.name))


def test_a_folder_gives_way_only_if_it_is_to_be_replaced(tmp_path):
    target = tmp_path / "target"
    publish(finished_folder(tmp_path, "old"), target)
    with pytest.raises(OSError):
        publish(finished_folder(tmp_path, "new"), target)
    assert (target / "inner" / "file").read_text() == "old"
    publish(tmp_path / "finished", target, replace=True)
    assert (target / "inner" / "file").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("what", ["link", "broken link", "file"])
def test_a_link_or_a_file_gives_way_and_what_it_points_to_stays(tmp_path, what):
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    if what == "link":
        elsewhere.mkdir()
        (elsewhere / "mine").write_text("kept")
    if what == "file":
        target.write_text("old")
    else:
        target.symlink_to(elsewhere)
    for content in ("first", "second"):  # the second found what the first had put aside
        publish(finished_folder(tmp_path, content), target, replace=True)
        assert (target / "inner" / "file").read_text() == content and not target.is_symlink()
    assert {each.name for each in tmp_path.iterdir()} <= {"target", "elsewhere"}
    assert what != "link" or (elsewhere / "mine").read_text() == "kept"


def test_an_old_folder_is_never_half_removed_under_its_name(tmp_path, monkeypatch):
    """A crash while the old one is removed: the new one has the name already."""
    target = tmp_path / "target"
    publish(finished_folder(tmp_path, "old"), target)

    def killed(folder, ignore_errors):
        if Path(folder).exists():
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed)
        publish(finished_folder(tmp_path, "new"), target, replace=True)
    assert (target / "inner" / "file").read_text() == "new"
    publish(finished_folder(tmp_path, "newer"), target, replace=True)
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


def test_a_file_system_that_cannot_flush_folders_is_no_obstacle(tmp_path, monkeypatch):
    code = errno.EINVAL

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or code == errno.EIO:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "file", "content")
    code = errno.EIO  # a broken disk is
    with pytest.raises(OSError):
        durable.flush(tmp_path)
    with pytest.raises(OSError):
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "content"


def test_writing_tells_only_the_errors_it_is_given_and_removes_what_lies_aside(tmp_path):
    folder = aside(tmp_path / "folder")
    folder.mkdir()
    with pytest.raises(RuntimeError, match="not of the disk"), writing(folder, ""):
        raise RuntimeError("not of the disk")
    assert folder.exists()
    with (
        pytest.raises(UserError, match=r"folder.partial cannot be written: RuntimeError \("),
        writing(folder, "", (RuntimeError,)),
    ):
        raise RuntimeError
    assert not folder.exists()


def test_a_place_whose_folder_does_not_exist_is_told_too(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="Not a directory"), writing(file / "a" / "b", ""):
        write_file(file / "a" / "b", "content")


def test_one_at_a_time_is_in_turn_and_a_killed_one_holds_up_nobody(tmp_path):
    """The file is removed and made anew all the time, so each must look whether its lock is on that one."""
    file, inside, most, done = tmp_path / "lock", [], [], []

    def work() -> None:
        for _ in range(20):
            with durable.in_turn(file):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    [each.start() for each in threads]
    [each.join(60) for each in threads]
    assert len(done) == 120 and max(most) == 1 and not file.exists()
    if (pid := os.fork()) == 0:
        held = durable.in_turn(file)
        held.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert file.exists()
    with durable.in_turn(file):
        pass
    with pytest.raises(OSError), durable.in_turn(tmp_path / "none" / "lock"):
        pass
