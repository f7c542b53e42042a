"""workers.vlm.open_model and folder: which folders are opened, and how the others are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.shared.messages import FindingName, Flag
from service.shared.settings import ConfigurationError, ModelSettings
from workers.demo_model.random_weights import write
from workers.vlm import open_model
from workers.vlm.folder import HOSTS, device_of, require_features, weights_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder that a test may spoil."""
    write(tmp_path / "model", 0)
    return tmp_path / "model"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def projection(weights: dict[str, torch.Tensor]) -> str:
    """The name of one weight as the file has it."""
    return next(name for name in weights if name.endswith("mm_input_projection_weight"))


def test_identity_says_what_was_loaded(folder: Path) -> None:
    """Name, path, digest, versions, dtype and device are those of the loaded model."""
    model = open_model(ModelSettings(path=str(folder), device="cpu"))

    assert model.identity.name == "random weights"
    assert model.identity.path == str(folder)
    assert model.identity.architecture == "Gemma3ForConditionalGeneration"
    assert model.identity.weights_sha256 == weights_sha256(folder)
    assert model.identity.dtype == "float32"
    assert model.identity.device == "cpu"
    assert model.flags == (Flag.RANDOM_WEIGHTS,)


def test_folder_without_mark_has_no_flag(folder: Path) -> None:
    """A user's own weights are called by their folder and carry no flag of ours."""
    (folder / "medpruner.json").unlink()

    model = open_model(ModelSettings(path=str(folder)))

    assert model.identity.name == "model"
    assert model.flags == ()


def test_mark_passes_on_the_input_that_weights_want(folder: Path) -> None:
    """What medpruner.json says of the preprocessing reaches the one who prepares images."""
    mark = {"name": "n", "weights": "demonstration", "preprocessing": {"slabs": 24}}
    (folder / "medpruner.json").write_text(json.dumps(mark))

    model = open_model(ModelSettings(path=str(folder)))

    assert model.flags == (Flag.DEMONSTRATION_WEIGHTS,)
    assert model.preprocessing == {"slabs": 24}


def test_a_folder_says_what_its_weights_can_be_asked_and_how_well_they_read(folder: Path) -> None:
    mark = {"weights": "demonstration", "coded_findings": ["nodule"], "limitations": ["It misses half of them."]}
    (folder / "medpruner.json").write_text(json.dumps(mark))

    model = open_model(ModelSettings(), folder)

    assert model.coded_findings == (FindingName.NODULE,)
    assert model.limitations == ("It misses half of them.",)


def test_a_finding_that_has_no_code_is_refused(folder: Path) -> None:
    (folder / "medpruner.json").write_text('{"weights": "demonstration", "coded_findings": ["nodul"]}')

    with pytest.raises(ConfigurationError, match="coded_findings"):
        open_model(ModelSettings(), folder)


