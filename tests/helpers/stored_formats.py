"""Tiny models in the 8-bit formats of other libraries, written by their formulas; what each weight is, in float64."""

import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

from forwardpass.nn.linear.quantized_linear import quantize_weight
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.fp8_gemm import BLOCK
from forwardpass.swap import originals

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options)).eval()


#: Mixtures of experts, by transformers' class; mixtral's names in a file are others.
_MOE = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 192}
MIXTURES = {
    "Qwen3MoeForCausalLM": _MOE | {"num_experts": 4, "head_dim": 64},
    "MixtralForCausalLM": _MOE | {"num_local_experts": 4, "intermediate_size": 192},
    "DeepseekV3ForCausalLM": _MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "num_key_value_heads": 4},
}  # fmt: skip


def mixture(name, **options):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**MIXTURES[name] | options)).eval()


def _scaled(q, scale, n, k):
    rows = scale.double()
    if rows.dim() == 2 and (rows.shape[1] > 1 or rows.shape[0] not in (1, n)):
        tall = -(-n // rows.shape[0]) if rows.shape[0] != n else 1
        rows = rows.repeat_interleave(128 if tall > 1 else 1, 0)[:n].repeat_interleave(128, 1)[:, :k]
    elif rows.numel() > 1:
        rows = rows.reshape(n, 1)
    return q.double() * rows


def _compressed(weights, inputs, targets=("Linear",)):
    group = {"targets": [*targets], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def _ct(kind, strategy, dynamic=True, symmetric=True):
    inputs = {
        "num_bits": 8,
        "type": kind,
        "dynamic": dynamic,
        "strategy": "token" if dynamic else "tensor",
        "symmetric": symmetric,
    }
    blocks = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    return _compressed({"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **blocks}, inputs)


def _packed(q):
    return (q.to(torch.int16) + 128).to(torch.uint8).contiguous().view(torch.int32)


def _gptq(w, group):
    n, k = w.shape
    q, s = quantize_weight(w, scales="group" if group == 128 else "row")
    groups = s.shape[1] if s.dim() == 2 else 1
    byte = (q.to(torch.int16) + 128).to(torch.uint8)
    words = byte.reshape(n, k // 4, 4).transpose(0, 1).contiguous().view(torch.int32).squeeze(-1)
    tensors = {"qweight": words, "scales": s.reshape(n, groups).t().contiguous(),
               "qzeros": torch.full((groups, n), 127, dtype=torch.uint8).view(torch.int32),
               "g_idx": (torch.arange(k) // (group if group > 0 else k)).int()}  # fmt: skip
    return tensors, _scaled(q, s, n, k)


def _plain(dtype, scales, scale_name, shape=None, scale_dtype=torch.float32, factor=1.0, **others):
    """A format of a weight, a scale of it, and other tensors."""

    def tensors(w):
        q, s = quantize_weight(w, dtype, scales)
        s = s.to(scale_dtype)
        stored = s.float() * factor if factor != 1.0 else s
        return {"weight": q.contiguous(), scale_name: stored.reshape(shape(s)) if shape else stored, **others}, _scaled(
            q, s, *w.shape
        )

    return tensors


def _column(s):
    return (-1, 1)


STATIC = torch.tensor([0.03125])
_PACKED_W8A16 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def _pack(w):
    q, s = quantize_weight(w)
    return {"weight_packed": _packed(q), "weight_scale": s[:, None], "weight_shape": torch.tensor(w.shape)}, _scaled(
        q, s, *w.shape
    )


def _powers_of_two(w):
    """Block scales as exponents: e4m3 has the range for the next power above."""
    _, s = quantize_weight(w, E4M3, "block")
    s = torch.exp2(s.log2().ceil())
    wide = s.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    q = (w / wide).to(E4M3)
    return {"weight": q, "weight_scale_inv": s.to(torch.float8_e8m0fnu)}, _scaled(q, s, *w.shape)


def _smoothed(w):
    channel = torch.linspace(0.5, 2.0, w.shape[1])
    tensors, weight = _plain(torch.int8, "row", "weight_scale")(w / channel)
    return {**tensors, "pre_quant_scale": channel}, weight


def _torchao(kind, inputs):
    """`header` is what the file itself says of each weight."""
    about = {"_type": kind, "_data": {"act_quant_kwargs": inputs, "block_size": [1, 256]}}
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": "Config", "_data": {}}}, "header": about}


def _torchao_parts(dtype, scales="row", **others):
    def tensors(w):
        q, s = quantize_weight(w, dtype, scales)
        shape = (-1, 1)
        parts = {"qdata": q.contiguous(), "scale": s.reshape(shape)}
        if dtype == torch.int8:
            parts["zero_point"] = torch.zeros(len(s), 1, dtype=torch.int8)
        others_of_k = {n: x(w.shape[1]) if callable(x) else x for n, x in others.items()}
        weight = _scaled(q, s, *w.shape)
        return {f"_weight_{n}": t for n, t in (parts | others_of_k).items()}, weight

    return tensors


_ROWS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}},
}

#: name -> (quantization_config, tensors of a layer and its weight, class of the layer on a CPU)
FORMATS = {
    "int8_token": (_ct("int", "channel"), _plain(torch.int8, "row", "weight_scale", _column, torch.bfloat16), "Int8Linear"),
    "int8_static": (_ct("int", "channel", False),
                    _plain(torch.int8, "row", "weight_scale", _column, input_scale=STATIC), "Int8Linear"),
    "int8_asymmetric": (_ct("int", "channel", False, False), _plain(torch.int8, "row", "weight_scale", _column, input_scale=STATIC,
                        input_zero_point=torch.tensor([3], dtype=torch.int8)), "Int8Linear"),
    "int8_packed": (_compressed(_PACKED_W8A16, None), _pack, "W8A16Linear"),
    "fp8_token": (_ct("float", "channel"), _plain(E4M3, "row", "weight_scale", _column, torch.bfloat16), "W8A16Linear"),
    "fp8_static": (_ct("float", "tensor", False), _plain(E4M3, "tensor", "weight_scale", input_scale=STATIC), "W8A16Linear"),
    "fp8_block": (_ct("float", "block"), _plain(E4M3, "block", "weight_scale"), "W8A16Linear"),
    "deepseek": ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
                 _plain(E4M3, "block", "weight_scale_inv"), "W8A16Linear"),
    "deepseek_powers_of_two": ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
                               _powers_of_two, "W8A16Linear"),
    "deepseek_static": ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
                        _plain(E4M3, "tensor", "weight_scale_inv", lambda s: (), activation_scale=STATIC[0]), "W8A16Linear"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"},
                 _plain(E4M3, "tensor", "weight_scale", lambda s: (), input_scale=STATIC[0]), "W8A16Linear"),
    "modelopt_int8": ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, _smoothed, "Int8Linear"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True},
                     _plain(torch.int8, "row", "SCB", factor=127, weight_format=torch.tensor(0, dtype=torch.uint8)), "Int8Linear"),
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True}, lambda w: _gptq(w, 128), "W8A16Linear"),
    "gptq_rows": ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, lambda w: _gptq(w, -1), "W8A16Linear"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"},
               _plain(E4M3, "row", "weight_scale", _column, input_scale_ub=torch.tensor([1200.0])), "W8A16Linear"),
    "torchao": (_torchao("Int8Tensor", _ROWS), _torchao_parts(torch.int8), "Int8Linear"),
    "torchao_static": (_torchao("Int8Tensor", _ROWS),
                       _torchao_parts(torch.int8, act_quant_scale=STATIC[None], act_pre_scale=torch.ones), "Int8Linear"),
    "torchao_weights": (_torchao("Int8Tensor", None), _torchao_parts(torch.int8), "W8A16Linear"),
    "torchao_fp8": (_torchao("Float8Tensor", {"_type": "QuantizeTensorToFloat8Kwargs", "_data": {}}),
                    _torchao_parts(E4M3), "W8A16Linear"),
    "torchao_fp8_tensor": (_torchao("Float8Tensor", {"_type": "QuantizeTensorToFloat8Kwargs", "_data": {}}),
                           _torchao_parts(E4M3, "tensor"), "W8A16Linear"),
}  # fmt: skip


