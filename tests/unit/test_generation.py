"""Decoding with the cache against full recomputation, and sampling."""

from typing import Any

import pytest
import torch

from modules.config import ModelConfig
from modules.errors import InputError
from modules.generation import begin, complete, generate, sample
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig

EOS = 1
CONFIGS = {
    "dense": ModelConfig(
        vocab_size=13, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=32, init_std=0.4
    ),
    "moe": ModelConfig(
        vocab_size=13, dim=16, num_layers=2, num_heads=2, max_seq_len=32, init_std=0.4, moe=MoEConfig(num_experts=4)
    ),
}
PROMPTS = [[EOS, 5, 6, 7, 8, 9], [3], [EOS], [0, 4, 4, 10], [12, 11, 10, 9, 8, 7, 6, 5]]


def make_network(kind: str = "dense", seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIGS[kind]).double().eval()


def recompute(network: Transformer, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding without a cache: the whole text through the network for each token."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            hidden_BLD, _ = network(torch.tensor([tokens]))
        token = int(network.logits(hidden_BLD[0, -1]).argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("seed", range(2))
def test_batched_decoding_equals_recomputation_one_by_one(kind: str, seed: int) -> None:
    network = make_network(kind, seed)
    together = complete(network, PROMPTS, max_new_tokens=20, end_ids=[EOS])
    assert together == [recompute(network, prompt, 20) for prompt in PROMPTS]


def test_some_prompts_end_early_and_others_go_on() -> None:
    """The comparison above covers rows that leave the cache."""
    networks = [make_network("moe", seed) for seed in range(2)]
    lengths = {len(new) for net in networks for new in complete(net, PROMPTS, max_new_tokens=20, end_ids=[EOS])}
    assert 20 in lengths and min(lengths) < 20


def test_steps_mark_ended_rows_and_never_hold_end_of_text() -> None:
    network = make_network("moe")
    steps = list(generate(network, PROMPTS, max_new_tokens=20, end_ids=[EOS]))
    assert all(len(step) == len(PROMPTS) and EOS not in step for step in steps)
    for row in zip(*steps, strict=True):
        ended = row.index(None) if None in row else len(row)
        assert all(token is None for token in row[ended:])
    assert any(token is not None for token in steps[-1])


def test_stop_ends_one_row_behind_its_token() -> None:
    network = make_network()
    free = complete(network, PROMPTS, max_new_tokens=12, end_ids=[EOS])
    row = max(range(len(free)), key=lambda index: len(free[index]))
    stopped = complete(
        network, PROMPTS, max_new_tokens=12, end_ids=[EOS], stop=lambda index, new: index == row and len(new) == 3
    )
    assert stopped == [found[:3] if index == row else found for index, found in enumerate(free)]


def test_prompts_are_taken_as_they_are() -> None:
    """The end-of-text token in front makes a difference, and only those who ask for it get it."""
    network = make_network()
    bare, begun = complete(network, [[4, 5], [EOS, 4, 5]], max_new_tokens=9, end_ids=[EOS])
    assert bare == recompute(network, [4, 5], 9) != begun == recompute(network, [EOS, 4, 5], 9)


def test_begin_tokens_are_put_in_front_once() -> None:
    assert begin([], [EOS]) == [EOS] and begin([EOS, 4], [EOS]) == [EOS, 4] and begin([4, EOS], [EOS]) == [EOS, 4, EOS]
    assert begin([4], [2, 3]) == [2, 3, 4] and begin([2, 3, 4], [2, 3]) == [2, 3, 4] and begin([2], [2, 3]) == [2, 3, 2]
    assert begin([4, 5], []) == [4, 5] and begin([], []) == []


def test_any_of_the_end_tokens_ends_and_none_need_be_given() -> None:
    network = make_network("moe")
    endless = complete(network, PROMPTS, max_new_tokens=20, end_ids=[])
    assert all(len(new) == 20 for new in endless)
    ends = {EOS, endless[0][4]}
    cut = [next((at for at, token in enumerate(new) if token in ends), 20) for new in endless]
    assert complete(network, PROMPTS, max_new_tokens=20, end_ids=ends) == [
        new[:at] for new, at in zip(endless, cut, strict=True)
    ]
    assert min(cut) < 20 and EOS in [token for new in endless for token in new]


def test_sampled_continuations_are_the_same_alone_and_in_any_batch() -> None:
    network = make_network("moe")

    def draw(rows: list[int]) -> list[list[int]]:
        own = [torch.Generator().manual_seed(7 + row) for row in rows]
        prompts = [PROMPTS[row] for row in rows]
        return complete(network, prompts, max_new_tokens=18, end_ids=[EOS], temperature=1.3, top_p=0.95, generator=own)

    together = draw([0, 1, 2, 3, 4])
    assert [draw([row])[0] for row in range(5)] == together
    assert draw([4, 2, 0]) == [together[4], together[2], together[0]]
    assert len({tuple(new) for new in together}) == 5 and len({len(new) for new in together}) > 1


def test_gradients_are_off_in_a_step_and_on_between_steps() -> None:
    network = make_network()
    network.register_forward_hook(lambda _, inputs, outputs: recorded.append(outputs[0].requires_grad))
    recorded: list[bool] = []
    for _ in generate(network, [[3]], max_new_tokens=2, end_ids=[EOS]):
        assert torch.is_grad_enabled()
        assert network.logits(torch.ones(16, dtype=torch.float64)).requires_grad
    assert recorded == [False, False]


def test_window_is_filled_to_its_last_token_and_not_beyond() -> None:
    network = make_network()
    complete(network, [[3] * 12], max_new_tokens=20, end_ids=[EOS])  # 12 + 20 = 32
    with pytest.raises(InputError, match=r"12 tokens .* max_new_tokens=21 .* max_seq_len=32; set max_new_tokens <= 20"):
        generate(network, [[3], [3] * 12], max_new_tokens=21, end_ids=[EOS])
    with pytest.raises(InputError, match=r"40 tokens .* max_seq_len=32; shorten the prompt below 32 tokens"):
        generate(network, [[3] * 40], max_new_tokens=1, end_ids=[EOS])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([3], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([3, 13], {}, r"token id 13 .* vocabulary of 13"),
        ([-1, 3], {}, r"token id -1 .* vocabulary of 13"),
        ([3], {"top_p": 0.0}, "top_p=0"),
        ([], {}, "prompt of 0 tokens has nothing to go on from.*; write some text"),
        ([3], {"generator": []}, "0 generators for 2 prompts"),
    ],
)
def test_wrong_requests_are_refused_before_the_first_step(
    prompt: list[int], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        generate(make_network(), [[4], prompt], **{"max_new_tokens": 1, "end_ids": [EOS], **options})


def test_no_prompts_are_continued_by_nothing() -> None:
    assert list(generate(make_network(), [], max_new_tokens=1, end_ids=[EOS])) == []


def test_seeded_sampling_repeats_and_leaves_global_randomness_alone() -> None:
    network = make_network()
    before = torch.get_rng_state()

    def draw(seed: int) -> list[list[int]]:
        randomness = torch.Generator().manual_seed(seed)
        return complete(network, PROMPTS, max_new_tokens=15, end_ids=[EOS], temperature=1.0, generator=randomness)

    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_takes_the_largest() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]])
    assert sample(logits_BV).tolist() == [1, 0]
    assert sample(logits_BV[:1], temperature=1e-300).tolist() == [1]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    ids_B = sample(logits.expand(40_000, -1), temperature=0.7, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(ids_B, minlength=4) / len(ids_B)
    assert torch.allclose(share, (logits / 0.7).softmax(0), atol=0.01)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.85}, {0, 2}),  # 0.5, 0.3, 0.1 of 0.9: two reach 0.888
    ],
)
def test_top_k_and_top_p_draw_from_the_likeliest(options: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    ids_B = sample(logits.expand(4000, -1), temperature=1.0, generator=torch.Generator().manual_seed(0), **options)
    assert set(ids_B.tolist()) == allowed


def test_rows_draw_from_generators_of_their_own() -> None:
    """Which other rows there are does not matter, and generators go on from draw to draw."""
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))

    def draws(rows: list[int]) -> list[list[int]]:
        own = [torch.Generator().manual_seed(row) for row in rows]
        return [sample(logits_BV[rows], temperature=1.0, generator=own).tolist() for _ in range(20)]

    together = draws([0, 1, 2])
    assert [[step[2], step[0]] for step in together] == draws([2, 0])
    assert len({tuple(step) for step in together}) > 10


def test_logits_that_are_no_numbers_are_not_drawn_from() -> None:
    with pytest.raises(InputError, match=r"logits in torch.float16 are not finite; run it in float32"):
        sample(torch.tensor([[0.0, float("nan")]], dtype=torch.float16), temperature=1.0)


def test_top_p_needs_no_more_than_its_share() -> None:
    """Two equal tokens: one reaches 0.5 exactly."""
    ids_B = sample(torch.zeros(200, 2), temperature=1.0, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert set(ids_B.tolist()) == {0}


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_sampling_settings_are_named(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"{name}="):
        sample(torch.zeros(1, 4), **options)
