"""Training runs as processes: killed and resumed, split over ranks and parts, watched, and ended with good weights."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from amed_engine import ConfigError, FileFormatError, NonFiniteError, distill, make_schedule, make_solver, sample
from amed_engine.training.presets import PRESETS, Settings, choose
from amed_engine.training.trainer import LearnedLevels, Trainer

SHAPE = (1, 4, 4)


def denoise(x, sigma):
    """Every pixel drawn to one of two values, with a bottleneck to read."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    d = torch.tanh(x / (0.1 + sigma**2)) * 0.8
    return d, d[:, :, :2, :2]


def train(model=denoise, **options):
    defaults = {"nfe": 3, "total_kimg": 0.08, "batch": 8, "shape": SHAPE, "progress": False}
    return distill(model, **(defaults | options))


def weights(predictor):
    return {name: value.clone() for name, value in predictor.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def killer(after: int):
    def on_round(seen):
        if seen.images == 8 * after:
            raise Killed

    return on_round


# ---- killed and resumed


@pytest.mark.parametrize(
    "options",
    [{"objective": "greedy"}, {"objective": "end_to_end"}, {"objective": "end_to_end", "learn_sigmas": True}],
    ids=["greedy", "end_to_end", "levels"],
)
def test_a_run_killed_ten_times_ends_in_the_same_bits(options, tmp_path):
    options = {**options, "scale_time": 0.1, "total_kimg": 0.16}
    expected = []
    uninterrupted = train(on_round=expected.append, **options)
    whole = weights(uninterrupted)
    kills = sorted(torch.randperm(19, generator=torch.Generator().manual_seed(3))[:10].add(1).tolist())
    for after in kills:
        with pytest.raises(Killed):
            train(on_round=killer(after), checkpoint_dir=tmp_path, checkpoint_seconds=0, **options)
    seen = []
    resumed = train(checkpoint_dir=tmp_path, on_round=seen.append, **options)
    assert equal(weights(resumed), whole)
    assert resumed.plan == uninterrupted.plan
    assert seen == expected[-len(seen) :]
    assert len(seen) < 20 - kills[-2]


CHILD = """
    import sys, time, torch
    from amed_engine import distill
    torch.set_num_threads(1)
    def denoise(x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        d = torch.tanh(x / (0.1 + sigma**2)) * 0.8
        return d, d[:, :, :2, :2]
    def on_round(seen):
        print(seen.images, flush=True)
        time.sleep(0.02)  # so that the signal comes long before the end
    distill(denoise, nfe=3, total_kimg=float(sys.argv[2]), batch=8, shape=(1, 4, 4), progress=False, on_round=on_round,
            checkpoint_dir=sys.argv[1], checkpoint_seconds=0)
"""


def test_a_process_killed_by_the_system_leaves_checkpoints_to_go_on_from(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), "0.48"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while int(child.stdout.readline()) < 8 * 12:
            pass
        child.send_signal(signal.SIGKILL)
    newest = max(int(path.stem.split("-")[1]) for path in tmp_path.glob("round-*.safetensors"))
    assert newest >= 11
    assert newest < 60
    rounds = []
    resumed = train(total_kimg=0.48, checkpoint_dir=tmp_path, on_round=rounds.append)
    assert len(rounds) == 60 - newest
    assert equal(weights(resumed), weights(train(total_kimg=0.48)))


def test_the_last_three_checkpoints_are_kept_and_every_one_is_whole(tmp_path):
    last = weights(train(checkpoint_dir=tmp_path, checkpoint_seconds=0))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"round-{k:08d}.safetensors" for k in (8, 9, 10)]
    for file in files:
        alone, rounds = tmp_path / file.stem, []
        alone.mkdir()
        file.rename(alone / file.name)
        assert equal(weights(train(checkpoint_dir=alone, on_round=rounds.append)), last)
        assert len(rounds) == 10 - int(file.stem.split("-")[1])


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    first = weights(train(checkpoint_dir=tmp_path))
    rounds = []
    assert equal(weights(train(checkpoint_dir=tmp_path, on_round=rounds.append)), first)
    assert rounds == []


