"""What a training step keeps in memory, counted on fake tensors, without a GPU.

    python benchmarks/memory.py            every size, 4x32x32 latents, bfloat16, guided, and
                                           examples/cifar10.py, 3x32x32 pixels, float32

Weights, gradients, Adam's two moments and an average are 20 bytes a parameter. What the backward
pass keeps grows with the images that a process computes at once (--batch over processes and
--accumulate). Prints both, and the --accumulate with which one GPU of 24, 80 or 141 GB holds the
recipe's batch, with 3 GB left for what comes and goes: temporary tensors, bfloat16 weights, CUDA's
own.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import cifar10

import imf
import meanflow
import model
import train

GPUS = {24: 24e9, 80: 80e9, 141: 141e9}
LEFT = 3e9


def shapes(size):
    if size == "cifar10":
        return cifar10.shapes()
    if size in imf.SIZES:
        return imf.shapes(imf.Config(*imf.SIZES[size], 4, 1000, True))
    return model.shapes(model.Config(*model.SIZES[size], 4, 1000))


def method(size):
    if size == "cifar10":
        return cifar10.unet_method(128, (3, 32, 32))
    if size in imf.SIZES:
        return train.imf_method(size, channels=4, classes=1000, kind="latents")
    guidance = train.RECIPES[size].guidance
    return train.dit_method(size, channels=4, classes=1000, guidance=guidance)


def kept(size, batch, device="cpu"):
    """Return the bytes that a guided step's loss keeps for its backward pass, beside parameters."""
    storages, loss = {}, method(size).loss
    cifar10.low_pass.cache_clear()  # or a real tensor would meet fake ones

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes(), storage
        return tensor

    with FakeTensorMode():
        params = {
            name: torch.nn.Parameter(torch.empty(shape, device=device))
            for name, shape in shapes(size).items()
        }
        owned = {p.untyped_storage()._cdata for p in params.values()}
        pixels = size == "cifar10"
        objective = train.Objective(loss, params, "float32" if pixels else "bfloat16")
        x = torch.empty(batch, 3 if pixels else 4, 32, 32, device=device)
        t, y = (
            torch.empty(batch, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )
        draws, equal = meanflow.Draws(x, t, t, y.bool()), batch * 3 // 4
        if size in imf.SIZES:
            draws, equal = imf.Draws(*draws, t, t, t), batch // 2
        if pixels:
            warp = torch.empty(batch, 4, device=device)
            chance = torch.empty(batch, 5, device=device)
            draws, equal = cifar10.Draws(x, t, t, y, y, warp, chance), batch // 4
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective(x, y, draws, equal)
    cifar10.low_pass.cache_clear()
    return sum(n for key, (n, _) in storages.items() if key not in owned)


def main():
    print("| size | weights, gradients, Adam, averages | an image | ", end="")
    print(" | ".join(f"{gpu} GB" for gpu in GPUS), "|\n|---|---|---|" + "---|" * len(GPUS))
    for size in ["cifar10", *(size for size in train.RECIPES if "T" not in size)]:
        averages, total = (3, 1024) if size == "cifar10" else (1, train.RECIPES[size].batch)
        count = sum(torch.Size(shape).numel() for shape in shapes(size).values())
        fixed = 4 * (4 + averages) * count
        few, many = (kept(size, batch) for batch in (8, 24))
        image = (many - few) / 16
        parts = [2**k for k in range(9)]
        room = ((space - LEFT - fixed) / image for space in GPUS.values())
        numbers = " | ".join(str(next(n for n in parts if total / n <= images)) for images in room)
        print(f"| {size} | {fixed / 1e9:.1f} GB | {image / 1e6:.0f} MB | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
