"""Importing PyTorch when it is first used, so that a mistake in a configuration is told before that."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType


def import_when_used(name: str) -> None:
    """Make `import name` cheap in this process: the package is loaded when something in it is used.

    One that is loaded already, or is not installed, is left as it is. `importlib.util.LazyLoader` would
    load it at the second `import` statement.
    """
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        return
    module = _Later(name)
    module.__spec__, module.__path__ = spec, spec.submodule_search_locations
    sys.modules[name] = module
    sys.meta_path.insert(0, _PackageFirst(module))


class _Later(ModuleType):
    """A package that is loaded, into this module, when something in it is looked up."""

    def __getattr__(self, name: str):
        _load(self)
        return getattr(self, name)


def _load(module: ModuleType) -> None:
    module.__class__ = ModuleType
    module.__dict__.update(importlib.util.module_from_spec(module.__spec__).__dict__)
    module.__spec__.loader.exec_module(module)


class _PackageFirst(MetaPathFinder):
    """Loads the package before one of its modules is imported."""

    def __init__(self, package: ModuleType) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(f"{self.package.__name__}."):
            return None
        sys.meta_path.remove(self)
        if type(self.package) is _Later:
            _load(self.package)
        # The package may have imported that module, which must not run twice. One that stands in
        # sys.modules would be loaded by its own spec.
        loaded = sys.modules.pop(name, None)
        return loaded and importlib.util.spec_from_loader(name, _Loaded(loaded))


class _Loaded(Loader):
    """Gives a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