def test_checkpoints_are_written_by_the_clock(tmp_path, monkeypatch):
    train(checkpoint_dir=tmp_path / "slow", checkpoint_seconds=1e9)
    assert [p.name for p in (tmp_path / "slow").iterdir()] == ["round-00000010.safetensors"]
    clock = iter(range(0, 100_000, 25))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    train(checkpoint_dir=tmp_path / "clock", checkpoint_seconds=60)
    assert len(list((tmp_path / "clock").iterdir())) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 1e-3}, "lr"), ({"seed": 1}, "seed"), ({"nfe": 5}, "student"), ({"objective": "end_to_end"}, "objective")],
)
def test_another_runs_checkpoints_are_refused(change, named, tmp_path):
    train(checkpoint_dir=tmp_path)
    with pytest.raises(ConfigError, match=rf"is of another run: .*{named}"):
        train(checkpoint_dir=tmp_path, **change)


def test_checkpoints_are_not_overlooked_when_a_fresh_start_is_asked_for(tmp_path):
    train(checkpoint_dir=tmp_path)
    with pytest.raises(ConfigError, match="holds checkpoints; pass resume='auto'"):
        train(checkpoint_dir=tmp_path, resume="never")


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(checkpoint_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match=r"round-00000010\.safetensors"):
        train(checkpoint_dir=tmp_path)


# ---- numbers that are none


