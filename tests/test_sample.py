"""sample.py: the picture it writes, noise that depends only on (seed, index), and bad input."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LAUNCH, fails, finish, start
from safetensors.torch import save_file

import data
import evaluate
import imf
import model
import runtime
import sample
import weights


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder with random weights for 1-channel 8x8 images of 10 classes."""
    g = torch.Generator().manual_seed(0)
    params = model.init((64, 1, 2), channels=1, classes=10, generator=g)
    params = {name: p + 0.05 * torch.randn(p.shape, generator=g) for name, p in params.items()}
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "ema-00000010.safetensors"
    save_file(params, path, {"kind": "pixels", "resolution": "8"})
    return tmp_path / "run", weights.load(path)


def test_the_readmes_command(checkpoint, monkeypatch, capsys):
    folder, sampler = checkpoint
    for source in (folder, folder / "ema-00000010.safetensors"):
        for steps in (1, 3):
            out = folder.parent / "new" / f"{steps}.png"
            words = ["--classes", "3,1,4", "--steps", str(steps), "--seed", "5", "--out", str(out)]
            sample.main([str(source), *words], runtime.World())
            assert capsys.readouterr().out == f"{out}: classes 3, 1, 4\n"
            picture, gap = np.asarray(Image.open(out)), sample.GAP
            assert picture.shape == (32 + 2 * gap, 3 * 32 + 4 * gap) and picture.dtype == np.uint8
            images = sample.generate(sampler, torch.tensor([3, 1, 4]), steps=steps, seed=5)
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
    assert not list(folder.parent.rglob(".*"))


def test_a_sample_depends_on_seed_and_index_alone(checkpoint):
    _, sampler = checkpoint
    classes, kw = torch.arange(23) % 10, dict(steps=2, seed=3)
    together = sample.generate(sampler, classes, **kw)
    assert (together - sample.generate(sampler, classes, batch=4, **kw)).abs().max() < 1e-5
    assert (together[:7] - sample.generate(sampler, classes[:7], **kw)).abs().max() < 1e-5
    assert torch.equal(sample.noise(3, [5], (1, 8, 8))[0], sample.noise(3, range(9), (1, 8, 8))[5])
    assert (sample.noise(3, range(9), (2,)) != sample.noise(4, range(9), (2,))).all()


def test_any_network_is_drawn_from_and_a_condition_may_be_any_nest_of_tensors():
    """Each sample with its own condition and noise, in batches of any size."""
    seen = []

    def net(params, factor):
        def u(z, t, r, y):
            seen.append(len(z))
            return z - params["w"] * factor * y["scale"][:, None] - y["parts"][0]

        return u

    sampler = weights.Sampler({"w": torch.tensor(2.0)}, net, [], "points", (3,), guidance=(5.0,))
    y = {"scale": torch.arange(7.0), "parts": (torch.randn(7, 3),)}
    whole = sample.generate(sampler, y, seed=4)
    assert (whole - (10 * y["scale"][:, None] + y["parts"][0])).abs().max() < 1e-4
    part = {"scale": y["scale"][[2, 6]], "parts": (y["parts"][0][[2, 6]],)}
    some = sample.generate(sampler, part, seed=4, steps=3, indices=[2, 6])
    assert (some - sample.generate(sampler, y, seed=4, steps=3, batch=2)[[2, 6]]).abs().max() < 1e-5
    assert seen == [7, *3 * [2], *9 * [2], *3 * [1]]


def test_a_grid_shows_its_classes_in_order_or_the_first_hundred_conditions():
    """Ten of each class in a row if there are ten or fewer; or one of each hundredth."""
    digits = data.digits()
    assert torch.equal(sample.choose_shown(digits), torch.arange(10).repeat_interleave(10))
    three = sample.choose_shown(digits._replace(classes=list("abc")))
    assert torch.equal(three, torch.arange(3).repeat_interleave(10))
    many = sample.choose_shown(digits._replace(classes=["x"] * 1000))
    assert torch.equal(many, 10 * torch.arange(100))
    y = torch.arange(1797), {"mask": torch.ones(1797, 2)}
    shown = sample.choose_shown(digits._replace(classes=[], labels=y))
    assert torch.equal(shown[0], torch.arange(100)) and shown[1]["mask"].shape == (100, 2)


