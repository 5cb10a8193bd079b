# SPDX-License-Identifier: Apache-2.0
"""The asv suite, made of the parts of `nb_sparse_adam._src.bench`. See README.md here."""

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

NOW, BEFORE = "nb_sparse_adam._src", "nb_sparse_adam"


class _Older(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what the suite imports in older commits, too: private modules lay beside the public ones."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != NOW and not name.startswith(NOW + "."):
            return None
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec: Any) -> ModuleType:
        return importlib.import_module(spec.name.replace(NOW, BEFORE, 1))

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it has been imported."""


if importlib.util.find_spec(BEFORE) is not None and importlib.util.find_spec(NOW) is None:
    sys.meta_path.insert(0, _Older())
