"""Train somebody else's network: diffusers' UNet2DModel, an nn.Module, as a Method.

    pip install diffusers
    python examples/own_network.py                                          the digits
    python examples/own_network.py data/cifar10 --steps 50000               what data.py wrote
    torchrun --nproc-per-node 2 examples/own_network.py                     shared by processes
    python examples/own_network.py --draw samples.png                       from the last save

To train a network of your own, copy this file beside it and change `build` and `unet`. The rest is
the loop's: the run is resumed by the same command, shared by any number of processes, watched and
drawn as those of train.py, and --ref scores it. A condition that is no class works the same way:
`y` is whatever the Dataset gives as labels.
"""

# ruff: noqa: E402
import json
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DModel

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import dual
import evaluate
import meanflow
import runtime
import sample
import train
import weights


def build(channels, classes):
    """Return the network, freshly initialised, as it is when drawn from: without dropout."""
    module = UNet2DModel(
        in_channels=channels + 1,
        out_channels=channels,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
        num_class_embeds=classes + 1,  # the last one: no class
    )
    return module.eval()


def unet(module, params):
    """Return net(z, t, r, y) -> u: `module` with these parameters, {name: tensor}.

    It takes one time, t; the duration t - r comes as one more channel of the image.
    """

    def net(z, t, r, y):
        h = meanflow.append_dims(t - r, z).expand(-1, 1, *z.shape[2:])
        inputs = torch.cat((z, h), 1), t, y
        return torch.func.functional_call(module, params, inputs, {"return_dict": False})[0]

    return net


def unet_method(channels, classes, **guidance):
    """Return the Method. guidance: omega, kappa and interval, as of meanflow.fast_loss."""
    with torch.device("meta"):  # layers without weights, which come as an argument
        module = build(channels, classes)
    assert not [*module.buffers()], "buffers would stay without values: make them parameters"

    def init(generator):
        with torch.random.fork_rng():  # modules draw their weights from the global generator
            torch.manual_seed(torch.randint(2**62, (), generator=generator).item())
            return {name: p.detach() for name, p in build(channels, classes).named_parameters()}

    def loss(params, x, y, draws, equal):
        options = dict(null=classes, equal=equal, jvp=dual.jvp, **guidance)
        return meanflow.fast_loss(unet(module, params), x, y, draws, **options)

    net = partial(unet, module)
    return train.Method("MeanFlow of UNet2DModel", init, meanflow.draw, loss, net)


def load(folder, device="cpu"):
    """Return the weights.Sampler of the last save in a run's folder."""
    path = weights.find_checkpoint(folder)
    params, about, identity = weights.read_weights(path)
    if "conv_out.weight" not in params or "run" not in about:
        raise ValueError(f"{path} holds another network: give a folder that this script wrote")
    kind, classes = about["kind"], json.loads(about["classes"])
    channels = params["conv_out.weight"].shape[0]
    scale = 8 if kind == "latents" else 1
    sides = [int(side) // scale for side in about["resolution"].split("x")]
    shape = channels, sides[0], sides[-1]  # a single number is that of a square
    params = {name: p.to(device) for name, p in params.items()}
    net = unet_method(channels, len(classes)).net
    return weights.Sampler(params, net, classes, kind, shape, weights=identity)


def main(argv, world):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument
    add("data", nargs="?", help="what data.py wrote (default: digits)")
    add("--out", type=Path, default=Path("runs", "unet"), help="the run's folder")
    add("--steps", type=runtime.number(int, 1), default=2000)
    add("--batch", type=runtime.number(int, 1), default=64)
    add("--lr", type=runtime.number(float, 0), default=1e-3)
    add("--ref", help="score the last save against this (see evaluate.py)")
    add("--draw", type=Path, help="draw this picture from the last save instead of training")
    args = arguments.parse_args(argv)
    if args.draw:
        runtime.refuse("with --draw", ref=args.ref)
        sampler = load(args.out, world.device)
        x = sample.generate(sampler, torch.arange(100) % len(sampler.classes))
        images = sample.to_uint8(x, sampler)
        return sample.save_grid(images, args.draw) if world.rank == 0 else None

    dataset = data.load_data(args.data, world.rank, world.size) if args.data else data.digits()
    if args.ref and dataset.kind == "latents":
        raise ValueError("--ref compares pixels: leave it out for latents")
    guidance = dict(kappa=0.3, interval=(0.0, 0.5))
    method = unet_method(dataset.shape[0], len(dataset.classes), **guidance)
    plan = train.Plan(args.lr, args.batch, args.steps, ema=0.998)
    score = None
    if args.ref:
        scorer = evaluate.load_scorer(args.ref, None, dataset.shape, world)
        samples = evaluate.Samples(1000)
        score = partial(evaluate.score, scorer=scorer, samples=samples, world=world)
    about = {"method": method.name, **guidance}  # what tells this run from others
    sampler = train.fit(method, dataset, plan, args.out, world, about=about, score=score)
    if sampler and dataset.name == "digits" and world.rank == 0:
        evaluate.report(sampler, dataset)


if __name__ == "__main__":
    runtime.launch(main)
