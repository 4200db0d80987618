"""The VAE of latent diffusion, sd-vae-ft-mse, as pure functions of a dict of parameters.

Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752.
Parameters have the names of its file, diffusion_pytorch_model.safetensors of
stabilityai/sd-vae-ft-mse on Hugging Face, with SHA-256
a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815.

    vae = convert(safetensors.torch.load_file(path))
    mean, std = encode(vae, images)                     images in [-1, 1], latents not scaled
    images = decode(vae, mean)

    python vae.py     print its halves, their parameters and their cost
"""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

SCALE = 0.18215  # brings latents to a variance of about 1
WIDTHS = (128, 256, 512, 512)  # channels at 1, 1/2, 1/4 and 1/8 of the image's height
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def shapes():
    """Return {name: shape} of the VAE's 248 tensors, 83,653,863 parameters."""
    weights, mid = {"quant_conv": (8, 8, 1, 1), "post_quant_conv": (4, 4, 1, 1)}, WIDTHS[-1]

    def resnet(name, inputs, width):
        weights[f"{name}.norm1"], weights[f"{name}.conv1"] = (inputs,), (width, inputs, 3, 3)
        weights[f"{name}.norm2"], weights[f"{name}.conv2"] = (width,), (width, width, 3, 3)
        if inputs != width:
            weights[f"{name}.conv_shortcut"] = (width, inputs, 1, 1)

    def half(name, way, widths, depth, inputs, outputs):
        weights[f"{name}.conv_in"] = (widths[0], inputs, 3, 3)
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths)):
            for j in range(depth):
                resnet(f"{name}.{way}_blocks.{i}.resnets.{j}", width if j else before, width)
            if i < 3:
                weights[f"{name}.{way}_blocks.{i}.{way}samplers.0.conv"] = (width, width, 3, 3)
        for j in range(2):
            resnet(f"{name}.mid_block.resnets.{j}", mid, mid)
        weights[f"{name}.mid_block.attentions.0.group_norm"] = (mid,)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            weights[f"{name}.mid_block.attentions.0.{part}"] = (mid, mid)
        weights[f"{name}.conv_norm_out"] = (width,)
        weights[f"{name}.conv_out"] = (outputs, width, 3, 3)

    half("encoder", "down", WIDTHS, depth=2, inputs=3, outputs=8)
    half("decoder", "up", WIDTHS[::-1], depth=3, inputs=4, outputs=3)
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def convert(tensors, device="cpu"):
    """Return the parameters, {name: float32 tensor}, from tensors with the published names.

    Older names of the attention layers are accepted. The tensors are copied, not checked: theirs
    should then be the names and shapes of `shapes`.
    """
    vae = {}
    for name, p in tensors.items():
        name = ".".join(OLD_NAMES.get(part, part) for part in name.split("."))
        if "attentions" in name and p.ndim == 4:  # once made of 1x1 convolutions
            p = p.flatten(1)
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format  # 15 % faster
        vae[name] = p.to(device, torch.float32, memory_format=layout, copy=True)
    return vae


def conv(vae, name, x, padding=1, stride=1):
    return F.conv2d(x, vae[f"{name}.weight"], vae[f"{name}.bias"], stride, padding)


def norm(vae, name, x):
    return F.group_norm(x, 32, vae[f"{name}.weight"], vae[f"{name}.bias"], eps=1e-6)


def resnet(vae, name, x):
    h = conv(vae, f"{name}.conv1", F.silu(norm(vae, f"{name}.norm1", x)))
    h = conv(vae, f"{name}.conv2", F.silu(norm(vae, f"{name}.norm2", h)))
    if f"{name}.conv_shortcut.weight" in vae:
        x = conv(vae, f"{name}.conv_shortcut", x, padding=0)
    return x + h


def attention(vae, name, x):
    """Apply attention with one head over all h w places of x, (B, 512, h, w)."""

    def linear(part, h):
        return F.linear(h, vae[f"{name}.{part}.weight"], vae[f"{name}.{part}.bias"])

    h = norm(vae, f"{name}.group_norm", x).flatten(2).mT[:, None]  # (B, 1, h w, 512)
    h = F.scaled_dot_product_attention(linear("to_q", h), linear("to_k", h), linear("to_v", h))
    return x + linear("to_out.0", h)[:, 0].mT.unflatten(2, x.shape[2:])


