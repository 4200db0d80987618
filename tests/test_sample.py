"""sample.py: the picture it writes, noise that depends only on (seed, index), and bad input."""

import json
from unittest import mock

import numpy as np
import pytest
import test_inception
import torch
from conftest import paint
from PIL import Image
from processes import LAUNCH, fails, finish, start
from safetensors.torch import save_file

import data
import fid
import model
import sample


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder with random weights for 1-channel 8x8 images of 10 classes."""
    g = torch.Generator().manual_seed(0)
    params = model.init((64, 1, 2), channels=1, classes=10, generator=g)
    params = {name: p + 0.05 * torch.randn(p.shape, generator=g) for name, p in params.items()}
    (tmp_path / "run").mkdir()
    save_file(
        params, tmp_path / "run" / "ema-00000010.safetensors", {"kind": "pixels", "resolution": "8"}
    )
    return tmp_path / "run", params


def test_the_readmes_command(checkpoint, monkeypatch, capsys):
    folder, params = checkpoint
    for source in (folder, folder / "ema-00000010.safetensors"):
        for steps in (1, 3):
            out = folder.parent / "new" / f"{steps}.png"
            sample.main(
                [
                    str(source),
                    "--classes",
                    "3,1,4",
                    "--steps",
                    str(steps),
                    "--seed",
                    "5",
                    "--out",
                    str(out),
                ],
                data.World(),
            )
            assert capsys.readouterr().out == f"{out}\n"
            picture, gap = np.asarray(Image.open(out)), sample.GAP
            assert picture.shape == (32 + 2 * gap, 3 * 32 + 4 * gap) and picture.dtype == np.uint8
            images = sample.generate(params, [3, 1, 4], (1, 8, 8), steps=steps, seed=5)
            for i, image in enumerate(images.clamp(-1, 1)):
                tile = picture[gap : gap + 32, gap + i * (32 + gap) :][:, :32]
                want = (
                    ((image[0] + 1) * 127.5)
                    .round()
                    .byte()
                    .repeat_interleave(4, 0)
                    .repeat_interleave(4, 1)
                )
                assert (tile == want.numpy()).all()
    assert not list(folder.parent.rglob("*tmp-*"))


def test_the_newest_averaged_weights_of_a_folder_are_taken(checkpoint):
    folder, params = checkpoint
    doubled, path = {name: 2 * p for name, p in params.items()}, folder / "ema-00000100.safetensors"
    save_file(doubled, path, {"kind": "pixels", "resolution": "8"})
    save_file({"weights.x": torch.zeros(1)}, folder / "state-00000200.safetensors")
    got = sample.load(folder).params
    assert all(torch.equal(got[name], 2 * p) for name, p in params.items())


def test_a_sample_depends_on_seed_and_index_alone(checkpoint):
    _, params = checkpoint
    classes, kw = torch.arange(23) % 10, dict(steps=2, seed=3)
    together = sample.generate(params, classes, (1, 8, 8), **kw)
    assert (
        together - sample.generate(params, classes, (1, 8, 8), batch=4, **kw)
    ).abs().max() < 1e-5
    assert (together[:7] - sample.generate(params, classes[:7], (1, 8, 8), **kw)).abs().max() < 1e-5
    assert torch.equal(sample.noise(3, [5], (1, 8, 8))[0], sample.noise(3, range(9), (1, 8, 8))[5])
    assert (sample.noise(3, range(9), (2,)) != sample.noise(4, range(9), (2,))).all()


def test_colour_and_many_rows(tmp_path):
    images = (torch.arange(13 * 3 * 40 * 36) % 251).byte().reshape(13, 3, 40, 36)
    sample.save_grid(images, tmp_path / "colour.png", columns=5)
    picture, gap = np.asarray(Image.open(tmp_path / "colour.png")), sample.GAP
    assert picture.shape == (3 * (40 + gap) + gap, 5 * (36 + gap) + gap, 3)
    tile = picture[gap + 2 * (40 + gap) :, gap + 2 * (36 + gap) :][:40, :36]
    assert (tile == images[12].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--classes", "3,12"], "class 12 is out of range"),
        (["--classes", "-1"], "class -1 is out of range"),
        (
            ["--classes", "cat"],
            "--classes cat: give numbers separated by commas, as 3,1,4",
        ),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--steps", "two"], "argument --steps: invalid int value: 'two'"),
        (["--out", "digits"], "digits has an unsupported image suffix: name it .png"),
    ],
)
def test_bad_arguments(monkeypatch, checkpoint, flags, words):
    out = checkpoint[0].parent / "out.png"
    out.write_bytes(b"old")
    assert words in fails(monkeypatch, "sample.py", checkpoint[0], "--out", out, *flags)
    assert out.read_bytes() == b"old"


def damage(name):
    def change(path, params):
        if name == "missing":
            params.pop("blocks.0.mlp.fc1.bias")
        elif name == "extra":
            params["blocks.0.mlp.fc3.bias"] = torch.zeros(3)
        elif name == "misshapen":
            params["blocks.0.attn.qkv.weight"] = torch.zeros(3, 64)
        elif name == "channels":
            params |= model.init(
                (64, 1, 2), channels=4, classes=10, generator=torch.Generator().manual_seed(0)
            )
        save_file(params, path, {"kind": "pixels", "resolution": "8"})
        if name == "truncated":
            path.write_bytes(path.read_bytes()[:-7])
        elif name == "text":
            path.write_text("<html>not found</html>")

    return change


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            "missing",
            "blocks.0.mlp.fc1.bias is missing, should be (256,): "
            "give a run's folder, or .safetensors, .pt or .pth weights",
        ),
        ("extra", "blocks.0.mlp.fc3.bias is (3,), should be absent"),
        ("misshapen", "blocks.0.attn.qkv.weight is (3, 64), should be (192, 64)"),
        ("channels", "images of 4 channels cannot be shown"),
        ("truncated", "is not a whole safetensors file"),
        ("text", "is not a whole safetensors file"),
    ],
)
def test_bad_checkpoints(monkeypatch, checkpoint, kind, words):
    path, out = checkpoint[0].parent / "weights.safetensors", checkpoint[0].parent / "out.png"
    damage(kind)(path, dict(checkpoint[1]))
    message = fails(monkeypatch, "sample.py", path, "--out", out)
    assert words in message and not out.exists()
    assert kind == "channels" or str(path) in message


def test_missing_checkpoints(monkeypatch, tmp_path):
    assert "is not a file: give a run's folder, or .safetensors, .pt or .pth weights" in fails(
        monkeypatch, "sample.py", tmp_path / "no"
    )
    assert f"python train.py --out {tmp_path}" in fails(monkeypatch, "sample.py", tmp_path)


# --- how good samples are ---


def scored(capsys, folder, *flags):
    sample.main(
        [str(folder), "--fid", "digits", "--count", "60", *(str(f) for f in flags)], data.World()
    )
    return json.loads(capsys.readouterr().out)


def test_fid_of_samples_in_one_line(checkpoint, tmp_path, capsys):
    folder, params = checkpoint
    result = scored(capsys, folder, "--steps", "2", "--seed", "3", "--images", tmp_path / "images")
    samples = sample.generate(params, torch.arange(60) % 10, (1, 8, 8), steps=2, seed=3)
    quantised = ((samples.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    digits = (data.digits().items.add(1).mul(127.5).round() / 127.5 - 1).flatten(1)
    want = fid.frechet_distance(
        *fid.statistics(fid.accumulate(None, quantised.flatten(1))),
        *fid.statistics(fid.accumulate(None, digits)),
    )
    assert result["fid"] == pytest.approx(want.item(), rel=1e-6) and "is" not in result
    assert {key: result[key] for key in ("count", "steps", "seed", "classes", "features")} == {
        "count": 60,
        "steps": 2,
        "seed": 3,
        "classes": "balanced",
        "features": "raw pixels in [-1, 1]",
    }
    assert (
        result["weights"].endswith(data.sha256(folder / "ema-00000010.safetensors"))
        and result["vae"] is None
    )
    files = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in files] == [f"{k:06}.png" for k in range(60)]
    assert (
        np.asarray(Image.open(files[7])) == ((quantised[7, 0] + 1) * 127.5).round().numpy()
    ).all()


def test_samples_are_kept_without_a_reference(checkpoint, tmp_path, capsys):
    """As pictures, or as ADM's .npz, in colours, from which fid.py reads them."""
    folder, params = checkpoint
    words = [str(folder), "--count", "7", "--classes", "3,1", "--seed", "2", "--images"]
    labels = torch.tensor([3, 1, 3, 1, 3, 1, 3])
    x = sample.generate(params, labels, (1, 8, 8), seed=2)
    want = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    for path in (tmp_path / "new" / "pictures", tmp_path / "new" / "x.npz"):
        sample.main([*words, str(path)], data.World())
        assert capsys.readouterr().out == f"{path}\n"
        images = torch.stack([*fid.load_images(path)])
        assert torch.equal(images, want.expand(-1, 3, -1, -1))
    with np.load(tmp_path / "new" / "x.npz") as file:
        assert file["arr_0"].shape == (7, 8, 8, 3) and file["arr_0"].dtype == np.uint8
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"pictures", "x.npz"}
    line = scored(capsys, folder, "--classes", "3,1", "--images", tmp_path / "y.npz")
    assert line["classes"] == "balanced, of 3,1" and line["count"] == 60
    assert len([*fid.load_images(tmp_path / "y.npz")]) == 60


