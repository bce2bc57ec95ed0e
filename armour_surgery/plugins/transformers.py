"""transformers: `AutoConfig` and `AutoModel` know the types of converted models, `armour_vit` and so on.

This is imported when somebody imports transformers' tables: what takes time is imported when a type is asked for.
"""

from typing import Any

from transformers import CONFIG_MAPPING

from armour_surgery.hosts.transformers_marks import PREFIX, config_class

__all__ = ["register"]


def register() -> None:
    """Add the types to transformers' tables."""
    known = _Converted()
    known.update(CONFIG_MAPPING._extra_content)
    CONFIG_MAPPING._extra_content = known


class _Converted(dict[str, Any]):
    """Configs that others registered, and one for each type that transformers has, made when it is asked for.

    There are hundreds of types, and making one imports its model.
    """

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        return isinstance(key, str) and key.startswith(PREFIX) and key.removeprefix(PREFIX) in CONFIG_MAPPING._mapping

    def __missing__(self, key: str) -> Any:
        from armour_surgery.plugins.transformers_models import add_models

        stock = CONFIG_MAPPING[key.removeprefix(PREFIX)]
        converted = config_class(stock)
        self[key] = converted
        add_models(stock, converted)
        return converted
