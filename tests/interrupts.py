# SPDX-License-Identifier: Apache-2.0
"""An exception at every place of our code where a signal handler may raise one.

CPython (3.10 to 3.14) looks for signals when a function begins or a generator goes on, after a call, and
where a loop jumps back; not between the end of a ``with`` or ``try`` block and what is called then. A trace
function (``f_trace_opcodes``) raises the exception before the instruction that comes after such a place.
Where a block ends between the two, it would be raised where no signal handler can: such places are left out.
"""

import contextlib
import dis
import functools
import itertools
import sys
from pathlib import Path

import nb_sparse_adam

PACKAGE = str(Path(nb_sparse_adam.__file__).parent)
OURS = (PACKAGE, contextlib.__file__)  # a context manager of contextlib's is ours where we use it


class Interrupted(BaseException):
    """What the signal handler raises."""


@functools.cache
def places(code, every):
    """Offsets of the instructions before which an exception is raised in a code object."""
    instructions = list(dis.get_instructions(code))
    handlers = {}
    for entry in dis._parse_exception_table(code) if hasattr(dis, "_parse_exception_table") else []:
        for offset in range(entry.start, entry.end, 2):
            handlers[offset] = entry.target

    def handler(instruction):
        return handlers.get(instruction.offset)

    found = set()
    leaving = _leaving(instructions)
    for before, instruction in itertools.pairwise(instructions):
        called = before.opname.startswith("CALL") or before.opname == "RESUME"
        ends = instruction.opname in ("NOP", "POP_BLOCK") or handler(before) != handler(instruction)
        if (called or every) and not ends and instruction.offset not in leaving:
            found.add(instruction.offset)
    targets = {i.argval for i in instructions if "JUMP_BACKWARD" in i.opname or i.opname == "JUMP_ABSOLUTE"}
    return frozenset(found | targets)


def _leaving(instructions):
    """Offsets of the instructions with which a ``with`` statement calls ``__exit__(None, None, None)``."""
    found = set()
    for at in range(len(instructions) - 4):
        nones, then = instructions[at : at + 3], instructions[at + 3 : at + 5]
        if all(i.opname == "LOAD_CONST" and i.argval is None for i in nones):
            calls = [i.offset for i in then if i.opname == "CALL"]
            found.update(i.offset for i in [*nones, *then] if calls and i.offset <= calls[0])
    return found


def interrupted(work, at, every=False, files=OURS):
    """Do the work with an exception at its at-th place; return where that was, None if there are fewer.

    ``every``: between any two instructions, but for the ends of blocks. ``files``: with what the names of
    files begin whose places count.
    """
    passed = -1
    where = None

    def place(frame):
        nonlocal passed, where
        passed += 1
        if passed == at:
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            raise Interrupted

    def local(frame, event, arg):
        if event == "opcode" and frame.f_lasti in places(frame.f_code, every):
            place(frame)
        return local

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(files):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        place(frame)
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupted:
        pass
    finally:
        sys.settrace(before)
    return where
