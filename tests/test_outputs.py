"""Outputs: refused before the work where they cannot be written, kept elsewhere where that shows later."""

import errno
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from search_r3_jax.errors import UserError
from search_r3_jax.outputs import (
    check_not_mounted,
    check_output,
    check_output_folder,
    check_outputs,
    message_stream,
    write_all,
    write_json_result,
    write_result,
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder; name a file"),
        ("missing/file", "missing: no such folder; make it first"),
        ("file/below", "file: no such folder; make it first"),
        ("dangling", "missing: no such folder; make it first"),
        ("loop", "cannot be written (Too many levels of symbolic links)"),
        ("x" * 256, "cannot be written (File name too long)"),
        ("socket", "is a socket or a disk; name a file, a pipe or a terminal"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    Path("dangling").symlink_to(tmp_path / "missing" / "file")
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            check_output("--out", tmp_path / name)
    assert str(caught.value).startswith("--out: ")
    assert sorted(tmp_path.iterdir()) == before
    assert Path("file").read_text() == "old"


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    before = sorted(tmp_path.iterdir())
    for name in ("pipe", "old", "link", "new"):
        check_output("--out", tmp_path / name)
    check_outputs(("--out", Path("/dev/null")), ("--run-file", Path("/dev/null")), ("--picture", None))
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old").read_text() == "old"
    with pytest.raises(UserError, match=r"--run-file: .*link: is --out too; name another file"):
        check_outputs(("--out", tmp_path / "new"), ("--run-file", tmp_path / "link"))


def test_room_is_looked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = shutil.disk_usage(tmp_path).free * 2
    for check, path in ((check_output, tmp_path / "file"), (check_output_folder, tmp_path / "a" / "b")):
        check("--out", path)
        with pytest.raises(UserError, match=f"--out: .*needs {needed:,} bytes, .* are free"):
            check("--out", path, size=needed)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    for check in (check_output, check_output_folder):
        with pytest.raises(
            UserError, match=r"--out: .*cannot be written \(Read-only file system\); make room"
        ):
            check("--out", tmp_path / "file")
    with pytest.raises(UserError, match="--out: /proc: is where a disk is mounted"):
        check_not_mounted("--out", Path("/proc"))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_result_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"--out: /dev/full: cannot be written \(No space left") as caught:
        write_json_result("--out", Path("/dev/full"), {"a": "\udcff"})
    (kept,) = tmp_path.glob("search-r3-*/full")
    assert str(caught.value).endswith(f"the result is in {kept}")
    assert kept.read_text() == '{\n  "a": "\\udcff"\n}\n'

    # Nowhere to go: what is text is printed.
    def refuse(file: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the result is on standard output"):
        write_result("--out", tmp_path / "file", refuse, text="content")
    assert capsys.readouterr().out == "content\n"
    with pytest.raises(UserError, match="the result is lost: no other folder takes it either"):
        write_result("--out", tmp_path / "file", refuse)
    assert [file.name for file in tmp_path.iterdir()] == [kept.parent.name]


def test_one_refused_result_does_not_stop_the_others() -> None:
    written: list[int] = []

    def refuse() -> None:
        raise UserError("first")

    with pytest.raises(UserError, match="first; first"):
        write_all(refuse, lambda: written.append(1), refuse)
    assert written == [1]


def test_people_read_standard_error_where_standard_output_is_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print("result", file=message_stream(None, Path("file")))
    print("message", file=message_stream(Path("file"), Path("/dev/stdout")))
    assert capsys.readouterr() == ("result\n", "message\n")
    (tmp_path / "link.json").symlink_to("/dev/stdout")
    for name in (tmp_path / "link.json", Path("//dev/stdout"), Path("/proc/self/fd/1")):
        print("message", file=message_stream(name))
        assert capsys.readouterr() == ("", "message\n")


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("t.txt", "t.txt"),
        ("data", "data/corpus.jsonl"),
        ("data", "data/qrels/test.tsv"),
        ("model", "model/config.json"),
        ("model", "model/checkpoints/3/params"),
        ("t.txt", "link.txt"),
    ],
)
def test_what_a_command_reads_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("t.txt", "data/corpus.jsonl", "data/qrels/test.tsv", "model/config.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("read")
    Path("model/checkpoints/3").mkdir(parents=True)
    Path("model/checkpoints/3/params").write_text("read")
    Path("link.txt").symlink_to("t.txt")
    with pytest.raises(UserError, match=r"--out: .*: is read by this command; name another file"):
        check_outputs(("--out", Path(out)), inputs=[source, None, "smollm2"])
    # A result of before within such a folder may be replaced.
    Path("model/eval.json").write_text("{}")
    check_outputs(
        ("--out", Path("model/eval.json")), ("--picture", Path("new.png")), inputs=["model", "data"]
    )
