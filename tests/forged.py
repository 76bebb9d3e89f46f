"""Checkpoints that somebody else wrote: their checksum is right, since whoever can write a file can compute one."""

import json

from safetensors import safe_open
from safetensors.torch import save_file

from growconv.training import checkpoint


def opened(path):
    """The record of a checkpoint, as text, and its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata()["record"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path, text, tensors):
    """A checkpoint of a record, as text, and tensors."""
    save_file(tensors, path, {"format": checkpoint.FORMAT, "record": text, "sha256": checkpoint._digest(text, tensors)})


def forge(path, change):
    """Change the state that a checkpoint holds."""
    text, tensors = opened(path)
    record = json.loads(text)
    change(record["state"])
    write(path, json.dumps(record), tensors)
