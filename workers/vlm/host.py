"""The way of one study through any host: images -> slice stage -> tower -> token stage -> language model -> text.

A host says how its processor, tower, prompt and generate() are fed; everything else is here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LogitsProcessorList

from service.shared.messages import TOKEN_CODES, FindingName, Flag, ModelIdentity, TokenState
from service.shared.settings import ConfigurationError, PruningMethod, PruningSettings
from workers.errors import Refusal, RefusalCode
from workers.faults import Fault, fault_of
from workers.guide import Guide
from workers.pruning import guarded
from workers.pruning.attention import received_attention
from workers.pruning.finite import require_finite
from workers.pruning.groups import group_mean
from workers.pruning.guarded import Guards, keep_with_gap_cap
from workers.pruning.slices import SliceChoice, keep_all, keep_changed
from workers.pruning.tokens import Reduced, contextual_count, keep_every_token, reduce_tokens
from workers.questions import Question
from workers.vlm import Generation, Questions, TokenCounts
from workers.vlm.choice import Choice, Said, can_be_shared, copied, distinct, probabilities
from workers.vlm.decoding import Decoded, Witness, greedy, up_to_end
from workers.vlm.folder import Opened
from workers.vlm.memory import peak_bytes, release, start_peak
from workers.vlm.prompt import DroppedSlices
from workers.vlm.survivors import Survivors, cache_key, load, store, survivors_of
from workers.vlm.tap import watching

log = structlog.get_logger(__name__)

FEWER = 8  # times fewer patches at a time, where memory did not suffice
PATCHES_AT_ONCE = 32768  # through the tower: 8 slices of 4096 patches, about 1 GiB of activations in bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The inputs as the processor gives them.

    pixels: (I, ...) float32 on the CPU, one row per input, in the tower's order.
    patch_rows, patch_columns: of one input, before the projector pools them.
    """

    pixels: Tensor
    patch_rows: int
    patch_columns: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """K inputs after the tower and the projector.

    features: (K, n, c); deepstack: further features per token, each (K, n, c).
    received: (K, n) and keys: (K, n, d), float32, of the last vision layer; None when nobody watched.
    """

    features: Tensor
    deepstack: tuple[Tensor, ...]
    received: Tensor | None
    keys: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The whole prompt before tokens are taken out.

    input_ids: (L,) int64, one placeholder for each token of each encoded input, in order.
    positions: (3, L) int64 where the host's positions are not simply 0 .. L-1.
    """

    input_ids: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PrunedPrompt:
    """What the language model gets: shortened ids and positions, the features of the surviving placeholders."""

    input_ids: Tensor  # (L',)
    positions: Tensor | None  # (3, L')
    features: Tensor  # (kept, c)
    deepstack: tuple[Tensor, ...]  # each (kept, c)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One study after the tower and the token stage, ready to be read by the language model."""

    prompt: PrunedPrompt
    survivors: Survivors
    grid: tuple[int, int]  # rows and columns of tokens
    text_tokens: int
    max_new_tokens: int
    questions: tuple[Question, ...]
    choices: tuple[Choice, ...]
    timings_s: dict[str, float]


