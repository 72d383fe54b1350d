"""What a row does not see counts for nothing on a CPU, NaN and infinities too: `unseen_keys` has the cases, for every tier."""

import pytest
import torch
import unseen_keys
from processes import by_threads

from forwardpass.common.environment import cpu_tier

OWN = cpu_tier() not in (None, "baseline")  #: else attention is torch's


@pytest.mark.skipif(not OWN, reason="needs AVX2")
@pytest.mark.parametrize("dtype", unseen_keys.FLOATS, ids=str)
def test_attention(dtype):
    if dtype != torch.float32 and cpu_tier() == "amx":
        pytest.skip("with AMX attention of 16 bits is torch's")
    unseen_keys.attention([dtype])


def test_attention_decode():
    for _ in by_threads(unseen_keys.attention_decode):
        pass


def test_decoder_layer():
    unseen_keys.decoder_layer()
