"""The folder of a checkpoint: whether it may be written to, what is in it, and the step from one checkpoint to the next.

`forwardpass.json` names the files of the weights, whose names come from their content: a new checkpoint is there from the moment
that its forwardpass.json is renamed into place, and until then the old one is, untouched. One save at a time writes to a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator

from ..common.extras import pip_install
from ..common.files.json_files import room_beside, why_not_writable

RECORD = "forwardpass.json"
#: No name that other programs look for: they would take integers for weights.
WEIGHTS = re.compile(r"forwardpass-[0-9a-f]{16}\.safetensors")
#: What a save that was killed leaves.
_UNFINISHED = re.compile(r"\.(forwardpass|config|generation_config|README|model)\.\w+\.[0-9a-f]{16}\.partial")


def check_folder(
    folder: str | os.PathLike[str], sources: Iterable[str] = (), overwrite: bool = False, replaces: bool = True
) -> pathlib.Path:
    """The folder, without links and "..", which are followed before anything is made; refuses, with a ValueError, one that a
    checkpoint must not be saved to.

    One that holds a checkpoint of forwardpass (where the save `replaces` it), is empty or not yet there is always written to.
    Another one takes `overwrite`: files there of the names that a checkpoint has are replaced, the others stay. A folder of
    `sources` (names that are no folder are passed over), the model's own original, is never written to, by whatever path it is
    given.
    """
    folder, origins = pathlib.Path(os.path.realpath(folder)), {*sources}
    try:
        return _checked(folder, origins, overwrite, replaces)
    except ValueError:
        if not (folder.is_dir() and os.access(folder, os.R_OK)) or why_not_writable(folder):
            raise
        with _locked(folder):  # names are read one by one, and another save may have renamed files meanwhile
            return _checked(folder, origins, overwrite, replaces)


def _checked(folder: pathlib.Path, sources: set[str], overwrite: bool, replaces: bool) -> pathlib.Path:
    if not folder.exists():
        parent = next(p for p in folder.parents if p.exists())
        if not parent.is_dir() or why_not_writable(parent):
            raise ValueError(f"the folder {folder} cannot be made: give one that is in a folder that can be written to")
        return folder
    if not folder.is_dir() or why_not_writable(folder):
        raise ValueError(f"{folder} is no folder that can be written to: give another one to save to")
    names = os.listdir(folder)
    unfinished = all(WEIGHTS.fullmatch(name) or _UNFINISHED.fullmatch(name) for name in names)  # or empty
    is_checkpoint = (replaces and RECORD in names) or unfinished
    originals = not is_checkpoint or any(
        n.endswith((".safetensors", ".bin")) and not WEIGHTS.fullmatch(n) for n in names
    )
    if originals and any(os.path.isdir(source) and os.path.samefile(source, folder) for source in sources):
        raise ValueError(f"{folder} is where the model was loaded from, and its original is not overwritten by a swapped one: "
                         "save to another folder")  # fmt: skip
    if not is_checkpoint and not overwrite:
        kind = "checkpoint of forwardpass" if replaces else "unfinished export"
        raise ValueError(f"{folder} holds files that are no {kind} ({min(names)}, …): save to a new folder, "
                         "or pass overwrite=True (--overwrite)")  # fmt: skip
    return folder


@contextlib.contextmanager
def saving(
    folder: str | os.PathLike[str], sources: Iterable[str] = (), overwrite: bool = False, replaces: bool = True
) -> Iterator[pathlib.Path]:
    """The folder, which is made where it is missing, locked until the end of the block.

    Raises ValueError where `check_folder` does, or where another process or thread saves there now: it removes what it takes for
    leftovers, which would be this one's files.
    """
    origins = {*sources}
    folder = check_folder(folder, origins, overwrite, replaces)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        yield _checked(folder, origins, overwrite, replaces)  # a save may have ended since the first look


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """The lock is on the folder itself: no file of it is left, and the system frees it when a process is killed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process or thread saves into {folder} now, and nothing of this save was written: save to another "
                "folder, or again when that one has ended"
            ) from None
        except OSError as e:  # NFS locks no folders
            warnings.warn(
                f"the file system of {folder} has no locks for folders ({e}): see to it that nothing else saves there now",
                stacklevel=5,
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile holds it too
        os.close(descriptor)


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
    with room_beside(folder / "forwardpass.safetensors") as room:
        partial = room / "weights"
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
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
