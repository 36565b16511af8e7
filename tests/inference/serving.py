"""A server in a thread of the test, around any engine, and a tokenizer of bytes with ChatML's control tokens."""

import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import Iterator

import openai
import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers

from data import chat
from data.huggingface_tokenizer import HuggingFaceTokenizer
from inference.asking import Served
from inference.config import ServerConfig
from inference.connection import patient
from inference.keys import Keys
from inference.listening import Listener, listening_socket
from inference.metrics import Metrics
from inference.server import application
from inference.service import Reading, Service
from inference.spelling import Spelling

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "Answer <tool_call>…</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer(template: str = TEMPLATE) -> HuggingFaceTokenizer:
    """256 letters, one a byte, then the control tokens 256 and 257."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([START, END])
    return HuggingFaceTokenizer(tokenizer=made, eos_id=257, end_ids=(257,), chat_template=template)


class Running:
    """A server that answers."""

    def __init__(self, service: Service, url: str, loop: asyncio.AbstractEventLoop):
        self.service, self.url, self.loop = service, url, loop
        self.address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def connect(self) -> socket.socket:
        """A bare connection, which holds little that was not read."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(self.address)
        return connection


def raw(path: str, body: bytes, *headers: str) -> bytes:
    """A request as bytes."""
    told = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*told, *headers, "", ""]).encode() + body


@contextlib.contextmanager
def serving(
    engine, *, keys=(), capacity: int | None = None, model: HuggingFaceTokenizer | None = None, **options
) -> Iterator[Running]:
    """A server around the engine, till the block ends."""
    config = ServerConfig(**{"port": 0, "api_key": tuple(keys), **options})
    bound = listening_socket(config.host, config.port)
    model = model or tokenizer()
    served = Served(
        name="tiny", tokenizer=model, template=chat.template_of(model), max_length=engine.max_length, created=0,
        spelling=Spelling(model),
    )  # fmt: skip
    started, running = threading.Event(), []
    rows = engine.max_rows if hasattr(engine, "max_rows") else engine.options.max_rows

    async def run() -> None:
        reading = Reading(buffer=config.buffer, patience=config.patience, timeout=config.timeout)
        service = Service(engine, Metrics(), capacity=capacity or rows + config.queue, reading=reading)
        service.start()
        app = application(service, served, config, Keys(config.api_key))
        about = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        server = Listener(uvicorn.Config(app, http=patient(config.patience), timeout_graceful_shutdown=1, **about))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        running.append((Running(service, url, asyncio.get_running_loop()), server))
        started.set()
        try:
            await server.serve(sockets=[bound])
        finally:
            await service.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(60)
        yield running[0][0]
    finally:
        if hasattr(engine, "gate"):
            engine.gate.set()
        running[0][1].should_exit = True
        thread.join(60)
        assert not thread.is_alive()
