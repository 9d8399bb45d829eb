"""Checks of the Config of a gate or an expert type, whose fields become flags."""

from __future__ import annotations

import dataclasses
import inspect

from megatron.config.flags import flags_of


def check_option_class(cls: type, owner: str, section: str) -> None:
    """Check that all options of a Config can be flags.

    Args:
        owner: whose Config it is, for messages: "gate 'topk'".
        section: section of its options.
    Raises:
        ValueError: it is no dataclass, an option cannot be a flag, or an attribute looks like an
            option, but is no field.
    """
    if not dataclasses.is_dataclass(cls):
        raise ValueError(
            f"the Config of {owner} is no dataclass; write @dataclass(frozen=True) above it"
        )
    _check_annotations(cls, owner)
    flags_of(cls, section)


def _check_annotations(config: type, owner: str) -> None:
    """Refuse attributes that look like options, but are no fields of the dataclass.

    Raises:
        ValueError: a number, a text or a list has no type, or a class that adds options has no
            decorator. Names in capitals are constants.
    """
    for cls in config.__mro__:
        where = f"the class {cls.__name__} of the Config of {owner}"
        types = inspect.get_annotations(cls)
        options = [option for option in types if "ClassVar" not in str(types[option])]
        if options and "__dataclass_fields__" not in vars(cls):
            raise ValueError(
                f"{where} adds {options[0]!r}, but is no dataclass; write "
                "@dataclass(frozen=True) above it"
            )
        for option, value in vars(cls).items():
            is_constant = option.startswith("_") or option.isupper() or option in types
            if not is_constant and isinstance(value, (int, float, str, list, tuple)):
                raise ValueError(
                    f"{where} has {option!r} without a type, so that it is no option; write "
                    f"{option}: {type(value).__name__} = {value!r}"
                )
