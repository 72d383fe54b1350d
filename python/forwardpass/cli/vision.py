"""Models of pictures for the command line: found by name or folder, loaded, and the photographs that they run on (extra `cli`)."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.extras import pip_install
from ..common.printing.quiet import quiet_libraries
from ..common.printing.text import count

#: How the name of a model of these packages begins.
PACKAGES = ("torchvision", "timm")
#: Photographs of scikit-image; scikit-learn's two come after them, where it is installed.
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)
FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
#: (side as a share of the shorter one of the picture, how far down, how far to the right): every other one calibrates.
CROPS = [
    (1.0, 0.5, 0.5),
    *((share, y, x) for share in (0.9, 0.7) for y in (0.0, 1.0) for x in (0.0, 0.5, 1.0)),
    (0.6, 0.5, 0.5),
]
#: Pictures of a folder from which on each is cropped once.
ENOUGH = 64
BATCH = 16
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Vision:
    """A model of pictures, in eval mode."""

    model: nn.Module
    origin: str
    size: int  #: of a picture's sides
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def result(self, model: nn.Module, x: Tensor) -> Tensor:
        """What is compared of pictures [N, 3, H, W]: the first floating tensor."""
        from ..common.batches import main_output

        y = model(x)
        sample = (
            y.get("out") if isinstance(y, dict) else getattr(y, "sample", None)
        )  # segmentation; diffusers' decoders
        return sample if isinstance(sample, Tensor) else main_output(y)

    def as_pictures(self, y: Tensor) -> Tensor | None:
        """A result as pictures [N, C, H, W] in 0..1, None where it is something else. The input's scale is its scale."""
        if y.dim() != 4 or y.shape[1] != 3 or min(y.shape[2:]) < 7:
            return None
        mean, deviation = (torch.tensor(v, device=y.device)[:, None, None] for v in (self.mean, self.deviation))
        return (y.float() * deviation + mean).clamp(0, 1)


def is_vision(name: str) -> bool:
    """Whether a command's model is one of pictures: torchvision:NAME, timm:NAME, or a folder whose config.json says so."""
    return name.partition(":")[0] in PACKAGES or _kind_of(pathlib.Path(name)) is not None


def _kind_of(folder: pathlib.Path) -> str | None:
    """Which library wrote a folder with a model of pictures: "timm", "transformers" or "diffusers"; None: none of them."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    if "architecture" in config and ("pretrained_cfg" in config or "num_classes" in config):
        return "timm"
    if str(config.get("_class_name", "")).startswith("Autoencoder"):
        return "diffusers"
    names = [str(name) for name in config.get("architectures") or ()]
    return "transformers" if any(name.endswith("ForImageClassification") for name in names) else None


def load(name: str, weights: str | None, device: str) -> Vision:
    """A model in eval mode, on a CPU in float32. Nothing is downloaded. Raises ValueError in one sentence."""
    package, _, model = name.partition(":")
    kind = _kind_of(pathlib.Path(name))
    if kind is not None and weights is not None:
        raise ValueError(f"--weights is for a model that has a name, and {name} is a folder with its own: drop it")
    if kind is None:
        importable(package)
        loaded = _of_torchvision(model, weights) if package == "torchvision" else _of_timm(model, weights)
    else:
        importable(kind)
        try:
            with quiet_libraries():
                loaded = _LOADERS[kind](pathlib.Path(name).resolve())
        except Exception as e:  # whatever a stranger's folder raises
            raise ValueError(f"cannot load the {kind} model in {name}: {' '.join(str(e).split())[:300]}") from e
    network, origin, size, mean, deviation = loaded
    network = network.eval().requires_grad_(False).to(device)
    return Vision(network.float() if device == "cpu" else network, origin, size, tuple(mean), tuple(deviation))


def importable(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed: pip install {package}")


Loaded = tuple[nn.Module, str, int, Sequence[float], Sequence[float]]


def _of_torchvision(name: str, weights: str | None) -> Loaded:
    models: Any = importlib.import_module("torchvision.models")
    known = models.list_models()
    if name not in known:
        raise ValueError(f"torchvision has no model {name}{_alike(name, known)}")
    if ".detection" in models.get_model_builder(name).__module__:
        raise ValueError(f"{name} takes a list of pictures and returns boxes, which this command does not compare: use fp.swap in "
                         "Python")  # fmt: skip
    default = models.get_model_weights(name).DEFAULT
    file = pathlib.Path(weights) if weights else hub_file(default.url)
    if not file.is_file():
        raise ValueError(_absent(file, weights, f"torchvision's weights of {name}", default.url))
    model = models.get_model(name, weights=None)
    fill(model, file)
    transforms = default.transforms()
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None) or [224]
    mean, deviation = (getattr(transforms, x, v) for x, v in zip(("mean", "std"), _IMAGENET))
    return model, f"torchvision's {name}, weights of {file}", size[0], mean, deviation


def hub_file(url: str) -> pathlib.Path:
    """Where torch's hub keeps what it has downloaded."""
    return pathlib.Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _of_timm(name: str, weights: str | None) -> Loaded:
    timm: Any = importlib.import_module("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name}{_alike(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    config = model.pretrained_cfg
    repository, file = config.get("hf_hub_id"), pathlib.Path(weights) if weights else None
    if file is None and repository:
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(repository, n) for n in ("model.safetensors", "pytorch_model.bin"))
        file = next((pathlib.Path(x) for x in cached if isinstance(x, str)), None)
    if file is None and config.get("url"):
        file = hub_file(config["url"])
    if file is None or not file.is_file():
        raise ValueError(
            _absent(file, weights, f"timm's weights of {name}", repository or config.get("url") or "nowhere")
        )
    fill(model, file)
    return model, f"timm's {name}, weights of {file}", config["input_size"][-1], config["mean"], config["std"]


