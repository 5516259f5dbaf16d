"""Every kind of routing but the einsum form, written for reading: loops over tokens, choices and experts.

Nothing of `modules.functional.routing` is used here. GShard by index is covered too, as top-2 with its own epsilon.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.layers.experts import RoutedExperts


@dataclass(frozen=True)
class Routed:
    """What the layer makes of its input, and what it reports."""

    output_BLD: Tensor
    balance: Tensor
    z: Tensor
    dropped: list[float]
    tokens_per_expert: list[int]


def routed_experts(layer: RoutedExperts, hidden_BLD: Tensor, decoding: bool = False) -> Routed:
    """Follow each token (or, under expert choice, each expert) through the layer."""
    moe, batch, length = layer.router.moe, *hidden_BLD.shape[:2]
    rows = hidden_BLD.flatten(0, 1)
    logits = [router_logits(layer, row) for row in rows]
    z = sum(torch.log(row.exp().sum()) ** 2 for row in logits) / len(rows)
    probabilities = [expert_probabilities(layer, row) for row in logits]
    group_size = tokens_per_group(layer, batch * length, length)
    if moe.router.kind == "expert_choice":
        return _chosen_by_experts(layer, hidden_BLD, logits, probabilities, z, group_size)

    choices = [chosen_experts(layer, row) for row in logits]
    gates = [chosen_gates(layer, row, chosen) for row, chosen in zip(logits, choices, strict=True)]
    has_slots = moe.capacity is not None and not decoding and (layer.training or moe.capacity.at_evaluation)
    kept = kept_choices(choices, group_size, slots(layer, group_size)) if has_slots else everything(choices)
    output = []
    for t, row in enumerate(rows):
        mixed = torch.zeros_like(row)
        for k, e in enumerate(choices[t]):
            if (t, k) in kept:
                mixed = mixed + gates[t][k].to(row.dtype) * swiglu(row, layer, e)
        output.append(mixed + shared_experts(layer, row))

    per_group = {"sequence": length, "group": group_size}.get(moe.level, len(rows))
    counted = [chosen[:1] for chosen in choices] if moe.router.kind == "gshard" else choices
    return Routed(
        torch.stack(output).view_as(hidden_BLD),
        balance_loss(counted, probabilities, per_group),
        z,
        [sum((t, k) not in kept for t in range(len(rows))) / len(rows) for k in range(moe.top_k)],
        [sum(chosen.count(e) for chosen in choices) for e in range(moe.num_experts)],
    )


def _chosen_by_experts(
    layer: RoutedExperts,
    hidden_BLD: Tensor,
    logits: list[Tensor],
    probabilities: list[Tensor],
    z: Tensor,
    group_size: int,
) -> Routed:
    """Each expert takes the tokens of a group that score highest for it, as many as it has slots."""
    moe, rows = layer.router.moe, hidden_BLD.flatten(0, 1)
    scores = [expert_scores(layer, row) for row in logits]
    takes: list[list[int]] = [[] for _ in rows]  # by token
    for start in range(0, len(rows), group_size):
        for e in range(moe.num_experts):
            best = sorted((-scores[t][e].item(), t) for t in range(start, start + group_size))
            for _, t in best[: slots(layer, group_size)]:
                takes[t].append(e)
    output = []
    for row, score, taken in zip(rows, scores, takes, strict=True):
        mixed = torch.zeros_like(row)
        for e in taken:
            mixed = mixed + (moe.router.gate_scale * score[e]).to(row.dtype) * swiglu(row, layer, e)
        output.append(mixed + shared_experts(layer, row))
    missed = sum(not taken for taken in takes) / len(rows)
    return Routed(
        torch.stack(output).view_as(hidden_BLD),
        balance_loss(takes, probabilities, len(rows)),
        z,
        [missed] * moe.top_k,
        [sum(e in taken for taken in takes) for e in range(moe.num_experts)],
    )


# -- scores, choices and gates -----------------------------------------------------------------------------------------


def router_logits(layer: RoutedExperts, row: Tensor) -> Tensor:
    """One token's logits, in float32 or wider, squeezed by the soft cap."""
    wide = torch.float64 if row.dtype == torch.float64 else torch.float32
    logits = layer.router.weight.to(wide) @ row.to(wide)
    cap = layer.router.moe.router.soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def expert_scores(layer: RoutedExperts, logits: Tensor) -> Tensor:
    """What experts are ranked by: sigmoids, or the softmax over all experts."""
    if layer.router.moe.router.score == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    return torch.exp(logits) / torch.exp(logits).sum()


