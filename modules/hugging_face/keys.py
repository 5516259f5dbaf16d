"""Entries of config.json and the fields of `ModelConfig` that they mean, each described once for both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from modules.config import ModelConfig, RopeScaling
from modules.errors import InputError

Record = Mapping[str, Any]
Fields = dict[str, Any]
"""Fields of `ModelConfig` by name; those of its `moe` begin with `moe.`"""
REQUIRED: Any = object()
_NULLS = {bool: False, list: [], dict: {}}
"""What null means where nothing else is said: what Python takes for false."""
_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a map",
}


class Entry(Protocol):
    """One or several keys of config.json."""

    def read(self, record: Record) -> Fields:
        """What the keys say, as fields of ours; raises `InputError` for what a model of ours cannot be."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys for a model of ours."""


@dataclass(frozen=True)
class Key:
    """One key that holds what one field holds.

    Attributes:
        theirs: the key.
        ours: the field that it is read into.
        kind: the type that it must have.
        value: what is written.
        default: what a file without the key means.
        null: what null means; left out, null is refused or, of a truth value, false.
        alias: another name that the key is read from.
        multiple: what the number must be a multiple of.
    """

    theirs: str
    ours: str
    kind: type
    value: Callable[[ModelConfig], Any]
    default: Any = REQUIRED
    null: Any = REQUIRED
    alias: str = ""
    multiple: int = 1

    def read(self, record: Record) -> Fields:
        """The field."""
        name = self.alias if self.alias and self.alias in record and self.theirs not in record else self.theirs
        value = lookup(record, name, self.kind, self.default, null=self.null)
        if self.multiple > 1 and value % self.multiple:
            raise InputError(
                f"{name}={value} is not a multiple of {self.multiple}, which growmoe needs of routed layers; "
                "give a model with such sizes"
            )
        return {self.ours: value}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key."""
        return {self.theirs: self.value(config)}


@dataclass(frozen=True)
class Rule:
    """Keys that say several things together, or one thing in several ways."""

    read_from: Callable[[Record], Fields]
    written: Callable[[ModelConfig], dict[str, Any]]

    def read(self, record: Record) -> Fields:
        """The fields."""
        return self.read_from(record)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys."""
        return self.written(config)


def lookup(record: Record, key: str, kind: type, default: Any = REQUIRED, *, null: Any = REQUIRED) -> Any:
    """The value of a key, checked.

    Args:
        record: the keys.
        key: which one.
        kind: the type that it must have.
        default: what stands for a key that is absent.
        null: what stands for null; left out, null is refused or, of truth values, lists and maps, false or empty.

    Raises:
        InputError: another type, or absent or null with nothing that stands for it.
    """
    value: Any = record.get(key)
    if value is None:
        found = default if key not in record else _NULLS.get(kind, REQUIRED) if null is REQUIRED else null
        if found is REQUIRED:
            state = "null" if key in record else "missing"
            raise InputError(f"{key} is {state}, and {_KIND_NAMES[kind]} is needed; use the model's own config.json")
        return found
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{key}={value!r} is not {_KIND_NAMES[kind]}; correct it")
    return float(value) if isinstance(value, int) and kind is float else value


def always(**fields: Any) -> Rule:
    """Fields that a family has whatever its config.json says."""
    return Rule(lambda _: dict(fields), lambda _: {})


def refused(
    key: str, meaning: str, *, allowed: tuple[Any, ...] = (None,), writes: dict[str, Any] | None = None
) -> Rule:
    """A key of something that growmoe does not have; only values that switch it off are read."""

    def read(record: Record) -> Fields:
        if record.get(key) not in allowed:
            value = str(record[key])
            shown = value if len(value) <= 80 else f"{value[:80]}..."
            raise InputError(f"{key}={shown} is {meaning}, which growmoe does not have; give a model without it")
        return {}

    return Rule(read, lambda _: dict(writes or {}))


def init_std() -> Rule:
    """The spread of fresh weights; a file without it, or with 0 (no model of ours starts so), takes the default."""
    key = "initializer_range"

    def read(record: Record) -> Fields:
        spread = lookup(record, key, float, 0.0, null=0.0)
        return {"init_std": spread} if spread else {}

    return Rule(read, lambda config: {key: float(config.init_std)})


def attention_bias() -> Rule:
    """Biases on all four projections of attention, or on none."""

    def read(record: Record) -> Fields:
        biased = lookup(record, "attention_bias", bool, False)
        return {"qkv_bias": biased, "o_bias": biased}

    return Rule(read, lambda config: {"attention_bias": config.qkv_bias})


def head_dim(default: int | None = None, *, always_written: bool = True) -> Rule:
    """Channels of a head; without the key `default`, or the hidden size shared among the heads, which null means."""

    def read(record: Record) -> Fields:
        return {"head_dim": lookup(record, "head_dim", int, default, null=None)}

    def write(config: ModelConfig) -> dict[str, Any]:
        standard = config.dim == config.head_size * config.num_heads
        return {} if standard and not always_written else {"head_dim": config.head_size}

    return Rule(read, write)


