"""Operations add up to the counts of model/cost.py, whatever the split, and traffic is what the textbook says."""

import dataclasses

import pytest

from model import cost, families
from perf.operations import operations
from perf.work import Job, Layout

T, B = 512, 8
MODELS = {
    "llama": families.llama3_1_8b(),
    "gemma": families.gemma2_2b(),
    "gpt2": families.gpt2(),
    "mixtral": families.mixtral_8x7b(),
    "deepseek": families.deepseek_v2_lite(),
}


def job(model, kind="train", **more):
    return Job(kind=kind, model=model, batch=B, length=T, **more)


def flops(ops, *kinds):
    return sum(op.flops * op.count for op in ops if op.kind in kinds)


def sent(ops, axis):
    return sum(op.wire * op.count for op in ops if op.axis == axis)


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_are_those_of_the_cost(name):
    ops = operations(job(MODELS[name], "prefill"))
    expected = B * cost.forward_flops(MODELS[name], T, logits=1)
    assert flops(ops, "matmul", "attention") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_decoding_is_one_token(name):
    ops = operations(job(MODELS[name], "decode"))
    expected = B * cost.decode_flops(MODELS[name], T)
    assert flops(ops, "matmul", "attention") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_three_times_the_forward_and_attention_once_more_by_halves(name):
    forward = operations(job(MODELS[name], "prefill", stack="eager", is_causal=True))
    ops = operations(job(MODELS[name]))
    assert flops(ops, "matmul") == pytest.approx(3 * flops(forward, "matmul"), rel=1e-9)
    attention = cost.forward_flops(MODELS[name], T, logits=0) * B - flops(forward, "matmul")
    head = 2.0 * B * T * MODELS[name].vocab_size * MODELS[name].embed_dim
    assert flops(ops, "attention") == pytest.approx(3.5 * (attention + head), rel=1e-6)


def test_full_remat_is_a_forward_of_the_layers_more():
    plain, again = (operations(job(MODELS["llama"], remat=remat)) for remat in ("none", "full"))
    head = 2.0 * B * T * MODELS["llama"].vocab_size * MODELS["llama"].embed_dim
    layers = flops(plain, "matmul") / 3 - head
    assert flops(again, "matmul") == pytest.approx(flops(plain, "matmul") + layers, rel=1e-9)


@pytest.mark.parametrize("layout", [
    Layout(tensor=4), Layout(fsdp=8), Layout(data=2, fsdp=2, tensor=2), Layout(pipe=4), Layout(context=2),
    Layout(fsdp=4, context=2),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_devices_share_the_products(name, layout):
    whole = flops(operations(job(MODELS[name])), "matmul", "attention")
    mine = flops(operations(job(MODELS[name], layout=layout)), "matmul", "attention")
    if name == "mixtral":  # every device of `tensor` computes the router
        assert mine * layout.num_devices == pytest.approx(whole, rel=2e-3)
    else:
        assert mine * layout.num_devices == pytest.approx(whole, rel=1e-9)


def test_experts_apart_compute_as_much():
    layout = Layout(fsdp=8, expert=8)
    mine = flops(operations(job(MODELS["mixtral"], layout=layout)), "matmul")
    assert mine * 8 == pytest.approx(flops(operations(job(MODELS["mixtral"])), "matmul"), rel=1e-9)


def test_microbatches_change_traffic_and_no_products():
    once, four = (operations(job(MODELS["llama"], layout=Layout(fsdp=2), microbatch=m)) for m in (4, 1))
    assert flops(four, "matmul") == pytest.approx(flops(once, "matmul"), rel=1e-9)
    assert sent(four, "fsdp") == pytest.approx(4 * sent(once, "fsdp"))


def test_fsdp_sends_every_parameter_three_times_less_its_own():
    model = dataclasses.replace(MODELS["llama"], tied=True)
    bytes_ = sent(operations(job(model, layout=Layout(fsdp=8), weights="bf16")), "fsdp")
    assert bytes_ == pytest.approx(3 * 7 / 8 * 2 * cost.num_parameters(model))


def test_tensor_sums_activations_twice_a_layer_forward_and_backward():
    model = MODELS["llama"]
    bytes_ = sent(operations(job(model, layout=Layout(tensor=4))), "tensor")
    one = B * T * model.embed_dim * 2
    assert bytes_ == pytest.approx(model.num_layers * 2 * 2 * (2 * 3 / 4) * one)


def test_a_request_is_its_prompt_and_its_tokens():
    whole = operations(job(MODELS["gpt2"], "generate", output=11))
    prompt = operations(job(MODELS["gpt2"], "prefill"))
    token = operations(Job(kind="decode", model=MODELS["gpt2"], batch=B, length=T + 5))
    kinds = ("matmul", "attention")
    assert flops(whole, *kinds) == pytest.approx(flops(prompt, *kinds) + 10 * flops(token, *kinds))


def test_decoding_reads_every_weight_and_the_cache():
    model = MODELS["llama"]
    ops = operations(Job(kind="decode", model=model, batch=1, length=T, weights="int8"))
    weights = sum(op.bytes * op.count for op in ops if op.kind == "matmul")
    assert weights == pytest.approx(cost.matmul_parameters(model), rel=0.01)
    cache = sum(op.bytes * op.count for op in ops if op.kind == "attention")
    assert cache == pytest.approx(T * 2 * 2 * model.num_kv_heads * model.head_dim * model.num_layers, rel=0.02)


@pytest.mark.parametrize("given", [{"batch": 0}, {"weights": "fp12"}])
def test_what_no_job_has_is_refused(given):
    with pytest.raises(ValueError, match=r"must be at least 1|fp12"):
        Job(kind="train", model=MODELS["gpt2"], length=T, **{"batch": 1, **given})