def test_classes_take_turns_or_are_drawn():
    names, some = [*map(str, range(10))], ["3", "1"]
    assert sample.choose_labels(5, some, names).tolist() == [3, 1, 3, 1, 3]
    assert sample.choose_labels(12, None, names).tolist() == [*range(10), 0, 1]
    drawn = sample.choose_labels(200, some, names, uniform=True, seed=1)
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == {1, 3}
    assert 60 < (drawn == 3).sum() < 140
    assert torch.equal(drawn[:7], sample.choose_labels(7, some, names, uniform=True, seed=1))
    assert (drawn != sample.choose_labels(200, some, names, uniform=True, seed=2)).any()


def test_a_class_is_given_by_its_name_or_else_by_its_number(checkpoint, monkeypatch, capsys):
    """Folders 0 to 10 are sorted as words: the name wins, and the line says what was drawn."""
    names = ["0", "1", "10", "2", "a\x1b[2J", *"bcdef"]
    chosen = {"2": [3], "10": [2], "4": [4], "b": [5], "b,3,0,2": [5, 3, 0, 3], "9,f": [9, 9]}
    for classes, labels in chosen.items():
        found = sample.choose_labels(len(labels), classes.split(","), names)
        assert found.tolist() == labels and found.dtype == torch.int64
    for word in ("11", "-1", "02", " 2", "", "B"):
        with pytest.raises(ValueError, match=f'^class "{word}" is unknown: .* number from 0 to 9$'):
            sample.choose_labels(2, ["1", word], names)

    out, named = checkpoint[0].parent / "x.png", checkpoint[1]._replace(classes=names)
    monkeypatch.setattr(sample, "open_sampler", lambda *_, **__: named)
    for classes, told in {
        "2": 'classes 3 "2" (number 2 is "10")',
        "10,1": 'classes 2 "10", 1',
        "5,4": r'classes 5 "b", 4 "a\x1b[2J"',
        "3": 'classes 3 "2"',
    }.items():
        words = [str(checkpoint[0]), "--classes", classes]
        sample.main([*words, "--out", str(out)], runtime.World())
        assert capsys.readouterr().out == f"{out}: {told}\n"
    sample.main([str(checkpoint[0]), "--out", str(out)], runtime.World())
    assert capsys.readouterr().out == f"{out}\n"


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
        (
            ["--classes", "3,12"],
            'class "12" is unknown: give a class\'s name or a number from 0 to 9',
        ),
        (
            ["--classes", "-1"],
            'class "-1" is unknown: give a class\'s name or a number from 0 to 9',
        ),
        (
            ["--classes", "cat"],
            'class "cat" is unknown: give a class\'s name or a number from 0 to',
        ),
        (["--classes", "3,"], 'class "" is unknown: give a class\'s name or a number from 0 to 9'),
        (["--steps", "0"], "argument --steps: 0: give 1 to 2147483648"),
        (["--seed", str(2**64)], f"argument --seed: {2**64}: give {-(2**63)} to {2**63 - 1}"),
        (["--seed", str(-(2**63) - 1)], f"argument --seed: {-(2**63) - 1}: give {-(2**63)} to "),
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
        ("truncated", "cannot be read (Error while deserializing header: incomplete metadata"),
        ("text", "cannot be read (Error while deserializing header: header too large"),
    ],
)
def test_bad_checkpoints(monkeypatch, checkpoint, kind, words):
    path, out = checkpoint[0].parent / "weights.safetensors", checkpoint[0].parent / "out.png"
    damage(kind)(path, dict(checkpoint[1].params))
    message = fails(monkeypatch, "sample.py", path, "--out", out)
    assert words in message and not out.exists()
    assert kind == "channels" or str(path) in message