class Host(ABC):
    """A loaded model and how it is fed. Between two calls it holds nothing of a study."""

    architecture_class: ClassVar[type]  # the stock class of transformers

    def __init__(self, opened: Opened, model: Any) -> None:
        self.opened = opened
        self.model = model

    @classmethod
    @abstractmethod
    def load(cls, opened: Opened) -> Host:
        """Load weights, tokenizer and processor of `opened.folder`."""

    @property
    def identity(self) -> ModelIdentity:
        return self.opened.identity

    @property
    def flags(self) -> tuple[Flag, ...]:
        return self.opened.flags

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.opened.preprocessing

    @property
    def coded_findings(self) -> tuple[FindingName, ...]:
        return self.opened.coded_findings

    @property
    def limitations(self) -> tuple[str, ...]:
        return self.opened.limitations

    @property
    @abstractmethod
    def placeholder(self) -> int:
        """The id that stands for one visual token in the prompt."""

    @property
    @abstractmethod
    def watched_layer(self) -> nn.Module:
        """The attention module of the last vision layer."""

    @abstractmethod
    def prepare(self, images: NDArray[np.uint8]) -> Prepared:
        """Run the processor on (I, H, W, 3) images."""

    @abstractmethod
    def groups(self, prepared: Prepared) -> Tensor:
        """Return the patches that the projector pools into each token, (n, patches per token)."""

    @abstractmethod
    def token_grid(self, prepared: Prepared) -> tuple[int, int]:
        """Return rows and columns of tokens of one input."""

    @abstractmethod
    def features(self, pixels: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run tower and projector on some inputs: (k, n, c) and the deepstack features, each (k, n, c)."""

    @abstractmethod
    def ask(self, question: str, prepared: Prepared, choice: SliceChoice, dropped: DroppedSlices) -> Prompt:
        """Build the prompt in the model's own form, with placeholders for the kept inputs only."""

    @abstractmethod
    def arguments(self, prompts: Sequence[PrunedPrompt]) -> dict[str, Any]:
        """Return what forward() and generate() take for some studies, padded on the left."""

    @property
    @abstractmethod
    def words(self) -> Any:
        """The tokenizer."""

    @property
    def template(self) -> Any:
        """Who applies the chat template."""
        return self.words

    @property
    def template_options(self) -> dict[str, Any]:
        """What the chat template of this architecture needs to be told."""
        return {}

    def positions_after(self, prompt: PrunedPrompt, length: int, more: int) -> Tensor:
        """Return the positions of `more` tokens that follow `length` others, of which the first are the prompt."""
        return torch.arange(length, length + more)[None]

    def forget(self) -> None:  # noqa: B027  # most stock classes keep nothing
        """Clear what the stock class keeps of a request."""

    @abstractmethod
    def text_of(self, tokens: Tensor) -> str:
        """Decode generated tokens, without special ones."""

    def read(
        self,
        images: NDArray[np.uint8],
        prompt: str,
        pruning: PruningSettings,
        *,
        max_new_tokens: int,
        dropped: DroppedSlices = DroppedSlices.OMIT,
        guide: Guide | None = None,
        questions: Questions | None = None,
        cache: Path | None = None,
    ) -> Generation:
        """See VisionLanguageModel.read."""
        seen = self.look(
            images,
            prompt,
            pruning,
            max_new_tokens=max_new_tokens,
            dropped=dropped,
            guide=guide,
            questions=questions,
            cache=cache,
        )
        return self.say([seen])[0]

    @torch.inference_mode()
    def look(
        self,
        images: NDArray[np.uint8],
        prompt: str,
        pruning: PruningSettings,
        *,
        max_new_tokens: int,
        dropped: DroppedSlices = DroppedSlices.OMIT,
        guide: Guide | None = None,
        questions: Questions | None = None,
        cache: Path | None = None,
    ) -> Seen:
        """See VisionLanguageModel.look."""
        start_peak(self.opened.device)
        timings: dict[str, float] = {}
        survivors, key = None, ""
        if cache is not None:
            with self._timed(timings, "study_cache"):
                key = cache_key(images, pruning, guide, self.identity)
                survivors = load(cache, key, self.opened.device)
            if survivors is None:
                del timings["study_cache"]  # says that it was used
        if survivors is None:
            with self._timed(timings, "processor"):
                prepared = self.prepare(images)
            with self._timed(timings, "slice_stage"):
                choice = choose_slices(prepared.pixels, pruning, guide)
        else:
            prepared = Prepared(torch.empty(0), survivors.patch_rows, survivors.patch_columns)
            choice = survivors.choice
        asked = self.ask(prompt, prepared, choice, dropped)
        closed = () if questions is None else tuple(questions((choice.kept.nonzero().flatten() + 1).tolist()))
        choices = [self.choice_of(question) for question in closed]
        if survivors is None:
            self._require_room(asked, prepared, choice, pruning, max_new_tokens)
            survivors = self._survivors(prepared, choice, pruning, guide, timings)
            if cache is not None:
                try:
                    store(cache, key, survivors)
                except OSError as error:  # a full disk costs the next prompt time, not this study its report
                    log.warning("features_not_kept", error=type(error).__name__)
        pruned = without(asked, self.placeholder, survivors)
        turn = max((one.longest for one in choices), default=0)
        self._require_context(len(pruned.input_ids), max_new_tokens + turn)
        text_tokens = len(asked.input_ids) - survivors.kept.numel()
        grid = self.token_grid(prepared)
        return Seen(pruned, survivors, grid, text_tokens, max_new_tokens, closed, tuple(choices), timings)

    @torch.inference_mode()
    def say(self, studies: Sequence[Seen]) -> list[Generation]:
        """See VisionLanguageModel.say."""
        decoded = self.decode([seen.prompt for seen in studies], max(seen.max_new_tokens for seen in studies))
        cache = decoded.cache if len(studies) == 1 else None  # others' padding would shift a sliding window
        generations = []
        for seen, words in zip(studies, decoded.tokens, strict=True):
            tokens = words[: seen.max_new_tokens]
            timings = seen.timings_s | {"prefill": decoded.prefill_s, "decode": decoded.decode_s}
            answers: tuple[tuple[float, ...], ...] = ()
            if seen.choices:
                with self._timed(timings, "questions"):
                    answers = self.answer(seen.prompt, tokens, seen.choices, cache)
            generations.append(self._generation(seen, tokens, answers, timings))
        return generations

    def _survivors(
        self,
        prepared: Prepared,
        choice: SliceChoice,
        pruning: PruningSettings,
        guide: Guide | None,
        timings: dict[str, float],
    ) -> Survivors:
        """Tower and token stage; where memory does not suffice, once more with fewer slices at a time."""
        at_once = PATCHES_AT_ONCE
        while True:
            try:
                with self._timed(timings, "vision"):
                    encoded = self.encode(
                        prepared, choice.kept, self.groups(prepared), scored=is_scored(pruning), at_once=at_once
                    )
                with self._timed(timings, "token_stage"):
                    guarding = guards(guide, pruning, choice, self.token_grid(prepared))
                    reduced = choose_tokens(encoded, pruning, guarding)
                    rows, columns = prepared.patch_rows, prepared.patch_columns
                    return survivors_of(choice, reduced, encoded.deepstack, rows, columns)
            except Exception as error:
                if fault_of(error) is not Fault.OUT_OF_MEMORY or at_once < PATCHES_AT_ONCE:
                    raise
                at_once = PATCHES_AT_ONCE // FEWER
            # outside the handler, whose traceback holds the tensors that did not fit
            log.warning("out_of_memory", patches_at_once=at_once)
            release(self.opened.device)

    def encode(
        self, prepared: Prepared, kept: Tensor, groups: Tensor, *, scored: bool, at_once: int = PATCHES_AT_ONCE
    ) -> Encoded:
        """Run the tower over the kept inputs, a few at a time, and score their patches where asked to.

        kept: (I,) bool; groups: (n, patches per token); at_once: patches. NotFinite when a feature is.
        """
        some = max(1, at_once // (prepared.patch_rows * prepared.patch_columns))
        parts: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        received: list[Tensor] = []
        mean_keys: list[Tensor] = []

        def score(queries: Tensor, keys: Tensor, scale: float) -> None:
            received.append(group_mean(received_attention(queries, keys, scale=scale), groups))
            mean_keys.append(group_mean(keys.float().mean(dim=1), groups))

        for pixels in prepared.pixels[kept].split(some):  # type: ignore[no-untyped-call]
            moved = pixels.to(self.opened.device, self.opened.dtype)
            if scored:
                with watching(self.watched_layer, score):
                    parts.append(self.features(moved, prepared))
            else:
                parts.append(self.features(moved, prepared))
        features = torch.cat([part[0] for part in parts])
        require_finite(features, "visual features")
        return Encoded(
            features=features,
            deepstack=tuple(torch.cat(layer) for layer in zip(*(part[1] for part in parts), strict=True)),
            received=torch.cat(received) if scored else None,
            keys=torch.cat(mean_keys) if scored else None,
        )

    def decode(self, prompts: Sequence[PrunedPrompt], max_new_tokens: int) -> Decoded:
        """Generate greedily for some studies together."""
        ends = self._ends()
        witness = Witness(self._now)
        arguments = self.arguments(prompts)
        try:
            output = self.model.generate(
                **arguments,
                generation_config=greedy(max_new_tokens, ends, self._pad(), static=self.opened.compile),
                logits_processor=LogitsProcessorList([witness]),
            )
        finally:
            self.forget()
        witness.finish()
        generated = output.sequences[:, arguments["input_ids"].shape[1] :].cpu()
        tokens = [up_to_end(row, ends) for row in generated]
        return Decoded(tokens, output.past_key_values, witness.prefill_s, witness.decode_s)

    def choice_of(self, question: Question) -> Choice:
        """Build the turn of a closed question, as the model's own chat template has it after a report.

        ConfigurationError when the model's words cannot tell the answers apart.
        """
        report = "Findings: none."  # stands for any; what follows it does not depend on it
        turns = [("user", "Read."), ("assistant", report), ("user", question.text)]
        text = self.template.apply_chat_template(
            [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in turns],
            tokenize=False,
            add_generation_prompt=True,
            **self.template_options,
        )
        _, found, turn = text.partition(report)
        turn_ids = self.words(turn, add_special_tokens=False)["input_ids"]
        if not found or not turn_ids or turn_ids[0] not in {*self._ends(), *self.words.all_special_ids}:
            raise ConfigurationError(
                f"[model] path: the chat template of {self.opened.folder} does not end a report with a special token, "
                "so closed questions cannot follow it"
            )
        answers = [self.words(answer, add_special_tokens=False)["input_ids"] for answer in question.answers]
        if not distinct(answers):
            raise ConfigurationError(
                f"[model] path: the tokenizer of {self.opened.folder} cannot tell apart the answers "
                f"{', '.join(question.answers)}"
            )
        return Choice(tuple(turn_ids), tuple(map(tuple, answers)), turn_ids[0])

    @torch.inference_mode()
    def answer(
        self, prompt: PrunedPrompt, report: Tensor, choices: Sequence[Choice], cache: Any = None
    ) -> tuple[tuple[float, ...], ...]:
        """Weigh the answers to each question as if it alone had been asked right after the report.

        report: its tokens, with or without an end. cache: of decode() for this study alone; without it the prompt
        is read once more.
        """
        words = report[:-1] if len(report) and int(report[-1]) in self._ends() else report
        held = len(prompt.input_ids) + len(report) - 1

        def forward(ids: Tensor, length: int, cache: Any, last: int) -> tuple[Tensor, Any]:
            rows, more = ids.shape
            positions = self.positions_after(prompt, length, more)
            output = self.model(
                input_ids=ids.to(self.opened.device),
                attention_mask=torch.ones(rows, length + more, dtype=torch.long, device=self.opened.device),
                position_ids=positions.expand(*positions.shape[:-2], rows, more).to(self.opened.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
            return output.logits[:, -last:], output.past_key_values  # VideoLlama3 gives all, whatever is asked

        try:
            if can_be_shared(cache) and cache.get_seq_length() == held:
                said = Said(cache, held)
            else:
                output = self.model(**self.arguments([prompt]), use_cache=True, logits_to_keep=1)
                said = Said(output.past_key_values, len(prompt.input_ids))
            missing = words[said.length - len(prompt.input_ids) :]
            if len(missing):  # the last token of a report that was cut, or all of it
                _, cache = forward(missing[None], said.length, copied(said.cache, 1), 1)
                said = Said(cache, said.length + len(missing))
            return tuple(probabilities(forward, said, choice) for choice in choices)
        finally:
            self.forget()

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.model.config.get_text_config().eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _pad(self) -> int:
        pad = self.model.generation_config.pad_token_id
        return int(pad) if pad is not None else next(iter(self._ends()), 0)

    def _require_room(
        self, asked: Prompt, prepared: Prepared, choice: SliceChoice, pruning: PruningSettings, max_new_tokens: int
    ) -> None:
        """Refuse before the tower runs what cannot fit, however many tokens the token stage drops."""
        inputs = int(choice.kept.sum())
        tokens = self.groups(prepared).shape[0]
        fewest = tokens
        if is_scored(pruning):
            targets = contextual_count(tokens, pruning.contextual_fraction)
            fewest = 1 if pruning.method is PruningMethod.GUARDED else min(tokens, 1 + targets)
        self._require_context(len(asked.input_ids) - inputs * (tokens - fewest), max_new_tokens)

    def _require_context(self, length: int, max_new_tokens: int) -> None:
        context = self.model.config.get_text_config().max_position_embeddings
        if length + max_new_tokens > context:
            raise Refusal(
                RefusalCode.CONTEXT_TOO_LONG,
                f"the prompt with its visual tokens is {length} tokens long; with the {max_new_tokens} of the report "
                f"it does not fit the {context} that the model takes: lower [series] max_slices or [pruning] tau",
            )

    def _generation(
        self, seen: Seen, tokens: Tensor, answers: tuple[tuple[float, ...], ...], timings: dict[str, float]
    ) -> Generation:
        survivors = seen.survivors
        kept = survivors.choice.kept.numpy()
        inputs, per_input = len(kept), survivors.kept.shape[1]
        codes = np.full((inputs, per_input), TOKEN_CODES[TokenState.NOT_ENCODED], dtype=np.uint8)
        merged_into = np.full((inputs, per_input), -1, dtype=np.int32)
        scores = np.full((inputs, per_input), np.nan, dtype=np.float32)
        merged_into[kept] = survivors.merged_into.cpu().numpy()
        scores[kept] = survivors.scores.cpu().numpy()
        codes[kept] = np.where(
            survivors.kept.cpu().numpy(),
            TOKEN_CODES[TokenState.KEPT],
            np.where(merged_into[kept] >= 0, TOKEN_CODES[TokenState.MERGED], TOKEN_CODES[TokenState.DROPPED]),
        )
        rows, columns = seen.grid
        return Generation(
            text=self.text_of(tokens),
            truncated=len(tokens) == 0 or int(tokens[-1]) not in self._ends(),
            inputs_kept=kept,
            represented_by=survivors.choice.anchor.numpy().astype(np.int32),
            tokens=codes,
            merged_into=merged_into,
            scores=scores,
            token_rows=rows,
            token_columns=columns,
            counts=TokenCounts(
                tokens_in=inputs * per_input,
                tokens_kept=int((codes == TOKEN_CODES[TokenState.KEPT]).sum()),
                tokens_merged=int((codes == TOKEN_CODES[TokenState.MERGED]).sum()),
                tokens_text=seen.text_tokens,
                tokens_generated=len(tokens),
            ),
            timings_s=timings,
            memory_peak_bytes=peak_bytes(self.opened.device),
            questions=seen.questions,
            answers=answers,
        )

    def _now(self) -> float:
        if self.opened.device.type == "cuda":
            torch.cuda.synchronize(self.opened.device)
        return perf_counter()

    @contextmanager
    def _timed(self, timings: dict[str, float], step: str) -> Iterator[None]:
        start = self._now()
        yield
        timings[step] = self._now() - start


def is_scored(pruning: PruningSettings) -> bool:
    """Does the token stage run, so that attention must be watched?"""
    return pruning.method is not PruningMethod.OFF and pruning.token_stage


def choose_slices(pixels: Tensor, pruning: PruningSettings, guide: Guide | None = None) -> SliceChoice:
    """The slice stage as the settings ask for it; `guarded` without a guide drops nothing."""
    is_guarded = pruning.method is PruningMethod.GUARDED
    if pruning.method is PruningMethod.OFF or not pruning.slice_stage or (is_guarded and guide is None):
        require_finite(pixels, "slices")
        return keep_all(len(pixels))
    if is_guarded and guide is not None:
        require_finite(pixels, "slices")
        return keep_with_gap_cap(
            torch.from_numpy(guide.tiles),
            torch.from_numpy(guide.positions_mm),
            torch.from_numpy(guide.has_body),
            tile_change=pruning.tile_change,
            gap_cap_mm=pruning.gap_cap_mm,
        )
    return keep_changed(pixels, gamma=pruning.gamma)


def guards(guide: Guide | None, pruning: PruningSettings, choice: SliceChoice, grid: tuple[int, int]) -> Guards | None:
    """What `guarded` knows of the tokens of the kept inputs; None for the other methods."""
    if pruning.method is not PruningMethod.GUARDED:
        return None
    rows, columns = grid
    kept = choice.kept
    if guide is None:
        inputs, tokens = int(kept.sum()), rows * columns
        everywhere = torch.ones(inputs, tokens, dtype=torch.bool)
        regions, salience = torch.zeros(inputs, tokens, 0, dtype=torch.bool), torch.zeros(inputs, tokens)
        return Guards(regions, everywhere, salience, torch.zeros(0), rows, columns, tokens_in=len(kept) * tokens)
    tokens_of = guide.on_grid(rows, columns)
    promised = [pruning.coverage_lung if " lung" in name else pruning.coverage_other for name in guide.names]
    return Guards(
        regions=torch.from_numpy(tokens_of.regions)[kept],
        body=torch.from_numpy(tokens_of.body)[kept],
        salience=torch.from_numpy(tokens_of.salience)[kept],
        coverage=torch.tensor(promised, dtype=torch.float64),
        rows=rows,
        columns=columns,
        tokens_in=len(kept) * rows * columns,
    )


def budget_tokens(pruning: PruningSettings, tokens_in: int) -> int:
    """The token budget as a number, of `tokens_in` tokens before any pruning."""
    budget = pruning.token_budget
    return int(budget * tokens_in + 1e-9) if budget <= 1 else int(budget)


def choose_tokens(encoded: Encoded, pruning: PruningSettings, guarding: Guards | None = None) -> Reduced:
    """The token stage as the settings ask for it."""
    if encoded.received is None or encoded.keys is None:
        return keep_every_token(encoded.features)
    if guarding is not None:
        return guarded.reduce_tokens(
            encoded.received,
            encoded.keys,
            encoded.features,
            guarding,
            tau=pruning.tau,
            sink_ratio=pruning.sink_ratio,
            salience_floor=pruning.salience_floor,
            merge_similarity=pruning.merge_similarity,
            token_budget=budget_tokens(pruning, guarding.tokens_in),
        )
    return reduce_tokens(
        encoded.received,
        encoded.keys,
        encoded.features,
        tau=pruning.tau,
        temperature=pruning.temperature,
        contextual_fraction=pruning.contextual_fraction,
    )


def prune(prompt: Prompt, placeholder: int, reduced: Reduced, deepstack: Sequence[Tensor]) -> PrunedPrompt:
    """Take the tokens that were not kept out of the prompt."""
    everything = keep_all(len(reduced.kept))
    return without(prompt, placeholder, survivors_of(everything, reduced, tuple(deepstack), 0, 0))


def without(prompt: Prompt, placeholder: int, survivors: Survivors) -> PrunedPrompt:
    """Return the prompt with the placeholders of the survivors alone, and their features."""
    visual = prompt.input_ids == placeholder
    survives = torch.ones_like(visual)
    survives[visual] = survivors.kept.flatten().to(visual.device)
    return PrunedPrompt(
        input_ids=prompt.input_ids[survives],
        positions=None if prompt.positions is None else prompt.positions[:, survives],
        features=survivors.features,
        deepstack=survivors.deepstack,
    )


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack (..., L_i) tensors along a new first dimension, filled up on the left with `value`."""
    length = max(row.shape[-1] for row in rows)
    return torch.stack([nn.functional.pad(row, (length - row.shape[-1], 0), value=value) for row in rows])
