"""Small encoders of transformers, texts of several lengths for them, and how many rows they run on."""

import copy

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.nn import QuantizedLinear

transformers = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
COMMON = {**_SIZES, "initializer_range": 0.3, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 1}
#: The model, its config, and what attention is: varlen, or padded where it computes in its own code.
FAMILIES = {
    "bert": ("BertModel", "BertConfig", COMMON, "varlen"),
    "roberta": ("RobertaModel", "RobertaConfig", COMMON, "varlen"),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", COMMON, "varlen"),
    "camembert": ("CamembertModel", "CamembertConfig", COMMON, "varlen"),
    "electra": ("ElectraModel", "ElectraConfig", {**COMMON, "embedding_size": 32}, "varlen"),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4, "initializer_range": 0.3, "vocab_size": 100,
         "max_position_embeddings": 64},
        "varlen",
    ),
    # every other layer sees two tokens to each side
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**COMMON, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3,
         "bos_token_id": 2, "eos_token_id": 3},
        "varlen",
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", COMMON, "padded"),
    "deberta": (
        "DebertaModel",
        "DebertaConfig",
        {**COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "padded",
    ),
    "deberta_v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
         "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        "padded",
    ),
}  # fmt: skip
LENGTHS = (14, 3, 9, 1)


def build(name):
    model, config, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def ragged(lengths=LENGTHS, seed=1):
    """Padded on the right."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(4, 100, mask.shape, generator=g).masked_fill(~mask, 1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def swapped(model, unpad=True, **options):
    model = copy.deepcopy(model)
    return model, fp.swap(model, unpad=unpad, **(options or {"precision": "int8"}))


@torch.inference_mode()
def hidden(model, batch):
    return getattr(model, "base_model", model)(**batch).last_hidden_state


def rows_of(model, run):
    """How many rows the second layer of each MLP is given in a call."""
    seen = []
    layers = [
        m for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, nn.Linear)) and m.in_features == 128
    ]
    assert len(layers) == 3
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:-1].numel())) for m in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def off(actual, expected, mask):
    keep = mask.bool()
    return ((actual - expected)[keep].norm() / expected[keep].norm()).item()
