"""Training: the pieces that must agree with the product, on a few small steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from service.shared.settings import PruningMethod
from workers.demo_model.carry_over import carry_over
from workers.demo_model.encode import (
    Encoded,
    Seen,
    draw_setting,
    encode,
    guide_of,
    see,
    show_pruned,
    show_suspects,
)
from workers.demo_model.folder import new_model, write_folder
from workers.demo_model.makers import made
from workers.demo_model.optimise import Schedule, knows_half
from workers.demo_model.paste import paste
from workers.demo_model.phantom import Modality, Protocol, as_slabs, build, scan
from workers.demo_model.pool import MOST_MOVED, TRAINING_SEEDS, Mixture, examples, expose, member_of, moved
from workers.demo_model.render import Mask
from workers.demo_model.sharpen import pooled, sharpen
from workers.demo_model.slab_signs import NAMES, slab_signs
from workers.demo_model.targets import SIGNS, Sign, targets_of
from workers.demo_model.train_decoder import DecoderPlan, load_eyes, model_with, train_decoder
from workers.demo_model.train_vision import (
    SLABS_AT_ONCE,
    Eyes,
    VisionPlan,
    batches,
    dense_loss,
    eyes_of,
    slab_loss,
    train_vision,
)

SLABS = Protocol(120, slices=6)


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    torch.set_num_threads(1)
    example = expose(member_of(build(3, SLABS)), np.random.default_rng(0))
    return encode(Eyes(0).eval(), see(example))


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


def test_each_scan_of_a_chest_shows_other_nodules_on_the_same_body() -> None:
    """What is pasted is marked as what is rendered; what is not pasted over stays as it was."""
    scene = next(one for seed in range(20) if not (one := build(seed, SLABS, nodules=0)).findings.effusions)
    shown = [paste(scene, np.random.default_rng(seed), 8) for seed in (1, 2)]
    one, other = (member_of(pasted).tokens.present[..., Sign.NODULE] for pasted in shown)
    free = (shown[0].masks == scene.masks) & (shown[0].hu == scene.hu)

    assert one.any()
    assert other.any()
    assert not (one == other).all()
    assert all(len(pasted.labels.nodules) == len(pasted.findings.nodules) > 0 for pasted in shown)
    assert 0.9 < free.mean() < 1
    magnetic = build(1, SLABS, modality=Modality.MR)
    assert paste(magnetic, np.random.default_rng(1), 8) is magnetic


def test_a_missed_nodule_of_ten_millimetres_costs_more_than_one_of_five() -> None:
    """What cannot be seen must not drown what can."""
    present = torch.zeros(1, 4, SIGNS)
    present[0, 0, Sign.NODULE] = 1
    wrong = torch.zeros(1, 4, SIGNS + 1)
    wrong[0, 0, Sign.NODULE] = -3

    def cost(mm: float) -> float:
        diameter = torch.zeros(1, 4)
        diameter[0, 0] = float(np.log(mm))
        right = wrong.clone()
        right[..., SIGNS] = diameter - 2.3
        return float(dense_loss(right, present, torch.ones_like(present), diameter))

    assert cost(10.0) > cost(25.0) > cost(7.0) > cost(5.0)


def test_a_moved_scan_has_its_targets_where_it_shows_them() -> None:
    """Dark lung, its cells and the sides of the body move together."""
    example = expose(member_of(build(3, SLABS)), np.random.default_rng(0))
    there = moved(example, np.random.default_rng(5))
    sides = there.member.tokens.present[..., [Sign.RIGHT, Sign.LEFT]].sum(axis=1) > 0

    down, right = (int(pixels) for pixels in np.random.default_rng(5).integers(-MOST_MOVED, MOST_MOVED + 1, 2))
    assert (down, right) != (0, 0)
    inner = slice(MOST_MOVED, -MOST_MOVED)
    rolled = np.roll(example.images, (down, right), axis=(1, 2))
    assert (there.images[:, inner, inner] == rolled[:, inner, inner]).all()
    slabs = as_slabs(there.phantom)
    again = targets_of(slabs, 12)
    assert (there.member.patches.present == again.present).all()
    red, lung = there.images[..., 0], (slabs.masks & Mask.LUNG) > 0
    assert red[lung].mean() < 0.5 * red[(slabs.masks & Mask.BODY) > 0].mean()
    shows = example.member.tokens.present[..., [Sign.RIGHT, Sign.LEFT]].sum(axis=1) > 0
    assert (sides == shows).mean() > 0.9


def test_a_moved_nodule_is_still_a_target() -> None:
    """It is looked for where the field of view now is."""
    seed = next(s for s in range(100) if (n := build(s, SLABS).findings.nodules) and n[0].diameter_mm > 12)
    example = expose(member_of(build(seed, SLABS)), np.random.default_rng(0))
    random = np.random.default_rng(0)

    for _ in range(8):
        there = moved(example, random).member
        assert there.patches.present[..., Sign.NODULE].any()
        assert (there.patches.log_diameter.max(axis=1) == example.member.patches.log_diameter.max(axis=1)).all()


def test_suspects_are_as_many_whatever_the_study(encoded: Encoded) -> None:
    """How many tokens are shown must not tell what is there."""
    black = np.zeros((6, 120, 120, 3), np.uint8)
    blank = encode(Eyes(0).eval(), Seen(black, encoded.labels, encoded.guide, encoded.places, encoded.targets))
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

    assert guide.names == encoded.guide.names
    assert sum(" lung" in name for name in guide.names) == 6


def test_readings_grow_as_the_training_goes_on(encoded: Encoded) -> None:
    """Early ones have a fraction of the tokens, late ones all sizes up to everything."""
    random = np.random.default_rng(0)
    shares = {
        over: np.mean(
            [float(show_pruned(encoded, draw_setting(random, over), random).kept.float().mean()) for _ in range(40)]
        )
        for over in (0.0, 1.0)
    }

    assert shares[0.0] < 0.5 < shares[1.0]


def test_a_sharpened_projection_has_no_mean_and_shows_the_signs() -> None:
    """What all tokens share is gone; the signs are told apart by more, and little of the rest is lost."""
    torch.set_num_threads(1)
    eyes = Eyes(0).eval()
    studies = [expose(member_of(build(seed, SLABS)), np.random.default_rng(seed)) for seed in range(3)]
    tokens = torch.cat([pooled(eyes, one).flatten(0, 1) for one in studies])
    before = eyes.projector.mm_input_projection_weight.detach().clone()
    sharpen(eyes, studies, seed=0)
    after = eyes.projector.mm_input_projection_weight.detach()

    assert (tokens @ after).mean(dim=0).norm() < 0.2 * (tokens @ before).mean(dim=0).norm()
    centred = tokens - tokens.mean(dim=0)
    old, new = centred @ before, centred @ after
    assert (new @ torch.linalg.lstsq(new, old).solution - old).norm() < 0.1 * old.norm()
    lung = torch.cat([torch.from_numpy(one.member.tokens.present[..., Sign.LUNG]).flatten() for one in studies]) > 0
    apart = [(some[lung].mean(dim=0) - some[~lung].mean(dim=0)).norm() for some in (old, new)]
    assert apart[1] > apart[0] + 1


def test_a_new_towers_tokens_are_carried_over_to_the_old_ones() -> None:
    """The same tower behind another projection gives the old tokens again."""
    torch.set_num_threads(1)
    old, eyes = Eyes(0).eval(), Eyes(0).eval()
    studies = [expose(member_of(build(seed, SLABS)), np.random.default_rng(seed)) for seed in range(3)]
    with torch.no_grad():
        eyes.projector.mm_input_projection_weight.normal_()
    carry_over(eyes, old, studies, seed=0)
    wanted, found = (
        torch.cat([pooled(one, study).flatten(0, 1) for study in studies]) @ one.projector.mm_input_projection_weight
        for one in (old, eyes)
    )

    assert (found - wanted).norm() < 0.05 * (wanted - wanted.mean(dim=0)).norm()


def test_the_older_tower_may_be_of_another_shape(tmp_path: Path) -> None:
    """The language model of a narrow tower's weights goes on behind today's."""
    torch.set_num_threads(1)
    folder = new_model(5)
    folder.config.vision_config.hidden_size = 48
    folder.model.vision_tower = SiglipVisionModel(folder.config.vision_config)
    folder.model.multi_modal_projector = Gemma3MultiModalProjector(folder.config)
    folder.save_pretrained(tmp_path / "old")
    eyes, old = Eyes(0).eval(), eyes_of(tmp_path / "old")
    studies = [expose(member_of(build(seed, SLABS)), np.random.default_rng(seed)) for seed in range(2)]
    carry_over(eyes, old, studies, seed=0)

    assert pooled(old, studies[0]).shape[-1] == 48
    assert eyes.projector.mm_input_projection_weight.isfinite().all()


def test_makers_make_other_studies_than_each_other_and_the_same_again() -> None:
    """Two processes in turn; what they make goes by seed, rank and step alone."""
    plan = VisionPlan(studies=1, slabs=4)
    one, other = (made(partial(batches, plan, 0, 0), 2) for _ in range(2))
    first, second = next(one), next(one)

    assert first[0].shape == second[0].shape == (4, 120, 120, 3)
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, next(other), strict=True))


def test_carrying_over_needs_older_weights(tmp_path: Path) -> None:
    torch.save({"eyes": Eyes(0).state_dict()}, tmp_path / "vision.pt")
    with pytest.raises(SystemExit, match="--carry goes on from older weights"):
        train_decoder(tmp_path, DecoderPlan(sharpen=0, carry=2))


def test_half_precision_gives_nearly_the_same() -> None:
    """Signs and gradients of the tower in bfloat16, slabs in parts, are those in float32."""
    torch.set_num_threads(1)
    eyes = Eyes(0)
    pixels = torch.randn(SLABS_AT_ONCE + 2, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    weight = eyes.tower.encoder.layers[0].mlp.fc1.weight
    found = []
    for run in (eyes, eyes.in_half):
        _, on_tokens = run(pixels)
        found.append((on_tokens, *torch.autograd.grad(on_tokens.square().mean(), weight)))

    assert torch.allclose(found[0][0], found[1][0], atol=0.1)
    assert torch.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), dim=0) > 0.99


def test_a_slab_is_judged_by_its_likeliest_places() -> None:
    """The worst false place and the best true one count; what nobody could say and other places do not."""
    logits = torch.full((1, 4, SIGNS + 1), -9.0)
    present, weight, log_diameter = torch.zeros(1, 4, SIGNS), torch.ones(1, 4, SIGNS), torch.zeros(1, 4)
    present[0, 0, Sign.NODULE], log_diameter[0, 0], weight[0, 1, Sign.NODULE] = 1, np.log(10), 0
    logits[0, :, Sign.NODULE] = torch.tensor([9.0, 9.0, -9.0, -9.0])
    right = slab_loss(logits, present, weight, log_diameter)
    logits[0, 2, Sign.NODULE] = 5
    vessel = slab_loss(logits, present, weight, log_diameter)
    logits[0, 0, Sign.NODULE] = -5

    assert right < 0.01 < 4 < vessel < slab_loss(logits, present, weight, log_diameter)
    assert slab_loss(logits, torch.zeros_like(present), torch.zeros_like(weight), log_diameter) == 0


def test_slabs_are_asked_what_they_show() -> None:
    """The nodule's slabs on its side; nothing on the other."""
    seed = next(s for s in range(100) if (n := build(s, SLABS).findings.nodules) and n[0].diameter_mm > 12)
    member = member_of(build(seed, SLABS))
    found, weight = slab_signs(member.tokens, member.scene.labels)
    column = dict(zip(NAMES, found.T, strict=True))
    side = member.scene.labels.nodules[0].side.value
    other = "left" if side == "right" else "right"

    assert 1 <= column["nodule"].sum() < 6
    assert (column[f"nodule {side}"] == column["nodule"]).all()
    assert not column[f"nodule {other}"].any()
    assert weight[column["nodule"] > 0].all()


