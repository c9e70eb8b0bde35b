"Half precision without autocast: as exact, with fewer operations, and resumed to the same numbers."

import functools
import json

import pytest
import torch
from page import ROOT
from runs import random_model, small, trained, whole_and_resumed

import ddpo_scratch.models.sd
from ddpo_scratch.models.base import load
from ddpo_scratch.models.half import LoraLinear, compute_in_half


def adapted(dtype, targets="attention", alpha=4):
    "Load the embedded model with a LoRA that has learnt something."
    denoiser = load("tiny", guidance_scale=2.0, dtype=dtype)
    params = denoiser.trainable(lora_rank=4, lora_alpha=alpha, lora_targets=targets)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in params:
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return denoiser, params


def asked(denoiser, seed=2):
    "Predict from noise."
    latents = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))
    return denoiser(latents, torch.tensor([500, 300]), denoiser.encode(["a fox", "a whale"]))


def answer(denoiser, params):
    "Predict, and return the gradient of the answer's square too."
    prediction = asked(denoiser)
    gradients = torch.autograd.grad(prediction.float().square().mean(), params)
    return prediction.detach().float(), torch.cat([g.flatten() for g in gradients])


@functools.cache
def exact_answer(targets, alpha):
    "Answer in float32, with which both half precisions are compared."
    return answer(*adapted(torch.float32, targets, alpha))