def test_missing_checkpoints(monkeypatch, tmp_path):
    assert "is not a file: give a run's folder, or .safetensors, .pt or .pth weights" in fails(
        monkeypatch, "sample.py", tmp_path / "no"
    )
    assert f"python train.py --out {tmp_path}" in fails(monkeypatch, "sample.py", tmp_path)


# --- single images ---


def test_samples_are_written_as_single_images(checkpoint, tmp_path, capsys):
    """As pictures, or as ADM's .npz, in colours, from which evaluate.py reads them."""
    folder, sampler = checkpoint
    words = [str(folder), "--count", "7", "--classes", "3,1", "--seed", "2", "--images"]
    labels = torch.tensor([3, 1, 3, 1, 3, 1, 3])
    x = sample.generate(sampler, labels, seed=2)
    want = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    for path in (tmp_path / "new" / "pictures", tmp_path / "new" / "x.npz"):
        sample.main([*words, str(path)], runtime.World())
        assert capsys.readouterr().out == f"{path}: classes 3, 1\n"
        images = torch.stack([*evaluate.load_images(path)])
        assert torch.equal(images, want.expand(-1, 3, -1, -1))
    with np.load(tmp_path / "new" / "x.npz") as file:
        assert file["arr_0"].shape == (7, 8, 8, 3) and file["arr_0"].dtype == np.uint8
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"pictures", "x.npz"}
    lock, *files = sorted((tmp_path / "new" / "pictures").iterdir())
    assert lock.name == ".lock" and [path.name for path in files] == [
        f"{k:06}.png" for k in range(7)
    ]
    assert (np.asarray(Image.open(files[5])) == want[5, 0].numpy()).all()


def test_samples_that_are_written_are_those_that_are_scored(checkpoint, tmp_path):
    flags = [str(checkpoint[0]), "--classes", "3,1", "--count", "60", "--steps", "2", "--uniform"]
    sample.main([*flags, "--images", str(tmp_path / "x.npz")], runtime.World())
    scored = []

    def draw(*arguments, whole=evaluate.draw_images, **options):
        for indices, images in whole(*arguments, **options):
            scored.append(images)
            yield indices, images

    with mock.patch.object(evaluate, "draw_images", draw):
        evaluate.main([*flags, "--ref", "digits"], runtime.World())
    images = torch.stack([*evaluate.load_images(tmp_path / "x.npz")])
    assert torch.equal(torch.cat(scored).expand(-1, 3, -1, -1), images)


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
    assert f"sample.py: {path} cannot be written (File too large): make room" in errors
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.slow  # starts processes
def test_two_processes_write_one_file(checkpoint, tmp_path):
    words = ["sample.py", checkpoint[0], "--count", "9", "--images"]
    [printed] = finish(start(*LAUNCH, 2, *words, tmp_path / "two.npz"))
    assert printed == f"{tmp_path / 'two.npz'}\n"
    sample.main([*map(str, words[1:]), str(tmp_path / "one.npz")], runtime.World())
    one, two = (np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "two.npz"))
    assert one.shape == two.shape and abs(one.astype(int) - two).max() <= 1


@pytest.mark.parametrize("flags", [["--images", "x.npz"], ["--images", "x"], ["--out", "x.png"]])
def test_samples_that_are_not_finite_are_no_images(checkpoint, monkeypatch, tmp_path, flags):
    sampler = checkpoint[1]
    bad = sampler._replace(params={name: p * 1e38 for name, p in sampler.params.items()})
    monkeypatch.setattr(sample, "open_sampler", lambda *_, **__: bad)
    words = [str(checkpoint[0]), flags[0], str(tmp_path / flags[1])]
    with pytest.raises(ValueError, match="samples have values that are not finite"):
        sample.main(words, runtime.World())
    assert not [p for p in tmp_path.rglob("x*") if p.is_file()]


