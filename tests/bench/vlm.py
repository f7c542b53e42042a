"""Time to first token, memory, tokens per second at the widths of real models, random weights. (`./run bench vlm`)

In one run, in turn and for some rounds: the stock class on every slice; what the reference of MedPruner computes (every
slice through the tower, its last attention as an explicit softmax, then the token stage); ours (dropped slices never
reach the tower, scores in chunks). Which slices are kept is given, not decided: every so-many-th.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LogitsProcessorList,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from service.shared.messages import ModelIdentity
from workers.pruning.groups import group_mean
from workers.pruning.slices import SliceChoice, keep_all
from workers.pruning.tokens import Reduced, reduce_tokens
from workers.vlm.assemble import Prompt, prune
from workers.vlm.decoding import Witness, greedy
from workers.vlm.encode import Encoded, Prepared
from workers.vlm.folder import Opened
from workers.vlm.gemma3 import Gemma3
from workers.vlm.host import Host
from workers.vlm.memory import peak_bytes, release, start_peak
from workers.vlm.qwen3_vl import Qwen3VL
from workers.vlm.tap import watching
from workers.vlm.video_llama3 import VideoLlama3

TEXT_PER_SLICE, TEXT_OF_QUESTION = 6, 48  # tokens
GIB = 2**30
SAME = 0.05  # two shares of layers that differ by less than this part of themselves are called the same


@dataclass(frozen=True, slots=True)
class Dims:
    """One published model. tower: layers, width, inner width; text: the same; patches of one slice per side."""

    tower: tuple[int, int, int]
    text: tuple[int, int, int]
    attention: tuple[int, int, int]  # heads, key-value heads, head width of the text model
    side: int
    patch: int
    tokens: int


DIMS = {
    "medgemma-4b": Dims((27, 1152, 4304), (34, 2560, 10240), (8, 4, 256), 64, 14, 256),
    "qwen3-vl-4b": Dims((24, 1024, 4096), (36, 2560, 9728), (32, 8, 128), 32, 16, 256),
    "hulu-7b": Dims((27, 1152, 4304), (28, 3584, 18944), (28, 4, 128), 32, 14, 256),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way of reading: seconds to the first token, of the tower alone, GiB above the weights, tokens per second."""

    way: str
    first_s: float
    vision_s: float
    peak_gib: float
    per_s: float
    encoded: int
    tokens: int  # of the prompt, visual ones included


def depths(dims: Dims, fraction: float) -> tuple[int, int]:
    """Layers of tower and text model. ValueError where no whole numbers of layers are the same share of both."""
    tower, text = (max(1, round(layers * fraction)) for layers in (dims.tower[0], dims.text[0]))
    if not is_same_share(dims, tower, text):
        shares = (few / dims.tower[0] for few in range(1, dims.tower[0] + 1))
        fitting = (
            share for share in shares if is_same_share(dims, *(round(n[0] * share) for n in (dims.tower, dims.text)))
        )
        raise ValueError(
            f"{tower} of {dims.tower[0]} and {text} of {dims.text[0]} layers are not the same share; take one of "
            + ", ".join(f"{share:.3f}" for share in fitting)
        )
    return tower, text


def is_same_share(dims: Dims, tower: int, text: int) -> bool:
    shares = tower / dims.tower[0], text / dims.text[0]
    return max(shares) - min(shares) <= SAME * max(shares)


