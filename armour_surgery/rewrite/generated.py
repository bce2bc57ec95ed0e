"""Classes that are made while a program runs, and what Python and torch cannot do with them."""

import copyreg
from functools import cache
from typing import Any, ClassVar, NoReturn

from torch import nn

from armour_surgery.errors import UsageError

__all__ = ["Generated", "generated_class"]


class Generated:
    """What every module with a generated forward has besides its host's class; it says what to do instead."""

    to_keep: ClassVar[str]

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first.

        Raises:
            UsageError: it reads the source of classes, and this one has none in any file.
        """
        raise UsageError(
            f"torch.jit.script cannot read {type(self).__name__}, whose forward was generated; use torch.export.export "
            "for this model"
        )


def generated_class(name: str, generated: type[Generated], host: type[nn.Module], members: dict[str, Any]) -> type[Any]:
    """A subclass of both. Its instances can be deep-copied, and refuse to be pickled."""
    metaclass: type = type(host)
    made: type[Any] = _class_of_classes(metaclass)(name, (generated, host), members)
    return made


@cache
def _class_of_classes(base: type) -> type:
    # Pickle, which looks for a class by its name, asks first whether its class has another way; deepcopy, for which all
    # classes are what they are, does not.
    made = type("GeneratedClass", (base,), {})
    copyreg.pickle(made, _refuse)
    return made


def _refuse(cls: type[Generated]) -> NoReturn:
    raise UsageError(f"{cls.__name__} cannot be pickled (torch.save, multiprocessing): {cls.to_keep}")
