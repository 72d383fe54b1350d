"""A swapped model on disk: files of safetensors, and `forwardpass.json`, which names them and says all that is no tensor.

The original weights are neither stored nor needed: a model is built without values (Hugging Face's on the meta device),
its quantised layers are made empty from their stored configuration, and every tensor is read into its place.
Nothing in a checkpoint is executed: no pickle, no remote code, no kernel of a hub, no path from a file.
"""

from .export import export_pretrained
from .load import load_pretrained
from .save import save_pretrained

__all__ = ["export_pretrained", "load_pretrained", "save_pretrained"]