@pytest.mark.slow  # starts processes
def test_a_full_disk_ends_with_one_line_and_leaves_nothing(checkpoint, tmp_path):
    """A limit on file size stands in for a full disk: the same call fails, with another errno."""
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "sys.argv = ['sample.py', *sys.argv[1:]]; runpy.run_path('sample.py', run_name='__main__')"
    )
    path = tmp_path / "new" / "x.npz"
    full = start("-c", script, checkpoint[0], "--count", 900, "--images", path)
    _, errors = full.communicate(timeout=120)
    assert full.returncode == 1 and "Traceback" not in errors
    assert f"sample.py: {path} cannot be written ([Errno 27] File too large): make room" in errors
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.slow  # starts processes
def test_two_processes_write_one_file(checkpoint, tmp_path):
    words = ["sample.py", checkpoint[0], "--count", "9", "--images"]
    [printed] = finish(start(*LAUNCH, 2, *words, tmp_path / "two.npz"))
    assert printed == f"{tmp_path / 'two.npz'}\n"
    sample.main([*map(str, words[1:]), str(tmp_path / "one.npz")], data.World())
    one, two = (np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "two.npz"))
    assert one.shape == two.shape and abs(one.astype(int) - two).max() <= 1


@pytest.mark.slow
def test_grey_images_go_through_inception_as_colours(checkpoint, tmp_path, capsys):
    weights, ten = tmp_path / "inception.safetensors", data.digits()
    save_file(test_inception.weights(), weights)
    ten = ten._replace(items=ten.items[:10])
    words = [checkpoint[0], "--fid", "digits", "--count", "12", "--inception", weights]
    with mock.patch.object(data, "digits", lambda: ten):
        sample.main([str(word) for word in words], data.World())
    result = json.loads(capsys.readouterr().out)
    assert result["is"] >= 1 and result["is_splits"] == 10
    assert result["features"] == "Inception-v3 of 2015-12-05"


