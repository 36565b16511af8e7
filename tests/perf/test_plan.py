"""What a search finds is the best of all, fits, and is the same every time."""

import dataclasses
import itertools

import pytest

from configs.planning import Wishes, asked, of_model
from parallel.chips import find
from perf import candidates, machine, plan
from perf.plan import memory, pareto, search
from perf.predict import predict_all


def question(name: str = "llama3_2_1b", settings: Wishes | None = None, **changes):
    wishes = settings or Wishes(chip="v5e", chips=4, batches=(16,), length=2048)
    found, check = asked(of_model(name), True, wishes)
    return dataclasses.replace(found, **changes), check


SERVING = Wishes(step="serve", chip="H100", chips=4, length=1024, output=128)


@pytest.fixture(scope="module")
def trained():
    return search(*question())


@pytest.fixture(scope="module")
def served():
    return search(*question(settings=SERVING))


def test_plans_are_ranked_fit_and_are_of_all_devices(trained, served):
    for answer in (trained, served):
        asked_, room = answer.question, machine.room(answer.question.chip)
        speeds = [one.tokens_per_second_per_chip for one in answer.plans]
        assert speeds == sorted(speeds, reverse=True)
        assert 1 < len(answer.plans) <= asked_.top
        assert all(0 < one.hbm_bytes <= room for one in answer.plans)
        assert all(one.candidate.devices == 4 for one in answer.plans)
        assert all(one.prediction.bound for one in answer.plans)
        assert 0 < answer.fitting <= answer.tried


def test_no_way_that_was_left_out_is_better(trained):
    """Beside the search stands the plain product of all meshes, parts and policies."""
    asked_, check = question()
    base = dataclasses.replace(trained.plans[0].candidate, accumulate=1, microbatches=0, repeats=1)
    ways = [
        one
        for mesh in candidates.training_meshes(asked_.model, base, 4, check).allowed
        for part in candidates.in_parts(mesh, repeats=candidates.pipe_repeats(asked_.model, mesh.mesh.pipe))
        for one in (dataclasses.replace(part, remat=remat) for remat in candidates.REMATS)
        if sum(memory(asked_, one).values()) <= machine.room(asked_.chip)
    ]
    jobs = [candidates.job(one, asked_.model, "train", asked_.length) for one in ways]
    best = min(found.seconds for found in predict_all(jobs, [asked_.chip] * len(jobs)))
    assert trained.plans[0].seconds == pytest.approx(best, rel=1e-6)


def test_the_same_question_has_the_same_answer(trained):
    assert search(*question()).plans == trained.plans


def test_costs_are_of_the_run_or_of_a_million_tokens(trained):
    one = trained.plans[0]
    price = trained.question.chip.price
    assert one.cost == pytest.approx(1e6 / one.tokens * one.seconds * 4 * price / 3600)
    longer = search(*question(tokens=5e9)).plans[0]
    assert longer.cost == pytest.approx(5000 * one.cost)
    free = dataclasses.replace(find("v5e"), price=None)
    assert search(*question(chip=free)).plans[0].cost is None


def test_by_cost_fewer_chips_are_tried():
    wishes = Wishes(chip="v5e", chips=16, batches=(16,), length=2048, by="cost", top=30)
    answer = search(*question(settings=wishes))
    assert {one.chips for one in answer.plans} > {16}
    costs = [one.cost for one in answer.plans]
    assert costs == sorted(costs)


def test_an_open_batch_is_a_usual_one():
    wishes = Wishes(chip="v5e", chips=4, length=2048)
    answer = search(*question(settings=wishes))
    meshes = [one.candidate.mesh for one in answer.plans]
    assert len(set(map(str, meshes))) == len(meshes), "a mesh stands there once, with its best batch"
    assert all(one.tokens <= 4 * plan.DEVICE_TOKENS for one in answer.plans)


def test_no_plan_of_the_front_is_beaten(served):
    """None is behind another in both, and every plan is behind one of them or is one."""
    worth = lambda one: (one.seconds, -one.tokens_per_second_per_chip)  # noqa: E731
    for one, other in itertools.permutations(served.front, 2):
        assert not (worth(other)[0] <= worth(one)[0] and worth(other)[1] <= worth(one)[1])
    assert pareto(served.plans) == pareto(pareto(served.plans))
    assert {one.candidate.batch for one in served.front} > {served.plans[0].candidate.batch}
    latencies = [one.seconds for one in served.front]
    assert latencies == sorted(latencies)


def test_a_served_token_is_a_decoded_one_and_its_share_of_a_prompt(served):
    one = served.plans[0]
    assert sum(part.seconds for part in one.prediction.parts) == pytest.approx(one.seconds)
    alone = search(*question(settings=dataclasses.replace(SERVING, step="decode", batches=(one.candidate.batch,))))
    same = next(other for other in alone.plans if other.candidate.mesh == one.candidate.mesh)
    prompts = one.candidate.batch / one.candidate.replicas / served.question.output
    assert one.seconds == pytest.approx(same.seconds + prompts * one.first_token, rel=0.05)


def test_other_numbers_are_told_beside(trained, served):
    assert {one.candidate.precision.compute for one in trained.plans} == {"bf16"}
    assert [one.candidate.precision.compute for one in trained.others] == ["int8"], "v5e multiplies int8, no fp8"
    assert {one.candidate.precision.weights for one in served.others} == {"bf16", "int8", "fp8", "int4"}


def test_what_fits_nowhere_says_the_least_that_would_do():
    wishes = Wishes(chip="v5p", chips=4, batches=(64,), length=2048)
    with pytest.raises(
        ValueError, match=r"fits on no mesh of 4 TPU v5p: .* GiB of a device's 95.74; take (\d+) TPU v5p"
    ) as error:
        search(*question("llama3_1_70b", settings=wishes))
    assert "\n" not in str(error.value)
    least = int(str(error.value).split("take ")[1].split()[0])
    assert search(*question("llama3_1_70b", settings=dataclasses.replace(wishes, chips=least))).plans
    sizes = [n for n in (8, 16, 32, 64) if n < least]
    for fewer in sizes:
        with pytest.raises(ValueError, match="fits on no mesh"):
            search(*question("llama3_1_70b", settings=dataclasses.replace(wishes, chips=fewer)))


def test_what_divides_nowhere_says_why():
    wishes = Wishes(chip="v5e", chips=8, batches=(7,), length=2047)
    with pytest.raises(ValueError, match=r"no mesh of 8 devices divides this run; of the simplest: ") as error:
        search(*question(settings=wishes))
    assert "\n" not in str(error.value)


def test_serving_that_does_not_fit_names_a_setting():
    wishes = Wishes(step="decode", chip="L4", chips=4, length=4096)
    with pytest.raises(ValueError, match=r"the decode step fits on no mesh of 4 L4: .* give --precision int"):
        search(*question("llama3_1_70b", settings=dataclasses.replace(wishes, batches=(8,))))
