"""The folder of a checkpoint: whether it may be written to, what is in it, and the step from one checkpoint to the next.

`forwardpass.json` names the files of the weights, whose names come from their content: a new checkpoint is there from the moment
that its forwardpass.json is renamed into place, and until then the old one is, untouched.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable

from ..common.extras import pip_install
from ..common.files import beside

RECORD = "forwardpass.json"
#: No name that other programs look for: they would take integers for weights.
WEIGHTS = re.compile(r"forwardpass-[0-9a-f]{16}\.safetensors")
#: What a save that was killed leaves.
_UNFINISHED = re.compile(r"\.(forwardpass|config|generation_config|README)\.\w+\.[0-9a-f]{16}\.partial")


def check_folder(folder: str | os.PathLike[str], sources: Iterable[str] = (), overwrite: bool = False) -> pathlib.Path:
    """The folder, without links and "..", which are followed before anything is made; refuses, with a ValueError, one that a
    checkpoint must not be saved to.

    One that holds a checkpoint of forwardpass, is empty or not yet there is always written to. Another one takes `overwrite`:
    files there of the names that a checkpoint has are replaced, the others stay. A folder of `sources` (names that are no
    folder are passed over), the model's own original, is never written to, by whatever path it is given.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    if not folder.exists():
        parent = next(p for p in folder.parents if p.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise ValueError(f"the folder {folder} cannot be made: give one that is in a folder that can be written to")
        return folder
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is no folder that can be written to: give another one to save to")
    names = os.listdir(folder)
    unfinished = all(WEIGHTS.fullmatch(name) or _UNFINISHED.fullmatch(name) for name in names)  # or empty
    is_checkpoint = RECORD in names or unfinished
    originals = not is_checkpoint or any(
        n.endswith((".safetensors", ".bin")) and not WEIGHTS.fullmatch(n) for n in names
    )
    if originals and any(os.path.isdir(source) and os.path.samefile(source, folder) for source in sources):
        raise ValueError(f"{folder} is where the model was loaded from, and its original is not overwritten by a swapped one: "
                         "save to another folder")  # fmt: skip
    if not is_checkpoint and not overwrite:
        raise ValueError(f"{folder} holds files that are no checkpoint of forwardpass ({min(names)}, …): save to a new folder, "
                         "or pass overwrite=True (--overwrite)")  # fmt: skip
    return folder


def is_hub_id(name: str) -> bool:
    """Whether it can be one, and is no path of what is there."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not pathlib.Path(name).exists()


def local_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """A folder as it is, or that of a hub id, whose JSON and safetensors files are downloaded. FileNotFoundError in a sentence."""
    path = pathlib.Path(folder)
    if not is_hub_id(str(folder)):
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(f"there is no folder {folder}, and a hub id needs huggingface_hub: {pip_install('hf')}")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # of the hub, of the network, of the disk
        why = f"{type(e).__name__}: {e}".splitlines()[0][:160]
        raise FileNotFoundError(f"there is no folder {folder}, and the hub gives none of that name ({why})") from None


def put_weights(folder: pathlib.Path, write: Callable[[pathlib.Path], object]) -> str:
    """Puts a file of weights into `folder`, beside the one that may be there, and returns its name."""
    with beside(folder / "forwardpass.safetensors") as partial:
        write(partial)
        digest = hashlib.sha256()
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        name = f"forwardpass-{digest.hexdigest()[:16]}.safetensors"
        partial.replace(folder / name)
    return name


def remove_other_weights(folder: pathlib.Path, keep: Collection[str]) -> None:
    """Weights of checkpoints before the one that is there now, and what saves that were killed left."""
    for path in folder.iterdir():
        if path.name not in keep and (WEIGHTS.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)):
            path.unlink(missing_ok=True)
