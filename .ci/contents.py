# SPDX-License-Identifier: Apache-2.0
"""What the two distributions hold, beside what git tracks: nothing forgotten, nothing that should stay here.

``python .ci/contents.py FOLDER``, in the root of the clone; FOLDER has one wheel and one source distribution.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MADE = {"PKG-INFO"}
"""In a source distribution: what the build adds."""


def tracked():
    """Return the files that git tracks, by their paths from the root."""
    out = subprocess.run(["git", "ls-files", "-z"], check=True, text=True, stdout=subprocess.PIPE)
    return set(out.stdout.split("\0")) - {""}


def in_wheel(path):
    """Return (files of the package, files of its metadata, by name) of a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    metadata = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    return {name for name in names if ".dist-info/" not in name}, metadata


def in_sdist(path):
    """Return the files of a source distribution, by their paths from its root."""
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def differences(what, got, expected):
    """Yield a line for each file that is missing, and each that should not be there."""
    yield from (f"{what} lacks {name}" for name in sorted(expected - got))
    yield from (f"{what} has {name}" for name in sorted(got - expected))


def faults(wheel, sdist, files):
    """Return a line for everything that is wrong.

    Parameters
    ----------
    wheel, sdist : path
    files : set of str
        What git tracks.
    """
    package, metadata = in_wheel(wheel)
    wrong = [
        *differences("the wheel", package, {name for name in files if name.startswith("nb_sparse_adam/")}),
        *differences("the source distribution", in_sdist(sdist) - MADE, files),
    ]
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if name not in metadata:
            wrong.append(f"the wheel's metadata lacks {name}")
    return wrong


def main(folder):
    """Look at what is in a folder, and end with status 1 if anything is wrong."""
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    wrong = faults(wheel, sdist, tracked())
    print(*wrong or [f"{wheel.name} and {sdist.name} hold what they should"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
