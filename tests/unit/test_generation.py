"""Decoding with the cache against full recomputation, sampling, and streamed text."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.checkpoint import write_checkpoint
from app.commands.generate import choose_device, stream_text
from app.commands.generate import generate as generate_command
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.generation import begin, complete, generate, sample
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig
from modules.weights import Weights

EOS = 1
CONFIGS = {
    "dense": ModelConfig(
        vocab_size=13, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=32, init_std=0.4
    ),
    "moe": ModelConfig(
        vocab_size=13, dim=16, num_layers=2, num_heads=2, max_seq_len=32, init_std=0.4, moe=MoEConfig(num_experts=4)
    ),
}
PROMPTS = [[5, 6, 7, 8, 9], [3], [], [4, 4, 10], [12, 11, 10, 9, 8, 7, 6, 5]]


def make_network(kind: str = "dense", seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIGS[kind]).double().eval()


def recompute(network: Transformer, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding without a cache: the whole text through the network for each token."""
    tokens = begin(prompt, EOS)
    start = len(tokens)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            hidden_BLD, _ = network(torch.tensor([tokens]))
        token = int(network.logits(hidden_BLD[0, -1]).argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[start:]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("seed", range(2))
def test_batched_decoding_equals_recomputation_one_by_one(kind: str, seed: int) -> None:
    network = make_network(kind, seed)
    together = complete(network, PROMPTS, max_new_tokens=20, eos_id=EOS)
    assert together == [recompute(network, prompt, 20) for prompt in PROMPTS]


def test_some_prompts_end_early_and_others_go_on() -> None:
    """The comparison above covers rows that leave the cache."""
    networks = [make_network("moe", seed) for seed in range(2)]
    lengths = {len(new) for net in networks for new in complete(net, PROMPTS, max_new_tokens=20, eos_id=EOS)}
    assert 20 in lengths and min(lengths) < 20


def test_steps_mark_ended_rows_and_never_hold_end_of_text() -> None:
    network = make_network("moe")
    steps = list(generate(network, PROMPTS, max_new_tokens=20, eos_id=EOS))
    assert all(len(step) == len(PROMPTS) and EOS not in step for step in steps)
    for row in zip(*steps, strict=True):
        ended = row.index(None) if None in row else len(row)
        assert all(token is None for token in row[ended:])
    assert any(token is not None for token in steps[-1])


def test_stop_ends_one_row_behind_its_token() -> None:
    network = make_network()
    free = complete(network, PROMPTS, max_new_tokens=12, eos_id=EOS)
    row = max(range(len(free)), key=lambda index: len(free[index]))
    stopped = complete(
        network, PROMPTS, max_new_tokens=12, eos_id=EOS, stop=lambda index, new: index == row and len(new) == 3
    )
    assert stopped == [found[:3] if index == row else found for index, found in enumerate(free)]


def test_begin_token_is_put_in_front_once() -> None:
    network = make_network()
    assert begin([], EOS) == [EOS] and begin([EOS, 4], EOS) == [EOS, 4]
    once, twice = complete(network, [[4, 5], [EOS, 4, 5]], max_new_tokens=5, eos_id=EOS)
    assert once == twice


def test_gradients_are_off_in_a_step_and_on_between_steps() -> None:
    network = make_network()
    network.register_forward_hook(lambda _, inputs, outputs: recorded.append(outputs[0].requires_grad))
    recorded: list[bool] = []
    for _ in generate(network, [[3]], max_new_tokens=2, eos_id=EOS):
        assert torch.is_grad_enabled()
        assert network.logits(torch.ones(16, dtype=torch.float64)).requires_grad
    assert recorded == [False, False]


def test_window_is_filled_to_its_last_token_and_not_beyond() -> None:
    network = make_network()
    complete(network, [[3] * 11], max_new_tokens=20, eos_id=EOS)  # 1 + 11 + 20 = 32
    with pytest.raises(InputError, match=r"12 tokens .* max_new_tokens=21 .* max_seq_len=32; set max_new_tokens <= 20"):
        generate(network, [[3], [3] * 11], max_new_tokens=21, eos_id=EOS)
    with pytest.raises(InputError, match=r"41 tokens .* max_seq_len=32; shorten the prompt below 32 tokens"):
        generate(network, [[3] * 40], max_new_tokens=1, eos_id=EOS)


def test_wrong_requests_are_refused_before_the_first_step() -> None:
    network = make_network()
    with pytest.raises(InputError, match="max_new_tokens=0"):
        generate(network, [[3]], max_new_tokens=0, eos_id=EOS)
    with pytest.raises(InputError, match=r"token id 13 .* vocabulary of 13"):
        generate(network, [[3, 13]], max_new_tokens=1, eos_id=EOS)
    with pytest.raises(InputError, match="top_p=0"):
        generate(network, [[3]], max_new_tokens=1, eos_id=EOS, top_p=0.0)
    assert list(generate(network, [], max_new_tokens=1, eos_id=EOS)) == []


def test_seeded_sampling_repeats_and_leaves_global_randomness_alone() -> None:
    network = make_network()
    before = torch.get_rng_state()

    def draw(seed: int) -> list[list[int]]:
        randomness = torch.Generator().manual_seed(seed)
        return complete(network, PROMPTS, max_new_tokens=15, eos_id=EOS, temperature=1.0, generator=randomness)

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


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Knows English words only, so that every Chinese character is three tokens."""
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 280)


def test_streamed_chinese_comes_in_whole_characters(byte_tokenizer: Tokenizer) -> None:
    text = "你好，the fox 世界🌏。"
    ids = byte_tokenizer.encode(text)
    assert len(ids) > len(text)
    assert "\ufffd" in byte_tokenizer.decode(ids[:1])
    pieces = list(stream_text(ids, byte_tokenizer.decode))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:3] == ["你", "好", "，"]
    for end in range(len(ids)):
        shown = "".join(stream_text(ids[:end], byte_tokenizer.decode))
        assert text.startswith(shown) and "\ufffd" not in shown


def test_stream_shows_a_character_with_its_last_byte(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("你好")
    asked: list[int] = []

    def tokens() -> Iterator[int]:
        for token in ids:
            asked.append(token)
            yield token

    stream = stream_text(tokens(), byte_tokenizer.decode)
    assert next(stream) == "你" and len(asked) == 3


def test_stray_bytes_are_left_out_and_hold_nothing_up(byte_tokenizer: Tokenizer) -> None:
    stray = byte_tokenizer.encode("你")[1]
    fox = byte_tokenizer.encode(" fox")
    assert "".join(stream_text([*fox, stray, *fox, stray], byte_tokenizer.decode)) == " fox fox"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=byte_tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, max_seq_len=64)
    network = Transformer(config)
    path = tmp_path_factory.mktemp("run") / "step-00000001"
    weights, metadata = Weights.of(network.state_dict()), {"architecture": config.to_dict()}
    write_checkpoint(path, weights=weights, metadata=metadata, tokenizer_json=byte_tokenizer.to_json())
    return path


def test_command_streams_what_the_checkpoint_writes(
    checkpoint: Path, byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_command(checkpoint, "the fox 你", max_new_tokens=20, temperature=0.0, device="cpu")
    shown = capsys.readouterr().out
    from app.checkpoint import load_model

    network = load_model(checkpoint).network
    (ids,) = complete(network, [byte_tokenizer.encode("the fox 你")], max_new_tokens=20, eos_id=byte_tokenizer.eos_id)
    assert shown == byte_tokenizer.decode(ids).replace("\ufffd", "") + "\n"


def test_command_repeats_with_its_seed_and_fills_the_window(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(seed: int) -> str:
        generate_command(checkpoint, "the fox", temperature=1.0, seed=seed, device="cpu")
        return capsys.readouterr().out

    assert run(1) == run(1) != run(2)
    with pytest.raises(InputError, match="max_seq_len=64"):
        generate_command(checkpoint, "fox " * 80, device="cpu")


def test_unusable_device_is_an_input_error() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device='abacus'"):
        choose_device("abacus")
