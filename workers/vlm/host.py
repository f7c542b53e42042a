"""The way of one study through any host: images -> slice stage -> tower -> token stage -> language model -> text.

A host says how its processor, tower, prompt and generate() are fed; everything else is here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from service.shared.messages import FindingName, Flag, ModelIdentity
from service.shared.settings import ConfigurationError, PruningSettings
from workers.errors import Refusal, RefusalCode
from workers.faults import Fault, fault_of
from workers.guide import Guide
from workers.pruning.slices import SliceChoice
from workers.questions import Question
from workers.vlm import Generation, Reading
from workers.vlm.assemble import Prompt, PrunedPrompt, without
from workers.vlm.choice import Choice, Said, can_be_shared, copied, distinct, probabilities
from workers.vlm.decoding import Decoded, Over, Witness, end_of, greedy
from workers.vlm.encode import Encoded, Prepared, encode
from workers.vlm.folder import Opened
from workers.vlm.memory import peak_bytes, release, start_peak
from workers.vlm.prompt import DroppedSlices
from workers.vlm.record import record
from workers.vlm.stages import choose_slices, choose_tokens, fewest_tokens, guards, is_scored
from workers.vlm.survivors import Survivors, cache_key, load, store, survivors_of

log = structlog.get_logger(__name__)

FEWER = 8  # times fewer patches at a time, where memory did not suffice
PATCHES_AT_ONCE = 32768  # through the tower: 8 slices of 4096 patches, about 1 GiB of activations in bfloat16


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

    def read(self, reading: Reading) -> Generation:
        """Look at one study and say what is on it."""
        return self.say([self.look(reading)])[0]

    @torch.inference_mode()
    def look(self, reading: Reading) -> Seen:
        """See VisionLanguageModel.look."""
        require_images(reading.images, reading.guide)
        pruning, guide, cache = reading.pruning, reading.guide, reading.cache
        start_peak(self.opened.device)
        timings: dict[str, float] = {}
        survivors, key = None, ""
        if cache is not None:
            with self._timed(timings, "study_cache"):
                key = cache_key(reading.images, pruning, guide, self.identity)
                survivors = load(cache, key, self.opened.device)
            if survivors is None:
                del timings["study_cache"]  # says that it was used
        if survivors is None:
            with self._timed(timings, "processor"):
                prepared = self.prepare(reading.images)
            with self._timed(timings, "slice_stage"):
                choice = choose_slices(prepared.pixels, pruning, guide)
        else:
            prepared = Prepared(torch.empty(0), survivors.patch_rows, survivors.patch_columns)
            choice = survivors.choice
        asked = self.ask(reading.prompt, prepared, choice, reading.dropped)
        shown = (choice.kept.nonzero().flatten() + 1).tolist()
        closed = () if reading.questions is None else tuple(reading.questions(shown))
        choices = [self.choice_of(question) for question in closed]
        if survivors is None:
            self._require_room(asked, prepared, choice, pruning, reading.max_new_tokens)
            survivors = self._survivors(prepared, choice, pruning, guide, timings)
            if cache is not None:
                try:
                    store(cache, key, survivors)
                except OSError as error:  # a full disk costs the next prompt time, not this study its report
                    log.warning("features_not_kept", error=type(error).__name__)
        pruned = without(asked, self.placeholder, survivors)
        turn = max((one.longest for one in choices), default=0)
        self._require_context(len(pruned.input_ids), reading.max_new_tokens + turn)
        text_tokens = len(asked.input_ids) - survivors.kept.numel()
        grid = self.token_grid(prepared)
        return Seen(pruned, survivors, grid, text_tokens, reading.max_new_tokens, closed, tuple(choices), timings)

    @torch.inference_mode()
    def say(self, studies: Sequence[Seen]) -> list[Generation]:
        """See VisionLanguageModel.say."""
        decoded = self.decode([seen.prompt for seen in studies], [seen.max_new_tokens for seen in studies])
        cache = decoded.cache if len(studies) == 1 else None  # others' padding would shift a sliding window
        generations = []
        for seen, tokens, ending, generated in zip(
            studies, decoded.tokens, decoded.endings, decoded.generated, strict=True
        ):
            timings = seen.timings_s | {"prefill": decoded.prefill_s, "decode": decoded.decode_s}
            answers: tuple[tuple[float, ...], ...] = ()
            if seen.choices:
                with self._timed(timings, "questions"):
                    answers = self.answer(seen.prompt, tokens, seen.choices, cache)
            generations.append(
                record(
                    seen.survivors,
                    seen.grid,
                    text=self.text_of(tokens),
                    ending=ending,
                    text_tokens=seen.text_tokens,
                    generated=generated,
                    questions=seen.questions,
                    answers=answers,
                    timings_s=timings,
                    memory_peak_bytes=peak_bytes(self.opened.device),
                )
            )
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
        return encode(
            lambda pixels: self.features(pixels.to(self.opened.device, self.opened.dtype), prepared),
            prepared.pixels[kept],
            self.watched_layer,
            groups,
            scored=scored,
            at_once=max(1, at_once // (prepared.patch_rows * prepared.patch_columns)),
        )

    def decode(self, prompts: Sequence[PrunedPrompt], max_new_tokens: Sequence[int]) -> Decoded:
        """Generate greedily for some studies together, each up to its own end, limit or loop."""
        ends = self._ends()
        witness = Witness(self._now)
        arguments = self.arguments(prompts)
        length = arguments["input_ids"].shape[1]
        over = Over(length, max_new_tokens, ends)
        try:
            output = self.model.generate(
                **arguments,
                generation_config=greedy(max(max_new_tokens), ends, self._pad(), static=self.opened.compile),
                logits_processor=LogitsProcessorList([witness]),
                stopping_criteria=StoppingCriteriaList([over]),
            )
        finally:
            self.forget()
        witness.finish()
        rows = output.sequences[:, length:].cpu()
        found = [end_of(row.tolist(), limit, ends) for row, limit in zip(rows, over.lengths, strict=True)]
        return Decoded(
            tokens=[row[:count] for row, (count, _, _) in zip(rows, found, strict=True)],
            endings=[ending for _, _, ending in found],
            generated=[generated for _, generated, _ in found],
            cache=output.past_key_values,
            prefill_s=witness.prefill_s,
            decode_s=witness.decode_s,
        )

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
        inputs, tokens = int(choice.kept.sum()), self.groups(prepared).shape[0]
        self._require_context(len(asked.input_ids) - inputs * (tokens - fewest_tokens(tokens, pruning)), max_new_tokens)

    def _require_context(self, length: int, max_new_tokens: int) -> None:
        context = self.model.config.get_text_config().max_position_embeddings
        if length + max_new_tokens > context:
            raise Refusal(
                RefusalCode.CONTEXT_TOO_LONG,
                f"the prompt with its visual tokens is {length} tokens long; with the {max_new_tokens} of the report "
                f"it does not fit the {context} that the model takes: lower [series] max_slices or [pruning] tau",
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


def require_images(images: NDArray[np.uint8], guide: Guide | None) -> None:
    """Refusal where there is nothing to look at; ValueError where it is no stack of pictures, or not the guide's."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (I, H, W, 3) uint8, not {images.shape} {images.dtype}")
    if images.size == 0:
        raise Refusal(RefusalCode.TOO_FEW_SLICES, "there is no slice to look at")
    if guide is not None and len(guide.positions_mm) != len(images):
        raise ValueError(f"the guide knows {len(guide.positions_mm)} inputs, there are {len(images)}")
