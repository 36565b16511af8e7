"""The peer's side of `python -m perf bench serve --peer PYTHON`: static batches by `transformers`, padded on the left.

Run by the other interpreter (torch and transformers live there, not here) as

    PYTHON perf/peers/transformers_static.py '{"batches": [[[20, 42], [7, 90]], ...], "threads": 2, "model": {...}}'

where each request is [tokens of the prompt, tokens of the answer]. Each line read from stdin starts a round: `generate`
answers one batch after the other, each up to its longest answer; the seconds are printed as one line. The weights are
random: time does not depend on their values.
"""

import json
import sys
import time

import torch
from transformers_llama import build


def padded(requests: list[list[int]], vocab: int) -> dict[str, torch.Tensor]:
    """Random prompts side by side, padding on the left."""
    longest = max(prompt for prompt, _ in requests)
    tokens = torch.randint(1, vocab, (len(requests), longest))
    mask = torch.stack([torch.arange(longest) >= longest - prompt for prompt, _ in requests]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def main() -> None:
    """Build, warm up, then one round for each line on stdin."""
    ask = json.loads(sys.argv[1])
    torch.set_num_threads(ask["threads"])
    model, vocab = build(ask["model"]).eval(), ask["model"]["vocab_size"]
    model.generation_config.eos_token_id = None
    batches = [(padded(requests, vocab), max(answer for _, answer in requests)) for requests in ask["batches"]]

    @torch.inference_mode()
    def generate(batch: dict[str, torch.Tensor], count: int) -> None:
        out = model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        assert out.shape[1] == batch["input_ids"].shape[1] + count

    generate(batches[0][0], 2)
    print(json.dumps({"ready": f"torch {torch.__version__}"}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for batch, count in batches:
            generate(batch, count)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
