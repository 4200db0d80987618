"""Breaks the code on purpose, one line at a time, and sees that the test that guards the line fails."""

import types
from pathlib import Path

import pytest
import test_data
import test_fid
import test_meanflow
import test_model
import test_train

ROOT = Path(__file__).parent.parent
dual = test_model.test_dit_jvp_is_torch_func_jvp
authors = [test_meanflow.test_agrees_with_the_authors_code, "mix", {"kappa": 0.5}]

MUTANTS = {  # file: [(what is wrong, the right text, the wrong text, the test that must fail and its arguments)]
    "meanflow": [
        ("time runs backwards", "return (1 - t) * x + t * e", "return t * x + (1 - t) * e",
         test_meanflow.test_path_runs_from_data_to_noise_at_velocity_v),
        ("velocity from noise to data", "t * e, e - x", "t * e, x - e",
         test_meanflow.test_path_runs_from_data_to_noise_at_velocity_v),
        ("r's tangent is 1", "lambda z, t: net(z, t, r, y), (z.clone(), t.clone()), (v, torch.ones_like(t))",
         "lambda z, t, r: net(z, t, r, y), (z, t, r), (v, torch.ones_like(t), torch.ones_like(r))",
         test_meanflow.test_true_average_velocity_is_a_fixed_point_of_the_target),
        ("t's tangent is 0", "(v, torch.ones_like(t))", "(v, torch.zeros_like(t))",
         test_meanflow.test_true_average_velocity_is_a_fixed_point_of_the_target),
        ("z's tangent is 0", "(v, torch.ones_like(t))", "(0 * v, torch.ones_like(t))",
         test_meanflow.test_true_average_velocity_is_a_fixed_point_on_a_mixture),
        ("the identity's sign", "return v - column(t - r, z)", "return v + column(t - r, z)",
         test_meanflow.test_true_average_velocity_is_a_fixed_point_of_the_target),
        ("the target is the prediction", "return v - column(t - r, z) * derivative(net, z, t, r, v, y, jvp=jvp)", "return net(z, t, r, y)",
         test_meanflow.test_conditional_velocity_has_another_target),
        ("a clipped tangent", "(v, torch.ones_like(t))", "(v.clamp(-1, 1), torch.ones_like(t))",
         test_meanflow.test_target_is_affine_in_v),
        ("t for t - r", "return v - column(t - r, z)", "return v - column(t, z)",
         test_meanflow.test_target_is_v_where_r_equals_t),
        ("a gradient through the target", "@torch.no_grad()\ndef target", "def target",
         test_meanflow.test_no_gradient_flows_through_target_and_guidance),
        ("a gradient through the guidance", "@torch.no_grad()\ndef guide", "def guide",
         test_meanflow.test_no_gradient_flows_through_target_and_guidance),
        ("null for class velocity", "kappa * (net(z, t, t, y)", "kappa * (net(z, t, t, torch.full_like(y, null))",
         test_meanflow.test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa),
        ("class for null velocity", "net(z, t, t, torch.full_like(y, null))", "net(z, t, t, y)",
         test_meanflow.test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa),
        ("1 - omega without kappa", "(1 - omega - kappa) * net", "(1 - omega) * net",
         test_meanflow.test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa),
        ("guidance always evaluates", "if omega == 1 and kappa == 0 or", "if",
         test_meanflow.test_omega_1_kappa_0_is_no_guidance_and_needs_no_network),
        ("dropped rows are guided", "& (y != null)", "",
         test_meanflow.test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval),
        ("no upper end of the interval", "& (t <= interval[1])", "",
         test_meanflow.test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval),
        ("no lower end of the interval", "(interval[0] <= t) & ", "",
         test_meanflow.test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval),
        ("labels are not dropped", "y = torch.where(drop, null, y)", "y = y",
         test_meanflow.test_splitting_the_rows_changes_neither_value_nor_gradient),
        ("one row too many is taken for r = t", "n = int((t == r).cumprod(0).sum())", "n = int((t == r).sum())",
         test_meanflow.test_splitting_the_rows_changes_neither_value_nor_gradient),
        ("the r != t rows see no guidance", "v_differ = guided(z[n:], t[n:], v[n:], y[n:])", "v_differ = v[n:]",
         test_meanflow.test_splitting_the_rows_changes_neither_value_nor_gradient),
        ("a mean where the paper sums", ".flatten(1).sum(1)", ".flatten(1).mean(1)",
         test_meanflow.test_squared_error_is_summed_not_averaged),
        ("a squared squared error", ".square().flatten(1).sum(1)", ".square().flatten(1).sum(1).square()",
         test_meanflow.test_squared_error_is_summed_not_averaged),
        ("a gradient through the weight", "raw = s.detach()", "raw = s",
         test_meanflow.test_gradient_is_that_of_the_squared_error_times_a_constant_weight),
        ("a weight with p / 2", "(raw + c) ** p", "(raw + c) ** (p / 2)",
         test_meanflow.test_gradient_is_that_of_the_squared_error_times_a_constant_weight),
        ("the velocity at r for the class velocity", "v_class=u[:n]", "v_class=u[-n:]",
         test_meanflow.test_splitting_the_rows_changes_neither_value_nor_gradient),
        ("the loss pulls the target, too", "u - u_tgt.detach()", "u - u_tgt",
         test_meanflow.test_the_target_is_held_fixed_whatever_dual_returns),
        ("samples step up", "z - column(t - r, z)", "z + column(t - r, z)",
         test_meanflow.test_any_number_of_steps_lands_where_the_ode_does),
        ("every step starts from the noise", "z = z - column(t - r, z) * net(z", "z = z - column(t - r, z) * net(e",
         test_meanflow.test_displacements_add_up_along_the_flow),
        ("samples by the velocity", "net(z, t, r, y)\n    return z", "net(z, t, t, y)\n    return z",
         test_meanflow.test_any_number_of_steps_lands_where_the_ode_does),
        ("r = t by chance", "row < int(share * batch)", "torch.rand(batch, generator=generator) < share",
         test_meanflow.test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first),
        ("the share is of r != t", "row < int(share * batch)", "row >= int(share * batch)",
         test_meanflow.test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first),
        ("uniform times", "torch.sigmoid(mean + std * torch.randn(2,", "(torch.rand(2,",
         test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe),
        ("0.4 for -0.4", "mean=-0.4", "mean=0.4", test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe),
        ("0.25 for 0.75", "share=0.75", "share=0.25", test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe),
        ("randn() < p", "torch.rand(batch,", "torch.randn(batch,",
         test_meanflow.test_default_draws_are_those_of_the_imagenet_recipe),
        ("a fixed number of dropped labels", "(torch.rand(batch, generator=generator, device=device) < drop).sum()",
         "int(drop * batch)", test_meanflow.test_the_number_of_dropped_rows_is_binomial),
        ("dropped rows anywhere", "return Draws(e, t, r, row < dropped)", "return Draws(e, t, r, row >= batch - dropped)",
         test_meanflow.test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first),
    ],
    "model": [
        ("sines first in the time embedding", "torch.cat((cos, sin), -1)", "torch.cat((sin, cos), -1)", authors),
        ("times scaled by 1000", "frequencies = torch.exp(", "frequencies = 1000 * torch.exp(", authors),
        ("conditioned on r for t - r", '"h_embedder", t - r)\n', '"h_embedder", r)\n', authors),
        ("the row before the column", "in (column, row)]", "in (row, column)]", authors),
        ("cosines first in the positions", "in (torch.sin, torch.cos)]", "in (torch.cos, torch.sin)]", authors),
        ('exact GELU', 'F.gelu(linear(params, f"{name}.fc1", x), approximate="tanh")', 'F.gelu(linear(params, f"{name}.fc1", x))', authors),
        ("eps of 1e-5", "EPS = 1e-6", "EPS = 1e-5", authors),
        ("no SiLU before the modulation", "c = F.silu(c + ", "c = (c + ", authors),
        ("scale before shift", "shift1, scale1, gate1, shift2, scale2, gate2 =", "scale1, shift1, gate1, shift2, scale2, gate2 =", authors),
        ("channels before pixels", "x.permute(0, 5, 1, 3, 2, 4)", "x.permute(0, 5, 1, 4, 2, 3)", authors),
        ("a default-init DiT", 'or name.startswith("final_layer")', "", test_model.test_initial_weights),
        ("Xavier over the kernel's area", "math.prod(shape[1:])", "shape[1]", test_model.test_initial_weights),
        ("no limit of 16 heads", "max(1, min(16, qkv.shape[-1] // 192))", "max(1, qkv.shape[-1] // 192)",
         [test_model.test_heads_of_every_size, 1152, 16]),
        ("LayerNorm over the batch", "F.layer_norm(x, x.shape[-1:], eps=EPS) * (1", "(x - x.mean(0)) * (1",
         test_model.test_no_layer_mixes_samples),
        ("the first rows for the last", "return x[len(x) - len(dx) :]", "return x[: len(dx)]", dual),
        ("a graph for tangents", "return x[len(x) - len(dx) :].detach()", "return x[len(x) - len(dx) :]", dual),
        ("a bias in a tangent", 'F.linear(dx, params[f"{name}.weight"].detach())',
         'F.linear(dx, params[f"{name}.weight"].detach(), params[f"{name}.bias"].detach())', dual),
        ("the weights' graph in a tangent", 'F.linear(dx, params[f"{name}.weight"].detach())',
         'F.linear(dx, params[f"{name}.weight"])', dual),
        ("cosine's derivative without its sign", "torch.cat((-sin * frequencies", "torch.cat((sin * frequencies", dual),
        ("a tangent keeps its mean", "dn = dx - dx.mean(-1, keepdim=True) - n", "dn = dx - n", dual),
        ("a tangent keeps its part along the output", "- n * (n * dx).mean(-1, keepdim=True)", "", dual),
        ("LayerNorm's tangent undivided", "keepdim=True) + EPS).rsqrt()", "keepdim=True) + EPS)", dual),
        ("the shift's tangent is lost", "+ n * dscale + dshift", "+ n * dscale", dual),
        ("the scale's tangent is lost", "+ n * dscale + dshift", "+ dshift", dual),
        ("the gate's tangent is lost", "dx + dgate * last(branch, dx) + ", "dx + ", dual),
        ("the keys' tangent is lost", "(dq @ k.mT + q @ dk.mT)", "(dq @ k.mT)", dual),
        ("the queries' tangent is lost", "(dq @ k.mT + q @ dk.mT)", "(q @ dk.mT)", dual),
        ("the values' tangent is lost", "+ p.to(q.dtype) @ dv", "", dual),
        ("softmax without its normaliser's tangent", "- (p * ds).sum(-1, keepdim=True))", ")", dual),
        ("scores' tangents unscaled", "q @ dk.mT) * scale", "q @ dk.mT)", dual),
        ("a tangent's residual stream in bfloat16", "dx = dx.to(x.dtype)", "dx = dx",
         test_model.test_tangents_in_bfloat16),
        ("exact GELU in the tangent", 'last(x, dx), approximate="tanh")', "last(x, dx))", dual),
    ],
    "data": [
        ("a new order every step", "epochs = places // count", "epochs = places // batch",
         test_data.test_every_epoch_visits_every_item_once),
        ("one order for all epochs", 'generator(seed, "order", epoch))', 'generator(seed, "order", 0))',
         test_data.test_epochs_and_seeds_differ_in_order),
        ("blocks of rows for a rank", "[rank::world]", "[rank * batch // world : (rank + 1) * batch // world]",
         test_data.test_batches_are_the_same_from_any_step_and_for_any_number_of_processes),
        ("the seed shifted up", "seed * 2654435769", "seed * 2**32", test_data.test_random_numbers_of_different_things_differ),
        ("streams that share numbers", "STREAMS.index(stream) * 2**30", "STREAMS.index(stream)",
         test_data.test_random_numbers_of_different_things_differ),
    ],
    "train": [
        ("an average of the average", "1 - decay)", "decay)", test_train.test_an_update_is_adam_and_the_average),
        ("Adam's usual betas", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)", test_train.test_an_update_is_adam_and_the_average),
        ("weight decay", "fused=True)", "fused=True, weight_decay=0.1)", test_train.test_an_update_is_adam_and_the_average),
        ("XL/2 guided at all times", '"XL/2": Recipe(0.2, 0.92, (0.0, 0.75)', '"XL/2": Recipe(0.2, 0.92, (0.0, 1.0)',
         test_train.test_recipes_are_the_papers),
        ("draws of its own for each process", 'generator(seed, "draws", step)', 'generator(seed + rank, "draws", step)',
         [test_train.test_the_processes_share_out_the_draws, 16, 2]),
        ("blocks of draws for a process", "move(d[rank::world])", "move(d[rank * batch // world :][: batch // world])",
         [test_train.test_the_processes_share_out_the_draws, 16, 2]),
    ],
    "fid": [
        ("a biased covariance", "scatter / (count - 1)", "scatter / count",
         test_fid.test_statistics_are_those_of_all_items_at_once_however_they_come),
        ("means are not combined", "old_mean + shift * (n / total)", "old_mean",
         test_fid.test_statistics_are_those_of_all_items_at_once_however_they_come),
        ("the shift of the means is left out", "+ shift.outer(shift) * (count * n / total)", "",
         test_fid.test_statistics_are_those_of_all_items_at_once_however_they_come),
        ("single precision", "features = features.double()", "features = features.float()",
         test_fid.test_statistics_of_single_precision_features_are_double),
        ("a covariance for its root", "values.where(values > floor, 0).sqrt()", "values.where(values > floor, 0)",
         test_fid.test_scaled_covariance),
        ("a distance, not its square", "(mu1 - mu2).square().sum()", "(mu1 - mu2).norm()",
         test_fid.test_equal_covariances_leave_the_distance_of_the_means),
        ("roots of rounding errors", "values.where(values > floor, 0).sqrt()", "values.abs().sqrt()",
         test_fid.test_fewer_items_than_dimensions),
        ("an item is its own neighbour", "distance.fill_diagonal_(torch.inf)", "pass", test_fid.test_nearest),
    ],
}
CRASHES = {"guidance always evaluates": TypeError}  # of the network that is None; the others must fail an assertion
ROWS = [(file, *row) for file, rows in MUTANTS.items() for row in rows]
NAMES = {"meanflow": "mf", "model": "model", "data": "data", "fid": "fid", "train": "train"}  # in the tests


@pytest.mark.parametrize("file, wrong, old, new, test", ROWS, ids=[row[1] for row in ROWS])
def test_mutant_is_caught(monkeypatch, file, wrong, old, new, test):
    source = (ROOT / f"{file}.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}.py"
    mutant = types.ModuleType(file)
    mutant.__file__ = str(ROOT / f"{file}.py")
    exec(compile(source.replace(old, new), mutant.__file__, "exec"), mutant.__dict__)
    function, *arguments = test if isinstance(test, list) else [test]
    for module in (test_meanflow, test_model, test_data, test_fid, test_train):
        if hasattr(module, NAMES[file]):
            monkeypatch.setattr(module, NAMES[file], mutant)
    with pytest.raises(CRASHES.get(wrong, AssertionError)):
        function(*arguments)
