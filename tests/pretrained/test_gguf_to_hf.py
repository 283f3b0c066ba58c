"""Names, layouts and configurations of every architecture, against transformers."""

import pytest
import torch
from tiny_gguf import CONFIGS, hf_model, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from hooklens.core.errors import FileRefused
from hooklens.pretrained.gguf import read_gguf
from hooklens.pretrained.gguf_to_hf import ARCHITECTURES, hf_config, hf_tensors

TOKENS = torch.arange(12)[None] * 5 % 48


def rebuilt(file):
    """A transformers model made of nothing but our configuration and our tensors."""
    config = hf_config(file)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), attn_implementation="eager", **config)
    )
    missing, unexpected = model.load_state_dict(dict(hf_tensors(file)), strict=False)
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert not unexpected and set(missing) <= tied
    model.tie_weights()
    return model.eval()


def test_every_architecture_is_tested():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", CONFIGS)
def test_tensors_come_back_under_their_names(tmp_path, arch):
    model = hf_model(arch)
    weights = model.state_dict()
    seen = dict(hf_tensors(read_gguf(write_gguf(tmp_path / "m.gguf", arch, model))))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(seen) == set(weights) - tied
    for name, weight in seen.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-7 if arch.startswith("gemma") else 0)


@pytest.mark.parametrize("arch", CONFIGS)
def test_configuration_and_tensors_compute_the_same_logits(tmp_path, arch):
    model = hf_model(arch)
    again = rebuilt(read_gguf(write_gguf(tmp_path / "m.gguf", arch, model)))
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", [arch for arch in CONFIGS if arch != "gptneox"])
def test_as_transformers_reads_the_same_file(tmp_path, arch):
    """transformers' own conversion of the file, for the architectures that it knows: same names, equal values."""
    model = hf_model(arch)
    path = write_gguf(tmp_path / "m.gguf", arch, model, "Q8_0")
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    ours = dict(hf_tensors(read_gguf(path)))
    assert set(ours) == set(theirs["tensors"])
    for name, weight in ours.items():
        assert torch.equal(weight, theirs["tensors"][name]), name


@pytest.mark.parametrize("arch", [arch for arch in CONFIGS if arch not in ("gptneox", "gpt2")])
def test_what_transformers_says_of_the_configuration(tmp_path, arch):
    """Where transformers reads a setting from the file, it is ours (gpt2's names differ and are tested by logits)."""
    path = write_gguf(tmp_path / "m.gguf", arch, hf_model(arch))
    theirs = load_gguf_checkpoint(str(path))["config"]
    ours = hf_config(read_gguf(path))
    for key in set(theirs) & set(ours):
        assert ours[key] == pytest.approx(theirs[key]) if isinstance(ours[key], float) else ours[key] == theirs[key], (
            key
        )
    assert {"hidden_size", "num_key_value_heads", "rope_theta", "rms_norm_eps"} <= set(theirs) & set(ours)


def test_biases_of_queries_are_permuted_like_their_weights(tmp_path):
    model = hf_model("llama", attention_bias=True, mlp_bias=True)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", model))
    assert hf_config(file)["attention_bias"] and hf_config(file)["mlp_bias"]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(file)(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)


def test_llama3_scaling_is_recovered_from_the_factors(tmp_path):
    """The factors are those by which transformers divides the frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}
    model = hf_model("llama", head_dim=64, rope_parameters=rope)
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0].double()
    path = write_gguf(tmp_path / "m.gguf", "llama", model, extra={"rope_freqs.weight": factors})
    config = hf_config(read_gguf(path))
    assert config["rope_scaling"] == {"rope_type": "llama3", **scaling}


def test_factors_that_are_not_llama3s_are_refused(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", "llama", hf_model("llama"), extra={"rope_freqs.weight": torch.tensor([1.0, 5.0, 2.0, 3.0])}
    )
    with pytest.raises(FileRefused, match="only Llama 3's scaling is supported"):
        hf_config(read_gguf(path))


def test_linear_scaling_and_head_dimension(tmp_path):
    from hooklens.pretrained.gguf import GGUFFile

    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", hf_model("llama")))
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.attention.key_length": 16}
    config = hf_config(GGUFFile(file.path, file.metadata | more, file.tensors))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0} and config["head_dim"] == 16


def test_an_embedding_written_twice_is_tied(tmp_path):
    """Older conversions of GPT-2 repeat the embedding as the output matrix; loading it twice would untie the model."""
    model = hf_model("gpt2")
    extra = {"output.weight": model.transformer.wte.weight}
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "gpt2", model, extra=extra))
    assert hf_config(file)["tie_word_embeddings"] and "lm_head.weight" not in dict(hf_tensors(file))
    untied = read_gguf(write_gguf(tmp_path / "u.gguf", "gpt2", model, extra={"output.weight": torch.zeros(48, 32)}))
    assert not hf_config(untied)["tie_word_embeddings"] and "lm_head.weight" in dict(hf_tensors(untied))


def test_gemma3_layers_and_scaling(tmp_path):
    config = hf_config(read_gguf(write_gguf(tmp_path / "m.gguf", "gemma3", hf_model("gemma3"))))
    assert config["sliding_window_pattern"] == 6
    assert config["query_pre_attn_scalar"] == 16 and config["rope_local_base_freq"] == 10000.0


def with_metadata(file, **changes):
    from hooklens.pretrained.gguf import GGUFFile

    metadata = file.metadata | {key.replace("__", "."): value for key, value in changes.items()}
    return GGUFFile(file.path, {k: v for k, v in metadata.items() if v is not None}, file.tensors)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "gpt2", "gptneox"])
def test_a_block_count_of_a_billion_is_refused_before_anything_of_that_length_is_made(tmp_path, arch):
    file = read_gguf(write_gguf(tmp_path / "m.gguf", arch, hf_model(arch)))
    for count in (10**9, 0, -1, "2", [2]):
        with pytest.raises(FileRefused, match=r"block_count is .*, and the file has \d+ tensors"):
            hf_config(with_metadata(file, **{f"{arch}__block_count": count}))


def test_what_is_refused_before_any_tensor(tmp_path):
    model = hf_model("llama")
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", model))
    with pytest.raises(FileRefused, match=r"architecture 'mamba'; supported architectures: llama, qwen2"):
        hf_config(with_metadata(file, general__architecture="mamba"))
    with pytest.raises(
        FileRefused, match=r"no metadata key 'llama.block_count'.*similar keys in it: llama.context_length"
    ):
        hf_tensors(with_metadata(file, llama__block_count=None))
    with pytest.raises(FileRefused, match="mixture of 8 experts"):
        hf_config(with_metadata(file, llama__expert_count=8))
    with pytest.raises(FileRefused, match=r"head_count_kv differs between layers \(\[2, 1\]\)"):
        hf_config(with_metadata(file, llama__attention__head_count_kv=[2, 1]))
    assert hf_config(with_metadata(file, llama__attention__head_count_kv=[2, 2]))["num_key_value_heads"] == 2
    strange = write_gguf(tmp_path / "s.gguf", "llama", model, extra={"blk.0.ssm_a.weight": torch.ones(4)})
    with pytest.raises(FileRefused, match=r"tensors that a 'llama' model does not have: blk\.0\.ssm_a\.weight"):
        hf_tensors(read_gguf(strange))
    part = write_gguf(tmp_path / "p.gguf", "llama", model, skip=("token_embd.weight",))
    with pytest.raises(FileRefused, match=r"has no tensor 'token_embd.weight'"):
        hf_config(read_gguf(part))