def write(folder, name, model=None, shards=None):
    """The folder of a model in a format, and of each of its quantised layers the weight that it stores."""
    config, tensors_of, _ = FORMATS[name]
    config = dict(config)
    about = json.dumps(config.pop("header", None))
    model, folder, weights = model or llama(), pathlib.Path(folder), {}
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tensors = {}
    for key, t in load_file(folder / "model.safetensors").items():
        layer = key.removesuffix(".weight")
        if t.dim() == 2 and layer.endswith(("_proj", ".w1", ".w2", ".w3")):
            of_layer, weights[layer] = tensors_of(t)
            tensors |= {f"{layer}.{n}": x.clone() for n, x in of_layer.items()}
        else:
            tensors[key] = t
    if shards:
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: file for file, part in files.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        header = {f"{layer}.weight": about for layer in weights if about != "null"}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **header})
    edit(folder, quantization_config=config)
    return weights


def layers_of(model):
    """Each quantised layer as it is stored, by name."""
    return originals.separate_layers(model)[0]


def edit(folder, **entries):
    """Other entries of config.json."""
    path = pathlib.Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def write_compressed(folder, preset, model=None):
    """By compressed-tensors itself: a preset of its schemes, weights rounded to nearest."""
    import compressed_tensors.compressors as compressors
    import compressed_tensors.quantization as ct
    from compressed_tensors.quantization.utils import calculate_qparams

    model = (model or llama(hidden_size=256, intermediate_size=512)).bfloat16()
    scheme = ct.preset_name_to_scheme(preset, ["Linear"])
    ct.apply_quantization_config(model, ct.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for m in model.modules():
        args = getattr(getattr(m, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        w = m.weight.float()
        if args.strategy == "block":
            w, dims = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)), (1, 3)
        elif args.strategy == "group":
            w, dims = w.unflatten(1, (-1, args.group_size)), 2
        else:
            dims = 1 if args.strategy == "channel" else (0, 1)
        scale, zero = calculate_qparams(w.amin(dims), w.amax(dims), args)
        m.weight_scale.data.copy_(scale.reshape(m.weight_scale.shape))
        m.weight_zero_point.data.copy_(zero.reshape(m.weight_zero_point.shape))
        if hasattr(m, "input_scale"):
            m.input_scale.data.fill_(0.03125)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=model.state_dict())
    compressor.update_config(folder)
