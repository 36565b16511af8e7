"""What `--help` prints: every key of a run with its value, its type and the comment beside it in the source. No jax."""

import ast
import inspect
import io
import textwrap
import tokenize
import typing

from parallel.records import describe, is_record


def help_text(record, section: str = "") -> str:
    """One block for the record's own keys, then one for each record inside it.

    train: Length, batch and rhythm of a run.
      train.steps=400      optimizer steps  [int]
      train.batch_size=16  B, sequences in one step over all devices  [int]
    """
    hints, notes = typing.get_type_hints(type(record)), comments(type(record))
    title = f"{section or 'run'}: {(inspect.getdoc(type(record)) or '').partition(chr(10))[0]}"
    rows, inner = [], []
    for name, annotation in hints.items():
        path, value = f"{section}.{name}".lstrip("."), getattr(record, name)
        if is_record(value):
            inner.append(help_text(value, path))
        else:
            rows.append((f"{path}={written(value)}", f"{notes[name]}  [{describe(annotation)}]"))
    width = max(len(setting) for setting, _ in rows)
    return "\n\n".join(["\n".join([title, *(f"  {setting:<{width}}  {note}" for setting, note in rows)]), *inner])


def written(value) -> str:
    """A value as the command line takes it: true, none, a,b; text with blanks or line ends is quoted."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    if isinstance(value, str) and value != "".join(value.split()):
        return repr(value)
    return str(value)


def comments(cls) -> dict[str, str]:
    """Each field's trailing comment in a dataclass's source: {"steps": "optimizer steps", …}."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    definition = typing.cast(ast.ClassDef, ast.parse(source).body[0])
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(field.target): by_line.get(field.end_lineno or 0, "") for field in fields}
