from __future__ import annotations

import os
import pty
import re
import select

import pytest
from terminal import Terminal


def test_a_terminal_has_a_live_display(shell):
    ours, theirs = pty.openpty()
    process = shell.start("run", "work.py:held", "--grid", "x=3,5", "-w", "2", stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""

    def more() -> bool:
        nonlocal seen
        if select.select([ours], [], [], 0.05)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                return True
        return False

    # While job 5 is held up, the display says that one of two is done.
    shell.wait_for(lambda: more() or b"1/2" in seen)
    assert b"/s" in seen
    assert b"best 9" in seen
    assert b"failures 0" in seen
    assert b"\x1b[" in seen
    (shell.folder / "go").touch()
    shell.wait_for(more)
    os.close(ours)
    assert process.wait(300) == 0
    assert b"25  job 0.1  x=5" in seen
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("columns", [40, 200])
def test_searches_can_be_read_on_a_terminal_of_any_width(shell, columns):
    shell("run", "work.py:square", "--grid", "x=1,2", "-b", "serial", "--search", "a-search-with-a-name")
    terminal = Terminal(shell.start, "ls", columns=columns)
    try:
        shell.wait_for(terminal.over)
        assert terminal.process.wait(300) == 0
    finally:
        terminal.close()
    lines = re.sub(rb"\x1b\[[0-9;]*m", b"", terminal.seen).decode().splitlines()
    assert all(len(line) <= columns for line in lines)
    shown = " ".join(lines).split()
    assert {"a-search-with-a-name", "work.py:square", "jobs", "done", "2"} <= set(shown)
    assert "failed" not in shown  # none has
