"""Digests of tensors, computed where they lie: equal exactly when bit-identical. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

MIXED = "mix128:"  # the prefix of a digest that was not made by SHA-256
_CHUNK = 2**22  # words of eight bytes that are mixed at a time: 32 MiB, three times over
_MASK = 2**64


def digest_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in C order: equal exactly when bit-identical, even NaN and −0.

    The weights must be, or come, on the host; `digest_tensors` leaves them where they are.
    """
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def digest_tensors(
    tensors: Mapping[str, torch.Tensor], like: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Digests by name, without copying weights between devices.

    On the host SHA-256, a tensor a thread; elsewhere two sums modulo 2⁶⁴ of the bytes mixed with
    their places, computed on the device: sixteen bytes a tensor travel, in one copy a device.

    Args:
        like: earlier digests; each tensor is digested the way that its earlier one was, so that a
            run may go on elsewhere than where it began.
    """
    earlier = like or {}
    mixed: dict[torch.device, dict[str, torch.Tensor]] = {}
    on_host: list[str] = []
    for name, tensor in tensors.items():
        on_device = tensor.device.type != "cpu"
        if earlier[name].startswith(MIXED) if name in earlier else on_device:
            mixed.setdefault(tensor.device, {})[name] = _mix(tensor)
        else:
            on_host.append(name)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        hashed = pool.map(lambda name: digest_tensor(tensors[name]), on_host)
        digests.update(zip(on_host, hashed, strict=True))
    for sums in mixed.values():
        values = torch.stack(list(sums.values())).tolist()
        for name, (first, second) in zip(sums, values, strict=True):
            digests[name] = f"{MIXED}{first % _MASK:016x}{second % _MASK:016x}"
    return {name: digests[name] for name in tensors}


def _mix(tensor: torch.Tensor) -> torch.Tensor:
    """Two int64 sums over the tensor's bytes, on its device.

    Each word of eight bytes is offset by its place and goes through the finalizer of SplitMix64
    (Steele, Lea and Flood, 2014), a permutation, so that one changed word always changes the first
    sum; the second weighs the result by the place.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    size = data.numel()
    if size % 8:
        data = torch.cat([data, data.new_zeros(8 - size % 8)])
    elif data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    sums[1] = size
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        place = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device)
        mixed = place * _signed(0x9E3779B97F4A7C15)
        mixed += part
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed ^= (mixed >> shift) & (2 ** (64 - shift) - 1)  # >> of int64 keeps the sign
            mixed *= _signed(factor)
        sums[0] += mixed.sum()
        sums[1] += mixed.mul_(place.mul_(2).add_(1)).sum()
    return sums


def _signed(word: int) -> int:
    return word - _MASK if word >= _MASK // 2 else word