def context(*, window_default: int | None = None, switch: str = "", windowed: bool = True) -> Rule:
    """The longest sequence. With sliding windows of attention a model is exact only inside one: it is the limit then.

    Args:
        window_default: the window of a file without the key; null means none.
        switch: a key that must be true for the window to count.
        windowed: whether the family has windows at all.
    """

    def read(record: Record) -> Fields:
        length = lookup(record, "max_position_embeddings", int)
        window = lookup(record, "sliding_window", int, window_default, null=None) if windowed else None
        switched_off = switch and not lookup(record, switch, bool, False)
        kinds = lookup(record, "layer_types", list, [])
        if not window or switched_off or (kinds and "sliding_attention" not in kinds):
            return {"max_seq_len": length}
        return {"max_seq_len": min(length, window)}

    def write(config: ModelConfig) -> dict[str, Any]:
        keys: dict[str, Any] = {"max_position_embeddings": config.max_seq_len}
        return keys | ({"sliding_window": None} if windowed else {}) | ({switch: False} if switch else {})

    return Rule(read, write)


def layer_kinds() -> Rule:
    """Kinds of attention by layer: full, or inside a window, which `context` deals with."""

    def read(record: Record) -> Fields:
        kinds = lookup(record, "layer_types", list, [])
        strange = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
        if strange:
            raise InputError(
                f"layer_types has {strange[0]}, and growmoe has full attention in every layer; give a model with that"
            )
        return {}

    return Rule(read, lambda _: {})


def routed_layers() -> Rule:
    """Which layers are routed: every n-th, without those that are listed."""

    def read(record: Record) -> Fields:
        step = lookup(record, "decoder_sparse_step", int, 1)
        dense = lookup(record, "mlp_only_layers", list, [])
        if not dense:
            return {"moe.every": step}
        num_layers = lookup(record, "num_hidden_layers", int)
        routed = [n for n in range(num_layers) if n not in dense and (n + 1) % max(step, 1) == 0]
        return {"moe.layers": tuple(routed)}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        if config.moe.layers is None:
            return {"decoder_sparse_step": config.moe.every, "mlp_only_layers": []}
        dense = sorted(set(range(config.num_layers)) - set(config.routed_layers))
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Rule(read, write)


def shared_expert() -> Rule:
    """One shared expert behind a gate, or with the size 0 none."""
    key = "shared_expert_intermediate_size"

    def read(record: Record) -> Fields:
        size = lookup(record, key, int)
        if size == 0:
            return {}
        return {"moe.num_shared_experts": 1, "moe.shared_expert_dim": size, "moe.shared_gate": True}

    return Rule(read, lambda config: {key: config.shared_size})


def rope(default_theta: float = 10000.0) -> Rule:
    """Rotary positions, in the present form (rope_parameters) and the older one (rope_theta and rope_scaling).

    Both are written. Where both are read, the older one rules, as in transformers.
    """

    def read(record: Record) -> Fields:
        found = lookup(record, "rope_scaling", dict, None) or lookup(record, "rope_parameters", dict, {})
        if any(isinstance(value, dict) for value in found.values()):
            raise InputError("rope_parameters differ by kind of layer; growmoe has one rotary embedding for all layers")
        for place in (record, found):
            if lookup(place, "partial_rotary_factor", float, 1.0, null=1.0) != 1.0:
                raise InputError(
                    f"partial_rotary_factor={place['partial_rotary_factor']} turns a part of each head, and growmoe "
                    "turns all of it; give a model with 1.0"
                )
        outer = lookup(record, "rope_theta", float, default_theta, null=default_theta)
        theta = lookup(found, "rope_theta", float, outer, null=outer)
        return {"rope_theta": theta, "rope_scaling": _read_scaling(record, found)}

    def write(config: ModelConfig) -> dict[str, Any]:
        scaling = _written_scaling(config.rope_scaling)
        theta = float(config.rope_theta)
        parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        return {"rope_parameters": parameters, "rope_theta": theta, "rope_scaling": scaling}

    return Rule(read, write)


def _read_scaling(record: Record, found: Record) -> RopeScaling | None:
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=lookup(found, "factor", float))
    if kind != "llama3":
        raise InputError(
            f"rope type {kind} is not among default, linear and llama3, which growmoe has; give a model with one of "
            "these, or remove the scaling and stay inside the context that the model was trained on"
        )
    original = "original_max_position_embeddings"
    before = lookup(record, "max_position_embeddings", int)
    for place in (found, record):
        before = lookup(place, original, int, before, null=before)
    factors = {name: lookup(found, name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return RopeScaling("llama3", original_max_seq_len=before, **factors)


def _written_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        keys["low_freq_factor"] = float(scaling.low_freq_factor)
        keys["high_freq_factor"] = float(scaling.high_freq_factor)
        keys["original_max_position_embeddings"] = scaling.original_max_seq_len
    return keys