def middle(vae, name, x):
    x = resnet(vae, f"{name}.resnets.0", x)
    return resnet(vae, f"{name}.resnets.1", attention(vae, f"{name}.attentions.0", x))


def encoder(vae, x):
    """Return means and log-variances, (B, 4 + 4, H/8, W/8), of images, (B, 3, H, W)."""
    x = conv(vae, "encoder.conv_in", x)
    for i in range(4):
        for j in range(2):
            x = resnet(vae, f"encoder.down_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = F.pad(x, (0, 1, 0, 1))  # on the right and at the bottom only
            name = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            x = conv(vae, name, x, padding=0, stride=2)
    x = F.silu(norm(vae, "encoder.conv_norm_out", middle(vae, "encoder.mid_block", x)))
    return conv(vae, "quant_conv", conv(vae, "encoder.conv_out", x), padding=0)


def decoder(vae, z):
    """Return images, (B, 3, 8 h, 8 w), from latents, (B, 4, h, w)."""
    x = conv(vae, "decoder.conv_in", conv(vae, "post_quant_conv", z, padding=0))
    x = middle(vae, "decoder.mid_block", x)
    for i in range(4):
        for j in range(3):
            x = resnet(vae, f"decoder.up_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(vae, f"decoder.up_blocks.{i}.upsamplers.0.conv", x)
    return conv(vae, "decoder.conv_out", F.silu(norm(vae, "decoder.conv_norm_out", x)))


def in_chunks(half, vae, x, chunk):
    """Return half(vae, x) in the dtype of x, computed in the parameters' dtype, channels last."""
    dtype = next(iter(vae.values())).dtype
    chunk = chunk or (1 if x.device.type == "cpu" else 32)  # 1.5 times as fast on a CPU as 4
    parts = [half(vae, p.to(dtype, memory_format=torch.channels_last)) for p in x.split(chunk)]
    return torch.cat(parts).to(x.dtype, memory_format=torch.contiguous_format)


def encode(vae, images, *, chunk=None):
    """Return mean and standard deviation of the images' latents, both (B, 4, H/8, W/8), unscaled.

    images: (B, 3, H, W) floating in [-1, 1], H and W multiples of 8, else ValueError. Computes
    `chunk` images at a time, in the parameters' dtype; 256x256 takes 135 MB each in float32.
    """
    shape = tuple(images.shape)
    floating = images.is_floating_point()
    if len(shape) != 4 or shape[1] != 3 or shape[2] % 8 or shape[3] % 8 or not floating:
        wanted = "(B, 3, H, W) floating, H and W multiples of 8"
        raise ValueError(f"images are {shape} {images.dtype}: give {wanted}")
    mean, log_variance = in_chunks(encoder, vae, images, chunk).chunk(2, 1)
    return mean.contiguous(), (log_variance.clamp(-30, 20) / 2).exp()


def decode(vae, z, *, chunk=None):
    """Return images, (B, 3, 8 h, 8 w), of about [-1, 1], from unscaled latents.

    z: (B, 4, h, w) floating, else ValueError. Computes `chunk` images at a time, in the parameters'
    dtype; 256x256 takes 206 MB each in float32.
    """
    if z.ndim != 4 or z.shape[1] != 4 or not z.is_floating_point():
        raise ValueError(f"latents are {tuple(z.shape)} {z.dtype}: give (B, 4, h, w) floating")
    return in_chunks(decoder, vae, z, chunk)


def main():
    with torch.device("meta"), torch.no_grad():
        vae = {name: torch.empty(shape) for name, shape in shapes().items()}
        image, latent = torch.empty(1, 3, 256, 256), torch.empty(1, 4, 32, 32)
        print("half       parameters  of a 256x256 image, 2 x multiply-adds")
        for part, x, name in ((encoder, image, "encoder."), (decoder, latent, "decoder.")):
            with FlopCounterMode(display=False) as counter:
                part(vae, x)
            count = sum(p.numel() for key, p in vae.items() if key.startswith(name))
            print(f"{part.__name__}{count:14,}{counter.get_total_flops() / 1e9:10.0f} GFLOP")


if __name__ == "__main__":
    main()