def test_latents_that_a_vae_makes_infinite_are_no_images(monkeypatch):
    sampler = weights.Sampler({}, None, [], "latents", (4, 2, 2), vae=1.0)
    monkeypatch.setattr(sample, "decode", lambda vae, z: z[:, :3] / 0)
    with pytest.raises(ValueError, match="samples have values that are not finite"):
        sample.to_uint8(torch.ones(2, 4, 2, 2), sampler)


def meanwhile(monkeypatch, act):
    """Call act() once, in the midst of what is drawn first."""
    whole, acts = sample.draw_images, [act]

    def draw(*arguments, **options):
        for part in whole(*arguments, **options):
            while acts:
                acts.pop()()
            yield part

    monkeypatch.setattr(sample, "draw_images", draw)


@pytest.mark.parametrize("name", ["x.npz", "S.NPZ"])
def test_two_commands_that_write_one_file_do_not_mix(checkpoint, monkeypatch, tmp_path, name):
    """The first to finish has the file, the other is refused."""
    path, labels, world = tmp_path / "new" / name, torch.arange(120) % 10, runtime.World()
    sample.write_images(tmp_path / "want.npz", checkpoint[1], labels, world, seed=1)

    def other():
        sample.write_images(path, checkpoint[1], labels, world, seed=1)

    meanwhile(monkeypatch, other)
    with pytest.raises(OSError, match="cannot be written .another process has written it meanw"):
        sample.write_images(path, checkpoint[1], labels, world, seed=0)
    assert path.read_bytes() == (tmp_path / "want.npz").read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [name]
    with pytest.raises(OSError, match="cannot be written .it exists.: choose another place"):
        sample.write_images(path, checkpoint[1], labels, world)


def test_two_commands_that_write_one_folder_do_not_mix(checkpoint, monkeypatch, tmp_path):
    """The first has it; when it has ended, the folder is not empty. A lock alone is nothing."""
    path, refused, world = tmp_path / "new", [], runtime.World()
    path.mkdir()
    (path / ".lock").write_bytes(b"")

    def other():
        with pytest.raises(
            ValueError, match="another process is writing to .*new: wait until"
        ) as e:
            sample.write_images(path, checkpoint[1], torch.arange(2), world, seed=1)
        refused.append(e)

    meanwhile(monkeypatch, other)
    sample.write_images(path, checkpoint[1], torch.arange(3), world)
    assert refused and sorted(p.name for p in path.iterdir()) == [
        ".lock",
        *(f"{k:06}.png" for k in range(3)),
    ]
    with pytest.raises(ValueError, match="--images .*new is not empty: choose another folder"):
        sample.write_images(path, checkpoint[1], torch.arange(2), world)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(checkpoint, monkeypatch, tmp_path, error):
    def stop():
        raise error

    meanwhile(monkeypatch, stop)
    words = [str(checkpoint[0]), "--count", "3", "--images", str(tmp_path / "new" / "x.npz")]
    with pytest.raises((KeyboardInterrupt, OSError)):
        sample.main(words, runtime.World())
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--images", "tests"], "--images tests is not empty: choose another folder"),
        (["--images", "README.md"], "README.md is a file: choose another folder to write"),
        (["--images", "/dev/null"], "/dev/null is a file: choose another folder to write"),
        (["--count", "9"], "--count would be ignored without --images: leave it out"),
        (["--uniform"], "--uniform would be ignored without --images: leave it out"),
        (["--images", "new", "--out", "x.png"], "--out would be ignored with --images: leave it"),
        (["--images", "new", "--omega", "1,2"], "--omega takes one number with --images: leave"),
        (["--images", "new", "--count", "0"], "argument --count: 0: give 1 to 2147483648"),
        (["--vae", "x"], "run makes pixels: leave it out"),
        (["--scale", "1"], "--scale would be ignored as "),
        (["--scale", "0"], "argument --scale: 0: give a number above 0"),
        (["--omega", "0"], "--omega would be ignored as "),
        (["--interval", "0.4"], "argument --interval: 0.4: give numbers, two times, as 0.4,0.65"),
        (["--convention", "ours"], "argument --convention: invalid choice: 'ours' (choose from"),
        (["--fid", "digits"], "unrecognized arguments: --fid digits"),
    ],
)
def test_arguments_that_do_not_fit(monkeypatch, checkpoint, flags, words):
    assert words in fails(monkeypatch, "sample.py", checkpoint[0], *flags)