def build(name: str, tower: int, layers: int, device: torch.device, dtype: torch.dtype) -> Host:
    """A host around a stock class with random weights; it has no tokenizer, prompts are made of numbers."""
    dims = DIMS[name]
    (_, width, inner), (_, text_width, text_inner) = dims.tower, dims.text
    heads, kv_heads, head_dim = dims.attention
    text: dict[str, Any] = {
        "hidden_size": text_width,
        "intermediate_size": text_inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    vision: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "patch_size": dims.patch}
    config: Any
    make: Callable[[Opened, Any], Host]
    if name == "medgemma-4b":
        config = Gemma3Config(
            text_config=text | {"vocab_size": 262208, "sliding_window": 1024, "query_pre_attn_scalar": 256},
            vision_config=vision
            | {"num_hidden_layers": tower, "num_attention_heads": 16, "image_size": 896, "vision_use_head": False},
            mm_tokens_per_image=dims.tokens,
        )
        kind: Any = Gemma3ForConditionalGeneration
        make = lambda opened, model: Gemma3(opened, model, None)  # noqa: E731
    elif name == "qwen3-vl-4b":
        config = Qwen3VLConfig(
            text_config=text | {"vocab_size": 151936},
            vision_config=vision
            | {
                "depth": tower,
                "num_heads": 16,
                "out_hidden_size": text_width,
                "deepstack_visual_indexes": sorted({tower // 4, tower // 2, 3 * tower // 4}),
            },
            image_token_id=151655,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
        )
        kind = Qwen3VLForConditionalGeneration
        make = lambda opened, model: Qwen3VL(opened, model, None, None)  # noqa: E731
    else:
        config = VideoLlama3Config(
            text_config=text | {"model_type": "qwen2", "vocab_size": 152064},
            vision_config=vision | {"num_hidden_layers": tower, "num_attention_heads": 16},
            image_token_id=151655,
            video_token_id=151655,
        )
        kind = VideoLlama3ForConditionalGeneration
        make = lambda opened, model: VideoLlama3(opened, model, None, None)  # noqa: E731
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model = model.to(device, dtype).eval()
    fill(model)
    model.generation_config.eos_token_id = None
    identity = ModelIdentity(
        name=name,
        architecture=kind.__name__,
        path="",
        weights_sha256="",
        transformers_version="",
        torch_version=str(torch.__version__),
        dtype=str(dtype),
        device=str(device),
        attention="sdpa",
    )
    return make(Opened(Path(), device, dtype, "sdpa", identity, ()), model)


def fill(model: torch.nn.Module) -> None:
    """Random weights of the usual size; a million of them over and over, for billions would take minutes to draw."""
    first = next(model.parameters())
    drawn = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02).to(first.device, first.dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            torch.nn.init.zeros_(bias)
    for weights in model.parameters():
        flat = weights.detach().view(-1)
        for start in range(0, len(flat) if weights.dim() > 1 else 0, len(drawn)):
            part = flat[start : start + len(drawn)]
            part.copy_(drawn[: len(part)])


def prepared(host: Host, dims: Dims, slices: int) -> Prepared:
    """Noise in the form that the host's processor gives."""
    if isinstance(host, Gemma3):
        return host.prepared(torch.randn(slices, 3, dims.side * dims.patch, dims.side * dims.patch))
    temporal = 2 if isinstance(host, Qwen3VL) else 1
    return Prepared(torch.randn(slices, dims.side**2, 3 * temporal * dims.patch**2), dims.side, dims.side)


def asked(host: Host, images: Prepared, inputs: int, tokens: int) -> Prompt:
    """Text and image in turn, then the question."""
    name = torch.arange(10, 10 + TEXT_PER_SLICE)
    marks = (101, 102)
    if isinstance(host, Qwen3VL):
        marks = (host.model.config.vision_start_token_id, host.model.config.vision_end_token_id)
    image = torch.cat([torch.tensor([marks[0]]), torch.full((tokens,), host.placeholder), torch.tensor([marks[1]])])
    ids = torch.cat(
        [*[part for _ in range(inputs) for part in (name, image)], torch.arange(200, 200 + TEXT_OF_QUESTION)]
    )
    return Prompt(ids, host.positions(ids, images, inputs) if isinstance(host, Qwen3VL) else None)


def stock_arguments(host: Host, images: Prepared, prompt: Prompt) -> dict[str, Any]:
    """What the stock class takes where nothing is pruned: pixels and the whole prompt."""
    device, dtype = host.opened.device, host.opened.dtype
    ids = prompt.input_ids[None].to(device)
    pixels = images.pixels.to(device, dtype)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    grid = torch.tensor([[1, images.patch_rows, images.patch_columns]])
    if isinstance(host, Gemma3):
        return arguments | {"pixel_values": pixels, "token_type_ids": (ids == host.placeholder).long()}
    arguments["pixel_values"] = pixels.flatten(0, 1)
    if isinstance(host, Qwen3VL):
        return arguments | {
            "image_grid_thw": grid.expand(len(pixels), 3).to(device),
            "mm_token_type_ids": (ids == host.placeholder).long(),
        }
    grid[0, 0] = len(pixels)
    return arguments | {"image_grid_thw": grid.to(device), "image_merge_sizes": torch.tensor([2], device=device)}


@contextmanager
def memory(host: Host) -> Iterator[list[float]]:
    """GiB of the peak above what was in use before."""
    device = host.opened.device
    release(device)
    if device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed
        libc.malloc_trim(0)
    start_peak(device)
    before, found = peak_bytes(device), [0.0]
    yield found
    found[0] = (peak_bytes(device) - before) / GIB


def stock(host: Host, images: Prepared, tokens: int, new: int) -> Row:
    prompt = asked(host, images, len(images.pixels), tokens)
    with memory(host) as peak:
        arguments = stock_arguments(host, images, prompt)
        witness = Witness(host._now)
        host.model.generate(
            **arguments, generation_config=greedy(new, [], 0), logits_processor=LogitsProcessorList([witness])
        )
        witness.finish()
        host.forget()
    rate = (new - 1) / witness.decode_s
    inputs = len(images.pixels)
    return Row("stock, unpruned", witness.prefill_s, float("nan"), peak[0], rate, inputs, len(prompt.input_ids))


def explicit(host: Host, images: Prepared, groups: Tensor) -> Encoded:
    """Encode every slice; score it by the whole softmax at once, as the reference does."""
    received: list[Tensor] = []
    keys_of: list[Tensor] = []

    def score(queries: Tensor, keys: Tensor, scale: float) -> None:
        weights = torch.softmax(queries @ keys.mT * scale, dim=-1)
        received.append(group_mean(weights.mean(dim=1).sum(dim=1).float(), groups))
        keys_of.append(group_mean(keys.float().mean(dim=1), groups))

    parts = []
    for pixels in images.pixels.split(1):  # type: ignore[no-untyped-call]
        with watching(host.watched_layer, score):
            parts.append(host.features(pixels.to(host.opened.device, host.opened.dtype), images))
    deepstack = tuple(torch.cat(layer) for layer in zip(*(part[1] for part in parts), strict=True))
    return Encoded(torch.cat([part[0] for part in parts]), deepstack, torch.cat(received), torch.cat(keys_of))


def pruned(host: Host, images: Prepared, choice: SliceChoice, new: int, tau: float, *, reference: bool) -> Row:
    """The reference's semantics, or ours."""
    groups = host.groups(images)
    with memory(host) as peak:
        began = host._now()
        ours = not reference
        encoded = host.encode(images, choice.kept, groups, scored=True) if ours else explicit(host, images, groups)
        vision_s = host._now() - began
        assert encoded.received is not None
        assert encoded.keys is not None
        reduced = reduce_tokens(
            encoded.received, encoded.keys, encoded.features, tau=tau, temperature=2.0, contextual_fraction=0.05
        )
        if reference:  # a dropped slice keeps its first token, and its name in the prompt
            mask = reduced.kept & choice.kept[:, None].to(reduced.kept.device)
            mask[~choice.kept, 0] = True
            reduced = Reduced(reduced.features, mask, reduced.merged_into, reduced.scores)
        prompt = prune(
            asked(host, images, len(reduced.kept), groups.shape[0]), host.placeholder, reduced, encoded.deepstack
        )
        before_text = host._now() - began
        decoded = host.decode([prompt], [new])
    way = "reference's semantics" if reference else "ours"
    first_s = before_text + decoded.prefill_s
    rate = (decoded.generated[0] - 1) / decoded.decode_s
    return Row(way, first_s, vision_s, peak[0], rate, len(encoded.features), len(prompt.input_ids))


def matmul_rate(host: Host) -> float:
    """FLOP/s of a large product in the model's own type; the best of five."""
    size = 8192 if host.opened.device.type == "cuda" else 2048
    one = torch.randn(size, size, device=host.opened.device).to(host.opened.dtype)
    result = torch.empty_like(one)
    return 2 * size**3 / quickest(host, lambda: torch.mm(one, one, out=result))


def bandwidth(host: Host) -> float:
    """Bytes/s at which a matrix is read for its product with a vector, as decoding reads weights; the best of five.

    A copy would write as well, and one into new memory would measure how the system hands out pages.
    """
    rows, columns = (2**16, 2**15) if host.opened.device.type == "cuda" else (2**14, 2**14)
    matrix = torch.ones(rows, columns, dtype=host.opened.dtype, device=host.opened.device)
    vector, result = matrix[0].clone(), matrix[:, 0].clone()
    return matrix.nbytes / quickest(host, lambda: torch.mv(matrix, vector, out=result))


def quickest(host: Host, run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the best of some runs, after one that counts for nothing."""
    run()
    seconds = []
    for _ in range(times):
        began = host._now()
        run()
        seconds.append(host._now() - began)
    return min(seconds)


def flops(dims: Dims, tower: int, text: int, row: Row, words_of_all: int) -> float:
    """Of the products up to the first token: linear layers and attention of tower and text model.

    words_of_all: vocabulary where the stock class computes the words after every token of the prompt, else 0.
    """
    patches = dims.side**2
    width, inner = dims.tower[1:]
    per_slice = tower * (2 * patches * (4 * width**2 + 2 * width * inner) + 4 * patches**2 * width)
    text_width, text_inner = dims.text[1:]
    heads, kv_heads, head_dim = dims.attention
    weights = text_width * head_dim * (2 * heads + 2 * kv_heads) + 3 * text_width * text_inner
    prefill = text * (2 * row.tokens * weights + 2 * row.tokens**2 * heads * head_dim)  # causal: half of the square
    return row.encoded * per_slice + prefill + 2 * row.tokens * text_width * words_of_all


@dataclass(frozen=True, slots=True)
class Measured:
    """Some rounds of one way."""

    rounds: tuple[Row, ...]

    @property
    def median(self) -> Row:
        """The middle of the seconds and rates; of the memory the most, for a process seldom gives it back."""
        one = self.rounds[0]
        return replace(
            one,
            first_s=median(row.first_s for row in self.rounds),
            vision_s=median(row.vision_s for row in self.rounds),
            per_s=median(row.per_s for row in self.rounds),
            peak_gib=max(row.peak_gib for row in self.rounds),
        )

    def speed_up(self, stock: Measured) -> tuple[float, float, float]:
        """Of the medians, and the least and the most of any round."""
        single = [one.first_s / own.first_s for one, own in zip(stock.rounds, self.rounds, strict=True)]
        return stock.median.first_s / self.median.first_s, min(single), max(single)


def table(
    host: Host, dims: Dims, ways: list[Measured], tower: int, text: int, rates: list[tuple[float, float]]
) -> Iterator[str]:
    """rates: FLOP/s and bytes/s, measured before and after; the best count."""
    rate, bytes_per_s = (max(values) for values in zip(*rates, strict=True))
    weights = sum(value.nbytes for value in host.model.model.language_model.layers.parameters())
    weights += host.model.get_output_embeddings().weight.nbytes
    words = host.model.config.get_text_config().vocab_size if isinstance(host, VideoLlama3) else 0
    yield f"Matrix products {rate / 1e12:.3f} TFLOP/s, reading {bytes_per_s / 1e9:.1f} GB/s, in the same run.\n"
    yield (
        f"| way | slices encoded | prompt tokens | first token | of it tower | over {ways[0].median.way} (any round) | "
        "share of the matrix rate | peak above weights | tokens/s | share of the bandwidth |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for way in ways:
        row = way.median
        share = flops(dims, tower, text, row, words) / rate / row.first_s
        middle, least, most = way.speed_up(ways[0])
        yield (
            f"| {row.way} | {row.encoded} | {row.tokens} | {row.first_s:.2f} s | {row.vision_s:.2f} s | "
            f"**{middle:.2f}x** ({least:.2f}-{most:.2f}) | {share:.0%} | {row.peak_gib:.2f} GiB | {row.per_s:.2f} | "
            f"{weights * row.per_s / bytes_per_s:.0%} |"
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run bench vlm", description=__doc__)
    parser.add_argument("--dims", choices=sorted(DIMS), default="medgemma-4b")
    parser.add_argument("--slices", default="8", help="how many, separated by commas")
    parser.add_argument("--kept", type=float, default=0.25, help="share of the slices that the slice stage keeps")
    parser.add_argument("--tau", type=float, default=0.9)
    parser.add_argument("--layers-fraction", type=float, default=1.0, help="of tower and text model alike")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn; medians count")
    parser.add_argument("--new-tokens", type=int, default=4, help="at least 2: the first, and some to time decoding by")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    dims, device = DIMS[options.dims], torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tower, text = depths(dims, options.layers_fraction)
    except ValueError as error:
        parser.error(str(error))
    began = perf_counter()
    host = build(options.dims, tower, text, device, dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(  # noqa: T201
        f"{options.dims}, random weights, {tower} of {dims.tower[0]} tower layers ({tower / dims.tower[0]:.1%}), "
        f"{text} of {dims.text[0]} text layers ({text / dims.text[0]:.1%}); {dims.side**2} patches a slice; {dtype}, "
        f"{where}; built in {perf_counter() - began:.0f} s",
        flush=True,
    )
    for slices in map(int, options.slices.split(",")):
        print("\n".join(compared(host, dims, slices, tower, text, options)), flush=True)  # noqa: T201
    print(f"\n{perf_counter() - began:.0f} s in all", flush=True)  # noqa: T201
    return 0


def compared(host: Host, dims: Dims, slices: int, tower: int, text: int, options: argparse.Namespace) -> Iterator[str]:
    """All ways on the same slices, in turn, as often as there are rounds."""
    images = prepared(host, dims, slices)
    wanted = max(1, round(options.kept * slices))
    kept = torch.zeros(slices, dtype=torch.bool)
    kept[torch.arange(wanted) * slices // wanted] = True
    choice = SliceChoice(kept, torch.arange(slices), keep_all(slices).distance)
    tokens, new, tau = host.groups(images).shape[0], options.new_tokens, options.tau
    ways: dict[str, Callable[[], Row]] = {
        "stock": lambda: stock(host, images, tokens, new),
        "reference": lambda: pruned(host, images, choice, new, tau, reference=True),
        "ours": lambda: pruned(host, images, choice, new, tau, reference=False),
    }
    yield f"\n{slices} slices, {wanted} kept, tau {tau}, {options.rounds} rounds"
    rates = [(matmul_rate(host), bandwidth(host))]
    rows: dict[str, list[Row]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in [way for way in ways if way in rows]:
            try:
                with torch.inference_mode():
                    rows[way].append(ways[way]())
                print(f"{way}: first token after {rows[way][-1].first_s:.1f} s", file=sys.stderr, flush=True)  # noqa: T201
            except torch.OutOfMemoryError:
                yield f"{way}: out of memory"
                del rows[way]
            gc.collect()
    rates.append((matmul_rate(host), bandwidth(host)))
    measured = [Measured(tuple(of_way)) for of_way in rows.values()]
    if measured:
        yield from table(host, dims, measured, tower, text, rates)