def expert_probabilities(layer: RoutedExperts, logits: Tensor) -> Tensor:
    """What the balance loss sees: scores that add up to 1."""
    scores = expert_scores(layer, logits)
    return scores / scores.sum()


def chosen_experts(layer: RoutedExperts, logits: Tensor) -> list[int]:
    """The k experts of highest score plus selection bias, best first, inside the best groups of experts."""
    router = layer.router.moe.router
    wanted = expert_scores(layer, logits).tolist()
    if layer.router.selection_bias_E is not None:
        wanted = [score + bias for score, bias in zip(wanted, layer.router.selection_bias_E.tolist(), strict=True)]
    size = len(wanted) // router.expert_groups
    groups = [range(first, first + size) for first in range(0, len(wanted), size)]
    groups.sort(key=lambda group: -sum(sorted((wanted[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: router.top_groups] for e in group]
    return sorted(allowed, key=lambda e: (-wanted[e], e))[: layer.router.moe.top_k]


def chosen_gates(layer: RoutedExperts, logits: Tensor, chosen: list[int]) -> list[Tensor]:
    """The weights of the chosen experts' outputs."""
    moe = layer.router.moe
    scores = expert_scores(layer, logits)
    if moe.router.score == "softmax_of_top_k":
        total = sum(torch.exp(logits[e]) for e in chosen)
        gates = [torch.exp(logits[e]) / total for e in chosen]
    elif moe.renormalize:
        total = sum(scores[e] for e in chosen) + (1e-9 if moe.router.kind == "gshard" else 0.0)
        gates = [scores[e] / total for e in chosen]
    else:
        gates = [scores[e] for e in chosen]
    return [moe.router.gate_scale * gate for gate in gates]


# -- slots -------------------------------------------------------------------------------------------------------------


def slots(layer: RoutedExperts, group_size: int) -> int:
    """Slots of an expert in a group; four are the smallest unit where rounding is 4 and there is more than one."""
    capacity = layer.router.moe.capacity
    assert capacity is not None
    number = int(group_size * capacity.factor / layer.router.moe.num_experts)
    if number <= 1:
        return 1
    while number % capacity.rounding:
        number += 1
    return number


def tokens_per_group(layer: RoutedExperts, num_tokens: int, seq_len: int) -> int:
    """The configured size where it divides the tokens; else (in evaluation) a sequence."""
    size = None if layer.router.moe.capacity is None else layer.router.moe.capacity.group_size
    return seq_len if size is None or num_tokens % size else size


def everything(choices: list[list[int]]) -> set[tuple[int, int]]:
    """No choice is dropped."""
    return {(t, k) for t, chosen in enumerate(choices) for k in range(len(chosen))}


def kept_choices(choices: list[list[int]], group_size: int, num_slots: int) -> set[tuple[int, int]]:
    """Choices (token, k) that find a slot: all first choices of a group come before its second ones, and so on."""
    kept = set()
    for start in range(0, len(choices), group_size):
        taken: dict[int, int] = defaultdict(int)
        for k in range(len(choices[0])):
            for t in range(start, start + group_size):
                if taken[choices[t][k]] < num_slots:
                    taken[choices[t][k]] += 1
                    kept.add((t, k))
    return kept


# -- experts and losses ------------------------------------------------------------------------------------------------


def swiglu(row: Tensor, layer: RoutedExperts, e: int) -> Tensor:
    """One token through one expert."""
    gate = row @ layer.experts.gate[e]
    return (gate * torch.sigmoid(gate) * (row @ layer.experts.up[e])) @ layer.experts.down[e]


def shared_experts(layer: RoutedExperts, row: Tensor) -> Tensor:
    """One token through the experts that all tokens visit; zero without any."""
    if layer.shared is None:
        return torch.zeros_like(row)
    gate = layer.shared.gate.weight @ row
    output = layer.shared.down.weight @ (gate * torch.sigmoid(gate) * (layer.shared.up.weight @ row))
    return output if layer.shared_gate is None else torch.sigmoid(layer.shared_gate.weight[0] @ row) * output


def balance_loss(choices: list[list[int]], probabilities: list[Tensor], per_group: int) -> Tensor:
    """Mean over groups of E·Σ_e f_e·P_e: f an expert's share of the choices, P its mean probability."""
    num_experts, losses = len(probabilities[0]), []
    for start in range(0, len(choices), per_group):
        named = [e for chosen in choices[start : start + per_group] for e in chosen]
        mean = torch.stack(probabilities[start : start + per_group]).mean(0)
        losses.append(num_experts * sum(named.count(e) / len(named) * mean[e] for e in range(num_experts)))
    assert math.isclose(len(losses) * per_group, len(choices))
    return sum(losses) / len(losses)
