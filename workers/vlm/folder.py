"""A model folder on disk -> a loaded host. Offline, safetensors only, no code from the folder."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.utils import logging

from service.shared.messages import FindingName, Flag, ModelIdentity
from service.shared.settings import ConfigurationError, ModelSettings
from workers.demo_model.channels import THIRD_CHANNEL
from workers.vlm.prompt import SliceNames

if TYPE_CHECKING:
    from workers.vlm.host import Host

# config.json `architectures[0]` -> the file and class that hosts it
HOSTS = {
    "Gemma3ForConditionalGeneration": ("workers.vlm.gemma3", "Gemma3"),
    "Qwen3VLForConditionalGeneration": ("workers.vlm.qwen3_vl", "Qwen3VL"),
    "VideoLlama3ForConditionalGeneration": ("workers.vlm.video_llama3", "VideoLlama3"),
    "HulumedQwen2ForCausalLM": ("workers.vlm.video_llama3", "VideoLlama3"),
    "HulumedQwen3ForCausalLM": ("workers.vlm.video_llama3", "VideoLlama3"),
}
MARK = "medpruner.json"  # beside config.json in folders of ours; a user's folder has none
WEIGHT_FLAGS = {"random": Flag.RANDOM_WEIGHTS, "demonstration": Flag.DEMONSTRATION_WEIGHTS}
NEEDED = "install transformers 5.23 or later"
DEMONSTRATION = Path(__file__).parent.parent / "demo_model" / "weights"


@dataclass(frozen=True, slots=True)
class Opened:
    """What a host is built from, beside its weights."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    attention: str
    identity: ModelIdentity
    flags: tuple[Flag, ...]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    coded_findings: tuple[FindingName, ...] = ()
    limitations: tuple[str, ...] = ()
    compile: bool = False
    slice_names: SliceNames = SliceNames.AFTER


def open_folder(settings: ModelSettings, folder: Path | None) -> Host:
    """Load the host that `folder` (or [model] path) asks for; ConfigurationError when it cannot be."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if folder is None and settings.path == "demo" and not (DEMONSTRATION / "config.json").exists():
        with tempfile.TemporaryDirectory(prefix="medpruner-") as temporary:
            return _open(settings, _random_weights(Path(temporary)), named="demo")
    if folder is not None:
        return _open(settings, folder, named=str(folder))
    folder = DEMONSTRATION if settings.path == "demo" else Path(settings.path)
    return _open(settings, folder, named=settings.path)


def _open(settings: ModelSettings, folder: Path, *, named: str) -> Host:
    architecture = architecture_of(folder)
    module, name = HOSTS[architecture]
    try:
        host: type[Host] = getattr(importlib.import_module(module), name)
    except ImportError as error:  # an older transformers lacks classes or hooks that a host imports
        raise ConfigurationError(
            f"transformers {transformers.__version__} has not what {architecture} needs ({error}); {NEEDED}"
        ) from error
    require_features(host.architecture_class)
    if settings.compile and not getattr(host.architecture_class, "_can_compile_fullgraph", False):
        raise ConfigurationError(
            f"[model] compile: {architecture} is not compiled as a whole by transformers {transformers.__version__}; "
            "leave it false"
        )
    device = device_of(settings)
    dtype = _dtype(settings, device)
    mark = _mark(folder)
    identity = ModelIdentity(
        name=str(mark.get("name", folder.resolve().name)),
        architecture=architecture,
        path=named,
        weights_sha256=weights_sha256(folder),
        transformers_version=transformers.__version__,
        torch_version=str(torch.__version__),
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        attention=settings.attention,
    )
    return host.load(
        Opened(
            folder,
            device,
            dtype,
            settings.attention,
            identity,
            flags=(WEIGHT_FLAGS[mark["weights"]],) if mark else (),
            preprocessing=dict(mark.get("preprocessing", {})),
            coded_findings=tuple(FindingName(name) for name in mark.get("coded_findings", ())),
            limitations=tuple(mark.get("limitations", ())),
            compile=settings.compile,
            slice_names=_slice_names(mark),
        )
    )


def architecture_of(folder: Path) -> str:
    """Return the known architecture that config.json names; ConfigurationError lists the known ones."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f'[model] path: no config.json in {folder}; give a local folder in the transformers format, or "demo"'
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"[model] path: {folder}/config.json cannot be read as JSON") from error
    named = config.get("architectures") or ["none"] if isinstance(config, dict) else ["none"]
    if named[0] not in HOSTS:
        raise ConfigurationError(
            f"[model] path: {folder} holds the architecture {named[0]!r}, which is not known here; "
            f"known: {', '.join(HOSTS)}"
        )
    return str(named[0])


