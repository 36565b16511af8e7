"""Make golden/: what transformers computes for the tiny models of cases.py, and for SmolLM2. Run from the repository:

    /path/to/python -m tests.model.make_golden [path of SmolLM2's GGUF file]

with torch 2.13.0 (CPU), transformers 5.23.0 (5.24.0 for those with experts), gguf 0.19.0, safetensors and numpy in that
Python; nothing of Meshlight is imported. Each case that golden/ lacks becomes golden/<case>.json (the config.json that
transformers writes, and the shape of every tensor of its checkpoint) and golden/<case>.npy (float32 logits [B, T, V],
eager attention). Remove a case's files only when cases.py changes it or when a newer transformers corrects itself; a
difference that arises otherwise is a bug on our side.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.model.cases import FIELDS, SENTENCE, draw, prompt

GOLDEN = pathlib.Path(__file__).parent / "golden"


def made_of(fields: dict, folder: pathlib.Path) -> tuple[transformers.PreTrainedModel, dict[str, list[int]]]:
    """transformers' model with the weights that cases.py draws, by way of a checkpoint, and that one's shapes."""
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields)).save_pretrained(folder)
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    drawn = {name: draw(name, tuple(shape), fields["model_type"]) for name, shape in shapes.items()}
    safetensors.numpy.save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval(), shapes


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def make_case(case: str) -> None:
    """Write one tiny model's files."""
    with tempfile.TemporaryDirectory() as folder:
        model, shapes = made_of(FIELDS[case], pathlib.Path(folder))
    about = {"config": json.loads(model.config.to_json_string()), "shapes": shapes}
    (GOLDEN / f"{case}.json").write_text(json.dumps(about, indent=1) + "\n")
    np.save(GOLDEN / f"{case}.npy", logits_of(model, prompt()))


def make_smollm2(path: pathlib.Path) -> None:
    """SmolLM2-135M-Instruct with the dequantised weights of its GGUF file: every 1024th logit at every position."""
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager")
    tokens = np.asarray([tokenizer(SENTENCE)["input_ids"]], np.int32)
    logits = logits_of(model.eval(), tokens)[0]
    np.savez(GOLDEN / "smollm2_135m.npz", tokens=tokens[0], logits=logits[:, ::1024], best=logits.argmax(-1))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in FIELDS:
        if not (GOLDEN / f"{case}.npy").exists():
            make_case(case)
    if len(sys.argv) > 1:
        make_smollm2(pathlib.Path(sys.argv[1]))
