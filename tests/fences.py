# SPDX-License-Identifier: Apache-2.0
"""Fenced blocks of pages that readers copy from: found, and run."""

import contextlib
import io
import re
from typing import NamedTuple

__all__ = ["Block", "commands", "fenced", "run"]


class Block(NamedTuple):
    """A fenced block; ``section`` is the heading of second level that it stands under."""

    line: int  # of the page, of the opening fence
    language: str
    text: str
    section: str | None


def fenced(path):
    """Yield the `Block`s of a page."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```([\w{}-]*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        sections = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        yield Block(line, match[1], match[2], sections[-1] if sections else None)


def run(blocks, path):
    """Run blocks of a page in order in one namespace, and count them.

    A "text" block is what the Python block before it prints.
    """
    namespace = {"__name__": "__main__"}
    output, ran = "", 0
    for block in blocks:
        if block.language == "python":
            assert output == "", f"{path.name}, before line {block.line}: output that it does not show"
            stdout = io.StringIO()
            with contextlib.redirect_stdout(stdout):
                # Newlines in front, so that a traceback shows the page's line.
                exec(compile("\n" * block.line + block.text, str(path), "exec"), namespace)
            output, ran = stdout.getvalue(), ran + 1
        elif block.language == "text":
            assert output == block.text, f"{path.name}, line {block.line}"
            output = ""
    assert output == "", f"{path.name}: output that it does not show"
    return ran


def commands(blocks):
    """Yield the commands of "sh" blocks, and of "console" blocks those after a prompt; without comments."""
    for block in blocks:
        for line in block.text.splitlines():
            if block.language == "console":
                line = line[2:] if line.startswith("$ ") else ""
            elif block.language != "sh":
                continue
            for command in re.sub(r"(^|\s)#.*", "", line).split("&&"):
                if command.strip():
                    yield block.line, command.strip()
