"""Training: the pieces that must agree with the product, on a few small steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from service.shared.settings import PruningMethod
from workers.demo_model.encode import (
    Encoded,
    Places,
    draw_setting,
    encode,
    encode_example,
    guide_of,
    show_pruned,
    show_suspects,
)
from workers.demo_model.folder import new_model, write_folder
from workers.demo_model.optimise import Schedule
from workers.demo_model.phantom import Protocol, build, scan
from workers.demo_model.pool import TRAINING_SEEDS, Mixture, examples, expose, member_of
from workers.demo_model.targets import Sign
from workers.demo_model.train_decoder import DecoderPlan, load_eyes, model_with, train_decoder
from workers.demo_model.train_vision import Eyes, VisionPlan, patches_of, train_vision

SLABS = Protocol(120, slices=6)


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    torch.set_num_threads(1)
    example = expose(member_of(build(3, SLABS)), np.random.default_rng(0))
    return encode_example(Eyes(0).eval(), example)


def test_targets_mark_the_nodule_and_nothing_far_from_it() -> None:
    """One cell or a few neighbours per slab are positive, in the slabs that show it."""
    seed = next(s for s in range(100) if (n := build(s, SLABS).findings.nodules) and n[0].diameter_mm > 12)
    targets = member_of(build(seed, SLABS)).patches

    assert 1 <= targets.present[..., Sign.NODULE].sum() <= 12
    assert (targets.log_diameter > 0).sum() == targets.present[..., Sign.NODULE].sum()


def test_batches_go_on_after_a_stop() -> None:
    """A run taken up at a step gets that step's data again, from seeds no evaluation uses."""
    mixture = Mixture(size=4, fresh=1)
    one, other = (next(examples(1, 0, 5, 2, mixture)) for _ in range(2))

    assert (one[0].images == other[0].images).all()
    assert one[0].member.scene.seed > TRAINING_SEEDS


def test_some_cells_give_what_all_cells_give() -> None:
    """With every cell chosen, the short way through the tower equals the stock way."""
    torch.set_num_threads(1)
    eyes = Eyes(0).eval()
    pixels = torch.randn(2, 3, 120, 120)
    cells = torch.arange(36).expand(2, 36)

    patches, tokens = eyes(pixels)
    some_patches, some_tokens = eyes(pixels, cells)

    assert torch.allclose(tokens, some_tokens, atol=1e-4)
    assert torch.allclose(patches[0, patches_of(cells)[0]], some_patches[0], atol=1e-4)


def test_suspects_are_as_many_whatever_the_study(encoded: Encoded) -> None:
    """How many tokens are shown must not tell what is there."""
    black = np.zeros((6, 120, 120, 3), np.uint8)
    blank = encode(Eyes(0).eval(), black, encoded.labels, encoded.guide, Places())
    shown = [show_suspects(one, np.random.default_rng(0), each=4, others=0).kept.sum() for one in (encoded, blank)]

    assert all(4 <= count <= 24 for count in shown)


def test_pruned_reading_keeps_part_of_the_tokens(encoded: Encoded) -> None:
    """Over many draws, settings from everything to little occur."""
    random = np.random.default_rng(0)
    settings = [draw_setting(random) for _ in range(40)]
    shares = [float(show_pruned(encoded, setting, random).kept.float().mean()) for setting in settings]

    assert max(shares) == 1
    assert min(shares) < 0.5


def test_guarded_is_among_the_prunings_drawn_and_obeys_its_budget(encoded: Encoded) -> None:
    """Training prunes with the product's own `guarded`, on the regions that the worker would find."""
    random = np.random.default_rng(1)
    guarded = [one for _ in range(60) if (one := draw_setting(random)).pruning.method is PruningMethod.GUARDED]
    tokens = encoded.features.shape[0] * encoded.features.shape[1]

    assert len(guarded) > 10
    for setting in guarded[:5]:
        kept = int(show_pruned(encoded, setting, random).kept.sum())
        assert 0 < kept <= max(setting.pruning.token_budget * tokens, encoded.features.shape[0])


def test_the_guide_of_training_is_the_workers(encoded: Encoded) -> None:
    """It finds both lungs in a chest, in every third."""
    guide = guide_of(scan(build(3, SLABS), np.random.default_rng(0)))

    assert guide.names == encoded.guide().names
    assert sum(" lung" in name for name in guide.names) == 6


def test_rate_rises_holds_and_ends_at_zero() -> None:
    """Warm-up, plateau, decay."""
    schedule = Schedule(1000, 0.6)

    assert schedule.factor(0) < 0.1
    assert schedule.factor(400) == 1
    assert schedule.factor(999) < 0.01


def test_a_schedule_ends_by_the_clock_when_that_is_sooner() -> None:
    """On a machine shared with others the time is what is known."""
    schedule = Schedule(1000, 0.5, seconds=100)

    assert schedule.factor(200, 20) == 1
    assert schedule.factor(200, 75) == pytest.approx(0.5)
    assert schedule.share(200, 130) == 1


def test_cells_say_which_lung_and_third_they_show() -> None:
    """Patient's right lies in the left half of the image; head first means upper thirds first."""
    member = member_of(build(3, SLABS))
    present, weight = member.tokens.present, member.tokens.weight
    column, slab = np.arange(36) % 6, np.arange(6)[:, None]

    assert (column[present[..., Sign.RIGHT].nonzero()[1]] <= 3).all()
    assert (column[present[..., Sign.LEFT].nonzero()[1]] >= 2).all()
    upper, lower = (np.broadcast_to(slab, (6, 36))[present[..., sign] > 0] for sign in (Sign.UPPER, Sign.LOWER))
    assert upper.max() <= lower.min()
    assert not weight[..., Sign.UPPER][present[..., Sign.LUNG] == 0].any()


def test_training_may_begin_with_older_weights(tmp_path: Path) -> None:
    """Tower, projector and language model are taken over; words they did not know begin as they are."""
    old = new_model(5)
    write_folder(old, tmp_path / "old")
    eyes = Eyes(0)
    eyes.take_over(tmp_path / "old")
    model = model_with(eyes, 0, tmp_path / "old")

    expected = new_model(5).bfloat16().float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_both_stages_run_and_resume(tmp_path: Path) -> None:
    """Vision, then decoder; each goes on from its checkpoint and leaves the tower as it was."""
    torch.set_num_threads(1)
    said: list[str] = []
    vision = {"studies": 1, "slabs": 2, "held_out": 2}
    train_vision(tmp_path, VisionPlan(steps=1, **vision), say=said.append)
    train_vision(tmp_path, VisionPlan(steps=2, **vision), say=said.append)
    decoder = {"short": 0.5, "reports": 2, "fresh": 1, "first": 2, "held_out": 1}
    train_decoder(tmp_path, DecoderPlan(steps=1, **decoder), say=said.append)
    train_decoder(tmp_path, DecoderPlan(steps=2, **decoder), say=said.append)

    assert torch.load(tmp_path / "vision.pt", weights_only=True)["step"] == 2
    state = torch.load(tmp_path / "decoder.pt", weights_only=True)
    tower = model_with(load_eyes(tmp_path, 0), 0).model.vision_tower.state_dict()
    assert state["step"] == 2
    assert all(torch.equal(state["model"][f"model.vision_tower.{name}"], value) for name, value in tower.items())
