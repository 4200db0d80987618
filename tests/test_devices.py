"""Nothing stays behind on the CPU: what is computed elsewhere is wholly computed there.

The device "meta" holds no values and mixes with no other, so that a tensor that is made on the CPU
by mistake raises an error; a GPU would raise the same one.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import dual
import evaluate
import fid
import imf
import meanflow
import model
import sample
import train
import vae
import weights

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Autocast does not know the device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def meta(shapes):
    return {name: torch.empty(shape, device=META) for name, shape in shapes.items()}


def dit(size=(128, 2, 2), channels=4, classes=10):
    return meta(model.shapes(model.Config(*size, channels, classes)))


def batch(rows=8, side=8):
    x, t = torch.empty(rows, 4, side, side, device=META), torch.empty(rows, device=META)
    y = torch.empty(rows, dtype=torch.int64, device=META)
    return x, y, meanflow.Draws(x, t, t, torch.empty(rows, dtype=torch.bool, device=META))


def test_the_losses():
    x, y, draws = batch()
    params = {name: torch.nn.Parameter(p) for name, p in dit().items()}
    net = partial(model.dit, params)
    for options in (dict(omega=0.2, kappa=0.9, interval=(0, 0.5)), {}):
        rows, raw = meanflow.loss(net, x, y, draws, null=10, **options)
        assert rows.device == raw.device == META
        for jvp in (torch.func.jvp, dual.jvp):
            rows, raw = meanflow.fast_loss(net, x, y, draws, null=10, jvp=jvp, equal=6, **options)
            rows.mean().backward()
            assert rows.device == raw.device == META
    assert all(p.grad.device == META for p in params.values())


def test_a_training_step():
    params = {name: torch.nn.Parameter(p) for name, p in dit().items()}
    guidance = train.RECIPES["XL/2"].guidance
    method = train.dit_method("XL/2", channels=4, classes=10, guidance=guidance)
    loss, rows = train.Objective(method.loss, params)(*batch(), 6)
    loss.backward()
    assert rows.shape == (8, 4) and rows.device == META


def test_a_training_step_of_imf():
    config = imf.Config(128, 1, 1, 2, 4, 10, True)
    params = {name: torch.nn.Parameter(p) for name, p in meta(imf.shapes(config)).items()}
    x, y, draws = batch()
    draws = imf.Draws(*draws, *3 * [draws.t])
    method = train.imf_method("iB/2", channels=4, classes=10, kind="latents")
    loss, rows = train.Objective(method.loss, params)(x, y, draws, 6)
    loss.backward()
    assert rows.shape == (8, 5) and rows.device == META
    assert all(p.grad.device == META for p in params.values())


def test_sampling(monkeypatch):
    params = dit()
    e = torch.empty(3, 4, 8, 8, device=META)
    y = torch.empty(3, dtype=torch.int64, device=META)
    for steps in (1, (1, 0.5, 0)):
        assert meanflow.sample(partial(model.dit, params), e, y, steps).device == META
    classes, decoder = [str(k) for k in range(10)], meta(vae.shapes())
    sampler = weights.Sampler(params, weights.dit_net, classes, "latents", (4, 8, 8), vae=decoder)
    for labels in (y, torch.tensor([1, 2, 3])):
        assert sample.generate(sampler, labels, steps=2).device == META
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: x)  # META holds no values
    monkeypatch.setattr(torch.Tensor, "all", lambda _: True)
    shift, scale = (a.to(META) for a in imf.normalization())
    for made in (sampler, sampler._replace(shift=shift, scale=scale)):
        x = sample.to_uint8(e, made)
        assert x.device == META and x.shape == (3, 3, 64, 64)


def test_the_vae():
    params = meta(vae.shapes())
    images = torch.empty(2, 3, 32, 32, device=META)
    mean, deviation = vae.encode(params, images)
    assert mean.device == deviation.device == vae.decode(params, mean).device == META


def test_inception():
    params = fid.fold(meta(fid.inception_shapes()))
    images = torch.empty(2, 3, 40, 30, dtype=torch.uint8, device=META)
    for form in (images, [images[0], images[1, :, :20]]):
        features, logits = fid.inception(params, form)
        assert features.device == logits.device == META
    state = fid.accumulate(fid.accumulate(None, features), features)
    assert state[1].device == state[2].device == META
    assert evaluate.pixels(images)[0].device == META
