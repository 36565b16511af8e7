"""Make golden/: what transformers computes for the tiny models of cases.py, and for SmolLM2. Run from the repository:

    /path/to/python -m tests.model.make_golden [path of SmolLM2's GGUF file]

with torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0 and numpy in that Python; nothing of Meshlight is imported.
Each case becomes golden/<case>.json (the config.json that transformers writes, and every tensor's shape) and
golden/<case>.npy (float32 logits [B, T, V], eager attention). Run it again only when cases.py changes or when a newer
transformers corrects itself; a difference that arises otherwise is a bug on our side.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

from tests.model.cases import FIELDS, SENTENCE, draw, prompt

GOLDEN = pathlib.Path(__file__).parent / "golden"


def model_of(fields: dict) -> transformers.PreTrainedModel:
    """transformers' model with the weights that cases.py draws."""
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    shared = {"lm_head.weight"} if config.tie_word_embeddings else set()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name not in shared:
                parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape), fields["model_type"])))
    return model


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def make_case(case: str) -> None:
    """Write one tiny model's files."""
    model = model_of(FIELDS[case])
    shared = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if name not in shared}
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
        make_case(case)
    if len(sys.argv) > 1:
        make_smollm2(pathlib.Path(sys.argv[1]))
