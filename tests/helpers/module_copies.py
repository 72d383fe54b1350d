"""What may be done to a module without a change of what it computes."""

import copy
import pickle

import pytest

#: Tests with an argument `change`, which takes a module and returns one.
copied_and_cast = pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.half().float(),
        lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}), m)[1],
    ],
    ids=["deepcopy", "pickle", "half", "loaded"],
)
