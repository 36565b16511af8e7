"""A single token as text and as bytes, for lists of log-probabilities. Knows no sentences.

A byte-level token that is half a character has the text U+FFFD; its bytes tell it apart.
"""

import functools

from data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer


class Spelling:
    """Every token's text, looked up once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The token's text; control tokens are spelled out."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def name(self, token: int) -> str:
        """The token's text, or its bytes where these are no whole text: `bytes:\\xe2\\x82`. No two are the same."""
        text = self.text(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token)) if "\ufffd" in text else text

    def bytes(self, token: int) -> list[int]:
        """The token's bytes."""
        text = self.text(token)
        if "\ufffd" not in text:
            return list(text.encode())
        return list(raw_bytes(self._tokenizer, token))

    def _look_up(self, token: int) -> str:
        piece = piece_of(self._tokenizer, token)
        if token in self._tokenizer.special_ids:
            return piece
        text = self._tokenizer.decode([token])
        return " " + text if piece.startswith("▁") and not text.startswith(" ") else text


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """What the vocabulary calls a token, or nothing."""
    return (tokenizer.tokenizer.id_to_token(token) or "") if isinstance(tokenizer, HuggingFaceTokenizer) else ""


def raw_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Bytes of a token that is no whole text."""
    if isinstance(tokenizer, ByteTokenizer):
        return bytes([token]) if token < 256 else b""
    piece = piece_of(tokenizer, token)
    if token in tokenizer.byte_ids:  # <0xE2>
        return bytes([int(piece[3:5], 16)])
    letters = byte_letters()
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else piece.encode()


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
