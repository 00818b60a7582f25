"""Files that are opened for writing: never through a link, never a FIFO, and what stands there stays as it is."""

import os

import pytest

from parallel.comm.plain_files import open_for_writing


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
@pytest.mark.parametrize("how", [{}, {"truncate": True}, {"append": True}])
def test_what_is_no_plain_file_is_refused_at_once_and_stays(tmp_path, kind, how):
    path, target = tmp_path / "file", tmp_path / "target"
    target.write_text("keep")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(OSError, match="something else than a plain file"):
        open_for_writing(path, **how)
    assert target.read_text() == "keep" and not (tmp_path / "nowhere").exists()


def test_a_plain_file_is_made_kept_appended_to_or_emptied(tmp_path):
    path = tmp_path / "file"
    os.close(open_for_writing(path))
    path.write_bytes(b"ab")
    with open(open_for_writing(path, append=True), "ab", buffering=0) as stream:
        stream.write(b"c")
    assert path.read_bytes() == b"abc"
    os.close(open_for_writing(path, truncate=True))
    assert path.read_bytes() == b""
