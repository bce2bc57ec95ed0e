"""Something to be done when a module has been imported, whoever imports it; without importing it now."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_with_libraries"]

# When the first is there, the second may add what it has to add. Neither is imported for it; and what the second
# imports is time of whoever imports the first.
_PLUGINS = {
    "transformers.models.auto.modeling_auto": "armour_surgery.plugins.transformers",
    "transformers.modeling_utils": "armour_surgery.plugins.transformers_saving",
    "timm.models": "armour_surgery.plugins.timm",
}


def register_with_libraries() -> None:
    """Make the libraries know converted models: now those that are imported, and the others when they are."""
    for library, plugin in _PLUGINS.items():
        if library in sys.modules:
            _run(plugin)
        else:
            sys.meta_path.insert(0, _Waiting(library, plugin))


def _run(plugin: str) -> None:
    register: Callable[[], None] = importlib.import_module(plugin).register
    register()


class _Waiting:
    """A finder that finds nothing by itself: it has the others find one module, and adds to what loading it does."""

    def __init__(self, library: str, plugin: str) -> None:
        self._library = library
        self._plugin = plugin

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the module that is waited for, as the other finders have it; None for any other."""
        if name != self._library:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _run(self._plugin)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
