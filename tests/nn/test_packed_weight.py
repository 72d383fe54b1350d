"""Int8Linear's packed weight is never stale. On the tier that keeps one, whatever this CPU has."""

import pytest
import torch
from processes import fork, two_threads

import forwardpass  # noqa: F401  registers the ops

_NEVER_STALE = """
import copy, io, multiprocessing, threading
import torch, forwardpass as fp
from forwardpass.nn import Int8Linear
torch.set_num_threads(1)  # of OpenMP, so that there may be a fork

g = torch.Generator().manual_seed(0)
X = torch.randn(40, 200, generator=g)  # more rows than are multiplied without packing

def layer(seed):
    linear = torch.nn.Linear(200, 70)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(70, 200, generator=torch.Generator().manual_seed(seed)))
    return Int8Linear.from_torch(linear)

def is_right(m):
    with fp.use_backend("reference"):
        expected = m(X)
    assert torch.equal(m(X), expected)

def keeps(m):
    weight, packed = m._packed
    return weight is m.qweight and packed is not None and packed.numel() > m.qweight.numel()

m, other = layer(0), layer(1)
assert keeps(m) and "_packed" not in m.state_dict() and not [n for n, _ in m.named_buffers() if "packed" in n]
is_right(m)

m.qweight = other.qweight.clone(); is_right(m); assert keeps(m)                      # another weight
m.load_state_dict(layer(2).state_dict()); is_right(m); assert keeps(m)             # copied into the old one
m.qweight.copy_(other.qweight); is_right(m)                                          # in place
m.qweight.data.copy_(layer(3).qweight); is_right(m)                                  # past the version counter
m.qweight.numpy()[5, 7] ^= 1; is_right(m)                                           # one bit, past torch
m.qweight.data = layer(4).qweight.clone(); is_right(m)
m.qweight.zero_(); is_right(m)
m = layer(0)
swapped = m.qweight[[1, 0, *range(2, 70)]].clone()
m.qweight.copy_(swapped); is_right(m)                                               # the same bytes in another order
for change in (lambda m: m.to(torch.float16), lambda m: m.to("cpu"), copy.deepcopy):
    is_right(change(layer(5)))
m = layer(5).to("meta")
m.load_state_dict(layer(6).state_dict(), assign=True); is_right(m); assert keeps(m)

file = io.BytesIO()
torch.save(layer(6), file)
file.seek(0)
loaded = torch.load(file, weights_only=False)
assert loaded._packed == (None, None)
is_right(loaded); assert keeps(loaded)

for packed in (layer(7)._packed[1], torch.zeros_like(m._packed[1])):               # of another weight, and of none
    args = (X, m.qweight, m.weight_scale)
    try:
        y = fp.ops.int8_linear(*args, packed=packed)
        assert torch.equal(y, fp.ops.int8_linear(*args)) and packed[0] != 0
    except (RuntimeError, ValueError) as e:
        assert packed[0] == 0, e

m = layer(8)
expected = m(X)
def run(results):
    results += [bool(torch.equal(m(X), expected)) for _ in range(20)]
results = []
threads = [threading.Thread(target=run, args=(results,)) for _ in range(4)]
m._packed = (None, None)                                                           # packed by all of them at once
[t.start() for t in threads], [t.join() for t in threads]
assert results == [True] * 80
queue = multiprocessing.get_context("fork").SimpleQueue()
child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(bool(torch.equal(m(X), expected))))
child.start(); child.join(60)
assert child.exitcode == 0 and queue.get()

compiled = torch.compile(layer(9), backend="aot_eager", fullgraph=True)
is_right(compiled._orig_mod)
assert torch.equal(compiled(X), compiled._orig_mod(X))
compiled._orig_mod.qweight.copy_(other.qweight)
assert torch.equal(compiled(X), compiled._orig_mod(X))
m = layer(10)
exported = torch.export.export(m, (X,))
assert torch.equal(exported.module()(X), m(X)) and not exported.constants          # for another machine
print("right")
"""


@pytest.mark.every(3)
@pytest.mark.skipif("avx2" not in torch.ops.forwardpass._cpu_tiers(), reason="no other tier keeps a packed weight")
def test_packed_weight_is_never_stale():
    done = fork.run(_NEVER_STALE, env=two_threads({"FORWARDPASS_CPU": "avx2"}))
    assert done.stdout == "right\n", done.stderr
