"""`save_pretrained` and `push_to_hub` of swapped models themselves, as transformers and sentence-transformers call them."""

import gc
import pathlib
import weakref

import pytest
import torch
import transformers
from fake_hub import FakeHub
from small_models import batch, build, outputs
from stored_formats import llama
from transformers import AutoModelForCausalLM

import forwardpass as fp

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


def swapped(**options):
    model = llama(**options)
    fp.swap(model, "int8", include="**")
    return model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return FakeHub(tmp_path / "hub", monkeypatch)


@pytest.mark.every(2)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}, {"private": True, "tags": ["mine"]}])
@torch.inference_mode()
def test_push_to_hub(hub, options):
    model = swapped()
    assert model.push_to_hub("someone/llama-int8", **options).commit_url == "https://hub/someone/llama-int8"
    ((name, created),) = hub.created
    assert name == "someone/llama-int8" and created["private"] == options.get("private")
    assert (len([*hub.folder.glob("forwardpass-*.safetensors")]) > 1) == ("max_shard_size" in options)
    assert {"README.md", "config.json", "forwardpass.json", "generation_config.json"} <= {
        p.name for p in hub.folder.iterdir()
    }
    assert not [*hub.folder.glob("model*")]
    for loaded in (fp.load_pretrained(hub.folder), AutoModelForCausalLM.from_pretrained(hub.folder)):
        assert torch.equal(outputs(loaded, X), outputs(model, X))


@torch.inference_mode()
def test_a_tokenizer_beside_it_and_a_pipeline(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 100)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]")
    model = swapped()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # over what is ours, beside what is not
    generate = transformers.pipeline("text-generation", model=str(tmp_path))
    asked = {"max_new_tokens": 5, "do_sample": False}
    (text,) = (x["generated_text"] for x in generate("w3 w4 w5", **asked))
    expected = model.generate(torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3, dtype=torch.long), **asked)
    assert text.replace(" ", "") == tokenizer.decode(expected[0]).replace(" ", "")


def test_the_arguments_of_transformers(tmp_path):
    model = swapped()
    model.save_pretrained(str(tmp_path / "0"), True, None, False, "300KB", safe_serialization=True, variant=None)
    assert len([*(tmp_path / "0").glob("*.safetensors")]) > 2
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    for options, words in (
        ({"state_dict": model.state_dict()}, "no state_dict=.*the values are those of the model itself"),
        ({"push_to_hub": True}, r"no push_to_hub=True: call model\.push_to_hub"),
        ({"variant": "fp16"}, "no variant=fp16: drop it"),
        ({"safe_serialization": False}, "no safe_serialization=False: nothing else than safetensors is written"),
        ({"distributed_checkpoint": True}, "no distributed_checkpoint=True"),
        ({"save_function": torch.save}, "no save_function="),
        ({"token": "secret"}, "no token"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            model.save_pretrained(tmp_path / "none", **options)
        assert "\n" not in str(e.value)
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()
    with pytest.raises(ValueError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "none", max_shard_size="large")
    assert not (tmp_path / "none").exists()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="overwrite=True"):
        model.save_pretrained(tmp_path / "1")
    model.save_pretrained(tmp_path / "1", overwrite=True)
    assert (tmp_path / "1" / "model.safetensors").read_text() == "mine"


def test_the_folder_of_its_floats_is_not_written_to(tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    fp.swap(model, "int8")
    with pytest.raises(ValueError, match="is where the model was loaded from"):
        model.save_pretrained(tmp_path, overwrite=True)


def test_classes_of_ones_own_refuse(tmp_path):
    """Whose folder would not say how they are built."""

    class Mine(transformers.LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    model = Mine(llama().config).eval()
    fp.swap(model, "int8", include="**")
    with pytest.raises(RuntimeError, match=r"Mine\.save_pretrained would write .*use fp\.save_pretrained") as e:
        model.save_pretrained(tmp_path / "none")
    assert "\n" not in str(e.value) and not (tmp_path / "none").exists()


def test_a_model_of_diffusers_refuses(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=8, num_layers=1, norm_num_groups=4
    )
    fp.swap(model.eval(), "int8", include="**")
    with pytest.raises(RuntimeError, match=r"would write the 8-bit values"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_method_holds_no_model():
    model = build("llama")
    fp.swap(model, "int8")
    method, gone = model.save_pretrained, weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="is gone, as nothing held it: keep it in a variable"):
        method("none")
    assert not pathlib.Path("none").exists()


def test_a_part_that_is_swapped(tmp_path):
    model = build("llama")
    fp.swap(model.model, "int8")
    model.model.save_pretrained(tmp_path / "part")
    with torch.inference_mode():
        expected = model.model(**batch("llama")).last_hidden_state
        assert torch.equal(fp.load_pretrained(tmp_path / "part")(**batch("llama")).last_hidden_state, expected)