def test_weights_that_were_trained_on_another_third_channel_are_refused(folder: Path) -> None:
    """They would read what they never saw, and nobody would know."""
    mark = {"weights": "demonstration", "preprocessing": {"slabs": 24, "third_channel": "blobs, and what is denser"}}
    (folder / "medpruner.json").write_text(json.dumps(mark))

    with pytest.raises(
        ConfigurationError, match=r'medpruner\.json: "third_channel" is "blobs, and what is denser", but'
    ):
        open_model(ModelSettings(device="cpu"), folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weights": "good"}', '{"weights": "random", "slice_names": "over"}'])
def test_mark_that_is_not_understood_is_refused(folder: Path, content: str) -> None:
    """A mark with an unknown word must not pass as a user's own weights."""
    (folder / "medpruner.json").write_text(content)

    with pytest.raises(ConfigurationError, match=r"medpruner\.json"):
        open_model(ModelSettings(path=str(folder)))


def test_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    """The refusal names the folder's architecture and every one that has a host."""
    change_config(folder, architectures=["LlavaForConditionalGeneration"])

    with pytest.raises(ConfigurationError, match="LlavaForConditionalGeneration") as refusal:
        open_model(ModelSettings(path=str(folder)))

    assert all(known in str(refusal.value) for known in HOSTS)


@pytest.mark.parametrize("content", ["[]", "{}", '{"architectures": null}'])
def test_config_without_architecture_is_refused(folder: Path, content: str) -> None:
    """A config.json that names no architecture is refused like an unknown one."""
    (folder / "config.json").write_text(content)

    with pytest.raises(ConfigurationError, match="known: Gemma3ForConditionalGeneration"):
        open_model(ModelSettings(path=str(folder)))


def test_missing_folder_names_key_and_remedy(tmp_path: Path) -> None:
    """A path with no model in it is a fault of the configuration, said with its key."""
    with pytest.raises(ConfigurationError, match=r"\[model\] path: no config\.json"):
        open_model(ModelSettings(path=str(tmp_path / "nothing")))


def test_config_that_is_no_json_is_refused(folder: Path) -> None:
    """A cut-off config.json is named."""
    (folder / "config.json").write_text('{"architectures": [')

    with pytest.raises(ConfigurationError, match="cannot be read as JSON"):
        open_model(ModelSettings(path=str(folder)))


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    """A folder with pytorch_model.bin alone is refused: reading a pickle runs code."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")

    with pytest.raises(ConfigurationError, match="pickles"):
        open_model(ModelSettings(path=str(folder)))


def test_missing_weight_is_refused(folder: Path) -> None:
    """transformers would start a missing weight at random and go on; such a model must not speak."""
    weights = load_file(folder / "model.safetensors")
    del weights[projection(weights)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigurationError, match="lacks 1 weights"):
        open_model(ModelSettings(path=str(folder)))


def test_weight_of_another_shape_is_refused(folder: Path) -> None:
    """A weight that does not fit the configuration is refused."""
    weights = load_file(folder / "model.safetensors")
    name = projection(weights)
    weights[name] = weights[name][:, :-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigurationError, match=str(folder)):
        open_model(ModelSettings(path=str(folder)))


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    """Weights without their tokenizer and processor are named as such."""
    for path in [*folder.glob("tokenizer*"), *folder.glob("processor*")]:
        path.unlink()

    with pytest.raises(ConfigurationError, match="lacks its processor or tokenizer"):
        open_model(ModelSettings(path=str(folder)))


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    """A folder that asks for its own code is read with the stock class."""
    change_config(folder, auto_map={"AutoModelForImageTextToText": "modeling.Mine"})
    (folder / "modeling.py").write_text("raise SystemExit('code of a model folder was run')\n")

    assert open_model(ModelSettings(path=str(folder))).identity.name == "random weights"


def test_changed_weights_have_another_digest(folder: Path, tmp_path: Path) -> None:
    """The digest is over all safetensors files in the order of their names."""
    before = weights_sha256(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model-2.safetensors").write_bytes(b"x")

    assert weights_sha256(tmp_path / "copy") != before
    assert weights_sha256(folder) == before


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_unknown_device_is_refused(folder: Path, device: str) -> None:
    """A device that torch does not know is named with its key."""
    with pytest.raises(ConfigurationError, match=r"\[model\] device"):
        open_model(ModelSettings(path=str(folder), device=device))


def test_device_chosen_on_cuda_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and `cuda:0` are the same card, and the same on record."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert str(device_of(ModelSettings(device="auto"))) == str(device_of(ModelSettings(device="cuda:0"))) == "cuda:0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused(folder: Path) -> None:
    """No silent fall back from a GPU that was asked for to the CPU."""
    with pytest.raises(ConfigurationError, match="sees no CUDA device"):
        open_model(ModelSettings(path=str(folder), device="cuda:0"))


def test_flash_attention_is_refused_for_gemma3(folder: Path) -> None:
    """Flash attention would drop Gemma 3's two-way attention within an image without a word."""
    with pytest.raises(ConfigurationError, match="flash_attention_2 drops"):
        open_model(ModelSettings(path=str(folder), attention="flash_attention_2"))


def test_transformers_without_the_needed_classes_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that fails is a version that is too old, and says so."""
    (tmp_path / "host_of_tomorrow.py").write_text("from transformers import ClassOfTomorrow\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(HOSTS, "Gemma3ForConditionalGeneration", ("host_of_tomorrow", "Gemma3"))

    with pytest.raises(ConfigurationError, match=r"ClassOfTomorrow.* install transformers 5\.23"):
        open_model(ModelSettings(path=str(folder)))


def test_transformers_without_the_needed_argument_is_refused() -> None:
    """An older transformers is named with the version that is needed."""

    class Gemma3ForConditionalGeneration:
        def forward(self, input_ids: object) -> None: ...

    with pytest.raises(ConfigurationError, match="mm_encoder_outputs"):
        require_features(Gemma3ForConditionalGeneration)


def test_demo_without_trained_weights_is_random(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`demo` works before the demonstration model is there, and says that its weights are random."""
    monkeypatch.setattr("workers.vlm.folder.DEMONSTRATION", tmp_path / "none")

    model = open_model(ModelSettings(path="demo"))

    assert model.flags == (Flag.RANDOM_WEIGHTS,)
    assert model.identity.path == "demo"


def test_importing_the_package_loads_no_torch() -> None:
    """The worker's parent process may import the Protocol; torch is loaded when a model is opened."""
    program = "import sys, workers.vlm; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
