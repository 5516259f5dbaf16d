"""One stage of a growth recipe: when it happens, what the model becomes, and how."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from modules.errors import InputError, require_not_negative, require_positive
from modules.functional.budget import due_step
from modules.growth.depth import DepthMethod
from modules.growth.operation import WarmUp
from modules.growth.upcycle import UpcycleRules, Variation
from modules.growth.width import Noise, WidthMethod, WidthRules
from modules.moe_config import TRAINING_SETTINGS, MoEConfig

TRIGGERS = ("at_step", "at_tokens", "at_fraction", "at_plateau")


@dataclass(frozen=True)
class GrowthTarget:
    """What the model becomes; what is left empty stays as it is (or follows from what changes, as in the model)."""

    dim: int | None = None
    """width of the residual stream (D)"""
    num_layers: int | None = None
    """blocks"""
    num_heads: int | None = None
    """query heads (H); a head keeps its channels"""
    num_kv_heads: int | None = None
    """key and value heads"""
    ffn_dim: int | None = None
    """hidden width of the dense feed-forward (F)"""
    moe: MoEConfig | None = None
    """turn feed-forward layers into experts"""

    def widths(self) -> dict[str, int]:
        """The widths that are given."""
        fields = {name: getattr(self, name) for name in ("dim", "num_heads", "num_kv_heads", "ffn_dim")}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Plateau:
    """The validation loss has stopped falling."""

    patience: int = 3
    """so many validations in a row without progress"""
    min_delta: float = 0.01
    """nats per token that count as progress on the best loss so far"""

    def __post_init__(self) -> None:
        require_positive(**{"at_plateau.patience": self.patience})
        require_not_negative(**{"at_plateau.min_delta": self.min_delta})


PRESETS: dict[str, dict[str, Any]] = {
    "fpi": {"width": "fpi", "depth": "stack"},  # bert2BERT, arXiv 2110.07143
    "aki": {"width": "aki", "depth": "stack"},  # bert2BERT
    "aki_pro": {"width": "aki", "depth": "interpolate"},  # AquilaMoE, arXiv 2408.06567
    "sparkling": {"width": "iso", "optimizer_state": "asymmetric"},  # arXiv 2602.02472
    "g_stack": {"depth": "stack"},  # arXiv 2405.15319
    "llama_pro": {"depth": "zero_block"},  # arXiv 2401.02415
    "aquila_scale_out": {"upcycle": "copy", "router_std": 0.02},  # AquilaMoE: identical experts, top-2 renormalised
    "virtual_group": {"upcycle": "copy"},  # arXiv 2410.07524: moe.expert_dim a fraction of ffn_dim
    "split": {"upcycle": "copy"},  # LLaMA-MoE, arXiv 2406.16554: ffn_dim / expert_dim experts
    "drop_upcycling": {"upcycle": "drop", "drop_ratio": 0.5},  # arXiv 2502.19261
    "expert_duplication": {"upcycle": "noise", "expert_noise": 0.01},  # arXiv 2604.19835
}
"""What a published method sets, by the name it is known by; the target says how large the model becomes."""


USUAL = "usual"
"""Key of a field's metadata: its value where neither the recipe nor a preset gives one. Such a field is None only until
the stage is made."""


@dataclass(frozen=True)
class GrowthStage:
    """One transition: when it happens, what the model becomes, and how. A run needs exactly one trigger (`at_…`)."""

    target: GrowthTarget
    """the architecture on the other side"""
    at_step: int | None = None
    """after this many optimizer steps"""
    at_tokens: int | None = None
    """at the first step after this many training tokens"""
    at_fraction: float | None = None
    """after this share of trainer.max_steps, or of a budget that lets the run take fewer"""
    at_plateau: Plateau | None = None
    """when the validation loss has stopped falling"""
    preset: str | None = None
    """a published method: fpi, aki, aki_pro, sparkling, g_stack, llama_pro, aquila_scale_out, virtual_group, split,
    drop_upcycling or expert_duplication; options that are given beside it win"""
    width: WidthMethod | None = field(default=None, metadata={USUAL: "iso"})
    """widening: iso (usual; exact for any ratio), zero (new channels start unwritten; exact), lemon (iso whose split
    inputs are drawn; exact), fpi (exact for whole ratios), aki (new rows from the next layer; not exact)"""
    copies: Literal["even", "random", "powers"] | None = None
    """widening: new indices copy the old ones in turn, or at random, or in powers of 2 and 4, whose scales are exact in
    bfloat16 and float16 (but for models with QK-norm or post-norms, whose epsilon is shared); empty: powers where grown
    weights are stored in one of those, else even"""
    split_noise: float = 0.0
    """widening: relative noise on split inputs that cancels exactly and makes copies part; 0 for none"""
    noise: Noise = "projection"
    """that noise is drawn and centred over the copies of an input, or has + and - in pairs of copies"""
    aki_scope: Literal["all", "ffn_heads"] = "all"
    """aki: all output rows are taken from the next layer, or those of hidden neurons and heads"""
    aki_consumers: Literal["self", "next"] = "self"
    """aki: what reads new neurons and heads is its own layer's, or the next layer's too"""
    depth: DepthMethod | None = field(default=None, metadata={USUAL: "zero_block"})
    """deepening: zero_block (usual; new blocks write nothing at first; exact), stack (the whole model again and again)
    or interpolate (each block again behind itself); the last two are not exact"""
    new_layers: tuple[int, ...] | None = None
    """zero_block: the numbers of the new blocks in the deeper model, from 0; empty: spread evenly"""
    upcycle: Variation | None = field(default=None, metadata={USUAL: "drop"})
    """experts are equal copies of the feed-forward (of its shards, where moe.expert_dim is smaller; of each expert,
    where there are experts already), or copies with a share of neurons drawn anew (drop, usual), or with noise"""
    drop_ratio: float | None = field(default=None, metadata={USUAL: 0.5})
    """drop: share of each expert's hidden neurons drawn anew; usually 0.5"""
    expert_noise: float | None = field(default=None, metadata={USUAL: 0.1})
    """noise: its standard deviation, relative to the weights'; usually 0.1"""
    router_std: float | None = field(default=None, metadata={USUAL: 0.02})
    """standard deviation of the new router's weights; usually 0.02"""
    optimizer_state: Literal["mapped", "asymmetric", "reset"] | None = field(default=None, metadata={USUAL: "mapped"})
    """the optimizer's moments are carried over, scaled as the growth demands (usual); or kept for old entries, while
    new ones start from zero with a warm-up of their own; or all start afresh"""
    warm_up_factor: float = 1.3
    """asymmetric: the learning rate of new entries rises to so many times the schedule's, and returns"""
    warm_up_steps: int = 250
    """asymmetric: steps of the rise, and of the return"""
    seed: int = 0
    """seed of everything that is drawn in this transition"""

    def __post_init__(self) -> None:
        if self.new_layers is not None:
            object.__setattr__(self, "new_layers", tuple(self.new_layers))
        self._complete()
        given = {name: getattr(self, name) for name in TRIGGERS if getattr(self, name) is not None}
        if len(given) > 1:
            raise InputError(f"growth stage with {' and '.join(given)} has more than one trigger; keep one")
        require_positive(**{f"growth stage {name}": value for name, value in given.items() if name != "at_plateau"})
        if self.at_fraction is not None and self.at_fraction >= 1:
            raise InputError(f"growth stage at_fraction={self.at_fraction} must lie below 1; it is a share of the run")
        for name in ("split_noise", "router_std", "expert_noise", "warm_up_steps"):
            require_not_negative(**{name: getattr(self, name)})
        require_positive(warm_up_factor=float(self.warm_up_factor))
        if not 0 < self._chosen("drop_ratio") <= 1:
            raise InputError(f"drop_ratio={self.drop_ratio} must lie above 0 and at most 1; 0.5 is usual")

    @property
    def width_rules(self) -> WidthRules:
        """How it widens."""
        kind, method = self.copies or "even", self._chosen("width")
        return WidthRules(method, kind, self.split_noise, self.noise, self.aki_scope, self.aki_consumers, self.seed)

    @property
    def warm_up(self) -> WarmUp | None:
        """Of new entries, where the optimizer's state is asymmetric."""
        is_asymmetric = self.optimizer_state == "asymmetric"
        return WarmUp(self.warm_up_factor, self.warm_up_steps) if is_asymmetric else None

    @property
    def upcycle_rules(self) -> UpcycleRules:
        """How experts are made."""
        variation, ratio, noise = (self._chosen(name) for name in ("upcycle", "drop_ratio", "expert_noise"))
        return UpcycleRules(variation, ratio, noise, self._chosen("router_std"), self.seed)

    @property
    def depth_method(self) -> DepthMethod:
        """How it deepens."""
        return self._chosen("depth")

    @property
    def trigger(self) -> str | None:
        """When it happens, in words; None when nothing says so."""
        given = ((name, getattr(self, name)) for name in TRIGGERS)
        return next((f"{name}={value}" for name, value in given if value is not None), None)

    def due_step(self, tokens_per_step: int, max_steps: int) -> int | None:
        """The optimizer step after which it is due, in a run that begins with steps of this size; None when only the
        run itself can tell."""
        return due_step(self.when, max_steps, tokens_per_step)

    @property
    def when(self) -> dict[str, float]:
        """Its trigger in numbers; empty where it waits for a plateau."""
        given = {"at_step": self.at_step, "at_tokens": self.at_tokens, "at_fraction": self.at_fraction}
        return {name: value for name, value in given.items() if value is not None}

    def _complete(self) -> None:
        """Fill in what is not given: from the preset, or what is usual."""
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"growth stage preset={self.preset!r} is not known; choose one of {', '.join(PRESETS)}")
        preset = PRESETS.get(self.preset or "", {})
        for option in fields(self):
            if USUAL in option.metadata and getattr(self, option.name) is None:
                object.__setattr__(self, option.name, preset.get(option.name, option.metadata[USUAL]))

    def _chosen(self, name: str) -> Any:
        """An option after it was filled in."""
        return getattr(self, name)

    @property
    def identity(self) -> str:
        """Names the transition in checkpoints, so that it is applied once; training settings may change behind it."""
        return _describe(self)


def _describe(config: Any) -> str:
    """The fields of a dataclass that differ from what is usual; fields that come later do not change it."""
    usual = {option.name: option.metadata.get(USUAL, option.default) for option in fields(config)}
    chosen = {name: getattr(config, name) for name in usual if getattr(config, name) != usual[name]}
    chosen = {name: value for name, value in chosen.items() if name not in TRAINING_SETTINGS}
    if getattr(config, "bias_update_rate", 0):
        chosen["selection_bias"] = True
    return ", ".join(f"{k}=({_describe(v)})" if is_dataclass(v) else f"{k}={v}" for k, v in chosen.items())
