"""Every family computes what transformers computes, on tiny random configurations, in float32 and in float64."""

from functools import cache

import pytest
import torch
from families import FAMILIES, tiny, tiny_hf, tiny_tokens
from reference import InFloat64, reference_logits
from tiny_gguf import hf_model, write_gguf

from hooklens.model.kv_cache import KVCache
from hooklens.pretrained.loading import load

BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
every_family = pytest.mark.parametrize("name", FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "float64"])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype and a.shape == b.shape
    return (a - b).abs().max().item()


@cache
def reference(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """transformers' model, built once; the tests read it only."""
    return tiny_hf(name, dtype=dtype)


@every_family
@both_dtypes
def test_logits_are_those_of_transformers(name, dtype):
    model = tiny(name, dtype)
    for pos in (1, 12, 28):  # phi3's tiny model switches to its long factors at 25
        tokens = tiny_tokens(2, pos)
        with torch.no_grad():
            assert apart(model(tokens), reference_logits(reference(name, dtype), tokens)) < BOUNDS[dtype]


@every_family
def test_logits_with_left_padding(name):
    tokens, mask = tiny_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = reference_logits(reference(name), tokens, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        ours = tiny(name, torch.float64)(tokens, attention_mask=mask)
    real = mask.bool()
    assert apart(ours[real], expected[real]) < 1e-9
    assert ours.isfinite().all()


@every_family
def test_logits_step_by_step_through_the_cache(name):
    tokens = tiny_tokens(2, 12)
    expected = reference_logits(reference(name), tokens)
    model, past = tiny(name, torch.float64), KVCache()
    with torch.no_grad():
        steps = [model(tokens[:, :4], kv_cache=past)]
        steps += [model(tokens[:, i : i + 1], kv_cache=past) for i in range(4, 12)]
    assert apart(torch.cat(steps, 1), expected) < 1e-9


def test_long_rotary_generates_what_transformers_does_across_the_original_context():
    theirs, ours = tiny_hf("phi3", dtype=torch.float64), tiny("phi3", torch.float64)
    prompts = tiny_tokens(2, 22)  # the long factors hold from 25 tokens on
    with InFloat64(), torch.no_grad():
        for prompt in prompts:
            expected = theirs.generate(
                prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert ours.generate(prompt, 8, stop=()).tokens[0].tolist() == expected[0].tolist()


@every_family
def test_gradients_are_those_of_transformers(name):
    tokens, theirs, ours = tiny_tokens(2, 8), tiny_hf(name, dtype=torch.float64), tiny(name, torch.float64)
    with InFloat64():
        reference_logits(theirs, tokens)  # its rotary tables are made again in float64
        theirs(tokens).logits.square().mean().backward()
    ours(tokens).square().mean().backward()
    embedded = theirs.get_input_embeddings().weight.grad
    assert apart(ours.embed.weight.grad, embedded) < 1e-9
    unused = [key for key, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == [], "these were never read, which the logits do not show"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptneox", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_gguf_files_compute_what_transformers_does(family, tmp_path):
    theirs = hf_model(family).eval()
    model = load(write_gguf(tmp_path / "tiny.gguf", family, theirs))
    tokens = torch.randint(model.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert apart(model(tokens), theirs(tokens).logits) < 1e-4