def distance(a, b):
    "Return how far a is from b, as a share of b."
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_equals_the_plain_operations(bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    x, weight, b, down, up = tensors
    b = b if bias else None
    plain = torch.nn.functional.linear(x, weight, b) + x @ down.T @ up.T
    torch.testing.assert_close(LoraLinear.apply(x, weight, b, down, up), plain)
    trained = [tensor.requires_grad_() for tensor in (x, down, up)]
    assert torch.autograd.gradcheck(
        lambda x, down, up: LoraLinear.apply(x, weight, b, down, up), trained
    )
    # an input without a gradient gets none
    LoraLinear.apply(x.detach(), weight, b, down, up).sum().backward()
    assert x.grad is None and down.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets, alpha", [("attention", 4), ("attention", 8), ("all", 8)])
def test_as_exact_as_autocast(dtype, targets, alpha):
    exact = exact_answer(targets, alpha)
    denoiser, params = adapted(dtype, targets, alpha)
    with torch.autocast("cpu", dtype):
        cast = answer(denoiser, params)
    assert compute_in_half(denoiser.network)
    for wanted, theirs, ours in zip(exact, cast, answer(denoiser, params), strict=True):
        assert distance(ours, wanted) < 1.4 * distance(theirs, wanted) < 0.1


def test_scales_that_differ_by_layer():
    denoiser, params = adapted(torch.bfloat16)
    assert compute_in_half(denoiser.network)
    layers = [m for m in denoiser.network.modules() if hasattr(m, "lora_A")]
    name = next(iter(layers[0].scaling))
    common = asked(denoiser).detach()
    layers[0].scaling[name] = 3.0
    differing = asked(denoiser).detach()
    assert not torch.equal(common, differing)
    # 3 times the factor is 3 times the matrix
    layers[0].scaling[name] = 1.0
    with torch.no_grad():
        layers[0].lora_B[name].weight.mul_(3)
    assert distance(asked(denoiser).detach(), differing) < 0.01


def test_with_and_without_a_gradient_are_equal_and_weights_are_read_anew():
    denoiser, params = adapted(torch.bfloat16)
    assert compute_in_half(denoiser.network)
    with torch.no_grad():
        before = asked(denoiser)
    assert torch.equal(asked(denoiser).detach(), before)
    # a storage that changes places, as in a copy of the policy
    kept = params[0].data
    params[0].data = kept + 1
    assert not torch.equal(asked(denoiser).detach(), before)
    params[0].data = kept
    assert torch.equal(asked(denoiser).detach(), before)


def test_switched_off_it_is_the_base_model():
    denoiser, _ = adapted(torch.bfloat16)
    assert compute_in_half(denoiser.network)
    with torch.no_grad(), denoiser.reference():
        base = asked(denoiser)
    plain = load("tiny", guidance_scale=2.0, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(base, asked(plain).float(), rtol=0, atol=0.05)
        assert not torch.equal(asked(denoiser), base)


def test_gradient_checkpointing_gives_the_same_gradient():
    plain, checkpointed = (adapted(torch.bfloat16) for _ in range(2))
    checkpointed[0].configure(gradient_checkpointing=True)
    checkpointed[0].network.train()
    plain[0].configure()
    gradients = []
    for denoiser, params in (plain, checkpointed):
        # two steps one after the other, with a question without a gradient between
        first = asked(denoiser)
        with torch.no_grad():
            asked(denoiser, seed=3)
        loss = (asked(denoiser, seed=4) + first).square().mean()
        gradients.append(torch.autograd.grad(loss, params))
    assert all(map(torch.equal, *gradients))


def test_configuring_again_changes_nothing():
    denoiser, _ = adapted(torch.bfloat16)
    before = []
    for decode_batch_size in (0, 2, 1):
        denoiser.configure(decode_batch_size=decode_batch_size)
        hooks = denoiser.network._forward_pre_hooks, denoiser.network._forward_hooks
        before.append([*map(len, hooks)])
    assert before == [[1, 1]] * 3 and denoiser.decode_batch == 1


def test_what_needs_autocast_is_left_to_it():
    for case in (adapted(torch.float32)[0], load("tiny", dtype=torch.bfloat16)):
        assert not compute_in_half(case.network) and not hasattr(case.network, "computes_in")
    odd, _ = adapted(torch.bfloat16)
    odd.network.conv_in.to(torch.float32)
    assert not compute_in_half(odd.network)


@pytest.mark.parametrize("precision, method", [("bf16", "ddpo_is"), ("fp16", "awm")])
def test_a_run_computes_so_and_resumes(tmp_path, precision, method):
    whole, _ = whole_and_resumed(tmp_path, mixed_precision=precision, method=method)
    assert whole.denoiser.network.computes_in in (torch.bfloat16, torch.float16)
    assert all(p.dtype == torch.float32 for p in whole.params)


def test_a_network_in_float32_stays_under_autocast(tmp_path):
    denoiser = load(random_model())
    state = trained(small(tmp_path, mixed_precision="bf16", num_epochs=1), denoiser=denoiser)
    assert not hasattr(state.denoiser.network, "computes_in")


def test_a_compiled_network_keeps_its_blocks_and_adapters(monkeypatch):
    denoiser, params = adapted(torch.bfloat16)
    unet = denoiser.network
    # the class's own list, in the embedded model's smallest blocks
    monkeypatch.setattr(unet, "_repeated_blocks", ["BasicTransformerBlock"])
    ddpo_scratch.models.sd._compile(unet, fused_attention=True)
    compiled = [m for m in unet.modules() if m._compiled_call_impl]
    assert compiled and unet._compiled_call_impl is None
    assert {type(m).__name__ for m in compiled} == {"BasicTransformerBlock"}


def test_committed_counts_are_a_third_less():
    counts = json.loads((ROOT / "benchmarks" / "operators.json").read_text())["operators"]
    assert counts["bf16"] < 2 / 3 * counts["bf16 under autocast"]


def test_a_model_is_used_again_in_another_precision(tmp_path):
    "What accelerate puts around a network stayed: a later run in float32 computed in bfloat16."
    from ddpo_scratch.run.setup import setup

    model = load(random_model())
    with torch.no_grad():
        want = asked_without_guidance(model)
        for precision in ("bf16", "no", "bf16"):
            config = small(tmp_path, use_lora=False, mixed_precision=precision, kl_weight=0.1)
            state = setup(config, denoiser=model)
            answers = [asked_without_guidance(state.denoiser)]
            with state.denoiser.reference():
                answers.append(asked_without_guidance(state.denoiser))
            assert [torch.equal(x, want) for x in answers] == [precision == "no"] * 2


def asked_without_guidance(denoiser):
    denoiser.guidance_scale = 1.0
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser(x, 500, denoiser.encode(["a cat", "a dog"]))
