"""Downloads of timm's weights: whether their server can be reached, and messages about those that failed."""

import os
import socket
import urllib.parse
import urllib.request

import torch

from models.networks import DownloadError, pretrained_tag
from models.torch_files import first_sentence

CONNECTION_TIMEOUT_S = 10  # with a server of weights


def check_reachable(tag):
    """Raise DownloadError if the server of timm's weights `tag` cannot be reached: its library tries for a minute."""
    import timm
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg(tag)
    if _cached_download(config) or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    address = urllib.parse.urlparse(constants.ENDPOINT if config.hf_hub_id else config.url)
    try:
        socket.create_connection((address.hostname, address.port or 443), CONNECTION_TIMEOUT_S).close()
    except OSError as error:
        raise DownloadError from error


def download_advice(model, error):
    """Message for weights of timm that could not be loaded, with the way out."""
    import timm

    tag, reason = pretrained_tag(model), first_sentence(error)
    config = timm.get_pretrained_cfg(tag)
    if cached := _cached_download(config):
        return f"{cached}, which timm downloaded, does not hold {tag} ({reason}); delete it and try again"
    file = f"model.safetensors of {config.hf_hub_id}" if config.hf_hub_id else config.url.rpartition("/")[2]
    to = f"pretrained_model/{tag}{'.safetensors' if config.hf_hub_id else '.pth'}"
    return f"{tag} could not be fetched ({reason}); download {file} elsewhere, save it as {to}, and use --finetune {to}"


def _cached_download(config):
    """Path of the file that timm downloaded for a PretrainedCfg; None if there is none."""
    if not config.hf_hub_id:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", config.url.rpartition("/")[2])
        return path if os.path.isfile(path) else None
    from huggingface_hub import try_to_load_from_cache

    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    paths = [try_to_load_from_cache(config.hf_hub_id, name) for name in names]
    return next((path for path in paths if isinstance(path, str)), None)
