"""Linear layers as checkpoints of other libraries hold them in 8 bits, and the layers of forwardpass that take them over.

A format is a module with `layer_recipe(tensors, config, name)`: what the tensors of one layer mean, by what the file holds and what
config.json says of it. `FORMATS` has them by transformers' `quant_method`.
"""

from . import bitsandbytes, compressed_tensors, fbgemm_fp8, fine_grained_fp8, gptq, modelopt, torchao
from .recipe import Format, Header, Recipe, Refused

#: By `quantization_config["quant_method"]`.
FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors.layer_recipe,
    "fp8": fine_grained_fp8.layer_recipe,
    "modelopt": modelopt.layer_recipe,
    "bitsandbytes": bitsandbytes.layer_recipe,
    "gptq": gptq.layer_recipe,
    "fbgemm_fp8": fbgemm_fp8.layer_recipe,
    "torchao": torchao.layer_recipe,
}

#: What a format says that is done in another way here.
NOTES = {
    "bitsandbytes": "bitsandbytes keeps columns of an input with outliers in 16 bits, and here each row is quantised whole: "
    "compare outputs",
    "fbgemm_fp8": "fbgemm cuts rows at input_scale_ub, and here none is cut",
}

__all__ = ["FORMATS", "NOTES", "Format", "Header", "Recipe", "Refused"]
