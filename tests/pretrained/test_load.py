"""load(): every kind of source, both generations of config.json, and an error of its own for each thing amiss."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny, tiny_hf, tiny_tokens
from safetensors.torch import load_file, save_file

from hooklens.core.errors import FileRefused, InputError, NameNotFound, Unavailable, WrongType
from hooklens.model.config import DividedScaling, Llama3Scaling
from hooklens.pretrained.families import families, find_family
from hooklens.pretrained.hf_config import HFConfig
from hooklens.pretrained.loading import load, models
from hooklens.pretrained.tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_hf("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(edit(dict(weights)), folder / "model.safetensors")


def same(model, name: str) -> bool:
    return torch.equal(model(tiny_tokens()), tiny(name)(tiny_tokens()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_loads_as_the_model_in_memory_does(name, tmp_path):
    tiny_hf(name).save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert same(model, name)
    assert model.cfg.replace(model_name="") == tiny(name).cfg.replace(model_name="")


def test_every_stop_token_of_the_model_ends_a_reply_wherever_its_tokenizer_comes_from(tmp_path):
    """A list in generation_config was ignored for `load(model, tokenizer=...)`."""
    theirs, tokenizer = tiny_hf("llama"), tiny_tokenizer("", extra=("<s>",))
    theirs.generation_config.eos_token_id = [2, 7]
    assert load(theirs, tokenizer=tokenizer).tokenizer.stop_ids == (2, 7)
    theirs.save_pretrained(tmp_path)
    assert load(tmp_path, tokenizer=tokenizer).tokenizer.stop_ids == (2, 7)
    tokenizer.save(tmp_path)
    read = load(tmp_path).tokenizer
    assert set(read.stop_ids) == {2, 7} and load(tmp_path, tokenizer=read).tokenizer is read
    theirs.generation_config.eos_token_id = 5
    model = load(theirs, tokenizer=replace(tokenizer, stop_ids=(3,)))
    assert model.tokenizer.stop_ids == (3, 5) and tokenizer.stop_ids == ()
    theirs.generation_config = None
    assert load(theirs, tokenizer=tokenizer).tokenizer.stop_ids == (2,)


def test_a_sharded_folder_loads(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(load(tmp_path), "llama")


def test_a_model_in_memory_is_copied():
    theirs = tiny_hf("llama")
    model = load(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    assert same(model, "llama")


def test_the_device_and_dtype_of_a_model_in_memory_are_followed():
    assert load(tiny_hf("llama", dtype=torch.float64)).dtype == torch.float64
    assert load(tiny_hf("llama", dtype=torch.float64), dtype="bfloat16").dtype == torch.bfloat16


def test_files_become_float32_unless_asked_otherwise(tmp_path):
    tiny_hf("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert {p.dtype for p in load(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


def test_no_two_parameters_share_memory_but_tied_ones():
    model = tiny("phi3")  # its q, k and v come out of one tensor
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    tied = tiny("mistral")
    assert tied.embed.weight is tied.unembed.linear.weight


def test_loading_leaves_the_global_generator_alone():
    theirs = tiny_hf("gpt2")
    before = torch.random.get_rng_state()
    load(theirs)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_tokenizer_of_a_folder_comes_along(folder):
    tokenizer = tiny_tokenizer("he llo", extra=("<s>",))
    tokenizer.save(folder)
    model = load(folder)
    assert model.to_tokens("hello").tolist() == tokenizer.to_tokens("hello").tolist()
    assert not model.tokenizer.default_prepend_bos
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder).tokenizer.default_prepend_bos


def test_a_tokenizer_of_transformers_is_taken():
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("he").backend)
    assert load(tiny_hf("gpt2"), tokenizer=theirs).tokenizer.to_str_tokens("he!") == ["he", "!"]


def test_folds_are_applied():
    assert load(tiny_hf("gpt2"), fold=["fold_ln", "center_unembed"]).cfg.folded == ("fold_ln", "center_unembed")
    with pytest.raises(NameNotFound, match="closest: fold_ln"):
        load(tiny_hf("gpt2"), fold=["fold_layer_norm"])


# What configurations and files looked like before transformers 5


def test_rotary_settings_of_transformers_4(folder):
    old = {"type": "linear", "factor": 2.0}
    edit_config(folder, rope_parameters="absent", rope_theta=500.0, rope_scaling=old)
    rotary = load(folder).cfg.positional_embedding_type
    assert (rotary.base, rotary.scaling.factor) == (500.0, 2.0)


def test_gpt2_files_without_prefix_and_with_mask_buffers(tmp_path):
    tiny_hf("gpt2").save_pretrained(tmp_path)

    def old(weights):
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        return weights | {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(3)}

    edit_weights(tmp_path, old)
    assert same(load(tmp_path), "gpt2")


def test_pythia_files_with_an_embed_out_and_buffers(tmp_path):
    tiny_hf("gpt_neox").save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters="absent", rotary_pct=0.25, rotary_emb_base=10000)

    def old(weights):
        weights["embed_out.weight"] = weights.pop(
            "lm_head.weight" if "lm_head.weight" in weights else "embed_out.weight"
        )
        return weights | {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}

    edit_weights(tmp_path, old)
    assert same(load(tmp_path), "gpt_neox")


def test_gemma3_settings_of_transformers_4(tmp_path):
    tiny_hf("gemma3").save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        rope_parameters="absent",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    )
    assert same(load(tmp_path), "gemma3")


def test_the_text_part_of_a_gemma3_with_images(tmp_path):
    tiny_hf("gemma3").save_pretrained(tmp_path)
    inner = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def wrapped(weights):
        weights = {name.replace("model.", "language_model.model.", 1): weight for name, weight in weights.items()}
        return weights | {"vision_tower.x.weight": torch.ones(2), "multi_modal_projector.y.weight": torch.ones(2)}

    edit_weights(tmp_path, wrapped)
    assert same(load(tmp_path), "gemma3")


def test_phi3_calls_long_rotary_su(tmp_path):
    tiny_hf("phi3").save_pretrained(tmp_path)
    settings = dict(FAMILIES["phi3"][1]["rope_parameters"])
    del settings["rope_type"]
    edit_config(tmp_path, rope_parameters="absent", rope_scaling=settings | {"type": "su"})
    assert isinstance(load(tmp_path).cfg.positional_embedding_type.scaling, DividedScaling)
    assert same(load(tmp_path), "phi3")


def test_llama3_scaling_is_read():
    assert tiny("llama3").cfg.positional_embedding_type.scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)


def test_a_tied_model_whose_file_holds_another_unembedding_is_untied(tmp_path):
    tiny_hf("mistral").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert load(tmp_path).cfg.tie_word_embeddings
    edit_weights(tmp_path, lambda w: w | {"lm_head.weight": 2 * w["model.embed_tokens.weight"]})
    assert not load(tmp_path).cfg.tie_word_embeddings


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bloom"}, "'bloom'.*no supported family.*llama"),
        ({"model_type": "absent", "architectures": "absent"}, "no model_type.*llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2'.*silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'.*llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' needs 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kind of layer"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "needs 4 factors",
        ),
        ({"attention_bias": "qkv"}, "attention_bias is 'qkv'.*true and false"),
        ({"hidden_size": "absent"}, "no 'hidden_size', which is needed"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'; a whole number"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised \\(gptq\\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_configuration_that_cannot_be_loaded_is_refused_before_weights_are_read(folder, changes, said, monkeypatch):
    monkeypatch.setattr("hooklens.pretrained.hf.SafetensorsFile.tensor", None)  # reading would raise another error
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "kind chunked_attention.*sliding_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "lists 1 layers, but the model has 3"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "would rotate 0 of 8"),
    ],
)
def test_variants_of_a_family_that_its_parts_do_not_express_are_refused(tmp_path, name, changes, said):
    tiny_hf(name).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        load(tmp_path)


def without(name):
    return lambda weights: {k: v for k, v in weights.items() if k != name}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without("model.layers.1.self_attn.k_proj.weight"), "lacks 1 of the weights.*layers.1.self_attn.k_proj.weight"),
        (lambda w: w | {"model.layers.0.extra.weight": torch.ones(2)}, "contains 1 weights that .*0.extra"),
        (lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "does not have.*q_proj.bias"),
        (lambda w: w | {"model.norm.weight": torch.ones(31)}, "model.norm.weight is \\[31\\] instead of \\[32\\]"),
        (lambda w: w | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "has the type I8.*BF16"),
    ],
    ids=["missing", "extra", "extra bias", "misshapen", "integers"],
)
def test_weights_that_do_not_fit_are_refused(folder, edit, said):
    edit_weights(folder, edit)
    with pytest.raises(FileRefused, match=said):
        load(folder)


def test_a_fused_weight_of_the_wrong_shape_is_named(tmp_path):
    tiny_hf("phi3").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda w: w | {"model.layers.2.self_attn.qkv_proj.weight": torch.ones(63, 32)})
    with pytest.raises(FileRefused, match=r"2.self_attn.qkv_proj.weight is \[63, 32\] instead of \[64, 32\]"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 200, 3000, -1])
def test_a_safetensors_file_that_was_cut_short_is_refused(folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(FileRefused, match=r"model.safetensors.* it is (cut short|not a safetensors)"):
        load(folder)


def test_a_safetensors_header_that_lies_is_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    with pytest.raises(FileRefused, match="bytes follow that belong to no tensor"):
        load(folder)
    path.write_bytes(content.replace(b'"F32"', b'"F64"', 1))
    with pytest.raises(FileRefused, match=r"it is damaged .*invalid shape, data type, or offset"):
        load(folder)


def test_shards_that_are_absent_or_elsewhere_are_named(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first, second = sorted(set(values["weight_map"].values()))[:2]
    moved = {k: second if v == first else v for k, v in values["weight_map"].items()}
    index.write_text(json.dumps(values | {"weight_map": moved}))
    with pytest.raises(FileRefused, match="disagree on where"):
        load(tmp_path)
    index.write_text(json.dumps(values | {"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(FileRefused, match="no weight_map"):
        load(tmp_path)
    index.write_text(json.dumps(values))
    (tmp_path / first).unlink()
    with pytest.raises(FileRefused, match=f"lacks 1 of its .*{first}"):
        load(tmp_path)


def test_pickles_are_never_opened(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileRefused, match=r"pytorch_model.bin.*runs the code in it"):
        load(folder)
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(FileRefused, match="looks like a pickle"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(FileRefused, match=r"config.json': it (is not JSON|.*should hold)"):
        load(folder)


def test_what_is_no_model_is_described(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileRefused, match=r"begins with b'hell'; a GGUF file begins"):
        load(tmp_path / "notes.txt")
    (folder / "config.json").unlink()
    with pytest.raises(FileRefused, match=r"has no config.json \(it contains"):
        load(folder)
    with pytest.raises(FileRefused, match="another file: its schema is None"):
        load(folder / "model.safetensors")
    with pytest.raises(FileRefused, match="no such file or folder"):
        load(tmp_path / "absent.gguf")
    with pytest.raises(WrongType, match=r"got a Linear; hooklens.wrap"):
        load(torch.nn.Linear(2, 2))
    with pytest.raises(WrongType, match="already loaded; use"):
        load(tiny("llama"))
    with pytest.raises(
        InputError, match="38 plays of Shakespeare as text, not a model; assets that are models: smollm2"
    ):
        load("shakespeare")
    with pytest.raises(NameNotFound, match="closest: smollm2-135m-instruct"):
        load("smollm2-135m")
    with pytest.raises(InputError, match="dtype is one of float32, float64, bfloat16, float16; got 'float31'"):
        load(folder, dtype="float31")


# The hub, without one


def test_a_hub_id_without_huggingface_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unavailable, match=r"pip install 'hooklens\[hub\]'"):
        load("organisation/model")


def test_a_hub_id_offline_says_so(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="'organisation/model' could not be fetched from the hub"):
        load("organisation/model")


def test_a_hub_model_is_fetched_without_anything_that_could_hold_code(monkeypatch, folder):
    import fnmatch

    import huggingface_hub

    asked = {}

    def fetch(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = load("organisation/model")
    assert model.cfg.model_name == "organisation/model"
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/params.pth"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in asked["organisation/model"])


# The registry


def test_every_family_is_found_by_its_model_type_and_by_its_architecture():
    for family in families().values():
        for kind in family.model_types:
            assert find_family({"model_type": kind}, "here") is family
        assert find_family({"architectures": [family.architectures[0]]}, "here") is family


def test_adding_a_family_is_adding_a_file(monkeypatch, tmp_path):
    import hooklens.pretrained.families as package

    source = Path(package.__file__).with_name("llama.py").read_text()
    (tmp_path / "other.py").write_text(source.replace('"llama"', '"other"').replace("Llama", "Other"))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    package.families.cache_clear()
    try:
        assert find_family({"model_type": "other"}, "here").name == "other"
    finally:
        package.families.cache_clear()
        sys.modules.pop("hooklens.pretrained.families.other", None)


def test_models_lists_assets_and_every_kind_of_source():
    table = models()
    assert table.rows[0][0] == "smollm2-135m-instruct"
    assert "qwen3" in str(table) and "GGUF" in str(table)


def test_a_config_value_is_checked_as_a_number():
    with pytest.raises(InputError, match="rms_norm_eps is 'small'; a finite number above 0 is needed"):
        HFConfig({"rms_norm_eps": "small"}, "here").number("rms_norm_eps", 1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a finite number above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; a finite number above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta is nan; a finite"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}}, "rope_theta is -10000.0; a finite"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, "rope_theta is '10000'; a finite"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0; a finite"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": -1.0}}, "partial_rotary_factor is -1.0"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_a_number_that_would_end_in_nan_logits_is_refused_by_its_name(folder, changes, said):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=said):
        load(folder)


def test_a_config_of_a_billion_layers_is_refused_before_any_is_made(folder):
    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(InputError, match=r"num_hidden_layers is 1,000,000,000, but there are only \d+ tensors"):
        load(folder)


def test_a_header_with_huge_numbers_in_its_shapes_is_refused_at_once(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for shape in ([2**63, 0], [10**4000] * 500, [1] * 100_000):
        header["model.norm.weight"]["shape"] = shape
        bad = json.dumps(header).encode()
        path.write_bytes(len(bad).to_bytes(8, "little") + bad + content[8 + length :])
        with pytest.raises(FileRefused, match=r"model.safetensors.* it is damaged"):
            load(folder)


@pytest.mark.parametrize("source", ["x" * 5000, "~no_such_user_at_all/model", "a\0b.gguf"])
def test_a_name_that_no_file_can_have_is_no_raw_error(source):
    with pytest.raises((FileRefused, InputError)):
        load(source)


def test_a_deeply_nested_config_and_an_unreadable_template_are_refused(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(FileRefused, match="nested too deeply"):
        load(folder)


def test_a_folder_of_gguf_files_says_which_path_to_give(tmp_path):
    shutil.copy(__file__, tmp_path / "model.gguf")
    with pytest.raises(FileRefused, match=r"model.gguf"):
        load(tmp_path)


@pytest.mark.parametrize("ends", ["a", 1.5, True, [1, "b"], {"a": 1}, 2**40])
def test_stop_tokens_of_a_wrong_type_were_left_out_in_silence(ends):
    """Such a model generated to the last token that was asked for, every time."""
    from hooklens.pretrained.hf import with_stops
    from hooklens.pretrained.tokenizer import tiny_tokenizer

    with pytest.raises(InputError, match="eos_token_id is a token id"):
        with_stops(tiny_tokenizer(), ends)
    assert with_stops(tiny_tokenizer(), [3, None, -1]).stop_ids == (3,)


ODD_SETTINGS = {
    "sliding_window": ["a", True, -3, 1.5],
    "max_window_layers": ["a", -1.5],
    "layer_types": ["a", 3],
    "rope_scaling": ["a", []],
    "dtype": ["banana", 16, "nn", {"text_config": "banana"}],
    "torch_dtype": ["banana", "Tensor"],
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("key", ODD_SETTINGS)
def test_settings_of_a_wrong_kind_were_accepted_where_the_family_does_not_read_them(name, key):
    values = tiny_hf(name).config.to_dict()
    find_family(values, "config.json").config(HFConfig(values, "config.json"))
    for odd in ODD_SETTINGS[key]:
        with pytest.raises(InputError, match=re.escape(f"config.json: {key} is {odd!r}; ")):
            find_family(values, "config.json").config(HFConfig(values | {key: odd}, "config.json"))


def test_a_config_json_with_a_dtype_that_is_none_is_refused_by_load(folder):
    edit_config(folder, dtype="banana")
    with pytest.raises(InputError, match="dtype is 'banana'; the name of a torch dtype such as 'bfloat16' is needed"):
        load(folder)
    values = tiny_hf("llama").config.to_dict()
    for good in ("bfloat16", "torch.float16", "auto", None, {"text_config": "float32"}):
        HFConfig(values | {"dtype": good, "torch_dtype": good, "sliding_window": None}, "config.json")
