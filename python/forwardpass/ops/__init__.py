"""`fp.ops.<name>`: every operation. Each lives in the package of its own name, or of its family's."""

from .activation_quantize import activation_quantize
from .append_kv import append_kv
from .attention import attention, attention_with_lse
from .attention_8bit import AttentionOperands as AttentionOperands
from .attention_8bit import attention_8bit, attention_8bit_with_lse, quantize_attention
from .attention_decode import attention_decode, attention_decode_with_lse
from .common.activations import interleave_gate_up, separate_gate_up
from .decoder_layer import DecoderWeights as DecoderWeights
from .decoder_layer import W8a16Weight as W8a16Weight
from .decoder_layer import decoder_layer
from .dequant_activation import dequant_activation
from .encoder_layer import EncoderWeights as EncoderWeights
from .encoder_layer import Int8Weight as Int8Weight
from .encoder_layer import encoder_layer
from .fp8_gemm import fp8_gemm, fp8_gemm_quantize
from .fp8_grouped_gemm import fp8_grouped_gemm
from .fp8_linear import fp8_linear
from .int8_conv2d import int8_conv2d
from .int8_gemm import int8_gemm, int8_gemm_quantize
from .int8_grouped_gemm import int8_grouped_gemm
from .int8_linear import int8_linear, pack_int8_weight
from .norm_quantize import add_norm_quantize, norm_quantize
from .permute_quantize import permute_quantize
from .quantize import quantize
from .unpermute import unpermute
from .w8a16_gemm import w8a16_gemm
from .w8a16_grouped_gemm import w8a16_grouped_gemm

__all__ = [
    "activation_quantize",
    "add_norm_quantize",
    "append_kv",
    "attention",
    "attention_8bit",
    "attention_8bit_with_lse",
    "attention_decode",
    "attention_decode_with_lse",
    "attention_with_lse",
    "decoder_layer",
    "dequant_activation",
    "encoder_layer",
    "fp8_gemm",
    "fp8_gemm_quantize",
    "fp8_grouped_gemm",
    "fp8_linear",
    "int8_conv2d",
    "int8_gemm",
    "int8_gemm_quantize",
    "int8_grouped_gemm",
    "int8_linear",
    "interleave_gate_up",
    "norm_quantize",
    "pack_int8_weight",
    "permute_quantize",
    "quantize",
    "quantize_attention",
    "separate_gate_up",
    "unpermute",
    "w8a16_gemm",
    "w8a16_grouped_gemm",
]