def test_samples_that_are_not_finite_have_no_distance(checkpoint):
    params = {name: p * 1e38 for name, p in checkpoint[1].items()}
    bad = sample.ImageModel(params, "pixels", (1, 8, 8), None)
    with pytest.raises(ValueError, match="samples have values that are not finite"):
        sample.evaluate(bad, sample.count_images, torch.arange(4), data.World())


def test_a_reference_of_other_features_is_refused_before_anything_is_drawn(
    checkpoint, monkeypatch, tmp_path
):
    np.savez(tmp_path / "x.npz", mu=np.zeros(5), sigma=np.eye(5))
    message = fails(monkeypatch, "sample.py", checkpoint[0], "--fid", tmp_path / "x.npz")
    assert (
        "x.npz has 5 features, images of (1, 8, 8) have 64: give or leave out --inception"
        in message
    )


def test_uniform_classes_depend_on_seed_and_index_alone(checkpoint, capsys):
    assert scored(capsys, checkpoint[0], "--uniform")["classes"] == "uniform"
    seen = []
    for count in (7, 60):
        labels = []

        def generate(params, classes, shape, **_):
            labels.append(classes)
            return torch.zeros(len(classes), *shape)

        with mock.patch.object(sample, "generate", generate):
            scored(capsys, checkpoint[0], "--uniform", "--count", count)
        seen.append(torch.cat(labels))
    assert torch.equal(seen[0], seen[1][:7]) and seen[1].bincount(minlength=10).float().std() > 0.5


@pytest.mark.slow  # starts processes
def test_two_processes_draw_the_same_samples(checkpoint, capsys):
    words = ["sample.py", checkpoint[0], "--fid", "digits", "--count", "60"]
    [printed] = finish(start(*LAUNCH, 2, *words))
    shared, alone = json.loads(printed), scored(capsys, checkpoint[0])
    assert shared.pop("fid") == pytest.approx(alone.pop("fid"), rel=1e-6) and shared == alone


@pytest.mark.slow  # starts processes
def test_two_processes_share_a_reference_whose_shards_are_odd(monkeypatch, tmp_path, capsys):
    paint(tmp_path / "images", 2, 5)
    monkeypatch.setattr(data, "SHARD", 5)
    data.main([str(tmp_path / "images"), str(tmp_path / "data"), "--resolution", "8"], data.World())
    capsys.readouterr()
    save_file(test_inception.weights(), tmp_path / "inception.safetensors")
    params = model.init(
        (64, 1, 2), channels=3, classes=2, generator=torch.Generator().manual_seed(0)
    )
    save_file(params, tmp_path / "x.safetensors", {"kind": "pixels", "resolution": "8"})
    words = [
        "sample.py",
        str(tmp_path / "x.safetensors"),
        "--fid",
        str(tmp_path / "data"),
        "--count",
        "12",
        "--inception",
        str(tmp_path / "inception.safetensors"),
    ]
    process = start(*LAUNCH, 2, *words)
    sample.main(words[1:], data.World())
    alone, [printed] = json.loads(capsys.readouterr().out), finish(process)
    for key in ("fid", "is"):
        assert json.loads(printed)[key] == pytest.approx(alone[key], rel=1e-5)