def _of_timm_folder(folder: pathlib.Path) -> Loaded:
    timm: Any = importlib.import_module("timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = model.pretrained_cfg
    return model, f"timm's model in the folder {folder}", config["input_size"][-1], config["mean"], config["std"]


def _of_transformers_folder(folder: pathlib.Path) -> Loaded:
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    file = folder / "preprocessor_config.json"
    about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size = about.get("crop_size") or about.get("size") or getattr(model.config, "image_size", None) or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    mean, deviation = about.get("image_mean") or _HALF[0], about.get("image_std") or _HALF[1]
    return model, f"transformers' model in the folder {folder}", int(size), mean, deviation


def _of_diffusers_folder(folder: pathlib.Path) -> Loaded:
    diffusers: Any = importlib.import_module("diffusers")
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    model = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
    size = min(int(getattr(model.config, "sample_size", None) or 256), 256)  # larger ones take minutes on a CPU
    return model, f"diffusers' {name} in the folder {folder}", size, *_HALF


_LOADERS: dict[str, Callable[[pathlib.Path], Loaded]] = {
    "timm": _of_timm_folder,
    "transformers": _of_transformers_folder,
    "diffusers": _of_diffusers_folder,
}


def _alike(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3)
    return f": it has {', '.join(close)}" if close else ": check the name"


def _absent(file: pathlib.Path | None, weights: str | None, what: str, origin: str) -> str:
    if weights:
        return f"there is no file {weights}: pass --weights with a state dict of the model"
    where = f" ({file})" if file is not None else ""
    return (f"{what} are not on this machine{where}, and this command downloads nothing: pass --weights FILE, a state dict such as "
            f"{origin} has")  # fmt: skip


def fill(model: nn.Module, file: pathlib.Path) -> None:
    """ValueError, in one sentence, where the file is no state dict of the model."""
    try:
        if file.suffix == ".safetensors":
            state = importlib.import_module("safetensors.torch").load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        model.load_state_dict(state)
    except Exception as e:  # of pickles, of zip archives, of names and shapes
        raise ValueError(
            f"{file} holds no state dict of this {type(model).__name__}: {' '.join(str(e).split())[:200]}"
        ) from e


@dataclass(frozen=True)
class Photographs:
    """Pictures [N, 3, H, W], normalised: to measure on, and others to calibrate with."""

    measured: Tensor
    others: Tensor
    origin: str

    @property
    def batches(self) -> list[Tensor]:
        return list(self.measured.split(BATCH))


def photographs(vision: Vision, folder: str | None, device: str) -> Photographs:
    """Crops of the pictures of a folder, None: of those that come with scikit-image and scikit-learn; half of them to calibrate
    with. ValueError, in one sentence, where there are none."""
    pictures = list(_of_folder(pathlib.Path(folder)) if folder is not None else _builtin())
    each = CROPS if len(pictures) < ENOUGH else CROPS[:1]
    crops = [crop(picture, vision.size, *part) for part in each for picture in pictures]
    if len(crops) < 2:
        raise ValueError(
            f"{folder} has {count(len(pictures), 'picture')}: one half calibrates and the other is compared"
        )
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (vision.mean, vision.deviation))
    x = ((torch.stack(crops) - mean) / deviation).to(device)
    every = len(pictures) if len(each) > 1 else 1  # crops of one kind are together
    order = sorted(range(len(crops)), key=lambda i: (i // every % 2, i))
    half = sum(i // every % 2 == 0 for i in range(len(crops)))
    origin = f"the folder {folder}" if folder is not None else "scikit-image and scikit-learn"
    return Photographs(
        x[order[:half]],
        x[order[half:]],
        f"{count(len(crops), 'crop')} of {count(len(pictures), 'photograph')} of {origin}",
    )


def _builtin() -> Iterator[Any]:
    if importlib.util.find_spec("skimage") is None:
        raise ValueError(f"the built-in photographs are scikit-image's, which is not installed: {pip_install('images')}, or pass "
                         "--images FOLDER")  # fmt: skip
    folder = pathlib.Path(str(importlib.import_module("skimage").__file__)).parent / "data"
    read = importlib.import_module("skimage.io").imread
    yield from (read(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file())
    if importlib.util.find_spec("sklearn") is not None:
        yield from importlib.import_module("sklearn.datasets").load_sample_images().images


def _of_folder(folder: pathlib.Path) -> Iterator[Any]:
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is no folder: pass one with pictures ({', '.join(FILES)})")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in FILES)
    if not files:
        raise ValueError(f"--images {folder} has no picture ({', '.join(FILES)}): pass another folder")
    importable("PIL")
    image = importlib.import_module("PIL.Image")
    for file in files:
        try:
            with image.open(file) as picture:
                yield _pixels(picture.convert("RGB"))
        except OSError as e:
            raise ValueError(f"cannot read {file}: {' '.join(str(e).split())[:100]}; take it out of the folder") from e


def _pixels(picture: Any) -> Any:
    return importlib.import_module("numpy").asarray(picture)


def crop(picture: Any, size: int, share: float, down: float, right: float) -> Tensor:
    """[3, size, size] in 0..1 of a picture [H, W, 3 or more] of uint8."""
    x = torch.from_numpy(importlib.import_module("numpy").array(picture[..., :3])).permute(2, 0, 1)[None].float() / 255
    height, width = x.shape[2:]
    side = max(int(min(height, width) * share), 1)
    top, left = int((height - side) * down), int((width - side) * right)
    piece = x[..., top : top + side, left : left + side]
    return F.interpolate(piece, (size, size), mode="bilinear", antialias=True)[0]
