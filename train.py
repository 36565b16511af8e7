"""Train a language model: `train.py [CONFIG] [key=value …]`. The door: it reads the command line and starts the loop.

Nothing heavy is imported before the run is resolved, so `--help` and every config error answer at once.
"""

import pathlib
import sys
from collections.abc import Sequence

from configs.base import RunConfig
from configs.commandline import resolve
from configs.help import help_text
from data.config import PairsConfig
from parallel.records import to_dict

DEFAULT = pathlib.Path(__file__).parent / "configs" / "quickstart.py"
HELP = {"-h", "--help"}
USAGE = """\
usage: train.py [CONFIG] [key=value ...]

CONFIG is a Python file with run = RunConfig(...); without one it is configs/quickstart.py.
Settings are checked against the types below:   train.py configs/tiny.py name=first train.steps=20 optim.peak_lr=1e-3
The values below are those of CONFIG with the settings applied; a,b is a list, none is nothing.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit status is 0 when done or saved, 2 after an error that the user can mend."""
    try:
        run = resolve([word for word in arguments if word not in HELP], DEFAULT)
        if HELP & set(arguments):
            print(USAGE, help_text(run), sep="\n")
            return 0
        return start(run)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev train.py … shows where
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the loop, which notes it and saves
        print(file=sys.stderr)
        return 130


def start(run: RunConfig) -> int:
    """Take the run apart and hand the loop its pieces; only from here on is anything heavy imported."""
    from parallel.host_memory import keep_freed_memory
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    keep_freed_memory()
    import jax

    import training.loop
    from inference.config import SamplingConfig
    from parallel import hosts
    from parallel.mesh import make_mesh

    def sample(model, parameters, tokenizer, *, prompt: str, num_tokens: int, seed: int) -> str:
        """What a model of these parameters writes: training and inference know each other only here."""
        from inference import generate

        mesh, how = make_mesh(run.mesh), SamplingConfig(seed=seed)
        return generate.sample(
            model, parameters, tokenizer, mesh, run.rules, prompt=prompt, num_tokens=num_tokens, sampling=how
        )

    def score(model, parameters, corpus) -> tuple[float, list[str]]:
        """BLEU of what a model of these parameters makes of the validation pairs, greedily, and its translations."""
        from evals.translation import bleu
        from inference.config import BeamConfig
        from inference.translation import translate

        sources, most = corpus.valid.sources.each(), model.max_length
        fits = [place for place, source in enumerate(sources) if len(source) <= most]
        found = translate(
            model, parameters, make_mesh(run.mesh), run.rules.with_whole_rows(), [sources[place] for place in fits],
            beam=BeamConfig(), bos_id=corpus.tokenizer.bos_id, eos_id=corpus.tokenizer.eos_id, max_tokens=most,
        )  # fmt: skip
        texts = [""] * len(sources)
        for place, answer in zip(fits, found, strict=True):
            texts[place] = corpus.tokenizer.decode(answer.tokens)
        references = [target for _, target in corpus.valid_texts]
        return bleu(texts, references), texts

    with hosts.joined(run.hosts):
        devices = jax.devices()
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        run = run.on(len(devices), devices[0].device_kind, slices)
        return training.loop.train(
            pathlib.Path(run.out) / run.name,
            config=to_dict(run),
            seed=run.seed,
            model=run.model,
            mesh=run.mesh,
            rules=run.rules,
            execution=run.execution,
            data=run.data,
            optim=run.optim,
            schedule=run.train,
            sample=sample,
            score=score if isinstance(run.data, PairsConfig) else None,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
