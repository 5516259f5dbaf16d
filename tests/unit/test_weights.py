"""Weights on the disk, one tensor at a time, and the network that computes from there."""

import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig, RouterConfig
from modules.streamed import streamed_logits
from modules.weights import Spec, Weights, open_safetensors, write_safetensors
from tests.unit.test_layers import randomize

TENSORS = {
    "b": torch.randn(3, 4).bfloat16(),
    "a": torch.arange(5),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(2.5, dtype=torch.float64),
    "turned": torch.randn(4, 6).T,
    "half": torch.randn(2).half(),
    "truth": torch.tensor([True, False]),
}


def test_files_are_what_the_library_reads_and_writes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours", Weights.of(TENSORS), {"format": "pt"})
    for found in (load_file(tmp_path / "ours"), dict(open_safetensors(tmp_path / "ours").items())):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert list(open_safetensors(tmp_path / "ours").specs) == list(TENSORS)  # in the order they were given
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs")
    theirs = open_safetensors(tmp_path / "theirs")
    assert all(torch.equal(theirs.read(name), tensor) for name, tensor in TENSORS.items())
    assert theirs.specs["b"] == Spec(torch.bfloat16, (3, 4)) and theirs.specs["b"].num_bytes == 24


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    given: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(tensor() is not None for tensor in given), "those before are gone"
        tensor = torch.ones(8)
        given.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / "file", Weights({str(n): Spec(torch.float32, (8,)) for n in range(9)}, read))
    assert len(load_file(tmp_path / "file")) == len(given) == 9


def test_views_of_weights() -> None:
    weights = Weights.of(TENSORS)
    cast = weights.cast(torch.float32)
    assert cast.specs["b"].dtype == cast.read("b").dtype == torch.float32
    assert cast.specs["a"].dtype == cast.read("a").dtype == torch.int64
    renamed = weights.renamed({"x": "half", "y": "b"})
    assert list(renamed.specs) == ["x", "y"] and torch.equal(renamed.read("y"), TENSORS["b"])


def test_what_float16_cannot_hold_is_refused_by_name() -> None:
    weights = Weights.of({"fits": torch.tensor([6e4]), "large": torch.tensor([1.0, -1e5])}).cast(torch.float16)
    assert weights.read("fits").dtype == torch.float16
    with pytest.raises(InputError, match=r"float16 cannot hold large, whose largest entry is 1e\+05"):
        weights.read("large")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "file", Weights.of(TENSORS))
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["truncated", "no header", "pickle", "missing", "overlapping"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, Weights.of(TENSORS))
    content = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    damaged = {
        "truncated": content[:-3],
        "no header": content[8:],
        "pickle": b"\x80\x02}q\x00.",
        "overlapping": struct.pack("<Q", len(header)) + header + bytes(4),
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        open_safetensors(path)


def test_numbers_that_are_not_known_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "quantized")
    with pytest.raises(InputError, match="tensor w has numbers of type F8_E4M3"):
        open_safetensors(tmp_path / "quantized")


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, every=2, router=RouterConfig(bias_update_rate=0.1))])
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_logits_are_those_of_the_network(moe: MoEConfig | None, tied: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(30, dim=16, num_layers=4, num_heads=2, moe=moe, tie_embeddings=tied, qk_norm=True)
    network = randomize(Transformer(config), torch.float32).eval()
    tokens = torch.randint(30, (2, 7))
    with torch.no_grad():
        want = network.logits(network(tokens, decoding=True)[0])
    weights = Weights.of(network.state_dict())
    torch.testing.assert_close(streamed_logits(weights, config, tokens), want, rtol=0, atol=0)
    rounded = streamed_logits(weights.cast(torch.bfloat16), config, tokens)
    assert rounded.dtype == torch.float32  # computed wide, whatever is stored
    assert 0 < (rounded - want).abs().max() < 0.1 * want.abs().max()
