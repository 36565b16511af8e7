import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from data.huggingface_tokenizer import HuggingFaceTokenizer, download_huggingface, load_huggingface
from data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    TextStream,
    WordTokenizer,
    fingerprint,
    load_tokenizer,
    train_bpe,
)

CODE = 'def add(first, second):\n    """Sum."""\n    return first + second  # 1234 + 56\n\n\nadd(1, 2)\n'
TEXTS = [CODE, "Grüße, 你好 🤗!\n", "it's we'll\tI'd  x", "", " ", "\x1c\x1d tail \n\n  "]
MIXED = st.text(st.sampled_from(" \n\t\r\x0b\x1c'sdlaZ09_+é你🤗<|bos>"), max_size=40)


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe([CODE, *TEXTS], vocab_size=300)


@pytest.fixture(scope="module")
def llama() -> HuggingFaceTokenizer:
    """SentencePiece's kind: blanks are ▁, a first blank is dropped, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocab, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return HuggingFaceTokenizer(tokenizer=tokenizer, bos_id=1, eos_id=2, end_ids=(2,))


def test_bytes_are_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([256, 97, 0xC3, 0xA9, 257, 300]) == "aé"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)


def test_characters_count_from_zero_in_order():
    tokenizer = CharTokenizer(characters="\nabé")
    assert tokenizer.encode("bé\n") == [2, 3, 0]
    assert tokenizer.decode([2, 3, 0, 4]) == "bé\n"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (4, None, None)


@pytest.mark.parametrize("character", ["z", "🤗", "\x00"])
def test_an_unknown_character_is_named(character):
    with pytest.raises(ValueError, match=r"at 2 is not among the 2 characters of the tokenizer; leave it out"):
        CharTokenizer(characters="ab").encode("ab" + character)


def test_words_count_from_two_in_order():
    tokenizer = WordTokenizer(words=("7", "class", "image", "p1"))
    assert tokenizer.encode(" class 7\n image p1 ") == [3, 2, 4, 5]
    assert tokenizer.decode([0, 3, 2, 4, 5, 1, 6]) == "class 7 image p1"
    assert [ids.tolist() for ids in tokenizer.encode_batch(["7", ""])] == [[2], []]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (6, 0, 1)


def test_an_unknown_word_is_named():
    with pytest.raises(ValueError, match=r"^word 'p9' is not among the 2 words of the tokenizer; leave it out, .*$"):
        WordTokenizer(words=("p1", "p2")).encode("p1 p9 p2")


def test_words_come_one_by_one():
    tokenizer = WordTokenizer(words=("a", "b", "c"))
    stream = TextStream(tokenizer)
    assert [stream.push([id_]) for id_ in (2, 3, 0, 4)] + [stream.finish()] == ["a", " b", "", " c", ""]


@given(st.text())
def test_any_text_survives_bytes(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.text(min_size=1))
def test_any_text_survives_its_characters(text):
    tokenizer = CharTokenizer(characters="".join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_any_text_survives_a_bpe(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_a_trained_bpe_knows_its_specials_and_its_text(bpe):
    assert (bpe.bos_id, bpe.eos_id, bpe.end_ids, bpe.adds_bos) == (0, 1, (1,), True)
    assert bpe.vocab_size == 300
    assert bpe.encode("<|eos|>") == [1]
    assert bpe.decode([0, *bpe.encode("add"), 1, 5_000]) == "add"
    assert len(bpe.encode(CODE)) < len(CODE) * 0.7


def test_a_small_text_gives_a_small_vocabulary():
    assert train_bpe(["ab ab ab"], vocab_size=4096).vocab_size < 270


def test_a_bpe_below_all_bytes_is_refused():
    with pytest.raises(ValueError, match="bpe_vocab=257 is less than 258"):
        train_bpe(["a"], vocab_size=257)


def test_training_gives_the_same_bpe_in_every_process(bpe):
    code = (
        "import sys; from data.tokenizer import fingerprint, train_bpe; import tests.data.test_tokenizer as t;"
        "print(fingerprint(train_bpe([t.CODE, *t.TEXTS], vocab_size=300)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(bpe)


@pytest.mark.parametrize("name", ["byte", "char", "bpe", "llama"])
def test_a_batch_equals_each_alone(name, bpe, llama):
    every = "".join(sorted(set("".join(TEXTS))))
    tokenizer = {"byte": ByteTokenizer(), "char": CharTokenizer(characters=every), "bpe": bpe, "llama": llama}[name]
    batch = tokenizer.encode_batch(TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    assert {ids.dtype for ids in batch} == {np.dtype("int32")}


@given(texts=st.lists(MIXED | st.text(st.characters(max_codepoint=127)), max_size=4))
@settings(max_examples=200)
@example(texts=["a<|eos|>b"])
@example(texts=["  a   b", "a\x1cb", "a \n b"])
def test_the_table_of_words_equals_tokenizers(bpe, texts):
    assert bpe._words is not None
    assert [ids.tolist() for ids in bpe.encode_batch(texts)] == [bpe.encode(text) for text in texts]


def test_every_character_is_cut_as_tokenizers_cuts_it(bpe):
    """Blanks, letters and digits of all kinds, beside ASCII ones, alone in a text and within one."""
    characters = [chr(point) for point in range(0x3100)]
    texts = [
        f"a{character}b {character} 1{character}\n {character}{character} \t{character}" for character in characters
    ]
    texts += ["".join(texts[:0x400]), "".join(texts)]
    assert bpe._words is not None
    assert [ids.tolist() for ids in bpe.encode_batch(texts)] == bpe._encode_each(texts)


def test_the_table_of_words_starts_anew_when_full(bpe, monkeypatch):
    monkeypatch.setattr("data.words.MAX_WORDS", 3)
    for text in ("one two three four", "five six", "one two"):
        assert bpe.encode_batch([text])[0].tolist() == bpe.encode(text)


def test_other_tokenizers_have_no_table_of_words(llama):
    assert llama._words is None


@pytest.mark.parametrize("name", ["byte", "char", "words", "bpe", "llama"])
def test_a_saved_tokenizer_is_read_back(name, bpe, llama, tmp_path):
    made = {
        "byte": ByteTokenizer(adds_bos=False),
        "char": CharTokenizer(characters="\n aé"),
        "words": WordTokenizer(words=("a", "é"), adds_bos=False),
        "bpe": bpe,
        "llama": llama,
    }
    tokenizer = made[name]
    tokenizer.save(tmp_path / "there")
    back = load_tokenizer(tmp_path / "there")
    assert fingerprint(back) == fingerprint(tokenizer)
    for field in ("vocab_size", "bos_id", "eos_id", "end_ids", "adds_bos", "chat_template", "special_ids", "byte_ids"):
        assert getattr(back, field) == getattr(tokenizer, field), field
    assert back.encode("a a") == tokenizer.encode("a a")


def test_fingerprints_tell_tokenizers_apart(bpe):
    some = [
        ByteTokenizer(),
        ByteTokenizer(adds_bos=False),
        CharTokenizer(characters="ab"),
        WordTokenizer(words=("ab",)),
        bpe,
    ]
    some += [train_bpe([CODE], vocab_size=300), train_bpe([CODE], vocab_size=300, adds_bos=False)]
    assert len({fingerprint(tokenizer) for tokenizer in some}) == len(some)


def write_folder(folder, bpe, **config):
    bpe.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_hugging_face_folder_says_what_its_specials_are(bpe, tmp_path):
    template = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]
    write_folder(tmp_path, bpe, bos_token=None, eos_token={"content": "<|eos|>"}, chat_template=template)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|bos|>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    back = load_huggingface(tmp_path)
    assert (back.bos_id, back.eos_id, back.end_ids, back.chat_template) == (0, 1, (1, 7), "{{ messages }}")


def test_a_tokenizer_file_alone_is_enough(bpe, tmp_path):
    write_folder(tmp_path, bpe)
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("add") == bpe.encode("add")


def test_a_file_that_truncates_does_not(bpe, tmp_path):
    short = tokenizers.Tokenizer.from_str(bpe.tokenizer.to_str())
    short.enable_truncation(2)
    short.enable_padding(length=50)
    short.save(str(tmp_path / "tokenizer.json"))
    assert load_huggingface(tmp_path).encode(CODE) == bpe.encode(CODE)


def break_json(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


def break_config(folder):
    (folder / "tokenizer_config.json").write_text("[1, 2]")


def name_no_token(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')


def remove(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "tokenizer.json is not a tokenizer that `tokenizers` "),
        (break_config, "tokenizer_config.json is not a JSON object"),
        (name_no_token, "eos_token '<end>' is not a token of "),
        (remove, "tokenizer.json does not exist; a Hugging Face tokenizer is a folder with tokenizer.json"),
    ],
)
def test_a_broken_folder_is_refused(damage, message, bpe, tmp_path):
    write_folder(tmp_path, bpe)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "char"}', '{"kind": "byte"}'])
def test_a_broken_file_of_our_own_is_refused(content, tmp_path):
    (tmp_path / "meshlight_tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_one_clear_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"tokenizer 'some/name' is not bpe, byte, char, words, .*no route\); name"):
        download_huggingface("some/name")


def stream(tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """Pieces of text when `ids` come in pushes of these sizes, then one by one."""
    text, pieces, at = TextStream(tokenizer), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        pieces.append(text.push(ids[at : at + size]))
        at += size
    return [*pieces, text.finish()]


def test_a_character_comes_when_it_is_whole():
    assert stream(ByteTokenizer(), list("aé🤗b".encode()), []) == ["a", "", "é", "", "", "", "🤗", "b", ""]


def test_what_stays_unfinished_comes_at_the_end():
    assert stream(ByteTokenizer(), list("a🤗".encode())[:-1], []) == ["a", "", "", "", "\ufffd"]


def test_certain_text_does_not_wait_for_an_unfinished_character():
    assert stream(ByteTokenizer(), list("ab🤗".encode()), [3, 3]) == ["ab", "🤗", "", "", "", "", "", "", ""]


def test_bytes_of_sentencepiece_come_with_the_next_piece(llama):
    ids = llama.encode("ab é a")
    assert llama.decode(ids) == "ab é a"
    byte_at = [index for index, id_ in enumerate(ids) if id_ in llama.byte_ids]
    pieces = stream(llama, ids, [])
    assert [pieces[at] for at in byte_at] == ["", ""]
    assert "".join(pieces) == "ab é a"


@given(ids=st.lists(st.integers(0, 300), max_size=30), sizes=st.lists(st.integers(0, 5), max_size=10))
@settings(max_examples=200)
@example(ids=[3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xFF, 260], sizes=[])
@example(ids=[1, 259, 262, 1, 1, 262, 262], sizes=[])
@example(ids=[3, 1, 131], sizes=[])
@example(ids=[3, 299, 131], sizes=[])
@pytest.mark.parametrize("name", ["byte", "bpe", "llama"])
def test_the_pieces_of_a_stream_are_the_whole_text(name, bpe, llama, ids, sizes):
    tokenizer = {"byte": ByteTokenizer(), "bpe": bpe, "llama": llama}[name]
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids)


def test_a_long_stream_decodes_only_its_end():
    class Counting(ByteTokenizer):
        def decode(self, ids):
            longest.append(len(ids))
            return super().decode(ids)

    longest: list[int] = []
    stream(Counting(), list(b"word " * 100), [])
    assert max(longest) <= 3
