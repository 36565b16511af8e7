"""infer.py end to end on tiny models of every kind, and what it refuses."""

import dataclasses
import io
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

import infer
from configs.tiny import run as tiny_run
from data.tokenizer import ByteTokenizer, CharTokenizer, char_with_ends
from model import huggingface
from model.parameters import initialize
from model.seq2seq_config import Seq2SeqConfig
from parallel import compilation
from parallel.checkpoint import Checkpoints
from parallel.config import AxisRules
from parallel.records import to_dict
from tests.inference.small import LLAMA, ONE, mesh_of, parameters

ROOT = pathlib.Path(__file__).parents[1]
TINY = dataclasses.replace(LLAMA, vocab_size=320, max_length=128)
GREEDY = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture(autouse=True)
def _keep_no_programs(monkeypatch):
    monkeypatch.setattr(compilation, "cache_compilations", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("model")
    huggingface.save(path, TINY, parameters(TINY), dtype="float32")
    ByteTokenizer().save(path)
    return path


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    status = infer.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def answer(capsys, *arguments) -> dict:
    """The JSON object of a call that succeeds."""
    status, out, err = call(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out.splitlines()[-1])


def test_generate_prints_text_and_json_says_how_it_came(capsys, folder):
    status, out, err = call(capsys, "generate", folder, "Hello", *GREEDY)
    assert status == 0
    assert "12 (length) new ones" in err
    found = answer(capsys, "generate", folder, "Hello", *GREEDY)
    assert out == found["text"] + "\n"
    assert found["prompt_tokens"] == [256, *b"Hello"]
    assert len(found["tokens"]) == len(found["logprobs"]) == 12
    assert found["finish_reason"] == "length"
    assert found["prompt_logprobs"][0] is None
    assert all(-20 < logprob < 0 for logprob in found["prompt_logprobs"][1:] + found["logprobs"])
    assert len(found["prompt_logprobs"]) == 6
    assert {"load", "prefill", "decode", "first_token"} <= found["timings"].keys()
    assert "samples" not in found


def test_several_samples_are_runs_with_the_next_seeds(capsys, folder):
    hot = ["--temperature", "2", "--max-tokens", "6"]
    both = answer(capsys, "generate", folder, "Hello", *hot, "-n", "2", "--seed", "7")
    assert [sample["tokens"] for sample in both["samples"]] == [
        answer(capsys, "generate", folder, "Hello", *hot, "--seed", seed)["tokens"] for seed in (7, 8)
    ]
    assert both["tokens"] == both["samples"][0]["tokens"] != both["samples"][1]["tokens"]


def test_a_search_gives_the_likeliest_answers_first(capsys, folder):
    found = answer(capsys, "generate", folder, "Hello", "--beams", "3", "-n", "2", "--max-tokens", "6")["samples"]
    best, next_ = (sum(sample["logprobs"]) / len(sample["tokens"]) for sample in found)
    assert best >= next_
    assert all(len(sample["tokens"]) == 6 or sample["finish_reason"] == "stop" for sample in found)


def test_a_prompt_may_come_from_standard_input_or_be_empty(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert answer(capsys, "generate", folder, "-", *GREEDY)["prompt_tokens"] == [256, *b"Hello"]
    assert answer(capsys, "generate", folder, "", *GREEDY)["prompt_tokens"] == [256]


def test_score_measures_a_file(capsys, folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("Hello, wörld. " * 20)
    found = answer(capsys, "score", folder, "--file", text)
    assert (found["tokens"], found["bytes"], found["window"], found["stride"]) == (300, 300, 128, 64)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"] / 300))
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2) / 300)
    status, out, _ = call(capsys, "score", folder, "--file", text)
    assert status == 0
    assert f"perplexity    {found['perplexity']:.7g}" in out.splitlines()


def test_a_run_folder_answers_from_its_newest_checkpoint(capsys, folder, tmp_path):
    run = dataclasses.replace(tiny_run, model=TINY)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    ByteTokenizer().save(tmp_path / "tokenizer")
    status, _, err = call(capsys, "generate", tmp_path, "Hello", *GREEDY)
    assert status == 2
    assert (
        err == f"error: {tmp_path} has no checkpoint yet; train it first: train.py saves every train.save_every steps\n"
    )
    writer = Checkpoints(tmp_path / "checkpoints", keep=1)
    writer.save(3, {"parameters": parameters(TINY), "ema": None}, {})
    writer.wait()
    expected = answer(capsys, "generate", folder, "Hello", *GREEDY)
    assert answer(capsys, "generate", tmp_path, "Hello", *GREEDY)["tokens"] == expected["tokens"]


TRANSLATOR = Seq2SeqConfig(
    kind="attention", vocab_size=320, source_vocab_size=64, shared=False, embed_dim=8, recurrent_dim=8, max_length=24
)


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> pathlib.Path:
    """A run folder that translates characters into bytes, in lower case, and knows nothing."""
    path = tmp_path_factory.mktemp("translator")
    record = {"model": to_dict(TRANSLATOR), "data": {"lower": True}}
    (path / "config.json").write_text(json.dumps(record))
    ByteTokenizer(adds_bos=False).save(path / "tokenizer")
    char_with_ends(" " + "".join(map(chr, range(97, 123)))).save(path / "source_tokenizer")
    writer, key = Checkpoints(path / "checkpoints", keep=1), jax.random.key(3)
    drawn = initialize(TRANSLATOR, mesh_of(ONE), AxisRules(), key=key)
    writer.save(3, {"parameters": jax.tree.map(lambda w: 8 * w, drawn), "ema": None}, {})
    writer.wait()
    return path


def test_translate_answers_line_by_line(capsys, translator, tmp_path, monkeypatch):
    lines = ["one two", "", "  Three ", "a"]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    status, out, err = call(capsys, "translate", translator, "--file", tmp_path / "lines")
    assert (status, err, out.count("\n")) == (0, "", 4)
    found = out.split("\n")
    assert found[1] == ""
    for beam, text in (("5", "three"), ("1", "one two")):
        status, out, err = call(capsys, "translate", translator, text, "--beam", beam, "--json")
        assert (status, err) == (0, "")
        one = json.loads(out)
        assert len(one["tokens"]) == len(one["logprobs"]) <= 24
        assert one["finish_reason"] == ("stop" if one["tokens"][-1] == 257 else "length")
        assert beam == "1" or one["text"] == found[2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n\nthree\n"))
    assert call(capsys, "translate", translator, "-")[1].split("\n") == [*found[:3], ""]


def test_a_run_that_kept_its_best_parameters_translates_with_them(capsys, translator, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(translator, run)
    drawn = initialize(TRANSLATOR, mesh_of(ONE), AxisRules(), key=jax.random.key(3))
    best = Checkpoints(run / "best", keep=1)
    best.save(2, {"parameters": jax.tree.map(jax.numpy.zeros_like, drawn)}, {})
    best.wait()
    found = json.loads(call(capsys, "translate", run, "a", "--beam", "1", "--json")[1])
    assert found["tokens"] == [0] * 14  # 2 source tokens have room for 14; all are as likely, the first is taken


def test_what_cannot_be_translated_is_refused(capsys, folder, translator, tmp_path):
    (tmp_path / "binary").write_bytes(b"a\nb\xff\n")
    (tmp_path / "long").write_text("a\n" + "b" * 24 + "\n")
    (tmp_path / "foreign").write_text("a\nß\n")
    other = tmp_path / "other"
    shutil.copytree(translator, other)
    ByteTokenizer(adds_bos=False).save(other / "source_tokenizer")
    new = tmp_path / "new"
    shutil.copytree(translator, new)
    shutil.rmtree(new / "checkpoints")
    refusals = {
        ("translate", translator, "--file", tmp_path / "none"): "none is no file; give the text to translate",
        ("translate", translator, "--file", tmp_path / "binary"): "binary line 2 is not UTF-8: byte 2 is 0xFF",
        ("translate", translator, "--file", tmp_path / "long"): "line 2 has 25 tokens with its end, more than the 24",
        ("translate", translator, "--file", tmp_path / "foreign"): "line 2: ",
        ("translate", other, "a"): "the source tokenizer has 258 tokens but the run's weights have 64 rows",
        ("translate", new, "a"): "has no checkpoint yet",
        ("translate", folder, "a"): "is decoder-only, which continues a text: use infer.py generate",
        ("translate", translator): "translate takes either TEXT or --file FILE",
        ("translate", translator, "a", "--file", tmp_path / "long"): "translate takes either TEXT or --file FILE",
        ("translate", translator, "a", "--beam", "1", "--length-penalty", "2"): "--length-penalty and --early-stopping",
        ("generate", translator, "a"): "is an encoder–decoder, which translates; use infer.py translate",
        ("chat", translator): "use infer.py translate",
        ("serve", translator): "use infer.py translate",
        ("score", translator, "--file", tmp_path / "long"): "use infer.py translate",
        ("generate", folder, "a", "--draft", translator): "use infer.py translate",
    }
    for arguments, message in refusals.items():
        status, out, err = call(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert message in err


def test_chat_needs_a_template(capsys, folder):
    status, out, err = call(capsys, "chat", folder)
    assert (status, out) == (2, "")
    assert err.startswith("error: this model has no chat template")


def test_what_does_not_fit_the_model_is_refused(capsys, folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("a")
    refusals = {
        ("generate", folder, "x" * 200): "the prompt is 201 tokens long but the model's context is 128",
        ("generate", folder, "x", "--mesh", "tensor=3"): "does not divide over 3 devices",
        ("generate", folder, "x", "--mesh", "tensor=64"): "asks for 64 devices but 8 are here",
        ("score", folder, "--file", text, "--window", "200"): "window=200 must be between 2 and the model's context",
    }
    for arguments, message in refusals.items():
        status, out, err = call(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert message in err


def test_files_that_are_damaged_or_do_not_belong_together_are_refused(capsys, folder, tmp_path):
    def copy(name: str) -> pathlib.Path:
        (tmp_path / name).mkdir()
        for path in folder.iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        return tmp_path / name

    few, many, short, bare = copy("few"), copy("many"), copy("short"), copy("bare")
    CharTokenizer(characters="abc").save(few)
    CharTokenizer(characters="".join(map(chr, range(321)))).save(many)
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (bare / "config.json").unlink()
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00")
    refusals = {
        few: "the tokenizer has 3 tokens but the weights have 320 rows for them",
        many: "the tokenizer has 321 tokens but the weights have 320 rows for them",
        short: "model.safetensors",
        bare: "it has no config.json",
        bare / "model.safetensors": "is no GGUF file",
        tmp_path / "model.gguf": "model.gguf",
        tmp_path / "modell.gguf": f"did you mean {tmp_path / 'model.gguf'}?",
    }
    for model, message in refusals.items():
        status, out, err = call(capsys, "generate", model, "a")
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert message in err


def test_texts_that_are_none_are_refused(capsys, folder, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"ab\xff")
    for name, message in {"empty": "is empty", "binary": "is not UTF-8 text: byte 2 is 0xff"}.items():
        status, _, err = call(capsys, "score", folder, "--file", tmp_path / name)
        assert status == 2
        assert message in err


def test_help_and_refusals_need_no_jax():
    commands = {
        "": "the following arguments are required",
        "generat smollm2 x": "invalid choice: 'generat'",
        "generate smolm2 x": "MODEL smolm2 is nothing that exists; .*; did you mean smollm2?",
        "generate smollm2": "the following arguments are required: PROMPT",
        "generate smollm2 x --tempreture 1": "unrecognized arguments: --tempreture 1",
        "generate smollm2 x --temperature -1": "sampling.temperature=-1.0 must be between 0 and 100",
        "generate smollm2 x --top-k a": "argument --top-k: invalid int value: 'a'",
        "generate smollm2 x --logit-bias 5": "argument --logit-bias: '5' is not a token's id and a number, as 50=-100",
        "generate smollm2 x --logit-bias 5=200": "sampling.logit_bias adds 200.0 to token 5",
        "generate smollm2 x --beams 11": "beams=11 must be between 1 and 10",
        "generate smollm2 x --beams 3 --temperature 1": "--beams 3 searches and draws nothing",
        "generate smollm2 x --beams 3 -n 4": "-n 4 answers need as many beams and there are 3",
        "generate smollm2 x --length-penalty 2": "--length-penalty and --early-stopping are for a search",
        "generate smollm2 x --max-tokens 0": "generation.max_tokens=0 must be at least 1",
        "generate smollm2 x -n 0": "-n 0 must be at least 1",
        "generate smollm2 x --mesh tensr=2": "unknown key tensr .*; did you mean tensor?",
        "score smollm2 --file nothing": "--file nothing is no file; give the text to score",
        "translate smollm2": "translate takes either TEXT or --file FILE",
        "translate smollm2 x": "MODEL .* is decoder-only, which continues a text: use infer.py generate",
        "translate smollm2 x --beam 11": "beams=11 must be between 1 and 10",
        "translate smollm2 --file nothing": "--file nothing is no file; give the text to translate",
        "chat runs/nothing": "MODEL runs/nothing is nothing that exists",
    }
    program = (
        "import json, re, sys, contextlib, io, infer\n"
        "for command, message in json.loads(sys.argv[1]).items():\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        assert infer.main(command.split()) == 2, command\n"
        "    assert re.match('error: .*' + message, err.getvalue()), err.getvalue()\n"
        "    assert err.getvalue().count('\\n') == 1, err.getvalue()\n"
        "assert not {'jax', 'numpy', 'flax', 'tokenizers'} & sys.modules.keys()\n"
        "infer.main(['generate', '--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert "--repetition-penalty X" in done.stdout
    assert "logits of tokens already there: divided by it" in " ".join(done.stdout.split())


def test_a_quantized_folder_answers_as_the_model_quantized_on_load(capsys, folder, tmp_path):
    out = tmp_path / "small"
    assert call(capsys, "quantize", folder, out, "--weights", "int4") == (0, "", "")
    loaded = answer(capsys, "generate", folder, "Hello", *GREEDY, "--weights", "int4")
    found = answer(capsys, "generate", out, "Hello", *GREEDY)
    assert (found["tokens"], found["logprobs"]) == (loaded["tokens"], loaded["logprobs"])
    for wrong, message in {
        ("quantize", folder, out, "--weights", "int8"): "already holds model.safetensors",
        ("quantize", folder, tmp_path / "other"): "quantize needs --weights int8, int4 or fp8",
        ("generate", out, "Hello", "--weights", "int8"): "has int4 weights already",
        ("generate", folder, "Hello", "--weights", "int5"): "invalid choice: 'int5'",
    }.items():
        status, _, err = call(capsys, *wrong)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