def test_a_process_without_a_share_draws_nothing(checkpoint):
    """Four processes draw two samples: two of them have none, and the others theirs."""
    sampler, seen = checkpoint[1], []
    whole = [*sample.draw_images(sampler, torch.arange(2), runtime.World())]
    for rank in range(4):
        drawn = sample.draw_images(sampler, torch.arange(2), runtime.World(rank, 4))
        seen.append([(list(indices), images) for indices, images in drawn])
    assert [[indices for indices, _ in part] for part in seen] == [[[0]], [[1]], [], []]
    for rank in (0, 1):
        assert (seen[rank][0][1][0].int() - whole[0][1][rank].int()).abs().max() <= 1


def test_without_classes_ten_are_drawn_in_turn(checkpoint, monkeypatch, tmp_path):
    seen, three = [], checkpoint[1]._replace(classes=["a", "b", "c"])
    monkeypatch.setattr(sample, "open_sampler", lambda *_, **__: three)

    def generate(sampler, y, **_):
        seen.append(y.tolist())
        return torch.zeros(len(y), *sampler.shape)

    monkeypatch.setattr(sample, "generate", generate)
    sample.main([str(checkpoint[0]), "--out", str(tmp_path / "x.png")], runtime.World())
    assert seen == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]


def test_only_the_first_process_writes_the_picture(checkpoint, tmp_path, capsys):
    sample.main([str(checkpoint[0]), "--out", str(tmp_path / "x.png")], runtime.World(1, 2))
    assert not (tmp_path / "x.png").exists() and not capsys.readouterr().out


def test_latents_become_images(monkeypatch):
    """Through the VAE, unscaled; or their first three channels as colours."""
    x = torch.linspace(-3, 3, 2 * 4 * 2 * 2).reshape(2, 4, 2, 2)
    sampler = weights.Sampler({}, None, [], "latents", (4, 2, 2))
    shown = sample.to_uint8(x, sampler)
    want = ((x[:, :3] / 3 + 1) * 127.5).round().clamp(0, 255).byte()
    assert shown.dtype == torch.uint8 and torch.equal(shown, want)
    monkeypatch.setattr(sample, "decode", lambda vae, z: z[:, :3].repeat_interleave(8, 2) * vae)
    decoded = sample.to_uint8(x * 0.18215 / 3, sampler._replace(vae=1.0))
    assert torch.equal(decoded, want.repeat_interleave(8, 2))
    shift, scale = imf.normalization()
    own = sampler._replace(vae=1.0, shift=shift, scale=scale)
    decoded = sample.to_uint8((x / 3 - shift) * scale, own)
    assert (decoded.int() - want.repeat_interleave(8, 2).int()).abs().max() <= 1
    assert torch.equal(
        sample.to_uint8(torch.tensor([-2.0, -1, 0, 1, 2]), sampler._replace(kind="pixels")),
        torch.tensor([0, 0, 128, 255, 255], dtype=torch.uint8),
    )


def test_pictures_may_have_suffixes_in_capitals(tmp_path):
    sample.save_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "x.PNG")
    assert Image.open(tmp_path / "x.PNG").size == (40, 40)