def test_training_stops_at_the_last_good_checkpoint(tmp_path):
    """From some evaluation on the model returns NaN: three steps are skipped, then the error names the checkpoint."""
    calls = []

    def breaks(x, sigma):
        calls.append(1)
        d, features = denoise(x, sigma)
        return d * (float("nan") if len(calls) > 40 else 1.0), features

    with pytest.raises(NonFiniteError, match=r"3 times in a row; the last good checkpoint is .*round-0000000(\d)"):
        train(breaks, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    newest = sorted(tmp_path.iterdir())[-1]
    rounds = []
    assert equal(weights(train(checkpoint_dir=tmp_path, on_round=rounds.append)), weights(train()))
    assert len(rounds) == 10 - int(newest.stem.split("-")[1])


def test_skipped_steps_are_counted_and_survive_a_checkpoint(tmp_path):
    bad = {3}
    calls = []

    def loss(x, target):
        calls.append(1)
        return (x - target).square().flatten(1).sum(1) * (float("inf") if len(calls) in bad else 1.0)

    rounds = []

    def on_round(seen):
        rounds.append(seen)
        killer(5)(seen)

    with pytest.raises(Killed):
        train(loss=loss, on_round=on_round, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    assert [r.skipped for r in rounds] == [0, 1, 1, 1, 1]
    bad.clear()
    train(loss=loss, on_round=rounds.append, checkpoint_dir=tmp_path)
    assert [(r.images, r.skipped) for r in rounds[5:]] == [(8 * k, 1) for k in range(6, 11)]


# ---- split over parts and processes


@pytest.mark.parametrize("objective", ["greedy", "end_to_end"])
@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(objective, accumulate, monkeypatch):
    """Of every step of a round in which the weights stay as they are, loss by loss and number by number.

    Trained weights may drift apart: Adam divides by the gradient's own size, so that where one is near zero its rounding
    error becomes a step of full length.
    """

    def gradients(parts):
        steps, rounds = [], []
        monkeypatch.setattr(Trainer, "_step", lambda self, gradient: steps.append(gradient))
        train(accumulate=parts, objective=objective, scale_time=0.1, total_kimg=0.008, on_round=rounds.append)
        return torch.stack(steps), torch.tensor(rounds[0].losses)

    (whole, loss), (split, split_loss) = gradients(1), gradients(accumulate)
    assert len(whole) == (2 if objective == "greedy" else 1)
    assert whole.abs().amax(1).min() > 1e-3
    torch.testing.assert_close(split_loss, loss, rtol=1e-5, atol=0)
    for mine, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


RANK = """
    import sys, torch
    from amed_engine import distill, save_predictor
    import torch.distributed as dist
    torch.set_num_threads(1)
    def denoise(x, sigma):
        assert len(x) <= 4
        sigma = sigma.reshape(-1, 1, 1, 1)
        d = torch.tanh(x / (0.1 + sigma**2)) * 0.8
        return d, d[:, :, :2, :2]
    seen = []
    predictor = distill(denoise, nfe=3, total_kimg=0.08, batch=8, shape=(1, 4, 4), progress=False,
                        on_round=seen.append, checkpoint_dir=sys.argv[1] + "/run")
    rank = __import__("os").environ["RANK"]
    assert bool(seen) == (rank == "0")
    save_predictor(predictor, f"{sys.argv[1]}/{rank}.safetensors")
"""


def test_two_processes_train_the_same_predictor_as_one(tmp_path):
    """Each gets half of the batch; one process with two accumulated parts adds up the same numbers."""
    from amed_engine import load_predictor

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", textwrap.dedent(RANK), str(tmp_path)]
    children = [subprocess.Popen(command, env={**os.environ, **where, "RANK": str(k)}) for k in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    both = [weights(load_predictor(tmp_path / f"{k}.safetensors")) for k in range(2)]
    assert equal(*both)
    assert equal(both[0], weights(train(accumulate=2)))


def test_a_batch_that_does_not_split_is_named():
    with pytest.raises(ConfigError, match="batch 8 does not split into accumulate=3 parts on each of 1 processes"):
        train(accumulate=3)


# ---- objectives


def scaled(factors):
    """The squared distance, each interval's times its own factor."""
    calls = []

    def loss(x, target):
        calls.append(1)
        return (x - target).square().flatten(1).sum(1) * factors[(len(calls) - 1) % len(factors)]

    return loss


def test_the_unit_of_the_loss_does_not_matter():
    """Powers of two, so that not even rounding differs."""
    assert equal(weights(train(nfe=5, loss=scaled([1024.0]))), weights(train(nfe=5, loss=scaled([1.0]))))


def test_intervals_have_the_same_voice_until_their_loss_is_next_to_nothing(monkeypatch):
    """A step along grad / (loss + floor), the floor a hundredth of the largest loss of the round before."""
    voices, losses = {}, {}
    for factors in ((1.0, 1.0, 1.0), (1.0, 8.0, 2.0**-30)):
        norms, seen = [], []
        monkeypatch.setattr(Trainer, "_step", lambda self, gradient, norms=norms: norms.append(gradient.norm().item()))
        train(nfe=5, loss=scaled(factors), total_kimg=0.016, on_round=seen.append)
        voices[factors], losses[factors] = norms[3:], [r.losses for r in seen]
    (plain, before), (other, after) = zip(voices.values(), losses.values(), strict=True)
    for i in range(3):
        gradient = plain[i] * (before[1][i] + 0.01 * max(before[0]))
        factor = after[1][i] / before[1][i]
        assert other[i] == pytest.approx(gradient * factor / (after[1][i] + 0.01 * max(after[0])), rel=1e-4)
    assert other[2] < 0.01 * plain[2]


def test_an_interval_is_not_dragged_into_saturation_by_a_steeper_one():
    """Where r is best in the middle, it stays there, though the first interval sends its own to the edge."""
    seen = []
    train(nfe=5, total_kimg=4, batch=64, on_round=seen.append)
    assert all(0.02 < r < 0.98 for r, _, _ in seen[-1].midpoints[1:])


def test_end_to_end_descends_the_loss_of_the_final_sample():
    """Its reported loss is that of the student's final state, computed here by the sampling loop."""
    seen = []
    predictor = train(objective="end_to_end", lr=1e-30, total_kimg=0.008, on_round=seen.append)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, *SHAPE, generator=generator)
    x = torch.randn(8, *SHAPE, generator=generator) * 80
    plan = predictor.plan
    levels = make_schedule("time_uniform", 2 * plan.intervals + 1, 0.002, 80.0)
    target = sample(denoise, x, levels, make_solver("heun"))
    with torch.no_grad():
        student = sample(denoise, x, plan.levels, plan.make_solver(), predictor, afs=plan.afs)
    assert seen[0].losses == [pytest.approx((student - target).square().sum().item() / 8, rel=1e-3)]


def test_recomputed_activations_give_the_same_gradient(monkeypatch):
    from amed_engine.training import trainer as training

    recomputing = weights(train(objective="end_to_end"))
    kept = []
    monkeypatch.setattr(training, "recomputed", lambda denoiser: kept.append(denoiser) or denoiser)
    assert equal(weights(train(objective="end_to_end")), recomputing)
    assert kept


def test_levels_start_where_they_were_and_stay_in_order():
    sigmas = make_schedule("time_uniform", 5, 0.002, 80.0)
    levels = LearnedLevels(sigmas)
    torch.testing.assert_close(levels(), sigmas, rtol=1e-6, atol=0)
    with torch.no_grad():
        levels.shares.copy_(torch.tensor([3.0, -4.0, 5.0, -6.0]))
    moved = levels()
    assert bool((moved.diff() < 0).all())
    torch.testing.assert_close(moved[[0, -1]], sigmas[[0, -1]], rtol=1e-12, atol=0)


def test_learned_levels_come_nearer_to_the_teacher_than_fixed_ones():
    """The same batches; the levels move, and what they become is what the plan samples at."""
    fixed, learned = [], []
    options = {"objective": "end_to_end", "nfe": 5, "total_kimg": 4, "batch": 64}
    before = train(on_round=fixed.append, **options).plan
    after = train(on_round=learned.append, learn_sigmas=True, **options).plan
    assert learned[0].losses == pytest.approx(fixed[0].losses, rel=1e-4)
    assert learned[-1].losses[0] < 0.9 * fixed[-1].losses[0]
    assert (after.sigmas[0], after.sigmas[-1], after.nfe) == (before.sigmas[0], before.sigmas[-1], before.nfe)
    assert after.sigmas[1:-1] != pytest.approx(before.sigmas[1:-1], rel=0.01)
    assert (after.schedule, after.rho) == ("custom", None)


def test_end_to_end_ends_nearer_to_the_teacher_than_it_began():
    seen = []
    train(objective="end_to_end", nfe=5, total_kimg=3, batch=32, lr=0.03, on_round=seen.append)
    first, last = (torch.tensor([r.losses for r in part]).mean() for part in (seen[:5], seen[-5:]))
    assert last < first / 2


def test_a_feature_loss_takes_the_distances_place():
    """Compared by their means alone, the predictor is another."""

    def means(x, target):
        return (x.flatten(1).mean(1) - target.flatten(1).mean(1)).square()

    assert not equal(weights(train(loss=means)), weights(train()))


# ---- conditions


def test_conditions_are_used_in_order_and_resumed(tiny_conditional, tmp_path):
    def batches():
        return [torch.full((8,), k) for k in range(4)]

    seen = []
    network = tiny_conditional.forward

    def spy(x, sigma, labels):
        seen.extend(labels.argmax(1).unique().tolist())
        return network(x, sigma, labels)

    tiny_conditional.forward = spy
    run = {"conditions": batches(), "shape": None, "total_kimg": 0.048}
    whole = weights(train(tiny_conditional, **run))
    assert list(dict.fromkeys(seen)) == [0, 1, 2, 3]
    with pytest.raises(Killed):
        train(tiny_conditional, **run, on_round=killer(4), checkpoint_dir=tmp_path, checkpoint_seconds=0)
    assert equal(weights(train(tiny_conditional, **run, checkpoint_dir=tmp_path)), whole)


def test_a_condition_may_be_a_denoiser_of_its_own():
    prompts = [lambda x, sigma, k=k: (denoise(x, sigma)[0] * k, None) for k in (0.5, 1.0)]
    assert not equal(weights(train(conditions=prompts)), weights(train(conditions=prompts[:1])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": []}, "conditions gave no batch; pass a list"),
        ({"conditions": [3]}, "conditions must give tensors or denoisers"),
        pytest.param(
            {"conditions": [denoise], "accumulate": 2},
            "cannot be cut; train in one process with accumulate=1",
            id="cut",
        ),
        ({"conditions": [torch.zeros(8, dtype=torch.int64)]}, r"whole-number conditions must be classes"),
        ({"conditions": [torch.zeros(3, 2)]}, "conditions gave 3 rows for a batch of 8"),
        pytest.param({"conditions": iter([denoise])}, "conditions gave no batch any more", id="no batch any more"),
        ({"preset": "fast"}, "unknown preset 'fast'; valid names: amed-solver, amed-plugin"),
        ({"objective": "gan"}, "objective must be one of greedy, end_to_end, got 'gan'"),
        ({"learn_sigmas": True}, "learn_sigmas needs objective='end_to_end', got 'greedy'"),
        ({"accumulate": 0}, "accumulate must be a positive integer, got 0"),
        ({"resume": True, "checkpoint_dir": "x"}, "resume must be 'auto' or 'never', got True"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must not be negative"),
        ({"scales": "narrow"}, "scales must be one of bounded, wide; got 'narrow'"),
        ({"scales": "wide", "scale_time": 9.0}, r"scale_time must be in \[0, 5\), got 9.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train(**options)


# ---- settings, and what is shown


def test_an_option_replaces_the_presets_and_what_belonged_to_it():
    plugin = PRESETS["amed-plugin"]
    assert choose("amed-plugin", {"lr": None}) == plugin
    assert choose("amed-plugin", {"batch": 7}).solver_options == {"max_order": 4}
    euler = choose("amed-plugin", {"solver": "euler", "schedule": "logsnr"})
    assert (euler.solver_options, euler.rho, euler.teacher_options) == ({}, None, {"max_order": 4})
    assert choose("amed-solver", {}) == Settings()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train(preset):
    plan = train(preset=preset, batch=8, total_kimg=0.016).plan
    assert (plan.solver, plan.schedule) == (PRESETS[preset].solver, PRESETS[preset].schedule)


@pytest.mark.parametrize("schedule", ["polynomial", "logsnr"])
def test_a_teacher_may_have_a_schedule_of_its_own(schedule):
    from amed_engine.training.teacher import Teacher

    plan = train().plan
    teacher = Teacher.of(plan, "ipndm", None, 3, schedule)
    torch.testing.assert_close(teacher.plan.levels[::4], plan.levels, rtol=1e-9, atol=0)
    assert teacher.plan.levels.diff().max() < 0
    train(teacher="ipndm", teacher_intermediate=2, teacher_schedule=schedule)


def test_wide_scales_reach_beyond_the_bounded_ones():
    from amed_engine import AMEDPredictor

    predictor = AMEDPredictor(0.0, 1.5, scales="wide")
    reach = []
    for bias in (-20.0, 0.0, 20.0):
        with torch.no_grad():
            predictor.fc_scale_time.weight.zero_()
            predictor.fc_scale_time.bias.fill_(bias)
            reach.append(predictor(None, torch.tensor([2.0]), torch.tensor([1.0])).scale_time.item())
    assert reach == pytest.approx([2.718281828**-1.5, 1.0, 2.718281828**1.5], rel=1e-5)
    assert AMEDPredictor(**predictor.config).scales == "wide"


def test_history_and_plot_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    seen = []
    train(nfe=5, out_dir=tmp_path, on_round=seen.append)
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["images"]) for row in rows] == [r.images for r in seen]
    assert [float(row["r_2"]) for row in rows] == pytest.approx([r.midpoints[2][0] for r in seen])
    assert [float(row["loss_1"]) for row in rows] == pytest.approx([r.losses[1] for r in seen])
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "checkpoints").iterdir())


def test_the_progress_bar_shows_loss_r_and_scales(capsys):
    train(progress=True)
    line = capsys.readouterr().err
    assert all(re.search(rf"\b{name}=", line) for name in ("loss", "r", "dir", "time"))