def test_plaques_are_pasted_where_they_are_asked_for() -> None:
    """The tower sees many; the language model as many as there are, or it would guess."""

    def calcified(share: float) -> int:
        drawn = examples(4, 0, 0, 1, Mixture(size=1, other_share=0, plaques_share=share))
        return sum(next(drawn)[0].labels.calcification for _ in range(12))

    assert calcified(0.0) < calcified(1.0) == 12


def test_short_readings_without_the_towers_heads_are_refused(tmp_path: Path) -> None:
    """A model folder gives tower and projector, not the heads that choose the suspects; the remedy is named."""
    write_folder(new_model(5), tmp_path / "old")
    with pytest.raises(SystemExit, match=r"vision\.pt, which is missing: give --short 0"):
        train_decoder(tmp_path, DecoderPlan(short=0.5, sharpen=0), start=tmp_path / "old")
    with pytest.raises(SystemExit, match=r"vision\.pt is missing: train vision first, or give --start"):
        train_decoder(tmp_path, DecoderPlan())
    with pytest.raises(SystemExit, match="--sharpen 0"):
        train_decoder(tmp_path, DecoderPlan(short=0.5), start=tmp_path / "old")


def test_the_decoder_trains_on_the_tower_of_a_model_folder(tmp_path: Path) -> None:
    """Without the first stage's checkpoint; resumed, it keeps the projection that was fitted at the beginning."""
    torch.set_num_threads(1)
    old = new_model(5)
    write_folder(old, tmp_path / "old")
    plan = {"reports": 2, "fresh": 1, "first": 2, "held_out": 1, "sharpen": 2}
    said: list[str] = []
    train_decoder(tmp_path, DecoderPlan(steps=1, **plan), start=tmp_path / "old", say=said.append)
    one = torch.load(tmp_path / "decoder.pt", weights_only=True)["model"]
    train_decoder(tmp_path, DecoderPlan(steps=2, **plan), start=tmp_path / "old", say=said.append)
    two = torch.load(tmp_path / "decoder.pt", weights_only=True)["model"]

    projection = "model.multi_modal_projector.mm_input_projection_weight"
    assert not torch.equal(one[projection], old.bfloat16().float().state_dict()[projection])
    assert torch.equal(one[projection], two[projection])
    assert all(torch.equal(value, two[name]) for name, value in one.items() if "vision_tower" in name)


def test_training_computes_in_bfloat16_where_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it is put together from other instructions, ten times as slow."""
    for known in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: {"avx512_bf16": known})
        assert knows_half() is known


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
    decoder = {"short": 0.5, "sharpen": 0, "reports": 2, "fresh": 1, "first": 2, "held_out": 1}
    train_decoder(tmp_path, DecoderPlan(steps=1, **decoder), say=said.append)
    train_decoder(tmp_path, DecoderPlan(steps=2, **decoder), say=said.append)

    assert torch.load(tmp_path / "vision.pt", weights_only=True)["step"] == 2
    state = torch.load(tmp_path / "decoder.pt", weights_only=True)
    tower = model_with(load_eyes(tmp_path, DecoderPlan(), None), 0).model.vision_tower.state_dict()
    assert state["step"] == 2
    assert all(torch.equal(state["model"][f"model.vision_tower.{name}"], value) for name, value in tower.items())
