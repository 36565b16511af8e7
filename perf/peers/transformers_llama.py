"""The peer's side of `python -m perf bench … --peer PYTHON`: eager `transformers` on the CPU, one timed round a line.

Run by the other interpreter (torch and transformers live there, not here) as

    PYTHON perf/peers/transformers_llama.py '{"kind": "decode", "batch": 1, "length": 64, "tokens": 32, "model": {...}}'

Each line read from stdin starts a round; its seconds are printed as one line. The weights are random: time does not
depend on their values.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(shape: dict) -> LlamaForCausalLM:
    """A Llama of the shape that our ModelConfig has, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        intermediate_size=shape["ffn_dim"],
        max_position_embeddings=shape["max_length"],
        tie_word_embeddings=shape["tied"],
        rms_norm_eps=shape["norm_eps"],
    )
    return LlamaForCausalLM(config)


def train_round(model: LlamaForCausalLM, ask: dict):
    """One optimizer step of eager AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, ask["model"]["vocab_size"], (ask["batch"], ask["length"]))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def prefill_round(model: LlamaForCausalLM, ask: dict):
    """A forward pass over the prompts that fills the cache and returns the last position's logits."""
    model.eval()
    tokens = torch.randint(0, ask["model"]["vocab_size"], (ask["batch"], ask["length"]))

    @torch.inference_mode()
    def prefill():
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    return prefill


def decode_round(model: LlamaForCausalLM, ask: dict):
    """Greedy tokens one by one after a prompt whose prefill is not timed."""
    model.eval()
    tokens = torch.randint(0, ask["model"]["vocab_size"], (ask["batch"], ask["length"]))

    @torch.inference_mode()
    def decode():
        out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(ask["tokens"]):
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start

    return decode


def main() -> None:
    """Build, warm up, then one round for each line on stdin."""
    ask = json.loads(sys.argv[1])
    torch.set_num_threads(ask["threads"])
    rounds = {"train": train_round, "prefill": prefill_round, "decode": decode_round}
    run = rounds[ask["kind"]](build(ask["model"]), ask)
    run()
    print(json.dumps({"ready": f"torch {torch.__version__}"}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        seconds = run()
        print(time.perf_counter() - start if seconds is None else seconds, flush=True)


if __name__ == "__main__":
    main()