def test_what_data_py_wrote_is_a_reference_too(checkpoint, tmp_path, capsys):
    paint(tmp_path / "images", 2, 5)
    data.main([str(tmp_path / "images"), str(tmp_path / "data"), "--resolution", "8"], data.World())
    capsys.readouterr()
    params = model.init(
        (64, 1, 2), channels=3, classes=2, generator=torch.Generator().manual_seed(0)
    )
    save_file(params, tmp_path / "x.safetensors", {"kind": "pixels", "resolution": "8"})
    sample.main(
        [str(tmp_path / "x.safetensors"), "--fid", str(tmp_path / "data"), "--count", "20"],
        data.World(),
    )
    result = json.loads(capsys.readouterr().out)
    assert result["fid"] > 0 and result["reference"] == f"{tmp_path / 'data'}, 10 images"


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--fid", "no.npz"],
            "no.npz cannot be read ([Errno 2] No such file or directory: 'no.npz'): give images or",
        ),
        (
            ["--fid", "digits", "--images", "tests"],
            "--images tests already exists: give another name",
        ),
        (["--images", "README.md"], "--images README.md already exists: give another name"),
        (["--count", "9"], "--count would be ignored without --fid or --images: leave it out"),
        (["--uniform"], "--uniform would be ignored without --fid or --images: leave it out"),
        (["--inception", "x"], "--inception would be ignored without --fid: leave it out"),
        (["--fid", "digits", "--out", "x.png"], "--out would be ignored with --fid or --images:"),
        (["--vae", "x"], "run makes pixels: leave it out"),
        (["--scale", "1"], "--scale would be ignored as "),
        (["--scale", "0"], "--scale 0.0: give a number above 0"),
        (["--convention", "ours"], "argument --convention: invalid choice: 'ours' (choose from"),
        (["--fid", "digits", "--count", "1"], "--count 1: give 2 or more"),
        (
            ["--fid", "digits", "--inception", "no.pth"],
            "no.pth is not a file: fetch https://github.com/mseitzer/pytorch-fid",
        ),
    ],
)
def test_bad_evaluations(monkeypatch, checkpoint, flags, words):
    assert words in fails(monkeypatch, "sample.py", checkpoint[0], *flags)


def test_a_process_without_a_share_draws_nothing(checkpoint):
    """Four processes draw two samples: two of them have none, and the others theirs."""
    model = sample.load(checkpoint[0])
    shares = [
        sample.evaluate(model, sample.count_images, torch.arange(2), data.World(rank, 4))
        for rank in range(4)
    ]
    assert [share["count"] for share in shares] == [1, 1, 0, 0]


def test_without_classes_ten_are_drawn_in_turn(checkpoint, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sample, "parse_classes", lambda text, count: [0, 1, 2])
    monkeypatch.setattr(
        sample, "generate", lambda params, y, shape, **_: seen.append(y) or torch.zeros(10, *shape)
    )
    sample.main([str(checkpoint[0]), "--out", str(tmp_path / "x.png")], data.World())
    assert seen == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]


def test_only_the_first_process_writes_the_picture(checkpoint, tmp_path, capsys):
    sample.main([str(checkpoint[0]), "--out", str(tmp_path / "x.png")], data.World(1, 2))
    assert not (tmp_path / "x.png").exists() and not capsys.readouterr().out


def test_latents_become_images(monkeypatch):
    """Through the VAE, unscaled; or their first three channels as colours."""
    x = torch.linspace(-3, 3, 2 * 4 * 2 * 2).reshape(2, 4, 2, 2)
    model = sample.ImageModel({}, "latents", (4, 2, 2))
    shown = sample.to_uint8(x, model)
    want = ((x[:, :3] / 3 + 1) * 127.5).round().clamp(0, 255).byte()
    assert shown.dtype == torch.uint8 and torch.equal(shown, want)
    monkeypatch.setattr(data, "decode", lambda vae, z: z[:, :3].repeat_interleave(8, 2) * vae)
    decoded = sample.to_uint8(x * 0.18215 / 3, model._replace(vae=1.0))
    assert torch.equal(decoded, want.repeat_interleave(8, 2))
    assert torch.equal(
        sample.to_uint8(torch.tensor([-2.0, -1, 0, 1, 2]), model._replace(kind="pixels")),
        torch.tensor([0, 0, 128, 255, 255], dtype=torch.uint8),
    )


def test_pictures_may_have_suffixes_in_capitals(tmp_path):
    sample.save_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "x.PNG")
    assert Image.open(tmp_path / "x.PNG").size == (40, 40)
