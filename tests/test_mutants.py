"""Breaks the code on purpose, one line at a time, and sees that the test that guards the line fails."""

import inspect
import types
from functools import partial
from pathlib import Path

import pytest
import test_data
import test_fid
import test_inception
import test_meanflow
import test_model
import test_train
import test_vae
import torch

ROOT = Path(__file__).parent.parent
MODULES = test_meanflow, test_model, test_data, test_vae, test_fid, test_inception, test_train
dual = test_model.test_dit_jvp_is_torch_func_jvp
diffusers = [test_vae.test_agrees_with_diffusers, test_vae.SMALL, (40, 24), torch.float64, 1e-12]
authors = [test_meanflow.test_agrees_with_the_authors_code, "mix", {"kappa": 0.5}]

MUTANTS = {  # file: [(what is wrong, the right text, the wrong text, the test that must fail and its arguments)]
    "meanflow": [
        (
            "time runs backwards",
            "return (1 - t) * x + t * e",
            "return t * x + (1 - t) * e",
            test_meanflow.test_path_runs_from_data_to_noise_at_velocity_v,
        ),
        (
            "velocity from noise to data",
            "t * e, e - x",
            "t * e, x - e",
            test_meanflow.test_path_runs_from_data_to_noise_at_velocity_v,
        ),
        (
            "r's tangent is 1",
            "lambda z, t: net(z, t, r, y), (z.clone(), t.clone()), (v, torch.ones_like(t))",
            "lambda z, t, r: net(z, t, r, y), (z, t, r), (v, torch.ones_like(t), torch.ones_like(r))",
            test_meanflow.test_true_average_velocity_is_a_fixed_point_of_the_target,
        ),
        (
            "t's tangent is 0",
            "(v, torch.ones_like(t))",
            "(v, torch.zeros_like(t))",
            test_meanflow.test_true_average_velocity_is_a_fixed_point_of_the_target,
        ),
        (
            "z's tangent is 0",
            "(v, torch.ones_like(t))",
            "(0 * v, torch.ones_like(t))",
            test_meanflow.test_true_average_velocity_is_a_fixed_point_on_a_mixture,
        ),
        (
            "the identity's sign",
            "return v - append_dims(t - r, v)",
            "return v + append_dims(t - r, v)",
            test_meanflow.test_true_average_velocity_is_a_fixed_point_of_the_target,
        ),
        (
            "the target is the prediction",
            "return identity(v, t, r, derivative(net, z, t, r, v, y, jvp=jvp))",
            "return net(z, t, r, y)",
            test_meanflow.test_conditional_velocity_has_another_target,
        ),
        (
            "a clipped tangent",
            "(v, torch.ones_like(t))",
            "(v.clamp(-1, 1), torch.ones_like(t))",
            test_meanflow.test_target_is_affine_in_v,
        ),
        (
            "t for t - r",
            "return v - append_dims(t - r, v)",
            "return v - append_dims(t, v)",
            test_meanflow.test_target_is_v_where_r_equals_t,
        ),
        (
            "a gradient through the target",
            "@torch.no_grad()\ndef target",
            "def target",
            test_meanflow.test_no_gradient_flows_through_target_and_guidance,
        ),
        (
            "a gradient through the guidance",
            "@torch.no_grad()\ndef guide",
            "def guide",
            test_meanflow.test_no_gradient_flows_through_target_and_guidance,
        ),
        (
            "null for class velocity",
            "kappa * (net(z, t, t, y)",
            "kappa * (net(z, t, t, torch.full_like(y, null))",
            test_meanflow.test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa,
        ),
        (
            "class for null velocity",
            "net(z, t, t, torch.full_like(y, null))",
            "net(z, t, t, y)",
            test_meanflow.test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa,
        ),
        (
            "1 - omega without kappa",
            "(1 - omega - kappa) * net",
            "(1 - omega) * net",
            test_meanflow.test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa,
        ),
        (
            "guidance always evaluates",
            "if omega == 1 and kappa == 0:",
            "if False:",
            test_meanflow.test_omega_1_kappa_0_is_no_guidance_and_needs_no_network,
        ),
        (
            "dropped rows are guided",
            "& (y != null)",
            "",
            test_meanflow.test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval,
        ),
        (
            "no upper end of the interval",
            "& (t <= interval[1])",
            "",
            test_meanflow.test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval,
        ),
        (
            "no lower end of the interval",
            "(interval[0] <= t) & ",
            "",
            test_meanflow.test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval,
        ),
        (
            "labels are not dropped",
            "    e, t, r, drop = draws\n    y = torch.where(drop, null, y)\n    z, v = interpolate(x, e, t)\n    v = guide",
            "    e, t, r, drop = draws\n    z, v = interpolate(x, e, t)\n    v = guide",
            test_meanflow.test_the_loss_is_the_papers_algorithm,
        ),
        (
            "one row too many is taken for r = t",
            "n = [*(t == r).tolist(), False].index(False)",
            "n = int((t == r).sum())",
            test_meanflow.test_the_fast_loss_is_the_loss,
        ),
        (
            "the r != t rows see no guidance",
            "v_differ = guided(z[n:], t[n:], v[n:], y[n:])",
            "v_differ = v[n:]",
            test_meanflow.test_the_fast_loss_is_the_loss,
        ),
        (
            "a mean where the paper sums",
            ".flatten(1).sum(1)",
            ".flatten(1).mean(1)",
            test_meanflow.test_squared_error_is_summed_not_averaged,
        ),
        (
            "a squared squared error",
            ".square().flatten(1).sum(1)",
            ".square().flatten(1).sum(1).square()",
            test_meanflow.test_squared_error_is_summed_not_averaged,
        ),
        (
            "a gradient through the weight",
            "s / (s.detach() + c) ** p",
            "s / (s + c) ** p",
            test_meanflow.test_gradient_is_that_of_the_squared_error_times_a_constant_weight,
        ),
        (
            "a weight with p / 2",
            "(s.detach() + c) ** p",
            "(s.detach() + c) ** (p / 2)",
            test_meanflow.test_gradient_is_that_of_the_squared_error_times_a_constant_weight,
        ),
        (
            "the velocity at r for the class velocity",
            "v_class=u[:n]",
            "v_class=u[-n:]",
            test_meanflow.test_the_fast_loss_is_the_loss,
        ),
        (
            "the loss pulls the target, too",
            "u - u_tgt.detach()",
            "u - u_tgt",
            test_meanflow.test_the_target_is_held_fixed_whatever_dual_returns,
        ),
        (
            "samples step up",
            "z - append_dims(t - r, z) * net",
            "z + append_dims(t - r, z) * net",
            test_meanflow.test_any_number_of_steps_lands_where_the_ode_does,
        ),
        (
            "every step starts from the noise",
            "z = z - append_dims(t - r, z) * net(z",
            "z = z - append_dims(t - r, z) * net(e",
            test_meanflow.test_displacements_add_up_along_the_flow,
        ),
        (
            "samples by the velocity",
            "net(z, t, r, y)\n    return z",
            "net(z, t, t, y)\n    return z",
            test_meanflow.test_any_number_of_steps_lands_where_the_ode_does,
        ),
        (
            "r = t by chance",
            "row < int(share * batch)",
            "torch.rand(batch, generator=generator) < share",
            test_meanflow.test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first,
        ),
        (
            "the share is of r != t",
            "row < int(share * batch)",
            "row >= int(share * batch)",
            test_meanflow.test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first,
        ),
        (
            "uniform times",
            "r, t = torch.sigmoid(logits)",
            "r, t = torch.rand_like(logits)",
            test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe,
        ),
        (
            "0.4 for -0.4",
            "mean=-0.4",
            "mean=0.4",
            test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe,
        ),
        (
            "0.25 for 0.75",
            "share=0.75",
            "share=0.25",
            test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe,
        ),
        (
            "randn() < p",
            "torch.rand(batch,",
            "torch.randn(batch,",
            test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe,
        ),
        (
            "a fixed number of dropped labels",
            "(torch.rand(batch, generator=generator, device=device) < drop).sum()",
            "int(drop * batch)",
            test_meanflow.test_the_number_of_dropped_rows_is_binomial,
        ),
        (
            "dropped rows anywhere",
            "return Draws(e, t, r, row < dropped)",
            "return Draws(e, t, r, row >= batch - dropped)",
            test_meanflow.test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first,
        ),
        (
            "labels are not dropped in the fast loss",
            "    e, t, r, drop = draws\n    y = torch.where(drop, null, y)\n    z, v = interpolate(x, e, t)\n    n =",
            "    e, t, r, drop = draws\n    z, v = interpolate(x, e, t)\n    n =",
            test_meanflow.test_the_fast_loss_is_the_loss,
        ),
        (
            "the loss is not guided",
            "    v = guide(net, z, t, v, y, null=null, omega=omega, kappa=kappa, interval=interval)",
            "    v = v",
            test_meanflow.test_the_loss_is_the_papers_algorithm,
        ),
        (
            "no row is known to have r = t",
            "n = [*(t == r).tolist(), False].index(False)",
            "n = 0",
            test_meanflow.test_rows_with_r_equal_t_are_known_without_a_jvp,
        ),
        (
            "the fast loss forgets du/dt",
            "identity(v_differ, t[n:], r[n:], dudt)",
            "v_differ",
            test_meanflow.test_the_fast_loss_is_the_loss,
        ),
    ],
    "model": [
        (
            "sines first in the time embedding",
            "torch.cat((cos, sin), -1)",
            "torch.cat((sin, cos), -1)",
            authors,
        ),
        (
            "times scaled by 1000",
            "frequencies = torch.exp(",
            "frequencies = 1000 * torch.exp(",
            authors,
        ),
        ("conditioned on r for t - r", '"h_embedder", t - r)  #', '"h_embedder", r)  #', authors),
        ("the row before the column", "in (column, row)]", "in (row, column)]", authors),
        (
            "cosines first in the positions",
            "in (torch.sin, torch.cos)]",
            "in (torch.cos, torch.sin)]",
            authors,
        ),
        (
            "exact GELU",
            'F.gelu(linear(params, f"{name}.fc1", x), approximate="tanh")',
            'F.gelu(linear(params, f"{name}.fc1", x))',
            authors,
        ),
        ("eps of 1e-5", "EPS = 1e-6", "EPS = 1e-5", authors),
        ("no SiLU before the modulation", "c = F.silu(c + ", "c = (c + ", authors),
        (
            "scale before shift",
            "shift1, scale1, gate1, shift2, scale2, gate2 = modulation",
            "scale1, shift1, gate1, shift2, scale2, gate2 = modulation",
            authors,
        ),
        (
            "channels before pixels",
            "x.permute(0, 5, 1, 3, 2, 4)",
            "x.permute(0, 5, 1, 4, 2, 3)",
            authors,
        ),
        (
            "a default-init DiT",
            'or name.startswith("final_layer")',
            "",
            test_model.test_initial_weights,
        ),
        (
            "Xavier over the kernel's area",
            "math.prod(shape[1:])",
            "shape[1]",
            test_model.test_initial_weights,
        ),
        (
            "no limit of 16 heads",
            "max(1, min(16, qkv.shape[-1] // 3 // 64))",
            "max(1, qkv.shape[-1] // 3 // 64)",
            [test_model.test_heads_of_every_size, 1152, 16],
        ),
        (
            "LayerNorm over the batch",
            "    return F.layer_norm(x, x.shape[-1:], eps=EPS)",
            "    return x - x.mean(0)",
            test_model.test_no_layer_mixes_samples,
        ),
        (
            "the first rows for the last",
            "return x[len(x) - len(dx) :]",
            "return x[: len(dx)]",
            dual,
        ),
        (
            "a graph for tangents",
            "return x[len(x) - len(dx) :].detach()",
            "return x[len(x) - len(dx) :]",
            dual,
        ),
        (
            "a bias in a tangent",
            'F.linear(dx, params[f"{name}.weight"].detach())',
            'F.linear(dx, params[f"{name}.weight"].detach(), params[f"{name}.bias"].detach())',
            dual,
        ),
        (
            "the weights' graph in a tangent",
            'F.linear(dx, params[f"{name}.weight"].detach())',
            'F.linear(dx, params[f"{name}.weight"])',
            dual,
        ),
        (
            "cosine's derivative without its sign",
            "torch.cat((-sin * frequencies",
            "torch.cat((sin * frequencies",
            dual,
        ),
        (
            "a tangent keeps its mean",
            "dn = dx - dx.mean(-1, keepdim=True) - n",
            "dn = dx - n",
            dual,
        ),
        (
            "a tangent keeps its part along the output",
            "- n * (n * dx).mean(-1, keepdim=True)",
            "",
            dual,
        ),
        (
            "LayerNorm's tangent undivided",
            "keepdim=True) + EPS).rsqrt()",
            "keepdim=True) + EPS)",
            dual,
        ),
        ("the shift's tangent is lost", "* dscale + dshift", "* dscale", dual),
        ("the scale's tangent is lost", " + tail(x, dx) * dscale", "", dual),
        ("the gate's tangent is lost", "dx + dgate * tail(branch, dx) + ", "dx + ", dual),
        ("the keys' tangent is lost", "(dq @ k.mT + q @ dk.mT)", "(dq @ k.mT)", dual),
        ("the queries' tangent is lost", "(dq @ k.mT + q @ dk.mT)", "(q @ dk.mT)", dual),
        ("the values' tangent is lost", "+ p.to(q.dtype) @ dv", "", dual),
        (
            "softmax without its normaliser's tangent",
            "- (p * ds).sum(-1, keepdim=True))",
            ")",
            dual,
        ),
        ("scores' tangents unscaled", "q @ dk.mT) * scale", "q @ dk.mT)", dual),
        (
            "a tangent's residual stream in bfloat16",
            "w.detach().flatten(1)).to(x.dtype)",
            "w.detach().flatten(1))",
            test_model.test_tangents_in_bfloat16,
        ),
        ("exact GELU in the tangent", 'tail(x, dx), approximate="tanh")', "tail(x, dx))", dual),
    ],
    "data": [
        (
            "a new order every step",
            "epochs = places // count",
            "epochs = places // batch",
            test_data.test_every_epoch_visits_every_item_once,
        ),
        (
            "one order for all epochs",
            'generator(seed, "order", epoch))',
            'generator(seed, "order", 0))',
            test_data.test_epochs_and_seeds_differ_in_order,
        ),
        (
            "blocks of rows for a rank",
            "    mine = slice(rank, None, world)",
            "    mine = slice(rank * size // world, (rank + 1) * size // world)",
            [
                test_data.test_batches_are_the_same_from_any_step_and_for_any_number_of_processes,
                "pixels",
                2,
            ],
        ),
        (
            "noise of its own for each process",
            "torch.randn((size, *dataset.shape), generator=views)[mine]",
            "torch.randn((len(rows), *dataset.shape), generator=views)",
            [
                test_data.test_batches_are_the_same_from_any_step_and_for_any_number_of_processes,
                "latents",
                2,
            ],
        ),
        (
            "views of its own for each process",
            "torch.randint(2, (size,), generator=views)[mine]",
            "torch.randint(2, (len(rows),), generator=views)",
            [
                test_data.test_batches_are_the_same_from_any_step_and_for_any_number_of_processes,
                "pixels",
                4,
            ],
        ),
        (
            "the same view at every visit",
            'generator(seed, "views", step)',
            'generator(seed, "views", 0)',
            test_data.test_a_latent_is_a_fresh_sample_of_its_posterior_or_of_its_mirror_images,
        ),
        (
            "the posterior's mean for a sample",
            "mean + std * torch",
            "mean + 0 * torch",
            test_data.test_a_latent_is_a_fresh_sample_of_its_posterior_or_of_its_mirror_images,
        ),
        (
            "the scale that others copied",
            "SCALE = 0.18215",
            "SCALE = 0.18125",
            test_data.test_a_latent_is_a_fresh_sample_of_its_posterior_or_of_its_mirror_images,
        ),
        (
            "latents are not mirrored",
            "dataset.shards[s][i, m]",
            "dataset.shards[s][i, 0]",
            test_data.test_a_latent_is_a_fresh_sample_of_its_posterior_or_of_its_mirror_images,
        ),
        (
            "pixels are not mirrored",
            "None] == 1, x.flip(3), x)",
            "None] == 2, x.flip(3), x)",
            test_data.test_items_and_labels_belong_together_across_shards_and_both_views_are_seen,
        ),
        (
            "pixels stand on their heads",
            "x.flip(3), x)",
            "x.flip(2), x)",
            test_data.test_items_and_labels_belong_together_across_shards_and_both_views_are_seen,
        ),
        (
            "a row too far in the shards",
            "torch.searchsorted(starts, rows, right=True)",
            "torch.searchsorted(starts, rows)",
            test_data.test_items_and_labels_belong_together_across_shards_and_both_views_are_seen,
        ),
        (
            "mirrored digits",
            "if x.dtype == torch.uint8:",
            "if True:",
            test_data.test_digits_are_not_mirrored,
        ),
        ("GroupNorm's eps of 1e-5", "eps=1e-6", "eps=1e-5", diffusers),
        ("16 groups", "F.group_norm(x, 32,", "F.group_norm(x, 16,", diffusers),
        (
            "the downsampler padded all round",
            "x = F.pad(x, (0, 1, 0, 1))  #",
            "x = F.pad(x, (1, 1, 1, 1))  #",
            diffusers,
        ),
        (
            "the downsampler padded left and top",
            "F.pad(x, (0, 1, 0, 1))",
            "F.pad(x, (1, 0, 1, 0))",
            diffusers,
        ),
        (
            "queries for keys",
            'linear("to_q", h), linear("to_k", h), linear("to_v", h)',
            'linear("to_k", h), linear("to_q", h), linear("to_v", h)',
            diffusers,
        ),
        (
            "values for keys",
            'linear("to_q", h), linear("to_k", h), linear("to_v", h)',
            'linear("to_q", h), linear("to_v", h), linear("to_k", h)',
            diffusers,
        ),
        ("attention unscaled", 'linear("to_v", h))', 'linear("to_v", h), scale=1.0)', diffusers),
        (
            "attention of eight heads' scale",
            'linear("to_v", h))',
            'linear("to_v", h), scale=(h.shape[-1] / 8) ** -0.5)',
            diffusers,
        ),
        (
            "attention without its residual",
            'x + linear("to_out.0", h)',
            'linear("to_out.0", h)',
            diffusers,
        ),
        (
            "attention of the input before GroupNorm",
            'norm(vae, f"{name}.group_norm", x).flatten(2)',
            "x.flatten(2)",
            diffusers,
        ),
        (
            "rows and columns swapped after attention",
            ".mT.unflatten(2, x.shape[2:])",
            ".mT.unflatten(2, x.shape[2:][::-1]).mT",
            diffusers,
        ),
        (
            "one resnet in the middle",
            'return resnet(vae, f"{name}.resnets.1", attention(',
            "return (attention(",
            diffusers,
        ),
        (
            "no SiLU after the second norm",
            'F.silu(norm(vae, f"{name}.norm2", h))',
            'norm(vae, f"{name}.norm2", h)',
            diffusers,
        ),
        ("a resnet without its residual", "return x + h\n", "return h\n", diffusers),
        (
            "the shortcut forgotten",
            'x = conv(vae, f"{name}.conv_shortcut", x, padding=0)',
            "x = x[:, :1]",
            diffusers,
        ),
        (
            "no SiLU before the encoder's output",
            'F.silu(norm(vae, "encoder.conv_norm_out", middle(vae, "encoder.mid_block", x)))',
            'norm(vae, "encoder.conv_norm_out", middle(vae, "encoder.mid_block", x))',
            diffusers,
        ),
        ("the encoder without its middle", 'middle(vae, "encoder.mid_block", x)', "x", diffusers),
        (
            "the decoder without its middle",
            'x = middle(vae, "decoder.mid_block", x)',
            "pass",
            diffusers,
        ),
        (
            "quant_conv forgotten",
            'conv(vae, "quant_conv", conv(vae, "encoder.conv_out", x), padding=0)',
            'conv(vae, "encoder.conv_out", x)',
            diffusers,
        ),
        ("post_quant_conv forgotten", 'conv(vae, "post_quant_conv", z, padding=0)', "z", diffusers),
        ("bilinear for nearest", 'mode="nearest"', 'mode="bilinear"', diffusers),
        (
            "two resnets a level in the decoder",
            "for j in range(3):\n            x =",
            "for j in range(2):\n            x =",
            diffusers,
        ),
        (
            "one resnet a level in the encoder",
            "for j in range(2):\n            x =",
            "for j in range(1):\n            x =",
            diffusers,
        ),
        (
            "the log-variance not clamped",
            "log_variance.clamp(-30, 20)",
            "log_variance",
            test_vae.test_log_variance_is_clamped,
        ),
        (
            "the log-variance clamped to [-20, 30]",
            "clamp(-30, 20)",
            "clamp(-20, 30)",
            test_vae.test_log_variance_is_clamped,
        ),
        (
            "the variance for the deviation",
            "(log_variance.clamp(-30, 20) / 2).exp()",
            "log_variance.clamp(-30, 20).exp()",
            diffusers,
        ),
        (
            "mean and log-variance swapped",
            "mean, log_variance = in_chunks",
            "log_variance, mean = in_chunks",
            diffusers,
        ),
        (
            "SCALE applied in encode",
            "return mean.contiguous()",
            "return SCALE * mean.contiguous()",
            diffusers,
        ),
        (
            "latents divided by SCALE in decode",
            "return in_chunks(decoder, vae, z, chunk)",
            "return in_chunks(decoder, vae, z / SCALE, chunk)",
            diffusers,
        ),
        (
            "an output with the channels last",
            ".to(x.dtype, memory_format=torch.contiguous_format)",
            ".to(x.dtype)",
            diffusers,
        ),
        ("a mean that is a view", "mean.contiguous()", "mean", diffusers),
        (
            "the parameters' dtype for the inputs'",
            "torch.cat(parts).to(x.dtype, ",
            "torch.cat(parts).to(dtype, ",
            test_vae.test_bfloat16_is_close_and_gives_the_inputs_dtype,
        ),
        (
            "chunk ignored",
            "x.split(chunk)]",
            "x.split(len(x))]",
            [test_vae.test_chunks_do_not_matter, 2],
        ),
        (
            "a last chunk lost",
            "x.split(chunk)]",
            "x[: len(x) // chunk * chunk].split(chunk)]",
            [test_vae.test_chunks_do_not_matter, 2],
        ),
        (
            "decode ignores chunk",
            "in_chunks(decoder, vae, z, chunk)",
            "in_chunks(decoder, vae, z, 8)",
            [test_vae.test_chunks_do_not_matter, 2],
        ),
        (
            "encode ignores chunk",
            "in_chunks(encoder, vae, images, chunk)",
            "in_chunks(encoder, vae, images, 8)",
            [test_vae.test_chunks_do_not_matter, 2],
        ),
        (
            "a gradient-free half",
            'conv(vae, "decoder.conv_in", conv(',
            'conv(vae, "decoder.conv_in", 0 * conv(',
            test_vae.test_every_parameter_matters,
        ),
        (
            "a wrong count of tensors",
            "for j in range(depth):",
            "for j in range(2):",
            test_vae.test_count,
        ),
        (
            "a layer without a bias",
            "shape[:1] for name, shape in weights.items()}",
            'shape[:1] for name, shape in weights.items() if "quant" not in name}',
            test_vae.test_count,
        ),
        (
            "a crop from the corner",
            "(width - size) // 2, (height - size) // 2",
            "0, 0",
            test_data.test_centre_crop,
        ),
        (
            "nearest for cubic",
            "Image.Resampling.BICUBIC",
            "Image.Resampling.NEAREST",
            test_data.test_centre_crop,
        ),
        (
            "no averaging",
            "Image.Resampling.BOX",
            "Image.Resampling.NEAREST",
            test_data.test_centre_crop,
        ),
        (
            "the seed shifted up",
            "seed * 2654435769",
            "seed * 2**32",
            test_data.test_random_numbers_of_different_things_differ,
        ),
        (
            "streams that share numbers",
            "STREAMS.index(stream) * 2**29",
            "STREAMS.index(stream)",
            test_data.test_random_numbers_of_different_things_differ,
        ),
    ],
    "train": [
        (
            "an average of the average",
            "1 - decay)",
            "decay)",
            [test_train.test_three_steps_are_adam_on_the_loss_and_the_average, 1],
        ),
        (
            "Adam's usual betas",
            "betas=(0.9, 0.95)",
            "betas=(0.9, 0.999)",
            [test_train.test_three_steps_are_adam_on_the_loss_and_the_average, 1],
        ),
        (
            "weight decay",
            "fused=True)",
            "fused=True, weight_decay=0.1)",
            [test_train.test_three_steps_are_adam_on_the_loss_and_the_average, 1],
        ),
        (
            "XL/2 guided at all times",
            '"XL/2": Recipe(0.2, 0.92, (0.0, 0.75)',
            '"XL/2": Recipe(0.2, 0.92, (0.0, 1.0)',
            test_train.test_recipes_are_the_papers,
        ),
        (
            "draws of its own for each process",
            'generator(seed, "draws", step)',
            'generator(seed + rank, "draws", step)',
            [test_train.test_the_processes_share_out_the_draws, 16, 2, 1],
        ),
        (
            "blocks of draws for a process",
            "*(d[rank::size] for d in draws)",
            "*(d[rank * batch // size :][: batch // size] for d in draws)",
            [test_train.test_the_processes_share_out_the_draws, 16, 2, 1],
        ),
        (
            "blocks of rows for a part",
            "x, y, e, t, r, drop = (a[k::parts] for a in rows)",
            "x, y, e, t, r, drop = (a[k * len(a) // parts :][: len(a) // parts] for a in rows)",
            [test_train.test_the_processes_share_out_the_draws, 24, 2, 3],
        ),
        (
            "gradients of parts are summed",
            "(loss / len(parts)).backward()",
            "loss.backward()",
            [test_train.test_three_steps_are_adam_on_the_loss_and_the_average, 2],
        ),
        (
            "the average starts at every part",
            "            history.append((step, rows))\n        adam.step()",
            "            history.append((step, rows))\n            adam.step()",
            [test_train.test_three_steps_are_adam_on_the_loss_and_the_average, 2],
        ),
        (
            "no save is kept for good",
            'kind == "state" or old % LASTING',
            "True",
            test_train.test_old_saves_are_thinned,
        ),
        (
            "all saves are kept",
            'kind == "state" or old % LASTING',
            "False",
            test_train.test_old_saves_are_thinned,
        ),
        (
            "sums for means in the log",
            "total / n if n else None",
            "total * n if n else None",
            test_train.test_the_log_holds_the_means_over_rows,
        ),
        (
            "rows with r = t among the others",
            "raw[t > r]}",
            "raw}",
            test_train.test_the_log_holds_the_means_over_rows,
        ),
    ],
    "fid": [
        (
            "an average pool in the last block",
            'mixed_7("max")',
            'mixed_7("average")',
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "a max pool in the block before the last",
            'mixed_7("average")',
            'mixed_7("max")',
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "average pools that count padding",
            ", count_include_pad=False",
            "",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "PyTorch's eps in the batch norms",
            "(variance + 1e-3)",
            "(variance + 1e-5)",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "a mean that is not scaled",
            "(bias - mean * scale)",
            "(bias - mean)",
            test_inception.test_folding_leaves_a_convolution_and_its_batch_norm_what_they_do,
        ),
        (
            "a variance for a deviation",
            "(variance + 1e-3).sqrt()",
            "(variance + 1e-3)",
            test_inception.test_folding_leaves_a_convolution_and_its_batch_norm_what_they_do,
        ),
        (
            "statistics in another order",
            '"running_mean", "running_var")',
            '"running_var", "running_mean")',
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "folded in double",
            ".to(torch.float32, memory_format",
            ".to(torch.float64, memory_format",
            test_inception.test_folding_leaves_a_convolution_and_its_batch_norm_what_they_do,
        ),
        (
            "no rectifier",
            ", padding).relu_()",
            ", padding)",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "a strided pool where size is kept",
            "return F.max_pool2d(x, 3, 1, 1)",
            "return F.max_pool2d(x, 1, 1, 0)",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "the widest features at most",
            "return x.mean((2, 3))",
            "return x.amax((2, 3))",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "padded where the original is not",
            "(0, 0) if stride else",
            "(0, 0) if stride == '2' else",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "the stem's last convolution padded",
            '"=192:3x3/1 max/2"',
            '"=192:3x3 max/2"',
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "branches a and b joined the other way",
            "branch3x3_2a=384:1x3|branch3x3_2b=384:3x1",
            "branch3x3_2b=384:1x3|branch3x3_2a=384:3x1",
            test_inception.test_number_of_tensors_and_parameters,
        ),
        (
            "7x1 before 1x7",
            "branch7x7_2={c}:1x7 branch7x7_3=192:7x1",
            "branch7x7_2={c}:7x1 branch7x7_3=192:1x7",
            test_inception.test_number_of_tensors_and_parameters,
        ),
        (
            "7x1 first in all",
            "branch7x7dbl_2={c}:7x1 branch7x7dbl_3={c}:1x7 ",
            "branch7x7dbl_2={c}:1x7 branch7x7dbl_3={c}:7x1 ",
            test_inception.test_number_of_tensors_and_parameters,
        ),
        (
            "too wide",
            "mixed_6(128)",
            "mixed_6(160)",
            test_inception.test_number_of_tensors_and_parameters,
        ),
        (
            "torchvision's classes",
            '"fc.weight": (1008, inputs)',
            '"fc.weight": (1000, inputs)',
            test_inception.test_number_of_tensors_and_parameters,
        ),
        (
            "a bias of the logits",
            'params["fc.weight"].double().T',
            'params["fc.weight"].double().T + 0.1',
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "TF32",
            'conv.fp32_precision, "ieee"',
            'conv.fp32_precision, "tf32"',
            test_inception.test_precision_is_full_whatever_is_set_around_it,
        ),
        (
            "precision stays set",
            "        conv.fp32_precision = before",
            "        pass",
            test_inception.test_precision_is_full_whatever_is_set_around_it,
        ),
        (
            "autocast",
            "with torch.autocast(device.type, enabled=False):",
            "if True:",
            test_inception.test_precision_is_full_whatever_is_set_around_it,
        ),
        (
            "logits in double",
            "return features, logits.float()",
            "return features, logits",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        ("a graph", "@torch.no_grad()\n", "", test_inception.test_nothing_asks_for_gradients),
        (
            "half pixels",
            "device=images.device) * (size / 299)",
            "device=images.device).add(0.5) * (size / 299) - 0.5",
            test_inception.test_resize_reads_places_without_half_pixels,
        ),
        (
            "half pixels, seen by the features",
            "at = torch.arange(299, dtype=torch.float32, device=images.device) * (size / 299)",
            "at = ((torch.arange(299, dtype=torch.float32) + 0.5) * (size / 299) - 0.5).clamp(min=0)",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "corners aligned",
            "(size / 299)",
            "((size - 1) / 298)",
            test_inception.test_resize_reads_places_without_half_pixels,
        ),
        (
            "positions in double",
            "torch.arange(299, dtype=torch.float32",
            "torch.arange(299, dtype=torch.float64",
            [test_inception.test_resize_is_tensorflows_to_the_bit, (512, 300)],
        ),
        (
            "height for width",
            "places(images.shape[3])",
            "places(images.shape[2])",
            test_inception.test_agrees_with_what_torch_fidelity_once_gave,
        ),
        (
            "nearest pixels",
            "at - low\n",
            "0 * at\n",
            test_inception.test_resize_reads_places_without_half_pixels,
        ),
        (
            "centred at 127.5",
            "down[:, None]) - 128) / 128",
            "down[:, None]) - 127.5) / 127.5",
            test_inception.test_resize_of_299_leaves_the_pixels,
        ),
        (
            "no shuffle",
            "if shuffle:",
            "if False:",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "always shuffled",
            "if shuffle:",
            "if True:",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "another seed",
            "RandomState(2020).permutation",
            "RandomState(0).permutation",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "a sample's deviation",
            "std(correction=0)",
            "std()",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "the exponential of the mean over splits",
            "        scores.append(divergence.exp())\n    scores = torch.stack(scores)",
            "        scores.append(divergence)\n    scores = torch.stack(scores).mean().exp()[None]",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "a marginal over all splits",
            "marginal = p.mean(0)",
            "marginal = logits.double().softmax(1).mean(0)",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "the logarithm of nothing",
            "torch.special.xlogy(marginal, marginal)",
            "(marginal * marginal.log())",
            test_inception.test_score_of_certain_and_of_clueless_networks,
        ),
        (
            "single precision",
            ".double().log_softmax(1)",
            ".float().log_softmax(1)",
            test_inception.test_score_of_probabilities_by_hand,
        ),
        (
            "processes' scatters stay about their own means",
            " + shift.outer(shift) * state[0]",
            "",
            test_fid.test_gathering_loses_no_digits,
        ),
        (
            "processes of unequal shares count alike",
            "(m - origin) * (n / total)",
            "(m - origin) / len(parts)",
            test_fid.test_gathering_loses_no_digits,
        ),
        (
            "moments about zero are added up",
            "scatter = state[2].cpu() + shift.outer(shift) * state[0]",
            "scatter = state[2].cpu() + state[1].outer(state[1]) * state[0] - mean.outer(mean) * total / 2",
            test_fid.test_gathering_loses_no_digits,
        ),
        (
            "a biased covariance",
            "scatter / (count - 1)",
            "scatter / count",
            test_fid.test_statistics_are_those_of_all_items_at_once_however_they_come,
        ),
        (
            "means are not combined",
            "old_mean + shift * (n / total)",
            "old_mean",
            test_fid.test_statistics_are_those_of_all_items_at_once_however_they_come,
        ),
        (
            "the shift of the means is left out",
            "+ shift.outer(shift) * (count * n / total)",
            "",
            test_fid.test_statistics_are_those_of_all_items_at_once_however_they_come,
        ),
        (
            "single precision",
            "features = features.double()",
            "features = features.float()",
            test_fid.test_statistics_of_single_precision_features_are_double,
        ),
        (
            "a covariance for its root",
            "values[kept].sqrt()",
            "values[kept]",
            test_fid.test_scaled_covariance,
        ),
        (
            "a distance, not its square",
            "(mu1 - mu2).square().sum()",
            "(mu1 - mu2).norm()",
            test_fid.test_equal_covariances_leave_the_distance_of_the_means,
        ),
        (
            "roots of rounding errors",
            "return vectors[:, kept] * values[kept].sqrt()",
            "return vectors * values.abs().sqrt()",
            test_fid.test_fewer_items_than_dimensions,
        ),
        (
            "an item is its own neighbour",
            "distance.fill_diagonal_(torch.inf)",
            "pass",
            test_fid.test_nearest,
        ),
    ],
}
CRASHES = {
    "guidance always evaluates": TypeError,
    "a row too far in the shards": IndexError,
}  # the others: an assertion
ROWS = [(file, *row) for file, rows in MUTANTS.items() for row in rows]
NAMES = {
    "meanflow": "mf",
    "model": "model",
    "data": "data",
    "fid": "fid",
    "train": "train",
}  # in the tests


@pytest.mark.parametrize("file, wrong, old, new, test", ROWS, ids=[row[1] for row in ROWS])
def test_mutant_is_caught(monkeypatch, tmp_path, file, wrong, old, new, test):
    source = (ROOT / f"{file}.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}.py"
    mutant = types.ModuleType(file)
    mutant.__file__ = str(ROOT / f"{file}.py")
    exec(compile(source.replace(old, new), mutant.__file__, "exec"), mutant.__dict__)
    function, *arguments = test if isinstance(test, list) else [test]
    if "tmp_path" in inspect.signature(function).parameters:
        function = partial(function, tmp_path)
    for module in MODULES:
        if hasattr(module, NAMES[file]):
            monkeypatch.setattr(module, NAMES[file], mutant)
    with pytest.raises(CRASHES.get(wrong, AssertionError)):
        function(*arguments)
