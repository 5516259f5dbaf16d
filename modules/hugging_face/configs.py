"""config.json of a family to a `ModelConfig` and back, and which family a model can be written as."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.config import ModelConfig
from modules.errors import InputError
from modules.hugging_face.families import FAMILIES, Family
from modules.hugging_face.keys import Fields, Record
from modules.hugging_face.requirements import setting
from modules.moe_config import MoEConfig


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; raises `InputError` when it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__} and not a JSON object; copy or download it again")
    return content


def find_family(record: Record, path: Path, family: str | None) -> Family:
    """The family that is asked for, or else the one that config.json names."""
    name = record.get("model_type") if family is None else family
    if not isinstance(name, str) or name not in FAMILIES:
        what = f"{path}: model_type={name}" if family is None else f"family={name}"
        fix = "with --family it is read as one of them" if family is None else "choose one of them"
        raise InputError(f"{what} is not among the families {', '.join(FAMILIES)}; {fix}")
    return FAMILIES[name]


def read_config(record: Record, path: Path, family: Family) -> ModelConfig:
    """What a config.json says of the model.

    Raises:
        InputError: missing or mistyped keys, or things that growmoe does not have.
    """
    fields: Fields = {}
    try:
        for entry in family.entries:
            fields |= entry.read(record)
        moe = {name.removeprefix("moe."): value for name, value in fields.items() if name.startswith("moe.")}
        rest = {name: value for name, value in fields.items() if not name.startswith("moe.")}
        return ModelConfig(**rest, moe=MoEConfig(**moe) if moe else None)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_config(config: ModelConfig, family: Family, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model of a family."""
    record: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name}
    for entry in family.entries:
        record |= entry.write(config)
    ids = {name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**record, **ids, "dtype": dtype, "torch_dtype": dtype, "use_cache": True}


def choose_family(config: ModelConfig, origin: str | None, wanted: str | None) -> Family:
    """The family to write a model as: the one that is wanted, else its origin's, else the first that expresses it.

    Raises:
        InputError: the wanted family, or every family, would be another model; says what stands in the way.
    """
    if wanted is not None:
        family = find_family({}, Path(), wanted)
        if failing(config, family):
            raise InputError(
                f"family={wanted} does not express this model: {_differences(config, family)}; "
                "choose another family, or leave it out"
            )
        return family
    open_families = [family for family in FAMILIES.values() if not family.by_name_only]
    first = [family for family in open_families if family.name == origin]
    for family in (*first, *open_families):
        if not failing(config, family):
            return family
    alike = [family for family in open_families if family.routed == (config.moe is not None)]
    fewest = min(len(failing(config, family)) for family in alike)
    nearest: dict[str, str] = {}  # of families that differ in the same things, the first
    for family in alike:
        if len(failing(config, family)) == fewest:
            nearest.setdefault(_differences(config, family), family.name)
    shown = ", or ".join(f"{name}: {differences}" for differences, name in nearest.items())
    raise InputError(
        f"no family of Hugging Face models expresses this one; the nearest is {shown}; only a model trained so can be "
        "exported"
    )


def failing(config: ModelConfig, family: Family) -> list[str]:
    """What a model would have to be to be one of the family and is not, in words."""
    if family.routed != (config.moe is not None):
        return [f"it needs {'routed experts' if family.routed else 'a dense model'}"]
    found = []
    for requirement in family.requires:
        if not requirement.holds(config):
            shown = ", ".join(
                f"{path.rpartition('.')[2]}={_shown(setting(config, path))}" for path in requirement.shown
            )
            found.append(f"it needs {requirement.needs}, and the model has {shown}")
    return found


def _differences(config: ModelConfig, family: Family) -> str:
    return "; ".join(failing(config, family))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