def require_features(architecture: type) -> None:
    """ConfigurationError where this transformers cannot take pruned features (`mm_encoder_outputs`)."""
    if "mm_encoder_outputs" not in inspect.signature(architecture.forward).parameters:  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"transformers {transformers.__version__}: {architecture.__name__} takes no mm_encoder_outputs, "
            f"so pruned features cannot be given to it; {NEEDED}"
        )


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 over the bytes of all safetensors files in name order."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(
            f"[model] path: no *.safetensors in {folder}; weights in other formats (pickles) are not loaded"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def load_weights(architecture: Any, opened: Opened, attention: str, **options: Any) -> Any:
    """Load the stock class with every one of its weights; ConfigurationError where one is missing.

    transformers would start missing weights at random and only warn. options: more of from_pretrained's.
    """
    try:
        model, report = architecture.from_pretrained(
            opened.folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=opened.dtype,
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigurationError(f"[model] path: {opened.folder} cannot be loaded: {error}") from error
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if wrong:
        raise ConfigurationError(
            f"[model] path: {opened.folder} lacks {len(wrong)} weights of its architecture, for instance {wrong[0]}"
        )
    return model.to(opened.device).eval()


def _random_weights(folder: Path) -> Path:
    from workers.demo_model.random_weights import write  # only without trained weights

    write(folder, seed=0)
    return folder


def _mark(folder: Path) -> dict[str, Any]:
    path = folder / MARK
    if not path.exists():
        return {}
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path}: not valid JSON") from error
    if not isinstance(mark, dict) or mark.get("weights") not in WEIGHT_FLAGS:
        raise ConfigurationError(f'{path}: "weights" must be one of {", ".join(WEIGHT_FLAGS)}')
    if mark.get("slice_names", SliceNames.AFTER) not in {*SliceNames}:
        raise ConfigurationError(f'{path}: "slice_names" must be one of {", ".join(SliceNames)}')
    if not {*mark.get("coded_findings", ())} <= {*FindingName}:
        raise ConfigurationError(f'{path}: "coded_findings" must be of {", ".join(FindingName)}')
    channel = mark.get("preprocessing", {}).get("third_channel", THIRD_CHANNEL)
    if channel != THIRD_CHANNEL:
        raise ConfigurationError(
            f'{path}: "third_channel" is "{channel}", but this version makes "{THIRD_CHANNEL}"; use weights of this '
            "version, or the version that they came with"
        )
    return mark


def _slice_names(mark: dict[str, Any]) -> SliceNames:
    """As the mark says; folders of ours that say nothing were trained with names before their images."""
    return SliceNames(mark.get("slice_names", SliceNames.BEFORE if mark else SliceNames.AFTER))


def device_of(settings: ModelSettings) -> torch.device:
    """The device that [model] device asks for; ConfigurationError where there is none."""
    name = settings.device
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")  # with its number, as the record has it
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f'[model] device: {name!r} is none; use "auto", "cpu" or "cuda:0"') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f'[model] device: {name!r}, but torch sees no CUDA device; use "auto" or "cpu"')
    return device


def _dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA, float32 on a CPU (where bfloat16 is no faster)."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
